"""`nvfp4-moe bench`: which cases it measures, what it prints, keeps, compares and draws."""

# SPDX-License-Identifier: Apache-2.0
import json
import re
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import test_speed
import torch

from nvfp4_moe import strict_json
from nvfp4_moe.__main__ import main
from nvfp4_moe.bench import checkpoint, clock, moe, plots, quantize, results
from nvfp4_moe.bench.case import Case, Prepared, WrongResult
from nvfp4_moe.bench.clock import Rates
from nvfp4_moe.bench.operations import OPERATIONS, select
from nvfp4_moe.bench.results import Measurement
from nvfp4_moe.exits import CommandError, Exit

CPU, GPU = torch.device("cpu"), torch.device("cuda")
RATES = Rates(4000.0, 800.0, "bf16")
needs_pytest_benchmark = pytest.mark.skipif(
    find_spec("pytest_benchmark") is None, reason="pytest-benchmark is not installed"
)
needs_matplotlib = pytest.mark.skipif(
    find_spec("matplotlib") is None, reason="matplotlib is not installed"
)


def keys(cases):
    return {(c.operation.name, c.shape, c.tokens, c.backend) for c in cases}


def test_the_usual_cases_of_a_cpu_need_no_gpu():
    found = select([], CPU)
    assert {c.operation.name for c in found} == set(OPERATIONS)
    ours = {c.backend for c in found} - {o.baseline for o in OPERATIONS.values()}
    assert ours == {
        "reference", "prepare_experts", "checkpoints.convert", "checkpoints.load_experts",
        "Experts.load_",
    }  # fmt: skip


def test_everything_is_every_combination():
    found = select(["moe"], GPU, everything=True)
    backends = set(OPERATIONS["moe"].every.backends) - {"reference"}
    assert {c.backend for c in found} == backends
    assert len(keys(found)) == len(found) == 6 * 7 * len(backends)
    assert "reference" in {c.backend for c in select(["moe"], CPU, everything=True)}


def test_what_is_named_is_measured():
    found = select(["moe"], GPU, shapes=["qwen3", "gpt"], tokens=[3], backends=["triton"])
    assert keys(found) == {("moe", name, 3, "triton") for name in ("Qwen3-30B-A3B", "GPT-OSS")}
    beside = select(["moe"], GPU, shapes=["qwen3"], backends=["triton"], baseline=moe.BF16_TRITON)
    assert {c.backend for c in beside} == {"triton", moe.BF16_TRITON}
    assert {c.tokens for c in beside} == {1, 32, 1024}
    # Operations without such a backend, or without tokens, have no cases.
    assert {c.operation.name for c in select([], GPU, backends=["copy_"])} == {"quantize"}
    assert {c.operation.name for c in select([], GPU, tokens=[5])} == {"quantize", "dense", "moe"}
    assert select(["moe", "moe"], CPU, tokens=[5, 5]) == select(["moe"], CPU, tokens=[5])


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (
            {"shapes": ["Mixtral"]},
            "--shape is 'Mixtral'; it must be in the name of a shape: K=4096",
        ),
        ({"backends": ["cublas"]}, "--backend is 'cublas'; it must be among "),
        ({"baseline": "cublas"}, "--baseline is 'cublas'; it must be among "),
        ({"tokens": [8, 0]}, "--tokens is 0; it must be from 1 to 2147483647"),
        ({"tokens": [2**31]}, "--tokens is 2147483648; it must be from 1 to 2147483647"),
        ({"shapes": ["Qwen3"], "backends": ["copy_"]}, "no operation has these shapes"),
    ],
)
def test_what_there_is_not(asked, told):
    with pytest.raises(CommandError) as refusal:
        select([], CPU, **asked)
    assert str(refusal.value).startswith(told)


def measurement(backend, tokens=8, seconds=1e-6, operation="moe", shape="Qwen3", flop=1e9):
    stats = results.statistics_of([seconds] * 3)
    return Measurement(operation, "tokens", shape, tokens, backend, stats, flop, 1e6, RATES, "none")


def test_figures_of_a_measurement():
    m = measurement("triton", seconds=2e-6)
    assert m.gb_s == pytest.approx(500) and m.tflops == pytest.approx(500)
    # 1e9 FLOPs take 1.25 us at 800 TFLOP/s, and 1e6 bytes 0.25 us at 4000 GB/s.
    assert m.of_roofline == pytest.approx(1.25 / 2)
    assert replace(m, flop=0).of_roofline == pytest.approx(0.25 / 2)


