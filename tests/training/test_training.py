"""`fake_quantized_moe` on the CPU: the server's bits forwards, a gradient that autograd agrees with."""

# SPDX-License-Identifier: Apache-2.0
import re

import pytest
import torch
import training_cases as cases
from assertions import assert_bitwise
from moe_cases import GATED, PLAIN, Shape

from nvfp4_moe import (
    ActivationType,
    Routing,
    RoutingMethodType,
    fake_quantized_moe,
    fused_moe,
    prepare_experts,
)
from nvfp4_moe.reference.moe import layer as reference
from nvfp4_moe.reference.moe.activations import quantize_activations
from nvfp4_moe.reference.moe.routing import route
from nvfp4_moe.reference.recipe import NVFP44Over6Config, Recipe

SHAPE = Shape(12, 208, 80, 7, 3)  # padded to 256 and 128
FOUR_OVER_SIX = NVFP44Over6Config(256, "MSE")
ONLINE = (Recipe(), Recipe("exact"), Recipe("exact", FOUR_OVER_SIX), Recipe(build="cute-dsl"))


def of(recipe: Recipe) -> dict:
    fast = recipe.math == "fast"
    return {"fast_math": fast, "nvfp4_4over6": recipe.four_over_six, "build": recipe.build}


@pytest.mark.parametrize("recipe", ONLINE, ids=str)
@pytest.mark.parametrize("master", [torch.float32, torch.bfloat16])
def test_the_value_is_the_servers_and_the_references(recipe, master):
    case = cases.make(SHAPE, master=master, biases=True, shift=18, recipe=recipe)
    got = case.call(**of(recipe))
    assert got.requires_grad
    assert_bitwise(got, case.served(**of(recipe)), "the server's call")
    experts = case.experts()
    wide = torch.nn.functional.pad(case.leaves["x"].detach(), (0, 48))
    want = reference.fused_moe(
        quantize_activations(wide, recipe),
        experts,
        case.ids,
        case.leaves["weights"].detach(),
        recipe=recipe,
        finalize_order="slot",
    ).output
    assert_bitwise(got, want, "the specification")


@pytest.mark.parametrize("kind", [*GATED, *PLAIN], ids=lambda kind: kind.name)
def test_the_value_of_every_activation(kind):
    case = cases.make(SHAPE, kind, biases=True, **cases.options_of(kind))
    assert_bitwise(case.call(), case.served(), kind.name)


def test_the_value_does_not_depend_on_who_watches():
    case = cases.make(SHAPE)
    want = case.call()
    with torch.no_grad():
        assert_bitwise(case.call(), want, "without gradients")
    grad = torch.ones(12, 208).bfloat16()
    gradients = case.gradients(grad)
    with torch.autocast("cpu", torch.bfloat16):
        assert_bitwise(case.call(), want, "under autocast")
        for name, got in case.gradients(grad).items():
            assert_bitwise(got, gradients[name], f"gradient of {name} under autocast")
    case = cases.make(Shape(12, 256, 64, 7, 3))  # which nothing is padded for
    want = case.call()
    for name in ("x", "w13", "w2", "weights"):
        case.leaves[name] = case.leaves[name].detach().mT.contiguous().mT
        assert not case.leaves[name].is_contiguous()
    case.ids = case.ids.mT.contiguous().mT
    assert_bitwise(case.call(), want, "of strided tensors")


def test_options_of_the_call():
    """The order of slots differs from FlashInfer's for few tokens and K > 4."""
    case = cases.make(Shape(9, 64, 64, 8, 6))
    slots = case.call(output_dtype=torch.float32)
    order = case.call(output_dtype=torch.float32, batch_invariant=False)
    assert not torch.equal(slots, order)
    assert_bitwise(slots, case.served(output_dtype=torch.float32), "batch-invariant")
    want = case.served(output_dtype=torch.float32, batch_invariant=False)
    assert_bitwise(order, want, "FlashInfer's order")


@pytest.mark.parametrize("variable", ["FLASHINFER_DISABLE_FP4_QUANT_FAST_MATH", None])
def test_the_environment_decides_for_both(variable, monkeypatch):
    if variable:
        monkeypatch.setenv(variable, "1")
    case = cases.make(SHAPE)
    assert_bitwise(case.call(), case.served(), "math of the environment")
    assert_bitwise(case.call(), case.served(fast_math=not variable), "named")


