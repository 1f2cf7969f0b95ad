"""The backends of the fused mixture of experts.

The two sums are each backend's own; everything else is the same to the bit. "auto" takes the first
backend that can serve, before any work starts; a backend that was named never falls back.
"""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch

from ...reference.moe.hidden_states import Activations
from ...reference.moe.layer import fused_moe as reference_fused_moe
from ...reference.recipe import SfLayout
from ...reference.weights.experts import Experts
from .. import backends
from ..backends import Backend, Operation
from ..flashinfer import trtllm
from ..flashinfer.functions import LAYERS
from ..flashinfer.layer import Layer
from ..flashinfer.rules import every_text
from ..quantize.api import nvfp4_quantize
from . import statistics as moe_statistics
from .call import MoECall, padded

MoEBackend = Literal[
    "auto", "flashinfer:trtllm", "flashinfer:cute-dsl", "flashinfer:cutlass", "triton", "reference"
]
"""The names that an editor offers for `backend`; `register_backend` adds others."""
Results = list[torch.Tensor]
"""[output [T, H]], or without `do_finalize` [rows, weights, permuted rows]."""
_Run = Callable[[MoECall], Results]


def with_codes(call: MoECall) -> MoECall:
    """Return the call with hidden states that are padded, and quantized if they need it."""
    call = padded(call)
    if call.quantize is None:
        return call
    scale, options = call.quantizer_arguments()
    codes = nvfp4_quantize(
        call.activations.hidden_states,
        scale,
        SfLayout.layout_linear,
        flashinfer=call.recipe.flashinfer,
        **options,
    )
    return replace(call, activations=Activations(*codes), quantize=None)


def on_flashinfer(layer: Layer) -> Backend[MoECall, Results]:
    """Return the row of one of FlashInfer's layers."""

    def refusal(call: MoECall) -> str | None:
        return moe_statistics.refusal(layer.name, call) or layer.refusal(call)

    def run(call: MoECall) -> Results:
        return layer.run(with_codes(call))

    return Backend(layer.name, refusal, run, remembers=layer.remembers)


def _triton_refusal(call: MoECall) -> str | None:
    if (reason := moe_statistics.refusal("triton", call)) is not None:
        return reason
    if call.lora_delta is not None:
        return _NO_LORA
    if call.variant.rounds_first_gemm:
        return f'build="{call.build}" rounds the first GEMM to bf16, which these kernels do not'
    states = call.activations.hidden_states
    return backends.triton_refusal_of(states, "hidden_states are", call.capability)


def _reference_refusal(call: MoECall) -> str | None:
    if (reason := moe_statistics.refusal("reference", call)) is not None:
        return reason
    if call.lora_delta is not None:
        return _NO_LORA
    if call.variant.rounds_first_gemm and torch.compiler.is_compiling():
        return f'torch.compile cannot trace build="{call.build}"'
    return None


_NO_LORA = "gemm1_lora_delta is FlashInfer's alone"


def _in_triton(call: MoECall) -> Results:
    from . import launch as ours

    call = _with_static_codes(call)
    router = None if call.shared_experts else call.router()
    if router is None:
        return _run("triton", call, ours.OP, ours.fused_moe)
    given = ours.LogitsCall(call, router)
    if call.observe is None:
        *steps, weights = ours.OP_OF_LOGITS(given)
    else:
        *steps, weights = ours.fused_moe_of_logits(given, observe=call.observe)
    return _results(call, steps, weights)


def _in_reference(call: MoECall) -> Results:
    if call.variant.rounds_first_gemm:
        return _in_its_arithmetic(call)
    from . import ops as ours

    return _run("reference", _with_static_codes(call), ours.REFERENCE, ours.reference)


def _with_static_codes(call: MoECall) -> MoECall:
    """Quantize by static scales; an implementation quantizes per token on its way."""
    return with_codes(call) if call.quantize == "static" else call


def _run(name: str, call: MoECall, op: Any, function: Any) -> Results:
    """Run a call by an implementation: its op, or the plain function, which takes an observer."""
    ids, weights = call.routed(name)
    if call.observe is None:
        steps = op(call, ids, weights)
    else:
        steps = function(call, ids, weights, observe=call.observe)
    return _results(call, steps, weights)


