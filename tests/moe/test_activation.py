"""Activations against formulas written out for one pair of numbers at a time."""

# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from activation_formulas import (
    ALPHA,
    BETA,
    FORMULAS,
    GATE_SCALE,
    LIMIT,
    SCALE,
    sigmoid,
)

from nvfp4_moe.reference.activation import IMPLEMENTED, OWN, ActivationType, activate


@pytest.mark.parametrize("kind", IMPLEMENTED, ids=lambda k: k.name)
def test_formula(kind):
    values = torch.linspace(-5, 5, 21)
    up, gate = (t.flatten() for t in torch.meshgrid(values, values, indexing="ij"))
    raw = torch.stack((up, gate), 1) if kind.gated else gate[:, None]
    given = {"alpha": ALPHA, "beta": BETA, "clamp_limit": LIMIT}
    given = {name: given[name] for name in kind.parameters}
    got = activate(raw, kind, SCALE, GATE_SCALE, **given)[:, 0]
    want = torch.tensor(
        [FORMULAS[kind](u, g) for u, g in zip(up.tolist(), gate.tolist(), strict=True)]
    )
    torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-7)


def test_defaults():
    raw = torch.tensor([[3.0, 2.0]])
    assert activate(raw, ActivationType.Swiglu).item() == pytest.approx(2 * sigmoid(2) * 3)
    situ = math.tanh(3) * math.tanh(2) * sigmoid(2)
    assert activate(raw, ActivationType.Situ).item() == pytest.approx(situ)
    step = activate(torch.tensor([[100.0, 100.0]]), ActivationType.SwigluStep, 1.0, 2.0)
    assert step.item() == pytest.approx(7.0 * 3.5)


def test_the_enum_is_flashinfers():
    enums = pytest.importorskip("flashinfer.tllm_enums", reason="needs flashinfer-python")
    theirs = {name: int(value) for name, value in enums.ActivationType.__members__.items()}
    theirs["Invalid"] = theirs.pop("InvalidType", theirs.get("Invalid"))
    assert {a.name: int(a) for a in ActivationType if a < OWN} == theirs


@pytest.mark.parametrize(
    "kind", [ActivationType.SwigluBias, ActivationType.Invalid, ActivationType.ClampedRelu2]
)
def test_not_implemented(kind):
    with pytest.raises(ValueError, match=r"activation is .*an ActivationType that is implemented"):
        activate(torch.ones(1, 2), kind)
