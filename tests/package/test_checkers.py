"""mypy and pyright see the whole package: in a checkout, in an editable install and in a wheel."""

# SPDX-License-Identifier: Apache-2.0
import inspect
import json
import re
import shutil
import subprocess
import sys
import typing
import venv
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import pytest
from paths import ROOT

import nvfp4_moe
from nvfp4_moe.kernels.dense.api import MM_FP4, DenseBackend
from nvfp4_moe.kernels.fused_quantize.api import FUSED_QUANTIZE, FusedQuantizeBackend
from nvfp4_moe.kernels.moe.backends import FUSED_MOE, MoEBackend
from nvfp4_moe.kernels.quantize.api import QUANTIZE, QuantizeBackend
from nvfp4_moe.reference.weights.writers import WRITERS, WriterName

NEEDED = ("LICENSE", "README.md", "kernels", "nvfp4_moe", "pyproject.toml", "reference", "src")
FORMS = ("checkout", "editable", "wheel")
USER = """
import torch
import nvfp4_moe
from nvfp4_moe.kernels.triton_target import INTERPRETING
from nvfp4_moe.reference.recipe import SfLayout

reveal_type(nvfp4_moe.fused_moe)
reveal_type(nvfp4_moe.explain)
reveal_type(nvfp4_moe.Experts.load_)
reveal_type(nvfp4_moe.Recipe("exact").math)
reveal_type(INTERPRETING)
reveal_type(SfLayout.layout_128x4.value)
x = torch.Tensor()
flag = bool(x)
reveal_type(nvfp4_moe.nvfp4_quantize(x, 1.0))
reveal_type(nvfp4_moe.nvfp4_quantize(x, 1.0, per_token_activation=False))
reveal_type(nvfp4_moe.nvfp4_quantize(x, x, backend="triton", per_token_activation=True))
reveal_type(nvfp4_moe.nvfp4_quantize(x, 1.0, per_token_activation=flag))
layer = nvfp4_moe.prepare_experts(x, x)
routing = x, nvfp4_moe.Routing(nvfp4_moe.RoutingMethodType.Renormalize, 2)
reveal_type(nvfp4_moe.fused_moe(x, layer, routing))
reveal_type(nvfp4_moe.fused_moe(x, layer, (x, x), activation="bf16", stats=False))
reveal_type(nvfp4_moe.fused_moe(x, layer, (x, x), backend="mine", stats=True))
reveal_type(nvfp4_moe.fused_moe(x, layer, (x, x), stats=flag))
nvfp4_moe.no_such_name
""" + "".join(f"nvfp4_moe.{name}\n" for name in nvfp4_moe.__all__)
TENSOR = r"([\w.]+\.)?Tensor"
PAIR = rf"tuple\[{TENSOR}, ([\w.]+\.)?MoEStatistics\]"
REVEALED = (
    r"experts: ([\w.]+\.)?Experts",
    r"-> ([\w.]+\.)?Explanation",
    r"self: ([\w.]+\.)?Experts",
    "'fast'.*'exact'",
    r"\bbool\b",
    r"Literal\[0\]",
    rf"tuple\[{TENSOR}, {TENSOR}\]",
    rf"tuple\[{TENSOR}, {TENSOR}\]",
    rf"tuple\[{TENSOR}, {TENSOR}, {TENSOR}\]",
    rf"tuple\[{TENSOR}, \.\.\.\]",
    rf"\"{TENSOR}\"$",
    rf"\"{TENSOR}\"$",
    rf"\"{PAIR}\"$",
    rf"\"{TENSOR} \| {PAIR}\"$",
)
TORCH = """
from typing import Any
class Tensor: ...
def __getattr__(name: str) -> Any: ...
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A copy of the tree, so that a build leaves nothing in this one."""
    root = tmp_path_factory.mktemp("checkout")
    unused = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in NEEDED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, root / name, symlinks=True, ignore=unused)
        else:
            shutil.copy(ROOT / name, root / name)
    return root


