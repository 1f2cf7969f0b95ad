"""The fused mixture of experts in `nvfp4-moe diff`: real hidden states through every backend here.

An output must lie in the intervals of `reference.bounds`, in any order of the sums; how many of them
are single values, and how near the output is to the reference's, is shown beside it.
"""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TextIO

import torch

from . import inputs, interpreter, sums
from .kernels import moe_dispatch
from .kernels.moe_request import MoERequest, make_moe_request
from .reference.activation import ActivationType, activate
from .reference.bounds import fused_moe_bounds
from .reference.experts import Experts, prepare_experts
from .reference.moe import Activations, quantize_activations
from .reference.quantize import quantize_global_scale
from .reference.recipe import Recipe
from .reference.routing import Routing, RoutingMethodType, route

INTERPRETER = interpreter.NAME
INTERMEDIATE, EXPERTS, TOP_K, TOKENS = 128, 4, 2, 24
TENSOR = "layer0.ffn_in"


@dataclass(frozen=True)
class MoECase:
    name: str
    activations: Activations
    experts: Experts
    ids: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True)
class Agreement:
    """Of a backend's output with the contract, and with the reference's output."""

    case: str
    backend: str
    outside: int  # elements outside their interval
    single: float  # share of intervals that are one value
    error: float  # relative, Frobenius
    equal: float  # share of elements
    withheld: str = ""  # why the intervals say nothing of this backend

    @property
    def agrees(self) -> bool:
        return self.outside == 0 or bool(self.withheld)


