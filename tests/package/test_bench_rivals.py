"""The rivals of `nvfp4-moe bench`: layers with other libraries' GEMMs, and ours beside their figures."""

# SPDX-License-Identifier: Apache-2.0
import importlib
import inspect
import json
import operator
from dataclasses import replace
from functools import partial
from importlib.machinery import PathFinder
from types import SimpleNamespace

import fake_rivals
import pytest
import torch
from offline import compile_kernel

from nvfp4_moe.__main__ import main
from nvfp4_moe.bench import (
    bf16_weights,
    clock,
    humming_layer,
    moe,
    quack_layer,
    results,
    rival_figures,
    rival_layers,
    rival_steps,
)
from nvfp4_moe.bench.case import NotHere, WrongResult
from nvfp4_moe.bench.clock import Rates
from nvfp4_moe.bench.results import Measurement
from nvfp4_moe.bench.rival_layers import HUMMING, LIBRARIES, QUACK
from nvfp4_moe.exits import Exit
from nvfp4_moe.reference.activation import ActivationType

CPU = torch.device("cpu")
TINY = moe.Shape("tiny", 128, 64, 4, 2)
RATES = Rates(4000.0, 800.0, "bf16")
SERVED = {"tokens": 128, "swiglu": True, "local": True, "device": CPU}


@pytest.fixture
def rivals(monkeypatch):
    """Both libraries' fakes, served on the CPU under a clock that stands still."""
    fake_rivals.install(monkeypatch)

    def timed(call, calls, replays=9):
        call()
        return 2.0

    monkeypatch.setattr(humming_layer, "microseconds", timed)
    monkeypatch.setattr(quack_layer, "microseconds", timed)
    monkeypatch.setattr(rival_layers, "refusal", lambda name, **_: None)
    for cache in (moe._rival_weights, moe.experts_of, moe.bf16_weights_of):
        cache.cache_clear()
    yield
    moe._rival_weights.cache_clear()


@pytest.mark.parametrize("library", ["humming", "quack"])
def test_the_fakes_have_the_parameters_of_the_libraries(library):
    package = next(lib for lib in LIBRARIES.values() if lib.module == library)
    reason = f"needs {package.package}=={package.version}"
    pytest.importorskip(library, reason=reason)
    if rival_layers.versions()[package.package] != package.version:
        pytest.skip(reason)
    for module, names in fake_rivals.SIGNATURES.items():
        if module.startswith(f"{library}."):
            try:
                real = importlib.import_module(module)
            except ImportError as error:
                pytest.skip(f"{reason} with all that it imports: {error}")
            for name in names:
                fake = operator.attrgetter(name)(_namespace(fake_rivals.MODULES[module]))
                theirs = inspect.signature(operator.attrgetter(name)(real)).parameters
                assert list(inspect.signature(fake).parameters) == list(theirs), name


def _namespace(contents):
    return type("Namespace", (), {name: staticmethod(value) for name, value in contents.items()})


