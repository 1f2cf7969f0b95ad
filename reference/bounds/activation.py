"""Bounds of the activation, over an interval and over all implementations; see `moe.py`."""

# SPDX-License-Identifier: Apache-2.0
import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch

from ..activation import STEP_LIMIT, ActivationType
from ..weights.experts import Experts
from ..weights.layout import unshuffled_bias
from .interval import LARGEST, SMALLEST, Interval, U, choose, rounded, unless
from .product import Product

_FEW = 3 * U
_SATURATED = 80.0
"""Above this argument an exponential is near fp32's largest number, and a sigmoid near its smallest."""


def activation_bounds(
    raw: Product | Interval,
    experts: Experts,
    expert: torch.Tensor,
    *,
    drops_nan: bool = False,
    of_cutlass: bool = False,
) -> Interval:
    """Bound `reference.activation.activate`, bias first, on rows [N, M1] of experts [N].

    Relative errors. Identity and ReLU: none. Relu2: one rounding. SiLU: 12.4 * 2^-23, and below zero
    1.2 |alpha g| 2^-23 more: `__expf` has 2 + floor(1.173 |x|) ulp (CUDA C++ Programming Guide, table of
    intrinsic functions), of which a sigmoid keeps the share of the exponential in 1 + exp, at most
    0.28 / |x| above zero; with an approximate reciprocal and the roundings of the products. GELU: 2^-20,
    and 2^-22 of the argument, for the cancellation in 1 + erf. With tanh: 2^-10, for `tanh.approx` (PTX
    ISA: 2^-11). What flushing costs, and an exponential that fp32 cannot hold, is absolute; with
    `of_cutlass` so is what SiTU's tanh loses as 2 sigmoid(2 z) - 1, 2^-22 of its factor.

    SiLU and GELU of -inf are NaN, -inf times 0. A NaN goes through every clamp and maximum of ours. With
    `drops_nan` nothing is claimed of it: FlashInfer's cutlass layer gives SwigluStep's limit
    (`activation.activate`), and what its closed epilogues give is not known.
    """
    product = Product.of(raw) if isinstance(raw, Interval) else raw
    value = _activated(product, experts, expert, of_cutlass)
    return unless(value.nan, value) if drops_nan else value


class _Terms(NamedTuple):
    """The inputs of the activation beside the rows, [N, 1] each, from the tensors of their experts."""

    scale: torch.Tensor
    gate_scale: torch.Tensor
    alpha: torch.Tensor | None
    beta: torch.Tensor | None
    limit: torch.Tensor | None
    lost: float  # of a factor of 1, by the tanh of SiTU

    def value(self, parameter: torch.Tensor | None) -> torch.Tensor:
        """Return alpha or beta as [N, 1] fp64; 1 if there is none."""
        return (torch.ones_like(self.gate_scale) if parameter is None else parameter).double()


def _activated(raw: Product, experts: Experts, expert: torch.Tensor, of_cutlass: bool) -> Interval:
    kind = experts.activation
    if experts.gemm1_bias is not None:
        raw = raw.plus(unshuffled_bias(experts.gemm1_bias, kind.gated)[expert])

    def of_rows(values: torch.Tensor) -> torch.Tensor:
        return values[expert][:, None]

    scale = of_rows(experts.output1_scale_scalar)
    gate_scale = of_rows(experts.output1_scale_gate_scalar)
    if not kind.gated:
        return RULES[kind](raw.times(gate_scale)).times(scale).result()
    given = (experts.gemm1_alpha, experts.gemm1_beta, experts.gemm1_clamp_limit)
    alpha, beta, limit = (None if t is None else of_rows(t) for t in given)
    terms = _Terms(scale, gate_scale, alpha, beta, limit, 2.0**-22 if of_cutlass else 0.0)
    half = raw.peak.shape[-1] // 2
    return RULES[kind](raw[..., :half], raw[..., half:], terms).result()


def _swiglu(up: Product, gate: Product, t: _Terms) -> Product:
    up, gate = _both_clamped(up, gate, t.limit)
    argument = gate.times(t.gate_scale).result()
    if t.beta is not None:
        up = up.plus(t.beta)
    return up.times(t.scale).times(_silu(argument, t.value(t.alpha)), _FEW)


