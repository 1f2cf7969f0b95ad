"""TRT-LLM's row orders: hand-written small ones, inverses, and FlashInfer's own functions."""

# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from assertions import assert_bitwise

from nvfp4_moe.reference.layouts import interleave_gated_rows, inverse, shuffle_rows

ROWS = (128, 256, 384)
TILES = (128, 64, 16, 256)


def test_shuffle_of_32_rows():
    """Place 8b + a holds row 4a + b."""
    order = shuffle_rows(64).tolist()
    assert order[:16] == [0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29]
    assert order[16:32] == [2, 6, 10, 14, 18, 22, 26, 30, 3, 7, 11, 15, 19, 23, 27, 31]
    assert order[32:] == [32 + row for row in order[:32]]


def test_shuffle_of_16_rows():
    """Place 8b + a holds row 2a + b, where the epilogue's tile is no multiple of 128."""
    order = shuffle_rows(32, epilogue_tile_m=64).tolist()
    assert order[:16] == [0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15]
    assert order[16:] == [16 + row for row in order[:16]]


def test_interleave_alternates_the_halves():
    assert interleave_gated_rows(8).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert interleave_gated_rows(0).tolist() == []


@pytest.mark.parametrize("rows", ROWS)
def test_inverse_undoes_every_order(rows):
    w = torch.arange(rows * 3).reshape(rows, 3)
    orders = [interleave_gated_rows(rows), *(shuffle_rows(rows, tile) for tile in TILES)]
    orders.append(orders[0][orders[1]])
    for order in orders:
        assert not torch.equal(w[order], w)
        assert_bitwise(w[order][inverse(order)], w, "undone after")
        assert_bitwise(w[inverse(order)][order], w, "undone before")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: shuffle_rows(48), "rows is 48; .* multiple of 32"),
        (lambda: shuffle_rows(40, 64), "rows is 40; .* multiple of 16"),
        (lambda: interleave_gated_rows(7), "rows is 7; .* even"),
    ],
    ids=["shuffle-32", "shuffle-16", "interleave"],
)
def test_refusals_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("rows", ROWS)
def test_shuffle_is_flashinfers(flashinfer, rows, tile):
    from flashinfer.utils import (
        get_shuffle_matrix_a_row_indices,
        get_shuffle_matrix_sf_a_row_indices,
    )

    w = torch.arange(rows * 4).reshape(rows, 4).to(torch.uint8)
    order = shuffle_rows(rows, tile)
    assert_bitwise(order, get_shuffle_matrix_a_row_indices(w, tile), "weights")
    assert_bitwise(order, get_shuffle_matrix_sf_a_row_indices(w, tile), "scales")
    assert_bitwise(w[order], flashinfer.shuffle_matrix_a(w, tile), "shuffled weights")


@pytest.mark.parametrize("rows", ROWS)
def test_interleave_is_flashinfers(flashinfer, rows):
    from flashinfer.fused_moe.core import reorder_rows_for_gated_act_gemm

    w = torch.arange(rows * 4).reshape(rows, 4)
    expected = reorder_rows_for_gated_act_gemm(w)
    assert_bitwise(w[interleave_gated_rows(rows)], expected, "interleaved weights")


@pytest.mark.parametrize("rows", ROWS)
def test_both_together_are_flashinfers_weight_preparation(flashinfer, rows):
    """FC1: the interleave, then the shuffle of what came out; FC2: the shuffle alone."""
    from flashinfer.fused_moe.core import (
        _maybe_get_cached_w3_w1_permute_indices,
        get_w2_permute_indices_with_cache,
    )

    w = torch.zeros(rows, 4, dtype=torch.uint8)
    shuffle = shuffle_rows(rows)
    gated = interleave_gated_rows(rows)[shuffle]
    for per_scale in (None, 16):
        fc1 = _maybe_get_cached_w3_w1_permute_indices({}, w, 128, per_scale)
        assert_bitwise(gated, fc1, "FC1")
        plain = _maybe_get_cached_w3_w1_permute_indices({}, w, 128, per_scale, False)
        assert_bitwise(shuffle, plain, "FC1 without a gate")
        assert_bitwise(shuffle, get_w2_permute_indices_with_cache({}, w, 128, per_scale), "FC2")
