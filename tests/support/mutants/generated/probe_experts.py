"""Probes of the preparation of experts, and of their reload."""

# SPDX-License-Identifier: Apache-2.0
import functools
import itertools
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from nvfp4_moe import host
from nvfp4_moe.cases import moe_edges
from nvfp4_moe.reference.activation import ActivationType
from nvfp4_moe.reference.layouts import inverse
from nvfp4_moe.reference.recipe import NVFP44Over6Config, Recipe
from nvfp4_moe.reference.weights import checksum, cute_dsl, cutlass, scalars, update, writers
from nvfp4_moe.reference.weights.layout import (
    gemm1_values,
    gemm2_values,
    padded_sizes,
    reordered,
    row_order,
    unshuffled_bias,
)
from nvfp4_moe.reference.weights.prepare import assemble_experts, prepare_experts

from .answers import Answers, raised
from .numbers import seeded


def of_experts() -> Answers:
    for kind in (
        ActivationType.Swiglu,
        ActivationType.Relu2,
        ActivationType.Situ,
        ActivationType.SwigluStep,
    ):
        rows, g = 80 * (2 if kind.gated else 1), seeded(int(kind))
        w13, w2 = host.normal(g, 3, rows, 208) / 9, host.normal(g, 3, 208, 80) / 7
        w13[0], w13[1, :, :16] = 0, 0
        read = {name: moe_edges.PARAMETERS[name] for name in sorted(kind.parameters)}
        biases = {"w13_bias": host.normal(g, 3, rows), "w2_bias": host.normal(g, 3, 208)}
        static = {"input_amax": 3.0, "intermediate_amax": 5.0}
        for options in ({}, read | biases, static, static | read | biases, {"recipe": Recipe()}):
            made = prepare_experts(w13.bfloat16(), w2.bfloat16(), kind, **options)
            yield f"prepare_experts, {kind.name}", made
            yield "repr", [repr(made), repr(replace(made, shard=(0, 2)))]
            yield "sizes", (made.num_local, made.padded_hidden_size, made.padded_intermediate_size)
            yield (
                "values",
                [f(made, e) for f in (gemm1_values, gemm2_values) for e in (0, 2)],
            )
            yield "checksum", checksum.checksum(made)
        apart = torch.stack([0.5 + host.arange(3).float(), 0.1 + host.arange(3).float()], 1)
        codes = [
            host.integers(g, 0, 256, s).to(torch.uint8)
            for s in ((3, rows, 104), (3, rows, 13), (3, 208, 40), (3, 208, 5))
        ]
        for decode in (apart[:, 0], apart, apart.half()):
            for options in ({}, biases, read):
                yield "assemble", raised(functools.partial(
                    assemble_experts, *codes[:2], decode, *codes[2:], apart[:, 1], kind,
                    **options))  # fmt: skip
        order = inverse(row_order(made.gemm2_weights.shape[1], False))
        yield "reordered", reordered(made.gemm2_weights, made.gemm2_weights_scale, order)
        yield "biases", unshuffled_bias(host.arange(128)[None].float(), kind.gated)
    for sizes in itertools.product((16, 127, 128, 129), (16, 63, 64, 65, 128, 130), (True, False)):
        yield "padded_sizes", padded_sizes(*sizes)
    for amax in (0.0, 1e-38, 2.0**-105, 1.0, 7.0):
        for recipe in (Recipe(), Recipe("exact", NVFP44Over6Config(256))):
            yield "encode scale", scalars.weight_encode_scale(host.fp32(amax), recipe)
    w = host.normal(seeded(1), 2, 64, 32).bfloat16()
    for a, b in (
        (w, w),
        (w.float(), w),
        (w[0], w),
        (w, w[:, :32, :16]),
        (w[:, :48], w[:, :32, :24]),
        (w, w.mT[:, :, :32].contiguous()),
        (w[..., :24], w[:, :24, :32]),
        (w, w[:, :32].contiguous()),
        (w[:, :63], w[:, :32, :31]),
    ):
        yield "refused", raised(lambda a=a, b=b: prepare_experts(a, b))


def of_scalars() -> Answers:
    """Scales of every size, biases and limits that leave fp32's range with them, and both shapes."""
    largest = torch.finfo(torch.float32).max
    some = host.fp32(
        [0.0, 2.0**-149, -(2.0**-126), 0.3, -7.0, largest, -largest, torch.inf, -torch.inf]
    )
    for scalar in (2.0**-126, 0.7, 1e30):
        yield "in_raw_units", scalars.in_raw_units(some, host.full(some.shape, scalar))
    bias, beta = host.normal(seeded(2), 3, 5) * 4, host.fp32([0.1, 9.0, 0.2])
    bias[2] /= 64
    odd = bias.clone()
    odd[1, 2], odd[2, 0] = torch.inf, torch.nan
    for given in ((bias,), (bias.half(),), (bias, beta), (odd, beta), (beta, None), (None, None)):
        yield "largest_added", scalars.largest_added(*given)
    added, divisor = host.fp32([1.0, 3.0, 1e30]), host.fp32([37.0])
    for d, a in ((None, None), (divisor, None), (None, added), (divisor, added)):
        most = scalars.most_encode_scale(d, a)
        yield "most_encode_scale", most
        for amax in (0.0, 1e-37, 2.0**-100, 5.0):
            of = host.fp32([amax]) if a is None else host.full((3,), amax)
            yield "weight_encode_scale", scalars.weight_encode_scale(of, Recipe(), most)
    amaxes = (1e-300, 1e-28, 0.7, 2688.0, largest, 1e300)
    yield "static_encode_scale", [scalars.static_encode_scale(amax) for amax in amaxes]
    for encode in (None, host.fp32(2.0**-120), host.fp32(2.0**120)):
        yield "quotient", scalars.quotient(host.fp32([2.0**-30, 1.0, 1e30]), encode)
        yield "product", scalars.product(host.fp32([2.0**-30, 1.0, 1e30]), encode)
    blocks = host.integers(seeded(3), 1, 126, (3, 32, 4)).to(torch.uint8)
    for decode in ([1.0, 0.3, 0.5], [2.0**-128, 1.0, 2.0**-126], [2.0**-126, 2.0**-125, 0.4]):
        for most in (2.0**126, host.fp32([2.0**126, 2.0**125, 2.0**126])):
            one = host.fp32(decode)
            for given in (one, torch.stack((one, one.roll(1)), 1)):
                yield "raised", scalars.raised(blocks, given, most)
                yield "raised", scalars.raised(blocks.view(torch.float8_e4m3fn), given, most)
    up, gate = host.full((7,), 0.5), host.full((7,), 0.25)
    gate[0] = 0.5
    limits = host.fp32([3.0, 0.0, torch.inf, 1.0, 3.0, 0.0, 2.0])
    for kind in ActivationType:
        if kind.implemented:
            for limit in (None, limits, host.full((7,), 2.0)):
                yield "must_share", scalars.must_share(kind, up, gate, limit)
                yield (
                    "one scale",
                    raised(functools.partial(scalars.check_one_scale, kind, up, gate, limit)),
                )


