"""Training on a GPU: its batches against a server's single tokens, its gradients against the CPU's."""

# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import training_cases as cases
from assertions import assert_bitwise
from marks import ON_A_GPU
from moe_cases import Shape

from nvfp4_moe import fake_quantized_moe, fused_moe

pytestmark = ON_A_GPU
SHAPES = [Shape(64, 208, 80, 7, 3), Shape(64, 2048, 768, 16, 4)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_batch_is_its_tokens(backend, shape):
    if backend == "reference" and shape.hidden > 1000:
        shape = Shape(8, 2048, 768, 16, 4)  # it is slow
    cases.alone_and_together("cuda", backend, shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_inside_the_bounds(shape):
    cases.inside_the_bounds("cuda", "triton", shape)


def test_gradients_are_the_references():
    for backend in ("triton", "reference", "auto"):
        cases.gradients_are_the_references("cuda", backend, SHAPES[0])


def test_nothing_is_loaded_before_the_backward():
    cases.nothing_is_loaded_before_the_backward("cuda", "triton", Shape(9, 256, 128, 4, 2))


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
        case.leaves["x"], case.leaves["w13"], case.leaves["w2"], (case.ids, weights),
        experts=server, backend="triton",
    )  # fmt: skip
    assert_bitwise(again, got, "of the experts that were loaded")
    again.sum().backward()
    assert all(case.leaves[n].grad.isfinite().all() for n in ("x", "w13", "w2"))
