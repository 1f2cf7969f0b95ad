"""Statistics of the Triton kernels are the reference's: in the interpreter, and on a GPU.

On a GPU nothing waits, and a captured CUDA graph adds them up.
"""

# SPDX-License-Identifier: Apache-2.0
import pytest
import statistics_cases
import torch
from assertions import assert_bitwise
from moe_cases import Shape, make
from moe_triton_cases import to

import nvfp4_moe
from nvfp4_moe import fused_moe
from nvfp4_moe.cases import inputs
from nvfp4_moe.reference.recipe import NVFP44Over6Config, all_recipes
from nvfp4_moe.reference.statistics.measure import quantization_statistics, weight_statistics


@pytest.mark.parametrize("case", statistics_cases.ON_TRITON, ids=lambda f: f.__name__)
def test_case(case, device):
    case(device)


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", all_recipes(), ids=str)
def test_statistics_are_those_of_the_cpu(recipe):
    for kind in ("normal", "heavy", "edge"):
        x = inputs.synthetic(kind, 40, 64)
        ids = torch.arange(80).remainder(5).reshape(40, 2)
        got = quantization_statistics(x.cuda(), recipe, experts=ids.cuda(), num_experts=4)
        want = quantization_statistics(x, recipe, experts=ids, num_experts=4)
        statistics_cases.assert_same(got, want, f"{kind} {recipe}")
    w = inputs.synthetic("heavy", 24, 64).reshape(3, 8, 64)
    statistics_cases.assert_same(
        weight_statistics(w.cuda(), recipe), weight_statistics(w, recipe), "w"
    )


def layer():
    x, experts, ids, weights = (
        to("cuda", t) for t in statistics_cases.exact_call(Shape(9, 256, 128, 6, 3))
    )

    def call(x, stats=True):
        return nvfp4_moe.fused_moe(
            x, experts, (ids, weights), nvfp4_4over6=NVFP44Over6Config(), stats=stats
        )

    return x, call


@pytest.mark.gpu
def test_nothing_waits():
    x, call = layer()
    seen = nvfp4_moe.LayerStatistics()
    for _ in range(2):  # compiles; loads tables
        seen.record("layer", call(x))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        seen.record("layer", call(x))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert seen["layer"].hidden_states.count("rows").sum() == 3 * 9 * 3


@pytest.mark.gpu
def test_a_captured_graph_adds_at_every_replay():
    x, call = layer()
    seen = nvfp4_moe.LayerStatistics()
    seen.record("layer", call(x))
    torch.cuda.synchronize()
    once = seen["layer"].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = seen.record("layer", call(x))
    want = call(x, stats=False)
    graph.replay()
    graph.replay()
    assert_bitwise(output, want, "output of a replay")
    expected = once + once + once
    for name, part in seen["layer"].parts().items():
        statistics_cases.assert_same(part, expected.parts()[name], name)
    x.mul_(2)
    graph.replay()
    assert (
        seen["layer"].hidden_states.total().largest() == 2 * once.hidden_states.total().largest()
    ).all()


@pytest.mark.gpu
def test_values_are_counted_without_waiting_and_read_when_told(monkeypatch):
    case = make(Shape(5, 128, 64, 4, 2))
    ids, weights = case.ids.clone(), case.weights.clone()
    ids[0, 0], ids[4, 1], ids[1, 0] = 4, -7, -1
    weights[1, 0], weights[2, 1] = float("nan"), float("nan")
    x, experts, *routing = (to("cuda", t) for t in (case.x, case.experts, ids, weights))
    fused_moe(x, experts, tuple(routing), stats=True)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        _, s = fused_moe(x, experts, tuple(routing), stats=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert s.invalid.tolist() == [2, 1]
    monkeypatch.setenv("NVFP4_MOE_CHECK_VALUES", "1")
    with pytest.raises(ValueError, match=r"routing\[0\]\[0, 0\] is 4, one of 2 such values of 10"):
        fused_moe(x, experts, tuple(routing))
