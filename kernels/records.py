"""Calls that repeat: the launches of a call are kept, and made again for other tensors of the same form.

The Python before the launches takes far longer than the launches: it checks arguments, chooses a
backend, chooses tiles, allocates. Its outcome depends on the *key* of a call alone: the form of each
tensor (dtype, shape, strides, device, alignment), every other argument with its type, the environment
variables that a call reads, and the current GPU. The second call of a key is recorded. Later ones take
their addresses from their own tensors, allocate, and launch. Nothing is kept of a tensor but its form.

Recorded is a call that does nothing on the GPU but launch kernels by `launcher.launch`, copy a given
tensor, and write a result into one. One that runs another operation of torch is never recorded, nor one
under `torch.compile`, a dispatch mode or a transform of torch.func, nor one that needs a gradient, nor
one whose launches a profiler watches, nor one that a CUDA graph captures, which checks no values. A call
that is captured is launched from a record that was made before.
"""

# SPDX-License-Identifier: Apache-2.0
import enum
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from types import NoneType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import environment
from .attributes import reader

MOST_BYTES = 8 << 20
"""The most bytes of memory that a recorded call uses beside its results. All of it is held until the
last launch; a larger call, whose host time does not matter, gives memory back between its steps."""
_MOST_KEPT = 1024
_ALIGNMENT = 256
_STARTS = 64
"""Tensors may start differently if this many bytes lie between: no rule asks for more alignment."""
_END = object()
"""The end of a container's parts in a key."""

PLAIN: set[type] = {int, bool, str, NoneType, torch.dtype}
"""The types of arguments that are compared by their value. A float is not: -0.0 equals 0.0."""
_ALLOCATING = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.new_empty.default,
}
_COPYING = {
    torch.ops.aten.constant_pad_nd.default,
    torch.ops.aten.clone.default,
    torch.ops.aten._to_copy.default,
}
"""Operations that make a new tensor of one, and are run again."""

enabled = environment.records_wanted()
"""False: no call is recorded or repeated."""
_direct: Callable[[], bool] | None = None
_kept: dict[Any, Any] = {}
_local = threading.local()


class _NotKeptError(Exception):
    """The call has an argument by which no call is kept."""


def can_launch(directly: Callable[[], bool]) -> None:
    """Let calls be recorded: `directly` says whether kernels are launched without Triton's own code."""
    global _direct
    _direct = directly


def forget() -> None:
    """Drop every record: something was changed that chooses backends or tiles.

    A call that another thread records meanwhile goes into the dictionary that it began with, since it
    may have made its choices before the change.
    """
    global _kept
    _kept = {}


def serve() -> bool:
    """Return True if a call may be recorded and repeated here and now."""
    return (
        enabled
        and _direct is not None
        and _direct()
        and torch.cuda.is_initialized()  # never in a fork of a process that used the GPU
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch._C._is_tracing()
    )


