"""Small changes of a module's functions and constants, by rule.

rounding    a rounding, a conversion or a flush is left out
constant    a number is the next one: 1 more, or an ulp of fp32 more; 0.0 is 1.0
comparison  strict for not strict, and the other way round; equal for unequal; `is` for `is not`
operator    + for -, * for /, // for %, & for |, shifts, `and` for `or`, the minimum for the maximum;
            a minus or a `not` is left out
index       an end of a slice or of a range, or an address, is one more

Text, annotations, decorators and what is raised are left alone.
"""

# SPDX-License-Identifier: Apache-2.0
import ast
import copy
import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

_COMPARISONS: dict[type, type] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_OPERATORS: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mod,
    ast.Mod: ast.FloorDiv, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitOr, ast.Pow: ast.Mult, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
_OTHER_NAMES = {
    "minimum": "maximum", "maximum": "minimum", "min": "max", "max": "min", "amin": "amax",
    "amax": "amin", "fmin": "fmax", "fmax": "fmin", "zeros": "ones", "ones": "zeros",
    "zeros_like": "ones_like", "ones_like": "zeros_like", "new_zeros": "new_ones",
    "new_ones": "new_zeros", "add": "sub", "sub": "add", "mul": "div", "div": "mul",
}  # fmt: skip
_CONVERSIONS = ("bfloat16", "half", "float", "double", "to", "flush")
_ROUNDINGS = ("flush", "_flushed", "to_bf16", "_rounded", "rounded", "flush")
_MODULES = ("tl", "gl", "torch")
_ADDRESSED = ("load", "store", "atomic_add", "atomic_max")
_DECORATORS = tuple(f"{m}.{n}" for m in ("triton", "gluon") for n in ("jit", "constexpr_function"))
_CONSTANTS = ("tl.constexpr", "gl.constexpr")
_LEFT_ALONE = ("num_stages", "num_warps", "device", "sem", "dtype", "generator")


@dataclasses.dataclass(frozen=True)
class Generated:
    """A function of a module, or the assignment of one of its constants, with one change."""

    file: str
    function: str  # dotted; of a constant, the names that are assigned
    rule: str
    change: str
    number: int  # of those that read alike
    build: Callable[[], str] = dataclasses.field(compare=False)
    # The function or the assignment without docstring.
    unchanged: str = dataclasses.field(default="", compare=False)
    # The first and the last line of the changed statement; of one that holds others, of its head.
    lines: tuple[int, int] | None = dataclasses.field(default=None, compare=False)

    @property
    def source(self) -> str:
        """The whole function, without decorators, or the assignment."""
        return self.build()

    @property
    def key(self) -> str:
        """Its name where results and reasons are kept: a module that is renamed loses none."""
        return f"{self.file.split('/')[0]} {self._change}"

    @property
    def shown(self) -> str:
        """Its name for a reader."""
        return f"{self.file} {self._change}"

    @property
    def _change(self) -> str:
        again = "" if self.number == 1 else f" ({self.number})"
        return f"{self.function}: {self.rule}: {self.change}{again}"


def generate(file: str, source: str, *, jitted: bool = False) -> list[Generated]:
    """All of a module, in order.

    Args:
        jitted: only of what Triton compiles: functions with `jit` or `constexpr_function` of triton or
            of gluon, and constants that are `tl.constexpr` or `gl.constexpr`.
    """
    seen: Counter[tuple[str, ...]] = Counter()
    found = []
    for name, root in _roots(ast.parse(source), jitted):
        root = _bare(root)
        unchanged = ast.unparse(root)
        for rule, change, lines, build in _changes(root):
            key = (name, rule, change)
            seen[key] += 1
            found.append(Generated(file, name, rule, change, seen[key], build, unchanged, lines))
    return found


