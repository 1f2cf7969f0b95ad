"""Routing replay: a trainer takes the experts that a server recorded, weighed by its own logits."""

# SPDX-License-Identifier: Apache-2.0
import re
from dataclasses import replace

import pytest
import torch
import training_cases as cases
from assertions import assert_bitwise
from moe_cases import Shape

from nvfp4_moe import Routing, RoutingMethodType, fused_moe, trtllm_fp4_block_scale_moe
from nvfp4_moe.reference.moe.routing import METHODS, route

M = RoutingMethodType
SHAPE = Shape(9, 48, 32, 8, 2)


def routing_of(method: RoutingMethodType) -> Routing:
    more = {}
    if method == M.DeepSeekV3:
        more = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
    return Routing(method, 1 if method == M.Llama4 else 2, **more)


def bias_of(method: RoutingMethodType) -> torch.Tensor | None:
    return torch.linspace(-0.5, 0.5, 8, dtype=torch.float32) if method.biased else None


def logits_of(seed: int, tokens: int = 9) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, 8, generator=g, dtype=torch.float32)


def served(case: cases.Trained, logits: torch.Tensor, method: RoutingMethodType, record):
    """The server's own call on one token at a time, which routes by itself and records its ids."""
    e, routing = case.experts(), routing_of(method)
    outputs = []
    for t in range(len(logits)):
        outputs += trtllm_fp4_block_scale_moe(
            logits[t : t + 1], bias_of(method),
            torch.nn.functional.pad(
                case.leaves["x"].detach()[t : t + 1], (0, e.padded_hidden_size - e.hidden_size)
            ),
            None, e.gemm1_weights, e.gemm1_weights_scale, None, None, None, None,
            e.gemm2_weights, e.gemm2_weights_scale, None, e.output1_scale_scalar,
            e.output1_scale_gate_scalar, e.output2_scale_scalar, 8, routing.top_k, routing.n_group,
            routing.topk_group, e.padded_intermediate_size, 0, 8, routing.routed_scaling_factor,
            int(method), valid_hidden_size=e.hidden_size, valid_intermediate_size=e.intermediate_size,
            routing_replay_out=record[t : t + 1], batch_invariant=True,
        )  # fmt: skip
    return torch.cat(outputs)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_the_servers_record_gives_the_trainer_its_bits(method):
    """A server writes token by token in W4A16; the trainer computes all tokens in one batch."""
    case = cases.make(SHAPE)
    logits = logits_of(1)
    record = torch.full((9, routing_of(method).top_k), -1, dtype=torch.int16)
    want = served(case, logits, method, record)

    leaf = logits.clone().requires_grad_()
    chosen = route(leaf, routing_of(method), bias_of(method), ids=record)
    case.ids, case.leaves["weights"] = chosen.ids, chosen.weights_bf16
    assert_bitwise(chosen.ids, record.int(), "the server's experts")
    got = case.call(activation_mode="bf16")
    assert_bitwise(got, want, "the server's output")
    again = route(logits, routing_of(method), bias_of(method))
    assert_bitwise(chosen.weights.detach(), again.weights, "the weights of its own choice")
    (grad,) = torch.autograd.grad(got, [leaf], torch.ones_like(got))
    assert grad.isfinite().all() and (grad != 0).any(1).any()


