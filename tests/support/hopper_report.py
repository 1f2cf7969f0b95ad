"""What a GPU said of Hopper's grouped GEMM: CI has no GPU, so a run's outcome is committed.

On an H100 or H200, at the root of the repository:

    python -m pytest -m gpu --junitxml build/hopper.xml tests/moe/test_hopper_gpu.py
    PYTHONPATH=.:tests/support python -m hopper_report build/hopper.xml

The second command writes `hopper_report.json` beside this file: counts of tests, the GPU, versions, and
a digest of the source that the kernel is compiled from. A test compares the digest with the source.
"""

# SPDX-License-Identifier: Apache-2.0
import ast
import datetime
import hashlib
import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).parents[2]
REPORT = Path(__file__).with_name("hopper_report.json")
_KERNEL = ROOT / "kernels/moe/hopper/grouped_gemm.py"


def modules() -> list[Path]:
    """Return the files of `kernels/` that the kernel is compiled from: what it imports, and so on."""
    found: dict[Path, None] = {}
    waiting = [_KERNEL]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found[path] = None
            waiting += _imported(path)
    return sorted(found)


def _imported(path: Path) -> list[Path]:
    nodes = [n for n in ast.walk(_tree(path)) if isinstance(n, ast.ImportFrom) and n.level]
    files = [
        path.parents[n.level - 1].joinpath(*(n.module or "").split(".")).with_suffix(".py")
        for n in nodes
    ]
    return [f for f in files if f.is_file() and f.is_relative_to(ROOT / "kernels")]


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def digest() -> str:
    """Hash the syntax trees of `modules`, docstrings and comments apart."""
    trees = [f"{path.relative_to(ROOT)} {_text(_tree(path))}" for path in modules()]
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
    """Return how many tests of a JUnit file passed, failed and were skipped."""
    suites = list(ElementTree.parse(junit).getroot().iter("testsuite"))
    number = {
        name: sum(int(s.get(name, 0)) for s in suites)
        for name in ("tests", "failures", "errors", "skipped")
    }
    failed = number["failures"] + number["errors"]
    return {
        "passed": number["tests"] - failed - number["skipped"],
        "failed": failed,
        "skipped": number["skipped"],
    }


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
