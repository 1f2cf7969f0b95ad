"""Every activation has each of its entries: the table, the formulas, kernels, bounds and documents."""

# SPDX-License-Identifier: Apache-2.0
import ast
import inspect
import re
from collections import Counter
from typing import get_args

import pytest
from activation_formulas import FORMULAS
from paths import ROOT

from nvfp4_moe.kernels.moe import activation as kernel_activation
from nvfp4_moe.reference import activation
from nvfp4_moe.reference.activation import (
    ELSEWHERE,
    IMPLEMENTED,
    OWN,
    ActivationType,
    FlashInferLayer,
    Namespace,
    ParameterName,
    by_name,
)
from nvfp4_moe.reference.bounds.activation import RULES

UNITS = ROOT / "docs" / "units.md"


def branches(module, functions):
    """The activations that some functions of a module compare ACT with."""
    names = [
        node.comparators[0].id
        for function in ast.parse(inspect.getsource(module)).body
        if isinstance(function, ast.FunctionDef) and function.name in functions
        for node in ast.walk(function)
        if isinstance(node, ast.Compare) and getattr(node.left, "id", "") == "ACT"
    ]
    # NONE is no activation: the second GEMM's results.
    return {ActivationType(getattr(module, n).value) for n in names if n != "NONE"}


def documented():
    """(parameter, activation): unit of the rows of `docs/units.md`."""
    rows = re.findall(
        r"^\| `gemm1_(alpha|beta|clamp_limit)` \| ([^|]*) \| ([^:|]*):", UNITS.read_text(), re.M
    )
    return {
        (parameter, ActivationType[kind.strip()]): unit
        for parameter, kinds, unit in rows
        for kind in kinds.split(",")
    }


@pytest.mark.parametrize(
    "entries",
    [
        pytest.param(lambda: set(FORMULAS), id="a formula of the tests"),
        pytest.param(lambda: set(RULES), id="a rule of the bounds"),
        pytest.param(lambda: set(ELSEWHERE), id="a row of its names elsewhere"),
        pytest.param(
            lambda: branches(kernel_activation, ["activated"]), id="a branch of the kernel"
        ),
        pytest.param(
            lambda: branches(kernel_activation, ["with_slope", "gated_with_slopes"]),
            id="a derivative",
        ),
    ],
)
def test_every_activation_has(entries):
    assert entries() == set(IMPLEMENTED)


def test_the_kernel_knows_which_are_gated():
    for kind in ActivationType:
        assert kernel_activation.is_gated(int(kind)) == kind.gated
    assert not kernel_activation.is_gated(kernel_activation.NONE.value)


def test_the_units_are_documented():
    in_table = {(n, k): p.unit for k in IMPLEMENTED for n, p in k.parameters.items()}
    assert documented() == in_table
    text = UNITS.read_text()
    for kind in filter(lambda kind: kind.limited, IMPLEMENTED):
        default = kind.parameters["clamp_limit"].default
        row = f"| no `gemm1_clamp_limit` | {kind.name} | {default:g} / `output1_scale_gate_scalar`"
        assert row in text


@pytest.mark.parametrize("kind", ActivationType, ids=lambda k: k.name)
def test_the_properties_are_the_rows(kind):
    if not kind.implemented:
        assert not (kind.gated or kind.linear_up or kind.limited or kind.parameters)
        with pytest.raises(ValueError, match=f"activation is .*{kind.name}.* is implemented: Gelu"):
            _ = kind.row
        return
    row = kind.row
    layers = ELSEWHERE[kind].flashinfer
    assert layers <= set(get_args(FlashInferLayer))
    assert set(row.parameters) <= set(get_args(ParameterName))
    assert kind.linear_up == (row.gated and row.linear_up)
    assert int(kind) < OWN or not layers, "FlashInfer has no such number"
    assert row.gated or not row.parameters, "the formula of one argument reads none"


@pytest.mark.parametrize("namespace", get_args(Namespace))
def test_a_name_is_of_one_activation(namespace):
    names = Counter(
        (name, kind.gated) for kind in IMPLEMENTED for name in getattr(ELSEWHERE[kind], namespace)
    )
    assert set(names.values()) == {1}
    assert set(by_name(namespace)) == set(names)


def test_vllm_names_are_of_one_activation():
    """vLLM's names say whether they are gated, so that a name alone decides."""
    names = [name for name, _ in by_name("vllm")]
    assert len(set(names)) == len(names)


def test_a_number_that_is_no_activation():
    for number in (99, -1, "Swiglu", None, 5):
        with pytest.raises(ValueError, match=r"activation_type is .* implemented: Gelu, Relu,"):
            activation.activation_of(number, "activation_type")
    assert activation.activation_of(3, "activation_type") is ActivationType.Swiglu
