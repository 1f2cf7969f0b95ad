"""The mixture of experts in `nvfp4-moe diff`: what agrees, what does not, and what it costs."""

# SPDX-License-Identifier: Apache-2.0
import io

import pytest
import torch

from nvfp4_moe import diff_moe


@pytest.fixture
def two_cases(monkeypatch):
    every = diff_moe.cases()
    chosen = [c for c in every if c.name in ("Swiglu, per token", "Swiglu, bf16")]
    monkeypatch.setattr(diff_moe, "cases", lambda: chosen)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return chosen


def test_the_interpreter_agrees(two_cases):
    stream = io.StringIO()
    agreements = diff_moe.run(stream)
    assert [a.backend for a in agreements] == ["reference", diff_moe.INTERPRETER] * 2
    assert all(a.agrees for a in agreements)
    assert "DIFFER" not in stream.getvalue()


def test_a_wrong_row_is_a_difference(two_cases, monkeypatch):
    def wrong(every):
        outputs = [diff_moe.moe_dispatch.serve(diff_moe._request(c), "reference")[0] for c in every]
        outputs[1][3] *= -1
        return outputs

    monkeypatch.setattr(diff_moe, "_interpret", wrong)
    stream = io.StringIO()
    *others, second = diff_moe.run(stream)
    assert len(others) == 3 and all(a.agrees and a.equal == 1 for a in others)
    assert not second.agrees and second.equal < 1
    assert stream.getvalue().count("DIFFER") == 1


def test_costs_are_those_of_four_bits():
    weights, per_token, static = diff_moe.costs().values()
    assert 0.1 < weights < 0.2 < per_token < 0.3
    assert abs(static - per_token) < 0.03  # its scales come from the very tokens it is judged on