def test_experts_that_were_loaded():
    """A step's weights, loaded once; the same bits and gradients as prepared in the call."""
    old = cases.make(SHAPE, biases=True, clamp_limit=2.0)
    experts = old.experts()
    case = cases.make(SHAPE, biases=True, clamp_limit=2.0)
    case.leaves = {name: (t.detach() * 0.75).requires_grad_() for name, t in case.leaves.items()}
    detached = {name: t.detach() for name, t in case.leaves.items()}
    experts.load_(
        detached["w13"].bfloat16(),
        detached["w2"].bfloat16(),
        clamp_limit=2.0,
        w13_bias=detached["w13_bias"],
        w2_bias=detached["w2_bias"],
    )
    assert experts.checksum() == case.experts().checksum() != old.experts().checksum()
    grad = torch.ones_like(detached["x"])
    want, want_gradients = case.call(), case.gradients(grad)
    case.options = {"experts": experts}
    assert_bitwise(case.call(), want, "value")
    for name, got in case.gradients(grad).items():
        assert_bitwise(got, want_gradients[name], name)


def test_nothing_is_loaded_before_the_backward():
    cases.nothing_is_loaded_before_the_backward("cpu", "reference", SHAPE)


@pytest.mark.parametrize("kind", [*GATED, *PLAIN], ids=lambda kind: kind.name)
def test_gradients_of_every_activation(kind):
    cases.gradients_are_those_of_autograd(cases.make(SHAPE, kind), Recipe(), kind.name)
    if kind.parameters:
        case = cases.make(SHAPE, kind, **cases.options_of(kind))
        cases.gradients_are_those_of_autograd(case, Recipe(), f"{kind.name} with parameters")
    case = cases.make(SHAPE, kind, biases=True)
    cases.gradients_are_those_of_autograd(case, Recipe(), f"{kind.name} with biases")


@pytest.mark.parametrize("recipe", ONLINE[1:], ids=str)
def test_gradients_of_every_recipe(recipe):
    case = cases.make(
        SHAPE, master=torch.bfloat16, biases=True, weights=torch.bfloat16, recipe=recipe
    )
    cases.gradients_are_those_of_autograd(case, recipe, str(recipe), **of(recipe))


def test_the_gradient_is_of_the_quantized_layer():
    """Not of the layer that the master weights make, which lies further away than 2^-8."""
    case = cases.make(SHAPE)
    grad = torch.ones(12, 208).bfloat16()
    got = case.gradients(grad)
    exact = {name: t.detach().double().requires_grad_() for name, t in case.leaves.items()}
    output = torch.zeros(12, 208, dtype=torch.float64)
    for t in range(12):
        for k, e in enumerate(case.ids[t].tolist()):
            up, gate = (exact["w13"][e] @ exact["x"][t]).chunk(2)
            row = exact["w2"][e] @ (torch.nn.functional.silu(gate) * up)
            output = output + torch.eye(12)[t][:, None] * exact["weights"][t, k] * row
    want = torch.autograd.grad(output, list(exact.values()), grad.double())
    for name, t in zip(exact, want, strict=True):
        apart = (got[name].double() - t).norm() / t.norm()
        assert 2**-8 < apart < 0.5, f"{name}: {apart}"


def test_what_nobody_chose():
    """Zeros, not None: of experts without tokens, of ids that are no expert's, of no tokens."""
    case = cases.make(SHAPE, biases=True)
    case.ids = case.ids.masked_fill(case.ids < 2, -1)  # 0 and 1: nobody's
    case.ids[5] = -1
    got = case.gradients(torch.ones(12, 208).bfloat16())
    assert (case.call()[5] == 0).all() and (got["x"][5] == 0).all()
    assert (got["weights"][(case.ids < 0) | (case.ids > 6)] == 0).all()
    for name in ("w13", "w2", "w13_bias", "w2_bias"):
        assert (got[name][:2] == 0).all() and (got[name][2:].flatten(1) != 0).any(1).all()
    empty = cases.make(Shape(0, 208, 80, 7, 3), biases=True)
    assert empty.call().shape == (0, 208)
    for name, t in empty.gradients(torch.ones(0, 208).bfloat16()).items():
        assert t.shape == empty.leaves[name].shape and not t.any(), name


def test_an_expert_that_is_chosen_twice_by_one_token():
    case = cases.make(SHAPE)
    case.ids[:, 1] = case.ids[:, 0]
    cases.gradients_are_those_of_autograd(case, Recipe(), "twice")


def test_only_what_is_wanted():
    case = cases.make(SHAPE, biases=True)
    grad = torch.ones(12, 208).bfloat16()
    every = case.gradients(grad)
    for name in case.leaves:
        for other, t in case.leaves.items():
            t.requires_grad_(other == name)
        (found,) = torch.autograd.grad(case.call(), [case.leaves[name]], grad)
        assert_bitwise(found, every[name], name)


def test_beyond_a_clamp_nothing_flows():
    case = cases.make(SHAPE, clamp_limit=1e-3, biases=True)
    with torch.no_grad():
        case.leaves["w13_bias"].fill_(100.0)
    got = case.gradients(torch.ones(12, 208).bfloat16())
    assert not got["w13"].any() and not got["x"].any() and got["w2"].any()


