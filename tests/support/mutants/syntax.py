"""Places in Python source, addressed by the syntax they have and not by their text.

A pattern is source: one expression, or statements that follow each other. It fits wherever the syntax
tree is the same, so that a comment, a line break, brackets, or a move to another function or file leave
it alone. A name of one capital and an underscore (`X_`) stands for any expression; it is the same one
wherever the pattern or the replacement has it.
"""

# SPDX-License-Identifier: Apache-2.0
import ast
import copy
import functools
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

_ANY = re.compile(r"[A-Z]_")
Bound = dict[str, ast.expr]


@dataclass(frozen=True)
class Spot:
    """The place of a node: `len(pattern)` statements, or one expression, of a field of its parent."""

    node: ast.AST
    parent: ast.AST
    field: str
    index: int | None  # None: the field holds the node itself
    scope: tuple[str, ...]  # functions around it by name, and `if` tests that hold there


@functools.lru_cache(maxsize=256)
def spots(source: str) -> tuple[ast.Module, dict[type, list[Spot]]]:
    """The tree of a module and its nodes by type; both are shared, so copy before a change."""
    tree = ast.parse(source)
    by_type: dict[type, list[Spot]] = defaultdict(list)

    def visit(parent: ast.AST, scope: tuple[str, ...]) -> None:
        if isinstance(parent, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            scope = (*scope, parent.name)
        for field, value in ast.iter_fields(parent):
            inner = scope
            if isinstance(parent, ast.If) and field == "body":
                inner = (*scope, ast.unparse(parent.test))
            children = list(enumerate(value)) if isinstance(value, list) else [(None, value)]
            for index, child in children:
                if isinstance(child, ast.AST):
                    by_type[type(child)].append(Spot(child, parent, field, index, inner))
                    visit(child, inner)

    visit(tree, ())
    return tree, by_type


def _fits(pattern: object, node: object, bound: Bound) -> bool:
    if isinstance(pattern, ast.Name) and _ANY.fullmatch(pattern.id) and isinstance(node, ast.expr):
        before = bound.setdefault(pattern.id, node)
        return ast.dump(before) == ast.dump(node)
    if isinstance(pattern, ast.AST):
        return type(pattern) is type(node) and all(
            _fits(value, getattr(node, field, None), bound)
            for field, value in ast.iter_fields(pattern)
            if field not in ("ctx", "type_comment", "kind")
        )
    if isinstance(pattern, list):
        return (
            isinstance(node, list)
            and len(pattern) == len(node)
            and all(_fits(p, n, bound) for p, n in zip(pattern, node, strict=True))
        )
    return type(pattern) is type(node) and pattern == node


def _parsed(code: str) -> list[ast.AST]:
    body = ast.parse(code).body
    if len(body) == 1 and isinstance(body[0], ast.Expr):
        return [body[0].value]
    return list(body)


class _Filled(ast.NodeTransformer):
    def __init__(self, bound: Bound) -> None:
        self.bound = bound

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return copy.deepcopy(self.bound.get(node.id, node))


@dataclass(frozen=True)
class Edit:
    """`new` for the syntax `old`, within functions of these names or `if`s of these tests."""

    old: str
    new: str
    within: tuple[str, ...] = ()

    def found(self, source: str) -> list[tuple[Spot, Bound]]:
        """Every place of a module's source that `old` fits."""
        pattern = _parsed(self.old)
        result = []
        for spot in spots(source)[1].get(type(pattern[0]), []):
            bound: Bound = {}
            here = [spot.node]
            if isinstance(pattern[0], ast.stmt):
                assert spot.index is not None
                here = getattr(spot.parent, spot.field)[spot.index :][: len(pattern)]
            if set(self.within) <= set(spot.scope) and _fits(pattern, here, bound):
                result.append((spot, bound))
        return result

    def applied(self, source: str) -> str:
        """The module's source with its one place replaced."""
        ((spot, bound),) = self.found(source)
        new: list[ast.AST] = [_Filled(bound).visit(node) for node in _parsed(self.new)]
        return replaced(source, spot, new, len(_parsed(self.old)))

    def place(self, folder: Path) -> tuple[Path, Spot]:
        """The one place in the modules of a folder.

        Raises:
            ValueError: `old` fits nowhere, or more than once; the message names the places.
        """
        fits = [
            (path, spot)
            for path in sorted(folder.rglob("*.py"))
            for spot, _ in self.found(path.read_text("utf-8"))
        ]
        if len(fits) != 1:
            within = "".join(f", within `{name}`" for name in self.within)
            places = ", ".join(
                f"{path.relative_to(folder).as_posix()}:{getattr(spot.node, 'lineno', 0)}"
                for path, spot in fits
            )
            raise ValueError(
                f"`{self.old}`{within} fits {len(fits)} places of {folder.name}/"
                f"{places and f' ({places})'}; it must fit one"
            )
        return fits[0]


def replaced(source: str, spot: Spot, new: list[ast.AST], count: int = 1) -> str:
    """A module's source with `count` statements, or one expression, replaced; without its comments."""
    old = getattr(spot.parent, spot.field)
    changed: ast.AST | list[ast.AST] = new[0]
    if spot.index is not None:
        changed = [*old[: spot.index], *new, *old[spot.index + count :]]
    setattr(spot.parent, spot.field, changed)
    try:
        return ast.unparse(ast.fix_missing_locations(spots(source)[0]))
    finally:
        setattr(spot.parent, spot.field, old)
