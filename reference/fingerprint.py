"""A fingerprint of the contract: a hash of the steps by which the reference computes.

Each step is a function (`STEPS`). Its hash is of its syntax tree, and of the hashes of all functions,
classes and constants of `reference/` that it names, directly or through others. So no order of a sum,
rounding or constant changes without it:

    left out   docstrings, comments, the form of annotations, the texts of messages
    renamed    functions, classes, constants, modules, parameters, local variables: no difference
    counts     everything else that is written, names of attributes and keywords, bytes of the tables

Equal fingerprints mean the same steps. Different ones mean that a step is written in another way, and
its bits may differ. The fingerprint says nothing about torch, which computes the operations.
"""

# SPDX-License-Identifier: Apache-2.0
import ast
import functools
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import fields
from importlib.resources import files
from typing import Any

from . import checks
from .recipe import Recipe

STEPS = {
    "weights": ("weights.prepare", "prepare_experts"),
    "quantizer per token": ("quantize", "quantize_per_token"),
    "quantizer by a global scale": ("quantize", "quantize_global_scale"),
    "SiLU": ("fused_quantize", "silu_and_mul"),
    "RMSNorm": ("fused_quantize", "rmsnorm"),
    "RMSNorm of a sum": ("fused_quantize", "add_rmsnorm"),
    "routing": ("moe.routing", "route"),
    "layer": ("moe.layer", "fused_moe"),
    "layer of shards": ("moe.shards", "fused_moe_shards"),
    "layer of masked input": ("moe.masked", "fused_moe_masked"),
    "quantizer of masked input": ("moe.masked", "quantize_masked"),
    "dense product": ("dense", "mm_fp4"),
}
"""The steps, and where each begins: a module of `reference/` and a function in it."""
Symbol = tuple[str, str]
"""A module of `reference/`, "" for `reference/` itself, and a name that it defines."""
Tree = Any  # str, or a tuple of these
_CHECKS = "checks"
_TABLE = ".xz"


def fingerprint(recipe: Recipe | None = None) -> str:
    """Return 64 hexadecimal digits: a hash of the contract's steps, and of a recipe's values.

    Args:
        recipe: None for the steps alone, which every recipe has.

    Raises:
        TypeError: `recipe` is something else.
    """
    if recipe is not None:
        checks.instance("recipe", recipe, Recipe, "a Recipe, or None")
    lines = [f"step {name}: {digest}" for name, digest in steps().items()]
    if recipe is not None:
        lines += [f"recipe {f.name}: {getattr(recipe, f.name)!r}" for f in fields(recipe)]
    return _hash("\n".join(lines))


def steps() -> dict[str, str]:
    """Return the hash of each step, so that two processes find the one that differs."""
    return dict(_steps())


@functools.cache
def _steps() -> dict[str, str]:
    return Graph(sources()).steps()


def sources() -> dict[str, str]:
    """Return the text of every module of `reference/`, by dotted name; of a folder its `__init__`."""
    return dict(_sources(files(__package__), ""))


def _sources(folder: Any, prefix: str) -> Iterator[tuple[str, str]]:
    for entry in folder.iterdir():
        stem = entry.name.removesuffix(".py")
        if entry.is_dir() and (entry / "__init__.py").is_file():
            yield from _sources(entry, f"{prefix}{entry.name}.")
        elif stem == "__init__":
            yield prefix[:-1], entry.read_text("utf-8")
        elif stem != entry.name:
            yield prefix + stem, entry.read_text("utf-8")


