"""Ops of `torch.library` that take a frozen dataclass: its arguments, the way back, the registration.

An op takes tensors, numbers and strings. It gets the fields of a dataclass in their order; for a field
that is itself a dataclass it gets that one's fields, and for a scale, which is a tensor or a number, one
argument of each type. Both conversions are generated as source text
when the module is imported. So they are as fast as code written by hand, and a compiler can trace them.
"""

# SPDX-License-Identifier: Apache-2.0
import enum
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Concatenate, Generic, Literal, ParamSpec, TypeVar, get_args, get_origin

import torch

from ..reference.recipe import Recipe
from .dispatch import Direct
from .records import recorder

T = TypeVar("T")
P = ParamSpec("P")
Results = TypeVar("Results")
_SCHEMA = {
    torch.Tensor: "Tensor",
    torch.dtype: "ScalarType",
    int: "int",
    bool: "bool",
    float: "float",
}


OPS: dict[str, torch.library.CustomOpDef] = {}
"""The ops of `register`, by the name that it was given."""
_SCALE = float | torch.Tensor


def two_arguments(scale: float | torch.Tensor | None) -> tuple[torch.Tensor | None, float]:
    """Return a scale as ops take it: a tensor or None, and a number, which is 1 without a scale."""
    if isinstance(scale, torch.Tensor):
        return scale, 0.0
    return None, 1.0 if scale is None else float(scale)


def one_scale(tensor: torch.Tensor | None, number: float) -> float | torch.Tensor:
    """Return the scale that `two_arguments` took apart."""
    return number if tensor is None else tensor


class Flat(Generic[T]):
    """The flat form of a dataclass.

    Args:
        kind: the dataclass.
        only: for a dataclass of which the op gets some fields, their names: the first ones, in order.

    Raises:
        TypeError: no op takes a field's type, or `only` names other fields.
    """

    def __init__(self, kind: type[T], only: Mapping[type, Sequence[str]] | None = None) -> None:
        leaves = _Leaves(only or {})
        build = leaves.visit(kind, "")
        self.names = tuple(leaves.names)
        """The op's names of the arguments."""
        self.schema = ", ".join(map(" ".join, zip(leaves.schemas, leaves.names, strict=True)))
        """The arguments as `torch.library` writes them."""
        self.flatten: Callable[[T], tuple[Any, ...]] = eval(
            f"lambda value: ({', '.join(leaves.reads)},)", leaves.scope
        )
        """Returns the op's arguments, in the order of `names`."""
        self.build: Callable[[Sequence[Any]], T] = eval(f"lambda flat: {build}", leaves.scope)
        """Returns the dataclass, from the op's arguments. A field that they lack has its default, and an
        argument that follows them is not read."""


@dataclass
class _Leaves:
    """The arguments that a dataclass is made of."""

    only: Mapping[type, Sequence[str]]
    names: list[str] = field(default_factory=list)
    schemas: list[str] = field(default_factory=list)
    reads: list[str] = field(default_factory=list)  # of `value`; text, as `visit` returns it
    scope: dict[str, Any] = field(default_factory=dict)  # what the text of `visit` names

    def visit(self, kind: Any, path: str) -> str:
        """Add the arguments of a dataclass; return the text that makes it of `flat`."""
        every = [f.name for f in fields(kind)]
        names = list(self.only.get(kind, every))
        if every[: len(names)] != names:
            raise TypeError(f"{kind.__name__} begins with {every[: len(names)]}, not {names}")
        parts = [self._field(f.type, path + f.name) for f in fields(kind)[: len(names)]]
        return f"{self._named(kind)}({', '.join(parts)})"

    def _field(self, of: Any, path: str) -> str:
        if is_dataclass(of) and of is not Recipe:
            return self.visit(of, f"{path}.")
        name, place = path.rpartition(".")[2], len(self.names)
        if of == _SCALE:
            self.names += [name, f"{name}_value"]
            self.schemas += ["Tensor?", "float"]
            self.reads.append(f"*{self._named(two_arguments)}(value.{path})")
            return f"{self._named(one_scale)}(flat[{place}], flat[{place + 1}])"
        schema, read, back = _leaf(of)
        self.names.append(name)
        self.schemas.append(schema)
        self.reads.append(f"value.{path}{read}")
        return f"flat[{place}]" if back is None else f"{self._named(back)}(flat[{place}])"

    def _named(self, function: Any) -> str:
        name = function.__qualname__.replace(".", "_")
        self.scope[name] = function
        return str(name)


def _leaf(of: Any) -> tuple[str, str, Callable[[Any], Any] | None]:
    """Return the type in the schema, the suffix that reads the attribute, and the function back."""
    if of in _SCHEMA:
        return _SCHEMA[of], "", None
    if of is Recipe:
        return "int", ".code", Recipe.from_code
    if isinstance(of, type) and issubclass(of, enum.IntEnum):
        return "int", ".value", of
    if get_origin(of) is Literal and all(isinstance(value, str) for value in get_args(of)):
        return "str", "", None
    members = [member for member in get_args(of) if member is not type(None)]
    if len(members) == 1 and len(get_args(of)) == 2:
        schema, read, back = _leaf(members[0])
        if not read:
            return f"{schema}?", "", back
    raise TypeError(f"{of} is no type that an op of torch.library takes")


def register(
    name: str,
    flat: Flat[T],
    run: Callable[Concatenate[T, P], Results],
    fake: Callable[Concatenate[T, P], Any],
    returns: str,
    *,
    tensors: str = "",
    mutates: Sequence[str] = (),
) -> Callable[Concatenate[T, P], Results]:
    """Register the op `nvfp4_moe::{name}`, and return it as a function with the parameters of `run`.

    The name of an op that mutates an argument ends in a digest of its schema. torch.compile gives such
    an op its other arguments by name, so inductor's key of compiled code on disk does not see where the
    mutated one stands. Code compiled by another version of this package would put it somewhere else.

    Args:
        run: takes the dataclass, then the tensors beside it.
        fake: allocates the results of `run` without values, for a compiler.
        returns: the results as `torch.library` writes them.
        tensors: the tensors beside the dataclass, likewise.
        mutates: the names of those that `run` writes into.
    """
    count = len(flat.names)
    arguments = ", ".join(filter(None, (flat.schema, tensors)))
    schema = f"({arguments}) -> {returns}"
    digest = f"_{hashlib.sha256(schema.encode()).hexdigest()[:8]}" if mutates else ""

    def body(*given: Any) -> Any:
        return run(flat.build(given), *given[count:])  # type: ignore[call-arg]

    op = torch.library.custom_op(
        f"nvfp4_moe::{name}{digest}", body, mutates_args=tuple(mutates), schema=schema
    )
    op.register_torch_dispatch(recorder.Recorder, recorder.inside(body))

    @op.register_fake
    def _(*given: Any) -> Any:
        return fake(flat.build(given), *given[count:])  # type: ignore[call-arg]

    OPS[name] = op
    direct = None if mutates else Direct(op)

    def function(call: T, *args: P.args, **kwargs: P.kwargs) -> Results:
        given = (*flat.flatten(call), *args)
        plainly = direct is not None and not kwargs and direct.serves(given)
        result: Results = body(*given) if plainly else op(*given, **kwargs)
        return result

    return function
