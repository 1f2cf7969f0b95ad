"""Cases of a layer that is trained through, for any device and any backend.

`plain` is the layer for autograd in fp64, written apart from the library: given dequantized
weights and tokens, with the requantization as a difference that carries no gradient.
"""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import moe_cases
import pytest
import torch
from assertions import assert_bitwise, assert_inside
from moe_cases import Shape
from torch.nn import functional

from nvfp4_moe import ActivationType, fake_quantized_moe, fused_moe
from nvfp4_moe.kernels.moe.call import Mode
from nvfp4_moe.reference.bounds.accumulation import CONTIGUOUS
from nvfp4_moe.reference.bounds.moe import fused_moe_bounds
from nvfp4_moe.reference.moe.hidden_states import hidden_values, quantize_activations
from nvfp4_moe.reference.recipe import Recipe
from nvfp4_moe.reference.weights.experts import Experts
from nvfp4_moe.reference.weights.layout import gemm1_values, gemm2_values
from nvfp4_moe.reference.weights.prepare import prepare_experts
from nvfp4_moe.training.grouped import operand_dtype

A = ActivationType
LIMIT = 1.5
NAMES = ("x", "w13", "w2", "weights", "w13_bias", "w2_bias")


@dataclass
class Trained:
    """Leaves that require gradients, and what else a call needs."""

    leaves: dict[str, torch.Tensor]
    ids: torch.Tensor
    activation: ActivationType
    options: dict[str, Any] = field(default_factory=dict)  # of `prepare_experts`, but the biases

    def call(self, **more: Any) -> torch.Tensor:
        x, w13, w2, weights = (self.leaves[name] for name in NAMES[:4])
        biases = {name: self.leaves[name] for name in NAMES[4:] if name in self.leaves}
        return fake_quantized_moe(
            x, w13, w2, (self.ids, weights), self.activation, **biases, **self.options | more
        )

    def gradients(self, grad: torch.Tensor, **more: Any) -> dict[str, torch.Tensor]:
        found = torch.autograd.grad(self.call(**more), list(self.leaves.values()), grad)
        return dict(zip(self.leaves, found, strict=True))

    def experts(self) -> Experts:
        """As a server prepares them, which knows nothing of gradients."""
        given = {name: t.detach() for name, t in self.leaves.items()}
        biases = {name: given[name] for name in NAMES[4:] if name in given}
        w13, w2 = (given[name].bfloat16() for name in ("w13", "w2"))
        return prepare_experts(w13, w2, self.activation, **biases, **self.options)

    def served(self, experts: Experts | None = None, **more: Any) -> torch.Tensor:
        routing = self.ids, self.leaves["weights"].detach()
        x = self.leaves["x"].detach()
        return fused_moe(x, experts or self.experts(), routing, **{"batch_invariant": True} | more)


def make(
    shape: Shape,
    activation: ActivationType = A.Swiglu,
    *,
    device: str = "cpu",
    master: torch.dtype = torch.float32,
    biases: bool = False,
    weights: torch.dtype = torch.float32,
    shift: int = 0,
    **options: Any,
) -> Trained:
    """shift: w13 times 2^shift and w2 divided by it; 18 leaves the range of fp16."""
    w13, w2 = moe_cases.weights_of(shape, activation)
    ids, scores = moe_cases.routing_of(shape, dtype=weights)
    leaves = {
        "x": moe_cases.hidden_states(shape),
        "w13": w13.to(master),
        "w2": w2.to(master),
        "weights": scores,
    }
    g = torch.Generator().manual_seed(9)
    if master == torch.float32:  # values that bf16 does not hold
        for name, power in (("w13", 2.0**shift), ("w2", 2.0**-shift)):
            w = leaves[name]
            leaves[name] = w * (1 + torch.rand(w.shape, generator=g) / 256) * power
    if biases:
        for name, w in (("w13_bias", w13), ("w2_bias", w2)):
            leaves[name] = torch.randn(w.shape[:2], generator=g)
    on = {name: t.to(device).requires_grad_() for name, t in leaves.items()}
    return Trained(on, ids.to(device), activation, options)


def options_of(activation: ActivationType) -> dict[str, float]:
    """Some value of every parameter that the activation reads."""
    values = {"alpha": 1.25, "beta": 0.75, "clamp_limit": LIMIT}
    return {name: values[name] for name in activation.parameters}


