"""The tree itself: what is packaged, who imports what, how files begin."""

# SPDX-License-Identifier: Apache-2.0
import ast
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from paths import ROOT

import nvfp4_moe
from nvfp4_moe.earlier_paths import EARLIER_PATHS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest itself needs it there

PACKAGES = {
    "nvfp4_moe": "nvfp4_moe",
    "kernels": "nvfp4_moe.kernels",
    "reference": "nvfp4_moe.reference",
}
LINKS = {
    "src/nvfp4_moe": "../nvfp4_moe",
    "nvfp4_moe/kernels": "../kernels",
    "nvfp4_moe/reference": "../reference",
}
FOLDERS: dict[str, set[str]] = {
    "cases": set(),
    "console": set(),
    "bench": {"checkpoints"},
    "checkpoints": set(),
    "parallel": set(),
    "training": set(),
    "serving": {"canary", "checkpoints", "training"},
    "differential": {"cases", "console"},
    "report": {"cases", "console", "differential"},
    "failures": {"cases", "console", "differential", "report"},
    "canary": {"cases", "differential", "failures"},
    "cli": {
        "bench",
        "cases",
        "checkpoints",
        "console",
        "differential",
        "failures",
        "report",
        "serving",
    },
}
"""The folders of `nvfp4_moe/` and what each imports of the others, besides flat modules, kernels and
reference. `cli` runs commands by the functions of the others, and nothing imports `cli` but
`__main__`."""
FLAT = {"__main__": {"cli", "report"}, "public": {"training"}}
"""The modules that lie flat in `nvfp4_moe/` and import one of its folders."""
MOST_FLAT = {"kernels": 12, "kernels/moe": 15, "nvfp4_moe": 10, "reference": 12}
"""The most modules that lie side by side in a folder. Where there is one more, some make a folder."""
MOST_FRAGMENTS = 20
"""Docstrings that may begin with a fragment: write what the thing is or does, in a sentence."""
REFERENCE = (
    "environment", "checks", "numerics", "recipe", "activation", "layouts", "quantize",
    "fused_quantize", "dense", "weights", "moe", "statistics", "bounds", "fingerprint",
)  # fmt: skip
"""The files and folders of `reference/`, in order: each imports none that follows it."""
KERNELS = (
    "environment", "device", "tiles", "attributes", "dispatch", "records", "op_schema", "jit",
    "triton_target", "launcher", "backends", "allocate", "decode", "instruction_probe", "call",
    "flashinfer", "quantize", "fused_quantize", "weights", "baseline_moe", "moe", "dense",
)  # fmt: skip
"""The files and folders of `kernels/`, in order: each imports none that follows it.

`call` is the `call.py` of every folder: FlashInfer's adapters read these checked calls, and the folders
import the adapters.
"""
LATE_KERNELS = {("moe/call.py", "moe.routing")}  # logits are routed in Triton where it runs
"""Imports inside functions of `kernels/` that are against this order."""
LATE_IMPORTS = {
    ("weights/experts.py", "weights/checksum.py"),  # Experts.checksum
    ("weights/experts.py", "weights/update.py"),  # Experts.load_
    ("weights/writers.py", "weights/update.py"),  # so that the table of writers needs no torch
}
"""Imports inside functions of `reference/` that would otherwise close a cycle."""
REFERENCE_NAMES = (
    "activation.ActivationType",
    "bounds.fused_moe_bounds",
    "bounds.routed_moe_bounds",
    "bounds.parallel.expert_parallel_bounds",
    "bounds.parallel.tensor_parallel_bounds",
    "bounds_parallel.expert_parallel_bounds",
    "bounds_parallel.tensor_parallel_bounds",
    "dense.mm_fp4",
    "grouped.fused_moe_grouped",
    "grouped.quantize_grouped",
    "moe.fused_moe",
    "moe.grouped.fused_moe_grouped",
    "moe.masked.fused_moe_grouped",
    "moe.masked.fused_moe_masked",
    "moe.masked.quantize_masked",
    "moe.quantize_activations",
    "moe.routing.route",
    "moe.shards.fused_moe_shards",
    "quantize.quantize_per_token",
    "recipe.Recipe",
    "routing.route",
    "shards.fused_moe_shards",
)
"""Names of `nvfp4_moe.reference` that the documentation has, or had."""
TEXT = (".py", ".md", ".toml", ".txt", ".yml", ".yaml", ".json", ".cfg", ".sh", "")