def _roots(tree: ast.Module, jitted: bool) -> Iterator[tuple[str, ast.stmt]]:
    """(dotted name, statement) of functions, methods and numeric constants."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not jitted:
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef):
                    yield f"{node.name}.{inner.name}", inner
        elif isinstance(node, ast.FunctionDef):
            if not jitted or any(_is_compiled(d) for d in node.decorator_list):
                yield node.name, node
        elif (
            isinstance(node, ast.Assign)
            and any(isinstance(n, ast.Constant) and _is_number(n.value) for n in ast.walk(node))
            and (not jitted or any(c in ast.unparse(node.value) for c in _CONSTANTS))
        ):
            yield ", ".join(ast.unparse(t) for t in node.targets), node


def _is_compiled(decorator: ast.expr) -> bool:
    return ast.unparse(decorator).startswith(_DECORATORS)


def _bare(root: ast.stmt) -> ast.stmt:
    """A function without decorators, docstring and the annotation of what it returns; or a constant."""
    root = copy.deepcopy(root)
    if isinstance(root, ast.FunctionDef):
        root.decorator_list, root.returns = [], None
        if ast.get_docstring(root) is not None and len(root.body) > 1:
            del root.body[0]
    return root


def _lines(root: ast.stmt) -> dict[int, tuple[int, int]]:
    """By the `id` of a statement in a function, or of an expression in it."""
    found = {}
    for statement in ast.walk(root):
        if not isinstance(statement, ast.stmt) or statement is root:
            continue
        parts = [c for c in ast.iter_child_nodes(statement) if not isinstance(c, ast.stmt)]
        ends = [getattr(part, "end_lineno", 0) for part in parts]
        lines = statement.lineno, max(statement.lineno, *ends, 0)
        for node in (statement, *(inner for part in parts for inner in ast.walk(part))):
            found[id(node)] = lines
    return found


_Change = tuple[str, str, tuple[int, int] | None, Callable[[], str]]


def _changes(root: ast.stmt) -> Iterator[_Change]:
    """(rule, how it reads before and after, lines, what makes the whole text) of every change."""
    lines = _lines(root)
    for parent, name, index, node in list(_expressions(root)):
        for rule, new in _variants(node, parent, name):
            shown = (
                parent if isinstance(node, ast.Constant) and isinstance(parent, ast.expr) else node
            )
            before = _short(shown)
            _put(parent, name, index, new)
            after = _short(parent if shown is parent else new)
            _put(parent, name, index, node)
            if before != after:
                text = partial(_text, root, parent, name, index, new)
                yield rule, f"{before} -> {after}", lines.get(id(node)), text


def _text(root: ast.stmt, parent: ast.AST, field: str, index: int | None, new: ast.AST) -> str:
    """Return the text of a function or an assignment with one node replaced."""
    old = getattr(parent, field) if index is None else getattr(parent, field)[index]
    _put(parent, field, index, new)
    text = ast.unparse(ast.fix_missing_locations(root))
    _put(parent, field, index, old)
    return text


def _short(node: ast.AST) -> str:
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= 90 else f"{text[:87]}..."


def _put(parent: ast.AST, field: str, index: int | None, node: ast.AST) -> None:
    if index is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[index] = node


def _expressions(node: ast.AST) -> Iterator[tuple[ast.AST, str, int | None, ast.AST]]:
    """(parent, field, index, node) of what may change below a node, in order."""
    for field, value in ast.iter_fields(node):
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(child, ast.AST) or _left_alone(node, field, child):
                continue
            yield node, field, index, child
            yield from _expressions(child)


def _left_alone(parent: ast.AST, field: str, node: ast.AST) -> bool:
    if isinstance(
        node, ast.Raise | ast.Assert | ast.JoinedStr | ast.arg | ast.Import | ast.ImportFrom
    ):
        return True
    if field in ("annotation", "returns", "decorator_list"):
        return True
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True  # a docstring
    return isinstance(node, ast.keyword) and node.arg in _LEFT_ALONE


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _variants(node: ast.AST, parent: ast.AST, field: str) -> Iterator[tuple[str, ast.AST]]:
    if isinstance(node, ast.Constant) and _is_number(node.value):
        yield "constant", ast.Constant(_next(node.value))  # type: ignore[arg-type]
    elif isinstance(node, ast.Compare) and len(node.ops) == 1:
        yield "comparison", _with(node, ops=[_COMPARISONS[type(node.ops[0])]()])
    elif isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            ops = [*node.ops[:i], _COMPARISONS[type(op)](), *node.ops[i + 1 :]]
            yield "comparison", _with(node, ops=ops)
    elif isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp):
        if type(node.op) in _OPERATORS:
            yield "operator", _with(node, op=_OPERATORS[type(node.op)]())
    elif isinstance(node, ast.UnaryOp):
        yield "operator", node.operand
    elif isinstance(node, ast.Call):
        yield from _of_call(node)
    elif isinstance(node, ast.Slice):
        for end in ("lower", "upper"):
            if (bound := getattr(node, end)) is not None and not isinstance(bound, ast.Constant):
                yield "index", _with(node, **{end: _more(bound)})
    elif isinstance(node, ast.Name | ast.BinOp) and field == "slice":
        yield "index", _more(node)


def _of_call(node: ast.Call) -> Iterator[tuple[str, ast.AST]]:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    cast = any(k.arg == "bitcast" for k in node.keywords) or "device" in ast.unparse(node)
    of_module = isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) in _MODULES
    if isinstance(node.func, ast.Attribute) and name in _CONVERSIONS and not cast and not of_module:
        yield "rounding", node.args[0] if name == "flush" and node.args else node.func.value
    if isinstance(node.func, ast.Name) and name in _ROUNDINGS and node.args:
        yield "rounding", node.args[0]
    if name in _OTHER_NAMES:
        func = copy.deepcopy(node.func)
        setattr(func, "attr" if isinstance(func, ast.Attribute) else "id", _OTHER_NAMES[name])
        yield "operator", _with(node, func=func)
    if name in ("range", "static_range") and node.args:
        last = node.args[-1]
        if not isinstance(last, ast.Constant):
            yield "index", _with(node, args=[*node.args[:-1], _more(last)])
    if name in _ADDRESSED and of_module:
        yield "index", _with(node, args=[_more(node.args[0]), *node.args[1:]])


def _with(node: ast.AST, **changes: object) -> ast.AST:
    new = copy.copy(node)
    for name, value in changes.items():
        setattr(new, name, value)
    return new


def _more(node: ast.expr) -> ast.expr:
    return ast.BinOp(node, ast.Add(), ast.Constant(1))


def _next(value: float) -> float:
    if isinstance(value, int):
        return value + 1
    if value == 0 or not math.isfinite(value):
        return 1.0
    with np.errstate(over="ignore"):
        return float(np.nextafter(np.float32(value), np.float32(np.inf)))
