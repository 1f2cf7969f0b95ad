"""No tensor takes the caller's default dtype or device: every factory call in the library names both."""

# SPDX-License-Identifier: Apache-2.0
import ast

import pytest
import torch
from paths import ROOT
from torch.utils._device import _device_constructors

FILES = sorted(
    path
    for folder in ("nvfp4_moe", "reference", "kernels")
    for path in (ROOT / folder).rglob("*.py")
)
FACTORIES = {f.__name__ for f in _device_constructors() if getattr(torch, f.__name__, None) is f}
"""The functions that `torch.set_default_device` redirects."""
FORBIDDEN = {"Tensor", "FloatTensor", "normal"}
"""They cannot name both."""


def faults(source: str) -> list[tuple[int, str]]:
    """(line, what is wrong) of each call in a file that leaves a dtype or a device to the caller."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if not (isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"):
            continue
        name, given = node.func.attr, {keyword.arg for keyword in node.keywords}
        if name in FORBIDDEN:
            found.append((node.lineno, f"torch.{name} cannot name both dtype and device"))
        elif name in FACTORIES and (missing := {"dtype", "device"} - given):
            found.append((node.lineno, f"torch.{name} names no {' and no '.join(sorted(missing))}"))
        elif name == "where" and len(node.args) == 3 and all(map(_is_number, node.args[1:])):
            found.append((node.lineno, "torch.where of two numbers has the default dtype"))
    return found


def _is_number(node: ast.expr) -> bool:
    if isinstance(node, ast.UnaryOp):
        node = node.operand
    return isinstance(node, ast.Constant) and isinstance(node.value, float)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_factory_names_dtype_and_device(path):
    told = [f"{path}:{line}: {what}" for line, what in faults(path.read_text("utf-8"))]
    assert not told, "\n".join(told)


def test_what_counts_as_a_fault():
    for wrong in (
        "torch.empty(3)",
        "torch.empty(3, dtype=d)",
        "torch.tensor(1.0, device=d)",
        "torch.Tensor(3)",
        "torch.arange(4, device=x.device)",
        "torch.where(x, 1.0, -2.0)",
    ):
        assert faults(wrong), wrong
    for right in (
        "torch.empty(3, dtype=a, device=b)",
        "x.new_empty(3)",
        "torch.where(x, y, 1.0)",
        "torch.empty_like(x)",
        "1.0 / x",
    ):
        assert not faults(right), right