def tree() -> Iterator[Path]:
    """The project's own files: no environment, build or cache."""
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [
            f
            for f in folders
            if (f in (".ci", ".github") or not f.startswith("."))
            and f not in ("build", "dist", "shared", "__pycache__")
            and not f.endswith(".egg-info")
            and not (Path(folder) / f / "pyvenv.cfg").exists()
        ]
        yield from (Path(folder) / name for name in names)


PYTHON = sorted(path for path in tree() if path.suffix == ".py")


def statements(node: ast.AST, late: bool) -> Iterator[ast.AST]:
    """Yield what lies within a node; without `late` nothing inside functions or for type checkers."""
    for child in ast.iter_child_nodes(node):
        runs_later = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if late or not (
            runs_later or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test))
        ):
            yield child
            yield from statements(child, late)


def imports(path: Path, *, late: bool = True) -> Iterator[str]:
    """Names of the modules that a file imports, relative ones made absolute.

    Args:
        late: also those that are imported inside functions, and for type checkers alone.
    """
    parts = path.relative_to(ROOT).parts
    inside = PACKAGES.get(parts[0], "").split(".") + list(parts[1:-1])
    for node in statements(ast.parse(path.read_text()), late):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*inside[: len(inside) - node.level + 1]] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("document", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_the_guides_name_files_that_exist(document):
    """Whoever moves a file finds the guides that send people to it."""
    named = re.findall(
        r"`((?:kernels|reference|nvfp4_moe|tests|bench|examples|docs|src|\.ci)/[\w./]*)`",
        (ROOT / document).read_text(encoding="utf-8"),
    )
    assert len(named) > 10
    for name in named:
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("tool", ["ruff", "codespell"])
def test_the_hooks_use_the_pinned_linters(tool):
    """Two versions of a formatter undo each other's work."""
    pinned = re.search(rf"^({tool}==\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned
    hooks = re.findall(rf"{tool}==[^\s\"]+", (ROOT / ".pre-commit-config.yaml").read_text())
    assert set(hooks) == {pinned[1]}


def run(program: str) -> str:
    """Run a program in a process of its own, and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def setuptools() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_every_folder_with_python_files_is_packaged(setuptools):
    """A forgotten sub-package is missing from the wheel only, where no test here would look."""
    discovery = pytest.importorskip("setuptools.discovery", reason="needs setuptools")
    assert setuptools["package-dir"] == {"": "src"}
    found = setuptools["packages"]["find"]
    packaged = {
        package
        for where in found["where"]
        for package in discovery.PEP420PackageFinder.find(ROOT / where, found["exclude"])
    }
    folders = {path.parent.relative_to(ROOT).parts for path in PYTHON}
    expected = {
        ".".join([PACKAGES[folder[0]], *folder[1:]])
        for folder in folders
        if folder and folder[0] in PACKAGES
    }
    assert packaged == expected


@pytest.mark.parametrize(("link", "target"), LINKS.items())
def test_the_package_is_whole_by_links_inside_the_tree(link, target):
    """Relative links, so that they hold in every copy of the tree."""
    path = ROOT / link
    assert path.is_symlink(), (
        f"{link} is not a link to {target}; on Windows, clone with `-c core.symlinks=true`"
    )
    assert path.readlink().as_posix() == target
    assert path.resolve() == ROOT / Path(target).name


def test_every_data_file_is_packaged(setuptools):
    for folder, package in PACKAGES.items():
        patterns = setuptools["package-data"].get(package, [])
        for path in tree():
            name = path.relative_to(ROOT).as_posix()
            if name.startswith(f"{folder}/") and path.suffix != ".py":
                inner = name[len(folder) + 1 :]
                assert any(fnmatch(inner, pattern) for pattern in patterns), name


def test_only_the_package_has_an_init_file():
    """An `__init__.py` would let a checkout on `sys.path` hide other packages of these names."""
    for folder in ("kernels", "reference", "tests", "bench"):
        assert not (ROOT / folder / "__init__.py").exists(), folder


def test_nothing_imports_what_a_wheel_lacks():
    """In a checkout top-level `kernels`, `reference`, `tests` and `bench` exist too."""
    for path in PYTHON:
        for name in imports(path):
            first = name.split(".")[0]
            assert first not in ("kernels", "reference", "tests", "bench"), f"{path}: {name}"


def test_reference_depends_on_torch_alone():
    for path in PYTHON:
        if path.relative_to(ROOT).parts[0] != "reference":
            continue
        for name in imports(path):
            first = name.split(".")[0]
            assert first in sys.stdlib_module_names | {"torch"} or name.startswith(
                "nvfp4_moe.reference."
            ), f"{path}: {name}"


def test_the_device_functions_know_no_operation():
    """`kernels/jit` imports Triton, the reference's constants and itself."""
    for path in (ROOT / "kernels" / "jit").glob("*.py"):
        for name in imports(path):
            assert name.split(".")[0] == "triton" or name.startswith(
                ("nvfp4_moe.kernels.jit.", "nvfp4_moe.reference.")
            ), f"{path}: {name}"


def test_one_folder_imports_flashinfer():
    for path in PYTHON:
        folder, inner, *_ = [*path.relative_to(ROOT).parts, ""]
        if folder in PACKAGES and (folder, inner) != ("kernels", "flashinfer"):
            assert not [name for name in imports(path) if name.split(".")[0] == "flashinfer"], path


def test_folders_import_in_one_direction():
    """Exactly what `FOLDERS` says, which has no cycle."""
    list(TopologicalSorter(FOLDERS).static_order())  # raises CycleError
    found: dict[str, set[str]] = {name: set() for name in FOLDERS}
    flat: dict[str, set[str]] = {}
    for path in PYTHON:
        first, *inside = path.relative_to(ROOT).with_suffix("").parts
        if first == "nvfp4_moe":
            importer = inside[0]
            others = {name.split(".")[1] for name in imports(path) if name.startswith("nvfp4_moe.")}
            into = found[importer] if len(inside) > 1 else flat.setdefault(importer, set())
            into |= (others & set(FOLDERS)) - {importer}
    assert found == FOLDERS
    assert {module: folders for module, folders in flat.items() if folders} == FLAT


def test_kernels_know_nothing_of_the_tools():
    for path in PYTHON:
        if path.relative_to(ROOT).parts[0] == "kernels":
            inside = {name.split(".")[1] for name in imports(path) if name.startswith("nvfp4_moe.")}
            assert not inside & (set(FOLDERS) | set(FLAT)), path


def test_kernels_import_one_way():
    folder = ROOT / "kernels"
    found = {path.stem for path in folder.iterdir() if path.name != "__pycache__"}
    assert found | {"call"} == set(KERNELS)

    def room(parts: list[str]) -> str:
        return "call" if parts[1:2] == ["call"] else parts[0]

    for path in sorted(folder.rglob("*.py")):
        importer = room(list(path.relative_to(folder).with_suffix("").parts))
        for name in imports(path):
            if name.startswith("nvfp4_moe.kernels."):
                module = name.removeprefix("nvfp4_moe.kernels.")
                late = path.relative_to(folder).as_posix(), module
                before = KERNELS[: KERNELS.index(importer) + 1]
                assert room(module.split(".")) in before or late in LATE_KERNELS, f"{path}: {name}"


@pytest.mark.parametrize(("folder", "most"), MOST_FLAT.items())
def test_few_modules_lie_flat(folder, most):
    assert 0 < len(list((ROOT / folder).glob("*.py"))) <= most


@pytest.mark.parametrize(("earlier", "today"), EARLIER_PATHS.items())
def test_an_earlier_path_warns_and_gives_the_module_of_today(earlier, today):
    sys.modules.pop(earlier, None)
    with pytest.warns(DeprecationWarning, match=f"{earlier} is now {today}"):
        module = importlib.import_module(earlier)
    assert module is importlib.import_module(today) and module.__spec__.name == today
    parent, _, name = earlier.rpartition(".")
    assert getattr(sys.modules[parent], name) is module


def reference_imports() -> Iterator[tuple[str, str]]:
    """(file, file that it imports), relative to `reference/`, late imports and those of types too."""
    folder = ROOT / "reference"
    for path in sorted(folder.rglob("*.py")):
        for name in imports(path):
            parts = name.split(".")[2:] if name.startswith("nvfp4_moe.reference.") else []
            while parts:
                module = folder.joinpath(*parts)
                if module.is_dir() or module.with_suffix(".py").is_file():
                    file = module / "__init__.py" if module.is_dir() else module.with_suffix(".py")
                    yield path.relative_to(folder).as_posix(), file.relative_to(folder).as_posix()
                    break
                parts.pop()


def test_reference_imports_one_way():
    rooms = {path.stem for path in (ROOT / "reference").iterdir() if not path.stem.startswith("_")}
    assert rooms == set(REFERENCE)
    for file, imported in reference_imports():
        room, other = (Path(f).parts[0].removesuffix(".py") for f in (file, imported))
        assert other in REFERENCE[: REFERENCE.index(room) + 1], f"{file} imports {imported}"


def test_reference_has_no_import_cycle():
    edges = set(reference_imports())
    assert edges >= LATE_IMPORTS, "an exception that is not needed"
    graph: dict[str, set[str]] = {}
    for file, imported in edges - LATE_IMPORTS:
        graph.setdefault(file, set()).add(imported)
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


def test_no_module_needs_another_that_needs_it():
    """No cycle among the imports outside functions, in all of the package."""
    modules = {
        ".".join([PACKAGES[first], *rest]).removesuffix(".__init__"): path
        for path in PYTHON
        for first, *rest in [path.relative_to(ROOT).with_suffix("").parts]
        if first in PACKAGES
    }
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        for name in imports(path, late=False):
            while name and name not in modules:
                name = name.rpartition(".")[0]
            # The package itself imports nothing: its names are loaded at their first use.
            if name not in ("", "nvfp4_moe", module):
                graph.setdefault(module, set()).add(name)
    assert sum(map(len, graph.values())) > 1000
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


def test_reference_is_in_folders_that_say_what_they_hold():
    folder = ROOT / "reference"
    for inner in (path for path in folder.iterdir() if path.is_dir() and path.name[0] != "_"):
        text = ast.get_docstring(ast.parse((inner / "__init__.py").read_text())) or ""
        named = re.findall(r"`(\w+\.\w+)`", text)
        assert named and all((inner / name).is_file() for name in named), f"{inner}: {named}"


def test_no_module_imports_a_private_name_of_another():
    """A name that two modules need is part of the first one's interface, and has no underscore."""
    for path in PYTHON:
        if path.relative_to(ROOT).parts[0] in (*PACKAGES, "bench", "examples"):
            for name in imports(path):
                own = name.startswith("nvfp4_moe.")
                assert not (own and re.search(r"\._(?!_)", name)), f"{path}: {name}"


def test_only_users_import_the_earlier_paths():
    earlier = tuple(f"{name}." for name in EARLIER_PATHS)
    for path in PYTHON:
        for name in imports(path):
            assert not f"{name}.".startswith(earlier), f"{path}: {name}"


@pytest.mark.parametrize("name", REFERENCE_NAMES)
def test_a_documented_name_is_where_the_documentation_says(name):
    module, _, attribute = name.rpartition(".")
    assert callable(getattr(importlib.import_module(f"nvfp4_moe.reference.{module}"), attribute))


def test_reference_runs_without_triton_flashinfer_and_numpy():
    program = """
import sys
for name in ("triton", "flashinfer", "numpy"):
    sys.modules[name] = None  # importing it raises
import nvfp4_moe.reference.quantize as quantize
import torch
from nvfp4_moe.reference.recipe import Recipe
q = quantize.quantize_per_token(torch.full((1, 16), 2688.0).bfloat16(), 1 / 2688, Recipe())
assert q.codes.tolist() == [[0x77] * 8] and q.block_scales.tolist() == [[0x7E]]
assert q.per_token_scale.tolist() == [1.0]
"""
    run(program)


def test_every_file_begins_with_its_docstring_and_licence():
    for path in PYTHON:
        text = path.read_text()
        docstring = ast.parse(text).body[:1]
        assert docstring and ast.get_docstring(ast.parse(text)), f"{path}: no docstring"
        after = text.splitlines()[docstring[0].end_lineno :]
        comment = next((line for line in after if line), "")
        assert comment == "# SPDX-License-Identifier: Apache-2.0", f"{path}: {comment!r}"


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of the docstrings of a file, those of fields and constants too."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Expr(ast.Constant(str() as text)):
                yield node.lineno, text


def test_docstrings_are_sentences():
    """Few begin with a word that leaves out the subject, as "Of the rows" does."""
    fragment = re.compile(r"(Of|What|Whether|How|Where|The same)\b")
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text.splitlines()[0]}"
        for path in PYTHON
        for line, text in docstrings(path)
        if fragment.match(text)
    ]
    assert len(found) <= MOST_FRAGMENTS, "\n".join(found)