def _results(call: MoECall, steps: Sequence[torch.Tensor], weights: torch.Tensor) -> Results:
    """Return the results of a call from those of an implementation."""
    output, rows, permuted = steps
    if not call.do_finalize:
        return [rows, weights.bfloat16(), permuted]
    return call.placed(output)


def _in_its_arithmetic(call: MoECall) -> Results:
    """Run the reference itself, for a variant whose roundings the op does not have."""
    call = with_codes(call)
    output = reference_fused_moe(
        call.activations,
        call.experts,
        *call.routed(),
        recipe=call.recipe,
        variant=call.build,
        local_expert_offset=call.local_expert_offset,
        finalize_order=call.finalize_order,
        output_dtype=call.output_dtype,
    ).output
    return call.placed(output)


def _unfit(call: MoECall) -> str | None:
    """Return why no user's backend serves the call."""
    if not call.do_finalize:
        return "a registered backend returns the output alone, and do_finalize is False"
    if call.observe is not None:
        return "stats=True needs the intermediate, which a registered backend does not return"
    return None


def _adopt(name: str, run: Callable[[MoECall], Any]) -> _Run:
    """Wrap the function of a user's backend: it gets codes, and its output is checked and copied."""

    def adopted(call: MoECall) -> Results:
        result = run(with_codes(call))
        shape = (call.tokens, call.experts.hidden_size)
        expected = torch.empty(shape, dtype=call.output_dtype, device="meta")
        backends.check_results(name, [result], [expected], call.activations.hidden_states)
        return call.placed(result)

    return adopted


def _notes(call: MoECall) -> list[str]:
    """Say where FlashInfer's layer leaves open what ours determine, and how Triton serves the call."""
    notes = []
    if trtllm.LAYER.refusal(call) is None:
        texts = every_text(trtllm.LEFT_OPEN, call)
        notes += [f"{trtllm.NAME} differs for some values: {text}" for text in texts]
    named = call.logits is not None and call.routing.functions != "exact"
    if named and _triton_refusal(call) is None:
        from .routing import refusal

        if reason := refusal(call.routing, call.device):
            notes.append(f"triton's layer routes by the reference, to the same bits: {reason}")
    gemm = gemm_notes(call.capability, call.experts)
    if steps := _in_one_launch(call):
        gemm = [f"{gemm[0]}; it {steps} of so few tokens in one launch"]
    return notes + gemm


def _in_one_launch(call: MoECall) -> str | None:
    """Say on an sm_90 what the launch of `hopper/prologue.py` does, where few tokens take it."""
    if call.capability != (9, 0) or not backends.HAS_TRITON:
        return None
    from .hopper import prologue
    from .hopper.config import refusal_of

    columns = call.experts.padded_hidden_size
    few = prologue.serves(call.tokens, call.routing.top_k, columns)
    if not few or refusal_of(90, call.experts) is not None:
        return None
    if call.logits is None or not prologue.routes(call.logits, call.routing):
        return "sorts the slots and writes the rows"
    return "routes, sorts the slots and writes the rows"


def gemm_notes(capability: tuple[int, int] | None, experts: Experts) -> list[str]:
    """Say on an sm_90 which of its grouped GEMMs Triton takes, and what bits it has."""
    if capability != (9, 0) or not backends.HAS_TRITON:
        return []
    from .hopper.config import refusal_of

    reason = refusal_of(90, experts)
    if reason is None:
        return [
            "triton multiplies by its grouped GEMM for sm_90: a token's bits depend on no other token, "
            "with batch_invariant=False, too"
        ]
    return [f"triton multiplies by its grouped GEMM for every GPU, not by that for sm_90: {reason}"]


FUSED_MOE: Operation[MoECall, Results] = Operation(
    "fused_moe",
    [
        *map(on_flashinfer, LAYERS.values()),
        Backend("triton", _triton_refusal, _in_triton, backends.on_gpu, launches=True),
        Backend("reference", _reference_refusal, _in_reference),
    ],
    notes=_notes,
    adopt=_adopt,
    unfit=_unfit,
)
ORDER = FUSED_MOE.names
"""The backends of this package, in the order in which "auto" tries them."""
