"""The benchmarks' own code, as far as it goes without a GPU: the bf16 layer, the cells, the table."""

# SPDX-License-Identifier: Apache-2.0
import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import benchmark_json
import bf16_layer
import dense_speed
import fake_flashinfer
import host_time
import moe_speed
import plots
import pretend_gpu
import pytest
import reload_speed
import test_speed
import torch
from bf16_layer import Tiles, Weights, candidates
from moe_speed import Shape
from offline import compile_kernel, resources

from nvfp4_moe.reference.activation import ActivationType

needs_pytest_benchmark = pytest.mark.skipif(
    find_spec("pytest_benchmark") is None, reason="pytest-benchmark is not installed"
)
SMALL = (Tiles(16, 64, 64, 2, 1, 4), Tiles(16, 128, 64, 1, 1, 4))
SHAPES = {
    "Swiglu": Shape("Swiglu", 96, 64, 4, 2),
    "Relu2": Shape("Relu2", 128, 80, 4, 3, ActivationType.Relu2),
    "biased": Shape("biased", 96, 112, 4, 2, biased=True),
    "EP": Shape("EP", 64, 64, 2, 2, ranks=2),
}


@pytest.fixture
def case(monkeypatch):
    def make(s: Shape, tokens: int, limit: float | None = None):
        monkeypatch.setattr(moe_speed, "DEVICE", torch.device("cpu"))
        w = moe_speed.bf16_weights(s)
        # Large enough that activations matter, and limits.
        w = Weights(
            w.w13 * 8,
            w.w2 * 8,
            w.activation,
            w.w13_bias,
            w.w2_bias,
            w.alpha,
            w.beta,
            w.limit if limit is None else limit,
        )
        return *moe_speed.inputs(s, tokens), w

    return make


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    error = (got.double() - want.double()).norm() / want.double().norm()
    assert error < 1e-2, error


@pytest.mark.skipif(
    find_spec("flashinfer") is None or find_spec("cutlass") is None,
    reason="needs flashinfer-python and nvidia-cutlass-dsl",
)
@pytest.mark.parametrize("name", test_speed.BASELINES)
def test_baselines(monkeypatch, name):
    """A whole call, and its check, through FlashInfer's Python."""
    monkeypatch.setattr(moe_speed, "DEVICE", torch.device("cpu"))
    s = Shape("EP", 256, 128, 4, 2, ranks=2)
    x, logits = moe_speed.inputs(s, 9)
    with fake_flashinfer.installed() as fake:
        call = test_speed.baseline_call(s, name, x, logits)
        assert torch.equal(call(), call())
    assert [ran.backend for ran in fake.ran] == [name] * 3
    for changed, reason in (({"biased": True}, "without biases"), ({}, "on the CPU")):
        with pytest.raises(pytest.skip.Exception, match=reason):
            test_speed.baseline_call(replace(s, **changed), name, x, logits)


@pytest.mark.parametrize("name", SHAPES)
def test_grouped_mm_layer(case, name):
    s = SHAPES[name]
    x, logits, w = case(s, 40, limit=0.7 if name == "biased" else None)
    slots_here = moe_speed.experts_of_local_slots(s, logits).numel()
    assert slots_here == 80 if name in ("Swiglu", "biased") else slots_here > 20
    got = moe_speed.grouped_mm_layer(x, logits, w, s.top_k, slots_here)
    assert_close(got, bf16_layer.plain(x, logits, w, s.top_k))


@pytest.mark.interpreter
@pytest.mark.parametrize("tokens", [1, 40])  # 40: more than a tile an expert
@pytest.mark.parametrize("name", SHAPES)
def test_layer(case, name, tokens):
    s = SHAPES[name]
    x, logits, w = case(s, tokens, limit=0.7 if name == "biased" else None)
    got = bf16_layer.layer(x, logits, w, s.top_k, SMALL)
    assert_close(got, bf16_layer.plain(x, logits, w, s.top_k))


