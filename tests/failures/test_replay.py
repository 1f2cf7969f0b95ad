"""A failing case goes through a file unchanged and is run again; a bad file is one error."""

# SPDX-License-Identifier: Apache-2.0
import json
import os
from dataclasses import replace

import pytest
import torch
from replay_cases import CASE, FOUR, ORIGIN, assert_same, moe_failure, quantizer_failure, wrong
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import nvfp4_moe
from nvfp4_moe import __main__
from nvfp4_moe.cases import inputs
from nvfp4_moe.cases import quantize as quantize_cases
from nvfp4_moe.cases.moe_case import MoECase
from nvfp4_moe.cases.quantize import Case
from nvfp4_moe.differential import quantizers, workers
from nvfp4_moe.differential.compare import compare, run_reference
from nvfp4_moe.differential.verdict import Allowed
from nvfp4_moe.failures import minimize, minimize_moe, replay
from nvfp4_moe.failures.replay_file import (
    MoEFailure,
    QuantizerFailure,
    ReplayFileError,
    load,
    rows_of,
    save_moe,
    save_quantizer,
)
from nvfp4_moe.kernels.moe.backends import FUSED_MOE
from nvfp4_moe.reference.activation import ActivationType
from nvfp4_moe.reference.bounds.accumulation import CONTIGUOUS
from nvfp4_moe.reference.moe.routing import Routing, RoutingMethodType
from nvfp4_moe.reference.quantize import Quantized
from nvfp4_moe.reference.recipe import Recipe, SfLayout

CASES = [
    (CASE, torch.bfloat16),
    (Case("per-token", FOUR, SfLayout.layout_8x4), torch.float16),
    (
        Case("global-scale", Recipe(), SfLayout.layout_linear, torch.tensor(0.1).item()),
        torch.bfloat16,
    ),
    (Case("global-scale", FOUR, SfLayout.layout_128x4, float("inf")), torch.float16),
    (Case("row scales", FOUR, SfLayout.layout_8x4), torch.bfloat16),
    (Case("row scales", Recipe(), SfLayout.layout_128x4), torch.float8_e4m3fn),
    (Case("fp32 per-token", Recipe(), SfLayout.layout_8x4), torch.float32),
]


@pytest.mark.parametrize(("case", "dtype"), CASES)
def test_a_quantizer_comes_back_bitwise(case, dtype, tmp_path):
    path = tmp_path / "case.safetensors"
    failure = quantizer_failure(case, dtype)
    save_quantizer(path, failure)
    assert_same(load(path), failure)
    raised = replace(failure, outputs=failure.outputs | {"triton": None})
    save_quantizer(path, raised)
    assert_same(load(path), raised)


def moe_failures():
    g = torch.Generator().manual_seed(1)
    biases = {"w13_bias": torch.randn(4, 160, generator=g), "w2_bias": torch.randn(4, 208)}
    yield moe_failure(**biases, alpha=1.5, beta=0.1, clamp_limit=7.0)
    yield moe_failure(weights_dtype=torch.float32)
    yield moe_failure("bf16", ActivationType.Relu2)
    yield replace(moe_failure("static"), output=None, configuration=None)
    both = moe_failure()
    experts = nvfp4_moe.with_cute_dsl(both.case.experts)
    yield replace(both, case=replace(both.case, experts=experts, build="cute-dsl"))
    static = moe_failure("static")
    experts = nvfp4_moe.with_cutlass(static.case.experts)
    yield replace(static, case=replace(static.case, experts=experts, build="cutlass", exact=True))
    wide = moe_failure()
    yield replace(
        wide, output=wide.output.float(), case=replace(wide.case, output_dtype=torch.float32)
    )
    routed = moe_failure()
    routing = Routing(RoutingMethodType.DeepSeekV3, 2, 2, 1, 2.5)
    yield replace(
        routed,
        case=replace(
            routed.case,
            ids=None,
            weights=None,
            logits=torch.randn(3, 6, generator=g),
            routing=routing,
            routing_bias=torch.randn(6, generator=g).bfloat16(),
        ),
    )


@pytest.mark.parametrize("failure", list(moe_failures()), ids=range(8))
def test_a_call_comes_back_bitwise(failure, tmp_path):
    path = tmp_path / "case.safetensors"
    save_moe(path, failure)
    assert_same(load(path), failure)


