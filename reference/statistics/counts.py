"""What quantization does to rows of numbers, counted by expert, as sums that can be added up.

A row is counted for every expert it is given to. Everything is a tensor on the rows' device and nothing
waits for it, so that statistics can be taken while serving, or in a CUDA graph. Of two sets of rows, the
sums of both together are those of each added (`extremes`: the larger), so that calls, layers and
ranks add up; every share, median and ratio is derived from the sums at the end. Counts and extremes
add up exactly; energies are sums in fp64, whose last bits depend on the order.
"""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass

import torch

from .. import checks
from ..moe.layer import Activations, hidden_values
from ..numerics import e4m3
from ..numerics.subnormals import kept
from ..quantize import Quantized, quantize_block_scales, quantize_global_scale, quantize_per_token
from ..recipe import BLOCK_SIZE, Recipe, check_recipe
from ..weights.scalars import weight_encode_scale

COUNTS = (
    "rows",
    "blocks",
    "zero blocks",  # of nothing but zeros
    "underflowed",  # not zero, but block scale or row scale is: all of it decodes to 0
    "saturated",  # the scale is larger than any that rounds to 448
    "fours",  # 4over6 kept the candidate of 4
    "nan scales",  # scale byte 0x7f, which reaches every output of the row
    "nans",  # elements
    "infinities",  # elements
    "unmeasured rows",  # not finite, before or after: left out of the energies
)
"""Columns of `QuantizationStatistics.counts`."""
BINS = 128
"""Of the row maxima: four an octave, from 2^-16 up to 2^16; those beyond are in the outermost."""

_FIRST_BIN = (127 - 16) << 2  # a bin is an fp32's exponent and first two bits of significand
_LARGEST_THAT_FITS = 464.0  # rounds to 448; the tie with 480, which e4m3 has not
_INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)
_ELEMENTS = 1 << 22  # measured at a time


