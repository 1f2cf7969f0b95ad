"""Random calls of the fused layer and of the dense product, over the whole range of fp32.

A seed decides everything. `Kind` is what a kernel is compiled for: with few kinds a GPU has few kernels
to compile. Half of each quantity is ordinary; the rest has any exponent, zeros, subnormals, the largest
numbers, and at times infinities and NaN. Scalars of an expert may bring back what its inputs took away.
"""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from .. import host
from ..reference.activation import IMPLEMENTED, ActivationType
from ..reference.moe.activations import Activations, quantize_activations
from ..reference.moe.finalize import FinalizeOrder
from ..reference.moe.routing import METHODS, Routing, RoutingMethodType
from ..reference.moe.variants import VARIANTS
from ..reference.numerics import e2m1, e4m3
from ..reference.quantize import quantize_global_scale
from ..reference.recipe import BLOCK_SIZE, LayerBuild, Recipe, all_recipes
from ..reference.weights.arguments import Options
from ..reference.weights.experts import Experts
from ..reference.weights.prepare import assemble_checked
from .moe_case import MoECase

Tensor = torch.Tensor
T = TypeVar("T")
_M = RoutingMethodType
_PLAIN_RECIPES = [r for r in all_recipes() if r.four_over_six is None]
_EXTREMES = (0.0, -0.0, 1e-45, 1e-40, 2.0**-126, 2.0**-127, 3.4028235e38, 2.0**127, 1e-30, 1e30)