@needs_pytest_benchmark
@pytest.mark.parametrize("times", [[2.0], [1.0, 4.0], [3.0, 1.0, 2.0, 2.5, 40.0, 2.0, 1.5]])
def test_statistics_are_those_of_pytest_benchmark(times):
    """The quartiles, and what follows from them, are of another definition."""
    from pytest_benchmark.stats import Stats

    theirs = Stats()
    for t in times:
        theirs.update(t)
    ours, want = results.statistics_of(times), theirs.as_dict()
    assert set(ours) == {*want, "iterations"}
    for name in ("min", "max", "mean", "stddev", "rounds", "median", "ops", "total"):
        assert ours[name] == pytest.approx(want[name]), name
    assert ours["stddev_outliers"] == want["stddev_outliers"]
    assert ours["q1"] <= ours["median"] <= ours["q3"] and ours["iqr"] >= 0


def test_a_file_gives_back_what_was_written(tmp_path):
    path = tmp_path / "r.json"
    wrote = [measurement("triton"), measurement("copy_", 1, 3e-6, "quantize", flop=0)]
    results.write(path, wrote)
    assert results.read("--load", path) == wrote


@needs_pytest_benchmark
def test_pytest_benchmark_reads_the_file(tmp_path):
    """As a run to compare with, under the names of our own tests."""
    cases = [select([name], GPU, everything=True)[0] for name in OPERATIONS]
    done = [
        results.measured(c, Prepared(print, 1, 1), results.statistics_of([1e-6]), RATES, "none")
        for c in cases
    ]
    results.write(tmp_path / "0001_r.json", done)
    written = json.loads((tmp_path / "0001_r.json").read_text("utf-8"))["benchmarks"]
    for case, benchmark in zip(cases, written, strict=True):
        test = getattr(test_speed, f"test_{case.operation.name}")
        ids = {f"{test.__name__}[{param.id}]" for param in test.pytestmark[0].args[1]}
        assert benchmark["name"] in ids
        assert benchmark["group"] == case.group
    done = subprocess.run(
        [sys.executable, "-m", "pytest_benchmark", "compare", "--group-by=group", "0001_r.json"],
        capture_output=True, text=True, cwd=tmp_path, env=None,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert cases[2].group in done.stdout


def test_pytest_keeps_what_the_command_reads(monkeypatch):
    """A case of `bench/test_speed.py`, on the CPU, with a clock that stands still."""

    class Benchmark:
        group, extra_info = "", {}

    monkeypatch.setattr(test_speed, "DEVICE", CPU)
    monkeypatch.setattr(test_speed, "rates", lambda: RATES)
    monkeypatch.setattr(test_speed, "device_time", lambda benchmark, timed: timed())
    case = Case(OPERATIONS["dense"], "N=1024 K=2048", 3, "reference")
    test_speed.measure(benchmark := Benchmark(), case)
    stats = results.statistics_of([1e-6])
    found = results._measurement({"extra_info": benchmark.extra_info, "stats": stats})
    assert found == results.measured(case, case.prepare(CPU), stats, RATES, found.device)
    assert benchmark.group == found.group == "dense: N=1024 K=2048, 3 rows"
    with pytest.raises(pytest.skip.Exception, match=r"flashinfer:cutlass: .* needs a GPU"):
        test_speed.measure(benchmark, replace(case, backend="flashinfer:cutlass"))


@pytest.mark.parametrize(
    "text",
    [
        None, "", "[]", "{}", '{"benchmarks": 3}', '{"benchmarks": []}',
        '{"benchmarks": [{"extra_info": {}}]}',
        '{"benchmarks": [{"extra_info": {"operation": "moe"}}]}',
        "zero", "nan",
    ],
)  # fmt: skip
def test_a_file_of_another_kind(text, tmp_path, capsys):
    path = tmp_path / "r.json"
    if text in ("zero", "nan"):
        results.write(path, [measurement("triton", seconds=1e-6)])
        bad = path.read_text("utf-8").replace(
            '"median": 1e-06', f'"median": {0 if text == "zero" else "NaN"}'
        )
        path.write_text(bad, "utf-8")
    elif text is not None:
        path.write_text(text, "utf-8")
    for option in ("--load", "--compare"):
        assert main(["bench", option, str(path)]) == Exit.USAGE
        printed = capsys.readouterr()
        (line,) = printed.err.splitlines()
        assert line.startswith(f"nvfp4-moe bench: {option} is '{path}'; it must "), line
        assert printed.out == ""


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tokens", "Infinity"), ("tokens", -1), ("tokens", 10**300), ("bytes", 0),
        ("bytes", "NaN"), ("flop", -1), ("flop", "Infinity"), ("flop", 10**399),
        ("copy_gb_s", 1e-300), ("median", 1e-320), ("median", 1e308),
    ],
)  # fmt: skip
def test_a_number_of_a_file_that_no_run_has(field, value, tmp_path, capsys):
    path = tmp_path / "r.json"
    results.write(path, [measurement("triton", seconds=1e-6)])
    text, count = re.subn(rf'"{field}": [^,\n]+', f'"{field}": {value}', path.read_text("utf-8"))
    path.write_text(text, "utf-8")
    assert count == 1
    for option in ("--load", "--compare"):
        assert main(["bench", option, str(path), "--json", str(tmp_path / "found")]) == Exit.USAGE
        (line,) = capsys.readouterr().err.splitlines()
        assert "it must have the form of pytest-benchmark" in line


