"""`fused_moe_masked`, the layer on masked input: its arguments and its table of backends."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ....reference import checks
from ....reference.moe.hidden_states import Activations
from ....reference.recipe import BLOCK_SIZE, Recipe
from ....reference.weights.experts import Experts
from ... import backends
from ...backends import Asked, Backend, Operation
from ...device import capability_of
from ...quantize.call import check_optional_flags, four_over_six_of, math_of
from ...quantize.masked import check_masked_m, nvfp4_quantize_masked
from ..backends import gemm_notes
from ..call import Mode, activation_mode, check_experts, padded_activations
from .call import REFERENCE, MaskedMoECall


def with_codes(call: MaskedMoECall) -> MaskedMoECall:
    """The call with its bf16 hidden states quantized, where they are to be."""
    if call.quantize is None:
        return call
    scale, options = call.quantizer_arguments()
    states = call.activations.hidden_states.unflatten(0, (call.experts.num_local, call.max_m))
    quantized = nvfp4_quantize_masked(states, call.masked_m, scale, **options)
    codes, scales, *token = (t.flatten(0, 1) for t in quantized)
    activations = padded_activations(
        Activations(codes, scales, *token), call.experts.padded_hidden_size
    )
    return replace(call, activations=activations, quantize=None)


def _quantized_before(call: MaskedMoECall) -> MaskedMoECall:
    """The call as an implementation takes it: it quantizes per token on its way."""
    return with_codes(call) if call.quantize == "static" else call


def _in_triton(call: MaskedMoECall) -> torch.Tensor:
    from .launch import OP

    return OP(_quantized_before(call))


def _in_reference(call: MaskedMoECall) -> torch.Tensor:
    return REFERENCE(_quantized_before(call))


def _triton_refusal(call: MaskedMoECall) -> str | None:
    states = call.activations.hidden_states
    return backends.triton_refusal_of(states, "hidden_states are", call.capability)


def _adopt(
    name: str, run: Callable[[MaskedMoECall], Any]
) -> Callable[[MaskedMoECall], torch.Tensor]:
    """The function of a user's backend: it gets codes, and its output is checked."""

    def adopted(call: MaskedMoECall) -> torch.Tensor:
        result = run(with_codes(call))
        expected = torch.empty(call.output_shape, dtype=torch.bfloat16, device="meta")
        backends.check_results(name, [result], [expected], call.activations.hidden_states)
        return result

    return adopted


def _notes(call: MaskedMoECall) -> Sequence[str]:
    return (
        *gemm_notes(call.capability, call.experts),
        "FlashInfer (0.7.2, 0.7.4) has no fused layer of masked input: grouped_gemm_nt_masked and "
        "scaled_fp4_grouped_quantize are parts of one, of static scales",
    )


FUSED_MOE_MASKED: Operation[MaskedMoECall, torch.Tensor] = Operation(
    "fused_moe_masked",
    [
        Backend("triton", _triton_refusal, _in_triton, backends.on_gpu, launches=True),
        Backend("reference", backends.serves_all, _in_reference),
    ],
    notes=_notes,
    adopt=_adopt,
)