def activations(kind: ActivationType, given: dict[str, float]) -> Callable[..., torch.Tensor]:
    """In physical units, of raw [N, M1]."""
    alpha, beta = given.get("alpha", 1.0), given.get("beta", 0.0 if kind == A.Swiglu else 1.0)
    limit = given.get("clamp_limit", 7.0 if kind == A.SwigluStep else torch.inf)

    def two(raw: torch.Tensor) -> torch.Tensor:
        up, gate = raw.chunk(2, -1)
        up = up.clamp(-limit, limit)
        if kind == A.SwigluStep:
            return functional.silu(gate).clamp(max=limit) * up
        gate = gate.clamp(max=limit)
        if kind == A.Swiglu:
            return gate * torch.sigmoid(alpha * gate) * (up + beta)
        if kind == A.Situ:
            bounded = alpha * torch.tanh(gate / alpha) * torch.sigmoid(gate)
            return beta * torch.tanh(up / beta) * bounded
        return functional.gelu(gate, approximate="tanh" if kind == A.GegluTanh else "none") * up

    one: dict[ActivationType, Callable[..., torch.Tensor]] = {
        A.Identity: lambda raw: raw,
        A.Relu: torch.relu,
        A.Relu2: lambda raw: raw.relu() ** 2,
        A.Silu: functional.silu,
        A.Gelu: functional.gelu,
    }
    return two if kind.gated else one[kind]