def _layer(kind: ActivationType, hidden: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(int(kind))
    rows = INTERMEDIATE * (2 if kind.gated else 1)
    w13 = torch.randn(EXPERTS, rows, hidden, generator=g) / hidden**0.5
    w2 = torch.randn(EXPERTS, hidden, INTERMEDIATE, generator=g) / INTERMEDIATE**0.5
    return w13.bfloat16(), w2.bfloat16()


def _routing(tokens: int = TOKENS) -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.randn(tokens, EXPERTS, generator=torch.Generator().manual_seed(7))
    result = route(logits, Routing(RoutingMethodType.Renormalize, TOP_K))
    return result.ids, result.weights_bf16


def cases() -> list[MoECase]:
    """Each of TRT-LLM's activations on real hidden states, per token; SwiGLU not quantized, too."""
    x = inputs.activations()[TENSOR][:TOKENS].bfloat16()
    ids, weights = _routing()
    found = []
    for kind in ActivationType:
        if not kind.implemented:
            continue
        experts = prepare_experts(*_layer(kind, x.shape[1]), kind)
        wide = torch.nn.functional.pad(x, (0, experts.padded_hidden_size - x.shape[1]))
        quantized = quantize_activations(wide, Recipe())
        found.append(MoECase(f"{kind.name}, per token", quantized, experts, ids, weights))
        if kind == ActivationType.Swiglu:
            found.append(MoECase(f"{kind.name}, bf16", Activations(wide), experts, ids, weights))
    return found


def run(stream: TextIO) -> list[Agreement]:
    """Judge every backend that works here, and print the table."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    every = [_to(device, case) for case in cases()]
    outputs: list[dict[str, torch.Tensor]] = [{} for _ in every]
    for case, found in zip(every, outputs, strict=True):
        for backend in moe_dispatch.ORDER:
            request = _request(case)
            if backend != "reference" and not on_gpu:
                continue
            if moe_dispatch.refusal(backend, request) is None:
                found[backend] = moe_dispatch.serve(request, backend)[0].cpu()
    if not on_gpu:
        for found, output in zip(outputs, _interpret(every), strict=True):
            found[INTERPRETER] = output
    how = {b: _sums(b, device) for b in {b for found in outputs for b in found}}
    agreements = [
        replace(agreement, withheld=how[agreement.backend])
        for case, found in zip(cases(), outputs, strict=True)
        for agreement in _judge(case, found)
    ]
    _print(agreements, stream)
    return agreements


def _sums(backend: str, device: torch.device) -> str:
    """Empty where a backend adds as the intervals assume; the interpreter's fp32 does."""
    if backend in ("reference", INTERPRETER):
        return ""
    measured = sums.measure(backend, device)
    return "" if measured.as_assumed else str(measured)


def _judge(case: MoECase, found: dict[str, torch.Tensor]) -> Iterator[Agreement]:
    bounds = fused_moe_bounds(case.activations, case.experts, case.ids, case.weights).output
    single = (bounds.low == bounds.high).double().mean().item()
    want = found["reference"].double()
    for backend, got in found.items():
        yield Agreement(
            case.name,
            backend,
            int((~bounds.contains(got)).sum()),
            single,
            ((got - want).norm() / want.norm()).item(),
            (got == want).double().mean().item(),
        )


def _print(agreements: list[Agreement], stream: TextIO) -> None:
    print(
        f"\nfused mixture of experts: {TOKENS} tokens of {TENSOR}, {EXPERTS} experts, top {TOP_K}, "
        f"I = {INTERMEDIATE}; outputs that the contract determines, and the relative error and the "
        "share of equal elements against the reference",
        file=stream,
    )
    for a in agreements:
        verdict = "inside" if a.agrees else f"DIFFER: {a.outside} outside"
        verdict = f"not judged: {a.withheld}" if a.withheld else verdict
        print(
            f"  {a.case:<24}{a.backend:<22}{a.single:8.1%}{a.error:9.1e}{a.equal:8.1%}  {verdict}",
            file=stream,
        )
    print(
        f"mean relative error of a token of {TENSOR} against the bf16 layer, SwiGLU:", file=stream
    )
    print("  " + ", ".join(f"{k} {v:.3f}" for k, v in costs().items()), file=stream)


def costs() -> dict[str, float]:
    """Mean over tokens of the reference's relative error against the bf16 layer, in fp64.

    By token, since one with an outlier has most of the norm of all.
    """
    from .reference import moe

    x = inputs.activations()[TENSOR].bfloat16()
    kind = ActivationType.Swiglu
    w13, w2 = _layer(kind, x.shape[1])
    ids, weights = _routing(x.shape[0])
    want = torch.zeros(x.shape, dtype=torch.float64)
    largest = 0.0
    for t in range(x.shape[0]):
        for e, weight in zip(ids[t].tolist(), weights[t].tolist(), strict=True):
            y = activate((w13[e].double() @ x[t].double())[None], kind)[0]
            largest = max(largest, y.abs().max().item())
            want[t] += weight * (w2[e].double() @ y)
    experts = prepare_experts(
        w13, w2, kind, input_amax=x.abs().max().item(), intermediate_amax=largest
    )
    assert experts.input_scale is not None
    plain = prepare_experts(w13, w2, kind)
    static = quantize_global_scale(x, experts.input_scale, Recipe())
    given = {
        "bf16 (weights alone are quantized)": (Activations(x), plain),
        "per token": (quantize_activations(x, Recipe()), plain),
        "static, its scales from these very tokens": (
            Activations(static.codes, static.block_scales), experts
        ),
    }  # fmt: skip

    def error(a: Activations, e: Experts) -> float:
        difference = moe.fused_moe(a, e, ids, weights).output - want
        return (difference.norm(dim=1) / want.norm(dim=1)).mean().item()

    return {name: error(a, e) for name, (a, e) in given.items()}


def _request(case: MoECase) -> MoERequest:
    return make_moe_request(
        case.activations,
        case.experts,
        num_experts=EXPERTS,
        routing=Routing(RoutingMethodType.Renormalize, TOP_K),
        topk=(case.ids, case.weights),
        nvfp4_4over6=None,
    )


def _to(device: torch.device, thing: Any) -> Any:
    if isinstance(thing, torch.Tensor):
        return thing.to(device)
    if is_dataclass(thing) and not isinstance(thing, type):
        return type(thing)(**{f.name: _to(device, getattr(thing, f.name)) for f in fields(thing)})
    return thing


def _serve_in_triton(case: MoECase) -> torch.Tensor:
    return moe_dispatch.serve(_request(case), "triton")[0]


def _interpret(every: list[MoECase]) -> list[torch.Tensor]:
    """The Triton kernels' outputs from their interpreter."""
    return interpreter.call(f"diff_moe:{_serve_in_triton.__name__}", [(case,) for case in every])
