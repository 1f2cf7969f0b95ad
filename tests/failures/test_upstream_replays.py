"""The replay files of reports to FlashInfer: right outputs pass, and the reports' faults do not."""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import pytest
import torch
import upstream_replays
from oracle.cases import load as load_golden
from oracle.cases import tensor
from oracle.routing import logits_of
from paths import ROOT

from nvfp4_moe.failures import replay_file
from nvfp4_moe.failures.replay import CannotRunError, replay

PAGE = ROOT / "docs" / "upstream_reports.md"


@pytest.fixture(scope="module")
def golden():
    return load_golden()


def recorded(golden, number, row):
    """What FlashInfer's routing kernel gave for a row of a golden case: logits, ids and weights."""
    (case,) = (c for c in golden.cases("routing", "{}/ids") if c["name"].startswith(number))
    ids, weights = (golden.arrays[f"{case['name']}/{name}"][row, None] for name in ("ids", "w"))
    logits = logits_of(case, golden.seed)[row, None]
    return logits, torch.from_numpy(ids.astype("int32")), tensor(weights, "bf16")


def routed_as(ids, weights):
    """A backend that computes as the reference does, after another choice of experts."""
    found = {}

    def run(_, case, __):
        given = {"logits": None, "routing_bias": None, "ids": ids, "weights": weights}
        found["output"] = replace(case, **given).reference()
        return found["output"]

    return run


@pytest.mark.parametrize("number", upstream_replays.REPORTS)
def test_the_reference_passes_and_flashinfer_needs_its_gpu(number, tmp_path):
    path = upstream_replays.write(tmp_path)[number - 1]
    failure = replay_file.load(path)
    assert failure.case.exact and failure.output is None and "not run" in failure.origin.note
    assert not replay(failure, "reference").differs
    if not torch.cuda.is_available():
        with pytest.raises(CannotRunError, match="hidden_states are on the CPU"):
            replay(failure)


def test_repeated_experts_are_seen(golden):
    failure = upstream_replays.repeated_experts()
    ids, weights = failure.case.routed
    assert ids.tolist() == [[8, 7, 6, 5, 4, 3, 2, 1]] and (weights == 0.125).all()
    _, as_on_h200, _ = recorded(golden, "0856", 0)
    assert sorted(set(as_on_h200[0].tolist())) == [1, 5], "each four times"
    result = replay(failure, runner=routed_as(as_on_h200, weights))
    assert result.differs and result.text in PAGE.read_text(encoding="utf-8")
    for slot in range(8):  # one expert twice
        other = ids.clone()
        other[0, slot] = ids[0, slot - 1]
        assert replay(failure, runner=routed_as(other, weights)).differs
    order = torch.randperm(8)
    assert not replay(failure, runner=routed_as(ids[:, order], weights)).differs


def test_ids_that_are_no_experts_are_seen(golden):
    failure = upstream_replays.no_experts()
    logits, ids, weights = recorded(golden, "0276", 9)
    assert torch.equal(logits.view(torch.int16), failure.case.logits.view(torch.int16))
    assert ids.tolist() == [[8, 9]] and (weights == 0).all()
    result = replay(failure, runner=routed_as(ids, weights))
    assert result.differs and result.text.splitlines()[0] in PAGE.read_text(encoding="utf-8")
