"""`fake_quantized_moe` with activations in bf16, and with both backwards, against independent models."""

# SPDX-License-Identifier: Apache-2.0
import re
from dataclasses import replace

import caller_states
import pytest
import torch
import training_cases as cases
from assertions import assert_bitwise
from moe_cases import GATED, PLAIN, Shape, padded

from nvfp4_moe import ActivationType, fake_quantized_moe, prepare_experts
from nvfp4_moe.reference.moe import layer as reference
from nvfp4_moe.reference.moe.hidden_states import Activations
from nvfp4_moe.reference.recipe import Recipe
from nvfp4_moe.training import grouped

SHAPE = Shape(7, 48, 32, 5, 3)  # padded to 128 and 64
ONES = torch.ones(7, 48).bfloat16()
BF16 = {"activation_mode": "bf16"}
HIGH = {"backward": "high_precision"}
MODES = [
    pytest.param(None, BF16, id="bf16-dequantized"),
    pytest.param(None, BF16 | HIGH, id="bf16-high_precision"),
    pytest.param(Recipe(), HIGH, id="per-token-high_precision"),
]
ALL_MODES = [*MODES, pytest.param(Recipe(), {}, id="per-token-dequantized")]


@pytest.mark.parametrize("kind", [*GATED, *PLAIN], ids=lambda kind: kind.name)
def test_the_value_is_the_servers_and_the_references(kind):
    case = cases.make(SHAPE, kind, biases=True, **cases.options_of(kind))
    case.ids[3] = -1
    got = case.call(**BF16)
    assert_bitwise(got, case.served(activation="bf16"), kind.name)
    assert_bitwise(case.call(**BF16 | HIGH), got, "the backward changes nothing")
    experts = case.experts()
    x, weights = case.leaves["x"].detach(), case.leaves["weights"].detach()
    wide = Activations(padded(x, experts.padded_hidden_size))
    want = reference.fused_moe(wide, experts, case.ids, weights, finalize_order="slot").output
    assert_bitwise(got, want, "the specification")
    assert not torch.equal(got, case.call())


@pytest.mark.parametrize(("recipe", "mode"), MODES)
@pytest.mark.parametrize("kind", [*GATED, *PLAIN], ids=lambda kind: kind.name)
def test_gradients_of_every_activation(kind, recipe, mode):
    case = cases.make(SHAPE, kind, biases=True, **cases.options_of(kind))
    cases.gradients_are_those_of_autograd(case, recipe, kind.name, **mode)
    case = cases.make(SHAPE, kind, master=torch.bfloat16, weights=torch.bfloat16)
    cases.gradients_are_those_of_autograd(case, recipe, f"{kind.name}, bf16", **mode)


@pytest.mark.parametrize(("recipe", "mode"), ALL_MODES)
def test_gradients_by_the_grouped_kernels_arguments(recipe, mode, monkeypatch):
    """torch's grouped GEMM, as on an H200, in torch's own loop.

    Memory that is not written is NaN, as is the product over rows of an expert that has none.
    """
    used = []
    grouped_mm = torch.nn.functional.grouped_mm

    def counted(a, b, *, offs):
        used.append(a.dtype)
        result = grouped_mm(a, b, offs=offs)
        if b.dim() == 2:
            assert offs[1] == offs[0]
            result[1] = torch.nan
        return result

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", counted)
    monkeypatch.setattr(grouped, "of_device", lambda device: (9, 0))
    case = cases.make(SHAPE, biases=True)
    case.ids = case.ids.masked_fill(case.ids == 1, -1)
    with caller_states.deterministic():
        cases.gradients_are_those_of_autograd(case, recipe, "bf16", torch.bfloat16, **mode)
    # W4A4's raw is in fp32, for which there is no kernel.
    assert used == [torch.bfloat16] * (8 if recipe is None else 7)


