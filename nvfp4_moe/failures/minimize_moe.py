"""Minimizes a fused call that fails: fewer tokens, slots, experts and columns, then simpler contents.

The predicate knows what fails; it must say no of a call that its backend does not take. Where a call's
sums are exact, so that one output is right, they must stay so: its intervals stay single values.
"""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from .. import host
from ..cases.moe_case import MoECase
from ..reference.numerics import e4m3
from ..reference.recipe import BLOCK_SIZE
from .minimize import Search, fewest
from .slice_call import (
    hidden_tiles,
    intermediate_tiles,
    keep_experts,
    keep_hidden,
    keep_intermediate,
    keep_slots,
    keep_tokens,
    rebuilt,
    with_given_routing,
)

_ONE = int(e4m3.encode(host.ones()))
_BLOCK_BYTES = BLOCK_SIZE // 2


def minimize_call(
    case: MoECase, fails: Callable[[MoECase], bool], seconds: float = 60.0
) -> MoECase:
    """The smallest and simplest call found for which `fails` holds, as it does for the case.

    Args:
        seconds: no call of `fails` is begun that would probably end later.

    Raises:
        ValueError: the case does not fail.
    """
    search = Search(fails, seconds)
    search.begin(case)
    # A token's output is its own affair, so tokens go without a look at the interval.
    case = _fewest(case, _tokens(case), keep_tokens, search)
    if case.exact and not _single(case):
        return case

    if case.exact:
        search.conditions.append(_single)
    if case.logits is not None:
        case = _either(case, partial(with_given_routing, case), search)
    while True:
        before = case
        for reduce in (_smaller, _plainer, _sparser):
            case = reduce(case, search)
        if case is before or search.exhausted:
            return case


def _single(case: MoECase) -> bool:
    allowed = case.allowed()
    return bool((allowed.low == allowed.high).all())


def _tokens(case: MoECase) -> int:
    return case.activations.hidden_states.shape[0]


def _holds(search: Search, build: Callable[[], MoECase]) -> bool:
    """True if the call that `build` returns fails; a call that cannot be built does not fail."""
    if search.exhausted:
        return False
    try:
        candidate = build()
    except ValueError:
        return False
    return search(candidate)


def _either(case: MoECase, build: Callable[[], MoECase], search: Search) -> MoECase:
    """The call that `build` returns if it fails, else the case."""
    return build() if _holds(search, build) else case


def _fewest(
    case: MoECase,
    items: int | Sequence[int],
    keep: Callable[[MoECase, list[int]], MoECase],
    search: Search,
    minimum: int = 1,
) -> MoECase:
    """With the fewest of the items kept, at least `minimum`."""
    every = list(range(items)) if isinstance(items, int) else list(items)
    kept = fewest(every, lambda of: _holds(search, lambda: keep(case, of)), minimum)
    return case if len(kept) == len(every) else keep(case, kept)


def _smaller(case: MoECase, search: Search) -> MoECase:
    case = _fewest(case, _tokens(case), keep_tokens, search)
    if case.ids is not None:
        case = _fewest(case, case.routing.top_k, keep_slots, search)
        case = _fewest_experts(case, search)
    case = _fewest(case, hidden_tiles(case), keep_hidden, search)
    return _fewest(case, intermediate_tiles(case), keep_intermediate, search)


def _fewest_experts(case: MoECase, search: Search) -> MoECase:
    """Drop the experts that no id names, and then those of other ranks."""
    assert case.ids is not None
    local = set((case.ids - case.local_expert_offset).unique().tolist())
    used = [e for e in range(case.experts.num_local) if e in local]
    spare = [e for e in range(case.experts.num_local) if e not in local]

    def keep(of_case: MoECase, selected: list[int]) -> MoECase:
        kept = sorted([*used, *selected])
        offset = of_case.local_expert_offset
        return keep_experts(of_case, kept, offset)

    if spare:
        case = _fewest(case, spare, keep, search, minimum=0 if used else 1)
    fewer = keep_experts(case, range(case.experts.num_local))
    if fewer.num_experts == case.num_experts:
        return case
    return _either(case, lambda: fewer, search)