def dequantized(x: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    a = quantize_activations(x, recipe)
    assert a.per_token_scale is not None
    return hidden_values(a).double() * a.per_token_scale.double()[:, None]


def bf16(x: torch.Tensor) -> torch.Tensor:
    return x.detach().float().bfloat16()


def plain(
    case: Trained,
    grad: torch.Tensor,
    recipe: Recipe | None,
    backward: str = "dequantized",
) -> dict[str, torch.Tensor]:
    """Gradients, fp64, of the leaves, by autograd.

    recipe: of the activations; None: they stay bf16. A difference that carries no gradient gives each
    product the forward's value, whatever its factors are.
    """
    experts = case.experts()
    h, i = experts.hidden_size, experts.intermediate_size
    padded = experts.padded_intermediate_size
    rows = [*range(i), *range(padded, padded + i)] if case.activation.gated else [*range(i)]
    masters = {name: t.detach() for name, t in case.leaves.items()}
    masters |= {name: masters[name].bfloat16() for name in ("w13", "w2")}
    told = {name: t.double() for name, t in masters.items()}
    if recipe is not None:
        told["x"] = dequantized(masters["x"], recipe)
    for e in range(experts.num_local):
        scale1 = experts.output1_scale_gate_scalar[e].double()
        told["w13"][e] = gemm1_values(experts, e)[rows, :h].double() * scale1
        scale2 = experts.output2_scale_scalar[e].double()
        told["w2"][e] = gemm2_values(experts, e)[:h, :i].double() * scale2
    high = backward == "high_precision"
    values = {name: t.double().clone() for name, t in (masters if high else told).items()}
    for t in values.values():
        t.requires_grad_()
    act = activations(case.activation, case.options)

    def valued(t: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return t + (value - t).detach()

    output = torch.zeros_like(values["x"])
    for t in range(case.ids.shape[0]):
        for k, e in enumerate(case.ids[t].tolist()):
            if not 0 <= e < experts.num_local:
                continue
            raw = valued(values["w13"][e] @ values["x"][t], told["w13"][e] @ told["x"][t])
            raw = raw + values["w13_bias"][e] if "w13_bias" in values else raw
            mid = act(raw)
            rounded = bf16(mid)
            read = rounded.double() if recipe is None else dequantized(rounded[None], recipe)[0]
            mid = valued(mid, rounded.double() if high else read)
            row = valued(values["w2"][e] @ mid, told["w2"][e] @ read)
            row = row + values["w2_bias"][e] if "w2_bias" in values else row
            row = valued(row, bf16(row).double())
            chosen = torch.zeros_like(output)
            chosen[t] = 1
            output = output + chosen * values["weights"][t, k] * row
    found = torch.autograd.grad(output, list(values.values()), grad.double())
    return dict(zip(values, found, strict=True))


def assert_near(
    got: torch.Tensor, want: torch.Tensor, what: str, operands: torch.dtype = torch.float32
) -> None:
    """By the norm of each expert, or of all. A bf16 gradient is rounded by 2^-9 of itself.

    fp32 ones agree to 1e-6, but where another order of a sum moves a row or an intermediate over a
    border: by 2^-9 or a step of e2m1, in one element of thousands. With bf16 operands five roundings by
    2^-9 follow one another: up, gate, activation, weighted factor and result.
    """
    most = 2**-8 if got.dtype == torch.bfloat16 else 2**-10
    if operands == torch.bfloat16:
        most = 5 * 2**-9
    parts = zip(got, want, strict=True) if got.dim() == 3 else [(got, want)]
    for e, (a, b) in enumerate(parts):
        error, norm = (a.double() - b.double()).norm(), b.double().norm()
        assert error <= most * norm, f"{what}, part {e}: {error:.3g} of {norm:.3g}"


def gradients_are_those_of_autograd(
    case: Trained,
    recipe: Recipe | None,
    what: str,
    operands: torch.dtype = torch.float32,
    **more: Any,
) -> None:
    g = torch.Generator().manual_seed(5)
    grad = torch.randn(case.leaves["x"].shape, generator=g).bfloat16()
    got = case.gradients(grad, **more)
    want = plain(case, grad, recipe, more.get("backward", "dequantized"))
    for name, leaf in case.leaves.items():
        assert got[name].dtype == leaf.dtype and got[name].shape == leaf.shape
        assert_near(got[name], want[name], f"{what}, {name}", operands)


def alone_and_together(device: str, backend: str, shape: Shape, mode: Mode = "per-token") -> None:
    """A trainer's batch against a server that is given the tokens one at a time, and in pairs."""
    case = make(shape, device=device, biases=True, clamp_limit=4.0)
    trained = case.call(backend=backend, activation_mode=mode)
    server = case.experts()
    x, weights = case.leaves["x"].detach(), case.leaves["weights"].detach()
    for size in (1, 2):
        for start in range(0, shape.tokens, size):
            some = slice(start, start + size)
            routing = case.ids[some], weights[some]
            got = fused_moe(
                x[some], server, routing, activation=mode, backend=backend, batch_invariant=True
            )
            assert_bitwise(trained[some], got, f"{backend}, {size} from {start}")


def inside_the_bounds(device: str, backend: str, shape: Shape) -> None:
    """Check what every implementation of the contract must keep, FlashInfer's kernels among them."""
    case = make(shape, device=device)
    got = case.call(backend=backend)
    activations = quantize_activations(
        moe_cases.padded(case.leaves["x"].detach(), case.experts().padded_hidden_size), Recipe()
    )
    interval = fused_moe_bounds(
        activations,
        case.experts(),
        case.ids,
        case.leaves["weights"].detach(),
        finalize_order="slot",
        accumulation=CONTIGUOUS,
    ).output
    assert_inside(got, interval, backend)


def gradients_are_the_references(device: str, backend: str, shape: Shape, **more: Any) -> None:
    """The same on every device, but for the operands' rounding on GPUs; expert 1 has no slot."""
    grad = torch.randn(shape.tokens, shape.hidden, generator=torch.Generator().manual_seed(5))
    want_of, case = make(shape, biases=True), make(shape, device=device, biases=True)
    for each in (want_of, case):
        each.ids = each.ids.masked_fill(each.ids == 1, -1)
    want = want_of.gradients(grad.bfloat16(), backend="reference", **more)
    got = case.gradients(grad.bfloat16().to(device), backend=backend, **more)
    for name, t in want.items():
        assert_near(got[name].cpu(), t, f"{backend}, {name}", operand_dtype(torch.device(device)))
    assert not got["w13"][1].any() and not got["w2"][1].any()


def nothing_is_loaded_before_the_backward(
    device: str, backend: str, shape: Shape, **more: Any
) -> None:
    case = make(shape, device=device)
    experts = case.experts()
    w13, w2 = (case.leaves[name].detach().bfloat16() for name in ("w13", "w2"))
    grad = torch.ones(shape.tokens, shape.hidden, dtype=torch.bfloat16, device=device)
    for some in (slice(None), slice(1, 2)):
        y = case.call(experts=experts, backend=backend, **more)
        experts.load_(w13[some], w2[some], first=some.start or 0, backend=backend)
        with pytest.raises(RuntimeError, match="experts were written between this forward and its"):
            y.backward(grad)
        assert all(leaf.grad is None for leaf in case.leaves.values())
    case.call(experts=experts, backend=backend, **more).backward(grad)
    assert case.leaves["w13"].grad is not None
