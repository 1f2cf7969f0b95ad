"""Calls of the kernel that counts calls and copies rows of those that are due."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from nvfp4_moe import host
from nvfp4_moe.kernels.moe.row_samples.buffer import RowBuffer, row_numbers, take_rows

from ..calls import Answered, Call
from .numbers import seeded
from .part_calls import exactly

Tensor = torch.Tensor
_ROWS, _PERIOD, _PHASE = 3, 4, 2


@dataclass(frozen=True)
class TakeRowsCall:
    """Seven calls, of which the first, the third and the last are due; rows wider than a chunk."""

    tokens: int = 5
    columns: int = 2100

    def _tensors(self, number: int) -> tuple[Tensor, ...]:
        g, shape = seeded(number), (self.tokens, self.columns)
        states, output = (host.normal(g, *shape).bfloat16() for _ in range(2))
        ids = host.integers(g, 0, 99, (self.tokens, 3)).int()
        # Rows that do not follow one another.
        return states, ids, host.normal(g, self.tokens, 5)[:, :3], output[:, : self.columns - 20]

    def answer(self, device: str = "cpu") -> list[Tensor]:
        found = []
        buffer = RowBuffer.like(_ROWS, *(t.to(device) for t in self._tensors(0)))
        for number in range(7):
            tensors = tuple(t.to(device) for t in self._tensors(number))
            take_rows(buffer, tensors, _PERIOD, _PHASE)
            found += [t.to("cpu", copy=True) for t in (buffer.counts, *buffer.rows)]
        return found

    def judge(self) -> Answered:
        want, samples = [], 0
        for number in range(7):
            if number in (0, 2, 6):
                rows = row_numbers(samples, _ROWS, self.tokens)
                tensors = self._tensors(number)
                taken = [t[rows] for t in tensors]
                padding = _ROWS - len(rows)
                kept = [torch.nn.functional.pad(t, (0, 0, 0, padding)) for t in taken]
                samples += 1
            counts = [number + 1, samples, samples, self.tokens, rows[0]]
            want += [torch.tensor(counts, dtype=torch.int64, device="cpu"), *kept]
        return exactly(want)


def named() -> Iterator[tuple[str, Callable[[], Call]]]:
    yield "rows taken", TakeRowsCall
    yield "rows taken, two tokens", lambda: TakeRowsCall(2, 60)
