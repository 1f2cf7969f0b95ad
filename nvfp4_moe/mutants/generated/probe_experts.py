"""What the preparation of experts, and their reload, is asked."""

# SPDX-License-Identifier: Apache-2.0
import functools
import itertools
from dataclasses import replace

import torch

from ... import host
from ...cases import moe_edges as matrix_edges
from ...reference.activation import ActivationType
from ...reference.layouts import inverse
from ...reference.recipe import NVFP44Over6Config, Recipe
from ...reference.weights import checksum, cute_dsl, cutlass
from ...reference.weights.layout import (
    gemm1_values,
    gemm2_values,
    padded_sizes,
    reordered,
    row_order,
    unshuffled_bias,
)
from ...reference.weights.prepare import assemble_experts, prepare_experts
from ...reference.weights.scalars import weight_encode_scale
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
        read = {name: matrix_edges.PARAMETERS[name] for name in sorted(kind.parameters)}
        biases = {"w13_bias": host.normal(g, 3, rows), "w2_bias": host.normal(g, 3, 208)}
        static = {"input_amax": 3.0, "intermediate_amax": 5.0}
        for options in ({}, read | biases, static, static | read | biases, {"recipe": Recipe()}):
            made = prepare_experts(w13.bfloat16(), w2.bfloat16(), kind, **options)
            yield f"prepare_experts, {kind.name}", made
            yield "sizes", (made.num_local, made.padded_hidden_size, made.padded_intermediate_size)
            yield (
                "values",
                [f(made, e) for f in (gemm1_values, gemm2_values) for e in (0, 2)],
            )
            yield "checksum", checksum.checksum(made)
        apart = torch.stack([0.5 + host.arange(3).float(), 0.1 + host.arange(3).float()], 1)
        codes = [host.integers(g, 0, 256, s).to(torch.uint8)
                 for s in ((3, rows, 104), (3, rows, 13), (3, 208, 40), (3, 208, 5))]  # fmt: skip
        for decode in (apart[:, 0], apart):
            for options in ({}, biases, read):
                yield "assemble", raised(functools.partial(
                    assemble_experts, *codes[:2], decode, *codes[2:], apart[:, 1], kind,
                    **options))  # fmt: skip
        order = inverse(row_order(made.gemm2_weights.shape[1], False))
        yield "reordered", reordered(made.gemm2_weights, made.gemm2_weights_scale, order)
        yield "biases", unshuffled_bias(host.arange(128)[None].float(), kind.gated)
    for sizes in itertools.product((16, 127, 128, 129), (16, 63, 64, 65, 128, 130), (True, False)):
        yield "padded_sizes", padded_sizes(*sizes)
    for amax in (0.0, 1e-38, 1.0, 7.0):
        for recipe in (Recipe(), Recipe("exact", NVFP44Over6Config(256))):
            yield "encode scale", weight_encode_scale(host.fp32(amax), recipe)
    w = host.normal(seeded(1), 2, 64, 32).bfloat16()
    for a, b in ((w, w), (w.float(), w), (w[0], w), (w, w[:, :32, :16]), (w[:, :48], w[:, :32, :24]),
                 (w, w.mT[:, :, :32].contiguous()), (w[..., :24], w[:, :24, :32]),
                 (w, w[:, :32].contiguous()), (w[:, :63], w[:, :32, :31])):  # fmt: skip
        yield "refused", raised(lambda a=a, b=b: prepare_experts(a, b))


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


def of_reload() -> Answers:
    """New weights, biases, parameters and static scales, of all experts or of one."""
    static = {"input_amax": 3.0, "intermediate_amax": 5.0}
    for kind in (ActivationType.Swiglu, ActivationType.Relu2, ActivationType.Situ):
        g = seeded(int(kind))
        rows = 80 * (2 if kind.gated else 1)
        w = [
            (host.normal(g, 3, *s) * host.powers(host.arange(3))[:, None, None]).bfloat16()
            for s in ((rows, 144), (144, 80))
        ]
        read = {name: matrix_edges.PARAMETERS[name] for name in sorted(kind.parameters)}
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
