"""`make sanitizer` without a GPU: cases are complete and run, outputs are read and judged."""

# SPDX-License-Identifier: Apache-2.0
import ast
import importlib
import json
import sys
from pathlib import Path

import pretend_gpu
import pytest
import torch
import triton
from paths import ROOT
from sanitizer import __main__ as command
from sanitizer import outcome, partly_written, planted, worker
from sanitizer.cases import DENSE, GROUPS

from nvfp4_moe.kernels import launcher
from nvfp4_moe.kernels.dense.launch import dense_config
from nvfp4_moe.kernels.moe.hopper.config import CONFIGS, refusal

CLEAN = "========= COMPUTE-SANITIZER\n{}========= ERROR SUMMARY: 0 errors\n"
OUT_OF_BOUNDS = """\
========= COMPUTE-SANITIZER
sanitizer: cases 2
sanitizer: done first
========= Invalid __global__ write of size 4 bytes
=========     at expert_gemm_kernel+0x1d0 in gemm.py:120
=========     by thread (127,0,0) in block (3,0,0)
=========     Access to 0x7f10c5400200 is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7f10c5400000 of size 512 bytes
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: launch [0x16a3] in __triton_launcher.so
=========
Traceback (most recent call last):
torch.AcceleratorError: CUDA error: unspecified launch failure
========= Target application returned an error
========= ERROR SUMMARY: 769 errors
========= ERROR SUMMARY: 749 errors were not printed. Use --print-limit option to adjust
"""
RACE = """\
========= COMPUTE-SANITIZER
sanitizer: cases 1
========= Error: Race reported between Write access at route_kernel+0x580 in routing.py:200
=========     and Read access at route_kernel+0x890 in routing.py:203 [4080 hazards]
=========
========= Warning: Race reported between Write access at route_kernel+0x1a0 in routing.py:90
=========     and Write access at route_kernel+0x1a0 in routing.py:90 [32 hazards]
=========
sanitizer: done first
sanitizer: launched moe.routing.route_kernel
========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)
"""
NO_RACE = """\
========= COMPUTE-SANITIZER
sanitizer: cases 1
sanitizer: done first
sanitizer: launched moe.routing.route_kernel
========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)
"""
UNWRITTEN = """\
========= COMPUTE-SANITIZER
========= Uninitialized __global__ memory read of size 4 bytes
=========     at copy_kernel+0x90 in planted.py:40
=========     by thread (0,0,0) in block (0,0,0)
=========
========= ERROR SUMMARY: 128 errors
"""
BARRIER = """\
========= COMPUTE-SANITIZER
========= Barrier error detected. Divergent thread(s) in warp.
=========     at assembly_kernel+0x90 in p.py:46
=========     by thread (0,0,0) in block (0,0,0)
=========
========= ERROR SUMMARY: 1 error
"""
REFUSED = """\
========= COMPUTE-SANITIZER
========= Error: Device not supported. Please refer to the "Supported Devices" section
=========
RuntimeError: CUDA unknown error
========= Target application returned an error
"""


def kernel_of(names: dict, expression: ast.expr):
    """Return the kernel that an expression gives, None for anything else."""
    try:
        found = eval(ast.unparse(expression), dict(names))
    except Exception:
        return None
    return found if isinstance(found, triton.JITFunction) else None


def names_in(module, tree: ast.Module) -> dict:
    """Return the names of a module, those that its functions import among them."""
    found = dict(vars(module))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and node.module:
            origin = importlib.import_module("." * node.level + node.module, module.__package__)
            found |= {a.name: getattr(origin, a.name, None) for a in node.names if not a.asname}
    return found