def test_no_file_is_too_long():
    """250 lines are a module; above 600 it is several."""
    for path in PYTHON:
        assert len(path.read_text().splitlines()) <= 600, path


def test_no_line_names_a_place_on_one_machine():
    place = re.compile(r"(?<![\w.:/*-])/(home|root|work|tmp|mnt|scratch|workspace|Users)/\w")
    for path in tree():
        if path.suffix in TEXT and path.name != "LICENSE":
            for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
                assert not place.search(line), f"{path}:{number}: {line.strip()}"


def test_the_extra_admits_the_flashinfer_that_the_adapters_call():
    """The one that `constraints.txt` pins and the adapters cite, and the newest that they describe."""
    requirements = pytest.importorskip("packaging.requirements", reason="needs packaging")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    admitted = requirements.Requirement(extras["flashinfer"][0]).specifier
    pins = (ROOT / "constraints.txt").read_text()
    assert (pinned := re.search(r"^flashinfer-python==(\S+)", pins, re.MULTILINE))
    assert pinned[1] in admitted
    assert "0.7.4" in admitted


def test_every_public_name_is_loaded_at_its_first_use():
    from nvfp4_moe import public

    imported = {name for name, value in vars(public).items() if not name.startswith("_")}
    assert imported | {"__version__"} == set(nvfp4_moe.__all__)
    assert len(set(nvfp4_moe.__all__)) == len(nvfp4_moe.__all__)
    everything: dict = {}
    exec("from nvfp4_moe import *", everything)
    for name in imported:
        assert getattr(nvfp4_moe, name) is everything[name] is getattr(public, name)
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = nvfp4_moe.no_such_name


