"""A command that cannot do its work says why in one line, and exits with a status."""

# SPDX-License-Identifier: Apache-2.0
import errno
import os
import re
import signal
import subprocess
import sys
import threading
from collections import namedtuple
from pathlib import Path
from typing import get_args

import pytest
import replay_cases
import torch
from checkpoint_cases import NAMINGS, ordinary, weights, write
from paths import ROOT
from safetensors.torch import save_file

from nvfp4_moe import files, interrupts
from nvfp4_moe.__main__ import main
from nvfp4_moe.bench.operations import OPERATIONS
from nvfp4_moe.cases import inputs
from nvfp4_moe.cases import moe as moe_cases
from nvfp4_moe.cases import quantize as quantize_cases
from nvfp4_moe.checkpoints import resumable_writer
from nvfp4_moe.cli import blackwell, doctor, options
from nvfp4_moe.cli import convert as convert_command
from nvfp4_moe.cli.exit_status import guarded
from nvfp4_moe.cli.options import COMMANDS
from nvfp4_moe.differential import quantize as diff_quantize
from nvfp4_moe.differential import workers
from nvfp4_moe.exits import Exit
from nvfp4_moe.failures.replay_file import save_quantizer
from nvfp4_moe.reference.moe.routing import RoutingMethodType
from nvfp4_moe.reference.recipe import FLASHINFER, FlashInferVersion, LayerBuild
from nvfp4_moe.report import parts


def refused(capsys, arguments, status=Exit.USAGE, announced=""):
    """The one line on stderr of a command that prints nothing else but what it was about to do."""
    assert main([str(a) for a in arguments]) == status
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert announced in printed.out and len(printed.out.splitlines()) == bool(announced)
    assert line.startswith(f"nvfp4-moe {arguments[0]}: ")
    return line


@pytest.fixture
def places(tmp_path):
    """Files and folders to name, by what is wrong with them."""
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "folder").mkdir()
    return {
        "a file": tmp_path / "file",
        "below a file": tmp_path / "file" / "deeper" / "still",
        "a folder": tmp_path / "folder",
        "in no folder": tmp_path / "nowhere" / "out.json",
        "/proc": Path("/proc/nvfp4-moe/out"),
        "full": Path("/dev/full"),
    }


@pytest.fixture
def idle(monkeypatch):
    """Nothing may be computed before a path is checked."""

    def work(*_, **__):
        raise AssertionError("it began to work")

    monkeypatch.setattr(diff_quantize, "run", work)
    monkeypatch.setattr(blackwell, "_run_all", work)
    monkeypatch.setattr(convert_command, "convert", work)
    monkeypatch.setattr("nvfp4_moe.failures.replay.replay", work)


@pytest.mark.parametrize("place", ["a file", "below a file", "/proc", "full"])
@pytest.mark.parametrize("command", ["diff", "blackwell", "convert"])
def test_a_folder_that_cannot_be_written(command, place, places, idle, capsys, tmp_path):
    given = {
        "diff": ["diff", "--kind", "grid", "--report"],
        "blackwell": ["blackwell", "--report"],
        "convert": ["convert", tmp_path],
    }
    line = refused(capsys, [*given[command], places[place]])
    assert f"is '{places[place]}'; it must be a folder" in line


@pytest.mark.parametrize("place", ["a folder", "below a file", "in no folder", "/proc", "full"])
@pytest.mark.parametrize("command", ["diff", "replay"])
def test_a_file_that_cannot_be_written(command, place, places, idle, capsys, tmp_path):
    save_quantizer(tmp_path / "case", replay_cases.quantizer_failure())
    given = {"diff": ["diff", "--kind", "grid"], "replay": ["replay", tmp_path / "case"]}
    line = refused(capsys, [*given[command], "--json", places[place]])
    assert f"--json is '{places[place]}'" in line and "it must" in line


