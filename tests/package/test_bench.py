"""The speed tables' own code, as far as it goes without a GPU: the layers, the cells, the table."""

# SPDX-License-Identifier: Apache-2.0
import json
from dataclasses import replace
from importlib.util import find_spec

import fake_flashinfer
import host_time
import moe_profile
import moe_speed
import power
import pretend_gpu
import pytest
import reload_speed
import torch
import training_speed
from offline import compile_kernel, resources

from nvfp4_moe import mm_fp4
from nvfp4_moe.bench import baseline_layers, bf16_layer, bf16_weights, clock, dense, moe
from nvfp4_moe.bench.bf16_layer import Tiles, candidates
from nvfp4_moe.bench.bf16_weights import Weights
from nvfp4_moe.bench.case import NotHere, WrongResult
from nvfp4_moe.bench.moe import Shape
from nvfp4_moe.reference.activation import ActivationType

CPU = torch.device("cpu")
SMALL = (Tiles(16, 64, 64, 2, 1, 4), Tiles(16, 128, 64, 1, 1, 4))
SHAPES = {
    "Swiglu": Shape("Swiglu", 96, 64, 4, 2),
    "Relu2": Shape("Relu2", 128, 80, 4, 3, ActivationType.Relu2),
    "biased": Shape("biased", 96, 112, 4, 2, biased=True),
    "EP": Shape("EP", 64, 64, 2, 2, ranks=2),
}


def test_readings_of_clock_and_power():
    """The first three readings do not count, and a reading that is no number is named."""
    lines = ["1980, 120.00"] * 3 + ["1600, 690.5", "1700, 700.5", "1650, 695.25"]
    found = power.medians("".join(f"{line}\n" for line in lines) + "1980,")
    assert found == {"sm_mhz": 1650, "watts": 695.25, "readings": 3}
    for printed in ("", "1980, 120.00\n" * 3, "1980, [N/A]\n" * 9, "No devices were found\n"):
        with pytest.raises(SystemExit, match="no four readings of clock and power, but "):
            power.medians(printed)


def made(s: Shape, tokens: int, limit: float | None = None):
    """Hidden states, logits and weights, so large that activations matter, and limits."""
    w = moe.random_bf16_weights(s, CPU)
    w = replace(w, w13=w.w13 * 8, w2=w.w2 * 8, limit=w.limit if limit is None else limit)
    return *moe.inputs(s, tokens, CPU), w


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    error = (got.double() - want.double()).norm() / want.double().norm()
    assert error < 1e-2, error


@pytest.mark.skipif(
    find_spec("flashinfer") is None or find_spec("cutlass") is None,
    reason="needs flashinfer-python and nvidia-cutlass-dsl",
)
@pytest.mark.parametrize("name", baseline_layers.FORMATS)
def test_baselines(name):
    """A whole call, and its check, through FlashInfer's Python."""
    s = Shape("EP", 256, 128, 4, 2, ranks=2)
    (x, logits), w = moe.inputs(s, 9, CPU), moe.random_bf16_weights(s, CPU)
    with fake_flashinfer.installed() as fake:
        call = baseline_layers.prepare_call(name, w, x, logits, s.routing)
        assert torch.equal(call(), call())
    assert [ran.backend for ran in fake.ran] == [name] * 3
    biased = moe.random_bf16_weights(replace(s, biased=True), CPU)
    for weights, reason in ((biased, "without biases"), (w, "on the CPU")):
        with pytest.raises(NotHere, match=reason):
            baseline_layers.prepare_call(name, weights, x, logits, s.routing)


@pytest.mark.parametrize("name", SHAPES)
def test_grouped_mm_layer(name):
    s = SHAPES[name]
    x, logits, w = made(s, 40, limit=0.7 if name == "biased" else None)
    slots_here = moe.experts_of_local_slots(s, logits).numel()
    assert slots_here == 80 if name in ("Swiglu", "biased") else slots_here > 20
    got = moe.grouped_mm_layer(x, logits, w, s.top_k, slots_here)
    assert_close(got, bf16_weights.plain(x, logits, w, s.top_k))


@pytest.mark.interpreter
@pytest.mark.parametrize("tokens", [1, 40])  # 40: more than a tile an expert
@pytest.mark.parametrize("name", SHAPES)
def test_layer(name, tokens):
    s = SHAPES[name]
    x, logits, w = made(s, tokens, limit=0.7 if name == "biased" else None)
    got = bf16_layer.layer(x, logits, w, s.top_k, SMALL)
    assert_close(got, bf16_weights.plain(x, logits, w, s.top_k))


