"""The programs beside the package, and the commands that the documentation and the Makefile give.

Most programs of `bench/`, `examples/` and `tests/support/` need a GPU, a model or many minutes, and no
test runs them. These tests look up what they import and what commands name, and run their `--help`.
"""

# SPDX-License-Identifier: Apache-2.0
import ast
import importlib
import re
import shlex
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from paths import ROOT

import nvfp4_moe
from nvfp4_moe.cli.options import COMMANDS, MEASURED

FOLDERS = [ROOT / name for name in ("bench", "examples", "tests/support")]
"""The folders on pytest's `pythonpath`: a program imports its neighbours by their names."""
FILES = sorted(p for f in ("bench", "examples", "tests") for p in (ROOT / f).rglob("*.py"))
PAGES = sorted({*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")} - {ROOT / "CHANGELOG.md"})
"""All pages but the changelog, which also names commands of earlier versions."""
PARSING = sorted(
    path
    for folder in FOLDERS[:2]
    for path in folder.glob("*.py")
    if re.search(r"(?s)^def main.*(parse_args|start)\(", path.read_text("utf-8"), re.M)
)
"""The programs that take options."""
NEEDS_TRANSFORMERS = ("transformers_speed.py", "closed_loop.py")
OPTION = re.compile(r"--[a-z][\w-]*")


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def place(module: str) -> Path | None:
    """Return the file of a module of ours, or the folder of a package without `__init__.py`."""
    parts = module.split(".")
    for folder in [ROOT] if parts[0] == "nvfp4_moe" else FOLDERS:
        path = folder.joinpath(*parts)
        for found in (path.with_suffix(".py"), path / "__init__.py", path):
            if found.exists():
                return found
    return None


@cache
def names_of(path: Path) -> frozenset[str]:
    """Return the names that a module's own code, outside functions and classes, gives a value."""
    if path == ROOT / "nvfp4_moe" / "__init__.py":
        return frozenset(nvfp4_moe.__all__)  # loaded late
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text("utf-8"))] if path.is_file() else []
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        else:
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            waiting += ast.iter_child_nodes(node)
    return frozenset(found)


def own_imports(source: str, package: tuple[str, ...] = ()) -> Iterator[tuple[str, list[str]]]:
    """Yield (module, names) of each import of ours anywhere in a source, with absolute names.

    Args:
        package: the packages that the source is in, for relative imports.
    """
    for node in ast.walk(ast.parse(source)):
        imports: list[tuple[str, list[str]]] = []
        if isinstance(node, ast.Import):
            imports = [(alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *filter(None, [node.module])])
            imports = [(module, [alias.name for alias in node.names])]
        yield from ((m, names) for m, names in imports if place(m.split(".")[0]))


def missing(imports: Iterable[tuple[str, list[str]]]) -> list[str]:
    """Return the modules, and the names in modules, that do not exist."""
    absent = []
    for module, names in imports:
        if (found := place(module)) is None:
            absent.append(module)
            continue
        defined = names_of(found)
        absent += [
            f"{module}.{name}"
            for name in names
            if name not in defined and place(f"{module}.{name}") is None
        ]
    return absent


def test_imports_exist():
    imports = {}
    for path in FILES:
        folder = next((f for f in FOLDERS if path.is_relative_to(f)), ROOT)
        package = path.relative_to(folder).parts[:-1]
        imports[relative(path)] = list(own_imports(path.read_text("utf-8"), package))
    assert sum(map(len, imports.values())) > 1000
    assert {path: names for path, some in imports.items() if (names := missing(some))} == {}


@pytest.mark.parametrize(
    "source,absent",
    [
        ("from nvfp4_moe.bench.moe import SHAPES, no_name", ["nvfp4_moe.bench.moe.no_name"]),
        ("def f():\n    import nvfp4_moe.no_module", ["nvfp4_moe.no_module"]),
        ("from measure import no_name, save", ["measure.no_name"]),
        ("from nvfp4_moe.kernels import no_module, records", ["nvfp4_moe.kernels.no_module"]),
        ("from nvfp4_moe import Linear", ["nvfp4_moe.Linear"]),
        ("from .arithmetic import ARITHMETIC, SUM", ["loop.arithmetic.SUM"]),
        ("from nvfp4_moe import fused_moe, kernels\nimport torch.no_module", []),
    ],
)
def test_a_missing_import_is_found(source, absent):
    assert missing(own_imports(source, ("loop",))) == absent


def program(path: Path):
    """Return the module of a program."""
    if path.name in NEEDS_TRANSFORMERS:
        pytest.importorskip("transformers", reason="needs transformers (make test-transformers)")
    return importlib.import_module(path.stem)


def test_programs_are_found():
    assert {"moe_speed.py", "tightness.py", "rl_loop.py"} <= {path.name for path in PARSING}


