"""The wording of `reference/checks.py`, and the values that calls on the CPU read."""

# SPDX-License-Identifier: Apache-2.0
import re

import moe_cases
import pytest
import torch
from torch._subclasses import FakeTensorMode

import nvfp4_moe
from nvfp4_moe.reference import checks

X = torch.zeros(2, 3, dtype=torch.bfloat16)
GIVEN = {
    "None": None,
    "'a'": "a",
    "1.5": 1.5,
    "True": True,
    "torch.float16": torch.float16,
    "a list of 2": [1, 2],
    "a dict of 1": {1: 2},
    "bfloat16 [2, 3]": X,
    "float32 []": torch.zeros((), dtype=torch.float32),
    "the class int": int,
    "a object": type("object", (), {"__repr__": lambda self: "x" * 100})(),
}


@pytest.mark.parametrize("text", GIVEN)
def test_a_value_is_described_in_a_line(text):
    assert checks.given(GIVEN[text]) == text


BF16 = (torch.bfloat16,)
WRONG = {
    "dtype": (
        lambda: checks.tensor("x", X, (torch.float32, torch.uint8), ("T", 3)),
        ValueError,
        "x is bfloat16 [2, 3]; it must be a tensor of float32 or uint8 [T, 3]",
    ),
    "dimensions": (
        lambda: checks.tensor("x", X[0], BF16, ("T", 3)),
        ValueError,
        "x is bfloat16 [3]; it must be a tensor of bfloat16 [T, 3]",
    ),
    "size": (
        lambda: checks.tensor("x", X, shape=("T", 4)),
        ValueError,
        "x is bfloat16 [2, 3]; it must be a tensor [T, 4]",
    ),
    "array": (
        lambda: checks.tensor("x", [[1.0]], BF16),
        TypeError,
        "x is a list of 1; it must be a tensor of bfloat16",
    ),
    "sparse": (
        lambda: checks.tensor("x", X.to_sparse(), BF16),
        ValueError,
        "x has the layout sparse_coo; it must be dense (torch.strided)",
    ),
    "strides": (
        lambda: checks.tensor("x", X.T, contiguous=True),
        ValueError,
        "x has strides (1, 3); it must be contiguous",
    ),
    "device": (
        lambda: checks.tensor("x", X.to("meta"), like=("y", X)),
        ValueError,
        "x is on meta; it must be on y's device, cpu",
    ),
    "flag": (lambda: checks.flag("f", "yes"), TypeError, "f is 'yes'; it must be True or False"),
    "flag 1": (lambda: checks.flag("f", 1), TypeError, "f is 1; it must be True or False"),
    "bool for a number": (
        lambda: checks.integer("n", True, 0),
        TypeError,
        "n is True; it must be an integer of at least 0",
    ),
    "below": (
        lambda: checks.integer("n", 0, 1, 8),
        ValueError,
        "n is 0; it must be an integer from 1 to 8",
    ),
    "above": (
        lambda: checks.integer("n", 9, 1, 8),
        ValueError,
        "n is 9; it must be an integer from 1 to 8",
    ),
    "float for an integer": (
        lambda: checks.integer("n", 1.0),
        TypeError,
        "n is 1.0; it must be an integer",
    ),
    "nan": (
        lambda: checks.number("v", float("nan")),
        ValueError,
        "v is nan; it must be a finite number",
    ),
    "zero": (
        lambda: checks.number("v", 0, positive=True),
        ValueError,
        "v is 0; it must be a positive finite number",
    ),
    "text for a number": (
        lambda: checks.number("v", "3"),
        TypeError,
        "v is '3'; it must be a finite number",
    ),
    "name": (lambda: checks.one_of("b", "c", "ab"), ValueError, "b is 'c'; it must be one of a, b"),
    "no name": (
        lambda: checks.one_of("b", [], "ab"),
        TypeError,
        "b is a list of 0; it must be one",
    ),
    "no device": (
        lambda: checks.device("device", "gpu"),
        ValueError,
        "device is 'gpu'; it must be a",
    ),
    "devices": (lambda: checks.device("device", 3), TypeError, "device is 3; it must be a device"),
    "value": (
        lambda: checks.finite("w", torch.tensor([[1.0, float("inf")]], dtype=torch.float32)),
        ValueError,
        "w[0, 1] is inf, one of 1 such values of 2; it must be finite",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wording(case):
    call, error, message = WRONG[case]
    with pytest.raises(error, match="^" + re.escape(message)):
        call()


def test_what_is_right_passes():
    checks.tensor("x", X, BF16, ("T", 3), like=("y", X), contiguous=True)
    checks.integer("n", 8, 1, 8)
    checks.number("v", 1, positive=True)
    checks.flag("f", False)
    assert checks.device("device", "cpu") == torch.device("cpu")


def test_values_are_read_where_they_are():
    assert checks.reads_values(X, torch.nn.Parameter(X))
    assert not checks.reads_values(X, X.to("meta"))
    with FakeTensorMode():
        assert not checks.reads_values(torch.zeros(2, dtype=torch.float32, device="cpu"))


CASE = moe_cases.make(moe_cases.Shape(experts=4, hidden=128, intermediate=64, tokens=5, top_k=2))


def layer(ids, weights, **options):
    x = torch.ones(5, 128, dtype=torch.bfloat16)
    return nvfp4_moe.fused_moe(x, CASE.experts, (ids, weights), **options)


class TestRoutedValues:
    """An id of no expert was served as one of another rank: zeros in place of an error."""

    @pytest.mark.parametrize("wrong", [4, 104, -2, -(2**31)])
    def test_an_id_of_no_expert(self, wrong):
        ids = CASE.ids.clone()
        ids[3, 1] = wrong
        message = (
            rf"routing\[0\]\[3, 1\] is {wrong}, one of 1 .*must be -1 \(no expert\) or from 0 to 3"
        )
        with pytest.raises(ValueError, match=message):
            layer(ids, CASE.weights)
        layer(ids.clamp(-1, 5), CASE.weights, num_experts=6)

    def test_a_nan_weight(self):
        weights = CASE.weights.clone()
        weights[2, 0] = float("nan")
        with pytest.raises(ValueError, match=r"routing\[1\]\[2, 0\] is nan, .*must be no NaN"):
            layer(CASE.ids, weights)
        ids = CASE.ids.clone()
        ids[2, 0] = -1
        layer(ids, weights)


def wrong_routing():
    """Two ids of no expert, one NaN weight of an expert, one of none."""
    ids, weights = CASE.ids.clone(), CASE.weights.clone()
    ids[0, 0], ids[4, 1], ids[1, 0] = 4, -7, -1
    weights[1, 0], weights[2, 1] = float("nan"), float("nan")
    return ids, weights


def test_statistics_count_what_is_not_read(monkeypatch):
    """As on a GPU, where a call does not wait to read values."""
    monkeypatch.setattr(checks, "reads_values", lambda *tensors: False)
    _, s = layer(*wrong_routing(), stats=True)
    assert s.invalid.tolist() == [2, 1] and (s + s).invalid.tolist() == [4, 2]
    seen = nvfp4_moe.LayerStatistics()
    for _ in range(2):
        seen.record("3", layer(*wrong_routing(), stats=True))
    lines = [f"{n} slots with {what}" for n, what in ((4, "ids out of range"), (2, "NaN weights"))]
    assert str(seen).splitlines()[-2:] == [f"3: {line}" for line in lines]
    assert "slots with" not in str(layer(CASE.ids, CASE.weights, stats=True)[1])