def _plainer(case: MoECase, search: Search) -> MoECase:
    """Vectors left out, scalars and scales one, where that changes nothing."""
    for changes in _plain_experts(case):
        case = _either(case, partial(_with_experts, case, changes), search)
    for given in _plain_activations(case):
        case = _either(case, partial(_with_activations, case, given), search)
    weights = case.weights
    if weights is not None and (weights != 1).any():
        case = _either(case, partial(replace, case, weights=torch.ones_like(weights)), search)
    return case


def _with_experts(case: MoECase, changes: dict[str, Any]) -> MoECase:
    return replace(case, experts=rebuilt(case.experts, **changes))


def _with_activations(case: MoECase, changes: dict[str, Any]) -> MoECase:
    return replace(case, activations=replace(case.activations, **changes))


def _plain_experts(case: MoECase) -> Iterator[dict[str, Any]]:
    e = case.experts
    for name in ("gemm1_bias", "gemm2_bias", "gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit"):
        if getattr(e, name) is not None:
            yield {name: None}
    ones = torch.ones_like(e.output1_scale_scalar)
    first = ("output1_scale_scalar", "output1_scale_gate_scalar")
    for names in (first, ("output2_scale_scalar",)):  # CuTe-DSL wants the first two alike
        if any((getattr(e, name) != 1).any() for name in names):
            yield dict.fromkeys(names, ones)
    for name in ("gemm1_weights_scale", "gemm2_weights_scale"):
        if (plain := _plain_scales(getattr(e, name))) is not None:
            yield {name: plain}


def _plain_activations(case: MoECase) -> Iterator[dict[str, Any]]:
    a = case.activations
    if a.per_token_scale is not None and (a.per_token_scale != 1).any():
        yield {"per_token_scale": torch.ones_like(a.per_token_scale)}
    if a.block_scales is not None and (plain := _plain_scales(a.block_scales)) is not None:
        yield {"block_scales": plain}


def _plain_scales(scales: torch.Tensor) -> torch.Tensor | None:
    """One where not zero; None if they are."""
    given = scales.view(torch.uint8)
    plain = torch.where(given != 0, _ONE, 0).to(torch.uint8)
    return None if torch.equal(plain, given) else plain.view(scales.dtype)


def _sparser(case: MoECase, search: Search) -> MoECase:
    """Codes zero where that changes nothing: rows of the weights, then blocks of 16 columns."""

    def of_experts(name: str, dim: int, size: int, case: MoECase, of: list[int]) -> MoECase:
        return _with_experts(case, {name: _only(getattr(case.experts, name), dim, size, of)})

    def of_states(case: MoECase, of: list[int]) -> MoECase:
        only = _only(case.activations.hidden_states, 1, columns, of)
        return _with_activations(case, {"hidden_states": only})

    for name in ("gemm2_weights", "gemm1_weights"):
        for dim, size in ((1, 1), (2, _BLOCK_BYTES)):
            present = _nonzero(getattr(case.experts, name), dim, size)
            case = _fewest(case, present, partial(of_experts, name, dim, size), search, minimum=0)
    columns = BLOCK_SIZE if case.activations.is_bf16 else _BLOCK_BYTES
    present = _nonzero(case.activations.hidden_states, 1, columns)
    return _fewest(case, present, of_states, search, minimum=0)


def _nonzero(t: torch.Tensor, dim: int, size: int) -> list[int]:
    return [i for i, part in enumerate(t.split(size, dim)) if part.any()]


def _only(t: torch.Tensor, dim: int, size: int, of: list[int]) -> torch.Tensor:
    """Zero but for some slices."""
    kept = torch.zeros_like(t)
    for i in of:
        kept.narrow(dim, i * size, size).copy_(t.narrow(dim, i * size, size))
    return kept
