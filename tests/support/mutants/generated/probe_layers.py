"""Probes of the layer after the routing, of the dense product and of the fused quantizers."""

# SPDX-License-Identifier: Apache-2.0
import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch

from nvfp4_moe import host
from nvfp4_moe.cases import moe as moe_cases
from nvfp4_moe.cases import moe_edges
from nvfp4_moe.differential.verdict import Allowed
from nvfp4_moe.reference import activation, dense, fused_quantize, layouts
from nvfp4_moe.reference.activation import ActivationType
from nvfp4_moe.reference.moe import layer as moe
from nvfp4_moe.reference.moe.finalize import finalize, split_k_groups
from nvfp4_moe.reference.moe.hidden_states import Activations
from nvfp4_moe.reference.moe.permute import local_slots, permutation
from nvfp4_moe.reference.numerics.accumulate import fma, matmul
from nvfp4_moe.reference.recipe import NVFP44Over6Config, Recipe, SfLayout
from nvfp4_moe.reference.weights.prepare import prepare_experts

from .answers import Answers, raised
from .numbers import around, factors_of_the_least, seeded, specials
from .trial import Probe

ACCURACY = 2.0**-21
"""Relative error of an activation, of fp32 torch functions."""


def of_moe() -> Answers:
    g = seeded(6)
    for tokens, top_k, hidden in (
        (3, 1, 16),
        (2, 4, 24),
        (3, 5, 16),
        (2, 8, 12),
        (2, 9, 16),
        (1, 22, 8),
        (1, 66, 8),
    ):
        size = host.powers(host.integers(g, -20, 20, (tokens, top_k, 1)))
        rows = (host.normal(g, tokens, top_k, hidden) * size).bfloat16().float()
        weights = host.normal(g, tokens, top_k)
        for order in ("flashinfer", "slot", "slot-multiply"):
            yield f"finalize, {top_k}", finalize(rows, weights, order)
            tiny = 2.0**-126
            yield f"finalize of subnormals, {top_k}", finalize(rows * tiny, weights, order)
            yield f"finalize by subnormals, {top_k}", finalize(rows, weights * tiny, order)
            yield f"finalize of -0, {top_k}", finalize(rows * -0.0, weights.abs(), order)
    for tokens, top_k, hidden in itertools.product(
        (1, 8, 16, 18, 19, 1183, 1184, 8192, 9000),
        (1, 4, 5, 8, 9, 16, 17, 33, 64, 65),
        (256, 257, 512, 16384, 16388),
    ):
        yield "split_k_groups", split_k_groups(tokens, top_k, hidden)
    a = host.normal(g, 4096).bfloat16().float()
    b, c = (
        host.normal(g, 4096),
        host.normal(g, 4096) * host.powers(host.integers(g, -40, 40, (4096,))),
    )
    near = (a.double() * b.double()).float()
    for addend in (c, near * -1, -near * (1 + 2.0**-23), near * 2.0**-24, near * 2.0**25):
        yield "fma", fma(a, b, addend)
    # Products of 25 bits, which are ties of fp32, and addends that fp64 loses.
    odd = (host.arange(3, 255, 2).float(), host.integers(g, 0, 2**18, (126,)))
    low = (2.0**24 / odd[0]).ceil().long() // 2 * 2 + 1
    tie = (low + odd[1] % (low // 2) // 2 * 2).float()
    for sign, size in itertools.product((1.0, -1.0), (2.0**-64, -(2.0**-64), 0.0, 2.0**-80)):
        yield "fma, ties", fma(odd[0] * sign, tie, tie * size)
    ulp = 2.0**-28  # of fp64 there; addends that leave a sum one or two of them from a tie
    for scale, sign, steps in itertools.product((1.0, 2.0**-60), (1.0, -1.0), (1, 2)):
        addend = host.full(tie.shape, sign * steps * ulp * (1 - 2.0**-23) * scale)
        for factor in (scale, -scale):
            yield "fma, near ties", fma(odd[0] * factor, tie, addend)
    # 2^-25 + 2^-55 next to 1/2: a tie of fp32 but for what fp64 loses, of a sum below 1.
    low = host.fp32([5237765.0, -5237765.0]) * 2.0**-55
    yield "fma, near ties below 1", fma(host.fp32([205.0]), low, host.fp32([0.5, -0.5]))
    a, b = factors_of_the_least()
    for ftz in (True, False):
        yield "fma, least", fma(a, b, host.zeros(len(a)), ftz=ftz)
        subnormal = host.full((len(a),), 2.0**-127)
        yield "fma, subnormal addend", fma(a * 2.0**24, b, subnormal, ftz=ftz)
    yield "fma, special", fma(specials(), specials().flip(0), specials().roll(3))
    yield "finalize, no slots", finalize(host.zeros(2, 0, 5), host.zeros(2, 0), "slot")
    far = [(256 * n + m) for n in (1183, 1184) for m in (0, 8)]
    yield "split_k_groups", [split_k_groups(1, 8, hidden) for hidden in far]
    ids = host.integers(g, -1, 7, (6, 3)).int()
    yield "permutation, all local", permutation(ids, 7)
    yield "local_slots", [local_slots(ids, 4), local_slots(ids, 4, 2)]
    yield "permutation", [permutation(ids, 4, offset) for offset in (0, 2)]
    x, w = host.integers(g, -9, 9, (5, 32)).float(), host.integers(g, -9, 9, (7, 32)).float()
    yield "matmul", [matmul(x, w, how) for how in ("fp64", "fp32")]
    x, w = host.normal(g, 5, 64), host.normal(g, 7, 64)
    yield "matmul, rounded", [matmul(x, w, how) for how in ("fp64", "fp32")]
    for case in moe_cases.exact_cases():
        yield case.name, case.run(keep_steps=True)
        elsewhere = replace(case, ids=case.ids * 2 - 1, num_experts=8, local_expert_offset=1)
        yield f"{case.name}, elsewhere", elsewhere.run(keep_steps=True)
        given = (case.activations, case.experts, case.ids, case.weights)
        yield "defaults", moe.fused_moe(*given, keep_steps=True)
        for recipe in (Recipe("exact"), Recipe("fast", NVFP44Over6Config(256))):
            yield f"{case.name}, {recipe}", moe.fused_moe(*given, recipe=recipe, keep_steps=True)
        yield "unrounded", moe.fused_moe(*given, round_to_bf16=False, keep_steps=True)
    odd_sizes = prepare_experts(
        host.integers(g, -2, 3, (2, 48, 80)).bfloat16(),
        host.integers(g, -2, 3, (2, 80, 48)).bfloat16(),
        ActivationType.Relu,
    )
    x = torch.nn.functional.pad(host.integers(g, -2, 3, (4, 80)).bfloat16(), (0, 48))
    ids, weights = host.integers(g, 0, 2, (4, 1)).int(), host.ones(4, 1)
    yield "padded", moe.fused_moe(Activations(x), odd_sizes, ids, weights)
    for case in (
        *moe_edges.far_below(Recipe()),
        *itertools.islice(moe_edges.static(Recipe()), 0, 10, 3),
    ):
        steps = case.run(keep_steps=True).steps
        yield (
            f"requantize, {case.name}",
            [steps[n] for n in ("fc2_input_codes", "fc2_input_block_scales")],
        )


def of_dense() -> Answers:
    g = seeded(9)
    a, b = (host.integers(g, 0, 256, (n, 32)).to(torch.uint8) & 0xAA for n in (9, 24))
    sa, sb = (host.integers(g, 0x30, 0x3A, (n, 4)).to(torch.uint8) & 0xF8 for n in (9, 24))
    b_scales = layouts.from_linear(sb, SfLayout.layout_128x4)
    for use_8x4 in (False, True):
        a_scales = layouts.from_linear(sa, dense.a_layout(use_8x4))
        yield "operands", dense.operands(a, b.T, a_scales, b_scales.T, use_8x4)
        for alpha in (None, host.fp32([0.3]), 0.2 + host.arange(9).float()):
            for dtype in (torch.bfloat16, torch.float16):
                yield (
                    "mm_fp4",
                    dense.mm_fp4(
                        a, b.T, a_scales, b_scales.T, alpha, dtype, use_8x4_sf_layout=use_8x4
                    ),
                )


def of_producers() -> Answers:
    bits = host.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    x = torch.where(bits.isfinite(), bits, 0).view(128, 512)
    for up in (torch.ones_like(x), host.normal(seeded(4), 128, 512).bfloat16()):
        yield "silu", fused_quantize.silu_and_mul(torch.cat((x, up), 1))
    halves = host.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    halves = torch.where(halves.isfinite(), halves, 0).view(128, 512)
    up = host.normal(seeded(5), 128, 512).half()
    yield "silu, fp16", fused_quantize.silu_and_mul(torch.cat((halves, up), 1))
    wide = torch.cat(
        [
            host.normal(seeded(2), 20000) * 40,
            host.fp32([-87.5, -87.0, 88.0, 88.72, 88.73, 89.0, 90.0]),
        ]
    )
    between = (host.arange(-126, 128).double() + 0.5) / fused_quantize.LOG2E  # where n changes
    every = torch.cat([wide, around(between.float()), host.normal(seeded(6), 2**18) * 20])
    yield "exp", fused_quantize.exp(every)
    for k in (16, 48, 80):
        y = (
            host.normal(seeded(k), 200, k) * host.powers(host.integers(seeded(k), -9, 9, (200, 1)))
        ).half()
        weight = host.normal(seeded(1), k).half()
        yield "sum_of_squares", fused_quantize.sum_of_squares(y.float())
        for eps in (1e-6, 0.5):
            yield "rmsnorm", fused_quantize.rmsnorm(y, weight, eps)
            yield "add_rmsnorm", fused_quantize.add_rmsnorm(y, y.flip(0), weight, eps)
        small = (host.normal(seeded(7), 1024, k) * 4e-4).half()
        yield "rmsnorm", fused_quantize.rmsnorm(small, weight)
        yield "add_rmsnorm", fused_quantize.add_rmsnorm(small, small.flip(0), weight)


def of_activation() -> Probe:
    """By accuracy: the last bits are free, what is special is not."""
    g = seeded(11)
    raw = torch.cat(
        [
            host.normal(g, 64, 64) * host.powers(host.arange(64)[:, None] // 4 - 8),
            specials().repeat(2)[:128].view(2, 64),
            host.normal(g, 4, 64) * 2.0**-23,  # where a sigmoid of 2 x becomes 1/2
        ]
    )

    def outputs() -> Iterator[tuple[str, torch.Tensor]]:
        for kind in ActivationType:
            for name, options in (
                ("", {}),
                ("of cutlass", {"of_cutlass": True}),
                (
                    "parameters",
                    {n: v for n, v in moe_edges.PARAMETERS.items() if n in kind.parameters},
                ),
            ):
                if kind.implemented:
                    yield (
                        f"{kind.name} {name}",
                        activation.activate(raw, kind, 0.7, host.fp32(1.3), **options),
                    )

    right = list(outputs())

    def probe() -> Iterator[str]:
        for (name, got), (_, want) in zip(outputs(), right, strict=True):
            error = (got.double() - want.double()).abs()
            near = error <= want.double().abs() * ACCURACY + 1e-44
            if not (near | (got == want) | (got.isnan() & want.isnan())).all():
                yield f"activate, {name}"

    return probe


def traits() -> Answers:
    x = host.normal(seeded(15), 4, 32)
    x[0, ::3], x[1, ::3] = -0.0, 0.0
    x[0, 0] = -0.0
    yield "the first own value", activation.OWN
    for kind in (ActivationType.Identity, ActivationType.Relu, ActivationType.Relu2):
        yield "exact", activation.activate(x, kind)
    for kind in ActivationType:
        traits = kind.gated, kind.implemented, kind.linear_up, kind.limited
        yield kind.name, (*traits, {name: kind.is_raw(name) for name in activation.PARAMETERS})
        if not kind.implemented:
            yield kind.name, raised(lambda k=kind: activation.activate(host.zeros(1, 4), k))


def fused() -> Probe:
    """By intervals: the cases of `nvfp4-moe diff`."""
    every = [*moe_edges.cases(Recipe()), *moe_cases.few_cases()]
    allowed = [Allowed(case) for case in every]

    def probe() -> Iterator[str]:
        for one in allowed:
            if one.wrong(one.case.reference()).any():
                yield one.case.name

    return probe
