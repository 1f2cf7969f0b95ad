"""Intervals that hold the output of every implementation that keeps the contract of the fused call.

Determined by the contract: the products (exact), the bf16 roundings, the requantization of a given
intermediate, the order of the finalize. Free: the order and width of the two sums, the last bits of
the activation and of what a kernel routes by, and the association of accumulator, token scale and expert
scalar. The argument:

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
4. *Rounding to bf16* is monotone: the ends round. FlashInfer's cutlass layer rounds twice so, what the
   activation is of and the activation.
5. *Requantization.* The row's maximum A lies between the largest lower and the largest upper bound of
   the magnitudes, and is a bf16 number: each of the few candidates is carried through the rest on its
   own. Given A, the block scale is monotone in the block's maximum: each e4m3 byte between the two
   ends is a candidate; given both, a code is monotone in the element. With 4over6 a block may take
   either candidate unless the intervals of the two errors are disjoint. Static scales: A's place is
   taken by the encode scale, and fast and exact math are both allowed for.
6. *Second sum*, as 1 and 2, over intervals: centre and radius.
7. *Finalize.* A chain of fused multiply-adds: each is monotone in the exact product weight * row and in
   what was summed before. Over an interval of the weight and one of the row, the product, linear in
   each of them, is least and greatest at corners, whichever sum it is added to: the chains of the least
   and of the greatest products are the ends. A given weight is a point. Subnormal numbers are
   flushed, which is monotone.
8. *Routing from logits.* `routing.py` has the interval of each weight, `selection.py` the sets
   of experts that scores known but for their last bits may select: 7 for each set, then the hull. Where
   the order of a set's slots is open too, 7 may have any: it rounds at most K times, by 2^-24 of the sum
   of magnitudes, and flushes less than 2^-126 as often.

Numbers that fp32 cannot hold. `Interval` says what its ends mean: a number, a number or an infinity, NaN
for sure, or nothing claimed.

9. *Overflow*: `accumulation.py` and `product.py` have where a sum or a product may be infinite, must be,
   or may be NaN. A rounding to bf16 or to the output's dtype is monotone, infinities included.
10. *Underflow*: before the finalize implementations may flush or not; each number below 2^-126 costs as
   much at most, times what multiplies it after. The quantizers are determined: they flush, or not, as
   their build does.
11. *NaN* goes through sums, products, activations and roundings. A quantizer's maxima drop it, and its
   code is that of 6; a block of NaN alone, or one with infinity under fast math, has the scale NaN.
12. *Finalize*: both chains of 7 meet an invalid operation only where every chain does. Where one of them
   alone does, nothing is claimed.

Nothing is claimed either where the maximum of a row has more than `CANDIDATES` candidates, and where a
token may choose more than `SETS` sets.
"""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass

import torch

from ..moe.activations import Activations
from ..moe.finalize import FinalizeOrder, add_up
from ..moe.permute import local_slots
from ..moe.routing import Routing
from ..moe.variants import VARIANTS
from ..numerics.fp32 import flush
from ..numerics.subnormals import kept
from ..recipe import LayerBuild, Recipe
from ..weights.experts import Experts
from .accumulation import ANY_ORDER, Accumulation
from .interval import LARGEST, SMALLEST, Interval, U, choose, hull, rounded, unless, valid
from .layer import Layer
from .routing import routing_bounds


@dataclass(frozen=True)
class MoEBounds:
    """The intervals of every stage, [T, K, ...] as in `MoEResult.steps`; 0 in slots of other ranks."""

    output: Interval  # [T, H]
    rows: Interval  # [T, K, H]
    accumulator1: Interval  # [T, K, M1]
    intermediate: Interval  # [T, K, I]: bf16 values, or fp32 with static scales


@kept
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
    variant: LayerBuild = "cuda",
    drops_nan: bool = False,
    accumulator1: torch.Tensor | None = None,
    intermediate: torch.Tensor | None = None,
) -> MoEBounds:
    """Bound every stage of `reference.moe.fused_moe`, whose arguments these are.

    Args:
        weights: [T, K] as they are given, or what they may be: `routing_bounds` has those.
        drops_nan: of FlashInfer's closed kernels, whose activation may give a number for NaN: PTX's
            maxima and minima drop it. Ours let it through.
        accumulator1: [T, K, M1], an implementation's own: what follows is judged given it.
        intermediate: [T, K, I], likewise; with static scales the activated values.
    """
    layer = Layer(
        activations, experts, recipe or Recipe(), accumulation, VARIANTS[variant], drops_nan
    )
    local = ids.long() - local_expert_offset
    acc, mid, rows = layer.through(local, accumulator1, intermediate)
    weights = weights if isinstance(weights, Interval) else Interval.point(weights)
    is_local = local_slots(ids, experts.num_local, local_expert_offset)
    output = _finalized(rows, _where(is_local, weights), finalize_order, output_dtype)
    return MoEBounds(output, rows, acc, mid)


