"""A reload by Triton, against experts prepared anew: in the interpreter, and on a GPU.

On a GPU it is captured in a CUDA graph, takes little memory, and does not wait.
"""

# SPDX-License-Identifier: Apache-2.0
import pytest
import reload_cases as cases
import torch

from nvfp4_moe import ActivationType, fused_moe
from nvfp4_moe.reference import checks
from nvfp4_moe.reference.weights.prepare import prepare_experts

SWIGLU = ActivationType.Swiglu
LARGE = {"n": 6, "hidden": 2048, "intermediate": 768}


def test_reload_is_preparation(device):
    cases.each_way(device, "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_reload_is_preparation_on_a_gpu(backend):
    cases.each_way("cuda", backend)


def test_every_byte_is_written(device):
    cases.restored(device, "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", cases.RECIPES, ids=str)
def test_a_real_layer(recipe):
    for dtype in (torch.bfloat16, torch.float16):
        cases.reloaded(SWIGLU, "cuda", "triton", recipe=recipe, dtype=dtype, **LARGE)
    cases.reloaded(
        ActivationType.Relu2, "cuda", "triton", recipe=recipe, n=2, hidden=1024, intermediate=2688
    )


@pytest.mark.gpu
def test_checksum_is_that_of_the_cpu():
    static = {"input_amax": 1.0, "intermediate_amax": 2.0}
    experts = prepare_experts(*cases.weights(SWIGLU, 1), SWIGLU, **static)
    assert cases.moved(experts, "cuda").checksum() == experts.checksum()


@pytest.mark.gpu
def test_a_captured_graph_serves_the_new_weights():
    """Its next replay does, all of a layer at once or an expert at a time; eagerly or captured."""
    old, new = (tuple(w.cuda() for w in cases.weights(SWIGLU, seed, **LARGE)) for seed in (0, 1))
    experts = prepare_experts(*old, SWIGLU)
    x = torch.randn(9, 2048, device="cuda").bfloat16()
    ids = torch.rand(9, 6, device="cuda").argsort(1)[:, :2].int()
    routing = ids, torch.rand(9, 2, device="cuda").bfloat16()

    def call():
        return fused_moe(x, experts, routing, backend="triton")

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call()
    graph.replay()
    first = got.clone()
    want = fused_moe(x, prepare_experts(*new, SWIGLU), routing, backend="triton")
    assert not torch.equal(first, want)
    experts.load_(*new)
    graph.replay()
    assert torch.equal(got, want)
    for e in range(6):
        experts.load_(old[0][e : e + 1], old[1][e : e + 1], first=e)
    graph.replay()
    assert torch.equal(got, first)

    given = tuple(w.clone() for w in old)
    reload = torch.cuda.CUDAGraph()
    with torch.cuda.graph(reload):
        experts.load_(*given)
    for w, values in zip(given, new, strict=True):
        w.copy_(values)
    reload.replay()
    graph.replay()
    assert torch.equal(got, want)


@pytest.mark.gpu
def test_every_option_is_captured():
    """A replay writes the weights, scales, biases and parameters of the captured call anew."""
    for kind, options in cases.options_of("cuda"):
        new = tuple(w.cuda() for w in cases.weights(kind, 1))
        want = prepare_experts(*new, kind, **options)
        experts = cases.moved(want, "cuda")
        experts.load_(*new, **options)  # compile
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            experts.load_(*new, **options)
        cases.poison(experts)
        graph.replay()
        cases.assert_same(experts, want, f"{kind.name}, {sorted(options)}")


@pytest.mark.gpu
def test_little_memory_and_no_wait():
    """Beyond the old and the new weights a few bytes an expert; one expert's, where a copy must be.

    Bytes that were asked for: the allocator may hand out a block that is up to 1 MiB larger, by what
    ran before in this process, and counts all of it as allocated.
    """
    w13, w2 = (w.cuda() for w in cases.weights(SWIGLU, 1, **LARGE))
    experts = prepare_experts(*(w.cuda() for w in cases.weights(SWIGLU, 0, **LARGE)), SWIGLU)
    experts.load_(w13, w2)  # compile
    strided = w13.mT.contiguous().mT

    def peak(first):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        torch.cuda.set_sync_debug_mode("error")
        try:
            experts.load_(first, w2)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before

    few = 16 * experts.num_local
    assert peak(w13) <= few
    assert peak(strided) <= w13[0].nbytes + few


@pytest.mark.interpreter
def test_auto_never_takes_the_interpreter(monkeypatch):
    from nvfp4_moe.kernels.weights import launch as weights_launch

    monkeypatch.setattr(weights_launch, "write", None)  # raises when called
    cases.reloaded(ActivationType.Swiglu, "cpu", "auto")


@pytest.mark.interpreter
def test_weights_that_are_not_contiguous():
    kind = ActivationType.Swiglu
    w13, w2 = cases.weights(kind, 1)
    experts = prepare_experts(*cases.weights(kind, 0), kind)
    strided = w13.mT.contiguous().mT
    padded = torch.nn.functional.pad(w2, (1, 0))[..., 1:]
    assert not strided.is_contiguous() and not padded.is_contiguous()
    amax = tuple(w.abs().amax((1, 2)).float() for w in (w13, w2))
    for given in (None, amax):
        experts.load_(strided, padded, amax=given, backend="triton")
        cases.assert_same(experts, prepare_experts(w13, w2, kind), "strided")
        experts.gemm1_weights.zero_()


@pytest.mark.interpreter
def test_what_is_not_finite(monkeypatch):
    """As quantization treats it, to the bit, where values are not read, as on a GPU."""
    kind = ActivationType.Swiglu
    monkeypatch.setattr(checks, "reads_values", lambda *tensors, waits=False: False)
    for value in (float("nan"), float("inf"), -float("inf")):
        w13, w2 = cases.weights(kind, 1)
        w13[1, 5, 7] = value
        experts = prepare_experts(*cases.weights(kind, 0), kind)
        experts.load_(w13, w2, backend="triton")
        want = prepare_experts(w13, w2, kind)
        for field in ("gemm1_weights", "gemm1_weights_scale", "output1_scale_gate_scalar"):
            got, expected = getattr(experts, field)[[0, 2]], getattr(want, field)[[0, 2]]
            cases.assert_bitwise(got, expected, f"{field}, others than of {value}")
        scalar = experts.output1_scale_gate_scalar[1]
        torch.testing.assert_close(scalar, want.output1_scale_gate_scalar[1], equal_nan=True)
