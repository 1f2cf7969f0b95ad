"""Intervals that hold the output of every implementation that keeps the contract of the fused call.

Determined by the contract: the products (exact), the bf16 roundings, the requantization of a given
intermediate, the order of the finalize. Free: the order and width of the two sums, the last bits of
the activation, and the association of accumulator, token scale and expert scalar. The argument:

1. *Sums.* The terms are exact. Let P and -N be the sums of the positive and of the negative ones. A
   partial sum, of any subset in any order, lies in [-N, P], so its magnitude is at most
   B = max(P, N). Adding n nonzero terms in fp32, in any tree, rounds at most n - 1 times by
   2^-24 B (terms that are zero add exactly). A tensor core aligns a step of terms to the largest and
   drops what lies below its last bit: `Accumulation` has its error for each term and each step.
   Where K is known to be added in contiguous ranges (`CONTIGUOUS`), a partial sum is one range's, at
   most the spread of the prefix sums and what a chunk holds: a much smaller B.
   If every term is a multiple of q and B <= 2^24 q, nothing is ever rounded: the sum is exact, whatever
   the order, and the interval a point.
2. *Scalars.* c factors that are not powers of two round c times, by 2^-24 each, in any association;
   a bias rounds twice more.
3. *Activation.* Evaluated on the ends of the interval (with the one minimum that SiLU and GELU have),
   then widened by the relative error stated in `activation_bounds`.
4. *Rounding to bf16* is monotone: the ends round.
5. *Requantization.* The row's maximum A lies between the largest lower and the largest upper bound of
   the magnitudes, and is a bf16 number: each of the few candidates is carried through the rest on its
   own. Given A, the block scale is monotone in the block's maximum: each e4m3 byte between the two
   ends is a candidate; given both, a code is monotone in the element. With 4over6 a block may take
   either candidate unless the intervals of the two errors are disjoint.
6. *Second sum*, as 1 and 2, over intervals: centre and radius.
7. *Finalize.* A chain of fused multiply-adds, each monotone in the row: it is evaluated on the ends.

Numbers that fp32 cannot hold (overflow, NaN, a subnormal sum) are outside the argument: there the
interval is infinite. So it is where the maximum of a row has more than `CANDIDATES` candidates.
"""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from .bounds_activation import activation_bounds
from .bounds_requantize import requantize_blocks, requantize_rows
from .experts import Experts, gemm1_values, gemm2_values, unshuffled_bias
from .interval import (
    ANY_ORDER,
    Accumulation,
    Interval,
    plus_bias,
    rounded,
    sum_of_products,
    times,
    unless,
)
from .moe import Activations, FinalizeOrder, finalize, hidden_values
from .recipe import Recipe

BATCH = 1 << 13
"""Slots that are carried from sum to sum together, unless one expert has more: to bound memory."""


@dataclass(frozen=True)
class MoEBounds:
    """Of every stage, [T, K, ...] as `MoEResult.steps` names them; zero in slots held elsewhere."""

    output: Interval  # [T, H]
    rows: Interval  # [T, K, H]
    accumulator1: Interval  # [T, K, M1]
    intermediate: Interval  # [T, K, I]: bf16 values, or fp32 with static scales


def fused_moe_bounds(
    activations: Activations,
    experts: Experts,
    ids: torch.Tensor,
    weights: torch.Tensor | Interval,
    *,
    recipe: Recipe | None = None,
    local_expert_offset: int = 0,
    finalize_order: FinalizeOrder = "flashinfer",
    output_dtype: torch.dtype = torch.bfloat16,
    accumulation: Accumulation = ANY_ORDER,
    cutlass: bool = False,
    accumulator1: torch.Tensor | None = None,
    intermediate: torch.Tensor | None = None,
) -> MoEBounds:
    """The intervals of a call of `reference.moe.fused_moe`, whose arguments these are.

    Args:
        weights: [T, K] as they are given, or what they may be: `routing_bounds` has those.
        accumulator1: [T, K, M1], an implementation's own: what follows is judged given it.
        intermediate: [T, K, I], likewise; with static scales the activated values.
    """
    layer = _Layer(activations, experts, recipe or Recipe(), accumulation, cutlass)
    acc, mid, rows = (_zeros(ids, width) for width in layer.widths)
    for slots in _batches(ids.long() - local_expert_offset, experts.num_local):
        sums = layer.first_sums(slots)
        _put(acc, slots, sums)
        if accumulator1 is not None:
            sums = Interval.point(accumulator1[slots.token, slots.slot])
        middle = layer.activated(sums, slots)
        _put(mid, slots, middle)
        if intermediate is not None:
            middle = Interval.point(intermediate[slots.token, slots.slot])
        _put(rows, slots, layer.rows(middle, slots))

    rows = rows[..., : experts.hidden_size]
    given = weights if isinstance(weights, Interval) else Interval.point(weights)
    output = _finalized(rows, given, experts.padded_hidden_size, finalize_order, output_dtype)
    return MoEBounds(output, rows, acc, mid)


def _zeros(ids: torch.Tensor, width: int) -> Interval:
    low, high = (ids.new_zeros(*ids.shape, width, dtype=torch.float64) for _ in "lh")
    return Interval(low, high)