@kept
def routed_moe_bounds(
    activations: Activations,
    experts: Experts,
    logits: torch.Tensor,
    routing: Routing,
    routing_bias: torch.Tensor | None = None,
    *,
    recipe: Recipe | None = None,
    local_expert_offset: int = 0,
    finalize_order: FinalizeOrder = "flashinfer",
    output_dtype: torch.dtype = torch.bfloat16,
    accumulation: Accumulation = ANY_ORDER,
    variant: LayerBuild = "cuda",
    drops_nan: bool = False,
) -> Interval:
    """Bound the output [T, H] of a call that routes from logits, over all choices of its routing.

    Args:
        logits, routing, routing_bias: as `reference.moe.routing.route` takes them.
        the others: as `fused_moe_bounds` does.
    """
    chosen = routing_bounds(logits, routing, routing_bias)
    layer = Layer(
        activations, experts, recipe or Recipe(), accumulation, VARIANTS[variant], drops_nan
    )
    ids, places = _union(chosen.ids, logits.shape[1])
    rows = layer.through(ids - local_expert_offset)[2]
    is_local = local_slots(ids, experts.num_local, local_expert_offset)
    output: Interval | None = None
    for place, low, high, ordered in zip(
        places, chosen.weights.low, chosen.weights.high, chosen.ordered, strict=True
    ):
        index = place[..., None].expand(-1, -1, experts.hidden_size)
        one = _finalized(
            Interval(rows.low.gather(1, index), rows.high.gather(1, index)),
            _where(is_local.gather(1, place), Interval(low, high)),
            finalize_order,
            output_dtype,
            ordered,
        )
        output = one if output is None else hull(output, one)
    assert output is not None
    return unless(chosen.unknown[:, None], output)


def _union(ids: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the experts of any set [T, most], then -1, and each set's places in it [S, T, K]."""
    index = ids.long()
    chosen = torch.zeros(ids.shape[1], num_experts, dtype=torch.bool, device=ids.device)
    for experts in index:
        chosen.scatter_(1, experts, True)
    count = chosen.sum(1)
    order = chosen.byte().argsort(dim=1, descending=True, stable=True)[
        :, : int(count.max()) if count.numel() else 0
    ]
    behind = torch.arange(order.shape[1], dtype=torch.int64, device=ids.device) >= count[:, None]
    rank = chosen.long().cumsum(1) - 1
    return order.masked_fill(behind, -1), torch.stack(
        [rank.gather(1, experts) for experts in index]
    )


def _where(is_local: torch.Tensor, weights: Interval) -> Interval:
    """Set slots that the finalize skips to zero."""
    return weights.map(lambda end: torch.where(is_local, end, 0.0))


def _finalized(
    rows: Interval,
    weights: Interval,
    order: FinalizeOrder,
    output_dtype: torch.dtype,
    ordered: torch.Tensor | None = None,
) -> Interval:
    """Bound the sum [T, H] of rows [T, K, H], bf16 numbers, times weights [T, K] of at most 24 bits.

    Args:
        ordered: [T], whether the slots are known to have this order; None: all are.
    """
    products = rows.map(flush) * weights.map(flush)[..., None]
    # The products are exact in fp64: fused with a factor of 1 they are rounded as with their own.
    ones = torch.ones_like(weights.low)
    low, high = (
        add_up(end, ones, order).to(output_dtype).double() for end in (products.low, products.high)
    )
    # Both chains meet an invalid sum only where every one does.
    output = valid(Interval(low, high))
    if ordered is not None and not ordered.all():
        size = products.magnitude.sum(1)
        lost = size * (rows.low.shape[1] * U * 1.001) + rows.low.shape[1] * SMALLEST
        total = products.map(lambda end: end.sum(1)).widened(lost)
        beyond = ~(size < LARGEST / 2)
        output = choose(ordered[:, None], output, unless(beyond, rounded(output_dtype, total)))
    return output
