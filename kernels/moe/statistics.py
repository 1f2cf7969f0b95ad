"""`fused_moe(..., stats=True)`: the statistics of a call, taken while its intermediate is there."""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import torch

from ...reference.statistics.counts import QuantizationStatistics
from ...reference.statistics.measure import quantization_statistics
from ...reference.statistics.moe import MoEStatistics
from .call import MoECall


class Observer:
    """Receives the intermediate of a call from a backend (`call.Observe`)."""

    def __init__(self, request: MoECall):
        self._request = request
        self._seen: tuple[QuantizationStatistics, QuantizationStatistics] | None = None

    def __call__(
        self, ids: torch.Tensor, intermediate: torch.Tensor, row_of_slot: torch.Tensor | None
    ) -> None:
        r, e = self._request, self._request.experts
        local = ids - r.local_expert_offset
        ids = torch.where((local >= 0) & (local < e.num_local), ids, -1)
        static = r.is_static
        x = r.activations.hidden_states[:, : e.hidden_size]
        hidden_states = quantization_statistics(
            x,
            r.recipe,
            experts=ids,
            num_experts=r.all_experts,
            encode_scale=e.input_scale if static else None,
        )
        encode = None
        if static:
            encode = e.intermediate_scale
            encode = intermediate.new_ones(1) if encode is None else encode
        self._seen = (
            hidden_states,
            quantization_statistics(
                intermediate[:, : e.intermediate_size],
                r.recipe,
                experts=_of_rows(ids.flatten(), row_of_slot),
                num_experts=r.all_experts,
                encode_scale=encode,
            ),
        )

    @property
    def statistics(self) -> MoEStatistics:
        """Return the statistics; they count no tokens if no backend had an intermediate to show."""
        r = self._request
        if self._seen is None:
            return MoEStatistics.empty(r.all_experts, r.device)
        return MoEStatistics(*self._seen, _invalid(r))


def _invalid(r: MoECall) -> torch.Tensor:
    """Count, [2] int64, the slots that `call.check_values` refuses if it may read them."""
    if r.ids is None or r.weights is None:  # a router's own
        return torch.zeros(2, dtype=torch.int64, device=r.device)
    out_of_range = (r.ids < -1) | (r.ids >= r.all_experts)
    return torch.stack((out_of_range.sum(), (r.weights.isnan() & (r.ids >= 0)).sum()))


def _of_rows(of_slot: torch.Tensor, row_of_slot: torch.Tensor | None) -> torch.Tensor:
    """Return the expert of each row; -1 for rows of no slot, which nothing has written."""
    if row_of_slot is None:
        return of_slot
    nowhere = len(of_slot)
    rows = torch.where(row_of_slot < 0, nowhere, row_of_slot).long()
    return of_slot.new_full((nowhere + 1,), -1).scatter_(0, rows, of_slot)[:-1]


def observed(r: MoECall) -> MoECall:
    """Return the call with an observer.

    Raises:
        ValueError: nothing of it is quantized.
    """
    if r.is_w4a16:
        raise ValueError('stats is True; with activation "bf16" no activations are quantized')
    return replace(r, observe=Observer(r))


def refusal(backend: str, r: MoECall) -> str | None:
    """Return why a backend cannot show a call's intermediate; None if it can, or need not."""
    if r.observe is None:
        return None
    if backend.startswith("flashinfer"):
        return "stats=True needs the intermediate, which FlashInfer does not return"
    if r.variant.rounds_first_gemm:
        return f'stats=True knows no build="{r.build}"'
    if torch.compiler.is_compiling():
        return "torch.compile cannot trace stats=True"
    return None