def test_a_file_without_an_end(monkeypatch, capsys):
    monkeypatch.setattr(strict_json, "MOST_BYTES", 1000)
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail("it reads without a bound"))
    assert main(["bench", "--load", "/dev/zero"]) == Exit.USAGE
    assert "it has 1001 bytes; at most 1000 are read" in capsys.readouterr().err


def test_ratios_are_within_a_group():
    found = [
        measurement("triton", 1, 1e-6), measurement("base", 1, 3e-6),
        measurement("triton", 8, 5e-6), measurement("base", 8, 4e-6), measurement("triton", 32),
    ]  # fmt: skip
    ratios = results.ratios(found, {"moe": "base"})
    assert ratios[found[0].key] == pytest.approx(3) and ratios[found[2].key] == pytest.approx(0.8)
    assert ratios[found[1].key] == 1 and found[4].key not in ratios
    assert results.ratios(found, {"moe": None}) == {}
    earlier = [measurement("triton", 8, 10e-6)]
    assert results.changes(found, earlier) == {found[2].key: pytest.approx(2)}


def draw(found, folder):
    baselines = {name: o.baseline for name, o in OPERATIONS.items()}
    return plots.draw(found, results.ratios(found, baselines), baselines, folder)


@needs_matplotlib
def test_plots(tmp_path):
    found = [
        measurement(backend, tokens, tokens * size * 1e-6, shape=shape, flop=tokens * 1e9)
        for shape in ("Qwen3", "GPT-OSS")
        for tokens in (8, 1)
        for size, backend in enumerate(("triton", "triton, W4A16", moe.GROUPED_MM), 1)
    ]
    written = draw(found, tmp_path / "new" / "folder")
    assert [p.name for p in written] == ["roofline.svg", "speedup.svg"]
    for path in written:
        text = path.read_text("utf-8")
        assert "Qwen3" in text and "GPT-OSS" in text and "triton, W4A16" in text
        assert "#000000" not in text and "#ffffff" not in text, "unreadable on a dark or light page"
    assert "4,000 GB/s" in written[0].read_text("utf-8")
    assert f">{moe.GROUPED_MM}<" in written[1].read_text("utf-8")
    bases = {"moe": moe.GROUPED_MM}
    others = [m for m in found if m.backend != moe.GROUPED_MM]
    rooflines = plots._rooflines(found), 2 * [3 * [2]]
    speedups = plots._speedups(others, results.ratios(found, bases), bases), 2 * [2 * [2]]
    for figure, points in (rooflines, speedups):
        seen = []
        for axis in figure.axes:
            (low, high), marked = axis.get_ylim(), [o for o in axis.lines if o.get_marker() == "o"]
            assert all(low <= y <= high for line in axis.lines for y in line.get_ydata())
            seen.append([len(line.get_ydata()) for line in marked])
        assert seen == points
    again = draw(found, tmp_path / "again")
    assert [p.read_bytes() for p in again] == [p.read_bytes() for p in written]


@needs_matplotlib
def test_plots_of_what_was_measured_alone(tmp_path):
    """A quantizer has no product, and a baseline by itself is compared with nothing."""
    rows = [measurement(b, operation="quantize", flop=0) for b in ("triton", "copy_")]
    assert [p.name for p in draw(rows, tmp_path)] == ["speedup.svg"]
    assert [p.name for p in draw([measurement("triton")], tmp_path)] == ["roofline.svg"]
    assert draw([measurement("prepare_experts", 0, operation="convert", flop=0)], tmp_path) == []