@dataclass(frozen=True)
class QuantizationStatistics:
    """Sums over the rows of each of E experts. Figures are [E], on the device; none waits for it."""

    counts: torch.Tensor  # [E, 10] int64, columns `COUNTS`
    histogram: torch.Tensor  # [E, 128] int64: row maxima (`BINS`) that are finite and not 0
    energies: torch.Tensor  # [E, 2] fp64: sums of x^2, and of (x - decoded)^2
    extremes: torch.Tensor  # [E, 3] fp64: largest row maximum, - the least, a row's noise / signal

    @classmethod
    def empty(
        cls, num_experts: int, device: torch.device | str | None = None
    ) -> "QuantizationStatistics":
        """Of no rows."""

        def zeros(columns: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(num_experts, columns, dtype=dtype, device=device)

        return cls(
            zeros(len(COUNTS), torch.int64),
            zeros(BINS, torch.int64),
            zeros(2, torch.float64),
            zeros(3, torch.float64).fill_(-torch.inf),
        )

    def __add__(self, other: "QuantizationStatistics") -> "QuantizationStatistics":
        """Of the rows of both.

        Raises:
            ValueError: the other has another number of experts.
        """
        return self.clone().add_(other)

    def add_(self, other: "QuantizationStatistics") -> "QuantizationStatistics":
        """`+`, into these tensors: a captured CUDA graph adds to them at every replay."""
        if not isinstance(other, QuantizationStatistics):
            raise TypeError(f"other is {type(other).__name__}; it must be QuantizationStatistics")
        if other.counts.shape != self.counts.shape:
            raise ValueError(
                f"other has {other.counts.shape[0]} experts; it must have {self.counts.shape[0]}"
            )
        self.counts.add_(other.counts)
        self.histogram.add_(other.histogram)
        self.energies.add_(other.energies)
        torch.maximum(self.extremes, other.extremes, out=self.extremes)
        return self

    def clone(self) -> "QuantizationStatistics":
        return QuantizationStatistics(
            self.counts.clone(),
            self.histogram.clone(),
            self.energies.clone(),
            self.extremes.clone(),
        )

    def total(self) -> "QuantizationStatistics":
        """Over the experts: E is 1. A row counts as often as it has experts."""
        if not self.counts.shape[0]:
            return QuantizationStatistics.empty(1, self.counts.device)
        return QuantizationStatistics(
            self.counts.sum(0, keepdim=True),
            self.histogram.sum(0, keepdim=True),
            self.energies.sum(0, keepdim=True),
            self.extremes.amax(0, keepdim=True),
        )

    def count(self, name: str) -> torch.Tensor:
        """One of `COUNTS`."""
        if name not in COUNTS:
            raise ValueError(f"name is {name!r}; it must be one of {', '.join(COUNTS)}")
        return self.counts[:, COUNTS.index(name)]

    def share(self, name: str) -> torch.Tensor:
        """A count of blocks over all blocks; NaN where there are none."""
        return self.count(name) / self.count("blocks")

    def snr(self) -> torch.Tensor:
        """Signal to noise in dB, 10 log10(sum x^2 / sum (x - decoded)^2); NaN without a signal."""
        signal, noise = self.energies.unbind(1)
        return 10 * torch.log10(signal / noise)

    def worst_snr(self) -> torch.Tensor:
        """The same of the worst single row."""
        return -10 * torch.log10(self.extremes[:, 2])

    def largest(self) -> torch.Tensor:
        """The largest row maximum; NaN where every row is zero or not finite."""
        return self._finite(self.extremes[:, 0])

    def least(self) -> torch.Tensor:
        """The least row maximum above 0."""
        return self._finite(-self.extremes[:, 1])

    def median(self) -> torch.Tensor:
        """Of the row maxima, the lower of two: the middle of its bin, at most 12.5 % off.

        In the outermost bins, too, it is never outside `least` ... `largest`.
        """
        up_to = self.histogram.cumsum(1)
        half = (up_to[:, -1:] + 1) // 2
        place = (up_to < half).sum(1).int() + _FIRST_BIN
        middle = (place << 21 | 1 << 20).view(torch.float32).double()
        return torch.minimum(torch.maximum(middle, self.least()), self.largest())

    def spread(self) -> torch.Tensor:
        """log2(largest / median): the octaves that one scale for all rows takes from the median one."""
        return torch.log2(self.largest() / self.median())

    @staticmethod
    def _finite(extreme: torch.Tensor) -> torch.Tensor:
        return torch.where(extreme.isfinite(), extreme, torch.nan)

    def __str__(self) -> str:
        """A table, a line an expert that has rows, and one of all. It waits for the device."""
        from .table import by_expert, statistics_table

        return statistics_table(by_expert(self))


@kept
def quantization_statistics(
    x: torch.Tensor,
    recipe: Recipe | None = None,
    *,
    experts: torch.Tensor | None = None,
    num_experts: int = 1,
    encode_scale: torch.Tensor | None = None,
) -> QuantizationStatistics:
    """What quantizing rows does to them: quantizes them with the reference, and counts.

    Args:
        x: [N, K] bf16 or fp16, K a multiple of 16; fp32 with `encode_scale` only, where it is already
            in the values, as a GEMM's epilogue with static scales leaves them.
        recipe: fast math without 4over6 by default.
        experts: int [N] or [N, S], the experts that a row counts for; others than 0 ... num_experts - 1
            are passed over. Omitted: every row counts for expert 0.
        encode_scale: fp32, one element or one a row, of the global-scale quantizer; None: every row
            has a scale of its own.

    Raises:
        ValueError: a shape or a dtype that does not fit.
    """
    check_recipe(recipe)
    recipe = recipe or Recipe()
    _check(x, experts, num_experts, encode_scale)
    n, k = x.shape
    if experts is None:
        experts = torch.zeros(n, dtype=torch.int64, device=x.device)
    # Experts that are not counted have a place of their own, so that nothing depends on how many.
    counted = (experts >= 0) & (experts < num_experts)
    index = torch.where(counted, experts, num_experts).long()
    index = index[:, None] if index.dim() == 1 else index
    encode = None if encode_scale is None else encode_scale.float().reshape(-1).expand(n)
    sums = QuantizationStatistics.empty(num_experts + 1, x.device)
    step = max(1, _ELEMENTS // k)
    with torch.no_grad():
        for first in range(0, n, step):
            some = slice(first, first + step)
            rows = _measure(x[some], recipe, None if encode is None else encode[some])
            _add_rows(sums, rows, index[some])
    return QuantizationStatistics(
        sums.counts[:-1], sums.histogram[:-1], sums.energies[:-1], sums.extremes[:-1]
    )


@kept
def weight_statistics(w: torch.Tensor, recipe: Recipe | None = None) -> QuantizationStatistics:
    """Of the weights [E, M, K] of E experts, quantized as `prepare_experts` does.

    Args:
        w: bf16 or fp16, K a multiple of 16; a row is a row of a matrix, [up; gate] share a scale.
        recipe: exact math by default, as there.
    """
    checks.tensor("w", w, checks.HALVES, ("E", "M", "K"))
    if w.shape[2] % BLOCK_SIZE or not w.shape[2]:
        checks.wrong_value("w", w, f"[E, M, K], K a positive multiple of {BLOCK_SIZE}")
    check_recipe(recipe)
    recipe = recipe or Recipe("exact")
    held, rows, _ = w.shape
    encode = weight_encode_scale(w.abs().flatten(1).amax(1), recipe)
    place = torch.arange(held, dtype=torch.int64, device=w.device)
    return quantization_statistics(
        w.flatten(0, 1), recipe, experts=place[:, None].expand(-1, rows).reshape(-1),
        num_experts=held, encode_scale=encode[:, None].expand(-1, rows).reshape(-1),
    )  # fmt: skip


@dataclass(frozen=True)
class _Rows:
    """What `QuantizationStatistics` sums, of each row."""

    counts: torch.Tensor  # [N, 10] int64
    maximum: torch.Tensor  # [N] fp32, NaN ignored
    energies: torch.Tensor  # [N, 2] fp64


def _measure(x: torch.Tensor, recipe: Recipe, encode: torch.Tensor | None) -> _Rows:
    q, decode = _quantize(x, recipe, encode)
    blocks = x.unflatten(-1, (-1, BLOCK_SIZE))
    nan, magnitude = blocks.isnan(), blocks.abs()
    top = magnitude.masked_fill(nan, 0).amax(-1)
    scale, four = _kept_scale(q)
    per_block = (
        torch.ones_like(four),
        (blocks == 0).all(-1),
        (top > 0) & ((q.block_scales == 0) | (decode == 0)[:, None]),
        scale > _LARGEST_THAT_FITS,
        four,
        q.block_scales == e4m3.NAN,
    )
    per_element = (nan, magnitude == torch.inf)

    values = x.double()
    decoded = (
        hidden_values(Activations(q.codes, q.block_scales)).double() * decode.double()[:, None]
    )
    maximum = top.float().amax(-1)
    if x.dtype == torch.float32:  # the encode scale is in the values
        values, maximum = values * decode.double()[:, None], maximum * decode
    measured = (values.isfinite() & decoded.isfinite()).all(-1)
    energies = torch.stack((values.square().sum(-1), (values - decoded).square().sum(-1)), -1)
    counts = (
        torch.ones_like(measured).long(),
        *(flags.sum(-1) for flags in per_block),
        *(flags.sum((-2, -1)) for flags in per_element),
        (~measured).long(),
    )
    return _Rows(torch.stack(counts, -1), maximum, torch.where(measured[:, None], energies, 0.0))


def _quantize(
    x: torch.Tensor, recipe: Recipe, encode: torch.Tensor | None
) -> tuple[Quantized, torch.Tensor]:
    """The rows with the steps of their arithmetic, and the decode scale [N] of each."""
    if encode is None:
        # A tensor: of a number the quantizer would make one on the host, and wait for its copy.
        g = torch.full((1,), recipe.base_scale_inv, dtype=torch.float32, device=x.device)
        q = quantize_per_token(x, g, recipe, keep_steps=True)
        assert q.per_token_scale is not None
        return q, q.per_token_scale
    if x.dtype == torch.float32:
        return quantize_block_scales(x, recipe), encode.reciprocal()
    return quantize_global_scale(x, encode, recipe, keep_steps=True), encode.reciprocal()


def _kept_scale(q: Quantized) -> tuple[torch.Tensor, torch.Tensor]:
    """(block scales before e4m3, where 4over6 kept the candidate of 4), [N, K/16] each."""
    scale = q.steps["block scale"]
    if "error of 4" not in q.steps:
        return scale, torch.zeros_like(scale, dtype=torch.bool)
    four = (q.steps["error of 4"] < q.steps["error of 6"]) & (q.steps["block amax"] != 0)
    return torch.where(four, scale * 1.5, scale), four


def _add_rows(sums: QuantizationStatistics, rows: _Rows, index: torch.Tensor) -> None:
    """Add rows [N] to the experts [N, S] that each counts for."""
    each, flat = index.shape[1], index.flatten()

    def repeated(t: torch.Tensor) -> torch.Tensor:
        return t[:, None].expand(-1, each, *t.shape[1:]).flatten(0, 1)

    sums.counts.index_add_(0, flat, repeated(rows.counts))
    sums.energies.index_add_(0, flat, repeated(rows.energies))

    known = (rows.maximum > 0) & rows.maximum.isfinite()
    place = ((rows.maximum.view(torch.int32) >> 21) - _FIRST_BIN).clamp(0, BINS - 1).long()
    sums.histogram.view(-1).index_add_(0, flat * BINS + repeated(place), repeated(known.long()))

    maximum = rows.maximum.double()
    signal, noise = rows.energies.unbind(-1)
    extremes = torch.stack((maximum, -maximum, noise / signal), -1)
    usable = torch.stack((known, known, signal > 0), -1)
    extremes = repeated(torch.where(usable, extremes, -torch.inf))
    sums.extremes.scatter_reduce_(0, flat[:, None].expand(-1, 3), extremes, "amax")


def _check(
    x: torch.Tensor,
    experts: torch.Tensor | None,
    num_experts: int,
    encode_scale: torch.Tensor | None,
) -> None:
    dtypes = checks.HALVES if encode_scale is None else checks.FLOATS
    checks.tensor("x", x, dtypes, ("N", "K"))
    if x.shape[1] % BLOCK_SIZE or not x.shape[1]:
        checks.wrong_value("x", x, f"[N, K], K a positive multiple of {BLOCK_SIZE}")
    checks.integer("num_experts", num_experts, 1)
    if encode_scale is not None:
        checks.tensor("encode_scale", encode_scale, (torch.float32,), like=("x", x))
        if encode_scale.numel() not in (1, x.shape[0]):
            checks.wrong_value("encode_scale", encode_scale, f"of 1 or {x.shape[0]} elements")
    if experts is not None:
        checks.tensor("experts", experts, _INTEGERS, like=("x", x))
        if experts.dim() not in (1, 2) or len(experts) != len(x):
            checks.wrong_value("experts", experts, f"[{len(x)}] or [{len(x)}, S]")
