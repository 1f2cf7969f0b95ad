"""The ids and weights that a kernel may route logits to; `moe.py` has the rest of the argument.

Selection on raw logits (Renormalize, RenormalizeNaive, TopK, TopKSigmoid, Llama4) is exact: bits are
compared. The other methods select by scores in fp32, of which each kernel has its own last bits. Errors
of a score or a weight, absolute or relative as said, of whatever kernel, FlashInfer's among them:

- exp(l - max): relative, (2.5 + 1.75 |l - max|) 2^-23, for an `__expf` of 2 + floor(1.173 |x|) ulp (CUDA
  C++ Programming Guide, table of intrinsic functions) and a rounding of the difference; and 2^-120 for
  what is flushed.
- sigmoid(l): absolute, 2^-12 |tanh(l / 2)| + 2^-21. `0.5 * tanh(0.5 * l) + 0.5` by `tanh.approx.f32` has
  half of its relative error of 2^-11 (PTX ISA) and one rounding; `1 / (1 + exp(-l))` has at most
  s (1 - s) times the error of exp, which |l| s (1 - s) <= 0.224 bounds, and the roundings of a sum and
  of a division: below 2^-21 altogether.
- Sums of n in any order: (n - 1) 2^-24 of the sum of magnitudes; a bias, an epsilon and a factor one
  rounding each. Divisions: 2 ulp (the same guide, `__fdividef`), or a reciprocal and a product.
- A share x / (x + the others) is monotone in x and in the others: it is evaluated on their ends.
- The rounding of a weight to bf16 is monotone.

`selection.py` has the sets of experts that such scores may select. (Default divides all scores of
a token by one sum: what is compared are the exponentials, with the error of the division.)
"""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass

import torch

from ..moe.routing import Routing, RoutingMethodType, route
from ..numerics.subnormals import kept
from .interval import Interval, U, rounded, unless
from .selection import of_sets, selections, surely_before

_M = RoutingMethodType
_DIVISION = 2.0**-22
_EPSILON = 1e-20  # what denominators are kept from zero with


@dataclass(frozen=True)
class RoutingBounds:
    """S sets of experts for each of T tokens; a token that has fewer repeats its first."""

    ids: torch.Tensor  # [S, T, K] int32
    weights: Interval  # [S, T, K]: bf16 numbers
    before: torch.Tensor  # [S, T, K, K] bool: the first of two experts is surely before the second
    unknown: torch.Tensor  # [T] bool: nothing is claimed

    @property
    def ordered(self) -> torch.Tensor:
        """Sets [S, T] bool whose experts have only one order."""
        k = self.ids.shape[-1]
        same = torch.eye(k, dtype=torch.bool, device=self.ids.device)
        return (self.before | self.before.mT | same).flatten(-2).all(-1)

    def outside(self, ids: torch.Tensor, weights: torch.Tensor) -> int:
        """Count the elements of an implementation's ids and weights [T, K] that are none of these.

        An id that the nearest set lacks, that is repeated or that stands behind one it is surely
        before, and a weight outside of its interval.
        """
        k = ids.shape[1]
        equal = ids[..., None] == self.ids[..., None, :]  # [S, T, K of theirs, K of the set]
        place = equal.int().argmax(-1)
        ends = (end.gather(-1, place) for end in (self.weights.low, self.weights.high))
        wrong = ~equal.any(-1) | ~Interval(*ends).contains(weights)
        rows = place[..., None].expand(*place.shape, k)
        theirs = self.before.gather(2, rows).gather(3, rows.mT)  # [S, T, slot, slot]
        earlier = torch.ones_like(theirs[0, 0]).tril(-1)  # the second slot of a pair is the earlier
        repeated = ids[:, :, None] == ids[:, None, :]
        wrong |= ((theirs | repeated) & earlier).any(-1)
        return int(wrong.sum(-1).amin(0).masked_fill(self.unknown, 0).sum())


