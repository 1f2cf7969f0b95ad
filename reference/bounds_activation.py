"""The activation of an interval, and what implementations may differ in; see `bounds.py`."""

# SPDX-License-Identifier: Apache-2.0
import math
from collections.abc import Callable

import torch

from .activation import STEP_LIMIT, ActivationType
from .experts import Experts, unshuffled_bias
from .interval import Interval, U, plus_bias, rounded, times, unless

_TINY = 1e-36  # what flushing, and an exponential that underflows, can cost


def activation_bounds(raw: Interval, experts: Experts, e: int) -> Interval:
    """The activation of `reference.activation.activate`, bias first.

    Relative errors. Identity and ReLU: none. Relu2: one rounding. SiLU: (12 + 1.2 |alpha g|) 2^-23, for
    an `__expf` of 2 + floor(1.173 |x|) ulp (CUDA C++ Programming Guide, table of intrinsic functions),
    an approximate reciprocal and the roundings of the products. GELU: 2^-20, and 2^-22 of the argument,
    for the cancellation in 1 + erf. With tanh: 2^-10, for `tanh.approx` (PTX ISA: 2^-11).
    """
    kind = experts.activation
    if experts.gemm1_bias is not None:
        raw = plus_bias(raw, unshuffled_bias(experts.gemm1_bias[e], kind.gated))
    scale, gate_scale = experts.output1_scale_scalar[e], experts.output1_scale_gate_scalar[e]
    limit = None if experts.gemm1_clamp_limit is None else experts.gemm1_clamp_limit[e].double()
    alpha = _parameter(experts.gemm1_alpha, e, 1.0)
    beta = _parameter(experts.gemm1_beta, e, 1.0 if kind == ActivationType.Situ else 0.0)
    if not kind.gated:
        return times(_plain(times(raw, gate_scale), kind), scale)
    half = raw.low.shape[-1] // 2
    up, gate = raw[..., :half], raw[..., half:]
    if kind == ActivationType.SwigluStep:
        limit = STEP_LIMIT / gate_scale.double() if limit is None else limit
        top = float(limit * gate_scale)
        value = _silu(times(gate, gate_scale), 1.0).map(lambda t: t.clamp(max=top))
        up = up.map(lambda t: t.clamp(-float(limit), float(limit)))
        return _product(value, times(up, scale))
    if limit is not None:
        up = up.map(lambda t: t.clamp(-float(limit), float(limit)))
        gate = gate.map(lambda t: t.clamp(max=float(limit)))
    gate = times(gate, gate_scale)
    if kind == ActivationType.Situ:
        curved = times(up, gate_scale).map(lambda t: beta * torch.tanh(t / beta))
        return times(_product(_situ_gate(gate, alpha), _relatively(curved, 2.0**-10)), scale)
    up = times(up, scale)
    if kind == ActivationType.Swiglu:
        if beta:
            up = (up + Interval.point(torch.full_like(up.low, beta))).widened(up.magnitude * U)
        return _product(_silu(gate, alpha), up)
    return _product(_gelu(gate, kind == ActivationType.GegluTanh), up)


def _parameter(values: torch.Tensor | None, e: int, default: float) -> float:
    return default if values is None else float(values[e])


def _relatively(x: Interval, error: torch.Tensor | float) -> Interval:
    return x.widened(x.magnitude * error + _TINY)


def _product(a: Interval, b: Interval) -> Interval:
    return _relatively(a * b, 3 * U)


def _unimodal(
    x: Interval, f: Callable[[torch.Tensor], torch.Tensor], minimum: float, bottom: float
) -> Interval:
    """Of an f that falls up to `minimum`, where it is `bottom`, and rises after it."""
    low, high = f(x.low), f(x.high)
    within = (x.low < minimum) & (x.high > minimum)
    return Interval(torch.where(within, bottom, torch.minimum(low, high)), torch.maximum(low, high))


def _silu(x: Interval, alpha: float) -> Interval:
    if alpha <= 0:
        return unless(torch.ones_like(x.low, dtype=torch.bool), x)
    # x sigmoid(x) is least, -0.27846454, at -1.27846454
    value = _unimodal(
        x,
        lambda t: t * torch.sigmoid(alpha * t),
        -1.2784645427610738 / alpha,
        -0.2784645427610738 / alpha,
    )
    return _relatively(value, (12 + 1.2 * alpha * x.magnitude) * 2.0**-23)


def _gelu(x: Interval, tanh: bool) -> Interval:
    if tanh:
        value = _unimodal(x, _gelu_tanh, -0.7524614220710162, -0.17004075057125413)
        return _relatively(value, 2.0**-10).widened(x.magnitude * 2.0**-11)
    value = _unimodal(x, _gelu_erf, -0.7517915246935645, -0.1699712074699664)
    return _relatively(value, 2.0**-20).widened(x.magnitude * 2.0**-22)


def _gelu_erf(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * torch.special.erfc(-x / math.sqrt(2))


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


def _situ_gate(x: Interval, alpha: float) -> Interval:
    """alpha tanh(x / alpha) sigmoid(x), whose slope is at most 1 + |x| / 4."""
    centre, radius = (x.low + x.high) / 2, (x.high - x.low) / 2
    value = alpha * torch.tanh(centre / alpha) * torch.sigmoid(centre)
    value64 = Interval.point(value).widened(radius * (1 + x.magnitude / 4))
    return _relatively(value64, 2.0**-9)


def _plain(x: Interval, kind: ActivationType) -> Interval:
    if kind == ActivationType.Identity:
        return x
    if kind == ActivationType.Relu:
        return x.map(torch.relu)
    if kind == ActivationType.Relu2:
        numbers = rounded(torch.float32, x)
        return numbers.map(lambda t: t.relu().float().square().double())
    if kind == ActivationType.Silu:
        return _silu(x, 1.0)
    return _gelu(x, tanh=False)
