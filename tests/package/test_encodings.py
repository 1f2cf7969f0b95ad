"""Text files are UTF-8 and output is printed whatever the locale's encoding is."""

# SPDX-License-Identifier: Apache-2.0
import ast
import json
import os
import subprocess
import sys

import pytest
import torch
from paths import ROOT
from safetensors.torch import save_file

from nvfp4_moe.checkpoints import convert

FILES = sorted(
    path
    for folder in ("nvfp4_moe", "reference", "kernels", "bench", "docs", "tests/support/mutants")
    for path in (ROOT / folder).rglob("*.py")
)
PLACES = {"read_text": 0, "write_text": 1}
"""Which positional argument is the encoding."""


def faults(source: str) -> list[tuple[int, str]]:
    """(line, call) of text that is read or written in the locale's encoding."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        if "encoding" in given:
            continue
        wrong = name in PLACES and len(node.args) <= PLACES[name]
        if name == "open" and isinstance(node.func, ast.Name):
            mode = given.get("mode", node.args[1] if len(node.args) > 1 else None)
            wrong = not (isinstance(mode, ast.Constant) and "b" in str(mode.value))
        if name in ("run", "Popen", "check_output"):
            wrong = bool({"text", "universal_newlines"} & set(given))
        if wrong:
            found.append((node.lineno, name))
    return found


def test_every_text_file_names_its_encoding():
    told = [
        f"{path}:{line}: {name}" for path in FILES for line, name in faults(path.read_text("utf-8"))
    ]
    assert not told, "\n".join(told)


def test_what_counts_as_a_fault():
    for wrong in (
        "p.read_text()",
        "p.write_text(t)",
        "open(p, 'w')",
        "open(p)",
        "run(c, text=True)",
    ):
        assert faults(wrong), wrong
    for right in (
        "p.read_text('utf-8')",
        "p.write_text(t, encoding='utf-8')",
        "open(p, 'rb')",
        "run(c)",
        "run(c, text=True, encoding='utf-8')",
        "os.open(p, flags)",
    ):
        assert not faults(right), right


@pytest.fixture
def source(tmp_path):
    """A checkpoint in a folder, with a field and a tensor, of names outside ASCII."""
    folder = tmp_path / "Größe"
    folder.mkdir()
    sizes = {"gate_proj": (32, 64), "up_proj": (32, 64), "down_proj": (64, 32)}
    g = torch.Generator().manual_seed(0)
    tensors = {
        f"model.layers.0.mlp.experts.0.{name}.weight": torch.randn(size, generator=g).bfloat16()
        for name, size in sizes.items()
    }
    tensors["model.größe"] = torch.ones(1)
    save_file(tensors, folder / "model.safetensors")
    config = {"hidden_act": "silu", "num_experts": 1, "größe": "漢字"}
    (folder / "config.json").write_text(json.dumps(config, ensure_ascii=False), "utf-8")
    return folder


def in_the_c_locale(*command: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, *command], env=os.environ | variables, capture_output=True, timeout=300
    )


def test_a_conversion_in_the_c_locale(source):
    targets = source.parent / "übrig", source.parent / "plain"
    done = in_the_c_locale("-m", "nvfp4_moe", "convert", str(source), str(targets[0]))
    assert done.returncode == 0, done.stderr
    convert(source, targets[1])
    names = sorted(p.name for p in targets[0].rglob("*"))
    assert names == sorted(p.name for p in targets[1].rglob("*")) and "config.json" in names
    for name in names:
        assert (targets[0] / name).read_bytes() == (targets[1] / name).read_bytes(), name


def test_names_are_printed_in_the_c_locale():
    """A tensor's name comes from a file and is UTF-8; what the terminal lacks is escaped."""
    program = (
        "from nvfp4_moe.cli.exit_status import guarded\n"
        "raise SystemExit(guarded('t', lambda: lambda: print('gr\\xf6\\xdfe') or 0, lambda: ''))\n"
    )
    done = in_the_c_locale("-c", program)
    assert (done.returncode, done.stdout.strip()) == (0, b"gr\\xf6\\xdfe"), done.stderr
