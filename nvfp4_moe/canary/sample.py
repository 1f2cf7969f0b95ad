"""Some rows of one call of the fused layer, and the case that they are judged by, on the CPU."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..cases.moe_case import MoECase, to_device
from ..failures.slice_call import PER_EXPERT
from ..kernels.moe.call import MoECall, padded
from ..kernels.moe.row_samples.buffer import row_numbers
from ..kernels.quantize.api import nvfp4_quantize
from ..reference.moe.finalize import split_k_groups
from ..reference.moe.hidden_states import Activations
from ..reference.recipe import SfLayout
from ..reference.weights.copies import in_layouts_of, without_layouts
from ..reference.weights.experts import Experts
from ..reference.weights.versions import tensors_of, versions


@dataclass(frozen=True)
class Sample:
    """Rows of a call; `call` has their tensors in the place of its own."""

    layer: str
    call: MoECall  # of R rows, and with all of the layer's experts
    output: torch.Tensor  # [R, valid H], the server's
    backend: str
    tokens: int  # of the server's call
    rows: Sequence[int]  # in it
    versions: list[int]  # of the experts' tensors then

    @property
    def overtaken(self) -> bool:
        """True if the weights have been written since: the rows can no longer be judged."""
        return versions(self.call.experts) != self.versions


def refusal(call: MoECall) -> str | None:
    """Say why a call cannot be watched; None if it can."""
    if call.ids is None:
        return "it routes from logits; give it ids and weights"
    if not call.activations.is_bf16:
        return "its hidden states are quantized already"
    if not call.do_finalize or call.lora_delta is not None:
        return "it has no finalized output of its own (do_finalize=False, or a LoRA delta)"
    if any(t.is_inference() for t in tensors_of(call.experts)):
        return "its weights were made in inference mode, where torch counts no writes to them"
    return None


def sample_of(
    layer: str,
    call: MoECall,
    backend: str,
    rows: Sequence[int],
    tensors: tuple[torch.Tensor, ...],
    tokens: int,
    written: list[int],
) -> Sample:
    """Return a sample of rows that were copied: hidden states, ids, weights and output."""
    states, ids, weights, output = tensors
    small = replace(call, activations=Activations(states), ids=ids, weights=weights, output=None)
    return Sample(layer, small, output, backend, tokens, rows, written)


def taken_now(
    layer: str, call: MoECall, backend: str, output: torch.Tensor, taken: int, most: int
) -> Sample:
    """Copy rows of a call that has just been made, on its device and stream.

    Args:
        taken: samples of the layer before, by which the rows are chosen.
        most: R.
    """
    tokens = call.tokens
    rows = row_numbers(taken, most, tokens)
    assert call.ids is not None and call.weights is not None
    tensors = call.activations.hidden_states, call.ids, call.weights, output
    # Slices, not an index tensor: nothing waits for a copy to the GPU.
    copies = tuple(torch.stack([t[row] for row in rows]) for t in tensors)
    return sample_of(layer, call, backend, rows, copies, tokens, versions(call.experts))


def case_of(sample: Sample) -> MoECase:
    """Return the rows and the experts that they chose, on the CPU; ids are numbered anew.

    Slots of other ranks become slots of no expert. The finalize has the order that it had in the
    server's call, which depends on the number of tokens there.
    """
    call = sample.call
    assert call.ids is not None and call.weights is not None
    local = call.ids.cpu() - call.local_expert_offset
    here = (local >= 0) & (local < call.experts.num_local)
    used = local[here].unique().tolist() or [0]
    ids = torch.full_like(local, -1)
    for new, old in enumerate(used):
        ids[local == old] = new
    experts = _some(call.experts, used)
    order = call.finalize_order
    if (
        order == "flashinfer"
        and split_k_groups(sample.tokens, ids.shape[1], call.experts.hidden_size) == 1
    ):
        order = "slot"
    return MoECase(
        f"{sample.layer}, rows {', '.join(map(str, sample.rows))} of {sample.tokens}",
        _codes(call, experts),
        experts,
        replace(call.routing, top_k=ids.shape[1]),
        len(used),
        ids=ids,
        weights=call.weights.cpu(),
        recipe=call.recipe,
        build=call.build,
        finalize_order=order,
        output_dtype=call.output_dtype,
    )


def _codes(call: MoECall, experts: Experts) -> Activations:
    """Return the hidden states as the layer quantizes them, by the reference."""
    states = padded(call).activations.hidden_states.cpu()
    if call.quantize is None:
        return Activations(states)
    scale, options = replace(call, experts=experts).quantizer_arguments()
    codes = nvfp4_quantize(
        states,
        scale,
        SfLayout.layout_linear,
        flashinfer=call.recipe.flashinfer,
        backend="reference",
        **options,
    )
    return Activations(*codes)


def _some(experts: Experts, index: Sequence[int]) -> Experts:
    """Copy some experts to the CPU, one by one: no memory of a GPU is asked for."""
    plain = without_layouts(experts, router_weight_on_input=False, first_expert=None)
    found = {name: getattr(plain, name) for name in PER_EXPERT}
    kept: dict[str, Any] = {
        name: torch.stack([t[i].cpu() for i in index]) for name, t in found.items() if t is not None
    }
    scales: dict[str, Any] = {
        name: to_device(getattr(plain, name), "cpu")
        for name in ("input_scale", "intermediate_scale")
    }
    return in_layouts_of(replace(plain, **kept, **scales), experts)