@pytest.mark.interpreter
def test_tune_takes_the_fastest_pair_of_one_height(case, monkeypatch):
    s = SHAPES["Swiglu"]
    x, logits, w = case(s, 1)
    tried = [
        Tiles(16, 64, 64, 1, 1, 4),
        Tiles(16, 128, 64, 1, 1, 4),
        Tiles(32, 64, 64, 1, 1, 4),
    ]
    monkeypatch.setattr(bf16_layer, "candidates", lambda each: tried)
    # Of 16 rows the second, then the first are the fastest; of 32 rows no sum is as small.
    times = iter([5.0, 3.0, 2.0, 4.0, 1.0, 9.0])

    def timed(call, calls, replays):
        call()
        return next(times)

    monkeypatch.setattr(bf16_layer, "microseconds", timed)
    assert bf16_layer.tune(x, logits, w, s.top_k, 1) == (tried[1], tried[0])


@pytest.fixture
def stopped_clock(monkeypatch):
    """Everything runs, on the CPU, and takes 2 us and its result's bytes."""

    def timed(call, *_):
        call()
        return 2.0

    monkeypatch.setattr(bf16_layer, "microseconds", timed)
    monkeypatch.setattr(moe_speed, "samples", lambda call, *_: [1.0, timed(call), 5.0])
    monkeypatch.setattr(bf16_layer, "candidates", lambda each: list(SMALL))
    monkeypatch.setattr(moe_speed, "peak_bytes", lambda call: call().nbytes)
    monkeypatch.setattr(moe_speed, "copy_rate", lambda: 1000.0)
    monkeypatch.setattr(moe_speed, "cublas_rate", lambda: 1.0)
    monkeypatch.setattr(moe_speed, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")


@pytest.mark.interpreter
@needs_pytest_benchmark
def test_a_whole_run(stopped_clock, monkeypatch, capsys, tmp_path):
    shapes = (
        Shape("all", 128, 64, 2, 2, tuned_once=(7,)),
        Shape("EP", 128, 64, 2, 2, ranks=8),
    )
    made = []

    def bf16_weights(s, make=moe_speed.bf16_weights):
        made.append(s.name)
        return make(s)

    monkeypatch.setattr(moe_speed, "SHAPES", shapes)
    monkeypatch.setattr(moe_speed, "bf16_weights", bf16_weights)
    path = tmp_path / "cells.json"
    other = tmp_path / "benchmarks.json"
    options = ["--tokens", "1", "--json", str(path), "--benchmark-json", str(other)]
    monkeypatch.setattr("sys.argv", ["moe_speed.py", *options])
    moe_speed.main()
    cells = plots.read(other)
    assert cells["EP"][1]["seconds"] == dict.fromkeys(moe_speed.LAYERS.values(), 2e-6)
    assert plots.points(cells["all"]) == [(32 / 9 * 1, 2 * 2 * 3 * 128 * 64 / 2e-6)]
    assert made == ["all"]
    results = json.loads(path.read_text())
    assert results["gpu"] == "none" and results["copy"] == 1000.0
    one, ep = results["cells"]
    assert one["local_slots"] == 2 and ep["local_slots"] == 1
    for c in (one, ep):
        assert c["floor_us"] == pytest.approx(c["local_slots"] * 3 * 128 * 64 * 9 / 16 / 1e6)
        assert c["tflops"] == pytest.approx(c["local_slots"] * 2 * 3 * 128 * 64 / 2 / 1e6)
        assert c["workspace_bytes"] == 2 * 128 and c["decoded_bytes"] == 0
        # An expert's share is one token or less: tiles of 16.
        assert c["workspace_bound_bytes"] == moe_speed.workspace_bound(shapes[0], 1, 16)
        assert c["bf16_triton_tiles"] == [[16, 64, 64, 2, 1, 4]] * 2
    printed = capsys.readouterr().out.splitlines()
    assert printed[4] == printed[8] == moe_speed.heading()
    assert len(printed[5]) == len(printed[9]) == len(printed[4])
    assert printed[5].split()[-2:] == ["7", "3.50"]
    assert printed[9].split()[-2:] == ["-", "-"]


def test_weights_decoded_ahead_are_no_workspace(stopped_clock, monkeypatch):
    s = Shape("", 256, 256, 4, 2)
    experts = moe_speed.random_experts(s)
    monkeypatch.setattr(moe_speed, "peak_bytes", lambda call: 10**6)
    monkeypatch.setattr(moe_speed, "native_mma", lambda arch: False)
    monkeypatch.setattr(moe_speed, "arch", lambda device: 90)
    monkeypatch.setattr(moe_speed, "ring_serves", lambda experts: False)
    c = moe_speed.workspace(s, 8, experts, lambda: None)
    assert c["workspace_bytes"] == 10**6 and c["decoded_bytes"] == 0
    # From 1024 tokens an expert: three experts' [512, 256] at most, then all of [256, 256], bf16.
    monkeypatch.setattr(moe_speed.launch, "_DECODED_BYTES", 3 * 512 * 256 * 2)
    c = moe_speed.workspace(s, 2048, experts, lambda: None)
    assert c["decoded_bytes"] == 3 * 512 * 256 * 2
    assert c["workspace_bytes"] == 10**6 - 4 * 256 * 256 * 2
    assert c["workspace_bound_bytes"] == moe_speed.workspace_bound(s, 2048, 128)


def test_a_wrong_row_ends_the_run(case):
    s = SHAPES["Relu2"]
    x, logits, w = case(s, 2)
    right = bf16_layer.plain(x, logits, w, s.top_k)
    moe_speed.check_bf16(s, right, x, logits, w)
    for wrong in (right * 1.02, right * float("nan")):
        with pytest.raises(SystemExit, match="Relu2"):
            moe_speed.check_bf16(s, wrong, x, logits, w)


def test_workspace_bound():
    s = Shape("", 1024, 512, 8, 4)
    # 40 slots and 8 * 15 of padding: 2048 + 1024 + 256 + 32 + 4 + 2048 bytes each
    assert moe_speed.workspace_bound(s, 10, 16) == 160 * 5412
    plain = Shape("", 1024, 512, 8, 4, ActivationType.Relu2)
    assert moe_speed.workspace_bound(plain, 10, 16) == 160 * (5412 - 1024)


def test_candidates_are_few_and_fit():
    seen = set()
    for each in (0.1, 8, 9, 48, 49, 192, 193, 1e5):
        some = candidates(each)
        assert 4 <= len(some) <= 10
        seen.update(some)
    assert seen == set(bf16_layer.TILES) and len(seen) <= 14
    for t in seen:
        assert (t.bm + t.bn) * t.bk * 2 * t.stages <= 227 * 1024, t


def test_activations_of_the_bf16_layer():
    with pytest.raises(ValueError, match="activation is Gelu"):
        Weights(torch.zeros(0), torch.zeros(0), ActivationType.Gelu)


@pytest.mark.parametrize(
    "arguments,message",
    [
        ([], "no CUDA device"),
        (["--shape", "Mixtral"], "invalid choice: 'Mixtral'"),
        (["--tokens", "0"], "--tokens: it is '0'; it must be an integer from 1"),
    ],
)
def test_what_ends_a_script(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["moe_speed.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        moe_speed.main()
    assert message in f"{stop.value.code} {capsys.readouterr().err}"


def compiled(t: Tiles, arch: int, *, first: bool, even: bool = True):
    constants = {
        "weight_ptr" if first else "bias_ptr": None,
        "GATHER": first,
        "BM": t.bm,
        "BN": t.bn,
        "BK": t.bk,
        "GROUP": t.group,
        "STAGES": t.stages,
        "EVEN": even,
        "ARCH": arch,
    }
    types = {
        "x_ptr": "*bf16", "w_ptr": "*bf16", "bias_ptr": "*bf16", "weight_ptr": "*bf16",
        "out_ptr": "*bf16", "expanded_ptr": "*i32", "tile_ptr": "*i32", "end_ptr": "*i32",
        "divisor": "i32", "tiles": "i32", "N": "i32", "K": "i32",
    }  # fmt: skip
    aligned = [n for n in types if n not in (*constants, "divisor", "tiles")]
    return compile_kernel(
        bf16_layer.gemm_kernel, arch, types, constants, aligned, num_warps=t.warps
    )


@pytest.mark.compile
@pytest.mark.parametrize("t", bf16_layer.TILES, ids=str)
def test_gemm_compiles(t, tmp_path):
    """Copied asynchronously, multiplied by the Hopper's MMA where 64 rows are there for it."""
    kernel = compiled(t, 90, first=True)
    ptx = kernel.asm["ptx"]
    instruction = "wgmma.mma_async" if t.bm >= 64 else "mma.sync.aligned.m16n8k16"
    assert instruction in ptx
    assert "cp.async.cg.shared.global" in ptx
    assert kernel.metadata.shared <= 227 * 1024
    stack, _ = resources(kernel, tmp_path)
    assert stack <= 64


@pytest.mark.compile
def test_second_gemm_with_a_last_part_compiles(tmp_path):
    kernel = compiled(bf16_layer.TILES[-1], 90, first=False, even=False)
    assert "wgmma.mma_async" in kernel.asm["ptx"]
    assert resources(kernel, tmp_path)[0] <= 64


@pytest.mark.interpreter
@pytest.mark.parametrize("m", [3, 130])
def test_dense_products_are_checked(m, monkeypatch):
    """The cells' inputs have exact sums, and another weight is seen."""
    monkeypatch.setattr(dense_speed, "DEVICE", torch.device("cpu"))
    a, b = dense_speed.operand(m, 192), dense_speed.operand(136, 192)
    alpha = torch.rand(m) + 0.5
    dense_speed.check(*a, *b, alpha)
    right = dense_speed.product

    def wrong(a, a_scales, b, b_scales, alpha):
        return right(a, a_scales, b.roll(1, 0), b_scales, alpha)

    monkeypatch.setattr(dense_speed, "product", wrong)
    with pytest.raises(SystemExit, match="wrong bits"):
        dense_speed.check(*a, *b, alpha)


@pytest.mark.interpreter
def test_reload_speed(monkeypatch, capsys):
    """Every cell is measured, and checked: of weights that change under the clock, it says so."""
    monkeypatch.setattr(reload_speed, "SHAPES", {"small": (2, 64, 128)})
    monkeypatch.setattr(reload_speed, "DEVICE", torch.device("cpu"))

    def timed(call, _):
        call()
        return 2.0

    monkeypatch.setattr(reload_speed, "microseconds", timed)
    load = reload_speed.Experts.load_
    monkeypatch.setattr(
        reload_speed.Experts, "load_", lambda *a, **k: load(*a, **k, backend="triton")
    )
    cells = reload_speed.measure("small", 1.0)
    whole = [c["share"] for c in cells if c.get("what") == "2 experts"]
    read, written = 2 * 2 * (256 * 64 + 64 * 128), (2 * (256 * 128 + 128 * 128) * 9) // 16
    assert whole == [pytest.approx((2 * read + written) / 2 / 1e3)] * 2
    assert "maxima given" in capsys.readouterr().out and len(cells) == 9
    monkeypatch.setattr(reload_speed, "microseconds", lambda call, _: 2.0)  # nothing is loaded
    with pytest.raises(SystemExit, match="wrong bits: gemm1_weights"):
        reload_speed.measure("small", 1.0)


def test_host_time_measures_every_call(monkeypatch):
    """On a pretended GPU, so the times are of no account."""
    monkeypatch.setattr(moe_speed, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(host_time, "ROUNDS", 3)
    small = replace(moe_speed.SHAPES[0], hidden=256, intermediate=128, experts=8)
    pretend_gpu.present(monkeypatch)
    with torch.no_grad():
        cells = {name: host_time.measure(*asked) for name, asked in host_time.calls(small).items()}
    assert {name: c["launches"] for name, c in cells.items()} == {
        "fused_moe": 6, "fused_moe, auto": 6, "trtllm_fp4_block_scale_moe": 6,
        "nvfp4_quantize": 1, "nvfp4_quantize, auto": 1, "mm_fp4": 2, "mm_fp4, auto": 2,
    }  # fmt: skip
    for name, cell in cells.items():
        assert all(value > 0 for value in cell.values()), name
        assert host_time.line(name, cell)


def results(path, layers=("triton", "triton, W4A16", "triton, bf16", "torch._grouped_mm, bf16")):
    """Write a file of benchmarks whose layers take 1, 2, 3 ... times ours, at two numbers of tokens."""
    made = [
        benchmark_json.benchmark(
            "Qwen3", t, layer, [i * t * 1e-6],
            moe_speed.case_info("Qwen3", t, layer)
            | {"flop": 1e9 * t, "bytes": 1e6, "copy_gb_s": 4000.0, "cublas_tflops": 800.0},
        )
        for t in (8, 1)
        for i, layer in enumerate(layers, 1)
    ]  # fmt: skip
    benchmark_json.write(path, {"gpu": "none"}, made)
    return path


@needs_pytest_benchmark
def test_benchmarks_have_the_names_of_the_tests():
    ids = {f"test_moe[{case.id}]" for case in test_speed.CASES}
    for s in moe_speed.SHAPES:
        for layer in moe_speed.LAYERS.values():
            assert benchmark_json.benchmark(s.name, 128, layer, [2e-6], {})["name"] in ids
    assert len(ids) == len(test_speed.CASES)


@needs_pytest_benchmark
def test_pytest_benchmark_reads_the_file(tmp_path):
    """As a run to compare with, its own test of the same name beside it."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest_benchmark", "compare", results(tmp_path / "0001_r.json")],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Qwen3, 8 tokens" in done.stdout and "test_moe[Qwen3-8-triton" in done.stdout


@needs_pytest_benchmark
def test_speedups_leave_out_our_own_variants(tmp_path):
    by = plots.read(results(tmp_path / "r.json"))["Qwen3"]
    assert plots.speedups(by) == {
        "triton, bf16": [(1, pytest.approx(3)), (8, pytest.approx(3))],
        "torch._grouped_mm, bf16": [(1, pytest.approx(4)), (8, pytest.approx(4))],
    }
    assert plots.points(by) == [(1e3, pytest.approx(1e15)), (8e3, pytest.approx(1e15))]


@needs_pytest_benchmark
def test_plots(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    path = results(tmp_path / "r.json")
    plots.main([str(path), "--to", str(tmp_path / "new")])
    assert capsys.readouterr().out.count("new") == 2
    for name in ("speedup.svg", "roofline.svg"):
        text = (tmp_path / "new" / name).read_text("utf-8")
        assert "Qwen3" in text
        assert "#000000" not in text and "#ffffff" not in text, "unreadable on a dark or light page"


@pytest.mark.parametrize("text", [None, "", "{}", '{"benchmarks": []}', "[]"])
def test_plots_of_no_results(tmp_path, text):
    path = tmp_path / "r.json"
    if text is not None:
        path.write_text(text, "utf-8")
    with pytest.raises(
        SystemExit, match=r"r\.json (is no file of pytest-benchmark|has no time of)"
    ):
        plots.main([str(path)])
