"""Probes of the quantizer's kernel: every recipe and mode on numbers at the edges of both."""

# SPDX-License-Identifier: Apache-2.0
import functools
from collections.abc import Callable, Iterator

import torch
from triton_cases import rows_of_few_steps, rows_with_a_block_far_below

from nvfp4_moe import host
from nvfp4_moe.cases import inputs, moe_edges
from nvfp4_moe.cases import quantize as quantize_cases
from nvfp4_moe.kernels.quantize.launch import LaunchConfig
from nvfp4_moe.reference.numerics.fp32 import rcp_approx_ftz
from nvfp4_moe.reference.recipe import NVFP44Over6Config, Recipe, SfLayout

from ..calls import Call, QuantizerCall
from ..kernel_calls import rows_at_edges
from .numbers import seeded
from .quantizer_calls import BaseScaleCall, ChosenCall, CutCall, GivenScaleCall, ValuesCall

Named = Iterator[tuple[str, Callable[[], Call]]]


def named() -> Named:
    yield from _every_recipe()
    yield from _saturating()
    yield from _cuts()
    yield from _given_scales()


def _every_recipe() -> Named:
    far = rows_at_edges().float()
    far[:, 16:] *= 2.0 ** -(host.arange(64).float() / 3)
    near = rows_at_edges().float() * 2.0**-118
    edge = inputs.synthetic("edge", 40, 80)
    for row, largest in ((22, 1.0), (23, 2688.0)):  # ordinary ones but for a block of zeros
        edge[row] = edge[row].float() / edge[row].float().abs().max() * largest
    half = moe_edges.half_rows()
    recipes = {
        "cute-dsl, fast": Recipe(build="cute-dsl"),
        "cute-dsl, exact": Recipe("exact", build="cute-dsl"),
        "exact": Recipe("exact"),
        "4over6 by MAE": Recipe("fast", NVFP44Over6Config()),
        "4over6 of 256 by MSE, exact": Recipe("exact", NVFP44Over6Config(256, "MSE")),
        "4over6, fast error, cute-dsl": Recipe(
            "fast", NVFP44Over6Config(448, "MAE", True), "cute-dsl"
        ),
        "fast": Recipe(),
    }
    for name, recipe in recipes.items():
        for kind, x in (
            ("far", far.bfloat16()),
            ("tiny", near.bfloat16()),
            ("fp16", half),
            ("edge", edge),
        ):
            of_modes = {case.mode: case for case in quantize_cases.cases(x, [recipe], False)}
            for case in of_modes.values():
                yield (
                    f"quantizer, {name}, {case.mode}, {kind}",
                    functools.partial(QuantizerCall, x, case),
                )

    both = LaunchConfig(16, 4, 0, 1, 1, 2)  # a GPU computes both candidates one after the other
    for recipe in (Recipe("fast", NVFP44Over6Config()), Recipe("exact", NVFP44Over6Config())):
        case = quantize_cases.Case("per-token", recipe, SfLayout.layout_linear)
        for size in (0, -110):
            x = _equal_errors() * 2.0**size
            yield (
                f"quantizer, equal errors at 2^{size}, {recipe}",
                functools.partial(QuantizerCall, x, case),
            )
        yield (
            f"quantizer, parts, rows at edges, {recipe}",
            functools.partial(CutCall, _per_token(rows_at_edges(), recipe), both),
        )

    # Rows of blocks whose two errors are so near that the way in which they are computed decides.
    near = torch.cat([rows_at_edges(), inputs.synthetic("grid", 400, 80, seed=5)[100:250]])
    for build in ("cuda", "cute-dsl"):
        recipe = Recipe("fast", NVFP44Over6Config(448, "MAE", True), build)
        case = quantize_cases.Case("per-token", recipe, SfLayout.layout_linear)
        yield (
            f"quantizer, fast error, near ties, {build}",
            functools.partial(QuantizerCall, near, case),
        )
    for recipe in (
        Recipe("fast", NVFP44Over6Config()),
        Recipe("exact", NVFP44Over6Config(256, "MSE")),
    ):
        case = quantize_cases.Case("per-token", recipe, SfLayout.layout_linear)
        yield (
            f"quantizer, near ties, {recipe}",
            functools.partial(QuantizerCall, near, case),
        )

    case = quantize_cases.Case("fp32 per-token", Recipe(), SfLayout.layout_linear)
    of_fp32 = {kind: inputs.synthetic(kind, 40, 80, torch.float32) for kind in ("edge", "sparse")}
    for kind, x in (of_fp32 | {"steps": _steps_of_fp32()}).items():
        yield f"quantizer, fp32, {kind}", functools.partial(QuantizerCall, x, case)

    # Blocks whose errors are subnormal, in rows whose scale is not.
    below = inputs.synthetic("normal", 8, 80) * host.powers(-3 * host.arange(5)).repeat_interleave(
        16
    )
    for recipe in (Recipe("fast", NVFP44Over6Config()), Recipe("exact", NVFP44Over6Config())):
        case = quantize_cases.Case("per-token", recipe, SfLayout.layout_linear)
        yield (
            f"quantizer, subnormal errors, {recipe}",
            functools.partial(QuantizerCall, (below * 2.0**-112).bfloat16(), case),
        )


