"""The fake FlashInfer: without a fault it agrees with the reference to the bit, with one it does not.

Down to the compiled modules the installed flashinfer-python runs, so that the adapters, the sweep of
tactics and the fake FlashInfer break together with it.
"""

# SPDX-License-Identifier: Apache-2.0
import functools
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import fake_flashinfer
import pytest
import torch
from assertions import assert_bitwise, assert_inside, assert_quantized
from fake_flashinfer import CAPABILITY, FAULTS, compiled, layers
from fake_flashinfer import quantizers as fake_quantizers
from fake_flashinfer.cases import CASES, EXACT_MATH
from fake_flashinfer.faults import CUTE_DSL, CUTLASS, TRTLLM
from installations import pretend

import nvfp4_moe
from nvfp4_moe.cases import inputs
from nvfp4_moe.cases.quantize import Case, global_scale
from nvfp4_moe.differential import accumulation, flashinfer_tactics, quantizers
from nvfp4_moe.kernels import device as capability
from nvfp4_moe.kernels import environment
from nvfp4_moe.kernels.flashinfer import version
from nvfp4_moe.kernels.flashinfer.description import Argument
from nvfp4_moe.kernels.moe.backends import FUSED_MOE
from nvfp4_moe.kernels.quantize import api as quantize_api
from nvfp4_moe.reference.moe import layer as reference
from nvfp4_moe.reference.recipe import NVFP44Over6Config, Recipe, SfLayout

flashinfer = pytest.importorskip("flashinfer", reason="needs flashinfer-python")
pytest.importorskip("cutlass", reason="needs nvidia-cutlass-dsl")


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in environment.VARIABLES:
        monkeypatch.delenv(name, raising=False)


# Layers

RUNS = [(name, backend) for name, c in CASES.items() for backend in c.backends]


def outputs(case, backend):
    """Return the outputs of every configuration, by name."""
    request = case.request()
    assert request.capability == CAPABILITY
    found = {}
    for c in flashinfer_tactics.configurations(backend, request):
        with c.forced():
            found[c.name] = FUSED_MOE.serve(request, backend)[0]
    return found


@pytest.mark.parametrize("name,backend", RUNS)
def test_without_a_fault(monkeypatch, name, backend):
    layer = CASES[name]
    for variable, value in layer.environment.items():
        monkeypatch.setenv(variable, value)
    case = layer.make(backend)
    with fake_flashinfer.installed() as fake:
        found = outputs(case, backend)
    want = case.reference()
    assert_bitwise(found["default"], want, "by default")  # which adds as the reference does
    interval = None if backend == CUTLASS else case.allowed()
    for tactic, got in found.items():
        if interval is not None:
            assert_inside(got, interval, tactic)
        if case.exact:
            assert_bitwise(got, want, tactic)
        error = (got.double() - want.double()).norm() / want.double().norm()
        assert error < 2**-7, f"{tactic}: {error}"
    ran = [r.tactic for r in fake.ran if r.backend == backend]
    expected = list(found) if backend != CUTE_DSL else [list(found)[1], *list(found)[1:]]
    assert ran == [expected[0], *expected]  # once to be asked


@pytest.mark.parametrize("backend", [TRTLLM, CUTE_DSL, CUTLASS])
def test_every_tactic_is_advertised(backend):
    layer = CASES["static" if backend == CUTLASS else "gated"]
    with fake_flashinfer.installed():
        found = list(outputs(layer.make(backend), backend))
    first, second = layers.CUTLASS_TACTICS
    assert (
        found[1:]
        == {
            TRTLLM: [str(tactic) for tactic in layers.TRTLLM_TACTICS],
            CUTLASS: [f"gemm1 {i}" for i in range(first)]
            + [f"gemm2 {i}" for i in range(first, first + second - 1)],  # one does not fit
            CUTE_DSL: [
                json.dumps(
                    [128 * m, [[128 * m, n1], [m, 1], False], [[128 * m, n2], [m, c], False]]
                )
                for m in (1, 2)
                for n1 in (128, 256)
                for n2 in (128, 256)
                for c in (1, 2)
            ],
        }[backend]
    )


