"""Probes of the quantizer's kernel: every recipe and mode on numbers at the edges of both."""

# SPDX-License-Identifier: Apache-2.0
import functools
from collections.abc import Callable, Iterator

import torch

from nvfp4_moe import host
from nvfp4_moe.cases import inputs, moe_edges
from nvfp4_moe.cases import quantize as quantize_cases
from nvfp4_moe.kernels.quantize.launch import LaunchConfig
from nvfp4_moe.reference.numerics.fp32 import rcp_approx_ftz
from nvfp4_moe.reference.recipe import NVFP44Over6Config, Recipe, SfLayout

from ..calls import Call, QuantizerCall
from ..kernel_calls import rows_at_edges
from .quantizer_calls import ChosenCall, CutCall, GivenScaleCall, ValuesCall

Named = Iterator[tuple[str, Callable[[], Call]]]


def named() -> Named:
    yield from _every_recipe()
    yield from _cuts()
    yield from _given_scales()


def _every_recipe() -> Named:
    far = rows_at_edges().float()
    far[:, 16:] *= 2.0 ** -(host.arange(64).float() / 3)
    near = rows_at_edges().float() * 2.0**-118
    edge = inputs.synthetic("edge", 40, 80)
    edge[20], edge[21] = edge[20] / edge[20].abs().max(), edge[21] / edge[21].abs().max() * 2688
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

    case = quantize_cases.Case("fp32 per-token", Recipe(), SfLayout.layout_linear)
    for kind in ("edge", "sparse"):
        x = inputs.synthetic(kind, 40, 80, torch.float32)
        yield f"quantizer, fp32, {kind}", functools.partial(QuantizerCall, x, case)


def _cuts() -> Named:
    """Every way in which a launch cuts a matrix: rows of 5 blocks, of which a program has 4."""
    x = rows_at_edges()[::13]
    x[:3, -1] = 2 * x[:3].abs().amax(1)  # the maximum is in what is read last
    for name, config in {
        "parts": LaunchConfig(1, 4, 0, 1, 1, 2),
        "programs a row": LaunchConfig(1, 4, 8, 2, 1),
        "a second read": LaunchConfig(2, 4, 4, 1, 1),
    }.items():
        for recipe in (Recipe(), Recipe("exact", NVFP44Over6Config())):
            case = quantize_cases.Case("per-token", recipe, SfLayout.layout_8x4)
            yield (
                f"quantizer, {name}, {recipe}",
                functools.partial(CutCall, x, case, config),
            )
    case = quantize_cases.Case(
        "global-scale", Recipe(), SfLayout.layout_128x4, quantize_cases.global_scale(x, Recipe())
    )
    split = LaunchConfig(4, 4, 0, 2, 1)
    yield "quantizer, programs a row, global scale", lambda: CutCall(x, case, split)

    rows = rows_at_edges()[:8] * host.powers(host.fp32([0, -99, 60, 0, -99, 0, 0, 99]))[:, None]
    for recipe in (Recipe("fast", NVFP44Over6Config()), Recipe("exact", NVFP44Over6Config())):
        case = quantize_cases.Case("per-token", recipe, SfLayout.layout_linear)
        yield (
            f"quantizer, rows of any size at a time, {recipe}",
            functools.partial(CutCall, rows.bfloat16(), case, LaunchConfig(4, 8, 0, 1, 1)),
        )

    for recipe in (Recipe(), Recipe("exact")):
        yield (
            f"quantizer, chosen rows, {recipe}",
            functools.partial(ChosenCall, x, recipe, SfLayout.layout_128x4),
        )


def _given_scales() -> Named:
    """A scale for each row, decode scales, e4m3 elements; values in place of codes."""
    x = rows_at_edges()[20:43]
    rows = (host.arange(len(x)) % 11 - 4).float()
    by_row = host.powers(2 * rows) * (448 * 6 / 3 + rows)
    by_row[5:9] = host.fp32([0.0, 2.0**-127, 2.0**126, torch.inf])
    # What reads the words of an e4m3 element sees every byte of them.
    bytes_ = host.arange(256).to(torch.uint8).view(16, 16).repeat(2, 5)
    bytes_[16:] = bytes_[16:].roll(3, 1) & 0x9F  # blocks of small numbers
    eight = bytes_[:23].view(torch.float8_e4m3fn)
    fast, exact = Recipe(), Recipe("exact")
    for name, recipe in {
        "fast": fast,
        "exact": exact,
        "fast, cute-dsl": Recipe(build="cute-dsl"),
        "exact, cute-dsl": Recipe("exact", build="cute-dsl"),
    }.items():
        layout = SfLayout.layout_8x4
        given = functools.partial(GivenScaleCall, x, recipe, by_row)
        yield f"quantizer, by row, {name}", functools.partial(given, layout)
        decode = functools.partial(GivenScaleCall, x, recipe, 1 / by_row, inverse=True)
        yield f"quantizer, decode scales, {name}", decode
        yield f"quantizer, e4m3, {name}", functools.partial(GivenScaleCall, eight, recipe, by_row)
    yield "quantizer, e4m3, near ties of fp16", lambda: GivenScaleCall(*_ties_of_prescales())
    one = host.fp32([0.25])
    yield "quantizer, e4m3, one scale", lambda: GivenScaleCall(eight, fast, one)
    four_over_six = Recipe("exact", NVFP44Over6Config())
    yield "quantizer, by row, 4over6", lambda: GivenScaleCall(x, four_over_six, by_row)
    for recipe in (fast, exact):
        yield f"quantizer, values, {recipe}", functools.partial(ValuesCall, x, recipe, True)
        yield (
            f"quantizer, values of fp32, {recipe}",
            functools.partial(ValuesCall, x.float() * 1.01, recipe, False),
        )


def _ties_of_prescales() -> tuple[torch.Tensor, Recipe, torch.Tensor]:
    """Ones of e4m3; scales whose reciprocals, rounded or approximate, become two numbers of fp16."""
    prescale = 1 + (2 * host.arange(1 << 10).float() + 1) / (1 << 11)
    scales = torch.cat([6 / prescale, torch.nextafter(6 / prescale, host.zeros(1))])
    exact, fast = (6 * decode for decode in (1 / scales, rcp_approx_ftz(scales)))
    scales = scales[exact.half() != fast.half()]
    assert len(scales) > 8
    x = host.ones(len(scales), 16).to(torch.float8_e4m3fn)
    return x, Recipe("exact", build="cute-dsl"), scales
