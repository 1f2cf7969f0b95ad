"""The words of the command line are split by typer, or plainly without it, with the same outcome."""

# SPDX-License-Identifier: Apache-2.0
import os
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from paths import ROOT
from safetensors.torch import save_file

from nvfp4_moe.__main__ import main
from nvfp4_moe.cli import parse
from nvfp4_moe.cli.declaration import json_made_whole
from nvfp4_moe.cli.options import COMMANDS
from nvfp4_moe.exits import CommandError, Exit


@pytest.fixture(params=["typer", "plain"])
def parser(request, monkeypatch):
    """Both parsers, one after the other."""
    if request.param == "typer":
        pytest.importorskip("typer")
    else:
        monkeypatch.setitem(sys.modules, "nvfp4_moe.cli.typer_parser", None)
    return request.param


def parsed(*words):
    return parse.parse(words, lambda: "1.2.3")


MINIMAL = {
    "replay": ["case"],
    "convert": ["from", "to"],
    "solutions": ["folder", "--shape", "1,2,3,4"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_defaults(command, parser):
    found = parsed(command, *MINIMAL.get(command, []))
    assert isinstance(found, SimpleNamespace) and found.command == command
    options = COMMANDS[command].all_options
    assert set(vars(found)) == {"command", *(option.dest for option in options)}
    for option in options:
        if option.positional or option.required:
            continue
        expected = False if option.kind is bool else [] if option.repeated else option.default
        assert getattr(found, option.dest) == expected
        assert type(getattr(found, option.dest)) is type(expected)


def test_values(parser):
    found = parsed(
        *("diff", "--seed", "-3", "--rows=7", "--backend", "a:b", "--backend", "c:d", "--replay"),
        *("--layers", "few", "--json", "-", "--input", ""),
    )
    assert (found.seed, found.rows, found.backend) == (-3, 7, ["a:b", "c:d"])
    assert (found.replay, found.every_configuration, found.layers) == (True, False, "few")
    assert (found.json, found.input) == ("-", "")
    assert parsed("fuzz-bounds", "--seconds", "2.5").seconds == 2.5
    assert parsed("convert", "a", "--device", "cuda", "b").destination == "b"


@pytest.mark.parametrize(
    ("words", "whole"),
    [
        (["doctor", "--json"], ["doctor", "--json", "-"]),
        (["doctor", "--json", "-"], ["doctor", "--json", "-"]),
        (["doctor", "--json", "out"], ["doctor", "--json", "out"]),
        (["diff", "--json", "--seed", "1"], ["diff", "--json", "-", "--seed", "1"]),
        (["diff", "--json=x"], ["diff", "--json=x"]),
    ],
)
def test_json_without_a_file(words, whole, parser):
    assert json_made_whole(words) == whole
    assert parsed(*words).json == (whole[2] if len(whole) > 2 else "x")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["diff", "--oops"], "--oops"),
        (["diff", "--rep", "x"], "--rep"),  # no abbreviations
        (["diff", "word"], "word"),
        (["convert", "a"], "DST"),
        (["solutions", "a"], "--shape"),
        (["diff", "--rows"], "--rows"),
        (["oops"], "oops"),
        (["diff", "--rows", "x"], "--rows is 'x'; it must be an integer"),
        (["blackwell", "--timeout", "x"], "--timeout is 'x'; it must be a number"),
        (["diff", "--layers", "x"], "--layers is 'x'; it must be among few, small, large"),
    ],
)
def test_bad_usage_is_one_line(words, told, parser, capsys):
    assert main(words) == Exit.USAGE
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert printed.out == "" and line.startswith("nvfp4-moe") and told in line


def test_a_renamed_part_is_still_known(parser, capsys):
    assert parsed("diff", "--only", "siblings").only == "baselines"
    assert "--only siblings is now --only baselines" in capsys.readouterr().err
    assert parsed("diff", "--only", "baselines").only == "baselines"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("words", [[], *([command] for command in COMMANDS)])
def test_help_has_every_option_example_and_status(words, parser, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main([*words, "--help"]) == Exit.DONE
    text = capsys.readouterr().out
    assert "\x1b" not in text
    shown = " ".join(text.split())
    for status in Exit:
        assert f"{status.value} {status.meaning}" in shown
    assert len({status.value for status in Exit}) == len(Exit)
    if not words:
        assert all(f"{c.name} {c.summary}" in shown for c in COMMANDS.values())
        return
    command = COMMANDS[words[0]]
    assert command.description.split(".")[0] in shown
    for option in command.all_options:
        assert option.name in shown if not option.positional else option.shown in shown
        assert all(choice in shown for choice in option.choices)
    assert command.examples
    for example, what in command.examples:
        assert f"nvfp4-moe {example} {what}" in shown


def test_examples_are_commands_that_parse(parser):
    for command in COMMANDS.values():
        for example, _ in command.examples:
            assert parsed(*shlex.split(example)).command == command.name


def test_no_command_is_bad_usage_with_the_help(parser, capsys):
    assert main([]) == Exit.USAGE
    assert "fuzz-bounds" in capsys.readouterr().out


def test_the_version(parser, capsys):
    assert parsed("--version") == Exit.DONE
    assert capsys.readouterr().out == "1.2.3\n"


def test_completion_in_a_shell():
    """The words that bash would offer."""
    pytest.importorskip("typer")
    for line, offered in ("nvfp4-moe con", ["convert"]), ("nvfp4-moe diff --only m", ["moe"]):
        words = {
            "_NVFP4_MOE_COMPLETE": "complete_bash",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(line.split()) - 1),
        }
        child = subprocess.run(
            [sys.executable, "-m", "nvfp4_moe"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=100,
            env=os.environ | words,
        )
        assert child.stdout.split() == offered, child.stderr


OPTIONAL = ("typer", "rich", "jinja2", "click", "pydantic")
ABSENT = 'raise ModuleNotFoundError(f"No module named {__name__!r}", name=__name__)\n'


@pytest.mark.parametrize(
    ("words", "status", "shown"),
    [
        (["doctor"], Exit.DONE, "would run: "),
        (["diff", "--input", "TENSORS", "--recipes", "plain"], Exit.DONE, "all identical"),
        (["bench", "--only", "dense", "--tokens", "1"], Exit.DONE, "of roofline"),
        (
            ["blackwell", "--small", "--backends", "flashinfer:bf16", "--report", "FOLDER"],
            Exit.NOT_RUN,
            "verdicts",
        ),
    ],
)
def test_commands_run_without_the_optional_packages(words, status, shown, tmp_path):
    """Neither they nor the processes that they start find these packages."""
    for name in OPTIONAL:
        (tmp_path / f"{name}.py").write_text(ABSENT)
    x = torch.linspace(-3, 3, 64, dtype=torch.float32, device="cpu")
    save_file({"x": x.view(2, 32).bfloat16()}, tmp_path / "x.safetensors")
    given = {"TENSORS": str(tmp_path / "x.safetensors"), "FOLDER": str(tmp_path / "out")}
    paths = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
    child = subprocess.run(
        [sys.executable, "-m", "nvfp4_moe", *(given.get(word, word) for word in words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ
        | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )
    assert child.returncode == status, child.stderr
    assert shown in child.stdout and "\x1b" not in child.stdout + child.stderr


def test_a_parser_raises_only_what_becomes_a_line(parser):
    with pytest.raises(CommandError, match="--help shows what is allowed"):
        parsed("nothing")