@pytest.fixture
def backends(monkeypatch):
    """The interpreter's place taken by the reference with a fault that can be taken away."""
    fault = {
        "quantizer": wrong,
        "call": lambda output: output.index_fill(1, torch.tensor([7]), 1e3),
    }
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(
        quantizers,
        "interpret",
        lambda jobs: [fault["quantizer"](run_reference(x, case)) for x, case in jobs],
    )
    monkeypatch.setattr(
        replay.workers,
        "call_interpreted",
        lambda function, jobs: [
            fault["call"](FUSED_MOE.serve(case.request(), "reference")[0]) for (case,) in jobs
        ],
    )
    return fault


def run(capsys, *arguments):
    status = __main__.main(["replay", *map(str, arguments)])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_replay_of_a_quantizer(backends, tmp_path, capsys):
    path = tmp_path / "case.safetensors"
    failure = quantizer_failure(sides=("reference", workers.INTERPRETER))
    save_quantizer(path, failure)
    status, out, _ = run(capsys, path)
    assert status == 1
    left, right = failure.outputs.values()
    difference = compare(failure.x, CASE, left, right)
    assert f"differ: {difference}" in out and difference.where() in out
    assert "block scale sf = e4m3(that)" in out
    status, out, err = run(capsys, path, "--json", "-")
    assert status == 1 and "differ" in err
    facts = json.loads(out)
    assert facts["differs"] is True and facts["difference"]["row"] == 19
    assert facts["sides"] == ["reference", workers.INTERPRETER]
    assert run(capsys, path, "--backend", "reference")[0] == 0
    assert run(capsys, path, "--backend", "triton")[0] == 1  # the interpreter, here
    backends["quantizer"] = lambda q: q
    status, out, _ = run(capsys, path, "--json", tmp_path / "out.json")
    assert status == 0 and "identical" in out
    assert json.loads((tmp_path / "out.json").read_text())["differs"] is False

    def crash(q):
        raise RuntimeError("illegal memory access")

    backends["quantizer"] = crash
    status, out, _ = run(capsys, path)
    assert status == 1 and f"{workers.INTERPRETER} raised: illegal memory access" in out


def test_replay_against_what_is_fixed(backends, tmp_path, capsys):
    """FlashInfer's own outputs come out of the file; a row of them stands for itself."""
    path = tmp_path / "case.safetensors"
    item = next(i for i in quantize_cases.golden([Recipe()]) if i.x.shape[0] > 40)
    case = next(c for c in item.cases if c.layout == SfLayout.layout_128x4)
    outputs = {"golden": item.golden[case], workers.INTERPRETER: wrong(item.golden[case])}
    row = item.x.shape[0] - 1
    small = {name: rows_of(q, [row], case) for name, q in outputs.items()}
    failure = QuantizerFailure(item.x[row:], case, small, ORIGIN)
    assert failure.suspect == workers.INTERPRETER
    save_quantizer(path, failure)
    status, out, _ = run(capsys, path)
    assert status == 1 and "1 codes" in out and "golden and" in out
    backends["quantizer"] = lambda q: q
    assert run(capsys, path)[0] == 0


def test_replay_of_a_call(backends, tmp_path, capsys):
    path = tmp_path / "case.safetensors"
    failure = replace(moe_failure(), backend=workers.INTERPRETER, configuration=None)
    save_moe(path, failure)
    status, out, _ = run(capsys, path)
    assert status == 1
    assert "3 of 624 elements are outside their intervals (sums: contiguous)" in out
    assert "first at token 0, column 7: got 0x447a (1000), allowed 0x" in out
    assert run(capsys, path, "--backend", "reference")[0] == 0
    backends["call"] = lambda output: output
    assert run(capsys, path)[0] == 0
    # Where one output is right, a neighbour inside the interval is wrong.
    exact = replace(failure, case=replace(failure.case, exact=True))
    save_moe(path, exact)
    assert run(capsys, path)[0] == 0
    backends["call"] = lambda output: (output.view(torch.int16) ^ 1).view(torch.bfloat16)
    status, out, _ = run(capsys, path)
    assert status == 1 and "624 of 624 elements are not the one right output" in out


def test_the_sums_are_judged_as_the_file_says(monkeypatch):
    asked = []
    allowed = MoECase.allowed
    monkeypatch.setattr(
        MoECase, "allowed", lambda c, how, **o: asked.append(how) or allowed(c, how, **o)
    )
    failure = moe_failure()
    assert Allowed(failure.case, failure.accumulation).first(failure.output).count == 1
    assert asked == [CONTIGUOUS]


