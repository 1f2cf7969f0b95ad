"""The form of a call: all on which its launches depend, but the addresses of its tensors.

It is the form of each tensor (dtype, shape, strides, device, alignment), every other argument with its
type, the environment variables that a call reads, the current GPU, and whether torch fills new memory.
There are two ways to compare forms, and they agree. A *key* is equal for calls of one form; it is made
anew for each call. A *guard* is the text of a function that tests whether a call has one known form. It
is many times as fast, since it compares most values by identity, and all tensors in one call of C++.
"""

# SPDX-License-Identifier: Apache-2.0
import enum
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, is_dataclass
from types import NoneType
from typing import Any

import torch

from .. import environment
from ..attributes import reader

STARTS = 64
"""Tensors may start differently if this many bytes lie between: no rule asks for more alignment."""
PLAIN: set[type] = {int, bool, str, NoneType, torch.dtype}
"""The types of arguments that are compared by their value. A float is not: -0.0 equals 0.0."""
_EQUAL_APART = (int, str, float)
"""The types of which equal values may be different objects. Of the others a value is one object."""
_TENSORS = (torch.Tensor, torch.nn.Parameter)
_PARTS: dict[type, Callable[[Any], Iterable[Any]]] = {tuple: iter, list: iter}
"""By type, a function that returns the parts of a value: a dataclass has its fields."""
_END = object()
"""The end of a container's parts in a key."""
_TensorGuards: Any = getattr(torch._C._dynamo.guards, "TensorGuards", None)
"""torch.compile's comparison of tensors with known ones, by all that dispatch and kernels depend on:
type, dtype, shape, strides, device, need of a gradient, and the keys of dispatch. A transform or a trace
that is active changes the keys; not every mode does. None: this torch has another one."""
missed = object()
"""The result of a guarded function for a call of another form."""


class NotKeptError(Exception):
    """The call has an argument by which no call is kept."""


def key_of(
    run: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], list[torch.Tensor]]:
    """Return what is equal for `run(*args, **kwargs)` of one form, and the tensors of the call.

    Raises:
        NotKeptError: the call needs a gradient, or has an argument of another type.
        RuntimeError: a tensor has no strides or no address.
    """
    tensors: list[torch.Tensor] = []
    filled = torch.are_deterministic_algorithms_enabled()  # as new memory then may be
    key: list[Any] = [run, torch._C._cuda_getDevice(), filled, environment.of_calls(), *kwargs]
    _take(args, tensors, key)
    _take(kwargs.values(), tensors, key)
    return tuple(key), tensors


def _take(values: Iterable[Any], tensors: list[torch.Tensor], key: list[Any]) -> None:
    """Add arguments to the key, and their tensors to `tensors`."""
    for value in values:
        kind = type(value)
        if kind in PLAIN:
            key += (kind, value)
        elif kind is float:
            key += (kind, value or repr(value))  # "0.0" or "-0.0", which are equal as numbers
        elif kind in _TENSORS:
            if value.requires_grad and torch.is_grad_enabled():
                raise NotKeptError
            tensors.append(value)
            start = value.data_ptr() % STARTS
            key += (value.dtype, value.shape, value.stride(), value.device, start)
        elif (parts := _PARTS.get(kind)) is not None:
            key.append(kind)
            _take(parts(value), tensors, key)
            key.append(_END)
        else:
            _learn(kind)
            _take((value,), tensors, key)


def _learn(kind: type) -> None:
    """Note how values of a type are compared; raise if they have none of these ways."""
    if issubclass(kind, enum.Enum):
        PLAIN.add(kind)
    elif is_dataclass(kind) and kind.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        _PARTS[kind] = reader(*(f.name for f in fields(kind)))
    else:
        raise NotKeptError


def _same(value: Any, known: Any) -> bool:
    """Return True for a value and a known one, of `_EQUAL_APART`, that are equal in a key."""
    if type(value) is not type(known) or value != known:
        return False
    return bool(value) or repr(value) == repr(known)  # -0.0 equals 0.0