def test_a_loop_is_the_grouped_gemm():
    """One expert without rows, and rows of none at the end."""
    g = torch.Generator().manual_seed(1)
    ids = torch.tensor([[0, 3], [-1, 3], [4, 0], [2, 9]], dtype=torch.int32)
    s = grouped.sort_slots(ids, 5)
    assert s.ends.tolist() == [2, 2, 3, 5, 6] and s.ends.dtype == torch.int32
    assert s.slot[:6].tolist() == [0, 5, 6, 1, 3, 4] and s.token[:6].tolist() == [0, 2, 3, 0, 1, 2]
    rows, other = torch.randn(8, 16, generator=g), torch.randn(8, 24, generator=g)
    matrices = torch.randn(5, 16, 24, generator=g)
    for dtype in (torch.float32, torch.bfloat16):
        a, b, m = rows.to(dtype), other.to(dtype), matrices.to(dtype)
        want = torch.nn.functional.grouped_mm(a, m, offs=s.ends)
        assert_bitwise(grouped.times(a, m, s.ends)[:6], want[:6], f"times, {dtype}")
        want = torch.nn.functional.grouped_mm(a.T, b, offs=s.ends)
        assert_bitwise(grouped.outer(a, b, s.ends), want, f"outer, {dtype}")
    places = torch.arange(8, dtype=torch.float32)[:, None].expand(-1, 2)
    by_slot = s.by_slot(places.masked_fill(s.slot[:, None] == 7, torch.nan))
    assert by_slot[..., 1].tolist() == [[0, 3], [0, 4], [5, 1], [2, 0]]


@pytest.mark.parametrize(
    ("capability", "kernel", "dtype"),
    [
        (None, False, torch.float32),
        ((7, 5), False, torch.float32),
        ((8, 0), False, torch.bfloat16),
        ((9, 0), True, torch.bfloat16),
        ((10, 3), True, torch.bfloat16),
        ((12, 0), False, torch.bfloat16),
    ],
)
def test_where_the_kernel_runs(capability, kernel, dtype, monkeypatch):
    monkeypatch.setattr(grouped, "of_device", lambda device: capability)
    assert grouped.operand_dtype(torch.device("cpu")) == dtype
    called = []
    monkeypatch.setattr(
        torch.nn.functional, "grouped_mm", lambda *a, offs: called.append(offs) or a[1][None]
    )
    rows, ends = torch.ones(2, 8).bfloat16(), torch.tensor([2], dtype=torch.int32)
    grouped.times(rows, torch.ones(1, 8, 8).bfloat16(), ends)
    grouped.outer(rows, rows, ends)
    assert len(called) == 2 * kernel
    grouped.times(rows.float(), torch.ones(1, 8, 8), ends)
    assert len(called) == 2 * kernel, "there is no kernel of fp32"


def test_what_the_backward_reads():
    """In W4A16 both backwards share the gradients of w2 and of the weights, and no other."""
    case = cases.make(SHAPE, biases=True)
    low, high = (case.gradients(ONES, **BF16, **more) for more in ({}, HIGH))
    for name in cases.NAMES:
        same = name in ("w2", "weights", "w2_bias")
        assert torch.equal(low[name], high[name]) == same, name


@pytest.mark.parametrize(("recipe", "mode"), ALL_MODES)
def test_slots_and_experts_that_nobody_chose(recipe, mode):
    """NaN weights in slots of no expert add nothing; experts without tokens have zeros."""
    case = cases.make(SHAPE, biases=True)
    case.ids = case.ids.masked_fill(case.ids < 2, -1)  # 0 and 1: nobody's
    case.ids[5] = -1
    none = case.ids < 0
    found = []
    for strange in (0.0, torch.nan, torch.inf):
        weights = case.leaves["weights"].detach().masked_fill(none, strange)
        case.leaves["weights"] = weights.requires_grad_()
        found.append(case.gradients(ONES, **mode))
        assert (case.call(**mode)[5] == 0).all() and (found[-1]["x"][5] == 0).all()
        assert (found[-1]["weights"][none] == 0).all()
        assert (found[-1]["weights"][~none] != 0).all()
    for name in ("w13", "w2", "w13_bias", "w2_bias"):
        got = found[0][name]
        assert (got[:2] == 0).all() and (got[2:].flatten(1) != 0).any(1).all(), name
    for other in found[1:]:
        for name, t in found[0].items():
            assert_bitwise(other[name], t, name)
    case.ids.fill_(-1)
    for name, t in case.gradients(ONES, **mode).items():
        assert t.shape == case.leaves[name].shape and not t.any(), name
    empty = cases.make(Shape(0, 48, 32, 5, 3), biases=True)
    assert empty.call(**mode).shape == (0, 48)
    for name, t in empty.gradients(ONES[:0], **mode).items():
        leaf = empty.leaves[name]
        assert t.shape == leaf.shape and t.dtype == leaf.dtype and not t.any(), name