@dataclass(frozen=True)
class _Slots:
    """Some of the (token, slot) pairs whose experts are held here, by expert."""

    token: torch.Tensor  # [N]
    slot: torch.Tensor  # [N]
    expert: torch.Tensor  # [N], ascending
    first: int  # the expert that counts[0] is of
    counts: list[int]


def _batches(local: torch.Tensor, num_local: int) -> Iterator[_Slots]:
    """The slots of whole experts, those held elsewhere left out."""
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
            yield _Slots(token, slot, flat[places], first, counts[first:last])
        first, start = last, stop


def _put(into: Interval, slots: _Slots, what: Interval) -> None:
    into.low[slots.token, slots.slot] = what.low
    into.high[slots.token, slots.slot] = what.high


@dataclass(frozen=True)
class _Layer:
    """The stages of a call, of rows [N, ...] for N slots."""

    activations: Activations
    experts: Experts
    recipe: Recipe
    accumulation: Accumulation
    cutlass: bool

    @property
    def widths(self) -> tuple[int, int, int]:
        e = self.experts
        return e.gemm1_weights.shape[1], e.padded_intermediate_size, e.padded_hidden_size

    def first_sums(self, slots: _Slots) -> Interval:
        x = Interval.point(hidden_values(self.activations))

        def weights(e: int) -> torch.Tensor:
            return gemm1_values(self.experts, e)

        return self._sums(lambda rows: x[slots.token[rows]], weights, slots.first, slots.counts)

    def activated(self, sums: Interval, slots: _Slots) -> Interval:
        """The intermediate, bf16 numbers but with the static scales of TensorRT-LLM."""
        scale, experts = self.activations.per_token_scale, self.experts
        raw = sums if scale is None else times(sums, scale[slots.token, None])
        if self.cutlass:
            scalar = experts.output1_scale_gate_scalar
            raw = rounded(torch.bfloat16, times(raw, scalar[slots.expert, None]))
            one = torch.ones_like(scalar)
            experts = replace(experts, output1_scale_scalar=one, output1_scale_gate_scalar=one)
        middle = activation_bounds(raw, experts, slots.expert)
        if self.activations.is_static and not self.cutlass:
            return middle
        return rounded(torch.bfloat16, middle)

    def rows(self, middle: Interval, slots: _Slots) -> Interval:
        """[N, H] of an intermediate [N, I]: bf16 numbers."""
        n, experts = middle.low.shape[0], self.experts
        values, scale = middle, None
        row = torch.arange(n, device=middle.low.device)
        unknown = torch.zeros_like(row, dtype=torch.bool)
        counts = slots.counts
        if self.activations.is_static:
            encode = experts.intermediate_scale if self.cutlass else None
            values = requantize_blocks(middle, self.recipe, encode)
        elif not self.activations.is_bf16:
            values, scale, row, unknown = requantize_rows(middle, self.recipe)
            held = slots.expert[row] - slots.first
            counts = held.bincount(minlength=len(counts)).tolist()

        def weights(e: int) -> torch.Tensor:
            return gemm2_values(experts, e)

        sums = self._sums(lambda rows: values[rows], weights, slots.first, counts)
        expert = slots.expert[row]
        if scale is not None:
            sums = times(sums, scale[:, None])
        if experts.gemm2_bias is not None:
            sums = plus_bias(sums, unshuffled_bias(experts.gemm2_bias, gated=False)[expert])
        scalar = experts.output2_scale_scalar[expert, None]
        found = rounded(torch.bfloat16, times(sums, scalar))
        if row.numel() == n:  # one candidate each
            return unless(unknown[:, None], found)
        index = row[:, None].expand_as(found.low)
        low = found.low.new_full((n, found.low.shape[1]), torch.inf)
        high = -low
        low = low.scatter_reduce(0, index, found.low, "amin")
        high = high.scatter_reduce(0, index, found.high, "amax")
        return unless(unknown[:, None], Interval(low, high))

    def _sums(
        self,
        values: Callable[[slice], Interval],
        weights: Callable[[int], torch.Tensor],
        first: int,
        counts: list[int],
    ) -> Interval:
        """[N, M]: `values` of consecutive rows, `counts` for each expert, times its weights."""
        parts, start = [], 0
        for e, count in enumerate(counts, first):
            if count:
                x = values(slice(start, start + count))
                parts.append(sum_of_products(x, weights(e), self.accumulation))
                start += count
        return Interval(torch.cat([p.low for p in parts]), torch.cat([p.high for p in parts]))


def _finalized(
    rows: Interval,
    weights: Interval,
    hidden_size: int,
    order: FinalizeOrder,
    output_dtype: torch.dtype,
) -> Interval:
    """[T, H]: rows [T, K, H], bf16 numbers, times weights [T, K] of at most 24 bits."""
    products = rows * weights[..., None]
    # The products are exact in fp64: fused with a factor of 1 they are rounded as with their own.
    ones = torch.ones_like(weights.low)
    low, high = (
        finalize(end, ones, hidden_size, order).to(output_dtype).double()
        for end in (products.low, products.high)
    )
    unknown = (rows.low.isinf() | rows.high.isinf()).any(1)
    return unless(unknown, Interval(low, high))
