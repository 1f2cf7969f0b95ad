"""The calls of the fused mixture of experts that `nvfp4-moe diff` compares."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from .. import host
from ..kernels import environment
from ..reference.activation import ELSEWHERE, IMPLEMENTED, ActivationType, activate
from ..reference.moe.hidden_states import Activations, quantize_activations
from ..reference.moe.routing import METHODS, Routing, RoutingMethodType, route
from ..reference.moe.variants import VARIANTS
from ..reference.numerics import e2m1
from ..reference.quantize import quantize_global_scale
from ..reference.recipe import BLOCK_SIZE, FLASHINFER, FlashInferVersion, LayerBuild, Recipe
from ..reference.weights.experts import Experts
from ..reference.weights.prepare import assemble_experts, prepare_experts
from . import inputs, moe_edges
from .moe_case import MoECase

TENSOR = "layer0.ffn_in"
TOKENS, HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 24, 512, 128, 4, 2
_M = RoutingMethodType
_GIVEN = Routing(_M.Renormalize, TOP_K)
Plan = tuple[str, Callable[[], MoECase]]
"""The name of a case, and the function that makes it: most of the time goes into the weights."""


def cases(flashinfer: FlashInferVersion = FLASHINFER) -> list[MoECase]:
    """Make the cases that every machine compares; they are small enough for the interpreter.

    Real hidden states through each activation; the ways of the contract, one by one, on SwiGLU or
    Relu2; inputs whose sums are exact; inputs that show what ordinary numbers hide. The math and
    4over6 are those that the environment asks of FlashInfer, so that its backends serve; the layers'
    own orders are those of a version.
    """
    return [make() for _, make in _plans(flashinfer)]


def chosen_cases(names: Sequence[str], flashinfer: FlashInferVersion = FLASHINFER) -> list[MoECase]:
    """Make the cases of these names alone, in the order of the names."""
    found: dict[str, MoECase] = {}
    for name, make in _plans(flashinfer):
        if name in names:
            found[name] = make()
            if len(found) == len(names):  # those that follow are not even planned
                break
    return [found[name] for name in names]


def _plans(flashinfer: FlashInferVersion) -> Iterator[Plan]:
    yield from _activations()
    yield from _ways()
    yield from _routed()
    yield from _of_other_builds(flashinfer)
    for make in (exact_cases, partial(moe_edges.cases, _recipe())):
        for case in make():
            yield case.name, partial(_itself, case)


def _itself(case: MoECase) -> MoECase:
    return case


def few_cases(flashinfer: FlashInferVersion = FLASHINFER) -> list[MoECase]:
    """Make one case for each thing that can go wrong on its own."""
    names = (
        "Swiglu, per token",
        "Relu2, static",
        "Swiglu, experts 2 to 5 of 8",
        "Swiglu, routed by DeepSeekV3",
        "Swiglu, routed by Renormalize, ties",
        "Swiglu, build cute-dsl",
        "Geglu, build cutlass",
        "Relu2, sums exact",
    )
    return chosen_cases(names, flashinfer)


def large_cases(flashinfer: FlashInferVersion = FLASHINFER) -> list[MoECase]:
    """Make the cases that only a GPU has time for, too: many tokens take other tiles and tactics."""
    return cases(flashinfer) + [
        _normal(f"T = {t}, H = {h}, I = {i}, E = {e}, K = {k}", t, h, i, e, k, kind)
        for t, h, i, e, k, kind in (
            (1, 2048, 768, 128, 8, ActivationType.Swiglu),
            (300, 1024, 512, 32, 4, ActivationType.Swiglu),
            (257, 1024, 2688, 16, 6, ActivationType.Relu2),
            (4096, 2048, 768, 128, 8, ActivationType.Swiglu),  # where one tactic was wrong once
        )
    ]


SETS = {"few": few_cases, "small": cases, "large": large_cases}
"""Choices of `--layers`."""


def layer(kind: ActivationType, hidden: int, **options: Any) -> Experts:
    """Make EXPERTS experts of normal weights, seeded by the activation."""
    return prepare_experts(*layer_weights(kind, hidden), kind, **options)


def layer_weights(kind: ActivationType, hidden: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(int(kind))
    rows = INTERMEDIATE * (2 if kind.gated else 1)
    w13 = host.normal(g, EXPERTS, rows, hidden) / hidden**0.5
    w2 = host.normal(g, EXPERTS, hidden, INTERMEDIATE) / INTERMEDIATE**0.5
    return w13.bfloat16(), w2.bfloat16()


def choice(tokens: int = TOKENS, top_k: int = TOP_K) -> tuple[torch.Tensor, torch.Tensor]:
    """Route random logits: (ids, bf16 weights)."""
    chosen = route(_logits(tokens, EXPERTS), Routing(_M.Renormalize, top_k))
    return chosen.ids, chosen.weights_bf16


def _logits(tokens: int, experts: int) -> torch.Tensor:
    return host.normal(torch.Generator().manual_seed(7), tokens, experts)


def real_states(hidden: int) -> torch.Tensor:
    """Return real hidden states [TOKENS, hidden] bf16; their columns begin anew after the last one."""
    x = inputs.activations()[TENSOR][:TOKENS].bfloat16()
    return x[:, host.arange(hidden) % x.shape[1]]


def _states(experts: Experts, recipe: Recipe, mode: str = "per-token") -> Activations:
    """Return real hidden states in the form that the layer takes."""
    x = real_states(experts.hidden_size)
    if mode == "bf16":
        return Activations(x)
    if mode == "static":
        assert experts.input_scale is not None
        q = quantize_global_scale(x, experts.input_scale, recipe)
        return Activations(q.codes, q.block_scales)
    return quantize_activations(x, recipe)


def _recipe(build: LayerBuild = "cuda") -> Recipe:
    quantizers = VARIANTS[build].quantizers
    return Recipe(environment.math(quantizers), environment.four_over_six(), quantizers)


def _case(name: str, kind: ActivationType, *arguments: Any, **options: Any) -> Plan:
    """Plan a case of an activation; `_make` takes the arguments."""
    whole = f"{kind.name}, {name}"
    return whole, partial(_make, whole, kind, *arguments, **options)


def _make(
    name: str,
    kind: ActivationType,
    mode: str = "per-token",
    recipe: Recipe | None = None,
    experts: dict[str, Any] | None = None,
    hidden: int = HIDDEN,
    **changes: Any,
) -> MoECase:
    options = experts or {}
    if mode == "static":
        options = options | {"input_amax": 20.0, "intermediate_amax": 20.0}
    recipe, prepared = recipe or _recipe(), layer(kind, hidden, **options)
    given: dict[str, Any] = {"routing": _GIVEN, "num_experts": EXPERTS, "recipe": recipe}
    if "logits" not in changes:
        given["ids"], given["weights"] = choice()
    states = _states(prepared, replace(recipe, build="cuda"), mode)
    return MoECase(name, states, prepared, **given | changes)


def _activations() -> Iterator[Plan]:
    for kind in IMPLEMENTED:
        yield _case("per token", kind)


def _ways() -> Iterator[Plan]:
    """Make cases of the contract's options, one at a time."""
    swiglu = ActivationType.Swiglu
    yield _case("bf16", swiglu, "bf16")
    yield _case("static", swiglu, "static")
    yield _case("static", ActivationType.Relu2, "static")
    # FlashInfer's TRT-LLM layer refuses it.
    yield _case("H = 384", swiglu, hidden=384)
    g = torch.Generator().manual_seed(3)
    yield _case(
        "alpha, beta, limit, biases",
        swiglu,
        experts={
            "alpha": 1.702,
            "beta": 1.0,
            "clamp_limit": 1.5,
            "w13_bias": host.normal(g, EXPERTS, 2 * INTERMEDIATE),
            "w2_bias": host.normal(g, EXPERTS, HIDDEN),
        },
    )
    ids, weights = choice()
    yield _case(
        "experts 2 to 5 of 8",
        swiglu,
        num_experts=8,
        local_expert_offset=2,
        ids=ids * 2,
        weights=weights,
    )
    yield _case(
        "fp32 weights, slots in order",
        swiglu,
        finalize_order="slot",
        ids=ids,
        weights=weights.float() / 3,
    )


