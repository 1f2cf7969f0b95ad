"""A repeated call on a GPU: the bits of the whole call, for tensors that are elsewhere each time."""

# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import triton
from record_cases import CALLS, ROUTING, E, H, I, experts, inputs, random_bytes, recorders_of

import nvfp4_moe
from nvfp4_moe.cases.moe import cases
from nvfp4_moe.kernels import launcher
from nvfp4_moe.kernels.moe.backends import FUSED_MOE
from nvfp4_moe.kernels.records import repeats

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not launcher._DIRECT,
        reason=f"Triton {triton.__version__} launches kernels by its own code: needs Triton 3.6",
    ),
]


@pytest.fixture(autouse=True)
def recorded(monkeypatch):
    """Every recorder that has made a record, or could not."""
    made = recorders_of(monkeypatch)
    monkeypatch.setattr(repeats, "enabled", True)
    repeats.forget()
    torch.cuda.init()
    assert repeats.serve()
    yield made
    repeats.forget()


def whole(call):
    """Return the results of a call without a record, as a list of their bytes."""
    repeats.enabled = False
    try:
        return parts(call())
    finally:
        repeats.enabled = True


def parts(result):
    results = [result] if isinstance(result, torch.Tensor) else list(result)
    return [t.contiguous().view(torch.uint8).clone() for t in results]


@pytest.mark.parametrize("make", CALLS.values(), ids=CALLS)
def test_bits(recorded, make):
    """Six calls of other tensors: the first compiles, the second is recorded, the others repeat it."""
    kept = []
    for i in range(6):
        kept.append(torch.empty(1 + 1000 * i, device="cuda"))  # so that memory moves
        call = make("cuda")
        want = whole(call)
        for got in (parts(call()), parts(call())):
            assert all(torch.equal(*pair) for pair in zip(got, want, strict=True)), i
        kept.append(call)
    assert [r.refusal for r in recorded] == [None]


def test_a_thousand_repetitions(recorded):
    call = CALLS["8 tokens"]("cuda")
    want = whole(call)
    for _ in range(1000):
        assert torch.equal(parts(call())[0], want[0])
    assert len(recorded) == 1


def test_new_weights_in_place(recorded):
    (x, logits), e = inputs(4, "cuda"), experts("cuda")

    def call():
        return nvfp4_moe.fused_moe(x, e, (logits, ROUTING), backend="triton")

    for _ in range(4):
        call()
    before = parts(call())
    e.load_(
        torch.randn(E, 2 * I, H, device="cuda").bfloat16(),
        torch.randn(E, H, I, device="cuda").bfloat16(),
    )
    after = parts(call())
    assert not torch.equal(before[0], after[0])
    assert torch.equal(after[0], whole(call)[0])
    e.gemm2_weights.copy_(random_bytes(E, H, I // 2, device="cuda"))
    assert torch.equal(parts(call())[0], whole(call)[0])
    assert len(recorded) == 1


def test_in_a_graph_and_on_another_stream(recorded):
    (x, logits), e = inputs(4, "cuda"), experts("cuda")

    def call():
        return nvfp4_moe.fused_moe(x, e, (logits, ROUTING), backend="triton")

    for _ in range(4):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    x.copy_(inputs(4, "cuda")[0])
    graph.replay()
    assert torch.equal(parts(out)[0], whole(call)[0])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = call()
    stream.synchronize()
    assert torch.equal(parts(got)[0], whole(call)[0])
    assert len(recorded) == 1


def test_two_layers_take_turns(recorded):
    """The descriptors of one are not the other's."""
    layers = [CALLS["layer"]("cuda") for _ in range(3)]
    want = [whole(call)[0] for call in layers]
    for _ in range(5):
        for call, right in zip(layers, want, strict=True):
            assert torch.equal(parts(call())[0], right)


def test_every_case_of_diff(recorded):
    """Three more calls of each case that Triton serves: the whole, its record, and from the record."""

    def served(call):
        return FUSED_MOE.serve(call, "triton")

    names = []
    for case in cases():
        call = case.to("cuda").request()
        if FUSED_MOE.refusal("triton", call) is not None:
            continue
        want = parts(served(call))
        for _ in range(3):
            (got,) = parts(repeats.repeat(served, (call,), {}))
            assert torch.equal(got, want[0]), case.name
        if recorded[-1].refusal is None:
            names.append(case.name)
    assert len(names) >= 40, names
