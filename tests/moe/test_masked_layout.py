"""The masked layout, rows by expert: rows beyond `masked_m` are as if they were not there."""

# SPDX-License-Identifier: Apache-2.0
import moe_cases
import pytest
import torch
from assertions import assert_bitwise
from moe_cases import Shape

from nvfp4_moe.reference.moe import layer as moe
from nvfp4_moe.reference.moe.activations import Activations
from nvfp4_moe.reference.moe.masked_layout import fused_moe_grouped, quantize_grouped
from nvfp4_moe.reference.quantize import quantize_per_token
from nvfp4_moe.reference.recipe import NVFP44Over6Config, Recipe

MASKED = torch.tensor([3, 0, 5, 1])
MOST = 5
HIDDEN = 128


def masked_states(stale: float = float("nan")) -> torch.Tensor:
    x = torch.randn(4, MOST, HIDDEN, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[torch.arange(MOST) >= MASKED[:, None]] = stale
    return x


@pytest.mark.parametrize(
    "recipe", [Recipe(), Recipe("exact", NVFP44Over6Config(256, "MSE"))], ids=str
)
def test_quantization(recipe):
    x = masked_states()
    got = quantize_grouped(x, MASKED, recipe)
    for e, rows in enumerate(MASKED.tolist()):
        want = quantize_per_token(x[e, :rows], recipe.base_scale_inv, recipe)
        assert_bitwise(got.hidden_states[e, :rows], want.codes, f"codes of {e}")
        assert_bitwise(got.block_scales[e, :rows], want.block_scales, f"block scales of {e}")
        assert_bitwise(got.per_token_scale[e, :rows], want.per_token_scale, f"token scales of {e}")
        for tensor in (got.hidden_states, got.block_scales, got.per_token_scale):
            assert not tensor[e, rows:].any()


@pytest.mark.parametrize("mode", ["per-token", "static", "bf16"])
def test_the_layer_is_that_of_the_rows_one_by_one(mode):
    case = moe_cases.make(Shape(int(MASKED.sum()), HIDDEN, 64, 4, 1), mode=mode)
    expert = torch.repeat_interleave(torch.arange(4), MASKED)
    place = torch.cat([torch.arange(n) for n in MASKED.tolist()])

    def in_layout(rows, stale):
        if rows is None:
            return None
        bits = rows.view(torch.uint8) if rows.element_size() == 1 else rows
        out = bits.new_full((4, MOST, *rows.shape[1:]), stale)
        out[expert, place] = bits
        return out

    a = case.activations
    stale = torch.nan if mode == "bf16" else 0xFF
    given = Activations(
        in_layout(a.hidden_states, stale),
        None if a.block_scales is None else in_layout(a.block_scales, 0x7F),
        in_layout(a.per_token_scale, torch.nan),
    )
    got = fused_moe_grouped(given, MASKED.int(), case.experts)
    ids = expert[:, None].int()
    want = moe.fused_moe(a, case.experts, ids, torch.ones_like(ids).bfloat16()).rows[:, 0]
    assert want.any()
    assert_bitwise(got[expert, place], want, mode)
    got[expert, place] = 0
    assert not got.any()


def test_no_rows_at_all():
    case = moe_cases.make(Shape(2, HIDDEN, 64, 4, 1))
    given = quantize_grouped(masked_states(), torch.zeros(4, dtype=torch.int32))
    got = fused_moe_grouped(given, torch.zeros(4, dtype=torch.int32), case.experts)
    assert got.shape == (4, MOST, HIDDEN) and not got.any()


@pytest.mark.parametrize(
    "masked,message",
    [
        (torch.tensor([1, 2, 3]), r"int64 of shape \(3,\); it must be int32 or int64 \(4,\)"),
        (torch.tensor([1.0, 2, 3, 4]), "float32"),
        (torch.tensor([1, 2, 3, 6]), "each must be 0 to 5"),
        (torch.tensor([-1, 2, 3, 4]), "each must be 0 to 5"),
    ],
    ids=["shape", "dtype", "too many", "negative"],
)
def test_errors(masked, message):
    with pytest.raises(ValueError, match=message):
        quantize_grouped(masked_states(), masked)


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match="max_m, columns"):
        quantize_grouped(masked_states()[0], MASKED)
    case = moe_cases.make(Shape(2, HIDDEN, 64, 3, 1))
    given = quantize_grouped(masked_states(), MASKED)
    with pytest.raises(ValueError, match="of 4 experts; 3 are local"):
        fused_moe_grouped(given, MASKED, case.experts)