def of_builds() -> Answers:
    g = seeded(8)
    for kind in (ActivationType.Swiglu, ActivationType.Relu2):
        rows = 128 * (2 if kind.gated else 1)
        w = [
            (host.normal(g, 2, rows, 128) / 9).bfloat16(),
            (host.normal(g, 2, 128, 128) / 9).bfloat16(),
        ]
        other = [
            (host.normal(g, 1, rows, 128) / 5).bfloat16(),
            (host.normal(g, 1, 128, 128) / 5).bfloat16(),
        ]
        for make, options in (
            (cute_dsl.with_cute_dsl, {}),
            (cutlass.with_cutlass, {"input_amax": 3.0, "intermediate_amax": 5.0}),
        ):
            made = make(prepare_experts(*w, kind, **options))
            yield f"{make.__name__}, {kind.name}", made
            made.load_(*(t.flip(0) for t in w), backend="reference", **options)
            yield f"{make.__name__}, all loaded", made
            made.load_(*other, first=1, backend="reference", **options)
            yield f"{make.__name__}, loaded", made
    plain = prepare_experts(*w, kind)
    yield "refused", raised(lambda: cutlass.with_cutlass(plain))
    half = replace(plain, input_scale=host.ones(1))
    yield "refused", raised(lambda: cutlass.with_cutlass(half))
    for options in ({"w2_bias": host.zeros(2, 128)}, {"w13_bias": host.zeros(2, 128)}, {}):
        for static in ({}, {"input_amax": 3.0, "intermediate_amax": 5.0}):
            made = prepare_experts(*w, kind, **options, **static)
            for make in (cutlass.with_cutlass, cute_dsl.with_cute_dsl):
                yield "refused", raised(lambda m=made, f=make: f(m))


def _by_triton(jobs: Any, recipe: Recipe) -> None: ...


def of_reload() -> Answers:
    """New weights, biases, parameters and static scales, of all experts or of one."""
    static = {"input_amax": 3.0, "intermediate_amax": 5.0}
    # A writer that refuses this GPU leaves the work to the reference.
    for found in ((None, "refused"), (_by_triton, "")):
        with mock.patch.dict(writers.WRITERS, {"triton": lambda device, found=found: found}):
            chosen = [update._writer("auto", torch.device(name)) for name in ("cuda", "cpu")]
            yield "writer", [writer.__name__ for writer in chosen]
            for name in ("reference", "triton", "other"):
                asked = functools.partial(update._writer, name, torch.device("cpu"))
                yield "writer", raised(lambda asked=asked: asked().__name__)
    for kind in (ActivationType.Swiglu, ActivationType.Relu2, ActivationType.Situ):
        g = seeded(int(kind))
        rows = 80 * (2 if kind.gated else 1)
        w = [
            (host.normal(g, 3, *s) * host.powers(host.arange(3))[:, None, None]).bfloat16()
            for s in ((rows, 144), (144, 80))
        ]
        read = {name: moe_edges.PARAMETERS[name] for name in sorted(kind.parameters)}
        biases = {"w13_bias": host.normal(g, 3, rows), "w2_bias": host.normal(g, 3, 144)}
        for options in ({}, read, biases, static, read | biases | static):
            made = prepare_experts(*w, kind, **options)
            changed = {n: v / 3 if "bias" in n else 2 * v for n, v in options.items()}
            made.load_(*(t.flip(0) for t in w), backend="reference", **changed)
            yield f"all, {kind.name}", made
            if "input_amax" in options:
                continue
            some = {n: v[1:2] if "bias" in n else v for n, v in options.items()}
            made.load_(*(t[2:] for t in w), first=1, **some)
            yield f"one, {kind.name}", made
            amax = (host.fp32([9.0]), host.fp32([8.0]))
            made.load_(*(t[2:] for t in w), first=2, amax=amax, recipe=Recipe(), **some)
            yield f"maxima, {kind.name}", made
            small = [(t[1:] * 2.0**-110).bfloat16() for t in w]
            far = {n: v * 2.0**k for (n, v), k in zip(biases.items(), (9, 3), strict=True)}
            if "w13_bias" in options:
                made.load_(*small, first=0, **some | {n: v[:2] for n, v in far.items()})
                yield f"tiny weights, {kind.name}", made
