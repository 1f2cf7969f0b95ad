"""Conforming runs of a fuzzed call, and the intervals that they are judged by.

A way to run is one of `conforming.CONFORMING` or one of those here. They sum in another order, use an
approximate activation, flush subnormal values, or multiply scalars first. Triton's kernels are one more.
"""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..cases.fuzz import DenseCall, Draw, Kind, draw, draw_dense
from ..cases.moe_case import MoECase, to_device
from ..kernels.dense.api import mm_fp4 as dispatched_mm_fp4
from ..kernels.moe.backends import FUSED_MOE
from ..reference import dense
from ..reference.bounds.accumulation import KFOLD
from ..reference.bounds.dense import mm_fp4_bounds
from ..reference.bounds.fold import Fold
from ..reference.bounds.interval import Interval
from ..reference.bounds.moe import fused_moe_bounds, routed_moe_bounds
from ..reference.bounds.parallel import expert_parallel_bounds, tensor_parallel_bounds
from ..reference.moe import layer as moe
from ..reference.moe import shards
from ..reference.moe.layer import Stages
from ..reference.moe.variants import VARIANTS
from ..reference.numerics.accumulate import matmul
from ..reference.numerics.fp32 import flush
from ..reference.weights.experts import Experts
from .conforming import CONFORMING, folded

Tensor = torch.Tensor


@dataclass(frozen=True)
class JudgedRun:
    """A run, and the results that are allowed."""

    way: str
    stage: str
    got: Tensor
    allowed: Interval


def _flushing() -> Stages:
    """Compute as code that was compiled with -use_fast_math."""

    def gemm(x: Tensor, w: Tensor, accumulate: Any) -> Tensor:
        return flush(matmul(x, w, accumulate))

    def activate(raw: Tensor, experts: Experts, e: int) -> Tensor:
        return flush(moe.activate_raw(flush(raw), experts, e))

    return Stages(gemm1=gemm, activate=activate, gemm2=gemm)


def _scalars_first(case: MoECase) -> Stages | None:
    """Return acc * (token scale * scalar), as CuTe-DSL's kernels multiply, if nothing comes between."""
    e, scale = case.experts, case.activations.per_token_scale
    between = (e.gemm1_bias, e.gemm1_beta, e.gemm1_clamp_limit)
    if scale is None or any(t is not None for t in between) or e.activation.limited:
        return None
    ids, last = case.routed[0], {}
    one = torch.ones_like(e.output1_scale_scalar)

    def gemm(x: Tensor, w: Tensor, accumulate: Any) -> Tensor:
        last["sums"] = matmul(x, w, accumulate)
        return last["sums"]

    def activate(_: Tensor, experts: Experts, i: int) -> Tensor:
        token = (ids == i + case.local_expert_offset).nonzero(as_tuple=True)[0]
        gate = scale[token, None] * experts.output1_scale_gate_scalar[i]
        up = scale[token, None] * experts.output1_scale_scalar[i]
        sums = last["sums"]
        if not e.activation.gated:
            raw, after = sums * gate, experts.output1_scale_scalar
        else:
            halves = sums.chunk(2, -1)
            linear = e.activation.linear_up
            raw = torch.cat([halves[0] * (up if linear else gate), halves[1] * gate], -1)
            after = one if linear else experts.output1_scale_scalar
        changed = replace(experts, output1_scale_scalar=after, output1_scale_gate_scalar=one)
        return moe.activate_raw(raw, changed, i)

    return Stages(gemm1=gemm, activate=activate)


def _ways(case: MoECase) -> dict[str, Stages]:
    """The ways that this call may be run in."""
    row = case.experts.activation.row
    smooth = not (row.exact or row.clamps_result)  # what is clamped last is exact
    ways = {n: s for n, s in CONFORMING.items() if smooth or "approximate" not in n}
    ways["flushing"] = _flushing()
    first = _scalars_first(case)
    return ways if first is None else ways | {"scalars first": first}


def _options(case: MoECase) -> dict[str, Any]:
    return {
        "recipe": case.recipe,
        "local_expert_offset": case.local_expert_offset,
        "finalize_order": case.finalize_order,
        "variant": case.build,
        "output_dtype": case.output_dtype,
    }


def _triton(case: MoECase) -> Tensor | None:
    """The output of our kernels; None where they do not serve."""
    request = case.request()
    if FUSED_MOE.refusal("triton", request) is not None:
        return None
    return FUSED_MOE.serve(request, "triton")[0]


