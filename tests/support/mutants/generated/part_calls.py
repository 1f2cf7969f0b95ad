"""Calls of one kernel, or of the few of a permutation, on sizes that layers of a few rows never have."""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from nvfp4_moe import host
from nvfp4_moe.differential.verdict import unequal
from nvfp4_moe.kernels.decode import decode, decode_to_fragments
from nvfp4_moe.kernels.moe import permute
from nvfp4_moe.kernels.moe.finalize import finalize as triton_finalize
from nvfp4_moe.kernels.moe.hopper.rows import in_fragments
from nvfp4_moe.kernels.moe.masked.rows import copy_rows, masked_rows
from nvfp4_moe.kernels.quantize.launch import quantize_to_fragments
from nvfp4_moe.reference.layouts import from_linear
from nvfp4_moe.reference.moe.finalize import FinalizeOrder, finalize
from nvfp4_moe.reference.quantize import dequantize, quantize_per_token
from nvfp4_moe.reference.recipe import BLOCK_SIZE, Recipe, SfLayout

from ..calls import Answered
from .answers import digest

Tensor = torch.Tensor


def exactly(want: Any) -> Answered:
    """An answer has these bits, and the bits of a NaN are any NaN's."""
    right, nothing = digest(want), host.zeros(1).double()
    return Answered(lambda got: digest(got) == right, lambda got: nothing, nothing)


@dataclass(frozen=True)
class PermuteCall:
    """Slots of local experts, of experts next to them on both sides, of far ones, and of none."""

    slots: int
    local: int
    offset: int = 2
    tile: int = 16
    one_launch: bool = True
    elsewhere: bool = False  # all slots: no tile is used

    def _ids(self) -> Tensor:
        g = torch.Generator().manual_seed(self.slots)
        ids = host.integers(g, self.offset - 2, self.offset + self.local + 2, (self.slots, 1))
        ids[ids == self.offset + 1] = self.offset + 2  # an expert of no slot
        ids[-1], ids[-2] = self.offset + self.local, self.offset - 1
        return host.full(ids.shape, 1.0).int() if self.elsewhere else ids.int()

    def answer(self, device: str = "cpu") -> Any:
        limit = self.slots if self.one_launch else 0
        with mock.patch.object(permute, "_ONE_LAUNCH_SLOTS", limit):
            p = permute.permute(self._ids().to(device), self.local, self.offset, self.tile)
        return tensors_of(p)

    def judge(self) -> Answered:
        ids = self._ids().flatten().tolist()
        return exactly(permutation_of(ids, self.local, self.offset, self.tile))


def tensors_of(p: permute.Permutation) -> list[Tensor]:
    """Return what of a permutation is read, on the CPU."""
    return [t.cpu() for t in (p.expanded[: int(p.end[-1])], p.permuted, p.tiles, p.end)]


def permutation_of(ids: list[int], num_local: int, offset: int, tile: int) -> list[Tensor]:
    """Return `tensors_of` the right permutation of the slots' experts."""
    local = [expert - offset for expert in ids]
    of = [[i for i, e in enumerate(local) if e == expert] for expert in range(num_local)]
    expanded = [i for some in of for i in some]
    row = {i: n for n, i in enumerate(expanded)}
    end = [0]
    for some in of:
        end.append(end[-1] + len(some))
    tiles = min(len(ids), num_local) + len(ids) // tile
    records = records_of(end[:-1], [len(some) for some in of], tile, tiles)
    permuted = [row.get(i, -1) for i in range(len(ids))]
    want = expanded, permuted, records, end[1:]
    return [torch.tensor(t, dtype=torch.int32, device="cpu") for t in want]