def test_clocks_are_kept(tmp_path, stopped_clock, monkeypatch):
    read = iter([1980, 1755] * 6)
    monkeypatch.setattr(clock, "sm_mhz", lambda device: next(read))
    path = tmp_path / "r.json"
    assert main([*QUICK, "--save", str(path)]) == Exit.DONE
    assert {m.sm_mhz for m in results.read("--load", path)} == {(1980, 1755)}
    # A file of an earlier version has none.
    path.write_text(path.read_text("utf-8").replace('"sm_mhz"', '"other"'), "utf-8")
    assert {m.sm_mhz for m in results.read("--load", path)} == {(None, None)}


@pytest.mark.parametrize(
    "backend", [b for n in ("convert", "load") for b in OPERATIONS[n].every.backends]
)
def test_conversion_and_loading(backend, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHAPES", {"tiny": (2, 128, 128)})
    name = "convert" if backend in (checkpoint.IN_MEMORY, checkpoint.TO_DISK) else "load"
    prepared = Case(OPERATIONS[name], "tiny", 0, backend).prepare(CPU)
    weights = 2 * 3 * 128 * 128
    read = 9 / 16 if backend == checkpoint.FROM_DISK else 2
    assert prepared.moved == weights * (read + 9 / 16) and prepared.flop == 0
    first, second = prepared.call(), prepared.call()
    if backend in (checkpoint.IN_MEMORY, checkpoint.FROM_DISK):
        assert torch.equal(first.gemm1_weights, second.gemm1_weights)
        assert first.gemm1_weights.shape == (2, 256, 64)


def test_a_wrong_quantizer_is_not_measured(monkeypatch):
    right = quantize.nvfp4_quantize

    def wrong(*args, backend, **options):
        codes, *scales = right(*args, backend="reference", **options)
        return (codes ^ (backend == "triton"), *scales)

    class Serving:
        def reason(self, backend):
            return None

    monkeypatch.setattr(quantize, "explain", lambda *_, **__: Serving())
    monkeypatch.setattr(quantize, "nvfp4_quantize", wrong)
    operation = OPERATIONS["quantize"]
    with pytest.raises(WrongResult, match="bits differ"):
        Case(operation, "K=4096 fast", 1, "triton").prepare(CPU)
    Case(operation, "K=4096 fast", 1, "flashinfer:cuda").prepare(CPU)


def test_a_wrong_layer_is_not_measured(monkeypatch):
    s = moe.Shape("tiny", 64, 64, 2, 2)
    experts, right, factor = moe.random_experts(s, CPU), moe.fused_moe, 1.0

    def scaled(*args, backend, **options):
        out = right(*args, backend="reference", **options)
        return out.double() * (factor if backend == "triton" else 1)

    monkeypatch.setattr(moe, "fused_moe", scaled)
    moe.check(s, experts, backend="triton")
    factor = 1.01
    with pytest.raises(WrongResult, match=r"tiny: relative error 0\.01"):
        moe.check(s, experts, backend="triton")


@pytest.mark.interpreter
def test_cases_of_triton(monkeypatch):
    """Every NVFP4 layer of ours runs, after its comparison with the reference."""
    s = moe.Shape("tiny", 128, 64, 2, 2)
    monkeypatch.setitem(moe._BY_NAME, "tiny", s)
    for name in ("triton", "triton, batch-invariant", "triton, W4A16"):
        prepared = Case(OPERATIONS["moe"], "tiny", 3, name).prepare(CPU)
        assert prepared.call().shape == (3, 128)
        assert prepared.flop == 2 * 3 * 2 * 3 * 128 * 64
        assert prepared.moved == 2 * 3 * 128 * 64 * 9 / 16 + 2 * 2 * 3 * 128 + 4 * 3 * 2
    prepared = Case(OPERATIONS["quantize"], "K=4096 fast, 4over6", 2, "triton").prepare(CPU)
    assert prepared.capturable and len(prepared.call()) == 3


@pytest.fixture
def stopped_clock(monkeypatch):
    """Every call is made once, and takes 2 us; the rates are 4000 GB/s and 800 TFLOP/s."""

    def timer(call, device, capturable, calls):
        call()
        return lambda: 2e-6

    monkeypatch.setattr(clock, "timer", timer)
    monkeypatch.setattr(clock, "rates", lambda device: RATES)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


QUICK = ("bench", "--only", "quantize", "--only", "dense", "--tokens", "1")


def test_a_run(stopped_clock, capsys, tmp_path):
    saved, document = tmp_path / "saved.json", tmp_path / "document.json"
    status = main([*QUICK, "--save", str(saved), "--json", str(document)])
    printed = capsys.readouterr()
    assert status == Exit.DONE and printed.err == ""
    lines = printed.out.splitlines()
    assert "Measured on a CPU: the reference" in lines[1] and "GPU" in lines[1]
    assert "4,000 GB/s" in lines[2] and "800 TFLOP/s" in lines[2]
    heading = lines.index("dense: N=1024 K=2048; speed-up over torch, bf16")
    names, row = (line.split() for line in lines[heading + 1 : heading + 3])
    assert names == ["rows", "backend", "time", "GB/s", "TFLOP/s", "of", "roofline", "speed-up"]
    moved = (1 + 1024) * 2048 * 9 / 16 + 4 + 2 * 1024
    figures = [f"{moved / 2e-6 / 1e9:.0f}", f"{2 * 1024 * 2048 / 2e-6 / 1e12:.3g}"]
    share = f"{moved / 4e12 / 2e-6:.3f}"
    assert row == ["1", "reference", "2", "us", *figures, share, "1"]
    cells = json.loads(document.read_text("utf-8"))["cells"]
    assert len(cells) == 6 and {c["operation"] for c in cells} == {"quantize", "dense"}
    assert all(c["seconds"] == 2e-6 and c["speed_up_over_baseline"] == 1 for c in cells)
    # The file, beside a run that takes as long, and by itself.
    assert main([*QUICK, "--compare", str(saved)]) == Exit.DONE
    assert "than before" in capsys.readouterr().out
    assert main(["bench", "--load", str(saved), "--only", "dense", "--json"]) == Exit.DONE
    loaded = json.loads(capsys.readouterr().out)["cells"]
    assert loaded == [c for c in cells if c["operation"] == "dense"]
    # A file that has none of the cases is no comparison.
    results.write(saved, [measurement("triton")])
    assert main([*QUICK, "--compare", str(saved)]) == Exit.NOT_RUN
    printed = capsys.readouterr()
    assert "none of the cases that were measured" in printed.err
    assert f"note: {saved} was measured on none" in printed.out


@needs_matplotlib
def test_a_file_is_drawn(capsys, tmp_path):
    found = [measurement(b, t, t * 1e-6) for b in ("triton", moe.GROUPED_MM) for t in (1, 8)]
    paths = [str(tmp_path / f"{i}.json") for i in range(2)]
    results.write(tmp_path / "0.json", found[:2])
    results.write(tmp_path / "1.json", found[2:])
    loaded = [word for path in paths for word in ("--load", path)]
    assert main(["bench", *loaded, "--plot", str(tmp_path / "plots")]) == Exit.DONE
    assert f"drew {tmp_path / 'plots' / 'speedup.svg'}" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "plots").iterdir()) == ["roofline.svg", "speedup.svg"]


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (["--only", "oops"], Exit.USAGE, "--only is 'oops'; it must be among quantize, dense"),
        (["--shape", "Mixtral"], Exit.USAGE, "--shape is 'Mixtral'; it must be in the name"),
        (["--backend", "x"], Exit.USAGE, "--backend is 'x'; it must be among "),
        (["--device", "cuda"], Exit.USAGE, "--device is 'cuda'; it must be a device of this machine"),
        (["--device", "x"], Exit.USAGE, "--device is 'x'; it must be a device of this machine"),
        (["--load", "FILE", "--all"], Exit.USAGE, "--all is of a run, and --load measures nothing"),
        (["--load", "FILE", "--device", "cpu"], Exit.USAGE, "--device is of a run"),
        (["--load", "FILE", "--tokens", "7"], Exit.USAGE, "--load has nothing of what is asked for; "),
        (["--save", "/dev/full"], Exit.USAGE, "--save is '/dev/full'"),
        (["--plot", "FILE"], Exit.USAGE, "--plot is "),
    ],
)  # fmt: skip
def test_bad_usage(words, status, told, stopped_clock, capsys, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    results.write(tmp_path / "r.json", [measurement("triton")])
    words = [str(tmp_path / "r.json") if word == "FILE" else word for word in words]
    assert main(["bench", *words]) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"nvfp4-moe bench: {told}"), line


