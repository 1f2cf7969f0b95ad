"""The backends of the BF16, FP8 and MXFP8 mixtures of experts.

A backend of FlashInfer serves one format. Where no step rounds, all backends of a format agree to the
bit; elsewhere `reference/moe/baseline_moe.py` says what FlashInfer leaves open.
"""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from typing import Any

import torch

from ...reference.moe.baseline_moe import FORMATS, Format, baseline_moe
from .. import backends
from ..backends import Backend, Operation
from ..flashinfer import baseline_moe as fi
from .call import BaselineCall

_Run = Callable[[BaselineCall], torch.Tensor]


def _on_flashinfer(format: Format) -> Backend[BaselineCall, torch.Tensor]:
    def refusal(call: BaselineCall) -> str | None:
        if call.experts.format != format:
            return f"it serves {format}, and the experts are in {call.experts.format}"
        return fi.refusal(call)

    return Backend(fi.NAMES[format], refusal, fi.run, lambda call: call.experts.format == format)


def _in_reference(call: BaselineCall) -> torch.Tensor:
    ids, weights = call.routed()
    offset = call.local_expert_offset
    return baseline_moe(
        call.activations, call.experts, ids, weights, local_expert_offset=offset
    ).output


def _adopt(name: str, run: Callable[[BaselineCall], Any]) -> _Run:
    """The function of a user's backend, whose output is checked."""

    def adopted(call: BaselineCall) -> torch.Tensor:
        result = run(call)
        states = call.activations.hidden_states
        shape = states.shape[0], call.experts.w2.shape[1]
        expected = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        backends.check_results(name, [result], [expected], states)
        return result  # type: ignore[no-any-return]

    return adopted


BASELINE_MOE: Operation[BaselineCall, torch.Tensor] = Operation(
    "baseline_moe",
    [*map(_on_flashinfer, FORMATS), Backend("reference", backends.serves_all, _in_reference)],
    adopt=_adopt,
)