@pytest.mark.parametrize(("recipe", "mode"), MODES)
def test_nothing_is_written_before_the_backward(recipe, mode):
    cases.nothing_is_loaded_before_the_backward("cpu", "reference", SHAPE, **mode)
    case = cases.make(SHAPE)
    y = case.call(**mode)
    with torch.no_grad():
        case.leaves["w13"] *= 0.5  # an optimizer's step, before the backward
    if "backward" in mode:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward(ONES)
    else:
        y.backward(ONES)


@pytest.mark.parametrize("state", ["default dtype", "default device", "autocast", "deterministic"])
@pytest.mark.parametrize(("recipe", "mode"), MODES)
def test_the_callers_state_changes_nothing(recipe, mode, state):
    states = caller_states.STATES | {"autocast": lambda: torch.autocast("cpu", torch.bfloat16)}
    case = cases.make(SHAPE, biases=True, clamp_limit=1.0)
    want = case.call(**mode), case.gradients(ONES, **mode)
    with states[state]():
        got = case.call(**mode), case.gradients(ONES, **mode)
    assert_bitwise(got[0], want[0], state)
    for name, t in want[1].items():
        assert_bitwise(got[1][name], t, f"{state}, {name}")


@pytest.mark.parametrize(("recipe", "mode"), MODES)
def test_only_what_is_wanted(recipe, mode):
    case = cases.make(SHAPE, biases=True)
    every = case.gradients(ONES, **mode)
    for name in case.leaves:
        for other, t in case.leaves.items():
            t.requires_grad_(other == name)
        (found,) = torch.autograd.grad(case.call(**mode), [case.leaves[name]], ONES)
        assert_bitwise(found, every[name], name)


def test_other_output_dtypes_and_loaded_experts():
    case = cases.make(SHAPE)
    experts = case.experts()
    for dtype in (torch.float16, torch.float32):
        got = case.call(**BF16, output_dtype=dtype)
        want = case.served(activation="bf16", output_dtype=dtype)
        assert_bitwise(got, want, str(dtype))
        gradients = case.gradients(ONES.to(dtype), **BF16, output_dtype=dtype)
        again = case.gradients(ONES.to(dtype), **BF16, output_dtype=dtype, experts=experts)
        for name, t in gradients.items():
            assert_bitwise(again[name], t, name)


@pytest.mark.slow
def test_torch_compile():
    """It breaks the graph at the layer, and changes no bit."""
    case = cases.make(SHAPE)

    def layer(x, w13, w2, weights):
        return fake_quantized_moe(x * 1, w13, w2, (case.ids, weights), **BF16, **HIGH)

    compiled = torch.compile(layer, backend="aot_eager")
    leaves = list(case.leaves.values())
    got, want = compiled(*leaves), layer(*leaves)
    assert_bitwise(got, want, "compiled")
    pairs = zip(
        torch.autograd.grad(got, leaves, ONES), torch.autograd.grad(want, leaves, ONES), strict=True
    )
    for a, b in pairs:
        assert_bitwise(a, b, "gradient")


X, W13, W2 = torch.zeros(2, 48).bfloat16(), torch.zeros(5, 64, 48), torch.zeros(5, 48, 32)
ROUTING = torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, 1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"activation": "bf16"}, TypeError, "what is quantized is activation_mode"),
        ({"activation": "silu"}, TypeError, "activation is 'silu'; it must be an ActivationType"),
        (
            {"activation_mode": "static"},
            ValueError,
            'is \'static\'; it must be "per-token" or "bf16"',
        ),
        ({"activation_mode": "fp8"}, ValueError, "activation_mode is 'fp8'; it must be one of"),
        (
            {"backward": "bf16"},
            ValueError,
            "backward is 'bf16'; it must be one of dequantized, high",
        ),
        ({"backward": None}, TypeError, "backward is None"),
    ],
)
def test_bad_arguments(change, error, message):
    given = {"x": X, "w13": W13, "w2": W2, "routing": ROUTING} | change
    with pytest.raises(error, match=re.escape(message)):
        fake_quantized_moe(**given)


def test_experts_that_have_no_such_gradient():
    experts = prepare_experts(W13.bfloat16(), W2.bfloat16(), ActivationType.Swiglu)
    experts = replace(experts, router_weight_on_input=True)
    with pytest.raises(ValueError, match="experts have the router's weights on the input"):
        fake_quantized_moe(X, W13, W2, ROUTING, experts=experts)