def _equal_errors() -> torch.Tensor:
    """[40, 80]: blocks whose errors with 4 and with 6 are equal but for the rounding of quotients.

    In units of a scale with 6, 1.5 of which are one with 4, the first number is 6. The second is over 2
    and 2.25, the third under 0.5 and 0.75: what the one errs less with 4, the other does with 6.
    """
    g, rows = seeded(14), 40
    largest = 1 + host.integers(g, 0, 128, (rows, 1)).float() / 128
    scales = host.fp32([8.0, 10.0, 12.0])[host.integers(g, 0, 3, (rows, 4)).long()]
    unit = scales * host.powers(host.integers(g, -1, 5, (rows, 4))) * largest / 2688
    x = host.zeros(rows, 5, 16)
    x[:, 0, 0] = largest[:, 0]
    x[:, 1:, 0] = unit * (5.88 + 0.24 * host.uniform(g, rows, 4))
    x[:, 1:, 1] = unit * (2.25 + 0.25 * host.uniform(g, rows, 4))
    x[:, 1:, 2] = unit * (0.375 + 0.125 * host.uniform(g, rows, 4))
    return x.view(rows, 80).bfloat16()


def _saturating() -> Named:
    """Block scales that round down so far that a magnitude rounds above 6, in some rows or in all.

    And NaN in rows that have no such scale.
    """
    among_numbers = host.normal(seeded(16), 8, 80)
    among_numbers[0, 3], among_numbers[1, 16:32], among_numbers[2, :7] = (
        torch.nan,
        torch.nan,
        torch.nan,
    )
    among_numbers[3], among_numbers[4, 5] = torch.nan, -torch.nan
    for recipe in (
        Recipe("fast", NVFP44Over6Config()),
        Recipe("exact", NVFP44Over6Config()),
        Recipe("fast", NVFP44Over6Config(256, "MSE")),
    ):
        x = rows_of_few_steps(recipe.e4m3_max)
        for rows in (1, 2):
            yield (
                f"quantizer, block scales of few steps, {rows} a program, {recipe}",
                functools.partial(CutCall, _per_token(x, recipe), LaunchConfig(rows, 8, 0, 1, 1)),
            )
        alone = LaunchConfig(1, 8, 0, 1, 1)
        yield (
            f"quantizer, NaN among numbers, {recipe}",
            functools.partial(CutCall, _per_token(among_numbers.bfloat16(), recipe), alone),
        )
        for largest in (8.0, 600.0):
            call = BaseScaleCall(rows_of_few_steps(largest), recipe, 1 / (6 * largest))
            yield (
                f"quantizer, block scales up to {largest}, {recipe}",
                functools.partial(CutCall, call, alone),
            )