@pytest.fixture(scope="module", params=FORMS)
def form(request, copy, tmp_path_factory) -> tuple[Path, Path]:
    """An interpreter that has the package in this form, and the folder that its user works in.

    The interpreter has no torch, which takes a checker half a minute to read, but a stub of it.
    """
    folder = tmp_path_factory.mktemp(request.param)
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv/bin/python"
    (packages,) = (folder / "venv").glob("lib/*/site-packages")
    (packages / "torch-stubs").mkdir()
    (packages / "torch-stubs/__init__.pyi").write_text(TORCH)
    if request.param == "checkout":
        return python, copy
    reason = "needs setuptools 77 or later, to build without a network"
    pytest.importorskip("setuptools", "77", reason=reason)
    build = {"editable": "build_editable", "wheel": "build_wheel"}[request.param]
    program = f"from setuptools import build_meta; build_meta.{build}({str(folder)!r})"
    run(sys.executable, "-c", program, cwd=copy)
    (built,) = folder.glob("*.whl")
    zipfile.ZipFile(built).extractall(packages)
    return python, folder


def run(*words: str, cwd: Path, status: int = 0) -> str:
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


def mypy(python: Path, user: Path) -> list[tuple[int, str]]:
    pytest.importorskip("mypy", reason="mypy is not installed")
    told = run(
        *(sys.executable, "-m", "mypy", "--config-file=", f"--python-executable={python}"),
        *(f"--cache-dir={user.parent / 'cache'}", user.name),
        cwd=user.parent,
        status=1,
    )
    return [
        (int(found[1]), found[2])
        for line in told.splitlines()
        if (found := re.match(rf"{user.name}:(\d+): \w+: (.*)", line))
    ]


def pyright(python: Path, user: Path) -> list[tuple[int, str]]:
    if find_spec("basedpyright") is None:
        pytest.skip("basedpyright is not installed")
    told = run(
        *(sys.executable, "-m", "basedpyright", "--pythonpath", str(python), "--outputjson"),
        user.name,
        cwd=user.parent,
        status=1,
    )
    return [
        (found["range"]["start"]["line"] + 1, found["message"])
        for found in json.loads(told)["generalDiagnostics"]
        if found["severity"] in ("error", "information")
        and found.get("rule") != "reportMissingModuleSource"  # torch is a stub here
    ]


@pytest.mark.parametrize("checker", [mypy, pyright], ids=lambda c: c.__name__)
def test_a_checker_sees_every_public_function(form, checker: Callable):
    python, folder = form
    user = folder / "user.py"
    user.write_text(USER)
    lines = USER.splitlines()
    told = checker(python, user)
    revealed = [text for line, text in told if lines[line - 1].startswith("reveal_type")]
    assert len(revealed) == len(REVEALED), told
    for text, expected in zip(revealed, REVEALED, strict=True):
        assert re.search(expected, text), text
    errors = [text for line, text in told if not lines[line - 1].startswith("reveal_type")]
    assert len(errors) == 1 and "no_such_name" in errors[0], errors


@pytest.mark.parametrize(
    ("declared", "accepted"),
    [
        (QuantizeBackend, QUANTIZE.accepted),
        (DenseBackend, MM_FP4.accepted),
        (FusedQuantizeBackend, FUSED_QUANTIZE.accepted),
        (MoEBackend, FUSED_MOE.accepted),
        (WriterName, ("auto", "reference", *WRITERS)),
    ],
    ids=["nvfp4_quantize", "mm_fp4", "fused_quantize", "fused_moe", "load_"],
)
def test_the_names_of_a_type_are_those_that_a_call_accepts(declared, accepted):
    assert sorted(get_args(declared)) == sorted(accepted)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="needs typing.get_overloads of Python 3.11")
@pytest.mark.parametrize("name", ["nvfp4_quantize", "fused_moe"])
def test_overloads_have_the_parameters_of_their_function(name):
    function = getattr(nvfp4_moe, name)
    overloads = typing.get_overloads(inspect.unwrap(function))
    want = inspect.signature(function).parameters
    assert overloads
    for overload in overloads:
        have = inspect.signature(overload).parameters
        assert list(have) == list(want)
        for parameter in have.values():
            same = parameter.annotation == want[parameter.name].annotation
            assert same or typing.get_origin(parameter.annotation) is typing.Literal, parameter