def launched_kernels() -> set[str]:
    """Return the kernels that a module of the library launches: by `launch`, or by Triton's brackets."""
    found = set()
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        source = path.read_text("utf-8")
        if "launch(" not in source and "_kernel[" not in source:
            continue
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        module = importlib.import_module(f"nvfp4_moe.{name}")
        tree = ast.parse(source)
        names = names_in(module, tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "launch":
                kernel = kernel_of(names, node.args[0])
                assert kernel is not None, f"{path}: line {node.lineno} launches what is no kernel"
                found.add(worker.name_of(kernel))
            elif isinstance(node, ast.Subscript) and (kernel := kernel_of(names, node.value)):
                found.add(worker.name_of(kernel))
    return found


def test_every_kernel_has_a_group():
    declared = {kernel for group in GROUPS.values() for kernel in group.kernels}
    found = launched_kernels()
    assert len(found) >= 25 and declared == found


def test_every_configuration_has_a_group():
    assert {f"ring {config.bn}" for config in CONFIGS} <= set(GROUPS)
    sizes = (1, 16, 17, 32, 33, 200, 1023, 1024, 8192)
    chosen = {
        dense_config(m, n, k, 90) for m in sizes for n in (128, 4096, 32768) for k in (128, 4096)
    }
    assert chosen == set(DENSE)


@pytest.mark.skipif(refusal(90) is not None, reason=str(refusal(90)))
@pytest.mark.parametrize("name", GROUPS)
def test_cases_launch_the_kernels_of_their_group(name, monkeypatch):
    """On a pretended GPU of sm_90: every case is called, and nothing is compiled."""
    pretend_gpu.present(monkeypatch)
    monkeypatch.setattr(launcher, "_LAUNCHES", {})
    launched: set[str] = set()
    worker.note_launches(launched)
    cases = GROUPS[name].cases("cpu")
    assert cases
    for case in cases.values():
        case()
    assert set(GROUPS[name].kernels) <= launched


@pytest.mark.skipif(refusal(90) is not None, reason=str(refusal(90)))
def test_where_rows_are_unwritten_the_case_looks_for_nan(monkeypatch):
    """Only such a case has slots of no local expert, between whose GEMMs a quantizer reads all rows."""
    pretend_gpu.present(monkeypatch)
    monkeypatch.setattr(launcher, "_LAUNCHES", {})
    partly = {}
    for name, case in GROUPS["ring 8"].cases("cpu").items():
        inner = case.case if isinstance(case, partly_written.PartlyWritten) else case
        call = inner.args[0]
        partly[name] = call.experts.num_local < call.num_experts
        assert partly[name] == isinstance(case, partly_written.PartlyWritten)
    assert set(partly.values()) == {False, True}


def test_a_partly_written_case_runs_in_memory_of_nan():
    case = partly_written.PartlyWritten(
        lambda: (torch.empty(3, dtype=torch.float32, device="cpu"),)
    )
    results = case()
    assert results[0].isnan().all()
    with pytest.raises(ValueError, match="here: result 0 has a NaN"):
        partly_written.check_results("here", results)
    numbers = (torch.zeros(2, dtype=torch.int32), torch.ones(1, dtype=torch.bfloat16))
    partly_written.check_results("here", numbers)


def test_the_worker_looks_for_nan(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(triton.JITFunction, "run", triton.JITFunction.run)  # put back afterwards
    nan = torch.full((1,), torch.nan, dtype=torch.float32, device="cpu")
    case = partly_written.PartlyWritten(lambda: (nan,))
    with pytest.raises(ValueError, match="filled: result 0 has a NaN"):
        worker.run(lambda device: {"plain": lambda: (nan,), "filled": case}, dispatched=False)
    assert capsys.readouterr().out == "sanitizer: cases 2\nsanitizer: done plain\n"


def test_a_fault_is_planted_for_each_tool():
    assert set(planted.PLANTED) == {"memcheck", "racecheck", "initcheck", "synccheck"}


@pytest.mark.parametrize(
    "tool,text,count,first",
    [
        ("memcheck", CLEAN.format(""), 0, ""),
        ("memcheck", "========= COMPUTE-SANITIZER\nkilled", None, ""),
        (
            "memcheck",
            OUT_OF_BOUNDS,
            769,
            "Invalid __global__ write of size 4 bytes at expert_gemm_kernel+0x1d0 in gemm.py:120",
        ),
        (
            "racecheck",
            RACE,
            2,
            "Error: Race reported between Write access at route_kernel+0x580 in routing.py:200 "
            "and Read access at route_kernel+0x890 in routing.py:203 [4080 hazards]",
        ),
        ("racecheck", NO_RACE, 0, ""),
        ("racecheck", CLEAN.format(""), None, ""),  # a summary of another tool
        (
            "initcheck",
            UNWRITTEN,
            128,
            "Uninitialized __global__ memory read of size 4 bytes at copy_kernel+0x90 in planted.py:40",
        ),
        (
            "synccheck",
            BARRIER,
            1,
            "Barrier error detected. Divergent thread(s) in warp. at assembly_kernel+0x90 in p.py:46",
        ),
    ],
)
def test_outputs_are_read(tool, text, count, first):
    assert outcome.count(tool, text) == count
    assert outcome.first_report(text) == first


KERNEL = "moe.routing.route_kernel"
WORKED = f"sanitizer: cases 1\nsanitizer: done it\nsanitizer: launched {KERNEL}\n"


@pytest.mark.parametrize(
    "tool,text,status,verdict,first",
    [
        ("memcheck", CLEAN.format(WORKED), 0, "clean", ""),
        ("plain", WORKED, 0, "clean", ""),
        (
            "memcheck",
            CLEAN.format(f"========= Warning: slow\n{WORKED}"),
            0,
            "clean",
            "Warning: slow",
        ),
        (
            "racecheck",
            f"{NO_RACE}========= Internal Sanitizer Error: out of memory\n",
            0,
            "failed",
            "Internal Sanitizer Error: out of memory",
        ),
        ("memcheck", OUT_OF_BOUNDS, 1, "errors", "Invalid __global__ write"),
        ("racecheck", RACE, 0, "errors", "Error: Race reported"),
        ("memcheck", WORKED, 0, "failed", "the tool wrote no summary"),
        ("memcheck", REFUSED, 1, "failed", "Error: Device not supported"),
        ("memcheck", CLEAN.format(""), 0, "failed", "exit status 0"),  # no case ran
        ("memcheck", CLEAN.format("sanitizer: cases 2\n"), None, "failed", "240 s, case 1 of 2"),
        (
            "plain",
            "sanitizer: cases 2\nsanitizer: done it\nTraceback:\n  a line\nKeyError: 'x'\n",
            1,
            "failed",
            "KeyError: 'x'",
        ),
        (
            "memcheck",
            CLEAN.format("sanitizer: cases 1\nsanitizer: done it\nsanitizer: launched a.b\n"),
            0,
            "failed",
            f"not launched: {KERNEL}",
        ),
    ],
)
def test_a_process_is_judged(tool, text, status, verdict, first):
    found = outcome.judge(tool, "routing", text, status, 1.0, {KERNEL}, 240)
    assert found.verdict == verdict and first in found.first
    assert bool(first) == bool(found.first)


def test_options_that_the_program_lacks_are_left_out():
    words = command.command("here", "memcheck", "  --padding arg  bytes\n --print-limit arg")
    assert words == ["here", "--tool", "memcheck", "--print-limit", "20", "--padding", "256"]
    every = " ".join(option for option, _, _ in command.OPTIONS)
    assert "--kernel-name-exclude" in command.command("here", "racecheck", every)
    assert "--kernel-name-exclude" not in command.command("here", "initcheck", every)


@pytest.mark.parametrize(
    "words,message",
    [
        (["--tool", "leakcheck"], "invalid choice: 'leakcheck'"),
        (
            ["--only", "rings"],
            "no group begins with 'rings'; they are: canary, probes, quantizer 128x4",
        ),
        (["--seconds", "nan"], "--seconds: it is 'nan'; it must be a number above 0"),
        (["--jobs", "0"], "--jobs: it is '0'; it must be a number above 0"),
    ],
)
def test_wrong_arguments(words, message, capsys):
    with pytest.raises(SystemExit) as end:
        command.main(words)
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_a_machine_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main([]) == 3
    assert capsys.readouterr().err == "sanitizer: no CUDA device: there is nothing to check\n"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command, "program", lambda: None)
    assert command.main([]) == 3
    assert "compute-sanitizer is not found" in capsys.readouterr().err


FAKE_TOOL = """\
#!/bin/sh
case "$1" in --help) echo "--print-limit arg"; exit;; --version) echo "a version"; exit;; esac
tool=$2
shift 4
echo "========= COMPUTE-SANITIZER"
"$@"
status=$?
n=0
case "$* $tool" in *--planted*|*routing*racecheck) n=3; echo "========= Wrong access"
echo "=========     at route_kernel+0x10";; esac
if [ $tool = racecheck ]; then echo "========= RACECHECK SUMMARY: $n hazards displayed ($n errors)"
else echo "========= ERROR SUMMARY: $n errors"; fi
exit $status
"""
FAKE_WORKER = """\
#!/bin/sh
echo "sanitizer: cases 1"
case "$3" in canary) exec sleep 60;; esac
echo "sanitizer: done it"
echo "sanitizer: launched moe.routing.route_kernel moe.finalize.finalize_kernel \\
quantize.kernel.quantize_kernel"
"""


@pytest.fixture
def fake_machine(tmp_path, monkeypatch):
    """A GPU, a compute-sanitizer and a worker that are scripts; one group never ends."""
    for name, script in (("tool", FAKE_TOOL), ("worker", FAKE_WORKER)):
        (tmp_path / name).write_text(script, "utf-8")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "worker"))
    monkeypatch.setattr(command, "program", lambda: str(tmp_path / "tool"))
    monkeypatch.setattr(command, "missing", lambda: None)
    monkeypatch.setattr(command, "arch", lambda device: 89)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a fake")
    return ["--logs", str(tmp_path / "logs"), "--json", str(tmp_path / "cells.json")]


