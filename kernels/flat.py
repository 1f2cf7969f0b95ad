"""A frozen dataclass as the flat arguments of a `torch.library` op, and back.

An op takes tensors, numbers and strings. The fields of a dataclass cross in their order; a field that is
a dataclass itself crosses by its own fields. The two functions are written out once, when the module is
imported: so they cost what code by hand costs, and a compiler can trace them.
"""

# SPDX-License-Identifier: Apache-2.0
import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Generic, Literal, TypeVar, get_args, get_origin

import torch

from ..reference.recipe import Recipe

T = TypeVar("T")
_SCHEMA = {
    torch.Tensor: "Tensor",
    torch.dtype: "ScalarType",
    int: "int",
    bool: "bool",
    float: "float",
}


def reader(*paths: str) -> Callable[[Any], tuple[Any, ...]]:
    """The function that reads attributes, as `experts.gemm1_bias`, of a value into a tuple."""
    read: Callable[[Any], tuple[Any, ...]] = eval(
        f"lambda value: ({', '.join(f'value.{path}' for path in paths)},)"
    )
    return read


class Flat(Generic[T]):
    """The flat form of a dataclass.

    Args:
        kind: the dataclass.
        only: for a dataclass of which some fields cross, their names: the first of its fields, in order.

    Raises:
        TypeError: a field's type is none that crosses, or `only` names other fields.
    """

    def __init__(self, kind: type[T], only: Mapping[type, Sequence[str]] | None = None) -> None:
        leaves = _Leaves(only or {})
        build = leaves.visit(kind, "")
        self.names = tuple(leaves.names)
        """The op's names of the arguments."""
        self.schema = ", ".join(map(" ".join, zip(leaves.schemas, leaves.names, strict=True)))
        """The arguments as `torch.library` writes them."""
        self.flatten: Callable[[T], tuple[Any, ...]] = reader(*leaves.paths)
        """Returns the op's arguments, in the order of `names`."""
        self.build: Callable[[Sequence[Any]], T] = eval(f"lambda flat: {build}", leaves.scope)
        """Returns the dataclass, from the op's arguments; what does not cross has its default."""


@dataclass
class _Leaves:
    """The arguments that a dataclass is made of."""

    only: Mapping[type, Sequence[str]]
    names: list[str] = field(default_factory=list)
    schemas: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    scope: dict[str, Any] = field(default_factory=dict)  # what the text of `visit` names

    def visit(self, kind: Any, path: str) -> str:
        """Add a dataclass's leaves; returns the text that makes it again of the arguments `flat`."""
        every = [f.name for f in fields(kind)]
        names = list(self.only.get(kind, every))
        if every[: len(names)] != names:
            raise TypeError(f"{kind.__name__} begins with {every[: len(names)]}, not {names}")
        parts = [self._field(f.type, path + f.name) for f in fields(kind)[: len(names)]]
        return f"{self._named(kind)}({', '.join(parts)})"

    def _field(self, of: Any, path: str) -> str:
        if is_dataclass(of) and of is not Recipe:
            return self.visit(of, f"{path}.")
        schema, read, back = _leaf(of)
        text = f"flat[{len(self.names)}]"
        self.names.append(path.rpartition(".")[2])
        self.schemas.append(schema)
        self.paths.append(path + read)
        return text if back is None else f"{self._named(back)}({text})"

    def _named(self, function: Any) -> str:
        name = function.__qualname__.replace(".", "_")
        self.scope[name] = function
        return str(name)


def _leaf(of: Any) -> tuple[str, str, Callable[[Any], Any] | None]:
    """(type in the schema, what is read of the attribute, what makes the attribute of it again)."""
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
    raise TypeError(f"{of} does not cross torch.library")
