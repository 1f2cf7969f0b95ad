"""The dense product's GEMM for sm_90: which calls it serves, its tiles, and what `explain` says."""

# SPDX-License-Identifier: Apache-2.0
import dense_cases
import pretend_gpu
import pytest
import torch

import nvfp4_moe
from nvfp4_moe import explain_mm_fp4
from nvfp4_moe.kernels import decode
from nvfp4_moe.kernels.dense import hopper, launch
from nvfp4_moe.kernels.dense.hopper import CONFIGS, HALVES, refusal, ring_config
from nvfp4_moe.kernels.moe.hopper import config
from nvfp4_moe.kernels.moe.hopper import launch as hopper_launch
from nvfp4_moe.kernels.moe.hopper.config import WIDEST_SHARED

H200 = 132
SERVED = "triton multiplies by its GEMM for sm_90: a row's bits depend on no other row"
NOT_SERVED = "triton multiplies by its GEMM for every GPU, not by that for sm_90: "

serves = pytest.mark.skipif(config.refusal(90) is not None, reason=str(config.refusal(90)))


def test_the_table_has_every_configuration():
    """Each is chosen for some size, and one for few rows holds them in one tile."""
    sizes = [(m, n) for m in (*range(1, 300), 1000, 8192) for n in (64, 4096, 7168, 36864)]
    assert {ring_config(m, n, H200) for m, n in sizes} == {*CONFIGS, *HALVES}
    for m in range(1, 33):
        assert ring_config(m, 4096, H200).bn == next(w for w in (8, 16, 32) if w >= m)


@pytest.mark.parametrize(
    "m,n,tokens",
    [
        (64, 4096, 32),
        (65, 4096, 64),
        (128, 4096, 64),
        (64, 7168, 64),
        (64, 36864, 64),
        (256, 4096, 64),
        (128, 36864, 128),
        (1024, 4096, 256),
        (8192, 4096, 256),
    ],
)
def test_the_tiles_fill_the_gpu(m, n, tokens):
    """The widest tile is the most efficient, and narrower ones keep more multiprocessors at work."""
    assert ring_config(m, n, H200).bn == tokens


@pytest.mark.parametrize(
    "m,n,rows",
    [
        (1, 64, 64),
        (32, 8448, 64),
        (32, 8449, 128),
        (64, 7168, 64),
        (128, 4096, 64),
        (129, 4096, 128),
    ],
)
def test_half_tiles_have_a_multiprocessor_each(m, n, rows):
    """Tiles are whole where half tiles would be more than the multiprocessors."""
    assert ring_config(m, n, H200).rows == rows


@serves
@pytest.mark.parametrize(
    "k,reason", [(64, None), (7168, None), (48, "K is 48"), (1616, "K is 1616")]
)
def test_columns(k, reason):
    text = "; it must be a multiple of 64, as a tile of block scales"
    assert refusal(90, k) == (reason and reason + text)


def notes(k: int, capability=(9, 0)) -> tuple[str, ...]:
    case = dense_cases.coarse(5, 40, k)
    return explain_mm_fp4(**case.arguments, capability=capability).notes


@serves
def test_explained():
    assert notes(128) == (SERVED,)
    (note,) = notes(80)
    assert note.startswith(NOT_SERVED + "K is 80; it must be a multiple of 64")
    assert notes(128, (8, 0)) == notes(128, (10, 0)) == ()


def test_another_triton_is_explained(monkeypatch):
    monkeypatch.setattr(config, "triton_version", lambda: (3, 5))
    (note,) = notes(128)
    assert note.startswith(NOT_SERVED + "Triton is ") and "tested with 3.6, 3.7" in note


