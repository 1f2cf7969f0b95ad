"""The case of a measurement: an operation at a shape, a number of tokens and a backend."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


class NotHere(Exception):
    """A case cannot run on this machine; the message is the reason."""


class WrongResult(Exception):
    """The output of a backend is wrong, so its time says nothing; the message has the figures."""


@dataclass(frozen=True)
class Prepared:
    """A call that is ready to be measured, and the work that it has to do."""

    call: Callable[[], object]
    flop: float  # multiplications and additions of its products
    moved: float  # bytes that it has to read or write, each once
    capturable: bool = True  # a CUDA graph can hold it


@dataclass(frozen=True)
class Selection:
    """Shapes, numbers of tokens and backends."""

    shapes: tuple[str, ...]
    tokens: tuple[int, ...]
    backends: tuple[str, ...]


@dataclass(frozen=True)
class Operation:
    """One operation, whose cases are all combinations of its shapes, tokens and backends."""

    name: str
    unit: str  # of `tokens`; empty if it has none
    every: Selection
    few: Mapping[str, Selection]  # by type of device: what is measured if nothing is asked for
    baseline: str | None  # the backend that others are compared with if none is asked for
    prepare: Callable[["Case", torch.device], Prepared]
    """Makes a case's call. Raises NotHere, or WrongResult after a comparison with the reference."""
    calls: int | None = None  # in one CUDA graph; None: as `clock.timer` chooses


@dataclass(frozen=True)
class Case:
    """One combination."""

    operation: Operation
    shape: str
    tokens: int  # 0: the operation has none
    backend: str

    @property
    def group(self) -> str:
        """The name of what cases of other backends are compared in."""
        return group(self.operation.name, self.operation.unit, self.shape, self.tokens)

    @property
    def id(self) -> str:
        """The part of a test's name in brackets."""
        return case_id(self.shape, self.tokens, self.backend)

    def prepare(self, device: torch.device) -> Prepared:
        """Make the call on a device.

        Raises:
            NotHere: it cannot run there.
            WrongResult: it was compared with the reference, and is wrong.
        """
        return self.operation.prepare(self, device)


def group(operation: str, unit: str, shape: str, tokens: int) -> str:
    """Return the name of a group of cases that differ in their backend alone."""
    return f"{operation}: {shape}" + (f", {tokens} {unit}" if tokens else "")


def case_id(shape: str, tokens: int, backend: str) -> str:
    """Return the part of a test's name in brackets."""
    return f"{shape}-{tokens}-{backend}"


def cases(operation: Operation, chosen: Selection) -> list[Case]:
    """Return the cases of a selection, those of one shape one after another."""
    return [
        Case(operation, shape, tokens, backend)
        for shape in chosen.shapes
        for tokens in chosen.tokens or (0,)
        for backend in chosen.backends
    ]