def weights_of(logits: torch.Tensor, ids: torch.Tensor, method: RoutingMethodType) -> torch.Tensor:
    """The methods' weights in fp64, written apart from the library."""
    chosen = logits.gather(1, ids)
    if method in (M.Renormalize, M.RenormalizeNaive):
        return chosen.softmax(1)
    if method == M.TopK:
        return chosen
    if method == M.Default:
        return logits.softmax(1).gather(1, ids)
    scores = chosen.sigmoid()
    if method in (M.Llama4, M.Sigmoid, M.TopKSigmoid):
        return scores
    factor = 2.5 if method == M.DeepSeekV3 else 1.0
    return scores / scores.sum(1, keepdim=True) * factor


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_weights_and_gradients_are_those_of_the_trainers_logits(method):
    """The logits have moved since the record, so that the trainer alone would choose others."""
    routing, bias = routing_of(method), bias_of(method)
    recorded = route(logits_of(1, 200), routing, bias).ids
    logits = (logits_of(1, 200) + 0.3 * logits_of(2, 200)).requires_grad_()
    assert not torch.equal(route(logits, routing, bias).ids, recorded)
    for ids in (recorded, recorded.long(), recorded.to(torch.uint8)):
        replayed = route(logits, routing, bias, ids=ids)
        assert_bitwise(replayed.ids, recorded, "the record")
    exact = logits.detach().double().requires_grad_()
    want = weights_of(exact, recorded.long(), method)
    torch.testing.assert_close(replayed.weights.double(), want, rtol=1e-6, atol=1e-7)
    grad = torch.randn(want.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float32)
    (got,) = torch.autograd.grad(replayed.weights, [logits], grad)
    (gradient,) = torch.autograd.grad(want, [exact], grad.double())
    torch.testing.assert_close(got.double(), gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_a_gpus_functions_have_the_exact_functions_gradient(method):
    """A trainer routes with the functions of the server's GPU, and its router learns."""
    routing, bias = routing_of(method), bias_of(method)
    recorded = route(logits_of(1, 200), routing, bias).ids
    found = []
    for functions in ("exact", "hopper"):
        logits = logits_of(2, 200).requires_grad_()
        here = replace(routing, functions=functions)
        weights = route(logits, here, bias, ids=recorded).weights
        want = route(logits.detach(), here, bias, ids=recorded).weights
        assert_bitwise(weights.detach(), want, "the weights without a gradient")
        grad = torch.randn(
            want.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float32
        )
        found += torch.autograd.grad(weights, [logits], grad)
    exact, approximate = found
    assert (exact != 0).any()
    # The derivatives are of approximate numbers, each off by 2^-11 of 1 at most, two of them combined.
    torch.testing.assert_close(approximate, exact, rtol=2**-7, atol=2**-9)


@pytest.mark.parametrize("backward", ["dequantized", "high_precision"])
def test_a_step_through_the_replayed_layer(backward):
    """The router learns by the replayed weights, to the chain rule's product."""
    case, method = cases.make(SHAPE), M.Renormalize
    recorded = route(logits_of(1), routing_of(method)).ids
    logits = logits_of(2).requires_grad_()
    chosen = route(logits, routing_of(method), ids=recorded)
    case.ids, case.leaves["weights"] = chosen.ids, chosen.weights
    mode = {"activation_mode": "bf16", "backward": backward}
    got = case.call(**mode)
    routing = recorded, chosen.weights.detach()
    x = case.leaves["x"].detach()
    want = fused_moe(x, case.experts(), routing, activation="bf16", batch_invariant=True)
    assert_bitwise(got, want, "the server with the trainer's weights")
    grad = torch.randn(9, 48, generator=torch.Generator().manual_seed(4)).bfloat16()
    (found,) = torch.autograd.grad(got, [logits], grad)
    case.leaves["weights"] = chosen.weights.detach().requires_grad_()
    given = case.gradients(grad, **mode)["weights"]
    exact = logits.detach().double().requires_grad_()
    weights = weights_of(exact, recorded.long(), method)
    (want,) = torch.autograd.grad(weights, [exact], given.double())
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(9, 2), "ids is float32 [9, 2]; it must be a tensor of uint8, int16, int32"),
        (torch.zeros(9, 3, dtype=torch.int32), "ids is int32 [9, 3]; it must be"),
        (
            torch.full((9, 2), -1),
            "ids[0, 0] is -1, one of 18 such values of 18; it must be from 0 to 7",
        ),
        (torch.full((9, 2), 8), "it must be from 0 to 7"),
    ],
)
def test_a_record_that_does_not_fit(ids, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        route(logits_of(1), routing_of(M.Renormalize), ids=ids)
