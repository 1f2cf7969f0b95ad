"""The mixture of experts in `nvfp4-moe diff`: what agrees, what does not, and what it costs."""

# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from nvfp4_moe.cases import moe as moe_cases
from nvfp4_moe.differential import moe as diff_moe
from nvfp4_moe.differential import workers
from nvfp4_moe.differential.format_error import format_errors

INTERPRETER = workers.INTERPRETER


@pytest.fixture
def few_cases(monkeypatch):
    names = (
        "Swiglu, per token",
        "Swiglu, bf16",
        "Swiglu, fp32 weights, slots in order",
        "Swiglu, build cutlass",
        "Relu2, sums exact",
    )
    few = moe_cases.chosen_cases(names)
    monkeypatch.setattr(moe_cases, "cases", lambda: few)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return few


def statuses(result, column):
    return [row[column].status for row in result.section.rows.values()]


def test_the_interpreter_agrees(few_cases):
    result = diff_moe.run()
    assert result.section.columns == [INTERPRETER, "reference"] and not result.failures
    assert statuses(result, "reference") == ["inside"] * 4 + ["identical"]
    assert statuses(result, INTERPRETER) == ["inside"] * 3 + ["skipped", "identical"]
    (skipped,) = [c for c in result.section.cells if c.status == "skipped"]
    assert 'build="cutlass"' in skipped.note
    assert {reason.split(":")[0] for reason in result.not_run} == {"flashinfer"}
    histogram = result.section.rows["Swiglu, bf16"][INTERPRETER].histogram
    assert sum(histogram) > 1000  # of the outputs that the contract leaves open


@pytest.fixture
def instead(few_cases, monkeypatch):
    """The interpreter's answers are the reference's, changed."""

    def set_to(change):
        answers = [
            {"default": diff_moe.Output(change(i, case, case.reference()))}
            for i, case in enumerate(few_cases)
        ]
        monkeypatch.setattr(diff_moe, "_interpret", lambda every: answers)
        return diff_moe.run([INTERPRETER])

    return set_to


def test_a_wrong_row_is_outside(instead):
    def change(i, case, output):
        if i == 1:
            output[3] *= -1
        return output

    result = instead(change)
    assert statuses(result, INTERPRETER) == ["inside", "outside", "inside", "inside", "identical"]
    (wrong,) = result.failures
    assert wrong.failure.details[0].startswith("first at token 3, column 0")
    assert [i for i, row in enumerate(wrong.failure.heat.tiles) if any(row)] == [3]


def test_one_bit_where_sums_are_exact_is_different(instead):
    def change(i, case, output):
        if case.exact:
            output.view(torch.int16)[7, 11] ^= 1
        return output

    result = instead(change)
    assert statuses(result, INTERPRETER)[-1] == "different"
    (wrong,) = result.failures
    assert "token 7, column 11" in wrong.failure.details[0]
    assert wrong.failure.summary == "1 of 6144 elements are not the one right output"
    assert wrong.failure.details[1].startswith("slot 0: expert ")
    assert wrong.failure.details[-1].startswith("sum over the slots = ")


def test_a_call_made_again_must_give_the_same_bits(few_cases, monkeypatch):
    serve, calls = diff_moe.FUSED_MOE.serve, []

    def restless(request, backend):
        (output,) = serve(request, "reference")
        calls.append(1)
        if len(calls) % 2 == 0:
            output.view(torch.int16)[2, 5] ^= 1
        return [output]

    monkeypatch.setattr(diff_moe.FUSED_MOE, "serve", restless)
    monkeypatch.setattr(diff_moe.FUSED_MOE, "refusal", lambda name, request: None)
    monkeypatch.setattr(diff_moe, "_sums", lambda *_: "")
    result = diff_moe.run(["triton"], diff_moe.RunOptions(replay=True))
    assert {c.status for c in result.section.cells} == {"different"}
    elements = moe_cases.TOKENS * moe_cases.HIDDEN
    assert {w.failure.summary for w in result.failures} >= {
        f"1 of {elements} elements are other bits"
    }
    assert all(w.failure.case.endswith(", again") for w in result.failures)


def test_an_error_of_a_backend_is_a_crash(few_cases, monkeypatch):
    def fail(request, backend):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(diff_moe.FUSED_MOE, "serve", fail)
    result = diff_moe.run(["reference"])
    assert set(statuses(result, "reference")) == {"crashed"}
    assert result.failures[0].failure.summary == "RuntimeError: no kernel image"


def test_a_backend_whose_sums_are_not_as_assumed_is_judged_where_they_are_exact(
    few_cases, monkeypatch
):
    monkeypatch.setattr(diff_moe, "_sums", lambda backend, device: "cut 0 bits below")
    result = diff_moe.run(["reference"])
    assert statuses(result, "reference") == ["withheld"] * 4 + ["identical"]
    assert result.section.cells[0].note == "cut 0 bits below"


def test_costs_are_those_of_four_bits():
    nvfp4, others = format_errors().values()
    weights, per_token, static = nvfp4.values()
    assert 0.1 < weights < 0.2 < per_token < 0.3
    assert abs(static - per_token) < 0.03  # its scales come from the very tokens it is judged on
    bf16, *eight_bits = others.values()
    assert 0 < bf16 < 2**-8 and all(0.05 < error < 0.1 for error in eight_bits)


def test_the_exact_cases_are_exact():
    """Any order of the sums gives the same bits: ascending in fp32 as well as in fp64."""
    from nvfp4_moe.differential.conforming import CONFORMING
    from nvfp4_moe.reference.moe.layer import fused_moe

    exact = [case for case in moe_cases.cases() if case.exact]
    assert len(exact) >= 3
    for case in exact:
        for stages in CONFORMING.values():
            if "approximate" in str(stages.activate):
                continue
            got = fused_moe(
                case.activations, case.experts, *case.routed, recipe=case.recipe, stages=stages
            )
            assert torch.equal(got.output, case.reference())
