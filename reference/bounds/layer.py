"""Bounds of the experts' stages; `moe.py` has the argument."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from ..moe.activations import Activations, hidden_values
from ..moe.variants import Variant
from ..recipe import Recipe
from ..weights.experts import Experts
from ..weights.layout import gemm1_values, gemm2_values, unshuffled_bias
from .accumulation import Accumulation, sum_of_products
from .activation import activation_bounds
from .interval import Interval, rounded, unless
from .product import Product
from .requantize import requantize_blocks, requantize_rows

BATCH = 1 << 13
"""The most slots that go from sum to sum together, to limit memory; one expert may have more."""


def _zeros(ids: torch.Tensor, width: int) -> Interval:
    low, high = (ids.new_zeros(*ids.shape, width, dtype=torch.float64) for _ in "lh")
    return Interval(low, high)


@dataclass(frozen=True)
class Slots:
    """Some of the (token, slot) pairs of local experts, by expert."""

    token: torch.Tensor  # [N]
    slot: torch.Tensor  # [N]
    expert: torch.Tensor  # [N], ascending
    first: int  # the expert that counts[0] is of
    counts: list[int]


def _batches(local: torch.Tensor, num_local: int) -> Iterator[Slots]:
    """Yield the slots of whole experts; slots of experts on other ranks are left out."""
    flat = local.flatten()
    here = (flat >= 0) & (flat < num_local)
    order = torch.where(here, flat, num_local).argsort(stable=True)
    counts = flat[here].bincount(minlength=num_local).tolist()
    first = start = 0
    while first < num_local:
        last, stop = first + 1, start + counts[first]
        while last < num_local and stop - start + counts[last] <= BATCH:
            stop, last = stop + counts[last], last + 1
        places = order[start:stop]
        if stop > start:
            token, slot = places // local.shape[1], places % local.shape[1]
            yield Slots(token, slot, flat[places], first, counts[first:last])
        first, start = last, stop


def _put(into: Interval, slots: Slots, what: Interval) -> None:
    into.low[slots.token, slots.slot] = what.low
    into.high[slots.token, slots.slot] = what.high


@dataclass(frozen=True)
class Layer:
    """The steps of a call between routing and finalize, on rows [N, ...] of N slots."""

    activations: Activations
    experts: Experts
    recipe: Recipe
    accumulation: Accumulation
    variant: Variant
    drops_nan: bool

    @property
    def widths(self) -> tuple[int, int, int]:
        e = self.experts
        return e.gemm1_weights.shape[1], e.padded_intermediate_size, e.padded_hidden_size

    def through(
        self,
        local: torch.Tensor,
        accumulator1: torch.Tensor | None = None,
        intermediate: torch.Tensor | None = None,
    ) -> tuple[Interval, Interval, Interval]:
        """Bound the first sums [T, K, M1], the intermediate [T, K, I] and the rows [T, K, hidden size].

        Args:
            local: [T, K] int64; slots whose experts are not 0 ... num_local - 1 are not on this rank,
                and zero.
            accumulator1, intermediate: as `fused_moe_bounds` has them.
        """
        acc, mid, rows = (_zeros(local, width) for width in self.widths)
        for slots in _batches(local, self.experts.num_local):
            sums = self.first_sums(slots)
            _put(acc, slots, sums)
            if accumulator1 is not None:
                sums = Interval.point(accumulator1[slots.token, slots.slot])
            middle = self.activated(sums, slots)
            _put(mid, slots, middle)
            if intermediate is not None:
                middle = Interval.point(intermediate[slots.token, slots.slot])
            _put(rows, slots, self.rows(middle, slots))
        return acc, mid, rows[..., : self.experts.hidden_size]

    def first_sums(self, slots: Slots) -> Interval:
        x = Interval.point(hidden_values(self.activations))

        def weights(e: int) -> torch.Tensor:
            return gemm1_values(self.experts, e)

        return self._sums(lambda rows: x[slots.token[rows]], weights, slots.first, slots.counts)

    def activated(self, sums: Interval, slots: Slots) -> Interval:
        """Bound the intermediate: bf16 numbers, except with the static scales of TensorRT-LLM."""
        scale, experts = self.activations.per_token_scale, self.experts
        raw = Product.of(sums)
        if scale is not None:
            raw = raw.times(scale[slots.token, None])
        if self.variant.rounds_first_gemm:
            scalar = experts.output1_scale_gate_scalar
            scaled = raw.times(scalar[slots.expert, None]).result()
            raw = Product.of(rounded(torch.bfloat16, scaled))
            one = torch.ones_like(scalar)
            experts = replace(experts, output1_scale_scalar=one, output1_scale_gate_scalar=one)
        drops = (
            self.drops_nan or self.variant.rounds_first_gemm
        )  # whose clamps give the limit for NaN
        middle = activation_bounds(
            raw, experts, slots.expert, drops_nan=drops, of_cutlass=self.variant.rounds_first_gemm
        )
        if self.activations.is_static and not self.variant.rounds_first_gemm:
            return middle
        return rounded(torch.bfloat16, middle)

    def rows(self, middle: Interval, slots: Slots) -> Interval:
        """Bound the rows [N, H], bf16 numbers, from an intermediate [N, I]."""
        n, experts = middle.low.shape[0], self.experts
        values, scale = middle, None
        row = torch.arange(n, dtype=torch.int64, device=middle.low.device)
        unknown = torch.zeros_like(row, dtype=torch.bool)
        counts = slots.counts
        if self.activations.is_static:
            encode = experts.intermediate_scale if self.variant.rounds_first_gemm else None
            values = requantize_blocks(middle, self.recipe, encode)
        elif not self.activations.is_bf16:
            values, scale, row, unknown = requantize_rows(middle, self.recipe)
            index = slots.expert[row] - slots.first
            counts = index.bincount(minlength=len(counts)).tolist()

        def weights(e: int) -> torch.Tensor:
            return gemm2_values(experts, e)

        sums = self._sums(lambda rows: values[rows], weights, slots.first, counts)
        expert = slots.expert[row]
        product = Product.of(sums)
        if scale is not None:
            product = product.times(scale[:, None])
        if experts.gemm2_bias is not None:
            bias = unshuffled_bias(experts.gemm2_bias, gated=False)
            product = product.plus(bias[expert])
        scalar = experts.output2_scale_scalar[expert, None]
        found = rounded(torch.bfloat16, product.times(scalar).result())
        return unless(unknown[:, None], _hulls(found, row, n))

    def _sums(
        self,
        values: Callable[[slice], Interval],
        weights: Callable[[int], torch.Tensor],
        first: int,
        counts: list[int],
    ) -> Interval:
        """Multiply `values`, `counts` consecutive rows for each expert, by its weights: [N, M]."""
        parts, start = [], 0
        for e, count in enumerate(counts, first):
            if count:
                x = values(slice(start, start + count))
                parts.append(sum_of_products(x, weights(e), self.accumulation))
                start += count
        return Interval(torch.cat([p.low for p in parts]), torch.cat([p.high for p in parts]))


def _hulls(x: Interval, row: torch.Tensor, n: int) -> Interval:
    """Return the hull [n, H] of x [C, H] over the candidates of each row [C], at least one."""
    if row.numel() == n:
        return x
    index = row[:, None].expand_as(x.low)

    def over(of: torch.Tensor, start: float, reduction: str) -> torch.Tensor:
        full = torch.full((n, of.shape[1]), start, dtype=torch.float64, device=of.device)
        return full.scatter_reduce(0, index, of, reduction)

    low = over(x.low.masked_fill(x.nan, torch.inf), torch.inf, "amin")
    high = over(x.high.masked_fill(x.nan, -torch.inf), -torch.inf, "amax")
    some, every = (over(x.nan.double(), s, f) == 1 for s, f in ((0.0, "amax"), (1.0, "amin")))
    numbers = unless(some, Interval(low, high))
    return numbers.map(lambda end: end.masked_fill(every, torch.nan))
