"""Triton's interpreter without the work that it repeats: the same results in less time.

`install` replaces five of its functions. Triton's own patch the language anew at every call of a device
function, though the kernel that calls it has done so, make a table of types to look up one type, and
check and wrap the shape of every intermediate result. It also turns off a check of every integer sum and
product, whose result Triton drops unless it debugs.
"""

# SPDX-License-Identifier: Apache-2.0
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import triton.language as tl
from triton._utils import validate_block_shape
from triton.runtime import interpreter

_patched: set[frozenset[int]] = set()
"""The functions that were patched since the kernel that runs now began."""
_patch = interpreter._patch_lang
_looked_up: dict[Any, np.dtype] = {}
_look_up = interpreter._get_np_dtype


@functools.cache
def _languages(of: Callable[..., Any]) -> frozenset[int]:
    """Return which of the language's modules a function sees: Triton patches these."""
    return frozenset(
        id(value) for value in of.__globals__.values() if value is tl or value is tl.core
    )


def _begin(kernel: Callable[..., Any]) -> Any:
    """Patch the language for a kernel; the interpreter restores it at the end of the kernel."""
    _patched.clear()
    _patched.add(_languages(kernel))
    return _patch(kernel)


def _call(self: interpreter.InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
    """Call a device function from a kernel."""
    if (
        _languages(self.fn) not in _patched
    ):  # as functions of Triton's own, which see `tl.core` alone
        _patched.add(_languages(self.fn))
        _patch(self.fn)
    try:
        return self.rewrite()(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


def _np_dtype(of: Any) -> np.dtype:
    """Return the NumPy type of a Triton type; a block has that of its elements."""
    if isinstance(of, tl.block_type):
        of = of.element_ty
    if isinstance(of, tl.pointer_type):
        return _look_up(of)
    if of not in _looked_up:
        _looked_up[of] = _look_up(of)
    return _looked_up[of]


@functools.cache
def _shape(sizes: tuple[int, ...]) -> tuple[Any, ...]:
    """Return a shape as a type has it and as a tensor has it, with the number of elements likewise."""
    number = validate_block_shape(list(sizes))
    constants = tl.tuple([tl.constexpr(size) for size in sizes])
    return tl.tuple(list(sizes)), number, constants, tl.constexpr(number)


def _block_type(self: tl.block_type, element_ty: tl.dtype, shape: Any) -> None:
    """Make the type of a block: the constructor of `block_type`."""
    sizes = tuple([tl.core._unwrap_if_constexpr(size) for size in shape])
    if not sizes:
        raise TypeError("0d block_type is forbidden")
    self.element_ty = element_ty
    self.shape, self.numel, *self.of_tensor = _shape(sizes)


def _tensor(self: tl.tensor, handle: Any, of: tl.dtype) -> None:
    """Make a tensor: the constructor of `tensor`."""
    self.handle, self.type, self.dtype = handle, of, of.scalar
    self.shape, self.numel = of.of_tensor if of.is_block() else _shape(())[2:]


def install() -> None:
    """Make every kernel that this process interprets from now on quicker."""
    tl.block_type.__init__ = _block_type
    tl.block_type.name = property(lambda self: f"<{self.shape}, {self.element_ty}>")
    tl.tensor.__init__ = _tensor
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    interpreter._patch_lang = _begin
    interpreter._get_np_dtype = _np_dtype
    interpreter.InterpretedFunction.__call__ = _call