def test_a_whole_run(fake_machine, capsys):
    status = command.main(
        [*fake_machine, "--only", "routing", "--only", "finalize", "--only", "ring 8"]
    )
    printed = capsys.readouterr().out
    assert status == 1
    cells = {
        (c["tool"], c["group"]): c for c in json.loads(Path(fake_machine[3]).read_text("utf-8"))
    }
    assert len(cells) == 4 * 3  # planted faults, and two groups
    assert cells["racecheck", "routing"]["verdict"] == "errors"
    assert [key for key, c in cells.items() if c["verdict"] != "clean"] == [
        ("racecheck", "routing")
    ]
    assert "racecheck, routing: Wrong access at route_kernel+0x10\n" in printed
    assert "not here, ring 8: the GPU is sm_89, and the kernel is for sm_90\n" in printed
    assert command.main([*fake_machine, "--tool", "memcheck", "--only", "routing"]) == 0
    assert "2 processes, 2 cases without a report; exit status 0" in capsys.readouterr().out


def test_a_process_that_does_not_end_is_ended(fake_machine, capsys):
    words = [*fake_machine, "--tool", "memcheck", "--only", "canary", "--seconds", "1"]
    assert command.main(words) == 1
    assert "plain, canary: ended after 1 s, case 1 of 1" in capsys.readouterr().out


