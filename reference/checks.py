"""Checks of arguments, in one wording for every public function.

    <argument> is <what was given>; it must be <what is allowed>

A wrong Python type raises TypeError; a wrong dtype, shape, device or value raises ValueError. A check
looks at types, dtypes, shapes and devices alone, and never waits for a GPU. The checks of a tensor's
values are apart: `reads_values` says where they may run.
"""

# SPDX-License-Identifier: Apache-2.0
import math
import numbers
import os
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch

from .environment import VALUES_VARIABLE

_LONGEST = 80  # characters of a value in a message
HALVES = (torch.bfloat16, torch.float16)
FLOATS = (*HALVES, torch.float32)


def given(value: Any) -> str:
    """A value, described for a message in one short line."""
    if isinstance(value, torch.Tensor):
        return f"{name_of(value.dtype)} {list(value.shape)}"
    if isinstance(value, list | tuple | dict | set):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, int) and abs(value) >= 1 << 256:  # Python writes no more than 4,300 digits
        return f"an integer of {value.bit_length()} bits"
    text = " ".join(repr(value).split())
    if len(text) > _LONGEST:
        return f"a {type(value).__name__}"
    named = value is None or isinstance(value, bool | int | float | str | torch.dtype | range)
    return text if named else f"{text} ({type(value).__name__})"


def wrong_type(name: str, value: Any, allowed: str) -> NoReturn:
    raise TypeError(f"{name} is {given(value)}; it must be {allowed}")


