"""Ops whose function is called directly, where torch's dispatcher would do nothing but call it.

The wrapper of an op takes several times as long as everything else between a checked call and its first
launch: it looks for gradients, modes and aliases, and converts every argument twice. None of that has an
effect on real tensors that need no gradient, outside of every mode, transform, trace and profile.
"""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from types import NoneType
from typing import Any

import torch

_TENSORS = (torch.Tensor, torch.nn.Parameter)
_TYPES: dict[str, tuple[type, ...]] = {
    "Tensor": _TENSORS,
    "int": (int,),
    "bool": (bool,),
    "float": (float,),
    "str": (str,),
    "ScalarType": (torch.dtype,),
}
"""By type in a schema, the types of values that the dispatcher passes on as they are."""


def unwatched() -> bool:
    """Return True outside of every dispatch mode, transform of torch.func and trace."""
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch._C._is_tracing()
    )


class Direct:
    """The rule by which a call of an op needs no dispatcher.

    Args:
        op: it writes into no argument, since the dispatcher counts writes.
    """

    def __init__(self, op: torch.library.CustomOpDef) -> None:
        arguments = op._opoverload._schema.arguments
        assert not any(argument.is_write for argument in arguments)
        self._types = [_types_of(str(argument.real_type)) for argument in arguments]

    def serves(self, args: tuple[Any, ...]) -> bool:
        """Return True if the op's own function may be called with these arguments, here and now.

        An argument that the dispatcher would convert, or refuse, goes to the dispatcher.
        """
        if torch.compiler.is_compiling() or not unwatched() or _is_profiled():
            return False
        if torch._C._len_torch_function_stack() or len(args) != len(self._types):
            return False
        graded = torch.is_grad_enabled()
        for value, types in zip(args, self._types, strict=True):
            if type(value) not in types:
                return False
            if isinstance(value, torch.Tensor) and (
                value.is_meta or value.is_neg() or (graded and value.requires_grad)
            ):
                return False
        return True


_is_profiled: Callable[[], bool] = torch.autograd._profiler_enabled
"""A profile names the ops, which the dispatcher tells it."""


def _types_of(name: str) -> tuple[type, ...]:
    if name.startswith("Optional["):
        return (*_types_of(name.removeprefix("Optional[").removesuffix("]")), NoneType)
    return _TYPES[name]