def test_what_was_not_run_is_no_success(fake_machine, capsys):
    assert command.main([*fake_machine, "--only", "routing", "--total", "0.000001"]) == 3
    assert "memcheck, planted fault: no time was left" in capsys.readouterr().out
    words = [*fake_machine, "--tool", "memcheck", "--only", "canary", "--total", "3"]
    assert command.main(words) == 3
    assert "plain, canary: ended after" in capsys.readouterr().out
    assert command.status_of([], 0) == 3


def test_a_planted_fault_that_is_not_found_fails(fake_machine, capsys, monkeypatch):
    quiet = Path(command.program())
    quiet.write_text(FAKE_TOOL.replace("*--planted*|", ""), "utf-8")
    assert command.main([*fake_machine, "--tool", "synccheck", "--only", "routing"]) == 1
    assert "synccheck, planted fault: it was not reported" in capsys.readouterr().out


@pytest.mark.skipif(refusal(90) is not None, reason=str(refusal(90)))
def test_no_group_runs_where_no_tool_finds_its_planted_fault(fake_machine, capsys, monkeypatch):
    """The kernels that specialize their warps are clean under a tool that reports nothing."""
    monkeypatch.setattr(command, "arch", lambda device: 90)
    Path(command.program()).write_text(FAKE_TOOL.replace("*--planted*|", ""), "utf-8")
    assert command.main([*fake_machine, "--tool", "racecheck", "--only", "finalize"]) == 1
    cells = json.loads(Path(fake_machine[3]).read_text("utf-8"))
    verdicts = {c["group"]: c["verdict"] for c in cells}
    assert verdicts["specialized warps: only"] == "clean" and verdicts["planted fault"] == "failed"
    assert "finalize" not in verdicts