def test_plots_without_matplotlib(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*QUICK, "--plot", str(tmp_path)]) == Exit.NOT_RUN
    printed = capsys.readouterr()
    assert printed.out == "" and "pip install 'nvfp4-moe[bench]'" in printed.err


def test_a_backend_that_needs_a_gpu(stopped_clock, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    words = ["bench", "--only", "dense", "--tokens", "1", "--backend", "flashinfer:cutlass"]
    assert main([*words, "--json"]) == Exit.NOT_RUN
    printed = capsys.readouterr()
    (refused,) = json.loads(printed.out)["not_measured"]
    assert refused["backend"] == "flashinfer:cutlass" and "needs a GPU" in refused["reason"]
    assert "--backend flashinfer:cutlass: nothing was measured" in printed.err.splitlines()[-1]
    # One that was named and did not run counts, although another did.
    assert main([*words, "--backend", "reference"]) == Exit.NOT_RUN


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (WrongResult("K=4096: bits differ"), Exit.DIFFERENCE, "WRONG, and not measured: K=4096"),
        (torch.OutOfMemoryError("9 GiB"), Exit.NOT_RUN, "has not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9"), Exit.NOT_RUN, "not enough"),
        (NotImplementedError("no program"), Exit.NOT_RUN, "no program"),
    ],
)
def test_a_case_that_fails(error, status, told, stopped_clock, capsys, monkeypatch):
    def fail(case, device):
        raise error

    monkeypatch.setattr(Case, "prepare", fail)
    assert main(list(QUICK)) == status
    assert told in capsys.readouterr().out