def _swiglu_step(up: Product, gate: Product, t: _Terms) -> Product:
    if t.limit is None:
        limits = Interval.point(STEP_LIMIT / t.gate_scale).relatively(2.0**-22)
    else:
        limits = Interval.point(t.limit)
    most = Product.of(limits).times(t.gate_scale).result()
    value = _at_most(_silu(gate.times(t.gate_scale).result()), most)
    return _clamped(up, limits).times(t.scale).times(value, _FEW)


def _situ(up: Product, gate: Product, t: _Terms) -> Product:
    up, gate = _both_clamped(up, gate, t.limit)
    argument = gate.times(t.gate_scale).result()
    curved = _situ_up(up.times(t.gate_scale).result(), t.value(t.beta), t.lost)
    gated = _situ_gate(argument, t.value(t.alpha), t.lost)
    return Product.of(curved).times(gated, _FEW).times(t.scale)


def _geglu(up: Product, gate: Product, t: _Terms) -> Product:
    argument = gate.times(t.gate_scale).result()
    return up.times(t.scale).times(_gelu(argument, tanh=False), _FEW)


def _geglu_tanh(up: Product, gate: Product, t: _Terms) -> Product:
    argument = gate.times(t.gate_scale).result()
    return up.times(t.scale).times(_gelu(argument, tanh=True), _FEW)


def _relu(x: Product) -> Product:
    return Product.of(x.result().rising(torch.relu))


def _relu2(x: Product) -> Product:
    positive = rounded(torch.float32, x.result()).rising(torch.relu)
    return replace(Product.of(positive).times(positive), value=positive.rising(_square))


RULES: dict[ActivationType, Callable[..., Product]] = {
    ActivationType.Identity: lambda x: x,
    ActivationType.Relu: _relu,
    ActivationType.Relu2: _relu2,
    ActivationType.Silu: lambda x: Product.of(_silu(x.result())),
    ActivationType.Gelu: lambda x: Product.of(_gelu(x.result(), tanh=False)),
    ActivationType.Swiglu: _swiglu,
    ActivationType.SwigluStep: _swiglu_step,
    ActivationType.Geglu: _geglu,
    ActivationType.GegluTanh: _geglu_tanh,
    ActivationType.Situ: _situ,
}
"""Return (up, gate, terms) of a gated activation, and the argument of another."""


def _at_most(x: Interval, limit: Interval) -> Interval:
    ends = (torch.minimum(*pair) for pair in ((x.low, limit.low), (x.high, limit.high)))
    return unless(x.unknown, Interval(*ends))


def _clamped(x: Product, limit: Interval) -> Product:
    """Clamp to -limit ... limit; the upper limit is applied last, which counts if it is negative."""
    given, least = x.result(), -limit
    ends = (torch.maximum(*pair) for pair in ((given.low, least.low), (given.high, least.high)))
    return Product.of(_at_most(unless(given.unknown, Interval(*ends)), limit))


def _both_clamped(
    up: Product, gate: Product, limit: torch.Tensor | None
) -> tuple[Product, Product]:
    """Clamp up to -limit ... limit, and gate to at most the limit."""
    if limit is None:
        return up, gate
    limits = Interval.point(limit)
    return _clamped(up, limits), Product.of(_at_most(gate.result(), limits))


def _nonzero(x: Interval) -> torch.Tensor:
    """Return 1 where something may be lost, else 0; the functions below are exact at zero."""
    return ((x.low != 0) | (x.high != 0)).double()


def _unimodal(
    x: Interval,
    f: Callable[[torch.Tensor], torch.Tensor],
    minimum: torch.Tensor | float,
    bottom: torch.Tensor | float,
) -> Interval:
    """Apply an f that falls up to `minimum`, where it is `bottom`, and rises after it."""
    low, high = f(x.low), f(x.high)
    within = (x.low < minimum) & (x.high > minimum)
    invalid = (low.isnan() | high.isnan()) & ~x.single
    least = torch.where(within, bottom, torch.minimum(low, high))
    return unless(invalid | x.unknown, Interval(least, torch.maximum(low, high)))