OF_DISPATCH = """\
echo "========= Error: Race reported between Read access at a_kernel+0x110 in a.py:1"
echo "=========     and Write access at a_kernel+0x410 in a.py:1 [66 hazards]"
"""


@pytest.mark.skipif(refusal(90) is not None, reason=str(refusal(90)))
def test_known_reports_need_a_reproducer(fake_machine, capsys, monkeypatch):
    """Where no small kernel that specializes its warps has a report, a group's is an error."""
    monkeypatch.setattr(command, "arch", lambda device: 90)
    worked = FAKE_WORKER + 'echo "sanitizer: dispatch a_kernel 0x110 0x410 0x550"\n'
    Path(sys.executable).write_text(worked, "utf-8")
    words = [*fake_machine, "--tool", "racecheck", "--only", "routing"]
    reported = "*--reproducer?ring*|*--dispatch?routing*"
    for pattern, status, known in ((reported, 0, 1), ("*--dispatch?routing*", 1, 0)):
        n = f'{pattern}) n=1; {OF_DISPATCH};; *--planted*) n=3; echo "========= Wrong access";;'
        tool = FAKE_TOOL.replace("*--planted*|*routing*racecheck) n=3; echo", f"{n} none) echo")
        Path(command.program()).write_text(tool, "utf-8")
        assert command.main(words) == status
        cells = json.loads(Path(fake_machine[3]).read_text("utf-8"))
        assert [c["known"] for c in cells] == [0, 0, 0, 0, known, known]
        assert [c["verdict"] for c in cells] == ["clean"] * 5 + ["clean" if known else "errors"]
        assert (command.KNOWN in capsys.readouterr().out) == bool(known)


def test_a_group_is_left_out_under_a_tool_that_finds_nothing_new(fake_machine, capsys):
    words = [*fake_machine, "--only", "quantizer linear", "--only", "routing"]
    assert command.main([*words, "--tool", "memcheck", "--tool", "synccheck"]) == 0
    cells = json.loads(Path(fake_machine[3]).read_text("utf-8"))
    pairs = {(c["tool"], c["group"]) for c in cells}
    assert ("memcheck", "quantizer linear") in pairs and ("synccheck", "routing") in pairs
    assert ("synccheck", "quantizer linear") not in pairs
    with pytest.raises(SystemExit):
        command.main([*fake_machine, "--only", "quantizer linear", "--tool", "synccheck"])
    assert "--only: synccheck runs none of these groups" in capsys.readouterr().err