def test_more_tokens_than_memory(stopped_clock, capsys):
    words = ["bench", "--only", "quantize", "--shape", "K=4096 fast", "--backend", "reference"]
    assert main([*words, "--tokens", "2147483647"]) == Exit.NOT_RUN
    assert "has not enough memory" in capsys.readouterr().out


def test_an_interrupt_keeps_what_was_measured(stopped_clock, capsys, monkeypatch, tmp_path):
    made = []

    def timer(call, device, capturable, calls):
        made.append(call)
        if len(made) == 3:
            raise KeyboardInterrupt
        return lambda: 1e-6

    monkeypatch.setattr(clock, "timer", timer)
    path = tmp_path / "r.json"
    assert main([*QUICK, "--save", str(path)]) == Exit.INTERRUPTED
    assert f"what was measured before is in {path}" in capsys.readouterr().err
    assert len(results.read("--load", path)) == 2


def test_an_interrupt_before_the_first_time_keeps_an_earlier_file(
    stopped_clock, capsys, monkeypatch, tmp_path
):
    """Nothing of that file was measured now."""

    def timer(call, device, capturable, calls):
        raise KeyboardInterrupt

    path = tmp_path / "r.json"
    results.write(path, [measurement("triton")])
    before = path.read_bytes()
    monkeypatch.setattr(clock, "timer", timer)
    assert main([*QUICK, "--save", str(path)]) == Exit.INTERRUPTED
    assert "it wrote nothing, and the same command starts over" in capsys.readouterr().err
    assert path.read_bytes() == before


@pytest.mark.gpu
def test_on_a_gpu(capsys):
    """Real times: a copy is near the roofline, and the quantizer is below it."""
    words = ["bench", "--only", "quantize", "--shape", "K=4096 fast", "--tokens", "8192"]
    assert main([*words, "--backend", "triton", "--baseline", "copy_", "--json"]) == Exit.DONE
    cells = {(c["shape"], c["backend"]): c for c in json.loads(capsys.readouterr().out)["cells"]}
    assert len(cells) == 4
    for c in cells.values():
        assert 0.05 < c["share_of_roofline"] < 4 and c["copy_gb_s"] > 100


@pytest.mark.gpu
def test_layers_on_a_gpu(capsys):
    words = ["bench", "--only", "moe", "--shape", "small", "--tokens", "8"]
    for backend in ("triton", "triton, W4A16", "triton, batch-invariant", moe.BF16_TRITON):
        words += ["--backend", backend]
    assert main([*words, "--baseline", moe.GROUPED_MM, "--json"]) == Exit.DONE
    cells = json.loads(capsys.readouterr().out)["cells"]
    assert len(cells) == 5 and all(c["speed_up_over_baseline"] > 0 for c in cells)
