"""Record a call: note what it launches and allocates, and write that as the text of a function."""

# SPDX-License-Identifier: Apache-2.0
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .form import Guard, missed

MOST_BYTES = 8 << 20
"""The most bytes of memory that a recorded call uses beside its results. All of it is held until the
last launch; a larger call, whose host time does not matter, gives memory back between its steps."""
_ALIGNMENT = 256

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

_ALLOCATORS: dict[str, Callable[..., torch.Tensor]] = {
    kind: getattr(torch._C._dynamo.guards, f"_empty_strided_{kind}")
    for kind in ("cuda", "cpu")
    if hasattr(torch._C._dynamo.guards, f"_empty_strided_{kind}")
}
"""By type of device, what code of inductor allocates by: on the current GPU, in half the time of
`torch.empty`. It takes shape, strides and dtype. It does not fill memory where torch is asked to."""

_local = threading.local()


def refuse(reason: str) -> None:
    """Say that a call that is being recorded, if any, cannot be."""
    if (recorder := current()) is not None:
        recorder.refuse(reason)


def current() -> "Recorder | None":
    """Return the recorder of this thread while it records."""
    return getattr(_local, "recorder", None)


def record(
    run: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    tensors: Sequence[torch.Tensor],
) -> tuple[Any, "Body | None"]:
    """Return the result of a call, and the text of its launches; None if it cannot be repeated."""
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
    firsts: Mapping[int, Any]
    """Has the first of the arguments that stand for it, by the address that it describes."""
    rest: Sequence[Any]
    """The others: shape and strides."""


@dataclass(frozen=True)
class Body:
    """The text of the launches, of which functions are made.

    It reads tensors of the call as `t0`, `t1` ..., and their addresses as `g0`, `g1` ...
    """

    tensors: int
    """The number of tensors of the call."""
    read: Sequence[int]
    """The numbers of the addresses that the text reads."""
    lines: Sequence[str]
    scope: dict[str, Any]
    """The values of the names in the text."""

    def function(self) -> Callable[[Sequence[torch.Tensor]], Any]:
        """Return a function of a call's tensors; it returns `missed` where it does not serve."""
        given = [f"t{i}" for i in range(self.tensors)]
        lines = [f"{', '.join(given)}, = tensors"] if given else []
        lines += [f"g{i} = t{i}.data_ptr()" for i in self.read]
        return self._compiled("tensors", lines, {})

    def guarded(self, guard: Guard) -> Callable[[Sequence[Any], dict[str, Any]], Any]:
        """Return a function of `args` and `kwargs`; it returns `missed` where it does not serve."""
        return self._compiled("args, kwargs", guard.lines, guard.scope)

    def _compiled(self, takes: str, lines: Sequence[str], scope: dict[str, Any]) -> Any:
        text = "\n    ".join([f"def repeated({takes}):", *lines, *self.lines])
        assert not scope.keys() & self.scope.keys()
        made = {"missed": missed, **scope, **self.scope}
        exec(text, made)
        return made["repeated"]


@dataclass(frozen=True)
class _Memory:
    """Memory that a call was given, or that it allocated."""

    name: str  # of its address, in the text of a record
    address: int
    nbytes: int
    device: torch.device

    def holds(self, address: int) -> bool:
        return self.address <= address < self.address + self.nbytes


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


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
        return next((f"t{i}" for i, t in enumerate(self.tensors) if value is t), None)

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
            first = f"{self._named(value.firsts)}[{self._place(value.address)}]"
            return ", ".join([first, *map(self._text, value.rest)])
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

    def made(self, result: Any) -> Body | None:
        """Return the text of the call; None if it cannot be repeated.

        Args:
            result: the result of the call.
        """
        text = self._result(result)
        sizes = [-(-m.nbytes // _ALIGNMENT) * _ALIGNMENT for m in self.allocated]
        tensors = self.returned.keys() | self.copies.keys()
        own = [
            (m, size)
            for m, size in zip(self.allocated, sizes, strict=True)
            if m.name not in tensors and size
        ]
        total = sum(size for _, size in own)
        devices = {m.device for m in self.allocated}
        if self.refusal is not None or not self.launches or total > MOST_BYTES or len(devices) > 1:
            return None
        lines = []
        for first, second in self._overlapping():
            self.read |= {first.name, second.name}
            apart = second.address - first.address
            lines.append(f"if {second.name} - {first.name} != {apart}: return missed")
        for name, t in self.returned.items():
            lines += self._new(f"r{name}", name, t.shape, t.dtype, t.device)
        if own:
            device = own[0][0].device
            lines += self._new("memory", "start", torch.Size([total]), torch.uint8, device)
        offset = 0
        for m, size in own:
            lines.append(f"{m.name} = start + {offset}")
            offset += size
        self.scope["stream_of"] = torch._C._cuda_getCurrentRawStream
        lines += ["stream = stream_of(device)", *self.lines, f"return {text}"]
        read = [i for i, m in enumerate(self.given) if m.name in self.read]
        return Body(len(self.tensors), read, lines, self.scope)

    def _new(
        self,
        name: str,
        address: str,
        shape: torch.Size,
        dtype: torch.dtype,
        device: torch.device,
    ) -> list[str]:
        """Return the lines that name a new contiguous tensor, and its address."""
        made, form = _ALLOCATORS.get(device.type), f"{tuple(shape)}, {_strides(shape)}"
        here = device.index in (None, self.scope["device"])
        if made is None or not here or torch.are_deterministic_algorithms_enabled():
            form = f"{tuple(shape)}, device={self._named(device)}, dtype={self._named(dtype)}"
            made = torch.empty
        else:
            form += f", {self._named(dtype)}"
        return [f"{name} = {self._named(made)}({form})", f"{address} = {name}.data_ptr()"]

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