class Draw:
    """Random numbers of a seed, on the CPU."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def uniform(self, *size: int) -> Tensor:
        return host.uniform(self.generator, *size)

    def normal(self, *size: int) -> Tensor:
        return host.normal(self.generator, *size)

    def integers(self, low: int, high: int, *size: int) -> Tensor:
        """From low to high - 1."""
        return host.integers(self.generator, low, high, size)

    def chance(self, probability: float) -> bool:
        return self.uniform(1).item() < probability

    def choice(self, every: Sequence[T]) -> T:
        return every[int(self.integers(0, len(every), 1))]

    def exponent(self) -> int:
        """Near 0 as a rule."""
        return int(self.integers(-4, 5, 1) if self.chance(0.6) else self.integers(-140, 127, 1))

    def scalars(self, n: int, exponent: int = 0, wild: float = 0.3) -> Tensor:
        """[n] fp32 around 2^exponent; some of any size, in one of `wild` draws."""
        x = (1 + self.uniform(n)) * host.powers(self.integers(-2, 3, n))
        x = x if self.chance(0.6) else host.powers(self.integers(-3, 4, n))
        x = x * 2.0**exponent
        if self.chance(wild):
            other = torch.ldexp(1 + self.uniform(n), self.integers(-149, 128, n))
            x = torch.where(self.uniform(n) < 0.3, other, x)
        if self.chance(wild / 2):
            extremes = host.fp32(_EXTREMES)[self.integers(0, len(_EXTREMES), n)]
            x = torch.where(self.uniform(n) < 0.2, extremes, x)
        if self.chance(wild / 8):
            x[int(self.integers(0, n, 1))] = self.choice((torch.inf, -torch.inf, torch.nan))
        return torch.where(self.uniform(n) < 0.1, -x, x) if self.chance(0.2) else x

    def values(self, rows: int, columns: int, exponent: int | None = None) -> Tensor:
        """[rows, columns] bf16, each row of its own size unless an exponent is given."""
        x = self.normal(rows, columns)
        form = self.choice(("normal", "heavy", "sparse", "grid", "small blocks"))
        if form == "heavy":
            x = x * torch.exp(2 * self.normal(rows, columns))
        elif form == "sparse":
            x = torch.where(self.uniform(rows, columns) < 0.9, 0.0, x)
        elif form == "grid":
            x = (x * 4).round() / 4
        elif form == "small blocks":
            size = self.integers(-40, 1, rows, columns // BLOCK_SIZE).repeat_interleave(
                BLOCK_SIZE, 1
            )
            x = torch.ldexp(x, size)
        exponents = [self.exponent() if exponent is None else exponent for _ in range(rows)]
        x = (x * 2.0 ** host.fp32(exponents)[:, None]).bfloat16()
        if self.chance(0.05):
            x[int(self.integers(0, rows, 1)), int(self.integers(0, columns, 1))] = self.choice(
                (torch.inf, -torch.inf, torch.nan, -0.0, 3e38)
            )
        return x


@dataclass(frozen=True)
class Kind:
    """The shapes and options that kernels are compiled for; they are drawn before the values."""

    activation: ActivationType
    mode: str  # "per-token", "static" or "bf16"
    build: LayerBuild
    recipe: Recipe
    parameters: bool
    biases: bool
    hidden: int
    intermediate: int
    routing: Routing
    routed: bool  # from logits
    logits_dtype: torch.dtype
    weights_dtype: torch.dtype
    finalize_order: FinalizeOrder
    output_dtype: torch.dtype

    @staticmethod
    def draw(number: int) -> "Kind":
        """Activations take turns."""
        d = Draw(number ^ 0x5EED)
        activation = IMPLEMENTED[number % len(IMPLEMENTED)]
        mode = d.choice(("per-token", "per-token", "per-token", "static", "bf16"))
        cutlass = mode == "static" and d.chance(0.3)
        recipe = d.choice(all_recipes() if d.chance(0.5) else _PLAIN_RECIPES)
        if mode != "per-token":
            recipe = replace(recipe, build="cuda")
        build: LayerBuild = "cutlass" if cutlass else recipe.build
        plain = cutlass or d.chance(0.5)
        routed = d.chance(0.3)
        return Kind(
            activation,
            mode,
            build,
            recipe,
            not plain,
            not plain and d.chance(0.5),
            d.choice((128, 128, 256)),
            d.choice((64, 128)) if activation.gated else 128,
            _routing(d) if routed else Routing(_M.Renormalize, d.choice((1, 2, 2, 3, 6))),
            routed,
            d.choice((torch.float32, torch.bfloat16)),
            d.choice((torch.float32, torch.bfloat16)),
            d.choice(("flashinfer", "slot")),
            d.choice((torch.bfloat16, torch.bfloat16, torch.float16, torch.float32)),
        )


def _routing(d: Draw) -> Routing:
    method = d.choice(METHODS)
    options: dict[str, Any] = {}
    if method.biased:
        options["routed_scaling_factor"] = d.choice((None, 2.5, 1e-3))
    if method == _M.DeepSeekV3 and d.chance(0.5):
        options |= {"n_group": 4, "topk_group": 2}
    if method == _M.SigmoidRenorm:
        options["norm_topk_prob"] = d.chance(0.7)
    return Routing(method, 1 if method == _M.Llama4 else d.choice((1, 2, 4)), **options)


def draw(seed: int, kind: Kind, tokens: int) -> MoECase:
    """The fused call of a seed."""
    d = Draw(seed)
    size = d.exponent()  # of the hidden states, which the first scalar may bring back
    local = d.choice((1, 2, 3))
    offset, num_experts = d.choice(((0, local), (0, local + 1), (2, local + 4)))
    if kind.routed:
        local, offset, num_experts = 4, d.choice((0, 2, 4)), 8
    experts = _experts(d, kind, local, -size if d.chance(0.5) else d.exponent())
    x = d.values(tokens, experts.hidden_size, size if d.chance(0.5) else None)
    a = _activations(d, kind, experts, x)
    case = MoECase(
        f"seed {seed}",
        a,
        experts,
        kind.routing,
        num_experts,
        local_expert_offset=offset,
        recipe=kind.recipe,
        build=kind.build,
        finalize_order=kind.finalize_order,
        output_dtype=kind.output_dtype,
    )
    if kind.routed:
        return replace(case, **_logits(d, kind, tokens, num_experts))
    ids = d.integers(0, num_experts, tokens, kind.routing.top_k).int()
    weights = d.scalars(ids.numel(), 0, 0.2).view(ids.shape).to(kind.weights_dtype)
    if d.chance(0.2):
        ids[:, -1] = -1
        weights[0, -1] = torch.nan
    return replace(case, ids=ids, weights=weights)


def _codes(d: Draw, *shape: int) -> Tensor:
    """[..., K/2] of codes: any, few that are not zero, or ones and zeros."""
    codes = d.integers(0, 16, *shape)
    form = d.choice(("any", "any", "sparse", "ones"))
    if form == "sparse":
        codes = torch.where(d.uniform(*shape) < 0.9, 0, codes)
    if form == "ones":
        codes = torch.where(codes < 12, 0, (codes & 1) * 8 + 2)
    return e2m1.pack(codes.to(torch.uint8))


def _block_scales(d: Draw, *shape: int) -> Tensor:
    """e4m3 bytes: around 1, of every size, or one alone."""
    low, high = d.choice(
        ((0x28, 0x40), (0x28, 0x40), (0, 0x7F), (0x38, 0x39), (0x70, 0x7F), (0, 9))
    )
    return d.integers(low, high, *shape).to(torch.uint8)


def _experts(d: Draw, kind: Kind, num_local: int, exponent: int) -> Experts:
    rows = kind.intermediate * (2 if kind.activation.gated else 1)
    h, i, padding = kind.hidden, kind.intermediate, d.choice((0, 0, 0, 32))
    h, i = h - padding, i - (padding if padding < i and not kind.biases else 0)
    rows = rows // kind.intermediate * i
    decode = d.scalars(num_local, exponent - 7).nan_to_num()  # up's and gate's must be equal
    options: dict[str, Any] = {}
    if kind.parameters:
        limit = decode * d.scalars(num_local, d.choice((0, 4, 8)))
        options = {
            "alpha": d.choice((1.702, d.scalars(num_local))),
            "beta": d.choice((1.0, d.scalars(num_local))),
            "clamp_limit": limit if d.chance(0.7) else d.scalars(num_local).abs(),
        }
        options = {n: v for n, v in options.items() if n in kind.activation.parameters}
    if kind.mode == "static":
        amax = (d.scalars(2, 3, 0.15).abs().nan_to_num(nan=1.0)).clamp(1e-33, 1e38)
        options |= {"input_amax": amax[0].item(), "intermediate_amax": amax[1].item()}
    if kind.biases:
        options["w13_bias"] = (
            d.normal(num_local, rows) * decode[:, None] * 2.0 ** d.choice((0, 4, 8))
        )
    decode2 = d.scalars(num_local, d.exponent() if d.chance(0.3) else -7)
    if kind.biases:
        options["w2_bias"] = d.normal(num_local, h) * decode2[:, None] * 2.0 ** d.choice((0, 8))
    w13 = _codes(d, num_local, rows, h), _block_scales(d, num_local, rows, h // BLOCK_SIZE), decode
    w2 = _codes(d, num_local, h, i), _block_scales(d, num_local, h, i // BLOCK_SIZE), decode2
    # Its checks refuse what a caller of FlashInfer's functions may hand over all the same.
    experts = assemble_checked(w13, w2, kind.activation, Options(**options))
    if VARIANTS[kind.build].static_only:
        return VARIANTS[kind.build].prepared(experts)
    scalars: dict[str, Any] = {  # as a caller of FlashInfer's may give them
        name: d.scalars(num_local, exponent - 7)
        for name in ("output1_scale_scalar", "output1_scale_gate_scalar")
        if d.chance(0.15)
    }
    return replace(experts, **scalars)


def _activations(d: Draw, kind: Kind, experts: Experts, x: Tensor) -> Activations:
    x = torch.nn.functional.pad(x, (0, experts.padded_hidden_size - x.shape[1]))
    if kind.mode == "bf16":
        return Activations(x)
    if kind.mode == "static":
        q = quantize_global_scale(x, experts.input_scale, Recipe())
        return Activations(q.codes, q.block_scales)
    a = quantize_activations(x, d.choice(all_recipes()))
    if d.chance(0.3):
        assert a.per_token_scale is not None
        scale = d.scalars(x.shape[0], d.exponent())
        a = replace(
            a, per_token_scale=torch.where(d.uniform(len(x)) < 0.5, scale, a.per_token_scale)
        )
    return a


def _logits(d: Draw, kind: Kind, tokens: int, num_experts: int) -> dict[str, Any]:
    logits = d.normal(tokens, num_experts) * d.choice((1.0, 1.0, 10.0, 100.0, 1e4, 1e30))
    form = d.choice(("normal", "normal", "ties", "close", "equal"))
    if form == "ties":
        logits = logits.round()
    elif form == "close":
        logits = logits[:, :1] + logits * 1e-6
    elif form == "equal":
        logits[0] = logits[0, 0]
    if d.chance(0.15):
        value = d.choice((torch.inf, -torch.inf, torch.nan, 3.3e38))
        logits[-1, int(d.integers(0, num_experts, 1))] = value
    bias = None
    if kind.routing.method.biased:
        bias = d.normal(num_experts) * d.choice((0.0, 0.2, 30.0))
    return {"logits": logits.to(kind.logits_dtype), "routing_bias": bias}


@dataclass(frozen=True)
class DenseCall:
    """The arguments of `reference.dense.mm_fp4`."""

    a: Tensor
    b: Tensor
    a_descale: Tensor
    b_descale: Tensor
    alpha: Tensor | None
    out_dtype: torch.dtype


def draw_dense(seed: int, rows: int) -> DenseCall:
    """The dense product of a seed: 128 columns, as many terms."""
    d, k = Draw(seed), 128

    def scales(count: int) -> Tensor:
        bytes_ = _block_scales(d, -(-count // 128) * 128, k // BLOCK_SIZE)
        if d.chance(0.1):
            bytes_.view(-1)[int(d.integers(0, bytes_.numel(), 1))] = e4m3.NAN
        return bytes_

    alpha = d.choice((None, d.scalars(1, d.exponent()), d.scalars(rows, d.exponent())))
    return DenseCall(
        _codes(d, rows, k),
        _codes(d, k, k).T,
        scales(rows),
        scales(k).T,
        alpha,
        d.choice((torch.bfloat16, torch.float16)),
    )