class Graph:
    """The hashes of what some sources define; `digests` has those that were asked for, and theirs."""

    def __init__(self, sources: Mapping[str, str]):
        self._sources = sources
        self._names: dict[str, dict[str, Any]] = {}
        self.digests: dict[Symbol, str] = {}

    def steps(self) -> dict[str, str]:
        return {name: self.digest(symbol) for name, symbol in STEPS.items()}

    def digest(self, symbol: Symbol) -> str:
        """Return the hash of a definition; within itself a definition is only a word."""
        if symbol not in self.digests:
            self.digests[symbol] = "itself"
            module, name = symbol
            tree = _Definition(self, module).tree_of(self.names(module)[name], name)
            self.digests[symbol] = _hash(repr(tree))
        return self.digests[symbol]

    def names(self, module: str) -> dict[str, Any]:
        """Return what the names of a module stand for: a statement, a `Symbol`, or a dotted name."""
        if module not in self._names:
            self._names[module] = found = {}
            for node in _parsed(self._sources[module]).body:
                for name, value in self._bound(module, node):
                    found[name] = value
        return self._names[module]

    def resolve(self, module: str, name: str) -> Any:
        """Return the `Symbol` that defines a name, a dotted name of no definition here, or None."""
        value = self.names(module).get(name)
        while isinstance(value, tuple):
            module, name = value
            value = self.names(module).get(name)
        return (module, name) if isinstance(value, ast.AST) else value

    def _bound(self, module: str, node: ast.stmt) -> Iterator[tuple[str, Any]]:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                yield from ((n.id, node) for n in ast.walk(target) if isinstance(n, ast.Name))
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.asname or alias.name.partition(".")[0], alias.name
        elif isinstance(node, ast.ImportFrom):
            yield from self._imported(module, node)

    def _imported(self, module: str, node: ast.ImportFrom) -> Iterator[tuple[str, Any]]:
        package = module.split(".") if module else []
        if not self._is_folder(module):
            package.pop()
        base = ".".join(package[: len(package) - node.level + 1] + (node.module or "").split("."))
        base = base.strip(".")
        for alias in node.names:
            name, below = alias.asname or alias.name, f"{base}.{alias.name}".strip(".")
            if not node.level:
                yield name, f"{node.module}.{alias.name}"
            elif below in self._sources:
                yield name, f"module {below}"
            else:
                yield name, (base, alias.name)

    def _is_folder(self, module: str) -> bool:
        return not module or any(other.startswith(f"{module}.") for other in self._sources)


