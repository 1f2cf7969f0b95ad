"""The activations of the first GEMM's accumulator, as device functions."""

# SPDX-License-Identifier: Apache-2.0
import triton
import triton.language as tl

from ...reference.activation import ActivationType
from ..jit.approximations import gelu, gelu_tanh, sigmoid, tanh

GELU = tl.constexpr(int(ActivationType.Gelu))
RELU = tl.constexpr(int(ActivationType.Relu))
SILU = tl.constexpr(int(ActivationType.Silu))
SWIGLU = tl.constexpr(int(ActivationType.Swiglu))
GEGLU = tl.constexpr(int(ActivationType.Geglu))
RELU2 = tl.constexpr(int(ActivationType.Relu2))
SWIGLU_STEP = tl.constexpr(int(ActivationType.SwigluStep))
GEGLU_TANH = tl.constexpr(int(ActivationType.GegluTanh))
IDENTITY = tl.constexpr(int(ActivationType.Identity))
SITU = tl.constexpr(int(ActivationType.Situ))
NONE = tl.constexpr(-1)  # the second GEMM
GATED_KINDS = tl.constexpr(tuple(int(kind) for kind in ActivationType if kind.gated))


@triton.constexpr_function
def is_gated(activation):
    return activation in GATED_KINDS.value


@triton.jit
def _at_most(x, limit):
    """NaN stays NaN; no limit is no operation."""
    if limit is not None:
        x = tl.minimum(x, limit, propagate_nan=tl.PropagateNan.ALL)
    return x


@triton.jit
def _clamped(x, limit):
    if limit is not None:
        x = _at_most(tl.maximum(x, -limit, propagate_nan=tl.PropagateNan.ALL), limit)
    return x


@triton.jit
def of_expert(ptr, expert):
    """Load one fp32 for the expert; None if there is no tensor."""
    if ptr is None:
        value = None
    else:
        value = tl.load(ptr + expert)
    return value


@triton.jit
def limit_of_expert(limit_ptr, gate_scale, expert, ACT: tl.constexpr):
    """Load the expert's limit, which SwigluStep has without a tensor too; or None."""
    if ACT == SWIGLU_STEP and limit_ptr is None:
        limit = 7.0 / gate_scale  # reference.activation.STEP_LIMIT
    else:
        limit = of_expert(limit_ptr, expert)
    return limit


@triton.jit
def finished(
    up, gate, scale_ptr, gate_scale_ptr, alpha_ptr, beta_ptr, limit_ptr, expert, ACT: tl.constexpr
):
    """Apply the expert's scales to sums: the activation, or with NONE `gate` times the scale."""
    gate_scale = of_expert(gate_scale_ptr, expert)
    return activated(
        up, gate, of_expert(scale_ptr, expert), gate_scale, of_expert(alpha_ptr, expert),
        of_expert(beta_ptr, expert), limit_of_expert(limit_ptr, gate_scale, expert, ACT), ACT,
    )  # fmt: skip


@triton.jit
def activated(up, gate, scale, gate_scale, alpha, beta, limit, ACT: tl.constexpr):
    """`reference.activation.activate`; of activations without a gate, `gate` is the argument.

    With NONE it is `gate` times the scale. Contract: NaN in gives NaN out. alpha, beta and limit may be
    None.
    """
    if ACT == NONE:
        y = gate * scale
    elif ACT == SWIGLU_STEP:
        g = gate * gate_scale
        y = _at_most(g * sigmoid(g), limit * gate_scale) * (_clamped(up, limit) * scale)
    elif ACT == SWIGLU:
        u = _clamped(up, limit)
        g = _at_most(gate, limit) * gate_scale
        if beta is not None:
            u = u + beta
        argument = g
        if alpha is not None:
            argument = alpha * g
        y = g * sigmoid(argument) * (u * scale)
    elif ACT == SITU:
        u = _clamped(up, limit) * gate_scale
        g = _at_most(gate, limit) * gate_scale
        y = _scaled_tanh(u, beta) * (_scaled_tanh(g, alpha) * sigmoid(g)) * scale
    elif ACT == GEGLU:
        y = gelu(gate * gate_scale) * (up * scale)
    elif ACT == GEGLU_TANH:
        y = gelu_tanh(gate * gate_scale) * (up * scale)
    else:
        g = gate * gate_scale
        if ACT == RELU:
            g = tl.where(g <= 0, 0.0, g)
        elif ACT == RELU2:
            g = tl.where(g <= 0, 0.0, g)
            g = g * g
        elif ACT == SILU:
            g = g * sigmoid(g)
        elif ACT == GELU:
            g = gelu(g)
        else:
            tl.static_assert(ACT == IDENTITY, "the activation has no branch here")
        y = g * scale
    return y


@triton.jit
def _scaled_tanh(x, scale):
    if scale is not None:
        y = scale * tanh(x / scale)
    else:
        y = tanh(x)
    return y
