"""Triton's interpreter without the work that it repeats: the same results in less time.

`install` replaces three of its functions. Triton's own patch the language anew at every call of a device
function, though the kernel that calls it has done so, and make a table of types to look up one type.
"""

# SPDX-License-Identifier: Apache-2.0
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_patched: set[frozenset[int]] = set()
"""What has been patched since the kernel that runs now began."""
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


def install() -> None:
    """Make every kernel that this process interprets from now on quicker."""
    interpreter._patch_lang = _begin
    interpreter._get_np_dtype = _np_dtype
    interpreter.InterpretedFunction.__call__ = _call