@pytest.mark.interpreter
def test_tune_takes_the_fastest_pair_of_one_height(monkeypatch):
    s = SHAPES["Swiglu"]
    x, logits, w = made(s, 1)
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
    monkeypatch.setattr(moe_speed, "microseconds", timed)
    monkeypatch.setattr(bf16_layer, "candidates", lambda each: list(SMALL))
    monkeypatch.setattr(moe_speed, "peak_bytes", lambda call: call().nbytes)
    monkeypatch.setattr(moe_speed, "copy_rate", lambda _: 1000.0)
    monkeypatch.setattr(moe_speed, "matmul_rate", lambda _: 1.0)
    monkeypatch.setattr(moe_speed, "DEVICE", CPU)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")


@pytest.mark.interpreter
def test_a_whole_run(stopped_clock, monkeypatch, capsys, tmp_path):
    shapes = (Shape("all", 128, 64, 2, 2), Shape("EP", 128, 64, 2, 2, ranks=8))
    made_for = []

    def weights(s, device):
        made_for.append(s.name)
        return moe.random_bf16_weights(s, device)

    monkeypatch.setattr(moe_speed, "SHAPES", shapes)
    monkeypatch.setattr(moe_speed, "TUNED_ONCE", {"all": (7,)})
    monkeypatch.setattr(moe_speed, "random_bf16_weights", weights)
    path = tmp_path / "cells.json"
    monkeypatch.setattr("sys.argv", ["moe_speed.py", "--tokens", "1", "--json", str(path)])
    moe_speed.main()
    assert made_for == ["all"]
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
    experts = moe.random_experts(s, CPU)
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


def test_a_wrong_row_is_found():
    s = SHAPES["Relu2"]
    x, logits, w = made(s, 2)
    right = bf16_weights.plain(x, logits, w, s.top_k)
    moe.check_bf16(s, right, x, logits, w)
    for wrong in (right * 1.02, right * float("nan")):
        with pytest.raises(WrongResult, match="Relu2"):
            moe.check_bf16(s, wrong, x, logits, w)


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
    "program,arguments,message",
    [
        (moe_speed, [], "no CUDA device"),
        (moe_speed, ["--shape", "Mixtral"], "invalid choice: 'Mixtral'"),
        (moe_speed, ["--tokens", "0"], "--tokens: it is '0'; it must be an integer from 1"),
        (training_speed, ["--tokens", "-1"], "--tokens: it is '-1'; it must be an integer from 1"),
    ],
)
def test_what_ends_a_script(program, arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["program.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        program.main()
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
        "out_ptr": "*bf16", "expanded_ptr": "*i32", "tile_ptr": "*i32",
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


@pytest.mark.parametrize("m", [3, 130])
def test_dense_products_are_checked(m):
    """The cases' inputs have exact sums, and another weight is seen."""
    a, b = dense.operand(m, 192, CPU), dense.operand(136, 192, CPU)
    alpha = torch.rand(m) + 0.5

    def right(a, a_scales, b, b_scales, alpha):
        """The exact product, whose one rounding is the output's."""
        return mm_fp4(a, b.T, a_scales, b_scales.T, alpha, backend="reference")

    def wrong(a, a_scales, b, b_scales, alpha):
        return right(a, a_scales, b.roll(1, 0), b_scales, alpha)

    assert dense.agrees(right, *a, *b, alpha) and not dense.agrees(wrong, *a, *b, alpha)


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
    monkeypatch.setattr(host_time, "DEVICE", CPU)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(host_time, "ROUNDS", 3)
    small = replace(moe.SHAPES[0], hidden=256, intermediate=128, experts=8)
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


def test_kernels_of_equal_calls_in_their_order():
    events = [
        *(("second", at + 3.0, at + 3.0 + took) for at, took in ((0, 5.0), (10, 6.0), (20, 9.0))),
        *(("first", at + 0.0, at + 2.0) for at in (20, 0, 10)),
    ]
    first, second = moe_profile.in_order(events, 3)
    assert first == moe_profile.Kernel("first", 2.0, None)
    assert second == moe_profile.Kernel("second", 6.0, 1.0)


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ([], "0 launches are not those of 2 equal calls"),
        ([("a", 0.0, 1.0)] * 3, "3 launches are not those of 2 equal calls"),
        ([("a", 0.0, 1.0), ("b", 2.0, 3.0)], "launch 0 has several names"),
    ],
)
def test_launches_of_unequal_calls(events, message):
    with pytest.raises(ValueError, match=message):
        moe_profile.in_order(events, 2)


def test_floors_of_both_gemms():
    rates = clock.Rates(4000.0, 800.0, "bf16")
    s = moe.Shape("a", 1024, 512, 4, 2)
    few, many = torch.tensor([0, 3]), torch.arange(4).repeat(10_000)
    bytes_of = 1024 * 1024 * 2 * 9 / 16  # two experts' first weights
    assert moe_profile.gemm_floors(s, few, rates)[0] == pytest.approx(bytes_of / 4000e9 * 1e6)
    flop = 2 * 512 * 1024 * 40_000
    assert moe_profile.gemm_floors(s, many, rates)[1] == pytest.approx(flop / 800e12 * 1e6)