def _routed() -> Iterator[Plan]:
    """Make cases that route from logits, by each method."""
    logits = _logits(TOKENS, EXPERTS)
    bias = torch.linspace(-0.5, 0.5, EXPERTS, dtype=torch.float32, device="cpu")
    for method in METHODS:
        routing = Routing(method, 1 if method == _M.Llama4 else TOP_K)
        yield _case(
            f"routed by {method.name}",
            ActivationType.Swiglu,
            routing=routing,
            logits=logits,
            routing_bias=bias if method.biased else None,
        )
    yield _case("routed by Renormalize, ties", ActivationType.Swiglu, logits=logits.round())


def _of_other_builds(flashinfer: FlashInferVersion) -> Iterator[Plan]:
    for kind in (kind for kind in IMPLEMENTED if "cute-dsl" in ELSEWHERE[kind].flashinfer):
        yield _of_build("cute-dsl", kind, flashinfer)
    for kind in (ActivationType.Swiglu, ActivationType.Geglu, ActivationType.Relu2):
        yield _of_build("cutlass", kind, flashinfer)


def _of_build(build: LayerBuild, kind: ActivationType, flashinfer: FlashInferVersion) -> Plan:
    variant = VARIANTS[build]
    mode = "static" if variant.static_only else "per-token"
    name, make = _case(
        f"build {build}",
        kind,
        mode,
        build=build,
        recipe=_recipe(build),
        finalize_order=variant.order(flashinfer),
    )

    def laid_out() -> MoECase:
        case = make()
        return replace(case, experts=variant.prepared(case.experts))

    return name, laid_out


