"""The activation of an interval, and what implementations may differ in; see `bounds.py`."""

# SPDX-License-Identifier: Apache-2.0
import math
from collections.abc import Callable

import torch

from .activation import STEP_LIMIT, ActivationType
from .experts import Experts, unshuffled_bias
from .interval import Interval, U, plus_bias, rounded, times, unless

_TINY = 1e-36  # what flushing, and an exponential that underflows, can cost


def activation_bounds(raw: Interval, experts: Experts, expert: torch.Tensor) -> Interval:
    """The activation of `reference.activation.activate`, bias first, of rows [N, M1] of experts [N].

    Relative errors. Identity and ReLU: none. Relu2: one rounding. SiLU: (12 + 1.2 |alpha g|) 2^-23, for
    an `__expf` of 2 + floor(1.173 |x|) ulp (CUDA C++ Programming Guide, table of intrinsic functions),
    an approximate reciprocal and the roundings of the products. GELU: 2^-20, and 2^-22 of the argument,
    for the cancellation in 1 + erf. With tanh: 2^-10, for `tanh.approx` (PTX ISA: 2^-11).
    """
    kind = experts.activation
    if experts.gemm1_bias is not None:
        raw = plus_bias(raw, unshuffled_bias(experts.gemm1_bias, kind.gated)[expert])

    def of_rows(values: torch.Tensor) -> torch.Tensor:
        return values[expert][:, None]

    def parameter(values: torch.Tensor | None, default: float) -> torch.Tensor | float:
        return default if values is None else of_rows(values).double()

    scale = of_rows(experts.output1_scale_scalar)
    gate_scale = of_rows(experts.output1_scale_gate_scalar)
    if not kind.gated:
        return times(_plain(times(raw, gate_scale), kind), scale)
    limit = parameter(experts.gemm1_clamp_limit, math.inf)
    alpha = parameter(experts.gemm1_alpha, 1.0)
    half = raw.low.shape[-1] // 2
    up, gate = raw[..., :half], raw[..., half:]
    if kind == ActivationType.SwigluStep:
        if experts.gemm1_clamp_limit is None:
            limit = STEP_LIMIT / gate_scale.double()
        value = _clamped(_silu(times(gate, gate_scale), 1.0), -math.inf, limit * gate_scale)
        return _product(value, times(_clamped(up, -limit, limit), scale))
    if experts.gemm1_clamp_limit is not None:
        up, gate = _clamped(up, -limit, limit), _clamped(gate, -math.inf, limit)
    gate = times(gate, gate_scale)
    if kind == ActivationType.Situ:
        beta = parameter(experts.gemm1_beta, 1.0)
        curved = times(up, gate_scale).map(lambda t: beta * torch.tanh(t / beta))
        return times(_product(_situ_gate(gate, alpha), _relatively(curved, 2.0**-10)), scale)
    up = times(up, scale)
    if kind == ActivationType.Swiglu:
        if experts.gemm1_beta is not None:
            beta = of_rows(experts.gemm1_beta).double()
            up = (up + Interval.point(beta)).widened(up.magnitude * torch.where(beta == 0, 0.0, U))
        return _product(_silu(gate, alpha), up)
    return _product(_gelu(gate, kind == ActivationType.GegluTanh), up)


def _clamped(x: Interval, low: torch.Tensor | float, high: torch.Tensor | float) -> Interval:
    bottom, top = (
        torch.as_tensor(end, dtype=torch.float64, device=x.low.device) for end in (low, high)
    )
    return x.map(lambda t: torch.minimum(torch.maximum(t, bottom), top))


def _relatively(x: Interval, error: torch.Tensor | float) -> Interval:
    return x.widened(x.magnitude * error + _TINY)


def _product(a: Interval, b: Interval) -> Interval:
    return _relatively(a * b, 3 * U)


def _unimodal(
    x: Interval,
    f: Callable[[torch.Tensor], torch.Tensor],
    minimum: torch.Tensor | float,
    bottom: torch.Tensor | float,
) -> Interval:
    """Of an f that falls up to `minimum`, where it is `bottom`, and rises after it."""
    low, high = f(x.low), f(x.high)
    within = (x.low < minimum) & (x.high > minimum)
    return Interval(torch.where(within, bottom, torch.minimum(low, high)), torch.maximum(low, high))


def _silu(x: Interval, alpha: torch.Tensor | float) -> Interval:
    # x sigmoid(x) is least, -0.27846454, at -1.27846454
    value = _unimodal(
        x,
        lambda t: t * torch.sigmoid(alpha * t),
        -1.2784645427610738 / alpha,
        -0.2784645427610738 / alpha,
    )
    value = _relatively(value, (12 + 1.2 * alpha * x.magnitude) * 2.0**-23)
    # With alpha below zero it has a maximum in place of the minimum: nothing is claimed.
    return unless(torch.as_tensor(alpha <= 0, dtype=torch.bool, device=x.low.device), value)


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


def _situ_gate(x: Interval, alpha: torch.Tensor | float) -> Interval:
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