class Guard:
    """The text that tests whether a call has the form of a known one, and names what it is given.

    The text is the body of a function of `args` and `kwargs`. It returns `missed` if the call has
    another form. Else it goes on, with the tensors of the call as `t0`, `t1` ..., in the order of
    `key_of`, and their addresses as `g0`, `g1` ...

    Args:
        args, kwargs: of the known call, of which `key_of` has made a key.
    """

    possible = _TensorGuards is not None
    """False: this torch cannot compare tensors as the text does."""

    def __init__(self, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        self.scope: dict[str, Any] = {
            "same": _same,
            "modes": torch._C._len_torch_dispatch_stack,
            "gpu": torch._C._cuda_getDevice,
            "fills": torch._C._get_deterministic_algorithms,
            "of_calls": environment.of_calls,
            "variables": environment.of_calls(),
            "grad_enabled": torch.is_grad_enabled,
        }
        """The values of the names in the text."""
        self._tensors: list[torch.Tensor] = []
        self._plain: list[str] = []
        self._values = 0
        names = [self._new() for _ in (*args, *kwargs)]
        now = torch._C._cuda_getDevice(), torch.are_deterministic_algorithms_enabled()
        self.lines = [
            f"if len(args) != {len(args)} or len(kwargs) != {len(kwargs)}: return missed",
            f"if modes() or gpu() != {now[0]} or fills() != {now[1]}: return missed",
            "if of_calls() != variables: return missed",
        ]
        self._unpack(names[: len(args)], "args")
        for name, keyword in zip(names[len(args) :], kwargs, strict=True):
            self.lines.append(f"{name} = kwargs.get({keyword!r}, missed)")
        self._read(names, [*args, *kwargs.values()])
        if self._plain:
            self.lines.append(f"if not ({' and '.join(self._plain)}): return missed")
        self._compare_tensors()

    def _new(self) -> str:
        self._values += 1
        return f"v{self._values}"

    def _named(self, value: Any) -> str:
        name = f"q{len(self.scope)}"
        self.scope[name] = value
        return name

    def _unpack(self, names: Sequence[str], whole: str) -> None:
        if names:
            self.lines.append(f"{', '.join(names)}, = {whole}")

    def _read(self, names: Sequence[str], values: Iterable[Any]) -> None:
        """Add what names the parts of values, and note how those without parts are compared."""
        for name, value in zip(names, values, strict=True):
            kind = type(value)
            if kind in _TENSORS:
                self.lines.append(f"t{len(self._tensors)} = {name}")
                self._tensors.append(value)
            elif kind in _PARTS:
                self._read_parts(name, value)
            else:
                known = "None" if value is None else self._named(value)
                equal = f" or same({name}, {known})" if kind in _EQUAL_APART else ""
                self._plain.append(f"({name} is {known}{equal})")

    def _read_parts(self, name: str, value: Any) -> None:
        kind, parts = type(value), list(_PARTS[type(value)](value))
        names = [self._new() for _ in parts]
        other = f"type({name}) is not {self._named(kind)}"
        if is_dataclass(kind):
            self.lines.append(f"if {other}: return missed")
            pairs = zip(names, fields(kind), strict=True)
            self.lines += [f"{part} = {name}.{f.name}" for part, f in pairs]
        else:
            self.lines.append(f"if {other} or len({name}) != {len(parts)}: return missed")
            self._unpack(names, name)
        self._read(names, parts)

    def _compare_tensors(self) -> None:
        """Add what compares the tensors with the known ones, and their addresses with a rule."""
        if not self._tensors:
            return
        first: dict[int, int] = {}  # the comparison refuses a tensor that it is given twice
        for i, t in enumerate(self._tensors):
            if (other := first.setdefault(id(t), i)) != i:
                self.lines.append(f"if t{i} is not t{other}: return missed")
        once = [self._tensors[i] for i in first.values()]
        guards = _TensorGuards(*once, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        given = ", ".join(f"t{i}" for i in first.values())
        self.lines.append(f"if not {self._named(guards.check)}({given}): return missed")
        if any(t.requires_grad for t in self._tensors):
            self.lines.append("if grad_enabled(): return missed")
        self.lines += [f"g{i} = t{i}.data_ptr()" for i in range(len(self._tensors))]
        by_start: dict[int, list[str]] = {}
        for i, t in enumerate(self._tensors):
            by_start.setdefault(t.data_ptr() % STARTS, []).append(f"g{i}")
        for start, addresses in by_start.items():
            if start == 0:
                self.lines.append(f"if ({' | '.join(addresses)}) % {STARTS}: return missed")
            else:
                others = " or ".join(f"{g} % {STARTS} != {start}" for g in addresses)
                self.lines.append(f"if {others}: return missed")