def wrong_value(name: str, value: Any, allowed: str) -> NoReturn:
    raise ValueError(f"{name} is {given(value)}; it must be {allowed}")


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def any_of(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last


def tensor(
    name: str,
    value: Any,
    dtypes: Sequence[torch.dtype] = (),
    shape: Sequence[int | str] | None = None,
    *,
    like: tuple[str, torch.Tensor] | None = None,
    contiguous: bool = False,
) -> None:
    """Check a tensor.

    Args:
        dtypes: that are allowed; empty allows all.
        shape: a number for each dimension, or the name of one that may have any size; None allows all.
        like: the name of the argument, and the tensor, on whose device it must be.
        contiguous: whether it must be.
    """
    if not isinstance(value, torch.Tensor):
        wrong_type(name, value, _allowed(dtypes, shape))
    if (dtypes and value.dtype not in dtypes) or (shape is not None and not _fits(value, shape)):
        wrong_value(name, value, _allowed(dtypes, shape))
    if value.layout != torch.strided:
        layout = str(value.layout).removeprefix("torch.")
        raise ValueError(f"{name} has the layout {layout}; it must be dense (torch.strided)")
    if like is not None:
        same_device(name, value, *like)
    if contiguous and not value.is_contiguous():
        raise ValueError(f"{name} has strides {tuple(value.stride())}; it must be contiguous")


def same_device(name: str, value: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    if value.device != other.device:
        raise ValueError(
            f"{name} is on {value.device}; it must be on {other_name}'s device, {other.device}"
        )


def _fits(value: torch.Tensor, shape: Sequence[int | str]) -> bool:
    return value.dim() == len(shape) and all(
        isinstance(wanted, str) or size == wanted
        for size, wanted in zip(value.shape, shape, strict=True)
    )


def _allowed(dtypes: Sequence[torch.dtype], shape: Sequence[int | str] | None) -> str:
    parts = ["a tensor"]
    if dtypes:
        parts.append(f"of {any_of(map(name_of, dtypes))}")
    if shape is not None:
        parts.append(f"[{', '.join(map(str, shape))}]")
    return " ".join(parts)


def flag(name: str, value: Any) -> None:
    """True or False; a number or a string that is truthy is a mistake more often than not."""
    if not isinstance(value, bool):
        wrong_type(name, value, "True or False")


def integer(name: str, value: Any, least: int | None = None, most: int | None = None) -> None:
    allowed = "an integer"
    if least is not None:
        allowed += f" of at least {least}" if most is None else f" from {least} to {most}"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral | torch.SymInt):
        wrong_type(name, value, allowed)
    size: Any = value
    if (least is not None and size < least) or (most is not None and size > most):
        wrong_value(name, value, allowed)


def number(
    name: str, value: Any, allowed: str = "a finite number", *, positive: bool = False
) -> None:
    """A finite real number; `positive` leaves out 0 and below."""
    if positive:
        allowed = "a positive finite number"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        wrong_type(name, value, allowed)
    try:
        size = float(value)
    except OverflowError:  # an integer beyond fp64
        size = math.inf
    if not math.isfinite(size) or (positive and size <= 0):
        wrong_value(name, value, allowed)


def one_of(name: str, value: Any, allowed: Iterable[str]) -> None:
    """One of some names."""
    allowed = tuple(allowed)
    if not isinstance(value, str):
        wrong_type(name, value, f"one of {', '.join(allowed)}")
    if value not in allowed:
        wrong_value(name, value, f"one of {', '.join(allowed)}")


def path(name: str, value: Any) -> None:
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        wrong_type(name, value, "a path")


def strings(name: str, value: Any, allowed: str) -> None:
    """Several strings; one string is a mistake, since it would be read letter by letter."""
    if not isinstance(value, list | tuple | set) or not all(isinstance(v, str) for v in value):
        wrong_type(name, value, allowed)


def instance(name: str, value: Any, kind: type | tuple[type, ...], allowed: str) -> None:
    if not isinstance(value, kind):
        wrong_type(name, value, allowed)


def function(name: str, value: Any, allowed: str = "a function", optional: bool = False) -> None:
    """Anything that can be called; None, too, if `optional`."""
    if not callable(value) and not (optional and value is None):
        wrong_type(name, value, f"{allowed} or None" if optional else allowed)


def pair(name: str, value: Any, allowed: str) -> None:
    """A tuple or list of two."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        wrong_type(name, value, allowed)


def device(name: str, value: Any) -> torch.device:
    """A device of this machine, from what torch takes for one."""
    allowed = "a device of this machine, as cpu" + (
        " or cuda:0" if torch.cuda.is_available() else " (CUDA is not available here)"
    )
    if not isinstance(value, str | torch.device):
        wrong_type(name, value, allowed)
    try:
        found = torch.device(value)
    except RuntimeError:
        wrong_value(name, value, allowed)
    known = found.type == "cpu" or (
        found.type == "cuda"
        and torch.cuda.is_available()
        and (found.index or 0) < torch.cuda.device_count()
    )
    if not known:
        wrong_value(name, str(found), allowed)
    return found


def reads_values(*tensors: torch.Tensor, waits: bool = False) -> bool:
    """Return True if these values may be read: they are on the CPU, or the caller waits for the GPU.

    A trace, a fake tensor and a CUDA graph under capture have no values to read.

    Args:
        waits: the call waits for the GPU anyway, as preparation does once; else the variable decides.
    """
    if torch.compiler.is_compiling():
        return False
    for t in tensors:
        if t.is_meta or type(t) not in (torch.Tensor, torch.nn.Parameter):
            return False
        if t.is_cuda:
            waits = waits or os.environ.get(VALUES_VARIABLE) == "1"
            if not waits or torch.cuda.is_current_stream_capturing():
                return False
    return True


def values(name: str, value: torch.Tensor, good: torch.Tensor, allowed: str) -> None:
    """Raise unless all of `good` is true, which has the shape of `value`. It waits for the device."""
    if bool(good.all()):
        return
    bad = (~good).nonzero()
    first = bad[0].tolist()
    raise ValueError(
        f"{name}{first} is {value[tuple(first)].item()!r}, one of {len(bad)} such values of "
        f"{value.numel()}; it must be {allowed}"
    )


def finite(name: str, value: torch.Tensor) -> None:
    """Raise for a NaN or an infinity. It waits for the device."""
    values(name, value, value.isfinite(), "finite")
