"""The outcome of a GPU run of Hopper's GEMMs: CI has no GPU, so a run's outcome is committed.

On an H100 or H200, at the root of the repository:

    python -m pytest -m gpu --junitxml build/hopper.xml tests/moe/test_hopper_gpu.py \
        tests/dense/test_dense_hopper_gpu.py
    PYTHONPATH=.:tests/support python -m hopper_report build/hopper.xml

The second command writes `hopper_report.json` beside this file: counts of tests, the GPU, versions,
and a digest of the definitions that the kernels are compiled from. A test compares the digest with the
source.
"""

# SPDX-License-Identifier: Apache-2.0
import ast
import datetime
import functools
import hashlib
import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).parents[2]
REPORT = Path(__file__).with_name("hopper_report.json")
_HERE = ROOT / "kernels/moe/hopper"
KERNELS = {
    "expert_gemm_kernel": _HERE / "grouped_gemm.py",
    "dense_gemm_kernel": _HERE / "dense_gemm.py",
    "clear_kernel": _HERE / "dense_gemm.py",
}
_TESTS = "test_hopper_gpu", "test_dense_hopper_gpu"


def definitions() -> dict[str, ast.AST]:
    """Return what the kernels are compiled from, by module and name: what they name, and so on."""
    found: dict[str, ast.AST] = {}
    waiting = [(path, name) for name, path in KERNELS.items()]
    while waiting:
        path, name = waiting.pop()
        here, imported = _names(path)
        key = f"{path.relative_to(ROOT)} {name}"
        if name in imported:
            waiting.append(imported[name])
        elif name in here and key not in found:
            found[key] = here[name]
            used = {n.id for n in ast.walk(here[name]) if isinstance(n, ast.Name)}
            waiting += [(path, each) for each in sorted(used)]
    return dict(sorted(found.items()))


@functools.cache
def _names(path: Path) -> tuple[dict[str, ast.AST], dict[str, tuple[Path, str]]]:
    """Return the definitions of a module, and what its names are that it imports from `kernels/`."""
    here: dict[str, ast.AST] = {}
    imported = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            here[node.name] = node
        elif isinstance(node, ast.Assign):
            here.update({n.id: node for n in node.targets if isinstance(n, ast.Name)})
        elif isinstance(node, ast.ImportFrom) and node.level:
            folder = path.parents[node.level - 1]
            source = folder.joinpath(*(node.module or "").split(".")).with_suffix(".py")
            if source.is_file() and source.is_relative_to(ROOT / "kernels"):
                imported.update({a.asname or a.name: (source, a.name) for a in node.names})
    return here, imported


def digest() -> str:
    """Hash the syntax trees of `definitions`, docstrings and comments apart."""
    trees = [f"{name} {_text(node)}" for name, node in definitions().items()]
    return hashlib.sha256("\n".join(trees).encode()).hexdigest()[:16]


def _text(node: object) -> str:
    """Write a tree the same in every version of Python, which differ in empty fields."""
    if isinstance(node, list):
        return "".join(_text(n) for n in node if not _is_docstring(n))
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [(name, value) for name, value in ast.iter_fields(node) if value not in (None, [])]
    return f"({type(node).__name__} {' '.join(f'{n}={_text(v)}' for n, v in fields)})"


def _is_docstring(node: object) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def counts(junit: Path) -> dict[str, int]:
    """Return how many of the kernels' tests in a JUnit file passed, failed and were skipped."""
    found = {"passed": 0, "failed": 0, "skipped": 0}
    for test in ElementTree.parse(junit).getroot().iter("testcase"):
        if test.get("classname", "").endswith(_TESTS):
            kinds = {child.tag for child in test}
            failed = kinds & {"failure", "error"}
            found["failed" if failed else "skipped" if "skipped" in kinds else "passed"] += 1
    return found


def main(junit: str) -> None:
    import torch
    import triton

    report = {
        "digest": digest(),
        "tests": counts(Path(junit)),
        "device": torch.cuda.get_device_name(),
        "triton": triton.__version__,
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }
    REPORT.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(REPORT.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main(*sys.argv[1:])
