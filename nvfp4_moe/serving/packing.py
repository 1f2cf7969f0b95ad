"""Experts from the tensors of a server's layer.

Servers' rows are [gate; up], or gate and up take turns; scales of a pair are (gate, up). Ours are
[up; gate].
"""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import fields
from typing import NamedTuple

import torch

from ..kernels.backends import UnsupportedError
from ..reference.recipe import BLOCK_SIZE
from ..reference.weights.experts import Experts
from ..reference.weights.prepare import assemble_experts, prepare_experts
from .gate import Gate, up_then_gate

_E4M3_RANGE = 6.0 * 448.0  # by which a checkpoint's activation scales divide the largest magnitude


class Packed(NamedTuple):
    """One of the two projections of E experts, as an NVFP4 checkpoint has it."""

    codes: torch.Tensor  # [E, rows, K/2] uint8
    block_scales: torch.Tensor  # [E, rows, K/16] e4m3
    decode: torch.Tensor  # [E] fp32, or [E, 2] of (gate, up)
    input_scale: torch.Tensor | None = None  # fp32 decode scales of every expert of all ranks


def check_sizes(hidden_size: int, intermediate_size: int) -> None:
    """Raise UnsupportedError unless both sizes of a rank's experts are whole blocks."""
    for name, size in (
        ("hidden_size", hidden_size),
        ("intermediate_size_per_partition", intermediate_size),
    ):
        if size % BLOCK_SIZE:
            raise UnsupportedError(f"{name} is {size}; it must be a multiple of {BLOCK_SIZE}")


def from_bf16(
    gate: Gate,
    w13: torch.Tensor,
    w2: torch.Tensor,
    w13_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    *,
    interleaved: bool = False,
) -> Experts:
    """Quantize the weights of a layer.

    Args:
        w13: [E, 2 I, H] bf16 or fp16 in the server's order, or [E, I, H] without a gate; w2 [E, H, I].
        w13_bias: [E, 2 I] or [E, I], of any float dtype; w2_bias [E, H].
        interleaved: rows of gate and up take turns.

    Raises:
        ValueError, TypeError: weights that `prepare_experts` refuses.
    """
    return prepare_experts(
        _ours(gate, w13, interleaved),
        w2.contiguous(),
        gate.activation,
        w13_bias=None if w13_bias is None else _ours(gate, w13_bias, interleaved),
        w2_bias=w2_bias,
        **gate.parameters,
    )


def from_nvfp4(
    gate: Gate, w13: Packed, w2: Packed, *, static: bool, interleaved: bool = False
) -> Experts:
    """Lay the quantized weights of a layer out; codes and scales keep their bits.

    Args:
        w13, w2: both projections, rows in the server's order.
        static: take the activation scales, of each projection the largest over all experts.
        interleaved: rows of gate and up take turns.

    Raises:
        ValueError: weights that `assemble_experts` refuses; static scales that nobody calibrated.
    """
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
        _ours(gate, w13.codes, interleaved),
        _ours(gate, w13.block_scales.view(torch.uint8), interleaved),
        decode.contiguous(),
        w2.codes.contiguous(),
        w2.block_scales.contiguous(),
        w2.decode.float().contiguous(),
        gate.activation,
        input_amax=amax[0],
        intermediate_amax=amax[1],
        **gate.parameters,
    )


def tensors_of(experts: Experts) -> dict[str, torch.Tensor]:
    """Return the tensors of experts by the names of their fields."""
    named = ((field.name, getattr(experts, field.name)) for field in fields(experts))
    return {name: value for name, value in named if isinstance(value, torch.Tensor)}


def _ours(gate: Gate, rows: torch.Tensor, interleaved: bool) -> torch.Tensor:
    if not gate.activation.gated:
        return rows.contiguous()
    return up_then_gate(rows, interleaved=interleaved)


def _amax(scales: torch.Tensor | None) -> float:
    """Return the largest magnitude that activation scales stand for, exact in double."""
    if scales is None:
        raise ValueError("the checkpoint has no input scales; static activations need them")
    if not bool(((scales > 0) & scales.isfinite()).all()):
        raise ValueError(
            "the checkpoint has no input scale above 0 for every expert; static activations need them"
        )
    return scales.max().item() * _E4M3_RANGE