def records_of(first: list[int], counts: list[int], tile: int, tiles: int) -> list[list[int]]:
    """Return every tile's (expert, first row, rows, tiles in use).

    Whole tiles come first, then each expert's last one, the fullest first, then those that nobody uses.
    """
    whole, last = [], []
    for expert, (row, count) in enumerate(zip(first, counts, strict=True)):
        whole += [(expert, row + i * tile, tile) for i in range(count // tile)]
        last += [(expert, row + count // tile * tile, count % tile)] if count % tile else []
    used = whole + sorted(last, key=lambda found: -found[2])
    return [[*found, len(used)] for found in used + [(-1, 0, 0)] * (tiles - len(used))]


@dataclass(frozen=True)
class MaskedRowsCall:
    """Counts of no rows, of some, of all, and outside; more rows than a program writes at a time."""

    max_m: int = 1030
    tile: int = 64
    masked: tuple[int, ...] = (3, 0, 1030, 64, 65, -2, 2000, 0)
    dtype: torch.dtype = torch.int32

    def answer(self, device: str = "cpu") -> Any:
        masked = torch.tensor(self.masked, dtype=self.dtype, device=device)
        p = masked_rows(masked, self.max_m, self.tile)
        return [t.cpu() for t in (p.permuted, p.tiles, p.end)]

    def judge(self) -> Answered:
        counts = [min(max(m, 0), self.max_m) for m in self.masked]
        first = [e * self.max_m for e in range(len(counts))]
        rows = [
            f + i if i < c else -1
            for f, c in zip(first, counts, strict=True)
            for i in range(self.max_m)
        ]
        tiles = len(counts) * -(-self.max_m // self.tile)
        end = [f + c for f, c in zip(first, counts, strict=True)]
        want = rows, records_of(first, counts, self.tile, tiles), end
        return exactly([torch.tensor(t, dtype=torch.int32, device="cpu") for t in want])


@dataclass(frozen=True)
class CopyRowsCall:
    """Rows of more fourths than a program has, padded, every second one of them there."""

    fourths: bool
    rows: int = 5
    given: int = 4112
    columns: int = 4224

    def _x(self) -> Tensor:
        return host.normal(torch.Generator().manual_seed(3), self.rows, self.given).bfloat16()

    def answer(self, device: str = "cpu") -> Tensor:
        index = torch.arange(self.rows, dtype=torch.int32, device=device)
        index[1::2] = -1
        out = copy_rows(self._x().to(device), index, columns=self.columns, fourths=self.fourths)
        return out[::2].cpu()

    def judge(self) -> Answered:
        x = torch.nn.functional.pad(self._x(), (0, self.columns - self.given))[::2]
        return exactly(fours(x) if self.fourths else x)


def _codes(seed: int, *size: int) -> tuple[Tensor, Tensor]:
    """Codes [..., K/2] and block scales [..., K/16], any byte but scales below zero."""
    g = torch.Generator().manual_seed(seed)
    *rows, k = size
    codes = host.integers(g, 0, 256, (*rows, k // 2)).to(torch.uint8)
    return codes, host.integers(g, 0, 128, (*rows, k // BLOCK_SIZE)).to(torch.uint8)


def fours(values: Tensor) -> Tensor:
    """[R, K] as bf16 [R, 4, K/4], each fourth column together."""
    return values.unflatten(1, (-1, 4)).transpose(1, 2).contiguous().bfloat16()


@dataclass(frozen=True)
class DecodeCall:
    """Rows of more words than a program has."""

    rows: int = 3
    columns: int = 4160
    indexed: bool = False  # by a row index that names every row

    def answer(self, device: str = "cpu") -> Tensor:
        codes, scales = _codes(1, self.rows, self.columns)
        index = torch.arange(self.rows, dtype=torch.int32, device=device) if self.indexed else None
        layout = SfLayout.layout_linear
        return decode(codes.to(device), scales.to(device), layout, row_index=index).cpu()

    def judge(self) -> Answered:
        return exactly(fours(dequantize(*_codes(1, self.rows, self.columns), 1.0)))


def in_places(values: Tensor) -> Tensor:
    """Put each 128 columns into the order of `jit/fragments.py`: [R, K rounded up to 128]."""
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % 128))
    bits = padded.unflatten(1, (-1, 2, 2, 2, 2, 2, 2, 2))  # c1 c0 j1 j0 b i1 i0
    return bits.permute(0, 1, 4, 5, 7, 8, 2, 3, 6).flatten(1).bfloat16()


@dataclass(frozen=True)
class FragmentsCall:
    """Rows for the GEMM of sm_90, each at two places, some at none; as codes, as they are, quantized."""

    kind: str
    columns: int = 1216
    indexed: bool = False  # by a row index that leaves out the last row
    recipe: Recipe = Recipe("exact")  # noqa: RUF009 (frozen)
    tiny: bool = False  # a row whose scale is subnormal

    def _states(self) -> Tensor:
        x = host.normal(torch.Generator().manual_seed(3), 3, self.columns)
        if self.tiny:
            x[2] *= 2.0**-120
        return x.bfloat16()

    def answer(self, device: str = "cpu") -> list[Tensor]:
        given = {"row_index": _INDEX} if self.indexed else {"place": _PLACES}
        where, token = {name: t.to(device) for name, t in given.items()}, None
        if self.kind == "codes":
            codes, scales = (t.to(device) for t in _codes(1, 3, self.columns))
            rows, token = decode_to_fragments(codes, scales, _TOKEN.to(device), **where)
        elif self.kind == "bf16":
            rows = in_fragments(self._states().to(device), **where)
        else:
            x = self._states().to(device)
            rows, token = quantize_to_fragments(x, self.recipe, per_token=True, **where)
        found = [rows] if token is None else [rows, token]
        (places,) = given.values()
        of_rows = [t.cpu()[places[places >= 0].long()] for t in found]
        return of_rows + ([rows[2:].cpu()] if self.indexed else [])

    def judge(self) -> Answered:
        if self.kind == "codes":
            values, token = dequantize(*_codes(1, 3, self.columns), 1.0), _TOKEN
        elif self.kind == "bf16":
            values, token = self._states(), None
        else:
            q = quantize_per_token(self._states(), self.recipe.base_scale_inv, self.recipe)
            values, token = dequantize(q.codes, q.block_scales, 1.0), q.per_token_scale
        source = torch.arange(3, dtype=torch.int64, device="cpu")[:, None].expand(-1, 2)
        source = _INDEX[_INDEX >= 0].long() if self.indexed else source[_PLACES >= 0]
        want = [in_places(values)] if token is None else [in_places(values), token]
        found = [t[source] for t in want]
        if self.indexed:  # what memory has held before
            found.append(torch.full_like(found[0][:1], torch.nan))
        return exactly(found)


_PLACES = torch.tensor([[2, 5], [-1, 1], [3, -1]], dtype=torch.int32, device="cpu")
_INDEX = torch.tensor([0, 1, -1], dtype=torch.int32, device="cpu")
_TOKEN = torch.tensor([0.5, 3.0, 0.125], dtype=torch.float32, device="cpu")


@dataclass(frozen=True)
class DecodeWeightsCall:
    """Two experts of more rows than a tile of scales and more blocks than a program has."""

    rows: int = 256
    columns: int = 1088

    def answer(self, device: str = "cpu") -> Tensor:
        codes, scales = _codes(2, 2, self.rows, self.columns)
        tiles = torch.stack([from_linear(one, SfLayout.layout_128x4) for one in scales])
        shape = (2 * self.rows, 4, self.columns // 4)
        out = torch.empty(shape, dtype=torch.bfloat16, device=device)
        codes, given = codes.flatten(0, 1), tiles.view(2, self.rows, -1)
        layout = SfLayout.layout_128x4
        out = decode(codes.to(device), given.to(device), layout, operand=True, out=out)
        return out.cpu()

    def judge(self) -> Answered:
        codes, scales = (t.flatten(0, 1) for t in _codes(2, 2, self.rows, self.columns))
        return exactly(fours(dequantize(codes, scales, 2.0**-8)))


@dataclass(frozen=True)
class FinalizeCall:
    """Rows wider than a program, among them some that nobody asks for; slots without a row."""

    dtype: torch.dtype
    order: FinalizeOrder = "slot"
    weights: torch.dtype = torch.bfloat16
    top_k: int = 6
    width: int = 1040
    padded: int = 1088
    tokens: int = 5
    tiny: bool = False  # subnormal rows, weights and sums; sums of -0
    apart: bool = False  # rows beside which others are less than fp64's last bit

    def _given(self) -> tuple[Tensor, Tensor, Tensor]:
        g = torch.Generator().manual_seed(self.top_k)
        slots = self.tokens * self.top_k
        rows = host.normal(g, slots, self.padded) * host.powers(host.arange(slots) % 9)[:, None]
        permuted = torch.randperm(slots, generator=g, dtype=torch.int64, device="cpu")
        weights = host.normal(g, self.tokens, self.top_k)
        if self.apart:
            rows *= host.powers(host.integers(g, -2, 1, (slots, 1)) * 60)
        if self.tiny:
            first, second, third, fourth, _ = permuted.view(self.tokens, self.top_k)
            rows[first] *= 2.0**-126
            rows[second], weights[1] = rows[second] * 2.0**-130, weights[1] * 16
            rows[third], weights[2] = rows[third] * 2.0**60, weights[2] * 2.0**-127
            rows[fourth], weights[3] = -0.0, weights[3].abs()
        nowhere = host.uniform(g, slots) < 0.3
        weights[nowhere.view_as(weights)] = torch.nan
        permuted[nowhere] = -1
        return rows.bfloat16(), permuted.int(), weights.to(self.weights)

    def answer(self, device: str = "cpu") -> Tensor:
        rows, permuted, weights = (t.to(device) for t in self._given())
        out = torch.empty(self.tokens, self.width, dtype=self.dtype, device=device)
        triton_finalize(rows, permuted, weights, out, self.order)
        return out.cpu()

    def judge(self) -> Answered:
        rows, permuted, weights = self._given()
        is_local = (permuted >= 0).view_as(weights)
        of_slot = rows[permuted.long().clamp_min(0), : self.width].float()
        total = finalize(of_slot.view(self.tokens, self.top_k, -1), weights, self.order, is_local)
        want = total.to(self.dtype)
        return Answered(
            lambda got: not unequal(got, want).any(), torch.Tensor.double, want.double()
        )


@dataclass(frozen=True)
class SumsNearTiesCall:
    """Products of 25 bits, which are ties of fp32, after slots that move a sum to next to one."""

    def _given(self) -> tuple[Tensor, Tensor]:
        odd = host.arange(3, 255, 16).float()
        tie = ((2.0**24 / odd).ceil().long() // 2 * 2 + 1).float()
        ulp = 2.0**-28 * (1 - 2.0**-23)  # nearly one of fp64 there
        before = host.fp32([-2 * ulp, -ulp, ulp, 2 * ulp]).repeat_interleave(2 * len(odd))
        rows = torch.stack([torch.ones_like(before), torch.cat([odd, -odd]).repeat(4)], 1)
        return rows, torch.stack([before, tie.repeat(8)], 1)

    def answer(self, device: str = "cpu") -> Tensor:
        rows, weights = (t.to(device) for t in self._given())
        permuted = torch.arange(rows.numel(), dtype=torch.int32, device=device)
        out = torch.empty(len(rows), 1, dtype=torch.float32, device=device)
        triton_finalize(rows.view(-1, 1).bfloat16(), permuted, weights, out, "slot")
        return out.cpu()

    def judge(self) -> Answered:
        rows, weights = self._given()
        return exactly(finalize(rows[:, :, None], weights, "slot"))