@pytest.mark.interpreter
@pytest.mark.parametrize("size", [8, 48])
@pytest.mark.parametrize("tokens", [1, 60])
def test_sorted_slots(tokens, size):
    """Every slot is in one block of its expert, and fillers end the expert's last block."""
    logits = torch.randn(tokens, 5)
    logits[:, 3] = -9  # the expert has no slot
    s = rival_steps.sort(logits, 2)
    ids = logits.topk(2).indices.flatten()
    groups, blocks = rival_steps.grouped(s), rival_steps.blocked(s, size)
    by_expert = [(ids == e).nonzero().flatten() for e in range(5)]
    assert torch.equal(groups.token, torch.cat(by_expert).int() // 2)
    assert groups.first.tolist() == [0, *ids.bincount(minlength=5).cumsum(0).tolist()]
    used = sum(-(-len(slots) // size) for slots in by_expert)
    assert blocks.used.tolist() == [used * size] and used <= len(blocks.expert)
    assert len(blocks.slots) == len(blocks.expert) * size
    found = blocks.slots.view(-1, size)[:used]
    assert blocks.expert[:used].tolist() == sorted(blocks.expert[:used].tolist())
    for e, slots in enumerate(by_expert):
        mine = found[blocks.expert[:used] == e].flatten()
        fillers = torch.full((len(mine) - len(slots),), tokens * 2)
        assert torch.equal(mine.long(), torch.cat((slots, fillers)))


def wanted(name, x, logits):
    """[T, H] fp32 or bf16 of the reference, or of the bf16 layer in fp32."""
    if name == QUACK:
        return bf16_weights.plain(x, logits, moe.bf16_weights_of(TINY, CPU), 2)
    experts, routing = moe.experts_of(TINY, CPU), (logits, TINY.routing)
    return moe.fused_moe(x, experts, routing, backend="reference", activation="bf16")


def assert_close(got, want):
    for row, wanted_row in zip(got.double(), want.double(), strict=True):
        assert (row - wanted_row).norm() < 1e-2 * wanted_row.norm()


@pytest.mark.interpreter
@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("name", [HUMMING, QUACK])
def test_a_layer(rivals, name, tokens):
    """A whole call agrees with fp32 in every row, and the case is checked before it is measured."""
    x, logits = moe.inputs(TINY, tokens, CPU)
    got = moe._rival(replace(TINY, biased=True), name, x, logits)()  # biases are left out
    assert_close(got, wanted(name, x, logits))
    if name == HUMMING:
        assert len(fake_rivals.HummingKernel.prepared) == 4  # both GEMMs of both forms


@pytest.mark.interpreter
@pytest.mark.parametrize("form", humming_layer.FORMS)
def test_both_forms_of_humming(rivals, form):
    """The forms give the same rows, and `tune` takes the one that is faster."""
    x, logits = moe.inputs(TINY, 20, CPU)
    layer = humming_layer.prepare_layer(*moe.random_codes(TINY, torch.Generator().manual_seed(0)))
    plan = humming_layer.plan(layer, form, 40)
    assert plan.first["block_shape"][0] == fake_rivals.BLOCKS[1]
    humming_layer.compile_kernels(layer, [plan])
    got = humming_layer.run(x, logits, layer, 2, plan)
    assert_close(got, wanted(HUMMING, x, logits))


@pytest.mark.interpreter
def test_the_faster_form_and_the_fastest_tiles_are_taken(rivals, monkeypatch):
    x, logits = moe.inputs(TINY, 20, CPU)
    layer = humming_layer.prepare_layer(*moe.random_codes(TINY, torch.Generator().manual_seed(0)))
    for times, form in (([3.0, 2.0], "grouped_contiguous"), ([2.0, 3.0], "indexed")):
        clocked = iter(times)
        monkeypatch.setattr(humming_layer, "microseconds", lambda *_, **__: next(clocked))  # noqa: B023
        assert humming_layer.tune(x, logits, layer, 2).form == form
    w = moe.random_bf16_weights(TINY, CPU)
    order = [*range(9, 0, -1), *range(1, 13)]
    clocked = iter(map(float, order))
    monkeypatch.setattr(quack_layer, "microseconds", lambda *_, **__: next(clocked))
    tiles = quack_layer.tune(x, logits, quack_layer.prepare_layer(w.w13, w.w2), 2)
    assert tiles == (quack_layer.FIRST[-1], quack_layer.SECOND[0])


@pytest.mark.interpreter
@pytest.mark.parametrize("name", [HUMMING, QUACK])
def test_a_wrong_rival_is_not_measured(rivals, name, monkeypatch):
    wrong = {
        HUMMING: (humming_layer, lambda *a: right(*a) * 1.02),
        QUACK: (quack_layer, lambda *a: right(*a) * 1.02),
    }
    module, scaled = wrong[name]
    right = module.run
    monkeypatch.setattr(module, "run", scaled)
    x, logits = moe.inputs(TINY, 3, CPU)
    with pytest.raises(WrongResult, match=r"tiny: .* rows of norm .* are wrong by"):
        moe._rival(TINY, name, x, logits)


def test_an_error_of_a_library_is_the_reason(rivals, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("locks too small\nmore")

    monkeypatch.setattr(fake_rivals.HummingMethod, "prepare_layer_meta", fail)
    x, logits = moe.inputs(TINY, 3, CPU)
    with pytest.raises(NotHere, match=r"^humming-kernels failed: AssertionError: locks too small$"):
        moe._rival(TINY, HUMMING, x, logits)
    for error in (torch.OutOfMemoryError("9 GiB"), WrongResult("far"), NotHere("no")):
        with pytest.raises(type(error)), rival_layers.running(HUMMING):
            raise error


@pytest.mark.parametrize("name", LIBRARIES)
def test_why_a_rival_is_not_measured(name, monkeypatch):
    library = LIBRARIES[name]
    monkeypatch.setattr(rival_layers, "find_spec", lambda module: None)
    told = f"not installed: pip install {library.package}=={library.version}"
    assert rival_layers.refusal(name, **SERVED) == told
    installed = SimpleNamespace(origin="/usr/lib/python3/dist-packages/a/__init__.py")
    monkeypatch.setattr(rival_layers, "find_spec", lambda module: installed)
    for changed, reason in (
        ({"swiglu": False}, "layers of SwiGLU alone"),
        ({"local": False}, "all experts are local"),
        ({}, "needs a GPU, and the tensors are on the cpu"),
    ):
        assert reason in (rival_layers.refusal(name, **SERVED | changed) or "")
    few = rival_layers.refusal(name, **SERVED | {"tokens": 127})
    assert few is not None and ("from 128 tokens" in few) == (name == QUACK)
    on_gpu = SERVED | {"device": torch.device("cuda")}
    for capability, served in (((7, 5), ()), ((8, 0), (HUMMING,)), ((9, 0), (HUMMING, QUACK))):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert (rival_layers.refusal(name, **on_gpu) is None) == (name in served)


def test_quack_needs_its_compiler_where_packages_are_installed(monkeypatch, tmp_path):
    """`pip install --target FOLDER` puts it elsewhere, and QuACK raises a TypeError then."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    on_gpu = SERVED | {"device": torch.device("cuda")}
    for folder in ("elsewhere", "site-packages", "lib/python3/dist-packages/more"):
        for module in ("quack", "humming", "cutlass"):
            package = tmp_path / folder / module
            package.mkdir(parents=True)
            (package / "__init__.py").touch()
        found = partial(PathFinder.find_spec, path=[str(tmp_path / folder)])
        monkeypatch.setattr(rival_layers, "find_spec", found)
        reason = rival_layers.refusal(QUACK, **on_gpu)
        if folder == "elsewhere":
            assert reason == (
                "cutlass must be below a folder named site-packages or dist-packages; "
                f"it is {tmp_path / 'elsewhere' / 'cutlass'}"
            )
        else:
            assert reason is None
        assert rival_layers.refusal(HUMMING, **on_gpu) is None


def test_the_command_says_what_is_not_installed(capsys, monkeypatch):
    monkeypatch.setattr(rival_layers, "find_spec", lambda module: None)
    monkeypatch.setattr(clock, "rates", lambda device: RATES)
    words = ["bench", "--only", "moe", "--shape", "small", "--tokens", "1", "--device", "cpu"]
    assert main([*words, "--backend", HUMMING, "--backend", QUACK, "--json"]) == Exit.NOT_RUN
    refused = json.loads(capsys.readouterr().out)["not_measured"]
    reasons = {cell["backend"]: cell["reason"] for cell in refused}
    assert reasons[HUMMING] == "not installed: pip install humming-kernels==0.1.19"
    assert reasons[QUACK] == "not installed: pip install quack-kernels==0.6.5"


def cell(backend, us, tokens=1, shape="Qwen3-30B-A3B", device="NVIDIA H200", operation="moe"):
    stats = results.statistics_of([us * 1e-6] * 3)
    return Measurement(operation, "tokens", shape, tokens, backend, stats, 1e9, 1e6, RATES, device)


def compared(*measured):
    return {c.rival.split()[0]: c for c in rival_figures.compare(measured)}


def test_ours_over_the_smaller_of_two_times():
    # Of the day: humming 28.6 (indexed) and 36.3, Marlin 25.9 and 32.7.
    both = compared(cell("triton", 21), cell("triton, W4A16", 20), cell(HUMMING, 30))
    assert set(both) == {"humming", "Marlin"}
    assert both["humming"].now == pytest.approx(30e-6)
    assert both["humming"].dated == pytest.approx(28.6e-6)
    assert both["humming"].ours["triton"] == pytest.approx(21 / 28.6)
    assert both["Marlin"].now is None
    assert both["Marlin"].ours["triton, W4A16"] == pytest.approx(20 / 25.9)
    faster = compared(cell("triton", 21), cell(HUMMING, 14))["humming"]
    assert faster.ours == {"triton": pytest.approx(1.5)}
    (best,) = rival_figures.fastest(list(compared(cell("triton", 21), cell(HUMMING, 30)).values()))
    assert best.rival.startswith("Marlin")


def test_figures_are_of_their_gpu_and_cells():
    assert compared(cell("triton", 21, device="NVIDIA H100 80GB HBM3")) == {}
    elsewhere = compared(cell("triton", 21, device="NVIDIA B200"), cell(HUMMING, 7))
    assert elsewhere["humming"].ours["triton"] == pytest.approx(3) and len(elsewhere) == 1
    assert compared(cell("triton", 21, tokens=2)) == {}
    assert compared(cell("triton", 21, shape="Nemotron-3-Super latent")) == {}
    assert compared(cell("triton", 21, operation="dense")) == {}
    assert compared(cell(HUMMING, 21)) == {}
    large = compared(cell("triton", 4318, tokens=4096, shape="DeepSeek-V3 rank"))
    assert set(large) == {"humming", "QuACK", "Marlin", "DeepGEMM"}
    assert large["humming"].dated == pytest.approx(4490e-6)
    for rival in rival_figures.RIVALS:
        for form in rival.dated:
            assert all(len(us) == len(rival_figures._TOKENS) for us in form.values())
            assert set(form) <= {s.name for s in moe.SHAPES}
        assert rival.backend in (None, *LIBRARIES)


def test_the_command_prints_the_comparison(capsys, tmp_path):
    path = tmp_path / "r.json"
    results.write(path, [cell("triton", 21), cell("triton, W4A16", 27), cell(HUMMING, 30)])
    assert main(["bench", "--load", str(path), "--json", str(tmp_path / "found.json")]) == Exit.DONE
    lines = capsys.readouterr().out.splitlines()
    heading = "Qwen3-30B-A3B: ours over the smaller of a rival's times, now and 2026-11-29"
    table = lines[lines.index(heading) + 1 :]
    assert table[0].split() == [
        "tokens",
        "rival",
        "now",
        "2026-11-29",
        "triton",
        "triton,",
        "W4A16",
    ]
    assert table[1].split() == [
        "1", "humming", "0.1.19,", "W4A16", "30", "us", "28.6", "us", "0.734", "0.944"
    ]  # fmt: skip
    assert "triton: a rival is faster in 0 of 1 cells" in lines
    assert "triton, W4A16: a rival is faster in 1 of 1 cells: tokens 1 (1.04)" in lines
    (first, second) = json.loads((tmp_path / "found.json").read_text("utf-8"))["rivals"]
    assert first["ours"]["triton"] == pytest.approx(21 / 28.6) and second["now"] is None


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_layer_that_a_rival_does_not_serve(name):
    s = replace(TINY, activation=ActivationType.Relu2)
    with pytest.raises(NotHere, match=r"not installed|SwiGLU alone"):
        moe._rival(s, name, *moe.inputs(s, 128, CPU))


@pytest.mark.compile
def test_the_steps_compile():
    """Blocks of every size by 8 rows, as humming has them, and a gather of 16 bytes a thread."""
    index = {"slots": "i32", "E": "i32", "expanded_ptr": "*i32", "end_ptr": "*i32"}
    lists = {"slots_ptr": "*i32", "expert_ptr": "*i32", "used_ptr": "*i32"}
    for size in (8, 40, 176):
        constants = {"SIZE": size, "CHUNK": 1024, "BINS": 128}
        compile_kernel(rival_steps.blocks_kernel, 90, index | lists, constants, [], num_warps=4)
    groups = index | {"token_ptr": "*i32", "first_ptr": "*i32"}
    constants = {"K": 8, "CHUNK": 1024, "BINS": 256}
    compile_kernel(rival_steps.groups_kernel, 90, groups, constants, [], num_warps=4)
    rows = {"x_ptr": "*bf16", "token_ptr": "*i32", "out_ptr": "*bf16", "H": "i32"}
    aligned = ["x_ptr", "out_ptr", "H"]
    kernel = compile_kernel(
        rival_steps.gather_kernel, 90, rows, {"COLUMNS": 1024}, aligned, num_warps=4
    )
    assert "ld.global.v4.b32" in kernel.asm["ptx"] and "st.global.v4.b32" in kernel.asm["ptx"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", LIBRARIES)
def test_a_rival_on_a_gpu(name, capsys):
    """The library itself, in a small layer: `bench` compares it with the reference before."""
    reason = rival_layers.refusal(name, **SERVED | {"device": torch.device("cuda")})
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    words = ["bench", "--only", "moe", "--shape", "small", "--tokens", "128", "--backend", name]
    assert main([*words, "--backend", "triton", "--json"]) == Exit.DONE
    found = json.loads(capsys.readouterr().out)
    assert {c["backend"] for c in found["cells"]} == {name, "triton"}
    assert [c["rival"].lower().split()[0] for c in found["rivals"]] == [LIBRARIES[name].module]
