"""The sources of an installed serving stack, read without importing it: that takes a GPU's libraries."""

# SPDX-License-Identifier: Apache-2.0
import ast
import importlib.util
from pathlib import Path

import pytest

VERSIONS = {"sglang": "0.5.23", "vllm": "0.33.0"}
"""That the adapters were written against."""


def _folder(server: str) -> Path | None:
    spec = importlib.util.find_spec(server)
    places = spec.submodule_search_locations if spec is not None else None
    return Path(next(iter(places))) if places else None


FOLDERS = {server: _folder(server) for server in VERSIONS}
"""Looked for at import, before a test puts fakes of these names in place."""


def folder_of(server: str) -> Path:
    """Return the folder of the package, or skip and say what is missing."""
    folder = FOLDERS[server]
    if folder is None:
        pytest.skip(
            f"{server} is not installed (pip install --no-deps {server}=={VERSIONS[server]})"
        )
    return folder


def source_of(server: str, path: str) -> str:
    """A file of the package, which must be there if the package is."""
    file = folder_of(server) / path
    assert file.is_file(), f"the installed {server} has no {path}"
    return file.read_text()


def class_of(server: str, path: str, name: str) -> ast.ClassDef:
    found = [n for n in ast.walk(ast.parse(source_of(server, path))) if isinstance(n, ast.ClassDef)]
    classes = [n for n in found if n.name == name]
    assert classes, f"{path} has no class {name}"
    return classes[0]


def fields_of(server: str, path: str, name: str) -> list[str]:
    """Annotated names of a dataclass or NamedTuple, in order."""
    body = class_of(server, path, name).body
    return [n.target.id for n in body if isinstance(n, ast.AnnAssign)]


def members_of(server: str, path: str, name: str) -> dict[str, object]:
    """Names and values of an Enum: the first of a tuple, None of what is no literal."""

    def value(node: ast.expr) -> object:
        node = node.elts[0] if isinstance(node, ast.Tuple) else node
        return node.value if isinstance(node, ast.Constant) else None

    body = class_of(server, path, name).body
    return {n.targets[0].id: value(n.value) for n in body if isinstance(n, ast.Assign)}


def attributes_of(server: str, path: str, name: str) -> set[str]:
    """Return a class's names: fields, methods, properties, and what its methods set on self."""
    node = class_of(server, path, name)
    own = {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
    set_on_self = {
        n.attr
        for n in ast.walk(node)
        if isinstance(n, ast.Attribute)
        and isinstance(n.ctx, ast.Store)
        and isinstance(n.value, ast.Name)
        and n.value.id == "self"
    }
    return own | set_on_self | set(fields_of(server, path, name))


def arguments_of(server: str, path: str, function: str, inside: str | None = None) -> list[str]:
    """Names of a function's arguments, of a method of class `inside` where given."""
    tree = ast.parse(source_of(server, path)) if inside is None else class_of(server, path, inside)
    found = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == function]
    assert found, f"{path} has no {function}"
    return [a.arg for a in (*found[0].args.posonlyargs, *found[0].args.args)]
