"""Experts from the tensors of a layer of vLLM.

vLLM's rows are [gate; up], but those of its activation "swigluoai", which take turns; scales of a pair
are (gate, up). Ours are [up; gate]. vLLM's configuration is `FusedMoEConfig` of vllm 0.32 and 0.33,
`fused_moe/config.py`; what it computes is in `fused_moe/activation.py`.
"""

# SPDX-License-Identifier: Apache-2.0
from typing import Any, NamedTuple

import torch

from ...kernels.backends import UnsupportedError
from ...reference.activation import ActivationType, by_name
from ...reference.recipe import BLOCK_SIZE
from ...reference.weights.experts import Experts
from ...reference.weights.prepare import assemble_experts, prepare_experts
from ..gate import Gate, up_then_gate

INTERLEAVED = "swigluoai"
_OPEN_AI = Gate(ActivationType.Swiglu, alpha=1.702, beta=1.0, clamp_limit=7.0)
"""Of `INTERLEAVED`: numbers of vLLM's kernel, which reads no others."""
_ACTIVATIONS = {name: kind for (name, _), kind in by_name("vllm").items()}
_E4M3_RANGE = 6.0 * 448.0  # by which a checkpoint's activation scales divide the largest magnitude


class Packed(NamedTuple):
    """One of the two projections of E experts, as an NVFP4 checkpoint has it."""

    codes: torch.Tensor  # [E, rows, K/2] uint8
    block_scales: torch.Tensor  # [E, rows, K/16] e4m3
    decode: torch.Tensor  # [E] fp32, or [E, 2] of (gate, up)
    input_scale: torch.Tensor | None = None  # fp32 decode scales of every expert of all ranks


def gate_of(config: Any) -> Gate:
    """Return the activation of a layer, with its parameters.

    Args:
        config: vLLM's `FusedMoEConfig`.

    Raises:
        UnsupportedError: an activation or a parameter that is not modelled here.
    """
    name = config.activation.value
    if name == INTERLEAVED:
        return _OPEN_AI
    if name not in _ACTIVATIONS:
        allowed = ", ".join(sorted([*_ACTIVATIONS, INTERLEAVED]))
        raise UnsupportedError(f"activation is {name!r}; it must be one of {allowed}")
    kind = _ACTIVATIONS[name]
    if kind is ActivationType.Situ:
        linear = config.activation_situ_linear_beta
        if linear is None or linear <= 0:
            raise UnsupportedError(
                f"activation_situ_linear_beta is {linear}, of up that is not bounded; it must be above 0"
            )
        return Gate(kind, alpha=config.activation_situ_beta, beta=linear)
    if kind is not ActivationType.Swiglu:
        return Gate(kind)
    if name == "silu":  # vLLM reads the limit alone
        return Gate(kind, clamp_limit=config.swiglu_limit)
    return Gate(kind, config.swiglu_alpha, config.swiglu_beta, config.swiglu_limit)


def check_sizes(hidden_size: int, intermediate_size: int) -> None:
    """Raise UnsupportedError unless both sizes of a rank's experts are whole blocks."""
    for name, size in (
        ("hidden_size", hidden_size),
        ("intermediate_size_per_partition", intermediate_size),
    ):
        if size % BLOCK_SIZE:
            raise UnsupportedError(f"{name} is {size}; it must be a multiple of {BLOCK_SIZE}")


def from_bf16(
    config: Any,
    w13: torch.Tensor,
    w2: torch.Tensor,
    w13_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
) -> Experts:
    """Quantize the weights of a layer.

    Args:
        config: vLLM's `FusedMoEConfig`.
        w13: [E, 2 I, H] bf16 or fp16 in vLLM's order, or [E, I, H] without a gate; w2 [E, H, I].
        w13_bias: [E, 2 I] or [E, I], of any float dtype; w2_bias [E, H].

    Raises:
        UnsupportedError: an activation that is not modelled.
        ValueError, TypeError: weights that `prepare_experts` refuses.
    """
    gate = gate_of(config)
    return prepare_experts(
        _ours(config, gate, w13),
        w2.contiguous(),
        gate.activation,
        w13_bias=None if w13_bias is None else _ours(config, gate, w13_bias),
        w2_bias=w2_bias,
        **gate.parameters,
    )


def from_nvfp4(config: Any, w13: Packed, w2: Packed, *, static: bool) -> Experts:
    """Lay the quantized weights of a layer out; codes and scales keep their bits.

    Args:
        config: vLLM's `FusedMoEConfig`.
        w13, w2: both projections, rows in vLLM's order.
        static: take the activation scales, of each projection the largest over all experts.

    Raises:
        UnsupportedError: an activation that is not modelled.
        ValueError: weights that `assemble_experts` refuses; static scales that nobody calibrated.
    """
    gate = gate_of(config)
    decode = w13.decode.float()
    if decode.dim() == 2:
        decode = decode.flip(1) if gate.activation.gated else decode[:, 0]
    amax: tuple[float | None, float | None] = (None, None)
    if static:
        amax = _amax(w13.input_scale), _amax(w2.input_scale)
        if amax == (_E4M3_RANGE, _E4M3_RANGE):
            raise ValueError(
                "the checkpoint's input scales are 1, neutral, as of one that was never calibrated; "
                "take a quantization that does not read them, nvfp4_moe or nvfp4_moe_w4a16"
            )
    return assemble_experts(
        _ours(config, gate, w13.codes),
        _ours(config, gate, w13.block_scales.view(torch.uint8)),
        decode.contiguous(),
        w2.codes.contiguous(),
        w2.block_scales.contiguous(),
        w2.decode.float().contiguous(),
        gate.activation,
        input_amax=amax[0],
        intermediate_amax=amax[1],
        **gate.parameters,
    )


def _ours(config: Any, gate: Gate, rows: torch.Tensor) -> torch.Tensor:
    if not gate.activation.gated:
        return rows.contiguous()
    return up_then_gate(rows, interleaved=config.activation.value == INTERLEAVED)


def _amax(scales: torch.Tensor | None) -> float:
    """Return the largest magnitude that activation scales stand for, exact in double."""
    if scales is None:
        raise ValueError("the checkpoint has no input scales; static activations need them")
    if not bool(((scales > 0) & scales.isfinite()).all()):
        raise ValueError(
            "the checkpoint has no input scale above 0 for every expert; static activations need them"
        )
    return scales.max().item() * _E4M3_RANGE
