"""The sets of experts that scores may select if their last bits are not known.

An expert is *surely before* another if its score is above whatever the other's may be, or if both have
the same logit and bias, of which every kernel makes the same score, and its index is the smaller. K
experts may be the chosen ones if none of the others is surely before one of them: with their own
scores as large, and the others' as small as they may be, they are the best.

Exchanges of one expert lead from any such set U to any other, V, by way of such sets. Of those that V
alone has let b be one that none of them is surely before, and of those that U alone has let a be one
that is surely before none of them. U without a and with b is such a set: what is surely before b is in
V, hence, by the choice of b, in U, and it is not a, which V lacks; what a is surely before is not in V
either, hence, by the choice of a, not in U. And it is nearer to V.

Groups of DeepSeekV3 are chosen likewise, by the sum of their two best scores, which is monotone in every
score, and the same for groups of the same logits and biases; each choice of groups has choices of
experts of its own.
"""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Hashable, Sequence

import torch

from ..moe.routing import Routing
from .interval import Interval, U

SETS = 8
"""The most sets of experts of a token; nothing is claimed of a token with more."""


def selections(
    keys: Interval, logits: torch.Tensor, bias: torch.Tensor, routing: Routing
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sets of K experts that each token may choose.

    Args:
        keys: [T, E], what is compared.
        logits: [T, E], and bias [E], which make equal keys where they are equal.

    Returns:
        ids [S, T, K] int32, of S <= SETS; tokens with fewer sets repeat their first. And which tokens
        [T] have more than SETS.
    """
    eligible, groups = keys, None
    near = torch.zeros_like(keys.low[:, 0], dtype=torch.bool)
    if routing.grouped:
        groups = _group_keys(keys, routing)
        best, near = _best(groups, routing.topk_group or 1)
        outside = torch.ones_like(groups.low, dtype=torch.bool).scatter(1, best, False)
        outside = outside.repeat_interleave(keys.low.shape[1] // outside.shape[1], 1)
        eligible = keys.map(lambda end: end.masked_fill(outside, -torch.inf))
    first, close = _best(eligible, routing.top_k)
    tokens = (near | close).nonzero()[:, 0]
    if not tokens.numel():
        return first.int()[None], torch.zeros_like(near)
    rows = (keys.low, keys.high, logits, bias.expand_as(logits))
    low, high, x, b = (t[tokens].tolist() for t in rows)
    of_groups: Sequence[tuple[list[float], list[float]] | None] = [None] * len(low)
    if groups is not None:
        ends = (end[tokens].tolist() for end in (groups.low, groups.high))
        of_groups = list(zip(*ends, strict=True))
    by_token = [
        _of_token(low[i], high[i], list(zip(x[i], b[i], strict=True)), of_groups[i], routing)
        for i in range(len(low))
    ]
    many = torch.zeros_like(near)
    many[tokens] = torch.tensor(
        [sets is None for sets in by_token], dtype=torch.bool, device=many.device
    )
    most = max(len(sets or ()) for sets in by_token) or 1
    ids = first.expand(most, -1, -1).clone()
    for token, sets in zip(tokens.tolist(), by_token, strict=True):
        if sets is not None:
            every = sets + sets[:1] * (most - len(sets))
            ids[:, token] = torch.tensor(every, dtype=ids.dtype, device=ids.device)
    return ids.int(), many


def surely_before(
    ids: torch.Tensor, keys: Interval, logits: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """Mark, [S, T, K, K], the pairs of experts of ids [S, T, K] whose first is before the second."""
    low, high, x = (of_sets(t, ids) for t in (keys.low, keys.high, logits))
    b = bias[ids.long()]
    same = (x[..., :, None] == x[..., None, :]) & (b[..., :, None] == b[..., None, :])
    above = low[..., :, None] > high[..., None, :]
    return above | same & (ids[..., :, None] < ids[..., None, :])


def of_sets(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Gather x [T, E] at ids: [S, T, K]."""
    return x.expand(len(ids), -1, -1).gather(2, ids.long())


def _best(keys: Interval, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a set that may be chosen, [T, count], best first, and mark tokens [T] with others."""
    index = keys.low.sort(dim=1, descending=True, stable=True).indices[:, :count]
    floor = keys.low.gather(1, index).amin(1)
    ceiling = keys.high.scatter(1, index, -torch.inf).amax(1)
    return index, ceiling >= floor


def _group_keys(keys: Interval, routing: Routing) -> Interval:
    """Bound the groups' scores [T, G] in fp32."""
    grouped = keys.map(lambda end: end.unflatten(1, (routing.n_group or 1, -1)))
    total = grouped.map(lambda end: end.sort(-1, descending=True).values[..., :2].sum(-1))
    return total.widened(total.magnitude * U * 1.001)


def _of_token(
    low: list[float],
    high: list[float],
    inputs: Sequence[Hashable],
    groups: tuple[list[float], list[float]] | None,
    routing: Routing,
) -> list[list[int]] | None:
    """Return the sets that one token may choose, each best first; None for more than SETS."""
    experts = range(len(low))
    pools: list[Sequence[int]] = [experts]
    if groups is not None:
        size = len(low) // len(groups[0])
        # Groups of the same logits and biases, in order, have the same score in every kernel.
        alike = [tuple(inputs[i * size : (i + 1) * size]) for i in range(len(groups[0]))]
        chosen = _choices(*groups, alike, routing.topk_group or 1)
        if chosen is None:
            return None
        pools = [[e for e in experts if e // size in some] for some in chosen]
    kept: dict[frozenset[int], None] = {}
    for pool in pools:
        lows, highs = ([end[e] for e in pool] for end in (low, high))
        sets = _choices(lows, highs, [inputs[e] for e in pool], routing.top_k)
        if sets is None:
            return None
        kept |= dict.fromkeys(frozenset(pool[i] for i in some) for some in sets)
    if len(kept) > SETS:
        return None
    return [sorted(some, key=lambda e: (-low[e], e)) for some in kept]


def _choices(
    low: list[float], high: list[float], inputs: Sequence[Hashable], count: int
) -> list[frozenset[int]] | None:
    """Return the sets of `count` indices that may be the best; None for more than SETS."""
    order = sorted(range(len(low)), key=lambda i: -low[i])
    first, rest = order[:count], order[count:]
    floor = min(low[i] for i in first)
    ceiling = max((high[i] for i in rest), default=-torch.inf)
    # The others are in every set, or in none.
    pool = [i for i in first if low[i] <= ceiling] + [i for i in rest if high[i] >= floor]

    def before(i: int, j: int) -> bool:
        return low[i] > high[j] or (inputs[i] == inputs[j] and i < j)

    queue = [frozenset(first)]
    for selection in queue:
        inside = [i for i in pool if i in selection]
        outside = [i for i in pool if i not in selection]
        for a in inside:
            if any(before(a, c) for c in inside if c != a):
                continue
            for b in outside:
                if before(a, b) or any(before(c, b) for c in outside if c != b):
                    continue
                other = selection - {a} | {b}
                if other not in queue:
                    queue.append(other)
                if len(queue) > SETS:
                    return None
    return queue
