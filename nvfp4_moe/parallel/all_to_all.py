"""Send tokens to the ranks of their experts, and rows back, by all-to-all.

A token goes once to each rank that holds one of its experts, already quantized:

    H/2 bytes of codes, H/16 of block scales, 4 of its per-token scale, 4 K of its expert ids

0.5625 bytes an element, where bf16 takes 2. Routing weights stay: the row of each (token, slot) comes
back unweighted, bf16, and the token's own rank finalizes it in the order of one process. On both sides
slots are sorted by (the token's rank, token, slot), so that rows need no labels.
"""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..reference.moe.hidden_states import Activations
from ..reference.recipe import BLOCK_SIZE
from .rank_check import Group


def packed_bytes(hidden_size: int, top_k: int, per_token: bool = True) -> int:
    """Return the number of bytes that are sent for a token."""
    return hidden_size // 2 + hidden_size // BLOCK_SIZE + 4 * per_token + 4 * top_k


@dataclass(frozen=True)
class Arrived:
    """The tokens of every rank that have a local expert, by the token's rank."""

    activations: Activations  # of the padded hidden size
    ids: torch.Tensor  # [N, K] int32, global
    token: torch.Tensor  # [S], slot [S]: the slots of local experts
    slot: torch.Tensor
    slots_of: list[int]  # how many of them each rank's tokens have


@dataclass(frozen=True)
class Exchange:
    """The ranks that this rank's tokens go to; experts are in contiguous ranges, rank after rank."""

    group: Group
    ids: torch.Tensor  # [T, K] int32, global
    starts: (
        torch.Tensor
    )  # [ranks + 1] int64 on the ids' device: first expert of each rank, and the end
    rank: int
    token: torch.Tensor  # [N]: which tokens are sent, by rank
    sent: list[int]  # how many to each rank
    permuted: torch.Tensor  # [T * K] int32: place of a slot's row among those that return; -1: none
    returning: list[int]  # how many from each rank

    @staticmethod
    def of(ids: torch.Tensor, counts: list[int], group: Group) -> "Exchange":
        """Args:
        counts: how many experts each rank holds.
        """
        starts = torch.tensor([0, *counts], dtype=torch.int64, device=ids.device).cumsum(0)
        ranks = torch.arange(len(counts), dtype=torch.int64, device=ids.device)[:, None, None]
        on_rank = torch.searchsorted(starts, ids.long(), right=True)[None] - 1 == ranks  # [R, T, K]
        token = on_rank.any(2).nonzero()[:, 1]
        place = on_rank.flatten().cumsum(0) - 1
        permuted = torch.where(on_rank, place.view(on_rank.shape), -1).amax(0).flatten()
        sent, returning = torch.stack([on_rank.any(2).sum(1), on_rank.sum((1, 2))]).tolist()
        return Exchange(
            group, ids, starts, dist.get_rank(group), token, sent, permuted.int(), returning
        )

    def dispatch(self, a: Activations, hidden_size: int) -> Arrived:
        """Send codes, scales and ids of this rank's tokens; collect those that have experts here.

        Args:
            a: [T, padded hidden size], quantized; the padding, which is zero, stays.
        """
        width = a.hidden_states.shape[1] * 2
        blocks = width // BLOCK_SIZE
        assert a.block_scales is not None
        scales = a.block_scales.view(torch.uint8).view(-1, blocks)[:, : hidden_size // BLOCK_SIZE]
        parts = [a.hidden_states[:, : hidden_size // 2], scales]
        if a.per_token_scale is not None:
            parts.append(a.per_token_scale[:, None].contiguous().view(torch.uint8))
        parts.append(self.ids.contiguous().view(torch.uint8))
        rows = torch.cat([part[self.token] for part in parts], 1)

        device = self.ids.device
        counts = torch.tensor(self.sent, dtype=torch.int64, device=device)
        theirs = torch.empty_like(counts)
        dist.all_to_all_single(theirs, counts, group=self.group)
        arriving = theirs.tolist()
        found = rows.new_empty(sum(arriving), rows.shape[1])
        dist.all_to_all_single(found, rows, arriving, self.sent, group=self.group)

        codes, sf, *token_scale, ids = found.split([part.shape[1] for part in parts], 1)
        pad = torch.nn.functional.pad
        activations = Activations(
            pad(codes, (0, width // 2 - codes.shape[1])).contiguous(),
            pad(sf, (0, blocks - sf.shape[1])).contiguous().view(torch.float8_e4m3fn),
            _words(token_scale[0], torch.float32)[:, 0] if token_scale else None,
        )
        return self._arrived(activations, _words(ids, torch.int32), arriving)

    def _arrived(self, a: Activations, ids: torch.Tensor, arriving: list[int]) -> Arrived:
        here = (ids >= self.starts[self.rank]) & (ids < self.starts[self.rank + 1])
        token, slot = here.nonzero(as_tuple=True)
        slots_of = torch.stack([part.sum() for part in here.split(arriving)])
        return Arrived(a, ids, token, slot, slots_of.tolist())

    def returned(self, rows: torch.Tensor, arrived: Arrived) -> torch.Tensor:
        """Return the rows [P, H] bf16 of this rank's slots, which `permuted` names.

        Args:
            rows: [S, H] bf16, of `arrived`'s slots.
        """
        back = rows.new_empty(sum(self.returning), rows.shape[1])
        splits = self.returning, arrived.slots_of
        dist.all_to_all_single(back, rows.contiguous(), *splits, group=self.group)
        return back


def _words(parts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return columns of a packed row as numbers of four bytes."""
    return parts.clone(memory_format=torch.contiguous_format).view(dtype)