def repeat(run: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Return what `run(*args, **kwargs)` does, from its record if there is one."""
    tensors: list[torch.Tensor] = []
    key: list[Any] = [run, torch.cuda.current_device(), *environment.of_calls(), *kwargs]
    try:
        _take(args, tensors, key)
        _take(kwargs.values(), tensors, key)
    except (_NotKeptError, RuntimeError):  # a tensor without strides or address
        return run(*args, **kwargs)
    found, known = tuple(key), _kept
    kept = known.get(found)
    if kept is None:
        result = run(*args, **kwargs)  # a call that raises leaves no key
        if len(known) >= _MOST_KEPT:
            forget()
        else:
            known[found] = _seen
        return result
    if kept is _seen:
        if torch.cuda.is_current_stream_capturing():
            return run(*args, **kwargs)
        result, known[found] = _record(run, args, kwargs, tensors)
        return result
    result = kept(tensors)
    return run(*args, **kwargs) if result is None else result


def _seen(tensors: list[torch.Tensor]) -> None:
    """Stand for the record of a call that was made once."""


def _never(tensors: list[torch.Tensor]) -> None:
    """Stand for the record of a call that cannot be recorded."""


_PARTS: dict[type, Callable[[Any], Iterable[Any]]] = {tuple: iter, list: iter}
"""By type, a function that returns the parts of a value: a dataclass has its fields."""


def _take(values: Iterable[Any], tensors: list[torch.Tensor], key: list[Any]) -> None:
    """Add arguments to the key, and their tensors to `tensors`."""
    for value in values:
        kind = type(value)
        if kind in PLAIN:
            key += (kind, value)
        elif kind is float:
            key += (kind, value or repr(value))  # "0.0" or "-0.0", which are equal as numbers
        elif kind is torch.Tensor or kind is torch.nn.Parameter:
            if value.requires_grad and torch.is_grad_enabled():
                raise _NotKeptError
            tensors.append(value)
            start = value.data_ptr() % _STARTS
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
        raise _NotKeptError


def refuse(reason: str) -> None:
    """Say that a call that is being recorded, if any, cannot be."""
    if (recorder := current()) is not None:
        recorder.refuse(reason)


def current() -> "Recorder | None":
    """Return the recorder of this thread while it records."""
    return getattr(_local, "recorder", None)


def _record(
    run: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    tensors: list[torch.Tensor],
) -> tuple[Any, Callable[[list[torch.Tensor]], Any]]:
    """Return the result of a call, and its record."""
    recorder = _local.recorder = Recorder(tensors)
    try:
        with recorder:
            result = run(*args, **kwargs)
    finally:
        _local.recorder = None
    return result, recorder.made(result)


@dataclass(frozen=True)
class Described:
    """A descriptor of memory, as an argument of a launch."""

    address: int
    at: Callable[[int], Sequence[Any]]
    """Returns the arguments that stand for the descriptor, by the address that it describes."""


@dataclass(frozen=True)
class _Memory:
    """Memory that a call was given, or that it allocated."""

    name: str  # of its address, in the text of a record
    address: int
    nbytes: int
    device: torch.device

    def holds(self, address: int) -> bool:
        return self.address <= address < self.address + self.nbytes


def _extent(t: torch.Tensor) -> int:
    """Return the bytes from a tensor's first element to its last."""
    if t.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return (last + 1) * t.element_size()


class Recorder(TorchDispatchMode):
    """Notes what a call launches and allocates, while it runs.

    Args:
        tensors: the tensors of the call.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.tensors = tensors
        self.given = [
            _Memory(f"g{i}", t.data_ptr(), _extent(t), t.device) for i, t in enumerate(tensors)
        ]
        self.allocated: list[_Memory] = []
        self.copies: dict[str, torch.Tensor] = {}
        """The memory that holds copies of given tensors, and the copies."""
        self.returned: dict[str, torch.Tensor] = {}
        """The memory that is a tensor of its own, in the form of these: results."""
        self.launches: list[list[str]] = []
        """The function and the arguments of each launch, as text."""
        self.lines: list[str] = []
        """The text of the launches and copies, in order."""
        self.scope: dict[str, Any] = {}
        """The values of the names in the text."""
        self.read: set[str] = set()
        """The names of the given memory that the launches read."""
        self.refusal: str | None = None
        """Why the call cannot be repeated."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATING:
            self._allocate(result)
        elif func in _COPYING and (source := self._given(args[0])) is not None:
            copy = self._allocate(result)
            rest = [f"*{self._named(args[1:])}", f"**{self._named(kwargs or {})}"]
            self.lines.append(f"r{copy} = {self._named(func)}({', '.join([source, *rest])})")
            self.lines.append(f"{copy} = r{copy}.data_ptr()")
            self.copies[copy] = result
        elif func is torch.ops.aten.copy_.default and (target := self._given(args[0])) is not None:
            self.lines.append(f"{target}.copy_({self._result(args[1])})")
        elif not func.is_view:
            self.refuse(f"it runs {func}")
        return result

    def launched(
        self,
        call: Callable[..., None],
        grid: tuple[int, int],
        device: int,
        before: Sequence[Any],
        values: Sequence[Any],
        rest: int,
    ) -> None:
        """Note a launch: `call` takes three counts of programs, the stream, `before` and the arguments.

        Args:
            device: the number of the GPU.
            values: the arguments before the constants: tensors, numbers, None, `Described`.
            rest: the number of constants, for each of which None stands.
        """
        self.scope["device"] = device
        made = [*map(str, grid), "1", "stream", *map(self._text, (*before, *values))]
        made += ["None"] * rest
        function = self._named(call)
        self.launches.append([function, *made])
        self.lines.append(f"{function}({', '.join(made)})")

    def written(self, t: torch.Tensor) -> None:
        """Note that an op writes a tensor, which torch counts, and autograd asks for."""
        if (target := self._given(t)) is not None:
            count = self._named(torch.autograd.graph.increment_version)
            self.lines.append(f"{count}({target})")
        elif not any(m.holds(t.data_ptr()) for m in self.allocated):
            self.refuse("it writes a part of a given tensor")

    def _allocate(self, t: torch.Tensor) -> str:
        """Note new memory; return the name of its address."""
        name = f"a{len(self.allocated)}"
        self.allocated.append(_Memory(name, t.data_ptr(), t.nbytes, t.device))
        return name

    def _given(self, value: Any) -> str | None:
        """Return the text of a tensor that the call was given, or None."""
        return next((f"t[{i}]" for i, t in enumerate(self.tensors) if value is t), None)

    def refuse(self, reason: str) -> None:
        """Note why the call cannot be repeated; the first reason is kept."""
        self.refusal = self.refusal or reason

    def _named(self, value: Any) -> str:
        name = f"c{len(self.scope)}"
        self.scope[name] = value
        return name

    def _text(self, value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return self._place(value.data_ptr())
        if isinstance(value, Described):
            return f"*{self._named(value.at)}({self._place(value.address)})"
        return repr(value) if value is None or type(value) is int else self._named(value)

    def _place(self, address: int) -> str:
        # Memory that was given back may have been allocated again: the latest has it.
        for memory in (*reversed(self.allocated), *self.given):
            if memory.holds(address):
                self.read.add(memory.name)
                offset = address - memory.address
                return f"{memory.name} + {offset}" if offset else memory.name
        self.refuse("it reads memory that it was not given")
        return "0"

    def made(self, result: Any) -> Callable[[list[torch.Tensor]], Any]:
        """Return the record: a function of a call's tensors, which returns None where it does not serve.

        Args:
            result: the result of the call.
        """
        text = self._result(result)
        sizes = [-(-m.nbytes // _ALIGNMENT) * _ALIGNMENT for m in self.allocated]
        tensors = self.returned.keys() | self.copies.keys()
        own = [m for m in self.allocated if m.name not in tensors]
        total = sum(size for m, size in zip(self.allocated, sizes, strict=True) if m in own)
        devices = {m.device for m in self.allocated}
        if self.refusal is not None or not self.launches or total > MOST_BYTES or len(devices) > 1:
            return _never
        overlapping = self._overlapping()
        self.read.update(m.name for pair in overlapping for m in pair)
        lines = [
            f"{m.name} = t[{i}].data_ptr()" for i, m in enumerate(self.given) if m.name in self.read
        ]
        for first, second in overlapping:
            apart = second.address - first.address
            lines.append(f"if {second.name} - {first.name} != {apart}: return None")
        self.scope |= {"empty": torch.empty, "stream_of": torch._C._cuda_getCurrentRawStream}
        for name, t in self.returned.items():
            like = (tuple(t.shape), t.dtype, t.device)
            shape, dtype, where = (self._named(value) for value in like)
            lines.append(f"r{name} = empty({shape}, dtype={dtype}, device={where})")
            lines.append(f"{name} = r{name}.data_ptr()")
        if total:
            where, dtype = self._named(devices.pop()), self._named(torch.uint8)
            lines.append(f"memory = empty({total}, dtype={dtype}, device={where})")
            lines.append("start = memory.data_ptr()")
        offset = 0
        for m, size in zip(self.allocated, sizes, strict=True):
            if m in own and size:
                lines.append(f"{m.name} = start + {offset}")
                offset += size
        lines.append("stream = stream_of(device)")
        body = "\n    ".join([*lines, *self.lines, f"return {text}"])
        exec(f"def record(t):\n    {body}\n", self.scope)
        record: Callable[[list[torch.Tensor]], Any] = self.scope["record"]
        return record

    def _overlapping(self) -> list[tuple[_Memory, _Memory]]:
        """Return pairs of given tensors that share memory: an address does not tell which is meant."""
        return [
            (first, second)
            for i, first in enumerate(self.given)
            for second in self.given[i + 1 :]
            if first.address < second.address + second.nbytes
            and second.address < first.address + first.nbytes
        ]

    def _result(self, result: Any) -> str:
        """Return the text of a result; memory that it is in becomes a tensor of its own."""
        if type(result) in (tuple, list):
            parts = "".join(f"{self._result(part)}, " for part in result)
            return f"({parts})" if type(result) is tuple else f"[{parts}]"
        if (given := self._given(result)) is not None:
            return given
        if isinstance(result, torch.Tensor) and result.is_contiguous():
            for m in reversed(self.allocated):
                if m.address == result.data_ptr() and m.nbytes == result.nbytes > 0:
                    own = self.copies.get(m.name)
                    own = self.returned.setdefault(m.name, result) if own is None else own
                    if (own.dtype, own.shape) != (result.dtype, result.shape):
                        break  # memory in two forms, of which it becomes a tensor of one
                    return f"r{m.name}"
        self.refuse("its result is no memory that it allocated")
        return "None"


def inside(body: Callable[..., Any]) -> Callable[..., Any]:
    """Return the rule by which a recorder looks into an op of ours: it runs the op's own function."""

    def rule(
        recorder: Recorder, func: Any, types: Any, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Any:
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.is_write and value is not None:
                recorder.written(value)
        with recorder:
            return body(*args, **kwargs)

    return rule