@pytest.mark.parametrize("command", [["diff", "--input"], ["replay"]])
def test_a_file_that_is_no_safetensors(command, idle, capsys, tmp_path):
    torch.save(torch.ones(3), tmp_path / "x.pt")
    (tmp_path / "short").write_bytes(b"1")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "latin").write_bytes(b"\xe9\xff" * 40)
    save_file({"x": torch.zeros(64, 64)}, tmp_path / "cut")
    os.truncate(tmp_path / "cut", 1000)
    os.mkfifo(tmp_path / "fifo")
    for name in ("x.pt", "short", "empty", "latin", "cut", "fifo", "missing", "."):
        line = refused(capsys, [*command, tmp_path / name])
        assert f"is '{tmp_path / name}'" in line and "it must be" in line


def test_a_disk_that_is_full(idle, capsys, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage(100, 99, 1 << 20))
    for arguments in (
        ["diff", "--report", tmp_path / "out"],
        ["diff", "--json", tmp_path / "out"],
        ["blackwell", "--report", tmp_path / "out"],
    ):
        assert "its disk must have 4.2 MB free, and has 1.0 MB" in refused(capsys, arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "1e300"])
def test_a_time_that_nobody_can_wait(seconds, idle, capsys):
    assert "--timeout is " in refused(capsys, ["blackwell", "--timeout", seconds])


def test_what_is_checked_is_left_as_it_was(tmp_path):
    (tmp_path / "kept.json").write_text("kept")
    files.check_folder("--report", tmp_path / "one" / "two")
    files.check_folder("--report", tmp_path)
    files.check_file("--json", tmp_path / "kept.json")
    files.check_file("--json", tmp_path / "new.json")
    files.check_file("--json", "/dev/null")
    assert [p.name for p in tmp_path.iterdir()] == ["kept.json"]
    assert (tmp_path / "kept.json").read_text() == "kept"


@pytest.fixture
def checkpoint(tmp_path):
    naming = NAMINGS["qwen3-moe"]
    layer = ordinary(naming, 0, weights(naming.activation.gated))
    return write(tmp_path / "src", [layer], dict(naming.config))


@pytest.mark.parametrize("device", ["graphics", "cuda:99", "meta", "cuda:x", ""])
def test_a_device_that_is_not_here(device, checkpoint, capsys, tmp_path):
    arguments = ["convert", checkpoint, tmp_path / "dst", "--device", device]
    assert f"--device is {device!r}; it must be a device of this machine" in refused(
        capsys, arguments
    )
    assert not (tmp_path / "dst").exists()


def test_a_conversion_that_does_not_fit(checkpoint, capsys, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(1 << 40, 1 << 40, files.ROOM))
    monkeypatch.setattr("nvfp4_moe.checkpoints.disk_space.result_bytes", lambda _: 10**10)
    line = refused(capsys, ["convert", checkpoint, tmp_path / "dst"])
    assert "its disk must have 10.000 GB free, and has 0.004 GB" in line
    assert not (tmp_path / "dst").exists()