def exact_cases() -> Iterator[MoECase]:
    """Make codes of -1, 0 and 1 under scales that are powers of two: no sum ever rounds."""
    one = 0x38  # 1.0 in e4m3
    for seed, kind in enumerate(
        (ActivationType.Relu2, ActivationType.Relu, ActivationType.Identity)
    ):
        g = torch.Generator().manual_seed(seed)

        def codes(*size: int, density: float, g: torch.Generator = g) -> torch.Tensor:
            value = host.integers(g, 0, 2, size) * 8 + 2  # the codes of 1 and -1
            nonzero = host.uniform(g, *size) < density
            return e2m1.pack(torch.where(nonzero, value, 0).to(torch.uint8))

        def ones(*size: int) -> torch.Tensor:
            return torch.full(size, one, dtype=torch.uint8, device="cpu")

        e, h, i = EXPERTS, 256, INTERMEDIATE
        power = host.powers(host.arange(e).remainder(3))
        experts = assemble_experts(
            codes(e, i, h, density=0.2),
            ones(e, i, h // BLOCK_SIZE),
            power,
            codes(e, h, i, density=0.1),
            ones(e, h, i // BLOCK_SIZE),
            1 / power,
            kind,
        )
        states = Activations(
            codes(TOKENS, h, density=0.3),
            ones(TOKENS, h // BLOCK_SIZE),
            host.powers(host.arange(TOKENS).remainder(5).sub(2)),
        )
        ids, _ = choice()
        weights = host.powers(-host.arange(TOP_K).remainder(3)).expand(TOKENS, -1)
        yield MoECase(
            f"{kind.name}, sums exact",
            states,
            experts,
            _GIVEN,
            e,
            ids=ids,
            weights=weights.bfloat16(),
            recipe=_recipe(),
            exact=True,
        )


def _normal(
    name: str,
    tokens: int,
    hidden: int,
    intermediate: int,
    experts: int,
    top_k: int,
    kind: ActivationType,
) -> MoECase:
    """Make random codes under scales of ordinary size, which takes no time."""
    g = torch.Generator().manual_seed(tokens)
    rows = intermediate * (2 if kind.gated else 1)

    def random(low: int, high: int, *size: int) -> torch.Tensor:
        return torch.randint(low, high, size, dtype=torch.uint8, device="cpu", generator=g)

    prepared = assemble_experts(
        random(0, 256, experts, rows, hidden // 2),
        random(0x28, 0x40, experts, rows, hidden // BLOCK_SIZE),
        host.full((experts,), 0.25 * hidden**-0.5),
        random(0, 256, experts, hidden, intermediate // 2),
        random(0x28, 0x40, experts, hidden, intermediate // BLOCK_SIZE),
        host.full((experts,), 0.25 * intermediate**-0.5),
        kind,
    )
    recipe = _recipe()
    x = host.normal(g, tokens, hidden).bfloat16()
    scores = host.uniform(g, tokens, experts)
    weights, ids = scores.topk(top_k, dim=1)
    return MoECase(
        f"{kind.name}, {name}",
        quantize_activations(x, replace(recipe, build="cuda")),
        prepared,
        Routing(_M.Renormalize, top_k),
        experts,
        ids=ids.int(),
        weights=weights.bfloat16(),
        recipe=recipe,
    )


def exact_layer(
    x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """Compute a SwiGLU layer in fp64: output [T, H], and the intermediate's largest magnitude."""
    output = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    largest = 0.0
    for t in range(x.shape[0]):
        for e, weight in zip(ids[t].tolist(), weights[t].tolist(), strict=True):
            y = activate((w13[e].double() @ x[t].double())[None], ActivationType.Swiglu)[0]
            largest = max(largest, y.abs().max().item())
            output[t] += weight * (w2[e].double() @ y)
    return output, largest
