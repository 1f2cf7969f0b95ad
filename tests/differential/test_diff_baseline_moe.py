"""BF16, FP8 and MXFP8 layers in `nvfp4-moe diff`: FlashInfer's Python over fake kernels."""

# SPDX-License-Identifier: Apache-2.0
import importlib.util
from dataclasses import replace
from unittest import mock

import fake_flashinfer
import moe_cases
import pytest
import torch
from assertions import assert_bitwise
from fake_flashinfer import layers
from installations import pretend

from nvfp4_moe.cases.baseline_moe import BaselineCase, exact_case
from nvfp4_moe.differential import baseline_moe as diff_baseline
from nvfp4_moe.differential.calls import RunOptions
from nvfp4_moe.exits import CommandError
from nvfp4_moe.kernels import device
from nvfp4_moe.kernels.baseline_moe.backends import BASELINE_MOE
from nvfp4_moe.kernels.flashinfer import baseline_moe as adapter
from nvfp4_moe.kernels.flashinfer import version
from nvfp4_moe.reference.activation import ActivationType
from nvfp4_moe.reference.moe import fp8
from nvfp4_moe.reference.moe.baseline_moe import (
    FORMATS,
    BaselineActivations,
    prepare_baseline,
    quantize_for,
)
from nvfp4_moe.reference.moe.routing import Routing, RoutingMethodType, route

NAMES = adapter.NAMES
EVERY = RunOptions(every_configuration=True, replay=True)
needs_flashinfer = pytest.mark.skipif(
    version.HERE.version is None or importlib.util.find_spec("cutlass") is None,
    reason="needs flashinfer-python and nvidia-cutlass-dsl",
)
QUANTIZER_FAULT = "MXFP8's scale rounded down"
FAULTS = [
    (n, b)
    for n, fault in fake_flashinfer.FAULTS.items()
    if fault.of == "baseline" and n != QUANTIZER_FAULT
    for b in fault.backends
]


def judged(name, fault=None, sweep=EVERY):
    """Cells of one layer by case, and the tactics that ran."""
    with fake_flashinfer.installed(fault) as fake:
        result = diff_baseline.run([name], sweep)
    section = result.section
    assert not result.not_run and section.columns == [name]
    assert {ran.backend for ran in fake.ran} <= {name}
    cells = {case: row[name] for case, row in section.rows.items()}
    quantizer = cells.pop("mxfp8, its quantizer", None)
    wrong = fault == QUANTIZER_FAULT
    assert quantizer is None or quantizer.status == ("different" if wrong else "identical")
    return cells, [ran.tactic for ran in fake.ran]


# Cases


@pytest.mark.parametrize("offset", [0, 2])
def test_exact_cases_are_one_output(offset):
    every = [exact_case(format, offset) for format in FORMATS]
    want = every[0].reference()
    for case in every:
        assert_bitwise(case.reference(), want, case.name)
    assert (want != 0).double().mean() > 0.75
    # Nothing was lost on the way: fp64 from the values of the plainest format.
    case, total = every[0], torch.zeros(want.shape, dtype=torch.float64)
    for t, k in torch.cartesian_prod(torch.arange(want.shape[0]), torch.arange(2)).tolist():
        e = int(case.ids[t, k]) - offset
        if 0 <= e < 4:
            h = case.experts.w13[e].double() @ case.activations.hidden_states[t].double()
            y = h[:128] * h[128:]
            assert set(h[128:].tolist()) <= {
                0.0,
                *(v * 2.0**i for v in (64, 112) for i in range(3)),
            }
            total[t] += case.weights[t, k].double() * (case.experts.w2[e].double() @ y)
    assert torch.equal(total.float().bfloat16(), want) and case.exact


@pytest.mark.parametrize("towards", [0.0, torch.inf])
def test_exact_cases_do_not_depend_on_the_last_bit_of_a_scale(towards):
    """A cubin does not determine its scale: an ulp of it must not show."""
    want, quantize = exact_case("fp8 block").reference(), fp8.quantize_blocks

    def other(x, rows=1, least=fp8.LEAST):
        q = quantize(x, rows, least)
        return q._replace(scale=torch.nextafter(q.scale, torch.tensor(towards)))

    with mock.patch.object(fp8, "quantize_blocks", other):
        assert_bitwise(exact_case("fp8 block").reference(), want, "fp8 block")


@pytest.mark.parametrize("format", ["fp8 per tensor", "fp8 block", "mxfp8"])
def test_codes_are_not_those_of_another_format(format):
    """So that a scale which is ignored shows."""
    values = exact_case("bf16").experts
    codes = exact_case(format).experts
    assert not torch.equal(codes.w13.float(), values.w13.float())
    assert not torch.equal(codes.w2.float(), values.w2.float())


# FlashInfer's Python


@needs_flashinfer
@pytest.mark.parametrize("name", NAMES.values())
def test_without_a_fault(name):
    cells, ran = judged(name)
    assert [c.status for c in cells.values()] == ["withheld", "identical", "identical"]
    tactics = len(layers.TRTLLM_TACTICS)
    assert all(c.compared == 2 * (tactics + 1) and not c.failed for c in cells.values())
    assert {c.note for c in cells.values()} == {"all equal"}
    assert len(set(ran)) == tactics + 1