def test_a_configuration_is_the_runners_affair():
    failure = moe_failure()
    asked = []

    def runner(backend, case, configuration):
        asked.append((backend, configuration))
        return case.reference()

    assert not replay.replay(failure, runner=runner).differs
    assert not replay.replay(failure, "reference", runner).differs
    assert asked == [("triton", "BLOCK_M=16 warps=4"), ("reference", None)]
    for backend, reason in (
        ("reference", "reference has no configuration 'BLOCK_M=16 warps=4' here; it has default"),
        (workers.INTERPRETER, "cannot be told to run BLOCK_M=16"),
    ):
        with pytest.raises(replay.CannotRunError, match=reason):
            replay.replay(replace(failure, backend=backend))


@pytest.mark.parametrize("kind", ["quantizer", "call"])
def test_a_backend_that_is_not_here(kind, backends, tmp_path, capsys):
    path = tmp_path / "case.safetensors"
    if kind == "quantizer":
        save_quantizer(path, quantizer_failure(sides=("flashinfer:cuda", "reference")))
    else:
        save_moe(path, replace(moe_failure(), backend="flashinfer:trtllm", configuration=None))
    status, out, err = run(capsys, path)
    assert status == 3 and out == "" and len(err.strip().splitlines()) == 1
    assert "flashinfer:" in err and "cannot run here: " in err and "on the " in err
    assert f"the file {path} is all that replay needs" in err
    status, _, err = run(capsys, path, "--backend", "marlin")
    assert status == 2 and "--backend is 'marlin'; it must be one of" in err
    assert "is all that replay needs" not in err
    assert run(capsys, path, "--backend", "reference")[0] == 0
    if kind == "quantizer":
        save_quantizer(path, quantizer_failure(sides=("marlin", "reference")))
    else:
        save_moe(path, replace(moe_failure(), backend="marlin", configuration=None))
    assert run(capsys, path)[0] == 2


def change_facts(path, **changes):
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["nvfp4_moe"])
    for name, value in changes.items():
        facts[name] = value
        if value is ...:
            del facts[name]
    save_file(load_file(path), path, {"nvfp4_moe": json.dumps(facts)})


def change_tensors(path, **changes):
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path) | {k.replace("__", "."): v for k, v in changes.items()}
    save_file({k: v for k, v in tensors.items() if v is not None}, path, metadata)


@pytest.mark.parametrize(
    ("kind", "change", "changes", "message"),
    [
        ("quantizer", change_facts, {"format": 2}, "format is 2; this version reads 1"),
        ("quantizer", change_facts, {"kind": "gemm"}, "kind is 'gemm'"),
        ("quantizer", change_facts, {"mode": "per-tensor"}, "mode is 'per-tensor'"),
        ("quantizer", change_facts, {"mode": ...}, "'mode' is missing"),
        ("quantizer", change_facts, {"layout": "layout_9x9"}, "layout is 'layout_9x9'"),
        ("quantizer", change_facts, {"recipe": 2}, "code 2 is not"),
        ("quantizer", change_facts, {"recipe": True}, "recipe is True; it must be int"),
        ("quantizer", change_facts, {"global_scale": 3.0}, "global_scale is 3.0 in mode per-token"),
        ("quantizer", change_facts, {"sides": ["a", "a"]}, "sides is"),
        ("quantizer", change_facts, {"more": 1}, "unknown: more"),
        ("quantizer", change_facts, {"origin": {"command": "x"}}, "origin has"),
        ("quantizer", change_tensors, {"x": None}, "'x' is missing"),
        ("quantizer", change_tensors, {"x": torch.zeros(20, 40).half()}, "K = 40"),
        ("quantizer", change_tensors, {"x": torch.zeros(20, 48)}, "x is torch.float32 in mode"),
        ("quantizer", change_tensors, {"1__codes": None}, "'1.codes' is missing"),
        ("quantizer", change_tensors, {"0__codes": torch.zeros(20, 23).byte()}, "0.codes is"),
        ("quantizer", change_tensors, {"y": torch.zeros(1)}, "unknown: y"),
        ("moe", change_facts, {"activation": "Swish"}, "activation is 'Swish'"),
        ("moe", change_facts, {"build": "hip"}, "build is 'hip'"),
        ("moe", change_facts, {"build": "cutlass"}, 'build is "cutlass"'),
        ("moe", change_facts, {"accumulation": "fp16"}, "accumulation is 'fp16'"),
        ("moe", change_facts, {"routing": {"method": "Best"}}, "routing's method is 'Best'"),
        ("moe", change_facts, {"routing": {"method": "TopK"}}, "top_k"),
        (
            "moe",
            change_facts,
            {"routing": {"method": "TopK", "top_k": 1, "routed_scaling_factor": 10**399}},
            "routed_scaling_factor is",
        ),
        ("moe", change_facts, {"hidden_size": 8}, "valid_hidden_size is 8"),
        ("moe", change_facts, {"hidden_size": 10**30}, "it must be less than 2**31"),
        ("moe", change_tensors, {"ids": None}, "topk_ids"),
        ("moe", change_tensors, {"output": torch.zeros(3, 208)}, "output is torch.float32"),
        ("moe", change_tensors, {"experts__gemm1_weights": None}, "gemm1_weights"),
        ("moe", change_tensors, {"experts__gemm2_bias": torch.zeros(4, 7)}, "gemm2_bias"),
        ("moe", change_tensors, {"activations__per_token_scale": torch.ones(4)}, "per_token_scale"),
    ],
)
def test_what_a_file_must_be(kind, change, changes, message, tmp_path, capsys):
    path = tmp_path / "case.safetensors"
    if kind == "quantizer":
        save_quantizer(path, quantizer_failure())
    else:
        save_moe(path, moe_failure())
    change(path, **changes)
    with pytest.raises(ReplayFileError, match=r"cannot be replayed: .") as raised:
        load(path)
    assert message in str(raised.value)
    status, out, err = run(capsys, path)
    assert (status, out) == (2, "") and str(path) in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a":' + "[" * 100_000 + "]" * 100_000 + "}", "levels deep"),
        ('{"format": 1, "format": 1}', 'has "format" twice'),
        ('{"format": ' + "9" * 5000 + "}", "5000 digits"),
        ('{"format": 1, "kind": "\\ud800"}', "half of a surrogate pair"),
        ("[1]", "no description"),
    ],
)
def test_a_description_is_not_trusted(text, message, tmp_path):
    path = tmp_path / "case.safetensors"
    save_file({"x": torch.zeros(1)}, path, {"nvfp4_moe": text})
    with pytest.raises(ReplayFileError, match=message):
        load(path)