def test_tactics_add_in_different_ways():
    with fake_flashinfer.installed():
        request = CASES["gated"].make(TRTLLM).request()
        found = set()
        for c in flashinfer_tactics.configurations(TRTLLM, request):
            with c.forced():
                found.add(str(accumulation.measure(TRTLLM, "cpu")))
    assert len(found) == 3  # to nearest, and in steps of a tensor core with 1 and with 2 more bits


def test_rows_that_are_not_finalized():
    case = CASES["second rank"].make(TRTLLM)
    request = replace(case.request(), do_finalize=False, capability=CAPABILITY)
    want = reference.fused_moe(
        case.activations, case.experts, case.ids, case.weights, local_expert_offset=4
    ).rows
    with fake_flashinfer.installed():
        for c in flashinfer_tactics.configurations(TRTLLM, request):
            with c.forced():
                rows, weights, permuted = FUSED_MOE.serve(request, TRTLLM)
            tile = 8 if c.name == "default" else json.loads(c.name)[0]
            here = (case.ids >= 4) & (case.ids < 8)
            permuted = permuted.view(here.shape)
            assert torch.equal(permuted >= 0, here) and rows.shape[0] % tile == 0
            assert permuted[here].unique().numel() == here.sum()
            error = (rows[permuted[here].long()].double() - want[here].double()).norm()
            assert error < 2**-7 * want.double().norm()
            assert torch.equal(weights, case.weights)


# Quantizers

QUANTIZER_BACKENDS = ("flashinfer:cuda", "flashinfer:cute-dsl", "flashinfer:cake")
MODES = {
    "fast": ({}, Recipe()),
    "exact": (EXACT_MATH, Recipe("exact")),
    "4over6": ({}, Recipe("fast", NVFP44Over6Config(256, "MSE"))),
    "exact 4over6": (EXACT_MATH, Recipe("exact", NVFP44Over6Config())),
}


def quantizer_jobs(backend, mode):
    """(variables, x, case) that the backend serves in this mode."""
    variables, recipe = MODES[mode]
    recipe = replace(recipe, build="cuda" if backend == "flashinfer:cuda" else "cute-dsl")
    for kind in ("heavy", "grid", "edge"):
        x = inputs.synthetic(kind, 33, 80)
        for layout in SfLayout:
            for how in ("per-token", "global-scale"):
                scale = global_scale(x, recipe) if how == "global-scale" else None
                case = Case(how, recipe, layout, scale)
                if backend != "flashinfer:cake" or (
                    mode == "fast" and how == "per-token" and layout == SfLayout.layout_128x4
                ):
                    yield variables, x, case


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", QUANTIZER_BACKENDS)
def test_quantizers_without_a_fault(monkeypatch, backend, mode):
    for variables, x, case in quantizer_jobs(backend, mode):
        for variable, value in variables.items():
            monkeypatch.setenv(variable, value)
        with fake_flashinfer.installed():
            assert quantizers.refusal(backend, x, case) is None
            got = quantizers.run(backend, x, case)
        assert_quantized(got, quantizers.run("reference", x, case), f"{case}", case.layout)


def test_quantizers_read_the_environment(monkeypatch):
    x = inputs.synthetic("heavy", 33, 80)
    monkeypatch.setenv("TRTLLM_DISABLE_FP4_QUANT_FAST_MATH", "1")  # which CuTe-DSL does not know
    monkeypatch.setenv("FLASHINFER_NVFP4_4OVER6", "1")
    monkeypatch.setenv("FLASHINFER_NVFP4_4OVER6_ERR_MODE", "MSE")
    monkeypatch.setenv("FLASHINFER_NVFP4_4OVER6_E4M3_USE_256", "1")
    for backend, math in (("cuda", "exact"), ("cute-dsl", "fast")):
        recipe = Recipe(math, NVFP44Over6Config(256, "MSE"), backend)
        with fake_flashinfer.installed():
            got = nvfp4_moe.nvfp4_quantize(x, 1 / 1536, backend=backend, per_token_activation=True)
        want = quantizers.run("reference", x, Case("per-token", recipe, SfLayout.layout_128x4))
        assert_quantized(got, want, backend, SfLayout.layout_128x4)


