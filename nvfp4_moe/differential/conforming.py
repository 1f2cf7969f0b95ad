"""Settings scaled down from the benchmark's layers, and runs of them that keep the contract.

Every conforming run sums, or approximates, in a way of its own: `judge` must find nothing.
"""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .. import host
from ..reference.activation import ActivationType
from ..reference.bounds.fold import Fold
from ..reference.moe.hidden_states import Activations, quantize_activations
from ..reference.moe.layer import Stages, activate_raw, fused_moe
from ..reference.moe.routing import Routing, RoutingMethodType, route
from ..reference.numerics.accumulate import matmul
from ..reference.recipe import NVFP44Over6Config, Recipe
from ..reference.weights.experts import Experts
from ..reference.weights.prepare import prepare_experts
from .stages import Call, Run

_M = RoutingMethodType


@dataclass(frozen=True)
class Setting:
    name: str
    tokens: int
    hidden: int
    intermediate: int
    experts: int
    routing: Routing
    activation: ActivationType = ActivationType.Swiglu
    offset: int = 0
    local: int | None = None
    recipe: Recipe = field(default_factory=Recipe)
    heavy: bool = False  # Student's t with 3 degrees of freedom in place of normal numbers
    grid: bool = False  # midpoints of codes, power-of-two scales: ties abound
    parameters: bool = False  # alpha, beta, a clamp limit and biases, as GPT-OSS has

    def call(self, seed: int) -> Call:
        g = torch.Generator().manual_seed(seed)

        def random(*size: int) -> torch.Tensor:
            x = host.normal(g, *size)
            if self.grid:
                middles = host.fp32([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
                code = host.integers(g, 0, 8, size)
                code[..., 0] = 7  # every row's maximum
                return middles[code] * x.sign() * 448 / 4096
            if self.heavy:
                x = x * (3 / host.normal(g, 3, *size).square().sum(0)).sqrt()
            return x

        gated, local = self.activation.gated, self.local or self.experts
        rows = self.intermediate * (2 if gated else 1)
        size = host.powers(host.arange(local).remainder(3).sub(1))[:, None, None]
        w13 = random(local, rows, self.hidden) * size
        w2 = random(local, self.hidden, self.intermediate) * size
        if not self.grid:
            w13, w2 = w13 / self.hidden**0.5, w2 / self.intermediate**0.5
        options: dict[str, Any] = {}
        if self.parameters:
            options = {
                "alpha": 1.702,
                "beta": 1.0,
                "clamp_limit": 1.5,
                "w13_bias": host.normal(g, local, rows) * 0.5,
                "w2_bias": host.normal(g, local, self.hidden) * 0.5,
            }
        experts = prepare_experts(w13.bfloat16(), w2.bfloat16(), self.activation, **options)
        place = host.arange(self.tokens)[:, None]
        x = random(self.tokens, self.hidden) * host.powers(place.remainder(3))
        if (
            self.grid
        ):  # half of the rows with another maximum, whose codes' ties the reciprocal decides
            x = x * torch.where(place % 2 == 0, 1.0, 1 + place.float() / 16)
        padding = experts.padded_hidden_size - self.hidden
        logits = host.normal(g, self.tokens, self.experts).bfloat16()
        # Ties, and logits above which a sigmoid saturates, choose by the smaller index.
        logits[0, : self.routing.top_k + 2] = logits[0].max()
        bias = host.normal(g, self.experts) * 0.2
        biased = self.routing.method.biased
        return Call(
            logits,
            self.routing,
            bias if biased else None,
            torch.nn.functional.pad(x.bfloat16(), (0, padding)),
            experts,
            self.recipe,
            self.offset,
        )


SETTINGS = {
    s.name: s
    for s in (
        Setting("qwen", 8, 256, 96, 8, Routing(_M.Renormalize, 4)),
        Setting(
            "deepseek", 6, 448, 128, 32, Routing(_M.DeepSeekV3, 8, 8, 4, 2.5), offset=8, local=16
        ),
        Setting("nemotron", 4, 128, 336, 32, Routing(_M.DeepSeekV3, 22), ActivationType.Relu2),
        Setting("gpt-oss", 8, 176, 176, 8, Routing(_M.Renormalize, 4), parameters=True),
        Setting("heavy", 4, 1024, 256, 4, Routing(_M.Default, 2), heavy=True),
        Setting(
            "grid", 16, 128, 64, 4, Routing(_M.Renormalize, 2), ActivationType.Identity, grid=True
        ),
        Setting(
            "4over6",
            8,
            256,
            96,
            8,
            Routing(_M.Renormalize, 4),
            recipe=Recipe("exact", NVFP44Over6Config()),
        ),
    )
}

Gemm = Callable[..., torch.Tensor]


def perform(
    call: Call,
    stages: Stages,
    *,
    routed: tuple[torch.Tensor, torch.Tensor] | None = None,
    quantize: Callable[[torch.Tensor, Recipe], Activations] = quantize_activations,
    inputs: Callable[[dict[str, Any]], dict[str, Any]] = lambda given: given,
) -> Run:
    """The reference's run of a call, with stages replaced, or what passes between them changed.

    Args:
        routed: (ids, weights) in place of the routing's.
        inputs: changes the arguments of `reference.moe.fused_moe`.
    """
    if routed is None:
        chosen = route(call.logits, call.routing, call.routing_bias)
        routed = chosen.ids, chosen.weights_bf16
    activations = quantize(call.x, call.recipe)
    given = {
        "activations": activations,
        "experts": call.experts,
        "ids": routed[0],
        "weights": routed[1],
        "recipe": call.recipe,
        "local_expert_offset": call.local_expert_offset,
        "finalize_order": call.finalize_order,
    }
    result = fused_moe(**inputs(given), keep_steps=True, stages=stages)
    return Run(*routed, activations, result)


def _products(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x[:, None, :] * w[None, :, :]  # exact


def _ascending(x: torch.Tensor, w: torch.Tensor, _: Any = None) -> torch.Tensor:
    return matmul(x, w, "fp32")


def _permuted(x: torch.Tensor, w: torch.Tensor, _: Any) -> torch.Tensor:
    g = torch.Generator().manual_seed(x.shape[0])
    order = torch.randperm(x.shape[1], generator=g, dtype=torch.int64, device="cpu")
    return _ascending(x[:, order], w[:, order])


def _positive_first(x: torch.Tensor, w: torch.Tensor, _: Any) -> torch.Tensor:
    """Add in the worst order: the partial sums are as large as they can be."""
    products = _products(x, w).sort(-1, descending=True).values
    return _ascending(products.flatten(0, 1), torch.ones_like(products[0, :1])).view(
        products.shape[:2]
    )


def _pairwise(x: torch.Tensor, w: torch.Tensor, _: Any) -> torch.Tensor:
    total = _products(x, w)
    while total.shape[-1] > 1:
        if total.shape[-1] % 2:
            total = torch.nn.functional.pad(total, (0, 1))
        total = total[..., 0::2] + total[..., 1::2]
    return total[..., 0]


def _split_k(x: torch.Tensor, w: torch.Tensor, _: Any) -> torch.Tensor:
    parts = [_ascending(a, b) for a, b in zip(x.chunk(4, 1), w.chunk(4, 1), strict=True)]
    return (parts[0] + parts[2]) + (parts[1] + parts[3])


def cut_step(total: torch.Tensor, products: torch.Tensor, extra_bits: int) -> torch.Tensor:
    """Add products [..., K] to a sum like a tensor core: cut at the largest's last bit, then to fp32.

    Args:
        total: fp64 numbers that fp32 holds.
        extra_bits: how many bits below fp32's last a term keeps.
    """
    terms = torch.cat([total[..., None], products], -1)
    exponent = torch.frexp(terms.abs().amax(-1, keepdim=True))[1]
    unit = torch.ldexp(torch.ones_like(terms[..., :1]), exponent - 24 - extra_bits)
    total = ((terms / unit).trunc() * unit).sum(-1)
    last = torch.ldexp(torch.ones_like(total), torch.frexp(total)[1] - 24)
    return (total / last).trunc() * last


def truncating(step: int, extra_bits: int) -> Gemm:
    """Add by `cut_step`, `step` products at a time."""

    def gemm(x: torch.Tensor, w: torch.Tensor, _: Any = None) -> torch.Tensor:
        products = _products(x, w).double()
        total = products.new_zeros(products.shape[:2])
        for k in range(0, products.shape[-1], step):
            total = cut_step(total, products[..., k : k + step], extra_bits)
        return total.float()

    return gemm


def folded(fold: Fold, extra_bits: int) -> Gemm:
    """Add by steps of a fold, each of them by `cut_step`; fp32 additions add its chunks in order."""
    of_chunk = truncating(fold.width, extra_bits)

    def gemm(x: torch.Tensor, w: torch.Tensor, _: Any = None) -> torch.Tensor:
        total = x.new_zeros(x.shape[0], w.shape[0])
        for a, b in zip(x.chunk(fold.chunks, 1), w.chunk(fold.chunks, 1), strict=True):
            total = total + of_chunk(a, b)
        return total

    return gemm


def _approximate(raw: torch.Tensor, experts: Experts, e: int) -> torch.Tensor:
    """Add a relative error of up to 2^-22, of either sign."""
    y = activate_raw(raw, experts, e)
    g = torch.Generator().manual_seed(y.numel())
    return y * (1 + (host.uniform(g, *y.shape).to(y.device) * 2 - 1) * 2.0**-22)


def _both(gemm: Gemm) -> Stages:
    return Stages(gemm1=gemm, gemm2=gemm)


CONFORMING = {
    "fp64": Stages(),
    "fp32, ascending": _both(_ascending),
    "fp32, permuted": _both(_permuted),
    "fp32, positive terms first": _both(_positive_first),
    "fp32, pairwise": _both(_pairwise),
    "fp32, split": _both(_split_k),
    "tensor core, steps of 16, 2 more bits": _both(truncating(16, 2)),
    "tensor core, steps of 16, 1 more bit": _both(truncating(16, 1)),
    "tensor core, steps of 8, 1 more bit": _both(truncating(8, 1)),
    "approximate activation": Stages(activate=_approximate),
    "approximate activation, tensor core": replace(_both(truncating(16, 1)), activate=_approximate),
}
"""Ways to keep the contract."""


def conforms(variant: str, setting: Setting) -> bool:
    """An exact activation may not be approximated."""
    return not setting.activation.row.exact or "approximate" not in variant
