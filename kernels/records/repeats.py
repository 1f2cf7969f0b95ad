"""Calls that repeat: each is counted, recorded the second time, and then launched from its record."""

# SPDX-License-Identifier: Apache-2.0
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import environment
from ..dispatch import unwatched
from .form import Guard, NotKeptError, key_of, missed
from .recorder import Body, record

_MOST_KEPT = 1024
_MOST_TRIED = 8
"""So many guards are tried before the key is made, which takes as long as about ten of them."""
_MOST_GUARDS = 4
"""A record has up to this many guards: a call in inference mode, or with a Parameter in the place of a
tensor, has the same key and needs another one."""

enabled = environment.records_wanted()
"""False: no call is recorded or repeated."""

_Guarded = Callable[[Sequence[Any], dict[str, Any]], Any]
"""It takes args and kwargs, and returns the result, or `missed` for a call of another form."""


def _not_yet() -> bool:
    return False


_direct: Callable[[], bool] = _not_yet


class Record:
    """The launches of a form.

    Args:
        body: their text; None for a form that cannot be recorded.
    """

    def __init__(self, body: Body | None) -> None:
        self._body = body
        self._left = _MOST_GUARDS
        self.repeat = _never if body is None else body.function()
        """Takes the tensors of a call; returns the result, or `missed` where the record cannot serve."""

    def guarded(self, args: Sequence[Any], kwargs: dict[str, Any]) -> _Guarded | None:
        """Return the record behind a guard that lets this call pass; None if it has enough of them."""
        if self._body is None or not self._left or not Guard.possible:
            return None
        self._left -= 1
        return self._body.guarded(Guard(args, kwargs))


def _never(tensors: Sequence[torch.Tensor]) -> Any:
    return missed


@dataclass
class _Known:
    """The records since the last change of what chooses backends or tiles."""

    records: dict[Any, Record | None] = field(default_factory=dict)
    """By key; None for a call that was made once."""
    guarded: dict[tuple[Callable[..., Any], int], Sequence[_Guarded]] = field(default_factory=dict)
    """By function and number of elements of the first tensor, records to try; the latest comes first."""

    def add(self, run: Callable[..., Any], size: int, guarded: _Guarded) -> None:
        self.guarded[run, size] = (guarded, *self.guarded.get((run, size), ()))[:_MOST_TRIED]


_known = _Known()


def can_launch(directly: Callable[[], bool]) -> None:
    """Let calls be recorded: `directly` says whether kernels are launched without Triton's own code."""
    global _direct
    _direct = directly


def forget() -> None:
    """Drop every record: something was changed that chooses backends or tiles.

    A call that another thread records meanwhile goes to what was known when it began, since it may have
    made its choices before the change.
    """
    global _known
    _known = _Known()


# A fork of a process that used the GPU cannot use it. So `repeat` need not ask before it launches.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forget)


def serve() -> bool:
    """Return True if a call may be recorded and repeated here and now."""
    return enabled and _direct() and torch.cuda.is_initialized() and unwatched()


def repeat(run: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Return what `run(*args, **kwargs)` does, from its record if there is one."""
    if not enabled or not _direct():
        return run(*args, **kwargs)
    known = _known
    first = args[0] if args else next(iter(kwargs.values()), None)
    size = first.numel() if type(first) is torch.Tensor else 0
    for guarded in known.guarded.get((run, size), ()):
        result = guarded(args, kwargs)
        if result is not missed:
            return result
    if not serve():
        return run(*args, **kwargs)
    return _by_key(known, size, run, args, kwargs)


def _by_key(
    known: _Known,
    size: int,
    run: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
) -> Any:
    """Do what `repeat` does, for a call that passes no guard."""
    try:
        key, tensors = key_of(run, args, kwargs)
    except (NotKeptError, RuntimeError):  # a tensor without strides or address
        return run(*args, **kwargs)
    if key not in known.records:
        result = run(*args, **kwargs)  # a call that raises leaves no key
        if len(known.records) >= _MOST_KEPT:
            forget()
        else:
            known.records[key] = None
        return result
    kept = known.records[key]
    if kept is None:
        if torch.cuda.is_current_stream_capturing():
            return run(*args, **kwargs)
        result, body = record(run, args, kwargs, tensors)
        known.records[key] = Record(body)
        return result
    if (guarded := kept.guarded(args, kwargs)) is not None:
        known.add(run, size, guarded)
    result = kept.repeat(tensors)
    return run(*args, **kwargs) if result is missed else result
