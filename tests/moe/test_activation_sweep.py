"""Activations over all of fp32: their stated errors, their bounds, and numbers that are none.

The same is asked of the reference, of the kernels in the interpreter and of the kernels on a GPU.
"""

# SPDX-License-Identifier: Apache-2.0
import math
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from moe_cases import GATED, PLAIN

from nvfp4_moe.kernels.jit import approximations
from nvfp4_moe.kernels.moe.activation import activated, limit_of_expert, of_expert
from nvfp4_moe.kernels.triton_target import INTERPRETING
from nvfp4_moe.reference import activation as reference
from nvfp4_moe.reference.activation import ActivationType, activate
from nvfp4_moe.reference.bounds.activation import activation_bounds
from nvfp4_moe.reference.bounds.interval import Interval
from nvfp4_moe.reference.weights.prepare import prepare_experts

SMALLEST = 2.0**-126
BLOCK = 1 << 15 if INTERPRETING else 1024
FUNCTIONS = ("sigmoid", "tanh", "gelu", "gelu_tanh")
KINDS = GATED + PLAIN


@triton.jit
def function_kernel(x_ptr, y_ptr, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    if FUNCTION == 0:
        y = approximations.sigmoid(x)
    elif FUNCTION == 1:
        y = approximations.tanh(x)
    elif FUNCTION == 2:
        y = approximations.gelu(x)
    else:
        y = approximations.gelu_tanh(x)
    tl.store(y_ptr + i, y)


@triton.jit
def activation_kernel(
    up_ptr,
    gate_ptr,
    y_ptr,
    scale,
    gate_scale,
    alpha_ptr,
    beta_ptr,
    limit_ptr,
    ACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    up, gate = tl.load(up_ptr + i), tl.load(gate_ptr + i)
    alpha = of_expert(alpha_ptr, 0)  # Triton 3.6 has no tuple of None
    beta = of_expert(beta_ptr, 0)
    limit = limit_of_expert(limit_ptr, gate_scale, 0, ACT)
    tl.store(y_ptr + i, activated(up, gate, scale, gate_scale, alpha, beta, limit, ACT))


def blocks(*tensors):
    """The tensors, the first one's shape for all, padded with zeros to whole blocks; the number."""
    size = -tensors[0].numel() % BLOCK
    padded = [torch.nn.functional.pad(t.flatten(), (0, size)) for t in tensors]
    return (*padded, padded[0].numel() // BLOCK)


def of_kernel(function, x):
    x, programs = blocks(x)[0], blocks(x)[1]
    y = torch.empty_like(x)
    which = FUNCTIONS.index(function)
    function_kernel[(programs,)](x, y, FUNCTION=which, BLOCK=BLOCK, enable_fp_fusion=False)
    return y


def activation_of_kernel(kind, up, gate, e):
    count = gate.numel()
    up, gate, programs = blocks(up, gate)
    y = torch.empty_like(gate)
    scale, gate_scale = e.output1_scale_scalar.item(), e.output1_scale_gate_scalar.item()
    activation_kernel[(programs,)](
        up, gate, y, scale, gate_scale, e.gemm1_alpha, e.gemm1_beta, e.gemm1_clamp_limit,
        ACT=int(kind), BLOCK=BLOCK, enable_fp_fusion=False,
    )  # fmt: skip
    return y[:count]


def every_bf16(device):
    return (torch.arange(65536, dtype=torch.int32, device=device) << 16).view(torch.float32)


def random_fp32(device, count, seed=0):
    g = torch.Generator(device).manual_seed(seed)
    bits = torch.randint(-(2**31), 2**31, (count,), dtype=torch.int32, device=device, generator=g)
    return bits.view(torch.float32)


def arguments(device):
    """All bf16 numbers, and some of fp32; many on a GPU."""
    return torch.cat(
        [every_bf16(device), random_fp32(device, 2**24 if device == "cuda" else 2**16)]
    )


def exact(function, x):
    """(the value in fp64, its allowed relative error, its allowed absolute error)."""
    below, size, one = (-x).clamp(min=0), x.abs().nan_to_num(posinf=0.0), torch.ones_like(x)
    ulp = 2.0**-23
    if function == "sigmoid":
        return torch.sigmoid(x), (6 + below) * ulp, one * SMALLEST
    if function == "tanh":
        return torch.tanh(x), 8 * one * ulp, one * 2.0**-149
    if function == "gelu":
        value = 0.5 * x * torch.special.erfc(-x / math.sqrt(2))
        return value, (10 + below.square()) * ulp, size * SMALLEST + 2.0**-149
    u = 2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    return x * torch.sigmoid(u), (10 + 6 * (-u).clamp(min=0)) * ulp, size * SMALLEST + 2.0**-149


def check_function(function, x, got):
    want, relative, absolute = exact(function, x.double())
    assert torch.equal(got.isnan(), want.isnan())
    known = ~want.isnan()
    got, want, relative, absolute = (t[known] for t in (got.double(), want, relative, absolute))
    allowed = torch.where(want == 0, 0, want.abs() * relative).nan_to_num(posinf=0.0) + absolute
    wrong = ~((got == want) | ((got - want).abs() <= allowed))
    assert not wrong.any(), (
        f"{int(wrong.sum())} wrong, first {function}({x[known][wrong][0].item()!r}) = "
        f"{got[wrong][0].item()!r}, exactly {want[wrong][0].item()!r}"
    )


@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions_of_the_kernels(function, device):
    x = arguments(device)
    check_function(function, x, of_kernel(function, x)[: x.numel()])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions_of_the_reference(function, device):
    x = arguments(device)
    own = torch.tanh if function == "tanh" else getattr(reference, function)
    check_function(function, x, own(x))


def layer(kind, device, parameters):
    """One expert, whose scalars are no powers of two with parameters, and 1 without."""
    rows = 128 if kind.gated else 64
    given = {"alpha": 1.702, "beta": 0.75, "clamp_limit": 5.0} if parameters else {}
    given = {name: given[name] for name in kind.parameters if name in given}
    w13, w2 = (torch.zeros(1, *size, dtype=torch.bfloat16) for size in ((rows, 128), (128, 64)))
    e = prepare_experts(w13.to(device), w2.to(device), kind, **given)
    scale = torch.full((1,), 1.3 if parameters else 1.0, dtype=torch.float32, device=device)
    return replace(e, output1_scale_gate_scalar=scale, output1_scale_scalar=scale / 2)


def of_reference(kind, up, gate, e):
    def first(t):
        return None if t is None else t[0]

    raw = torch.stack((up, gate), 1) if kind.gated else gate[:, None]
    return activate(
        raw,
        kind,
        e.output1_scale_scalar[0],
        e.output1_scale_gate_scalar[0],
        alpha=first(e.gemm1_alpha),
        beta=first(e.gemm1_beta),
        clamp_limit=first(e.gemm1_clamp_limit),
    )[:, 0]


def check_bounds(kind, device, implementation, parameters):
    x = arguments(device)
    e = layer(kind, device, parameters)
    for gate in x.split(2**22):
        up = gate[torch.randperm(gate.numel(), device=device)]
        raw = torch.stack((up, gate), 1) if kind.gated else gate[:, None]
        expert = torch.zeros(gate.numel(), dtype=torch.int64, device=device)
        allowed = activation_bounds(Interval.point(raw), e, expert)
        got = implementation(kind, up, gate, e)
        wrong = ~allowed.contains(got[:, None])[:, 0]
        assert not wrong.any(), (
            f"{int(wrong.sum())} outside, first up {up[wrong][0].item()!r}, gate "
            f"{gate[wrong][0].item()!r}: {got[wrong][0].item()!r}, allowed "
            f"{allowed.low[wrong][0].item()!r} to {allowed.high[wrong][0].item()!r}"
        )


@pytest.mark.parametrize("parameters", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_kernels_are_in_their_bounds(kind, device, parameters):
    check_bounds(kind, device, activation_of_kernel, parameters)


@pytest.mark.parametrize("parameters", [False, True])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_the_reference_is_in_its_bounds(kind, device, parameters):
    check_bounds(kind, device, of_reference, parameters)


SPECIAL = torch.tensor(
    [math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, 3.4e38, -3.4e38, 1e-45, -1e-45,
     1e20, -1e20, 7.0, -7.0, 40.0, -40.0], dtype=torch.float32,
)  # fmt: skip


@pytest.mark.parametrize("parameters", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_numbers_that_are_none(kind, device, parameters):
    """NaN, infinities and signs of zero are where the reference has them."""
    pairs = torch.cartesian_prod(SPECIAL, SPECIAL).to(device)
    e = layer(kind, device, parameters)
    up, gate = (t.contiguous() for t in pairs.T)
    want, got = (f(kind, up, gate, e) for f in (of_reference, activation_of_kernel))
    for what in (torch.isnan, torch.isposinf, torch.isneginf, lambda t: (t == 0) & t.signbit()):
        assert torch.equal(what(got), what(want)), pairs[what(got) != what(want)][0].tolist()


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_nan_in_is_nan_out(kind):
    numbers = SPECIAL[~SPECIAL.isnan()]
    nan = torch.full_like(numbers, math.nan)
    for parameters in (False, True):
        e = layer(kind, "cpu", parameters)
        assert of_reference(kind, numbers, nan, e).isnan().all()
        if kind.gated:
            assert of_reference(kind, nan, numbers.abs(), e).isnan().all()


def test_cutlass_clamps_nan_in_swiglu_step():
    raw = torch.tensor([[math.nan, 9.0], [2.0, math.nan], [-math.nan, math.nan], [2.0, 1.0]])
    got = activate(raw, ActivationType.SwigluStep, of_cutlass=True)[:, 0]
    assert got[:3].tolist() == [49.0, 14.0, 49.0]
    assert torch.equal(got[3:], activate(raw[3:], ActivationType.SwigluStep)[:, 0])


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_gradients_of_far_arguments_are_finite(kind):
    x = torch.tensor([[3.0, v] for v in (-1e30, -1e4, -200.0, -88.5, -1.0, 0.0, 90.0, 1e4)])
    x = (x if kind.gated else x[:, 1:]).requires_grad_()
    (grad,) = torch.autograd.grad(activate(x, kind).sum(), x)
    assert grad.isfinite().all()