def test_the_import_of_the_package_loads_no_torch():
    """Nor does a look at what it has; the first use of a name does."""
    run("""
import sys
import nvfp4_moe
assert set(nvfp4_moe.__all__) <= set(dir(nvfp4_moe))
assert isinstance(nvfp4_moe.__version__, str)
assert "torch" not in sys.modules
assert nvfp4_moe.Recipe().math == "fast"
assert "torch" in sys.modules
""")


@pytest.mark.parametrize(
    "first",
    [
        "from nvfp4_moe.reference.weights.update import load_",
        "from nvfp4_moe.reference.weights.experts import Experts",
        "import nvfp4_moe.kernels.weights.update",
        "from nvfp4_moe import Experts",
    ],
)
def test_load_finds_its_triton_writer_whatever_was_imported_first(first):
    """On a CPU, where the writer says why it cannot run."""
    run(f"""
{first}
import torch
from nvfp4_moe.reference.weights.writers import WRITERS
assert list(WRITERS) == ["triton"]
writer, reason = WRITERS["triton"](torch.device("cpu"))
assert (writer is None) == bool(reason) and "backend" not in reason, reason
print(reason)
""")


@pytest.mark.slow
def test_every_module_can_be_the_first_that_is_imported():
    """The package loads none of its modules, so a cycle may show in one order of imports alone."""
    modules = [
        ".".join([PACKAGES[first], *rest]).removesuffix(".__init__")
        for path in PYTHON
        for first, *rest in [path.relative_to(ROOT).with_suffix("").parts]
        if first in PACKAGES and path.name != "__main__.py"
    ]
    printed = run(f"""
import importlib, os, sys, traceback
import torch, triton
assert "nvfp4_moe" not in sys.modules
for name in {modules!r}:
    if (child := os.fork()) == 0:
        try:
            importlib.import_module(name)
        except BaseException as e:
            # A plug-in's modules need their server, and nothing else that is missing here.
            server = name.split(".")[2:3] if name.startswith("nvfp4_moe.serving.") else []
            if isinstance(e, ModuleNotFoundError) and server == [e.name]:
                os._exit(0)
            print(name, traceback.format_exc(), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
""")
    assert printed == ""


def test_no_module_hides_a_public_name():
    """An imported submodule becomes an attribute of the package, in the place of what is there."""
    modules = {path.stem for path in (ROOT / "nvfp4_moe").iterdir() if path.stem != "__init__"}
    assert not modules & set(nvfp4_moe.__all__)
