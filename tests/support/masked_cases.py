"""Cases of the Triton kernels on masked input, for the interpreter and for a GPU."""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import moe_cases
import torch
from assertions import assert_bitwise
from moe_cases import Case, Shape
from moe_triton_cases import SMALL, assert_second_sums_are_exact, coarse, to

from nvfp4_moe import ActivationType, nvfp4_quantize_masked
from nvfp4_moe.cases import inputs
from nvfp4_moe.kernels.moe import launch as plain
from nvfp4_moe.kernels.moe.call import KernelCall
from nvfp4_moe.kernels.moe.masked import launch
from nvfp4_moe.kernels.moe.masked.call import MaskedKernelCall
from nvfp4_moe.kernels.moe.masked.rows import masked_rows
from nvfp4_moe.reference.layouts import from_linear
from nvfp4_moe.reference.moe.hidden_states import Activations
from nvfp4_moe.reference.moe.masked import fused_moe_masked, quantize_masked
from nvfp4_moe.reference.recipe import NVFP44Over6Config, Recipe, SfLayout

MASKED = ((3, 0, 5, 1), (0, 0, 0, 0), (5, 5, 5, 5), (0, 2, 0, 0))
MOST = 5
STALE = {torch.uint8: 0x7F, torch.float8_e4m3fn: torch.nan}  # NaN as a block scale; else NaN
_LINEAR = SfLayout.layout_linear


def spread(rows: torch.Tensor | None, masked: torch.Tensor, most: int) -> torch.Tensor | None:
    """[E, max_m, ...] of [rows, ...]: in place what `masked` counts, NaN or all ones beyond."""
    if rows is None:
        return None
    place = torch.arange(most) < masked[:, None]
    out = rows.new_full((*place.shape, *rows.shape[1:]), STALE.get(rows.dtype, torch.nan))
    out[place] = rows
    return out


def quantizer(device, config=None):
    """Per token, and with a global scale: a number, one element, one of each expert."""
    masked = torch.tensor(MASKED[0])
    by_expert = torch.tensor([9.0, 3.0, 2688.0, 0.5])
    for layout, most in ((_LINEAR, MOST), (SfLayout.layout_8x4, 8), (SfLayout.layout_128x4, 128)):
        x = spread(inputs.synthetic("heavy", 9, 80), masked, most)
        for recipe in (Recipe(), Recipe("exact", NVFP44Over6Config(256, "MSE"))):
            for scale in (None, 7.0, torch.full((1,), 7.0), by_expert):
                want = quantize_masked(x, masked, recipe, global_scale=scale)
                got = nvfp4_quantize_masked(
                    x.to(device), masked.to(device),
                    recipe.base_scale_inv if scale is None else to(device, scale), layout,
                    per_token_activation=scale is None, nvfp4_4over6=recipe.four_over_six,
                    fast_math=recipe.math == "fast", backend="triton",
                )  # fmt: skip
                what = f"{layout.name} {recipe} {scale}"
                assert_bitwise(got[0], want.hidden_states, f"codes, {what}")
                scales = torch.stack([from_linear(s, layout) for s in want.block_scales])
                assert_bitwise(got[1], scales, f"block scales, {what}")
                if scale is None:
                    assert_bitwise(got[2], want.per_token_scale, f"token scales, {what}")
                else:
                    assert len(got) == 2


def exact(masked: torch.Tensor, kind: ActivationType, *, static: bool = False) -> Case:
    """A case whose sums are exact, one slot a row, by expert."""
    shape = Shape(int(masked.sum()), 128, 128, len(masked), 1)
    case = coarse(shape, kind, static=static)
    case = replace(
        case, ids=torch.repeat_interleave(torch.arange(len(masked)), masked)[:, None].int()
    )
    assert_second_sums_are_exact(case, shape)
    return case


def call_of(case: Case, masked: torch.Tensor, most: int, **options) -> MaskedKernelCall:
    """The call of a case whose rows stand by expert; `quantize` makes it one of bf16 rows."""
    a = Activations(case.x) if options.get("quantize") else case.activations
    parts = (spread(t, masked, most) for t in (a.hidden_states, a.block_scales, a.per_token_scale))
    given = Activations(*(None if t is None else t.flatten(0, 1) for t in parts))
    return MaskedKernelCall(given, masked, case.experts, most, **options)


def exact_sums(device, config=SMALL):
    """Bitwise the reference, whatever stands beyond the rows."""
    for rows in MASKED:
        masked = torch.tensor(rows)
        for kind in (ActivationType.Relu2, ActivationType.Identity):
            for static in (False, True):
                case = exact(masked, kind, static=static)
                call = call_of(case, masked, MOST)
                got = launch.fused_moe_masked(to(device, call), config=config)
                want = fused_moe_masked(_by_expert(call), masked, case.experts)
                assert_bitwise(got, want, f"{rows} {kind.name} static {static}")
                assert not masked.any() or want.any()


def _by_expert(call: MaskedKernelCall) -> Activations:
    a, shape = call.activations, call.output_shape[:2]
    parts = (a.hidden_states, a.block_scales, a.per_token_scale)
    return Activations(*(None if t is None else t.unflatten(0, shape) for t in parts))


def the_rows_of_the_layer(device, config=SMALL):
    """Each mode, gated and not, padded sizes too: the rows of the layer on the same tokens, bitwise."""
    masked = torch.tensor(MASKED[0])
    expert = torch.repeat_interleave(torch.arange(4), masked)
    for h, i, mode, kind in (
        (128, 128, "per-token", ActivationType.Swiglu),
        (272, 48, "per-token", ActivationType.Relu2),
        (128, 128, "static", ActivationType.Swiglu),
        (128, 64, "bf16", ActivationType.Swiglu),
    ):
        case = moe_cases.make(Shape(9, h, i, 4, 1), kind, mode)
        case = replace(case, ids=expert[:, None].int())
        call = KernelCall(case.activations, case.experts, 4, do_finalize=False)
        arguments = (to(device, t) for t in (call, case.ids, case.weights))
        _, rows, permuted = plain.fused_moe(*arguments, config=config)
        want = spread(rows[permuted.long()][:, :h].cpu(), masked, MOST).nan_to_num(nan=0.0)
        ways = [{}]
        if mode == "per-token":
            ways += [{"quantize": "per-token"}]
        for options in ways:
            given = to(device, call_of(case, masked, MOST, **options))
            got = launch.fused_moe_masked(given, config=config)
            assert_bitwise(got, want, f"{h} {i} {mode} {kind.name} {options}")


def counts_outside(device, config=SMALL):
    """A count that no caller means stays inside the memory of its own expert."""
    rows = masked_rows(torch.tensor([-3, 9, 2], device=device), 5, 4)
    assert rows.permuted.cpu().tolist() == [*[-1] * 5, 5, 6, 7, 8, 9, 10, 11, -1, -1, -1]
    assert rows.end.cpu().tolist() == [0, 10, 12]
    # Whole tiles, then the last ones, the fullest first.
    tiles = [[1, 5, 4], [2, 10, 2], [1, 9, 1], *[[-1, 0, 0]] * 3]
    assert rows.tiles.cpu().tolist() == [[*tile, 3] for tile in tiles]


CASES = [quantizer, exact_sums, the_rows_of_the_layer, counts_outside]