@pytest.mark.parametrize("per_token", [True, False])
def test_shuffled_rows_and_an_index(per_token):
    x, scale = inputs.synthetic("heavy", 128, 64), 1 / 2688 if per_token else 20.0
    changes = [{"do_shuffle": True}]
    if per_token:
        changes.append({"expanded_idx_to_permuted_idx": torch.arange(127, -1, -1).int()})
    for change in changes:
        given = {"per_token_activation": per_token, "nvfp4_4over6": None} | change
        with fake_flashinfer.installed():
            got = nvfp4_moe.nvfp4_quantize(x, scale, backend="cuda", **given)
        want = nvfp4_moe.nvfp4_quantize(x, scale, backend="reference", **given)
        for a, b, what in zip(got, want, ("codes", "block scales", "token"), strict=False):
            assert_bitwise(a, b, what)


# Faults

SEEN = {
    "tactic 192 drops the last tile of an expert": ("gated", "static"),
    "tactic 64 raises": ("gated",),
    "tactic 5 of cutlass drops the last tile of an expert": ("static",),
    "intermediate kept in fp32": ("gated",),
    "base scale 1 of the intermediate": ("gated",),
    "4over6 of the intermediate ignored": ("4over6",),
    "per-token scale of another row": ("gated",),
    "gate and up exchanged": ("gated",),
    "finalize in bf16": ("second rank", "static, second rank"),
    "fused finalize": ("gated", "static"),
    "local offset ignored": ("second rank", "static, second rank"),
    "first GEMM of cutlass not rounded": ("static",),
    "ties to the larger index": ("logits with ties",),
    "the bias in the weights": ("logits with bias",),
    "last bit of every second call": ("gated", "static"),
}
"""In which cases each fault of a layer must show."""
UNSEEN = {
    "4over6 of the intermediate ignored": "gated",
    "gate and up exchanged": "not gated",
    "local offset ignored": "gated",
    "ties to the larger index": "second rank",
    "the bias in the weights": "logits",
}
"""And one in which it must not."""
LAYER_FAULTS = [name for name, fault in FAULTS.items() if fault.of == "layer"]


def served(fault, name, backend, every=False):
    """Outputs by configuration, None where one raised: by default, twice, and of one tactic or all."""
    found = {}
    with fake_flashinfer.installed(fault):
        request = CASES[name].make(backend).request()
        default, *others = flashinfer_tactics.configurations(backend, request)
        found["again"] = FUSED_MOE.serve(request, backend)[0]
        for c in (default, *(others if every else others[-1:])):
            try:
                with c.forced():
                    found[c.name] = FUSED_MOE.serve(request, backend)[0]
            except RuntimeError as error:
                assert "running GEMM" in str(error)
                found[c.name] = None
    return found


correct_results = functools.cache(functools.partial(served, None))


@pytest.fixture
def environment_of(monkeypatch):
    def put(name):
        for variable, value in CASES[name].environment.items():
            monkeypatch.setenv(variable, value)

    return put


def different(found, wanted):
    return {t for t, got in found.items() if got is None or not torch.equal(got, wanted[t])}


@pytest.mark.parametrize(
    "fault,name,backend",
    [
        (fault, name, backend)
        for fault in LAYER_FAULTS
        for name in SEEN[fault]
        for backend in FAULTS[fault].backends
        if backend in CASES[name].backends
    ],
)
def test_a_fault_of_a_layer_shows(environment_of, fault, name, backend):
    environment_of(name)
    only = FAULTS[fault].tactics
    found, right = (
        served(fault, name, backend, bool(only)),
        correct_results(name, backend, bool(only)),
    )
    if fault == "last bit of every second call":
        assert not torch.equal(found["default"], found["again"])
        assert (found["default"] != found["again"]).sum() == 1
    else:
        assert different(found, right) == set(only or found)