@pytest.mark.parametrize("path", PARSING, ids=relative)
def test_help(path, monkeypatch, capsys):
    """It is printed where there is no GPU, and names the options that the source has."""
    main = program(path).main
    monkeypatch.setattr("sys.argv", [path.name, "--help"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    assert options_of(path) <= set(OPTION.findall(capsys.readouterr().out))


def test_benchmarks_are_collected():
    """`pytest bench` finds cases of each operation, where `bench/` is on the path."""
    module = importlib.import_module("test_speed")
    for name in MEASURED:
        (mark,) = getattr(module, f"test_{name}").pytestmark
        assert mark.args[0] == "case" and len(mark.args[1]) > 1


def options_of(path: Path) -> set[str]:
    """Return the options that a program's source, or a neighbour that it imports, adds to a parser."""
    source = path.read_text("utf-8")
    found = set(re.findall(r"add_argument\(\s*\"(--[\w-]+)\"", source))
    for neighbour in path.parent.glob("*.py"):
        if re.search(rf"^from {neighbour.stem} import .*\barguments\b", source, re.M):
            found |= options_of(neighbour)
    return found


def commands(page: str) -> Iterator[list[str]]:
    """Yield the words of the commands in a page's code: of nvfp4-moe, make, pytest and our programs."""
    blocks = re.findall(r"^```(?:sh|bash|console)?\n(.*?)^```$", page, re.M | re.S)
    without = re.sub(r"^```.*?^```$", "", page, flags=re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    for line in lines + re.findall(r"`([^`\n]+)`", without):
        for part in re.split(r"&&|\||;", line.split(" #")[0]):
            try:
                words = shlex.split(part)
            except ValueError:  # an apostrophe of a sentence that a block shows
                continue
            while words and re.fullmatch(r"\w+=\S*", words[0]):
                words.pop(0)
            if words and re.fullmatch(r"(\S*/)?python3?|\$\(PYTHON\)", words[0]):
                words = words[2:] if words[1:2] == ["-m"] else words[1:]
            if words:
                yield [word.strip("[]") for word in words]


def problem(words: list[str]) -> str | None:
    """Return what a command names that does not exist, or None."""
    name, *rest = words
    given = [OPTION.match(word)[0] for word in rest if OPTION.match(word)]  # type: ignore[index]
    if name in ("nvfp4-moe", "nvfp4_moe"):
        return problem_of_subcommand(rest, given)
    if name == "make":
        targets = [word for word in rest if "=" not in word and not word.startswith("-")]
        return next((f"no target {t}" for t in targets if t not in TARGETS), None)
    if name == "pytest":
        paths = (word.split("::")[0] for word in rest if word.startswith(("tests", "bench")))
        return next((f"no file {p}" for p in paths if not (ROOT / p).exists()), None)
    if re.match(r"(bench|examples|tests)/.*\.py$", name):
        if not (ROOT / name).exists():
            return f"no file {name}"
        known = options_of(ROOT / name)
        return next((f"{name} has no {o}" for o in given if o not in known), None)
    return None


def problem_of_subcommand(rest: list[str], given: list[str]) -> str | None:
    if not rest or not re.fullmatch(r"[a-z-]+", rest[0]) or rest[0].startswith("--"):
        return None
    if rest[0] not in COMMANDS:
        return f"no subcommand {rest[0]}"
    known = {option.name: option for option in COMMANDS[rest[0]].all_options}
    for option in given:
        if option not in known and option != "--help":
            return f"{rest[0]} has no {option}"
    for option, value in pairwise(rest):
        choices = known[option].choices if option in known else ()
        if choices and value.islower() and value not in (*choices, *known[option].earlier):
            return f"{rest[0]} {option} has no {value}"
    return None


MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
TARGETS = set(re.findall(r"^([a-z][\w-]*):", MAKEFILE, re.M))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_a_page_exist(page):
    found = commands(page.read_text("utf-8"))
    assert [(words, said) for words in found if (said := problem(words))] == []


def test_commands_are_found():
    found = [words for page in PAGES for words in commands(page.read_text("utf-8"))]
    first = [words[0] for words in found]
    assert first.count("nvfp4-moe") > 20 and first.count("make") > 20 and first.count("pytest") > 8
    assert len([name for name in first if name.startswith(("bench/", "examples/"))]) > 12


@pytest.mark.parametrize(
    "line,said",
    [
        (
            "`python bench/training_speed.py --profiles`",
            "bench/training_speed.py has no --profiles",
        ),
        ("`python bench/no_speed.py`", "no file bench/no_speed.py"),
        ("`python3 -m pytest -n 16 tests/no_folder`", "no file tests/no_folder"),
        ("```\nnvfp4-moe diff --only quantize  # a comment\n```", "diff --only has no quantize"),
        ("`nvfp4-moe bench --reload`", "bench has no --reload"),
        ("`python -m nvfp4_moe measure`", "no subcommand measure"),
        ("```sh\nA=1 make no-target B=2\n```", "no target no-target"),
        ("`nvfp4-moe diff --only moe [--replay]` and `make test PYTHON=python3`", None),
    ],
)
def test_a_wrong_command_is_found(line, said):
    assert next(filter(None, map(problem, commands(line))), None) == said


def test_the_makefile_names_what_exists():
    """Files of the repository, modules, and targets that are no files."""
    named = re.findall(r"(?<![\w/.$)])((?:bench|examples|docs|tests|nvfp4_moe)/[\w/.-]+)", MAKEFILE)
    assert [name for name in named if not (ROOT / name.rstrip(".")).exists()] == []
    modules = set(re.findall(r"python\S* -m (\w[\w.]*)|PYTHON\) -m (\w[\w.]*)", MAKEFILE))
    absent = {"".join(m) for m in modules if place("".join(m)) is None} - INSTALLED
    assert len(named) > 20 and len(modules) > len(INSTALLED) and absent == set()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.M)
    files = {target for target in TARGETS if "/" in target}
    assert set(phony.split()) == TARGETS - files


INSTALLED = {"pytest", "pip", "venv", "ruff", "codespell_lib", "mypy", "mkdocs", "build", "zipfile"}
"""Modules of other packages that the Makefile runs."""


def test_commands_of_the_makefile_exist():
    lines = re.findall(r"^\t[-@!]?(.*(?:\\\n.*)*)", MAKEFILE, re.M)
    text = "".join(f"```\n{line}\n```\n" for line in lines).replace(
        "$(MUTANTS)", "python -m mutants"
    )
    assert [(words, said) for words in commands(text) if (said := problem(words))] == []