def _silu(x: Interval, alpha: torch.Tensor | None = None) -> Interval:
    """Bound x sigmoid(alpha x). It is -1 times that of -x and -alpha, so alpha is taken as positive."""
    if alpha is None:
        alpha = x.low.new_ones(1)
    sign = Interval.point(1 - 2 * (alpha < 0).double())
    x, alpha = x * sign, alpha.abs()
    # x sigmoid(x) is least, -0.27846454, at -1.27846454
    value = _unimodal(
        x,
        lambda t: t * torch.sigmoid(alpha * t),
        -1.2784645427610738 / alpha,
        -0.2784645427610738 / alpha,
    )
    argument = (alpha * x.low).nan_to_num(nan=0.0)
    below = (-argument).clamp(0.0, 2 * _SATURATED)
    size = x.magnitude.nan_to_num(posinf=0.0)
    lost = torch.where(argument < -_SATURATED, 2 * size, 1.0) * SMALLEST * _nonzero(x)
    value = value.relatively((12.4 + 1.2 * below) * 2.0**-23).widened(lost)
    # An infinite alpha times 0 is NaN.
    mixed = alpha.isinf() & (x.low <= 0) & (x.high >= 0) & ~x.single
    return unless(mixed & ~value.nan, value) * sign


def _gelu(x: Interval, tanh: bool) -> Interval:
    size = x.magnitude.nan_to_num(posinf=0.0)
    if tanh:
        value = _unimodal(x, _gelu_tanh, -0.7524614220710162, -0.17004075057125413)
        value = value.relatively(2.0**-10).widened(size * 2.0**-11)
    else:
        value = _unimodal(x, _gelu_erf, -0.7517915246935645, -0.1699712074699664)
        value = value.relatively(2.0**-20).widened(size * 2.0**-22)
    return value.widened(SMALLEST * _nonzero(x))


def _gelu_erf(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * torch.special.erfc(-x / math.sqrt(2))


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    return 0.5 * x * (1 + torch.tanh(inner))


def _situ_up(x: Interval, beta: torch.Tensor, lost: float) -> Interval:
    """Bound beta tanh(x / beta); an argument of tanh that is flushed costs 2^-126 beta."""
    value = x.rising(lambda t: beta * torch.tanh(t / beta)).relatively(2.0**-10)
    size = beta.abs().clamp(1.0, LARGEST)
    value = value.widened((2 * SMALLEST + lost) * size * _nonzero(x))
    return unless((beta == 0) & ~x.single, value)


def _situ_gate(x: Interval, alpha: torch.Tensor, lost: float) -> Interval:
    """Bound alpha tanh(x / alpha) sigmoid(x), whose slope is at most 1 + |x| / 4.

    Above zero it rises; below, it lies between x sigmoid(x) and zero.
    """

    def f(t: torch.Tensor) -> torch.Tensor:
        return alpha * torch.tanh(t / alpha) * torch.sigmoid(t)

    finite = x.map(lambda end: end.clamp(-2 * LARGEST, 2 * LARGEST))
    centre, radius = (finite.low + finite.high) / 2, (finite.high - finite.low) / 2
    near = Interval.point(f(centre)).widened(radius * (1 + finite.magnitude / 4))
    low = torch.maximum(near.low, torch.where(x.low >= 0, f(x.low), _silu(finite).low))
    high = torch.minimum(near.high, f(x.high).clamp(min=0.0))
    value = choose(x.single, Interval.point(f(x.low)), Interval(low, high)).relatively(2.0**-9)
    size = alpha.abs().clamp(1.0, LARGEST)
    value = value.widened((4 * SMALLEST + lost) * size * _nonzero(x))
    return unless(x.unknown | ((alpha == 0) & ~x.single), value)


def _square(x: torch.Tensor) -> torch.Tensor:
    """Round to fp32 where the result is in its normal range."""
    square = x.square()
    normal = (square >= SMALLEST) & (square <= LARGEST)
    return torch.where(normal, square.float().double(), square)