@pytest.mark.parametrize("fault", UNSEEN)
def test_a_fault_does_not_show_elsewhere(fault):
    assert not different(
        served(fault, UNSEEN[fault], TRTLLM), correct_results(UNSEEN[fault], TRTLLM)
    )


def test_every_lie_of_a_backend_has_a_case():
    assert set(SEEN) == set(LAYER_FAULTS) and len(FAULTS) >= 12
    for fault, names in SEEN.items():
        assert set(FAULTS[fault].backends) <= {b for name in names for b in CASES[name].backends}, (
            fault
        )


QUANTIZER_SEEN = {
    "ties of a code round away from zero": lambda case: True,
    "block scale of the next row in 128x4": lambda case: case.layout == SfLayout.layout_128x4,
    "padding not zeroed": lambda case: case.layout != SfLayout.layout_linear,
    "exact math ignored": lambda case: case.recipe.math == "exact",
    "4over6 keeps the larger error": lambda case: case.recipe.four_over_six is not None,
    "per-token scale of one row off by an ulp": lambda case: case.mode == "per-token",
}


@pytest.mark.parametrize(
    "fault", [name for name, fault in FAULTS.items() if fault.of == "quantizer"]
)
def test_a_fault_of_a_quantizer_shows_where_it_says(monkeypatch, fault):
    expected, seen = QUANTIZER_SEEN[fault], set()
    for backend in FAULTS[fault].backends:
        for mode in MODES:
            for variables, x, case in quantizer_jobs(backend, mode):
                for variable in EXACT_MATH:
                    monkeypatch.delenv(variable, raising=False)
                for variable, value in variables.items():
                    monkeypatch.setenv(variable, value)
                with fake_flashinfer.installed(fault):
                    got = quantizers.run(backend, x, case)
                try:
                    assert_quantized(got, quantizers.run("reference", x, case), fault, case.layout)
                except AssertionError:
                    seen.add((backend, case))
                    assert expected(case), f"{backend} {case}"
    assert {b for b, _ in seen} == set(FAULTS[fault].backends)


# The pretence


def test_cpu_tensors_are_a_blackwells():
    x = torch.ones(2, 64, dtype=torch.bfloat16)
    assert capability.capability_of(x) is None
    with fake_flashinfer.installed():
        assert capability.capability_of(x) == CAPABILITY
        assert capability.capability_of(x.to("meta")) is None
        explained = quantize_api.explain(x, 1 / 2688, per_token_activation=True)
        assert explained.backend == "flashinfer:cuda"
        assert "Triton runs on a GPU" in explained.reason("triton")
        case = CASES["gated"].make(TRTLLM)
        reason = FUSED_MOE.refusal("triton", case.request())
        assert reason.startswith("hidden_states are on the cpu; Triton runs on a GPU")
        with pytest.raises(nvfp4_moe.UnsupportedError, match="Triton runs on a GPU"):
            FUSED_MOE.serve(case.request(), "triton")
    assert capability.capability_of(x) is None
    assert quantize_api.explain(x, 1 / 2688, per_token_activation=True).backend == "reference"


def test_a_gpu_is_asked_for_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, device.index))
    assert capability.of_device(torch.device("cuda:3")) == (9, 3)
    assert capability.of_device(torch.device("cpu")) is None
    with fake_flashinfer.installed():
        assert capability.of_device(torch.device("cuda:3")) == (9, 3)


def test_automatic_choice_takes_it():
    case = CASES["exact sums"].make(TRTLLM)
    with fake_flashinfer.installed() as fake:
        FUSED_MOE.serve(case.request(), "auto")
    assert fake.ran == [layers.Ran(TRTLLM, "default")]


def test_an_unknown_lie():
    with (
        pytest.raises(ValueError, match="fault is 'white'; it must be one of ties of a code"),
        fake_flashinfer.installed("white"),
    ):
        pass


# What is replaced


def parameters_of_cpp(source, function):
    """Names of a C++ function's parameters."""
    text = (Path(flashinfer.__file__).parent / "data/csrc" / source).read_text()
    found = re.search(rf"\n *(?:void|Array<[\w<>]+>) {function}\((.*?)\) {{\n", text, re.S)
    assert found, f"{source} has no {function}"
    bare = re.sub(r"=[^,]*", "", re.sub(r"<[^<>]*>", "", re.sub(r"<[^<>]*>", "", found[1])))
    return [parameter.split()[-1].rstrip("_") for parameter in bare.split(",")]