def test_a_disk_that_fills_up(checkpoint, capsys, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(resumable_writer, "save_file", full)
    line = refused(capsys, ["convert", checkpoint, tmp_path / "dst"], Exit.BROKEN, "become NVFP4")
    assert "No space left on device" in line and "called again, the conversion is resumed" in line


def test_a_crash_is_no_difference(capsys, tmp_path, monkeypatch):
    def crash():
        raise RuntimeError("the first line\nand another")

    monkeypatch.setattr(doctor, "examine", crash)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    line = refused(capsys, ["doctor"], Exit.BROKEN)
    (written,) = tmp_path.iterdir()
    assert line == (
        f"nvfp4-moe doctor: crashed: RuntimeError: the first line (the traceback is in {written})"
    )
    assert "in crash" in written.read_text() and "and another" in written.read_text()
    monkeypatch.setenv("NVFP4_MOE_TRACEBACK", "1")
    assert main(["doctor"]) == Exit.BROKEN
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and err.endswith("(the traceback is above)\n")
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_children(number, capsys, monkeypatch):
    def command():
        threading.Timer(0.5, os.kill, (os.getpid(), number)).start()
        workers.side_by_side(lambda _: workers.run(["sleep", "60"]), range(6), 2)
        raise AssertionError("nothing was interrupted")

    class Seen(set):
        def add(self, child):
            seen.append(child)
            super().add(child)

    seen: list[subprocess.Popen] = []
    monkeypatch.setattr(workers, "_running", Seen())
    before = signal.getsignal(number)
    assert (
        guarded("nvfp4-moe try", lambda: command, lambda: "two are left") == Exit.INTERRUPTED == 130
    )
    assert capsys.readouterr().err == "nvfp4-moe try: interrupted; two are left\n"
    assert len(seen) == 2 and all(child.returncode == -signal.SIGTERM for child in seen)
    assert not workers._running and signal.getsignal(number) is before


INTERRUPTED_IMPORT = """
import os, signal, sys

class Finder:
    def find_spec(name, path=None, target=None):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder)
sys.orig_argv = sys.argv[1:]
import nvfp4_moe
if "-m" in sys.argv:
    from nvfp4_moe.__main__ import main
    sys.exit(main(["diff"]))
nvfp4_moe.Recipe
"""


def test_an_interrupt_of_the_import():
    """One line where the process is the command line; of others' programs it is no business."""
    for words, ours in (("-m", "nvfp4_moe", "diff"), True), (("mine.py",), False):
        child = subprocess.run(
            [sys.executable, "-c", INTERRUPTED_IMPORT, "python", *words],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=100,
        )
        if ours:
            assert child.returncode == Exit.INTERRUPTED
            assert child.stderr == "nvfp4-moe: interrupted; nothing was begun\n"
        else:
            assert child.returncode == -signal.SIGINT and "KeyboardInterrupt" in child.stderr


@pytest.mark.parametrize(
    ("words", "ours"),
    [
        (["python", "-m", "nvfp4_moe", "doctor"], True),
        (["python", "/usr/bin/nvfp4-moe", "doctor"], True),
        (["python", "-m", "nvfp4_moe.differential.workers"], False),
        (["python", "-m", "pytest", "nvfp4_moe"], False),
        (["python", "train.py", "nvfp4-moe"], False),
        (["python", "-m"], False),
        (["python"], False),
        ([], False),
    ],
)
def test_what_is_the_command_line(words, ours):
    assert interrupts.is_command_line(words) is ours


def test_a_worker_ends_with_its_parent(tmp_path):
    """The process that it is told of is not its parent, as after the parent's death."""
    torch.save((workers.run, [(["sleep", "60"],)]), tmp_path / "jobs")
    command = [
        sys.executable,
        "-m",
        "nvfp4_moe.differential.workers",
        tmp_path / "jobs",
        "1",
    ]
    assert subprocess.run(command, cwd=ROOT, timeout=50).returncode == 1


def test_what_an_interrupted_conversion_leaves(checkpoint, capsys, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(resumable_writer.Workspace, "complete", interrupted)
    line = refused(
        capsys, ["convert", checkpoint, tmp_path / "dst"], Exit.INTERRUPTED, "become NVFP4"
    )
    assert "interrupted; 1 shard finished in " in line
    monkeypatch.undo()
    assert main(["convert", str(checkpoint), str(tmp_path / "dst")]) == Exit.DONE


@pytest.mark.parametrize(
    ("to", "told"), [("full", "No space left on device"), ("closed", "its output was closed")]
)
def test_an_output_that_takes_nothing(to, told, capsys, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed, open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", closed if to == "closed" else full)
        status = guarded("nvfp4-moe try", lambda: lambda: print("much"), lambda: "")
        monkeypatch.undo()
    assert status == Exit.BROKEN
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("nvfp4-moe try: ") and told in line


LIGHT = """
import sys
from nvfp4_moe.__main__ import main
try:
    status = main(sys.argv[1:])
finally:
    print(*sys.modules, file=sys.stderr)
sys.exit(status)
"""
PARSING = {
    *("__main__", "cli", "earlier_paths", "exits", "interrupts"),
    *(f"cli.{name}" for name in ("declaration", "exit_status", "options", "parse", "typer_parser")),
    *("kernels", "kernels.environment", "reference", "reference.environment"),
    *("reference.weights", "reference.weights.writers", "report", "report.invocation"),
}
"""The modules of this package that the words of the command line need."""
NEEDLESS = {
    "torch",
    "triton",
    "numpy",
    "safetensors",
    "jinja2",
    "matplotlib",
    "flashinfer",
    "asyncio",
}


def assert_light(loaded: str) -> None:
    modules = set(loaded.split())
    own = {m.removeprefix("nvfp4_moe.") for m in modules if m.startswith("nvfp4_moe.")}
    assert own <= PARSING, own - PARSING
    assert not NEEDLESS & modules


@pytest.mark.parametrize("words", [["--version"], ["--help"], *([c, "--help"] for c in COMMANDS)])
def test_help_imports_what_parses_the_words_alone(words):
    """Either takes 0.2 to 0.4 s of a processor, most of it in typer."""
    child = subprocess.run(
        [sys.executable, "-c", LIGHT, *words], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert child.returncode == 0 and child.stdout, child.stderr
    assert_light(child.stderr)
    if words == ["--help"]:  # typer's pydantic reads the metadata of packages for other words
        assert "importlib.metadata" not in child.stderr.split()


def test_a_misspelt_option_needs_no_torch():
    child = subprocess.run(
        [sys.executable, "-c", LIGHT, "diff", "--oops"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    loaded, told = sorted(child.stderr.splitlines(), key=len, reverse=True)
    assert child.returncode == Exit.USAGE and "--oops" in told
    assert_light(loaded)


def test_the_choices_of_options_are_the_keys_of_their_tables():
    assert tuple(part.name for part in parts.PARTS) == options.PARTS
    assert tuple(quantize_cases.RECIPES) == options.RECIPES
    assert options.KINDS == inputs.KINDS
    assert tuple(moe_cases.SETS) == options.LAYERS
    assert get_args(FlashInferVersion) == options.FLASHINFER_VERSIONS
    assert options.FLASHINFER_VERSIONS[0] == FLASHINFER
    assert tuple(convert_command.RECIPES) == options.CONVERSIONS
    assert tuple(OPERATIONS) == options.MEASURED
    methods = [m.name for m in RoutingMethodType if m is not RoutingMethodType.Unspecified]
    assert tuple(methods) == options.ROUTINGS
    assert get_args(LayerBuild) == options.BUILDS
    assert set(options.RENAMED_PARTS.values()) <= set(options.PARTS)


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
from nvfp4_moe.__main__ import main
for command in ("doctor", "convert", "replay", "diff", "blackwell"):
    assert main([command, "--help"]) == 0
assert main(["doctor"]) == 0
assert main(["diff", "--kind", "grid"]) == 3
assert main(["diff", "--backends", "reference,triton"]) == 3
assert main(["bench", "--only", "moe", "--tokens", "1"]) == 0
assert main(["bench", "--only", "moe", "--backend", "triton"]) == 3
assert main(["convert", sys.argv[1], sys.argv[2]]) == 0
"""


@pytest.mark.parametrize("columns", [60, 72, 80, 140])
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_no_width_cuts_a_word_of_the_help(command, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main([*filter(None, [command]), "--help"]) == Exit.DONE
    printed = capsys.readouterr().out
    words = {word.rstrip(",") for word in printed.replace("\u2502", " ").split()}
    assert "\u2026" not in printed
    options = COMMANDS[command].all_options if command else ()
    assert [o.name for o in options if not o.positional and o.name not in words] == []


@pytest.mark.parametrize(
    ("package", "called"), [("torch", "PyTorch"), ("safetensors", "safetensors")]
)
def test_without_a_package_that_the_library_imports(package, called, tmp_path):
    code = (
        f"import sys\nsys.modules[{package!r}] = None\n"
        "from nvfp4_moe.__main__ import main\nsys.exit(main(['doctor']))"
    )
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    told = f"it needs {called}, which is not installed; `{sys.executable} -m pip install {package}`"
    assert child.stderr == f"nvfp4-moe doctor: {told} installs it\n"
    assert child.returncode == Exit.NOT_RUN


def test_without_triton(checkpoint, tmp_path):
    child = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON, checkpoint, tmp_path / "dst"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    assert child.returncode == 0 and "Traceback" not in child.stderr, child.stderr
    assert re.search(r"^triton +no: triton is not installed$", child.stdout, re.MULTILINE)
    assert "'triton (interpreter)', which cannot run here: Triton is not installed" in child.stderr
    assert (tmp_path / "dst/model.safetensors.index.json").exists()
