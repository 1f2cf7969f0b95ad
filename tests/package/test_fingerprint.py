"""The contract's fingerprint: every mutant of a step changes it, and no rename does."""

# SPDX-License-Identifier: Apache-2.0
import ast
import functools
import re

import pytest
from mutants.generated.rules import Generated, generate

from nvfp4_moe import Recipe, fingerprint
from nvfp4_moe.reference import fingerprint as module
from nvfp4_moe.reference.fingerprint import STEPS, Graph, Symbol, sources, steps

SERVER = re.compile("vllm|sglang|hugging|transformers|trtllm", re.IGNORECASE)
DOCUMENTED = ast.FunctionDef | ast.ClassDef
EVERY = 40
"""One mutant in so many is tried; there are some thousands."""
TEXTS = sources()


@pytest.fixture(scope="module")
def graph() -> Graph:
    graph = Graph(TEXTS)
    assert graph.steps() == steps()
    return graph


@functools.cache
def _mutants(name: str) -> list[Generated]:
    return generate(name, TEXTS[name])


def _symbol(mutant: Generated) -> Symbol:
    """Return the definition of a module that holds the mutant: a class, not its method."""
    return mutant.file, mutant.function.split(".")[0].strip("()").split(",")[0]


def _applied(mutant: Generated) -> dict[str, str]:
    """The sources with a mutant, which keeps the decorators and the annotations."""
    tree = ast.parse(TEXTS[mutant.file])
    (new,) = ast.parse(mutant.source).body
    owner, _, method = mutant.function.rpartition(".")
    body = tree.body
    if owner:
        (body,) = (n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == owner)
    for i, node in enumerate(body):
        if isinstance(node, ast.FunctionDef) and node.name == method:
            assert isinstance(new, ast.FunctionDef)
            new.decorator_list, new.returns = node.decorator_list, node.returns
            body[i] = new
        elif isinstance(node, ast.Assign) and isinstance(new, ast.Assign):
            same = [ast.dump(t) for t in node.targets] == [ast.dump(t) for t in new.targets]
            body[i] = new if same else node
    return TEXTS | {mutant.file: ast.unparse(tree)}


def _changes(graph: Graph, mutant: Generated) -> bool:
    """True if a mutant changes the hash of its definition, with those of all others as they are."""
    symbol, other = _symbol(mutant), Graph(_applied(mutant))
    other.digests = {s: d for s, d in graph.digests.items() if s != symbol}
    return other.digest(symbol) != graph.digests[symbol]


def test_every_mutant_of_a_step_changes_its_hash(graph):
    """Of everything that a step names, directly or through others."""
    modules = sorted({name for name, _ in graph.digests})
    every = [m for name in modules for m in _mutants(name) if _symbol(m) in graph.digests]
    some = every[::EVERY]
    assert len(some) >= 40 and len({mutant.file for mutant in some}) > 12
    assert not [mutant.shown for mutant in some if not _changes(graph, mutant)]


@pytest.mark.parametrize("step", [("numerics.accumulate", "fma"), ("numerics.e2m1", "VALUES")])
def test_a_change_far_below_reaches_the_steps(graph, step):
    mutant = next(m for m in _mutants(step[0]) if _symbol(m) == step)
    changed = Graph(_applied(mutant)).steps()
    before = graph.steps()
    differing = {name for name in STEPS if changed[name] != before[name]}
    assert "layer" in differing and "routing" not in differing


RENAMES = {
    "moe.routing": (
        (r"\b_warp_sum\b", "_butterfly"),
        (r"Experts and weights of each token", "Choose"),
        (r"must divide into equal groups", "do not divide"),
        (r"# Llama4's maximum is", "# The maximum of Llama4 is"),
        (r"by_blocks: bool", "by_blocks: int"),
    ),
    "numerics.fp32": ((r"\bmagnitude\b", "size_of_it"), (r"\b_MAX_SUBNORMAL\b", "_LARGEST")),
}
"""A function, a docstring, an error, a comment, an annotation, a local variable, a constant."""


def test_renames_change_nothing(graph):
    texts = dict(TEXTS)
    for name, pairs in RENAMES.items():
        for old, new in pairs:
            texts[name], count = re.subn(old, new, texts[name])
            assert count, old
    assert Graph(texts).steps() == graph.steps()


def test_no_name_of_a_server_counts(graph):
    """The names that other libraries have for an activation change with their versions."""
    texts = dict(TEXTS)
    tree = ast.parse(texts["activation"])
    tables = [
        n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "Elsewhere"
    ]
    names = [c for n in tables for c in ast.walk(n) if isinstance(c, ast.Constant)]
    assert {"swigluoai_uninterleave", "gelu_no_mul", "relu2", "cutlass"} <= {c.value for c in names}
    for constant in names:
        constant.value = f"another name of {constant.value}"
    texts["activation"] = ast.unparse(tree)
    assert Graph(texts).steps() == graph.steps()
    texts["activation"] = texts["activation"].replace("STEP_LIMIT = 7.0", "STEP_LIMIT = 8.0")
    assert Graph(texts).steps()["layer"] != graph.steps()["layer"]


def test_no_step_names_a_server(graph):
    """A name that enters the hash by another way than the table of activations."""
    found = set()
    for name, definition in graph.digests:
        node = graph.names(name)[definition]
        texts = (c.value for c in ast.walk(node) if isinstance(c, ast.Constant))
        docs = {
            ast.get_docstring(n, clean=False) for n in ast.walk(node) if isinstance(n, DOCUMENTED)
        }
        found |= {t for t in texts if isinstance(t, str) and t not in docs and SERVER.search(t)}
    assert not found


def test_a_module_may_be_renamed(graph):
    """And everything may be written in other lines, without comments."""
    texts = {name: ast.unparse(ast.parse(text)) for name, text in TEXTS.items()}
    moved = {name: re.sub(r"\baccumulate import", "sums import", t) for name, t in texts.items()}
    assert moved != texts
    moved["numerics.sums"] = moved.pop("numerics.accumulate")
    assert Graph(moved).steps() == graph.steps()


def test_a_table_counts(graph, monkeypatch):
    monkeypatch.setattr(module, "_bytes_of", lambda name, table: b"other numbers")
    changed, before = Graph(TEXTS).steps(), graph.steps()
    assert changed["routing"] != before["routing"] and changed["layer"] != before["layer"]
    assert changed["SiLU"] == before["SiLU"]


def test_the_fingerprint_of_a_recipe():
    every = {
        None,
        *(Recipe(math, build=build) for math in ("fast", "exact") for build in ("cuda",)),
    }
    found = {fingerprint(recipe) for recipe in (*every, Recipe(flashinfer="0.7.4"))}
    assert len(found) == 4 and all(re.fullmatch("[0-9a-f]{64}", one) for one in found)
    assert fingerprint() == fingerprint(None)
    with pytest.raises(TypeError, match="recipe is 'fast'; it must be a Recipe, or None"):
        fingerprint("fast")