@pytest.mark.parametrize("layer", compiled.LAYERS, ids=lambda f: f.name)
def test_signatures_of_the_compiled_layers(layer):
    assert layer.names == parameters_of_cpp(layer.source, layer.name)


@pytest.mark.parametrize("function", compiled.PYTHON, ids=lambda f: f.name)
def test_signatures_of_the_python_that_is_replaced(function):
    theirs = getattr(importlib.import_module(function.source), function.name)
    assert function.names == list(inspect.signature(theirs).parameters)


@pytest.mark.parametrize("function", compiled.CLOSURES, ids=lambda f: f.name)
def test_signatures_of_the_compiled_quantizers(function):
    """The closures of `get_fp4_quantization_module`, read from their source."""
    from flashinfer.quantization import fp4_quantization

    source = inspect.getsource(fp4_quantization.get_fp4_quantization_module.__wrapped__)
    text = re.search(rf"\n    def {function.name}\((.*?)\n    \) ->", source, re.S)[1]
    assert function.names == re.findall(r"^ {8}(\w+)\s*:", text, re.M)


def test_every_compiled_function_has_its_stand_in():
    methods = [
        method.compiled
        for kind in (layers.Trtllm, layers.Cutlass, layers.CuteDsl, fake_quantizers.Quantizers)
        for method in (getattr(kind, name) for name in dir(kind))
        if hasattr(method, "compiled")
    ]
    described = (*compiled.LAYERS, *compiled.PYTHON, *compiled.CLOSURES)
    assert sorted(f.name for f in methods) == sorted(f.name for f in described)


class TestBinding:
    later = version.Versions((0, 7, 4))
    function = compiled.Compiled(
        "x.cu",
        "f",
        (Argument("a"), Argument("new", versions=later), Argument("b"), Argument("buffer")),
        frozenset({"buffer"}),
    )

    def made(self):
        class Layer:
            @self.function
            def f(self, a, b=3):
                return a, b

        return Layer().f

    def test_by_position_and_by_name(self):
        f = self.made()
        assert f(1, 2, "any") == (1, 2) and f(1, b=4, buffer=None) == (1, 4) and f(a=1) == (1, 3)

    def test_arguments_of_another_version(self, monkeypatch):
        f = self.made()
        with pytest.raises(TypeError, match="f takes 3 arguments; 4 came by position"):
            f(1, None, 2, "any")
        pretend(monkeypatch, version=(0, 7, 4))
        assert f(1, None, 2, "any") == (1, 2)

    @pytest.mark.parametrize("value", [True, 1, "x", torch.zeros(1)])
    def test_what_is_not_read_must_be_absent(self, monkeypatch, value):
        pretend(monkeypatch, version=(0, 7, 4))
        with pytest.raises(NotImplementedError, match="the fake f has no new"):
            self.made()(1, new=value)


# In processes of its own

REHEARSE = Path(fake_flashinfer.__file__).parent / "rehearse.py"


def python(*arguments):
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=clean)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_command_is_rehearsed():
    found = json.loads(python(REHEARSE, "doctor", "--json"))
    assert found["builds"]["cuda"]["would_run"] == "flashinfer:cuda"
    assert found["fused_moe"]["would_run"] == TRTLLM


def test_the_processes_of_a_command_lie_too():
    fault = "tactic 64 raises"
    said = python(
        "-c",
        f"""
import runpy
runpy.run_path({str(REHEARSE)!r})["prepare"]({fault!r})
from nvfp4_moe.differential import workers
from nvfp4_moe.kernels.device import capability_of
import torch
print(workers.call(capability_of, [(torch.ones(1),)]))
import os
print(os.environ["NVFP4_MOE_FAKE_FLASHINFER"])
""",
    )
    assert said.split("\n")[:2] == ["[(10, 0)]", fault]