def test_a_fifo_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "case.safetensors")
    with pytest.raises(ReplayFileError, match="it is not a regular file"):
        load(tmp_path / "case.safetensors")


def test_files_that_are_none(tmp_path, capsys):
    path = tmp_path / "case.safetensors"
    assert run(capsys, path)[0] == 2
    save_quantizer(path, quantizer_failure())
    whole = path.read_bytes()
    for length in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        status, out, err = run(capsys, path)
        assert (status, out) == (2, "") and str(path) in err and "Traceback" not in err
    torch.save({"x": torch.zeros(2, 16)}, path)  # a pickle
    assert run(capsys, path)[0] == 2
    for metadata in (None, {"nvfp4_moe": "[]"}, {"nvfp4_moe": "{"}):
        save_file({"x": torch.zeros(2, 16)}, path, metadata)
        status, _, err = run(capsys, path)
        assert status == 2 and "cannot be replayed" in err


def test_predicates_shrink_what_fails(backends):
    failure = quantizer_failure(sides=("reference", workers.INTERPRETER))
    small = minimize.minimize_tensor(failure.x, replay.quantizer_fails(CASE, *failure.sides), 5.0)
    assert small.shape == (1, 32)  # `wrong` changes byte 9, of the second block
    assert not replay.quantizer_fails(CASE, "reference", "flashinfer:cuda")(small)

    call = replace(moe_failure(), backend=workers.INTERPRETER, configuration=None)
    fails = replay.call_fails(call)
    least = minimize_moe.minimize_call(call.case, fails, 20.0)
    assert least.ids.numel() == 1 and least.experts.padded_hidden_size == 128
    backends["call"] = lambda output: output
    assert not fails(call.case)


def test_the_interpreter_runs_what_a_file_holds(tmp_path):
    """Both kinds in its child process, which has no fault."""
    path = tmp_path / "case.safetensors"
    failure = quantizer_failure(sides=("reference", workers.INTERPRETER))
    save_quantizer(path, failure)
    assert not replay.replay(load(path)).differs
    case = moe_failure().case
    plain = replace(case, recipe=Recipe())
    save_moe(path, MoEFailure(plain, workers.INTERPRETER, plain.reference()))
    assert not replay.replay(load(path)).differs


def test_rows_of_an_output():
    x = inputs.synthetic("normal", 20, 80)
    for layout in SfLayout:
        case = replace(CASE, layout=layout)
        some = rows_of(run_reference(x, case), [3, 17], case)
        want = run_reference(x[[3, 17]], case)
        assert isinstance(some, Quantized) and compare(x[[3, 17]], case, want, some) is None
