"""Fused calls for the fake FlashInfer's layers, and which of them can serve each."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from dataclasses import dataclass, field

import moe_cases
import torch
from moe_cases import Shape
from moe_triton_cases import coarse

import nvfp4_moe
from nvfp4_moe.cases.moe import MoECase
from nvfp4_moe.kernels.flashinfer import version
from nvfp4_moe.reference.activation import ActivationType
from nvfp4_moe.reference.moe.hidden_states import quantize_activations
from nvfp4_moe.reference.moe.routing import Routing, RoutingMethodType
from nvfp4_moe.reference.moe.variants import VARIANTS
from nvfp4_moe.reference.recipe import NVFP44Over6Config, Recipe

from .faults import CUTE_DSL, CUTLASS, TRTLLM

EXACT_MATH = {"FLASHINFER_DISABLE_FP4_QUANT_FAST_MATH": "1"}
FOUR_OVER_SIX = {"FLASHINFER_NVFP4_4OVER6": "1"}
PER_TOKEN = (TRTLLM, CUTE_DSL)
_M = RoutingMethodType


@dataclass(frozen=True)
class Layer:
    """A `MoECase` to be made, and where it can run."""

    name: str
    backends: tuple[str, ...]
    make: Callable[[str], MoECase]  # of a backend
    environment: dict[str, str] = field(default_factory=dict)


def drawn(shape, kind=ActivationType.Swiglu, mode="per-token", recipe=None, **options):
    """(activations, experts)."""
    case = moe_cases.make(shape, kind, mode, **options)
    if recipe is None:
        return case.activations, case.experts
    wide = moe_cases.padded(case.x, case.experts.padded_hidden_size)
    return quantize_activations(wide, recipe), case.experts


def case_of(backend, shape, activations, experts, **changes):
    build = {TRTLLM: "cuda", CUTE_DSL: "cute-dsl", CUTLASS: "cutlass"}[backend]
    if backend == CUTE_DSL:
        experts = nvfp4_moe.with_cute_dsl(experts)
    if backend == CUTLASS:
        experts = nvfp4_moe.with_cutlass(experts)
    ids, weights = moe_cases.routing_of(shape)
    given = {
        "name": str(shape),
        "activations": activations,
        "experts": experts,
        "routing": Routing(_M.Renormalize, shape.top_k),
        "num_experts": shape.experts,
        "ids": ids,
        "weights": weights,
        "local_expert_offset": shape.offset,
        "build": build,
        "recipe": Recipe(build="cute-dsl" if build == "cute-dsl" else "cuda"),
        "finalize_order": VARIANTS[build].order(version.HERE.contract),
    }
    if "logits" in changes:
        given |= {"ids": None, "weights": None}
    return MoECase(**given | changes)


def plain(shape, kind=ActivationType.Swiglu, mode="per-token", **options):
    return lambda backend: case_of(backend, shape, *drawn(shape, kind, mode, **options))


def exact(shape, kind=ActivationType.Relu2):
    def make(backend):
        case = coarse(shape, kind)
        return case_of(
            backend,
            shape,
            case.activations,
            case.experts,
            ids=case.ids,
            weights=case.weights,
            exact=True,
        )

    return make


def with_biases(backend):
    shape, g = Shape(24, 256, 128, 4, 2), torch.Generator().manual_seed(3)
    options = {
        "w13_bias": torch.randn(4, 256, generator=g),
        "w2_bias": torch.randn(4, 256, generator=g),
        "alpha": 1.702,
        "beta": 1.0,
        "clamp_limit": 7.0,
    }
    return case_of(backend, shape, *drawn(shape, **options))


def from_logits(routing, ties=False, bias=None):
    def make(backend):
        shape, g = Shape(24, 256, 128, 16, routing.top_k, 4, 8), torch.Generator().manual_seed(4)
        logits = torch.randn(24, 16, generator=g)
        if ties:
            logits[:, 3:9] = 3.0
        return case_of(
            backend,
            shape,
            *drawn(shape),
            routing=routing,
            logits=logits,
            routing_bias=None if bias is None else torch.randn(16, generator=g) * bias,
        )

    return make


def with_four_over_six(backend):
    config, shape = NVFP44Over6Config(), Shape(24, 256, 128, 4, 2)
    recipe = Recipe("fast", config, "cute-dsl" if backend == CUTE_DSL else "cuda")
    return case_of(backend, shape, *drawn(shape, recipe=recipe), recipe=recipe)


def with_exact_math(backend):
    shape = Shape(24, 256, 128, 4, 2)
    recipe = Recipe("exact", None, "cute-dsl" if backend == CUTE_DSL else "cuda")
    return case_of(backend, shape, *drawn(shape, recipe=recipe), recipe=recipe)


RELU2, SITU = ActivationType.Relu2, ActivationType.Situ
CASES = {
    c.name: c
    for c in (
        Layer("gated", PER_TOKEN, plain(Shape(24, 256, 128, 4, 2))),
        Layer("not gated", PER_TOKEN, plain(Shape(24, 256, 128, 4, 2), RELU2)),
        Layer("second rank", PER_TOKEN, plain(Shape(24, 256, 128, 8, 3, 4, 4))),
        Layer("eight slots", (TRTLLM,), plain(Shape(5, 512, 128, 8, 8))),
        Layer("padded", PER_TOKEN, plain(Shape(6, 208, 80, 4, 2))),
        Layer("biases and parameters", (TRTLLM,), with_biases),
        Layer("logits", PER_TOKEN, from_logits(Routing(_M.Renormalize, 4))),
        Layer("logits with ties", (TRTLLM,), from_logits(Routing(_M.Renormalize, 4), ties=True)),
        Layer("logits with bias", (TRTLLM,), from_logits(Routing(_M.DeepSeekV3, 4), bias=0.2)),
        Layer("4over6", PER_TOKEN, with_four_over_six, FOUR_OVER_SIX),
        Layer("exact math", PER_TOKEN, with_exact_math, EXACT_MATH),
        Layer("static", (TRTLLM, CUTLASS), plain(Shape(24, 256, 128, 4, 2), mode="static")),
        Layer("static, not gated", (CUTLASS,), plain(Shape(24, 256, 128, 4, 2), RELU2, "static")),
        Layer("static, SiTU", (CUTLASS,), plain(Shape(24, 256, 128, 4, 2), SITU, "static")),
        Layer(
            "static, second rank", (CUTLASS,), plain(Shape(24, 256, 128, 8, 4, 4, 4), mode="static")
        ),
        Layer("exact sums", PER_TOKEN, exact(Shape(24, 256, 128, 4, 2))),
        Layer("exact sums, second rank", PER_TOKEN, exact(Shape(33, 256, 128, 8, 3, 4, 4))),
    )
}
