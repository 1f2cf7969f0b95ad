"""The activations of the first GEMM's accumulator, and their derivatives, as device functions.

`activated` is a step of the layer. Training needs a value with its derivatives, which `with_slope` and
`gated_with_slopes` give in physical units (`training/activation_gradient.py`).
"""

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


@triton.jit
def _limited(x, limit):
    """Return x within +-limit, and the derivative there; NaN stays NaN."""
    y = tl.where(tl.abs(x) > limit, tl.where(x < 0, -limit, limit), x)
    return y, (tl.abs(x) <= limit).to(tl.float32)


@triton.jit
def _limited_above(x, limit):
    """Return x up to the limit, and the derivative there; NaN stays NaN."""
    return tl.where(x > limit, limit, x), (x <= limit).to(tl.float32)


@triton.jit
def _bounded(x, bound):
    """Return bound * tanh(x / bound), and its derivative."""
    if bound is not None:
        t = tanh(x / bound)
        y = bound * t
    else:
        t = tanh(x)
        y = t
    return y, 1.0 - t * t


@triton.jit
def with_slope(g, ACT: tl.constexpr):
    """Return a function of one argument, which is an activation or the curve of a gate, and d."""
    if ACT == GELU or ACT == GEGLU:
        y = gelu(g)
        part = tl.where(tl.abs(g) < 2.0**-30, 0.5, y / g)  # the normal distribution function
        slope = part + g * (0.3989422804014327 * tl.exp(g * g * -0.5))
    elif ACT == GEGLU_TANH:
        part = sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
        steep = part * (1.0 - part)
        inner = 1.5957691216057308 * (1.0 + 0.134145 * g * g)
        slope = part + tl.where(steep > 0, g * steep * inner, 0.0)
        y = g * part
    elif ACT == SILU or ACT == SWIGLU_STEP:
        part = sigmoid(g)
        slope = part + g * part * (1.0 - part)
        y = g * part
    elif ACT == RELU:
        slope = (g > 0).to(tl.float32)
        y = tl.where(g <= 0, 0.0, g)
    elif ACT == RELU2:
        y = tl.where(g <= 0, 0.0, g)
        slope = 2.0 * y
        y = y * y
    else:
        tl.static_assert(ACT == IDENTITY, "the activation has no derivative here")
        slope = tl.full(g.shape, 1.0, tl.float32)
        y = g
    return y, slope


@triton.jit
def gated_with_slopes(up, gate, alpha, beta, limit, ACT: tl.constexpr):
    """Return a gated activation in physical units, and its derivatives by up and by gate."""
    one = tl.full(gate.shape, 1.0, tl.float32)
    up_inside, gate_inside = one, one
    if ACT == SWIGLU_STEP:
        up, up_inside = _limited(up, limit)
        curve, slope = with_slope(gate, ACT)
        curve, inside = _limited_above(curve, limit)
        slope = slope * inside
        factor = up
    elif ACT == SWIGLU or ACT == SITU:
        if limit is not None:
            up, up_inside = _limited(up, limit)
            gate, gate_inside = _limited_above(gate, limit)
        if ACT == SWIGLU:
            factor = up
            if beta is not None:
                factor = up + beta
            steep = gate
            argument = gate
            if alpha is not None:
                argument = alpha * gate
                steep = argument
            part = sigmoid(argument)
            curve = gate * part
            slope = part + steep * part * (1.0 - part)
        else:
            factor, factor_slope = _bounded(up, beta)
            up_inside = up_inside * factor_slope
            bounded, bounded_slope = _bounded(gate, alpha)
            part = sigmoid(gate)
            curve = bounded * part
            slope = bounded_slope * part + bounded * part * (1.0 - part)
    else:
        factor = up
        curve, slope = with_slope(gate, ACT)
    return curve * factor, curve * up_inside, slope * gate_inside * factor