@serves
@pytest.mark.parametrize(
    "m,n,k", [(1, 40, 64), (33, 130, 192), (1000, 4096, 128), (7, 64, 80), (3, 36867, 64)]
)
def test_the_launches_of_a_call(monkeypatch, m, n, k):
    """Rows are decoded, then multiplied: by the GEMM for sm_90 where it serves."""
    pretend_gpu.present(monkeypatch)
    made = []
    for module in (decode, launch, hopper_launch):
        monkeypatch.setattr(
            module, "launch", lambda kernel, grid, *args, **options: made.append((grid, options))
        )
    case = dense_cases.coarse(m, n, k)
    assert nvfp4_moe.mm_fp4(**case.arguments, backend="triton").shape == (m, n)
    (_, decoding), *cleared, (grid, options) = made
    assert decoding["FRAGMENTS"] == (hopper.refusal(90, k) is None)
    if hopper.refusal(90, k):
        assert options["STAGES"] and "WIDTHS" not in options
        return
    chosen = ring_config(m, n, H200)
    tiles = -(-n // chosen.rows) * -(-m // chosen.bn)
    assert options["WIDTHS"] == chosen.widths and options["BY_ROW"] == (m > 1)
    assert grid == (min(tiles, H200 * chosen.programs),)
    shared = tiles % grid[0] != 0 and chosen.bn <= WIDEST_SHARED
    assert shared == (n == 36867) and len(cleared) == shared


SIZES = [(133, 132), (145, 132), (263, 132), (288, 264), (5, 3), (1000, 7)]


class Program:
    """One program among some, for functions of a kernel that work on scalars alone."""

    int32, int64, where = torch.int32, torch.int64, torch.where

    def __init__(self, index: int, programs: int) -> None:
        self.program_id = lambda axis: torch.tensor(index)
        self.num_programs = lambda axis: torch.tensor(programs)


@serves
@pytest.mark.parametrize("steps", [1, 2, 9, 56])
@pytest.mark.parametrize("total,programs", SIZES)
def test_programs_share_the_work(monkeypatch, total, programs, steps):
    """Each step of each tile is done once, in order, and who goes on with a tile does so last."""
    from nvfp4_moe.kernels.moe.hopper import dense_gemm

    done: dict[int, int] = {}  # steps of a tile, by the programs so far
    made = []
    for p in range(programs):
        monkeypatch.setattr(dense_gemm, "gl", Program(p, programs))
        share = dense_gemm._share.fn(torch.tensor(total), torch.tensor(steps), True)
        count = int(dense_gemm._pieces.fn(*share, torch.tensor(steps)))
        pieces = [
            tuple(
                map(int, dense_gemm._piece.fn(torch.tensor(j), *share, torch.tensor(steps), True))
            )
            for j in range(count)
        ]
        assert all(begin < end for _, begin, end in pieces)
        assert all(
            end == steps for _, _, end in pieces[1:]
        )  # it begins a tile for another one first
        assert all(begin == 0 for _, begin, _ in pieces[:-1])  # and goes on with one last
        # The program before it, and no other, has begun that tile.
        tile, begin, end = pieces[-1]
        if begin:
            assert made[-1][0] == (tile, 0, begin) and end == steps and count > 1
        for tile, begin, end in reversed(pieces):
            assert done.setdefault(tile, 0) == begin
            done[tile] = end
        made.append(pieces)
    assert done == dict.fromkeys(range(total), steps)
    lengths = [sum(end - begin for _, begin, end in pieces) for pieces in made]
    assert max(lengths) - min(lengths) <= 1


@serves
@pytest.mark.parametrize("total,programs", [(5, 5), (264, 132), (7, 3)])
def test_whole_tiles_in_turn(monkeypatch, total, programs):
    from nvfp4_moe.kernels.moe.hopper import dense_gemm

    steps, found = torch.tensor(4), []
    for p in range(programs):
        monkeypatch.setattr(dense_gemm, "gl", Program(p, programs))
        turns, begin, end = dense_gemm._share.fn(torch.tensor(total), steps, False)
        assert begin == end == 0
        found += [int(dense_gemm._piece.fn(j, turns, 0, 0, steps, False)[0]) for j in range(turns)]
    assert sorted(found) == list(range(total))
