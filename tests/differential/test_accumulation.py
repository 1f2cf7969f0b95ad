"""The probe of a backend's sums, on additions that are known."""

# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from nvfp4_moe.differential import accumulation
from nvfp4_moe.differential import moe as diff_moe
from nvfp4_moe.differential.conforming import CONFORMING, truncating
from nvfp4_moe.reference.moe import layer as moe
from nvfp4_moe.reference.moe.layer import Stages

FUSED = moe.fused_moe


@pytest.fixture
def adding(monkeypatch):
    """Measure the reference while it adds so."""

    def measured(stages):
        monkeypatch.setattr(moe, "fused_moe", lambda *a, **k: FUSED(*a, **k, stages=stages))
        return accumulation.measure("reference", "cpu")

    return measured


@pytest.mark.parametrize("step,bits", [(8, 1), (16, 1), (16, 2), (32, 2)])
def test_tensor_cores(adding, step, bits):
    found = adding(Stages(gemm1=truncating(step, bits)))
    assert found == accumulation.Sums(bits, True, False) and found.as_assumed


@pytest.mark.parametrize("step,bits", [(16, 0), (16, -10), (4, 1), (4, 2)])
def test_sums_that_the_intervals_do_not_cover(adding, step, bits):
    found = adding(Stages(gemm1=truncating(step, bits)))
    assert not found.as_assumed and "NOT as assumed" in str(found)


@pytest.mark.parametrize("stride", [2, 4])
def test_columns_in_another_order(adding, stride):
    """Every second or fourth column of a tile of 128 first, as where words are decoded."""

    def strided(x, w, _):
        order = torch.arange(x.shape[1]).view(-1, 128 // stride, stride).transpose(1, 2).flatten()
        return truncating(16, 1)(x[:, order], w[:, order], _)

    found = adding(Stages(gemm1=strided))
    assert found.extra_bits == 1 and found.as_assumed


def test_fp32_and_more(adding):
    found = adding(CONFORMING["fp32, ascending"])
    assert found.nearest and found.as_assumed and "nearest" in str(found)
    found = adding(Stages())
    assert found.extra_bits == 2 and found.as_assumed and "2 bits or more" in str(found)


def test_sums_in_16_bits(adding):
    found = adding(Stages(gemm1=lambda x, w, _: (x.double() @ w.double().T).bfloat16().float()))
    assert found.as_assumed  # one rounding at the end: what the stages of the judge are for
    steps = Stages(gemm1=lambda x, w, _: (x.half().cumsum(1)[:, -1:].float()).expand(-1, len(w)))
    assert not adding(steps).as_assumed


def test_diff_withholds_its_judgement(monkeypatch):
    """The backend does not add as assumed; test_diff_moe has the cells that follow."""
    monkeypatch.setattr(accumulation, "measure", lambda *_: accumulation.Sums(0, False, False))
    assert "NOT as assumed" in diff_moe._sums("triton", torch.device("cpu"))
    assert diff_moe._sums("reference", torch.device("cpu")) == ""