@FUSED_MOE_MASKED.served()
def fused_moe_masked(
    hidden_states: torch.Tensor,
    masked_m: torch.Tensor,
    experts: Experts,
    *,
    hidden_states_scale: torch.Tensor | None = None,
    per_token_scale: torch.Tensor | None = None,
    activation: Mode | None = None,
    expected_m: int | None = None,
    backend: str = "auto",
    fast_math: bool | None = None,
    nvfp4_4over6: Any = None,
    batch_invariant: bool = False,
) -> Asked[MaskedMoECall]:
    """The layer on masked input, as DeepEP's low-latency dispatch leaves it, without routing or weights.

    The rows beyond `masked_m` are never read: NaN and addresses that do not exist are harmless there.
    The result is zero there. Nothing waits for the GPU, so that a CUDA graph can be replayed with
    another `masked_m`. Experts with `router_weight_on_input` want rows that are already weighed.

    Args:
        hidden_states: [E, max_m, hidden size] bf16, or codes uint8 [E, max_m, padded hidden size / 2];
            contiguous.
        masked_m: [E] int32 or int64, the rows of each expert, 0 to max_m.
        experts: of this rank, E of them.
        hidden_states_scale: with codes, their block scales, e4m3 or uint8 [E, max_m, padded hidden
            size / 16], linear (`nvfp4_quantize_masked`).
        per_token_scale: with codes, [E, max_m] fp32; None for static scales. A global scale of each
            expert then belongs into that expert's scalars.
        activation: how bf16 hidden states are quantized: "per-token", "static" (experts with
            `input_amax`) or "bf16" (not at all); omitted, as the experts' scales say. None with codes.
        expected_m: rows of an expert on average, by which tiles are chosen; omitted, max_m. It may
            change the order of sums, and so last bits.
        backend: "auto", "triton" or "reference".
        fast_math, nvfp4_4over6: of both quantizations, as for `fused_moe`.
        batch_invariant: the bits of a row depend on the row and its expert alone.

    Returns:
        [E, max_m, hidden size] bf16, for the dispatcher to weigh and add up.

    Raises:
        ValueError, TypeError: an argument that no backend accepts.
        UnsupportedError: the backend that was named cannot serve the call.
    """
    checks.instance("experts", experts, Experts, "Experts, as prepare_experts makes them")
    check_experts(experts)
    check_optional_flags(fast_math=fast_math)
    checks.flag("batch_invariant", batch_invariant)
    activations = _activations(hidden_states, hidden_states_scale, per_token_scale, experts)
    max_m = hidden_states.shape[1]
    check_masked_m(masked_m, experts.num_local, max_m, "hidden_states", hidden_states)
    if expected_m is not None:
        checks.integer("expected_m", expected_m, 1, max_m)
    quantize = None
    if activations.is_bf16:
        mode = activation_mode(activation, experts)
        quantize = None if mode == "bf16" else mode
    elif activation is not None:
        checks.wrong_value("activation", activation, "None with codes, which are quantized already")
    call = MaskedMoECall(
        activations,
        masked_m,
        experts,
        max_m if expected_m is None else expected_m,
        Recipe(math_of(fast_math, "cuda"), four_over_six_of(nvfp4_4over6)),
        batch_invariant,
        quantize,
        capability_of(hidden_states),
    )
    return call, FUSED_MOE_MASKED.check_name(backend)


explain_fused_moe_masked = FUSED_MOE_MASKED.explaining(fused_moe_masked)


def _activations(
    states: torch.Tensor, scales: Any, per_token: Any, experts: Experts
) -> Activations:
    """The hidden states with their rows one after another, checked."""
    e, hidden, padded = experts.num_local, experts.hidden_size, experts.padded_hidden_size
    dtypes = (torch.bfloat16, torch.uint8)
    checks.tensor("hidden_states", states, dtypes, (e, "max_m", "columns"), contiguous=True)
    is_codes = states.dtype == torch.uint8
    shape = (e, states.shape[1])
    columns = padded // 2 if is_codes else hidden
    checks.tensor("hidden_states", states, shape=(*shape, columns))
    checks.same_device("experts", experts.gemm1_weights, "hidden_states", states)
    if not is_codes:
        for name, value in (("hidden_states_scale", scales), ("per_token_scale", per_token)):
            if value is not None:
                checks.wrong_value(name, value, "None with bfloat16 hidden_states")
        return Activations(states.flatten(0, 1))
    bytes_of = (torch.float8_e4m3fn, torch.uint8)
    like = ("hidden_states", states)
    checks.tensor(
        "hidden_states_scale", scales, bytes_of, (*shape, padded // BLOCK_SIZE), contiguous=True,
        like=like,
    )  # fmt: skip
    if per_token is not None:
        checks.tensor(
            "per_token_scale", per_token, (torch.float32,), shape, contiguous=True, like=like
        )
        per_token = per_token.flatten()
    return Activations(states.flatten(0, 1), scales.flatten(0, 1), per_token)