@needs_flashinfer
@pytest.mark.parametrize("fault,name", FAULTS)
def test_a_fault_shows_where_sums_are_exact(fault, name):
    cells, _ = judged(name, fault)
    real, whole, part = cells.values()
    assert real.status == "withheld"  # said, not judged
    assert part.status == "different" and (whole.status == "different" or "offset" in fault)
    only = fake_flashinfer.FAULTS[fault].tactics
    assert part.failed == (1 if only else part.compared // 2)
    told = [failure.case for failure in part.failures]
    assert all(tactic in case for tactic in only for case in told)
    failure = part.failures[0]
    assert "elements are other bits" in failure.summary and "instead of" in failure.details[0]
    assert sum(map(sum, failure.heat.tiles)) == int(failure.summary.split()[0])


@needs_flashinfer
def test_the_quantizer_of_mxfp8():
    cells, _ = judged(NAMES["mxfp8"], QUANTIZER_FAULT)  # which looks at its cell
    assert [c.status for c in cells.values()] == ["withheld", "identical", "identical"]


@needs_flashinfer
def test_another_answer_to_the_same_call():
    cells, _ = judged(NAMES["mxfp8"], "last bit of every second call", RunOptions(replay=True))
    assert {c.status for c in cells.values()} == {"different"}
    assert "again" in next(iter(cells.values())).failures[0].case


@needs_flashinfer
def test_a_crash_of_one_layer():
    def crashes(given, tactic):
        raise RuntimeError("no kernel image\nfor this device")

    fault = fake_flashinfer.Fault("baseline", (), "", layers.Behaviour(baseline=crashes))
    with mock.patch.dict(fake_flashinfer.FAULTS, crashing=fault):
        cells, _ = judged(NAMES["bf16"], "crashing")
    assert {c.status for c in cells.values()} == {"crashed"}
    failure = next(iter(cells.values())).failures[0]
    assert failure.summary == "RuntimeError: no kernel image"
    assert failure.details == ["for this device"]


@needs_flashinfer
@pytest.mark.parametrize("format", FORMATS)
def test_from_logits(format):
    shape = moe_cases.Shape(9, 256, 128, 16, 4, 4, 8)
    w13, w2 = moe_cases.weights_of(shape, ActivationType.Swiglu)
    amax = {"input_amax": 40.0, "intermediate_amax": 30.0} if "tensor" in format else {}
    experts = prepare_baseline(format, w13, w2, **amax)
    x = quantize_for(moe_cases.hidden_states(shape), experts)
    logits = torch.randn(9, 16, generator=torch.Generator().manual_seed(1))
    chosen = route(logits, routing := Routing(RoutingMethodType.Renormalize, 4))
    case = BaselineCase("", x, experts, chosen.ids, chosen.weights_bf16, 16, 4)
    request = replace(case.call(), routing=routing, logits=logits, topk=None)
    with fake_flashinfer.installed():
        assert BASELINE_MOE.choose(request) == NAMES[format]
        assert_bitwise(BASELINE_MOE.run(NAMES[format], request), case.reference(), format)
        assert_bitwise(
            BASELINE_MOE.run(NAMES[format], case.call()), case.reference(), f"{format}, routed"
        )
    assert BASELINE_MOE.choose(request) == "reference"
    assert_bitwise(BASELINE_MOE.run("reference", request), case.reference(), "reference")


# What is not run


def test_without_a_gpu():
    result = diff_baseline.run()
    assert not result.section.rows and sum(result.not_run.values()) == 12
    result = diff_baseline.run([NAMES["bf16"]])
    assert not result.not_run and {c.status for c in result.section.cells} == {"skipped"}


def test_an_unknown_layer():
    with pytest.raises(
        CommandError, match="--backends has 'fp8'; it must be among flashinfer:bf16, "
    ):
        diff_baseline.known("flashinfer:mxfp8,fp8")
    assert diff_baseline.known(None) is None


@pytest.mark.parametrize(
    "format,change,message",
    [
        ("bf16", {}, None),
        ("mxfp8", {"num_experts": 6}, "num_experts must be a multiple of 4 above top_k"),
        ("bf16", {"num_experts": 6}, None),
        ("fp8 block", {"routing": Routing(RoutingMethodType.Renormalize, 4)}, "above top_k"),
        ("bf16", {"activations": BaselineActivations(torch.zeros(0, 256))}, "there are no tokens"),
        ("bf16", {"kind": ActivationType.Situ}, "the activation is not among Swiglu"),
        ("bf16", {"capability": (9, 0)}, "sm_90 has no kernels; sm_100, sm_103 and sm_107 have"),
        ("bf16", {"version": (0, 6, 18)}, "flashinfer-python is older than 0.7"),
        ("bf16", {"version": None}, "flashinfer-python is not installed"),
    ],
)
def test_refusals(monkeypatch, format, change, message):
    here = {"capability": (10, 0), "version": (0, 7, 2), "kind": None} | change
    monkeypatch.setattr(device, "of_device", lambda d: here["capability"])
    pretend(monkeypatch, version=here["version"])
    request = exact_case(format).call()
    kind = here["kind"] or request.experts.activation
    of_request = {k: v for k, v in change.items() if hasattr(request, k) and k != "capability"}
    request = replace(request, experts=replace(request.experts, activation=kind), **of_request)
    reason = BASELINE_MOE.refusal(NAMES[format], request)
    assert reason is None if message is None else message in reason


def test_a_layer_serves_one_format():
    reason = BASELINE_MOE.refusal(NAMES["bf16"], exact_case("mxfp8").call())
    assert reason == "it serves bf16, and the experts are in mxfp8"
