"""Calls of experts that were recorded, and the same rows through other experts."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

Layer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""The experts of one layer: (x [T, H] bf16, ids [T, K], weights [T, K]) to [T, H] bf16."""


class Rows(NamedTuple):
    """The rows that one layer was given, and what it made of them."""

    x: torch.Tensor  # [T, H]
    ids: torch.Tensor  # [T, K]
    weights: torch.Tensor  # [T, K]
    y: torch.Tensor  # [T, H]

    def of(self, count: int) -> "Rows":
        return Rows(*(t[:count] for t in self))


@dataclass
class Recorder:
    """Calls of all layers, kept while `on` is true."""

    on: bool = False
    calls: list[tuple[int, Rows]] = field(default_factory=list)

    def add(self, layer: int, *tensors: torch.Tensor) -> None:
        if self.on:
            self.calls.append((layer, Rows(*(t.detach().clone() for t in tensors))))

    def taken(self) -> dict[int, Rows]:
        """Return the rows of every layer, in the order of the calls, and forget them."""
        found = {
            layer: Rows(
                *map(torch.cat, zip(*(r for n, r in self.calls if n == layer), strict=True))
            )
            for layer in sorted({n for n, _ in self.calls})
        }
        self.calls.clear()
        return found


class Count(NamedTuple):
    compared: int
    differ: int

    def __add__(self, other: tuple) -> "Count":  # type: ignore[override]
        return Count(self[0] + other[0], self[1] + other[1])


def differing(a: torch.Tensor, b: torch.Tensor) -> Count:
    """Count the elements of two tensors whose bits differ."""
    if a.dtype != b.dtype or a.shape != b.shape:
        raise ValueError(f"{a.dtype} {tuple(a.shape)} beside {b.dtype} {tuple(b.shape)}")
    if a.is_floating_point():
        kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
        a, b = a.contiguous().view(kind), b.contiguous().view(kind)
    return Count(a.numel(), int((a != b).sum()))


def again(recorded: dict[int, Rows], layers: list[Layer], batch: int | None, least: int) -> Count:
    """Run recorded rows through other experts, and count the outputs whose bits differ.

    Args:
        batch: rows of a call; None: all in one.
        least: outputs to compare, over all layers; fewer where fewer were recorded.
    """
    found = Count(0, 0)
    width = next(iter(recorded.values())).y.shape[1]
    rows_of_a_layer = -(-least // (width * len(recorded)))
    for number, rows in recorded.items():
        some = rows.of(rows_of_a_layer)
        made = [layers[number](*part[:3]) for part in _parts(some, batch)]
        found += differing(torch.cat(made), some.y)
    return found


def _parts(rows: Rows, batch: int | None) -> Iterator[Rows]:
    total = len(rows.x)
    for start in range(0, total, batch or total):
        yield Rows(*(t[start : start + (batch or total)] for t in rows))