def _steps_of_fp32() -> torch.Tensor:
    """[6, 48] fp32: a maximum of a row of 2688, of blocks of 6, 1, 0 and of the largest subnormal."""
    x = host.normal(seeded(9), 6, 48).clamp(-1, 1)
    x[:, 0], x[0, 16], x[1, 16:32], x[2, 16] = 2688, 6, 0, 1
    subnormal = torch.tensor([0x007FFFFF], dtype=torch.int32, device="cpu").view(torch.float32)
    x[3, 32:], x[4, 32:] = subnormal, -subnormal
    x[5, 32:] = torch.nan
    return x


def _per_token(
    x: torch.Tensor, recipe: Recipe, layout: SfLayout = SfLayout.layout_linear
) -> QuantizerCall:
    return QuantizerCall(x, quantize_cases.Case("per-token", recipe, layout))


def _cuts() -> Named:
    """Every way in which a launch cuts a matrix: rows of 5 blocks, of which a program has 4."""
    x = rows_at_edges()[::13]
    x[:4, -1] = 2 * x[:4].abs().amax(1)  # the maximum is in what is read last
    x[4, 0] = 2 * x[4].abs().max()
    x[3, :16], x[4, -16:] = torch.nan, torch.nan
    fast, exact = (Recipe(math, NVFP44Over6Config()) for math in ("fast", "exact"))
    for name, config in {
        "parts": LaunchConfig(1, 4, 0, 1, 1, 2),
        "programs a row": LaunchConfig(1, 4, 8, 2, 1),
        "a second read": LaunchConfig(2, 4, 4, 1, 1),
    }.items():
        for recipe in (Recipe(), exact):
            call = _per_token(x, recipe, SfLayout.layout_8x4)
            yield f"quantizer, {name}, {recipe}", functools.partial(CutCall, call, config)
        for recipe in (fast, exact):
            call = _per_token(rows_with_a_block_far_below(5), recipe)
            named = f"quantizer, blocks far below, {name}, {recipe}"
            yield named, functools.partial(CutCall, call, config)
        values = ValuesCall(x, exact, True)
        yield f"quantizer, {name}, values", functools.partial(CutCall, values, config)
    tiles = CutCall(_per_token(x, Recipe(), SfLayout.layout_128x4), LaunchConfig(2, 4, 0, 1, 1, 2))
    yield "quantizer, parts in tiles", lambda: tiles
    wide = inputs.synthetic("normal", 5, 176)  # 11 blocks; maxima in each that is read later
    for row, block in enumerate((5, 6, 7, 8, 10)):
        wide[row, 16 * block] = 9
    reads = CutCall(_per_token(wide, Recipe()), LaunchConfig(2, 4, 4, 1, 1))
    yield "quantizer, reads", lambda: reads
    case = quantize_cases.Case(
        "global-scale", Recipe(), SfLayout.layout_128x4, quantize_cases.global_scale(x, Recipe())
    )
    split = CutCall(QuantizerCall(x, case), LaunchConfig(4, 4, 0, 2, 1))
    yield "quantizer, programs a row, global scale", lambda: split

    rows = rows_at_edges()[:8] * host.powers(host.fp32([0, -120, 60, 0, -99, 0, 0, 118]))[:, None]
    for recipe in (fast, exact):
        yield (
            f"quantizer, rows of any size at a time, {recipe}",
            functools.partial(
                CutCall, _per_token(rows.bfloat16(), recipe), LaunchConfig(4, 8, 0, 1, 1)
            ),
        )

    tiny = (rows_at_edges()[44:50] * 2.0**-118).bfloat16()
    alone = CutCall(_per_token(tiny, fast), LaunchConfig(1, 8, 0, 1, 1))
    yield "quantizer, 4over6, tiny rows alone", lambda: alone

    for recipe in (Recipe(), Recipe("exact")):
        yield (
            f"quantizer, chosen rows, {recipe}",
            functools.partial(ChosenCall, x, recipe, SfLayout.layout_128x4),
        )
    sizes = host.powers(host.fp32([0, 60, 100, 120, -60]))[:, None]
    for recipe in (Recipe(), Recipe("exact"), Recipe("exact", build="cute-dsl")):
        for base, shown in ((2.0**-127, 1.0), (2.0**30, 2.0**-127)):
            yield (
                f"quantizer, base scale {base}, {recipe}",
                functools.partial(
                    ChosenCall,
                    rows_at_edges()[::13] * sizes.bfloat16(),
                    recipe,
                    SfLayout.layout_linear,
                    base,
                    shown,
                ),
            )


