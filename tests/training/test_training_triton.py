"""Training through the Triton kernels: in the interpreter, and on a GPU.

A trainer's batch has the bits of a server's single tokens; gradients are those of the CPU.
"""

# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import training_cases as cases
from assertions import assert_bitwise
from moe_cases import Shape

from nvfp4_moe import fake_quantized_moe, fused_moe
from nvfp4_moe.training import grouped

SHAPES = [Shape(64, 208, 80, 7, 3), Shape(64, 2048, 768, 16, 4)]
SMALL = Shape(4, 208, 80, 3, 2)
PLACES = [
    pytest.param("cpu", SMALL, marks=pytest.mark.interpreter, id=f"interpreter-{SMALL}"),
    *(pytest.param("cuda", shape, marks=pytest.mark.gpu, id=f"gpu-{shape}") for shape in SHAPES),
]


@pytest.mark.parametrize("mode", ["per-token", "bf16"])
@pytest.mark.parametrize("device,shape", PLACES)
def test_a_batch_is_its_tokens(device, shape, mode):
    cases.alone_and_together(device, "triton", shape, mode)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [SHAPES[0], Shape(8, 2048, 768, 16, 4)], ids=str)
def test_a_batch_is_its_tokens_in_the_reference(shape):
    """The reference is slow, so the wide layer has few tokens."""
    cases.alone_and_together("cuda", "reference", shape)


@pytest.mark.parametrize("device,shape", PLACES)
def test_inside_the_bounds(device, shape):
    cases.inside_the_bounds(device, "triton", shape)


@pytest.mark.parametrize("device,shape", PLACES[:2])
def test_gradients_are_the_references(device, shape):
    for backend in ("triton", "reference", "auto") if device == "cuda" else ("triton",):
        cases.gradients_are_the_references(device, backend, shape)


@pytest.mark.gpu
@pytest.mark.parametrize("backward", ["dequantized", "high_precision"])
@pytest.mark.parametrize("mode", ["per-token", "bf16"])
@pytest.mark.parametrize("shape", [*SHAPES, Shape(64, 208, 80, 150, 2)], ids=str)
def test_gradients_of_every_mode(shape, mode, backward):
    """By the GPU's grouped GEMM and kernels; the last layer has more experts than rows of some."""
    more = {"activation_mode": mode, "backward": backward}
    cases.gradients_are_the_references("cuda", "auto", shape, **more)


@pytest.mark.gpu
@pytest.mark.parametrize("backward", ["dequantized", "high_precision"])
@pytest.mark.parametrize("mode", ["per-token", "bf16"])
def test_a_step_in_a_cuda_graph(mode, backward):
    """Where the grouped GEMM has a kernel the backward does not wait, so that it can be captured."""
    if not grouped.has_kernel(torch.device("cuda")):
        pytest.skip("torch's grouped GEMM has no kernel for this GPU, and the loop waits for it")
    case = cases.make(Shape(33, 256, 128, 8, 3), device="cuda", biases=True)
    grad = torch.randn(33, 256, device="cuda", dtype=torch.float32).bfloat16()
    options = {"activation_mode": mode, "backward": backward, "experts": case.experts()}
    want = case.gradients(grad, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = case.gradients(grad, **options)
    for t in got.values():
        t.fill_(torch.nan)
    graph.replay()
    for name, t in want.items():
        assert torch.equal(got[name], t), name


def test_nothing_is_loaded_before_the_backward(device):
    shape = SMALL if device == "cpu" else Shape(9, 256, 128, 4, 2)
    cases.nothing_is_loaded_before_the_backward(device, "triton", shape)


@pytest.mark.gpu
def test_a_large_batch_and_a_reload():
    """4096 tokens, whose tiles are other ones; the server's experts loaded by Triton."""
    shape = Shape(4096, 2048, 768, 16, 4)
    case = cases.make(shape, device="cuda")
    server = case.experts()
    with torch.no_grad():
        for name in ("w13", "w2"):
            case.leaves[name] *= 0.75
    w13, w2 = (case.leaves[name].detach().bfloat16() for name in ("w13", "w2"))
    server.load_(w13, w2)
    assert server.checksum() == case.experts().checksum()
    got = case.call(backend="triton")
    x, weights = case.leaves["x"].detach(), case.leaves["weights"].detach()
    order = torch.randperm(4096, device="cuda")
    for some in order.split((1, 3, 60, 1000, 3032)):
        routing = case.ids[some], weights[some]
        served = fused_moe(x[some], server, routing, backend="triton", batch_invariant=True)
        assert_bitwise(got[some], served, f"{len(some)} tokens")
    again = fake_quantized_moe(
        case.leaves["x"],
        case.leaves["w13"],
        case.leaves["w2"],
        (case.ids, weights),
        experts=server,
        backend="triton",
    )
    assert_bitwise(again, got, "of the experts that were loaded")
    again.sum().backward()
    assert all(case.leaves[n].grad.isfinite().all() for n in ("x", "w13", "w2"))