def _fused(case: MoECase, d: Draw, ways: int, triton: bool) -> Iterator[JudgedRun]:
    a, e = case.activations, case.experts
    options = _options(case)
    ids, weights = case.routed
    allowed = fused_moe_bounds(a, e, ids, weights, **options)
    every = _ways(case)
    names = [*(d.choice(list(every)[1:]) for _ in range(ways - 1)), "fp64"]
    for number, name in enumerate(names):
        result = moe.fused_moe(
            a, e, ids, weights, **options, stages=every[name], keep_steps=number == 0
        )
        yield JudgedRun(name, "output", result.output, allowed.output)
        if number == 0:
            yield from _stages(case, options, name, result)
    routed = allowed.output
    if case.logits is not None:
        routed = routed_moe_bounds(a, e, case.logits, case.routing, case.routing_bias, **options)
        yield JudgedRun("fp64, routed", "output", result.output, routed)
    if triton and (got := _triton(case)) is not None:
        yield JudgedRun("triton", "output", got, routed)


def _stages(
    case: MoECase, options: dict[str, Any], name: str, result: moe.MoEResult
) -> Iterator[JudgedRun]:
    """Check each stage on the inputs that the run itself had."""
    steps = result.steps
    intermediate = steps.get("intermediate", steps["activated"]).float()
    given = fused_moe_bounds(
        case.activations,
        case.experts,
        *case.routed,
        **options,
        accumulator1=steps["accumulator1"],
        intermediate=intermediate,
    )
    yield JudgedRun(name, "accumulator1", steps["accumulator1"], given.accumulator1)
    yield JudgedRun(name, "intermediate", intermediate, given.intermediate)
    yield JudgedRun(name, "rows", result.rows, given.rows)


def _parallel(case: MoECase, d: Draw) -> Iterator[JudgedRun]:
    """Two ranks of experts, or of the intermediate's columns."""
    options = _options(case)
    del options["variant"]
    offset = options.pop("local_expert_offset")
    ids, weights = case.routed
    ids = torch.where(ids < offset, -1, ids - offset)
    reduce_dtype = d.choice((None, torch.float32))
    options["reduce_dtype"] = reduce_dtype
    a, e = case.activations, case.experts
    if e.intermediate_size >= 32:
        got = shards.fused_moe_shards(a, e, ids, weights, tp_shards=2, **options)
        allowed = tensor_parallel_bounds(a, e, ids, weights, 2, **options)
        yield JudgedRun("2 shards", "output", got.output, allowed)
    count = e.num_local
    parts = [count] if count == 1 else [1] * count
    allowed = expert_parallel_bounds(a, e, ids, weights, parts, **options)
    dtype = options.pop("reduce_dtype") or case.output_dtype
    options["output_dtype"] = dtype
    outputs = [
        moe.fused_moe(
            a, shards.select_experts(e, r, 1), ids, weights, local_expert_offset=r, **options
        ).output
        for r in range(count)
    ]
    for order in (range(count), reversed(range(count))):
        total = torch.zeros_like(outputs[0])
        for r in order:
            total = total + outputs[r]
        yield JudgedRun(f"{count} ranks", "output", total.to(case.output_dtype), allowed)


def _dense(call: DenseCall, triton: bool) -> Iterator[JudgedRun]:
    arguments = {name: getattr(call, name) for name in DenseCall.__dataclass_fields__}
    allowed = mm_fp4_bounds(**arguments)
    for accumulate in ("fp64", "fp32"):
        yield JudgedRun(
            accumulate, "output", dense.mm_fp4(**arguments, accumulate=accumulate), allowed
        )
    x, w = dense.operands(call.a, call.b, call.a_descale, call.b_descale)
    for fold in (Fold(), Fold(chunks=2)):
        total = folded(fold, extra_bits=1)(x, w)
        if call.alpha is not None:
            total = total * call.alpha.reshape(-1, 1)
        narrower = mm_fp4_bounds(**arguments, accumulation=replace(KFOLD, fold=fold))
        yield JudgedRun(str(fold), "output", total.to(call.out_dtype), narrower)
    if triton:
        yield JudgedRun(
            "triton", "output", dispatched_mm_fp4(**arguments, backend="triton"), allowed
        )


def judged(
    seed: int, *, tokens: int, ways: int, kinds: int | None, device: str, triton: bool
) -> Iterator[JudgedRun]:
    """Run the call of one seed in several ways, and judge each run.

    Args:
        ways: of the reference's runs.
        kinds: how many there are, None: as many as seeds.
    """
    number = seed if kinds is None else seed % kinds
    d = Draw(seed + (1 << 40))
    if number % 12 == 11:
        yield from _dense(to_device(draw_dense(seed, tokens), device), triton)
        return
    kind = Kind.draw(number)
    case = draw(seed, kind, tokens).to(device)
    if number % 12 == 10 and not VARIANTS[kind.build].rounds_first_gemm:
        yield from _parallel(case, d)
    else:
        yield from _fused(case, d, ways, triton)