def test_gradients_flow_through_the_routing():
    """`route` hands on what a server is given; its softmax is differentiable."""
    case = cases.make(SHAPE)
    logits = torch.randn(12, 7, generator=torch.Generator().manual_seed(3)).requires_grad_()
    routing = Routing(RoutingMethodType.Renormalize, 3)
    chosen = route(logits, routing)
    x, w13, w2 = (case.leaves[name] for name in ("x", "w13", "w2"))
    output = fake_quantized_moe(x, w13, w2, (chosen.ids, chosen.weights_bf16))
    served = fused_moe(x.detach(), case.experts(), (logits.detach(), routing), batch_invariant=True)
    assert_bitwise(output, served, "a server that routes by itself")
    grad = torch.randn(12, 208, generator=torch.Generator().manual_seed(4)).bfloat16()
    (got,) = torch.autograd.grad(output, [logits], grad)
    case.ids = chosen.ids
    case.leaves["weights"] = chosen.weights_bf16.detach().requires_grad_()
    given = case.gradients(grad)["weights"].float()
    with torch.no_grad():
        p = chosen.weights
        want = torch.zeros(12, 7).scatter_(
            1, chosen.ids.long(), p * (given - (p * given).sum(1)[:, None])
        )
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_no_second_derivative():
    case = cases.make(SHAPE)
    loss = case.call().square().sum()
    (first,) = torch.autograd.grad(loss, [case.leaves["w2"]], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_a_batch_of_the_reference_is_its_tokens():
    cases.alone_and_together("cpu", "reference", SHAPE)
    cases.inside_the_bounds("cpu", "reference", SHAPE)


X, W13, W2 = torch.zeros(2, 208).bfloat16(), torch.zeros(7, 160, 208), torch.zeros(7, 208, 80)
STATIC = {"input_amax": 1.0, "intermediate_amax": 1.0}
IDS, SCORES = torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": X.float()}, "x is float32 [2, 208]; it must be a tensor of bfloat16 [T, 208]"),
        ({"w13": W13.double()}, "w13 is float64 [7, 160, 208]; it must be a tensor of bfloat16"),
        (
            {"w2": W2[0]},
            "w2 is float32 [208, 80]; it must be a tensor of bfloat16, float16 or float32",
        ),
        ({"w2": W2[:, :192]}, "w2 is bfloat16 [7, 192, 80]; it must be"),
        ({"w13_bias": torch.zeros(7, 80)}, "w13_bias is float32 [7, 80]; it must be"),
        ({"w2_bias": torch.zeros(208)}, "w2_bias is float32 [208]; it must be"),
        (
            {"routing": (IDS.long(), SCORES)},
            "routing[0] is int64 [2, 1]; it must be a tensor of int32",
        ),
        ({"build": "cutlass"}, "build is 'cutlass'; it must be one of cuda, cute-dsl"),
        ({"backend": "cuda"}, "backend is 'cuda'; it must be one of auto"),
        ({"backend": "flashinfer:trtllm"}, "backend flashinfer:trtllm cannot serve"),
    ],
)
def test_bad_arguments(change, message):
    given = {"x": X, "w13": W13, "w2": W2, "routing": (IDS, SCORES)} | change
    with pytest.raises(ValueError, match=re.escape(message)):
        fake_quantized_moe(**given)


@pytest.mark.parametrize("routing", [SCORES, (SCORES, Routing(RoutingMethodType.TopK, 1)), (IDS,)])
def test_a_routing_that_is_not_chosen_yet(routing):
    with pytest.raises(TypeError, match=r"routing is .*; it must be two tensors"):
        fake_quantized_moe(X, W13, W2, routing)


@pytest.mark.parametrize(
    ("prepared", "change", "message"),
    [
        ({}, {"clamp_limit": 1.0}, "clamp_limit is 1.0; it must be None with experts"),
        ({}, {"recipe": Recipe()}, "recipe is "),
        ({}, {"activation": ActivationType.Geglu}, "activation is <ActivationType.Geglu"),
        (STATIC, {}, "experts have static activation scales"),
        ({}, {"w13": W13[:6]}, "w13 is float32 [6, 160, 208]; it must be a tensor"),
        ({}, {"w2": W2[:, :16]}, "w2 is float32 [7, 16, 80]; it must be a tensor"),
        ({"w2_bias": W2[..., 0]}, {}, "w2_bias is None; it must be a bias"),
        ({}, {"w13_bias": W13[..., 0]}, "w13_bias is float32 [7, 160]; it must be None"),
    ],
)
def test_experts_that_do_not_fit(prepared, change, message):
    experts = prepare_experts(W13.bfloat16(), W2.bfloat16(), **prepared)
    given = {"x": X, "w13": W13, "w2": W2, "routing": (IDS, SCORES), "experts": experts} | change
    with pytest.raises(ValueError, match=re.escape(message)):
        fake_quantized_moe(**given)