@kept
def routing_bounds(
    logits: torch.Tensor, routing: Routing, bias: torch.Tensor | None = None
) -> RoutingBounds:
    """Bound the choices of each token and their weights; the arguments are those of `route`.

    Where logits are selected their bits decide, those of infinities and NaN too, and a softmax that
    has one of these is NaN. Nothing is claimed of tokens whose scores are selected and have a NaN or, of
    Default, an infinity above; with a bias that is not finite, with fewer than K raw logits above -inf,
    with more sets than `selection.SETS`, or whose sum of scores may be zero.
    """
    reference = route(logits, routing, bias)
    x = logits.double()
    if routing.method.raw:
        ids = reference.ids[None]
        unknown = (x > -torch.inf).sum(1) < routing.top_k
        if routing.method == _M.Llama4:  # between zeros of two signs its kernel has no order
            zeros = [((x == 0) & (x.signbit() == sign)).any(1) for sign in (False, True)]
            largest = x.masked_fill(x.isnan(), -torch.inf).amax(1)
            unknown |= (largest == 0) & zeros[0] & zeros[1]
        k = ids.shape[-1]
        before = torch.ones(k, k, dtype=torch.bool, device=x.device).triu(1)
        before = before.expand(*ids.shape, k)
        weights = _of_chosen_logits(x.gather(1, ids[0].long())[None], routing.method)
    else:
        endless = (x == torch.inf) & (routing.method == _M.Default)
        unknown = (x.isnan() | endless).any(1)
        scores, keys, bias64 = _scores(x, routing, bias)
        unknown |= ~bias64.isfinite().all()
        ids, many = selections(keys, x, bias64, routing)
        unknown |= many
        before = surely_before(ids, keys, x, bias64)
        weights = _of_chosen_scores(scores.map(lambda end: of_sets(end, ids)), scores, routing)
    weights = rounded(torch.bfloat16, weights)
    return RoutingBounds(ids, weights, before, unknown | weights.unknown.any(-1).any(0))


def _exponentials(x: torch.Tensor) -> Interval:
    difference = (x - x.amax(-1, keepdim=True)).clamp(min=-200)  # exp is far below 2^-120 there
    value = torch.exp(difference)
    error = value * (2.5 + 1.75 * difference.abs()) * 2.0**-23 + 2.0**-120
    return Interval.point(value).widened(error).map(lambda t: t.clamp(min=0))


def _sigmoids(x: torch.Tensor) -> Interval:
    tanh = torch.tanh(x / 2)
    return Interval.point(0.5 * tanh + 0.5).widened(tanh.abs() * 2.0**-12 + 2.0**-21)


def _scores(
    x: torch.Tensor, routing: Routing, bias: torch.Tensor | None
) -> tuple[Interval, Interval, torch.Tensor]:
    """Return the scores of the weights [T, E], the keys of the selection [T, E] and the bias [E]."""
    if routing.method == _M.Default:
        scores = _exponentials(x)
        keys = scores.widened(scores.magnitude * _DIVISION + 2.0**-100)
    else:
        scores = keys = _sigmoids(x)
    if bias is None:
        return scores, keys, x.new_zeros(x.shape[1])
    bias64 = (bias.to(torch.bfloat16) if routing.grouped else bias).double()
    keys = scores + Interval.point(bias64)
    return scores, keys.widened(keys.magnitude * U), bias64


def _of_chosen_logits(x: torch.Tensor, method: RoutingMethodType) -> Interval:
    if method == _M.TopK:
        return Interval.point(x)
    if method in (_M.Renormalize, _M.RenormalizeNaive):
        part = _exponentials(x)
        return _share(part, part, 0.0)
    return _sigmoids(x)


def _of_chosen_scores(part: Interval, scores: Interval, routing: Routing) -> Interval:
    """Bound the weights [S, T, K] before the rounding to bf16."""
    if routing.method == _M.Default:
        return _share(part, scores, 0.0)
    if routing.method.biased:
        weights = _share(part, part, _EPSILON) * Interval.point(part.low.new_tensor(routing.scale))
        return weights.widened(weights.magnitude * U)
    if routing.method == _M.SigmoidRenorm and routing.norm_topk_prob:
        return _share(part, part, 0.0)
    return part


def _share(part: Interval, every: Interval, epsilon: float) -> Interval:
    """Bound part / (sum of every + epsilon); `every` includes `part`. Claim nothing if that may be 0."""
    low, high = (end.sum(-1, keepdim=True) for end in (every.low, every.high))
    most, least = high - part.high + epsilon, low - part.low + epsilon  # of the others
    size = every.magnitude.sum(-1, keepdim=True)
    bottom = part.low / (part.low + torch.where(part.low < 0, least, most))
    share = Interval(bottom, part.high / (part.high + least))
    terms = every.low.shape[-1]  # as many additions, with epsilon's
    error = (terms * U * size / low + _DIVISION) * 1.001
    share = share.widened(share.magnitude * error)
    return unless(low <= _EPSILON, share)