def _given_scales() -> Named:
    """A scale for each row, decode scales, e4m3 elements; values in place of codes."""
    x = rows_at_edges()[20:43]
    rows = (host.arange(len(x)) % 11 - 4).float()
    by_row = host.powers(2 * rows) * (448 * 6 / 3 + rows)
    by_row[5:10] = host.fp32([0.0, 2.0**-127, 2.0**126, torch.inf, 2.0**127])
    decode_by_row = 1 / by_row
    for scales in (by_row, decode_by_row):
        scales.view(torch.int32)[10] = 0x7F800001  # the first of the NaN
    # What reads the words of an e4m3 element sees every byte of them.
    bytes_ = host.arange(256).to(torch.uint8).view(16, 16).repeat(2, 5)
    bytes_[16:] = bytes_[16:].roll(3, 1) & 0x9F  # blocks of small numbers
    eight = bytes_[:23].view(torch.float8_e4m3fn)
    fast, exact = Recipe(), Recipe("exact")
    recipes = {
        "fast": fast,
        "exact": exact,
        "fast, cute-dsl": Recipe(build="cute-dsl"),
        "exact, cute-dsl": Recipe("exact", build="cute-dsl"),
    }
    for name, recipe in recipes.items():
        layout = SfLayout.layout_8x4
        given = functools.partial(GivenScaleCall, x, recipe, by_row)
        yield f"quantizer, by row, {name}", functools.partial(given, layout)
        decode = functools.partial(GivenScaleCall, x, recipe, decode_by_row, inverse=True)
        yield f"quantizer, decode scales, {name}", decode
        yield f"quantizer, e4m3, {name}", functools.partial(GivenScaleCall, eight, recipe, by_row)
    for name, recipe in recipes.items():
        yield (
            f"quantizer, e4m3, near ties of fp16, {name}",
            functools.partial(_near_ties_of_prescales, recipe),
        )
    one = host.fp32([0.25])
    yield "quantizer, e4m3, one scale", lambda: GivenScaleCall(eight, fast, one)
    # An output scale that is subnormal but for the rounding of a reciprocal to 0, of an infinity.
    infinite = x[:4].clone()
    infinite[:, ::20], infinite[:, 7::20] = -torch.inf, torch.inf
    small = host.fp32([2.0**-118])
    dsl = Recipe(build="cute-dsl")
    yield "quantizer, infinite, cute-dsl", lambda: GivenScaleCall(infinite, dsl, small)
    four_over_six = Recipe("exact", NVFP44Over6Config())
    yield "quantizer, by row, 4over6", lambda: GivenScaleCall(x, four_over_six, by_row)
    for recipe in (fast, exact):
        yield f"quantizer, values, {recipe}", functools.partial(ValuesCall, x, recipe, True)
        yield (
            f"quantizer, values of fp32, {recipe}",
            functools.partial(ValuesCall, x.float() * 1.01, recipe, False),
        )


def _near_ties_of_prescales(recipe: Recipe) -> GivenScaleCall:
    """Scales whose reciprocals, rounded or approximate, become two numbers of fp16.

    So do products with powers of two, which every second element is: some are next to ties of codes.
    """
    prescale = 1 + (2 * host.arange(1 << 10).float() + 1) / (1 << 11)
    scales = torch.cat([6 / prescale, torch.nextafter(6 / prescale, host.zeros(1))])
    exact, fast = (6 * decode for decode in (1 / scales, rcp_approx_ftz(scales)))
    scales = scales[exact.half() != fast.half()]
    x = host.normal(seeded(12), len(scales), 48)
    x[:, ::2] = x[:, ::2].sign() * host.powers(host.integers(seeded(13), -3, 2, (len(scales), 24)))
    return GivenScaleCall(x.to(torch.float8_e4m3fn), recipe, scales)