class _Definition:
    """The tree of one statement of a module, with numbers for names that only it knows."""

    def __init__(self, graph: Graph, module: str):
        self._graph, self._module = graph, module
        self._locals: dict[str, int] = {}
        self._quiet = False  # in a call of `checks`, whose texts are messages

    def tree_of(self, node: Any, name: str) -> Tree:
        """Return the tree of what a statement defines as `name`, without that name."""
        if isinstance(node, ast.ClassDef):
            return self._class(node)
        self._number(node)
        if isinstance(node, ast.FunctionDef):
            return self._function(node)
        targets = [n.id for n in ast.walk(node) if isinstance(n, ast.Name) and n.id in self._stored]
        return targets.index(name), self._annotation(node), self.tree(node.value)

    def _number(self, node: ast.AST) -> None:
        """Number the names that a statement stores, in order."""
        self._stored = {
            n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
        }
        for n in ast.walk(node):
            name = getattr(n, "id", None) if isinstance(n, ast.Name) else None
            if isinstance(n, ast.arg):
                name = n.arg
            elif isinstance(n, ast.FunctionDef | ast.ExceptHandler | ast.MatchAs | ast.MatchStar):
                name = n.name
            if name is not None and (name in self._stored or not isinstance(n, ast.Name)):
                self._locals.setdefault(name, len(self._locals))

    def _class(self, node: ast.ClassDef) -> Tree:
        parts: list[Tree] = [self.tree(node.bases), self.tree(node.decorator_list)]
        for statement in node.body:
            if isinstance(statement, ast.FunctionDef):
                method = _Definition(self._graph, self._module)
                method._number(statement)
                parts.append((statement.name, method._function(statement)))
            else:
                parts.append(self.tree(statement))
        return tuple(parts)

    def _function(self, node: ast.FunctionDef) -> Tree:
        body = self.tree(node.body)
        return self.tree(node.args), self._annotation(node), body, self.tree(node.decorator_list)

    def tree(self, node: Any) -> Tree:
        """Return a tree of strings that is the same in every version of Python."""
        if isinstance(node, list):
            return tuple(self.tree(part) for part in node if not _is_left_out(part))
        if not isinstance(node, ast.AST):
            known = isinstance(node, str) and node in self._locals
            return f"local {self._locals[node]}" if known else repr(node)
        if isinstance(node, ast.Raise):
            return "raise"
        if isinstance(node, ast.JoinedStr):
            return "message"
        if isinstance(node, ast.Constant):
            return self._constant(node.value)
        if isinstance(node, ast.FunctionDef):
            return "def", self.tree(node.name), self._function(node)
        if isinstance(node, ast.Name | ast.Attribute) and (named := self._named(node)) is not None:
            return named
        if isinstance(node, ast.Attribute | ast.keyword):  # names of others
            word = node.attr if isinstance(node, ast.Attribute) else str(node.arg)
            return type(node).__name__, word, self.tree(node.value)
        if isinstance(node, ast.Call) and not self._quiet:
            self._quiet = str(self._named(node.func)).startswith(_CHECKS)
            try:
                return "Call", self.tree(node.func), self.tree(node.args), self.tree(node.keywords)
            finally:
                self._quiet = False
        parts = (
            (field, self.tree(value))
            for field, value in ast.iter_fields(node)
            if field not in ("annotation", "ctx", "kind", "type_comment")
            and value is not None
            and value != []
        )
        return type(node).__name__, self._annotation(node), *parts

    def _constant(self, value: Any) -> Tree:
        if isinstance(value, str) and value.endswith(_TABLE):
            return hashlib.sha256(_bytes_of(self._module, value)).hexdigest()
        if isinstance(value, str) and self._quiet:
            return "message"
        return f"{type(value).__name__} {value!r}"

    def _named(self, node: ast.AST) -> Tree:
        """Return the hash or the dotted name that a name stands for, "local N", or None."""
        if isinstance(node, ast.Attribute):
            base = self._module_of(node.value)
            if base is None:
                return None
            return _CHECKS + node.attr if base == _CHECKS else self._defined(base, node.attr)
        if not isinstance(node, ast.Name):
            return None
        if node.id in self._locals:
            return f"local {self._locals[node.id]}"
        return self._defined(self._module, node.id)

    def _module_of(self, node: ast.AST) -> str | None:
        """Return the module of `reference/` that a name stands for."""
        if not isinstance(node, ast.Name) or node.id in self._locals:
            return None
        found = self._graph.names(self._module).get(node.id)
        if isinstance(found, str) and found.startswith("module "):
            return found.removeprefix("module ")
        return None

    def _defined(self, module: str, name: str) -> Tree:
        found = self._graph.resolve(module, name)
        if isinstance(found, tuple):
            return self._graph.digest(found)
        return f"name {found or name}"

    def _annotation(self, node: ast.AST) -> Tree:
        """Return the hashes of what annotations name, in order: their methods are called."""
        found = set()
        for annotation in (getattr(node, field, None) for field in ("annotation", "returns")):
            for name in ast.walk(annotation) if annotation is not None else ():
                if isinstance(name, ast.Name):
                    defined = self._graph.resolve(self._module, name.id)
                    if isinstance(defined, tuple):
                        found.add(self._graph.digest(defined))
        return tuple(sorted(found))


def _is_left_out(node: Any) -> bool:
    """Docstrings and other strings that stand alone; imports, which names lead to."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant)
    return isinstance(node, ast.Import | ast.ImportFrom | ast.Pass)


@functools.lru_cache(maxsize=128)
def _parsed(text: str) -> ast.Module:
    return ast.parse(text)


def _bytes_of(module: str, table: str) -> bytes:
    """Read a table that lies beside a module."""
    folder = files(__package__)
    for part in module.split(".")[:-1]:
        folder = folder / part
    return (folder / table).read_bytes()


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
