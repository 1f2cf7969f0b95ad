"""The table of operations, and the cases that a user asks for."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from ..exits import CommandError
from .case import Case, Operation, Selection, cases
from .checkpoint import CONVERT, LOAD
from .dense import DENSE
from .moe import MOE
from .quantize import QUANTIZE

OPERATIONS = {operation.name: operation for operation in (QUANTIZE, DENSE, MOE, CONVERT, LOAD)}
"""Every operation by its name, in the order in which they are measured."""
MOST_TOKENS = 2**31 - 1


def select(
    names: Sequence[str],
    device: torch.device,
    *,
    shapes: Sequence[str] = (),
    tokens: Sequence[int] = (),
    backends: Sequence[str] = (),
    baseline: str | None = None,
    everything: bool = False,
) -> list[Case]:
    """Return the cases to measure.

    Args:
        names: of operations; empty for all. Operations that have none of the named shapes or backends
            have no cases.
        device: where they are measured; it decides what is measured if nothing is named.
        shapes: parts of names of shapes, in any case of letters; empty for the usual ones.
        tokens: rows of the input; empty for the usual ones.
        backends: names; empty for the usual ones.
        baseline: a backend that is measured, too, where an operation has it; None: the operation's own
            baseline, unless backends are named.
        everything: all that an operation has, where nothing is named; on a GPU without the reference,
            which takes long there.

    Raises:
        CommandError: a shape or backend that no operation has, a number of tokens that is not from 1 to
            `MOST_TOKENS`, or no case.
    """
    chosen = [OPERATIONS[name] for name in dict.fromkeys(names)] or list(OPERATIONS.values())
    _check(chosen, shapes, tokens, backends, baseline)
    found = []
    for operation in chosen:
        every = operation.every
        usual = _everything(operation, device) if everything else operation.few[device.type]
        if tokens and not every.tokens:
            continue
        named = [s for s in every.shapes if any(part.lower() in s.lower() for part in shapes)]
        mine = [b for b in every.backends if b in backends]
        if (shapes and not named) or (backends and not mine):
            continue
        mine = mine or list(usual.backends)
        if baseline in every.backends and baseline not in mine:
            mine.append(baseline)
        selection = Selection(
            tuple(named or usual.shapes), tuple(dict.fromkeys(tokens or usual.tokens)), tuple(mine)
        )
        found += cases(operation, selection)
    if not found:
        raise CommandError("no operation has these shapes, tokens and backends together")
    return found


def _everything(operation: Operation, device: torch.device) -> Selection:
    every = operation.every
    if device.type == "cpu":
        return every
    return replace(every, backends=tuple(b for b in every.backends if b != "reference"))


def _check(
    chosen: Sequence[Operation],
    shapes: Sequence[str],
    tokens: Sequence[int],
    backends: Sequence[str],
    baseline: str | None,
) -> None:
    known_shapes = _names(o.every.shapes for o in chosen)
    for part in shapes:
        if not any(part.lower() in name.lower() for name in known_shapes):
            told = "; ".join(known_shapes)
            raise CommandError(f"--shape is {part!r}; it must be in the name of a shape: {told}")
    known = _names(o.every.backends for o in chosen)
    named = [("--backend", name) for name in backends]
    named += [("--baseline", baseline)] if baseline is not None else []
    for option, name in named:
        if name not in known:
            raise CommandError(f"{option} is {name!r}; it must be among {'; '.join(known)}")
    for count in tokens:
        if not 1 <= count <= MOST_TOKENS:
            raise CommandError(f"--tokens is {count}; it must be from 1 to {MOST_TOKENS}")


def _names(of_operations: Iterable[tuple[str, ...]]) -> list[str]:
    """Return each name once, in their order."""
    return list(dict.fromkeys(name for names in of_operations for name in names))
