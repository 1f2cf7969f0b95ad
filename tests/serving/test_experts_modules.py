"""The experts functions for transformers, on modules that are made here without it."""

# SPDX-License-Identifier: Apache-2.0
import copy
import pickle
import sys
from types import ModuleType, SimpleNamespace

import experts_model
import pytest
import torch
import torch.nn.functional as F
from assertions import assert_bitwise

import nvfp4_moe.serving.transformers
from nvfp4_moe import ActivationType, UnsupportedError, fake_quantized_moe
from nvfp4_moe.serving.active import say_active
from nvfp4_moe.serving.transformers import IMPLEMENTATIONS, prepare, register
from nvfp4_moe.serving.transformers.forward import experts_forward
from nvfp4_moe.serving.transformers.gates import Gate, gate_of
from nvfp4_moe.serving.transformers.packed import ATTRIBUTE

EXPERTS, HIDDEN, INTERMEDIATE, TOKENS = 4, 32, 48, 6


class Module(torch.nn.Module):
    """Experts with the flags that `use_experts_implementation` sets, and its gate by default."""

    def __init__(self, *, has_gate=True, has_bias=False, is_transposed=False, is_concatenated=True):
        super().__init__()
        self.has_gate, self.has_bias = has_gate, has_bias
        self.is_transposed, self.is_concatenated = is_transposed, is_concatenated
        self.act_fn = F.silu
        first, rows = ("gate_up_proj", 2 * INTERMEDIATE) if has_gate else ("up_proj", INTERMEDIATE)
        for name, n, k in ((first, rows, HIDDEN), ("down_proj", HIDDEN, INTERMEDIATE)):
            self._add(name, (k, n) if is_transposed else (n, k))
            if has_bias:
                self._add(f"{name}_bias", (n,))

    def _add(self, name, shape):
        weight = torch.randn(EXPERTS, *shape, dtype=torch.float32, device="cpu") / 4
        setattr(self, name, torch.nn.Parameter(weight.bfloat16()))

    def _apply_gate(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up


class Clamped(Module):
    """DeepSeek-V4's."""

    limit = 2.0

    def _apply_gate(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate.clamp(max=self.limit)) * up.clamp(-self.limit, self.limit)


class InTurns(Module):
    """GPT-OSS's."""

    alpha, limit = 1.702, 7.0

    def __init__(self):
        super().__init__(has_bias=True, is_transposed=True, is_concatenated=False)

    def _apply_gate(self, gate_up):
        gate, up = gate_up[..., ::2], gate_up[..., 1::2]
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + 1) * gate * torch.sigmoid(gate * self.alpha)


class Step(Module):
    """The gate clamped after its curve."""

    limit = 3.0

    def _apply_gate(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).clamp(max=self.limit) * up.clamp(-self.limit, self.limit)


class UpFirst(Module):
    """Its rows are [up; gate], against the flag."""

    def _apply_gate(self, gate_up):
        up, gate = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up


class HiddenLimit(Clamped):
    """Its limit is in no attribute that is known."""

    def __init__(self):
        super().__init__()
        self.most = self.limit
        self.limit = None

    def _apply_gate(self, gate_up):
        return F.silu(gate_up.chunk(2, -1)[0].clamp(max=self.most)) * gate_up.chunk(2, -1)[1]


class Failing(Module):
    """Its gate cannot be evaluated."""

    def _apply_gate(self, gate_up):
        raise NotImplementedError("no kernel")


def _with(curve, **flags):
    module = Module(**flags)
    module.act_fn = curve
    return module


def _tanh(x):
    return F.gelu(x, approximate="tanh")


def _relu2(x):
    return F.relu(x).square()


def _quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


KIND = ActivationType
SERVED = {
    "swiglu": (Module, Gate(KIND.Swiglu)),
    "clamped": (Clamped, Gate(KIND.Swiglu, clamp_limit=2.0)),
    "in-turns": (InTurns, Gate(KIND.Swiglu, alpha=1.702, beta=1.0, clamp_limit=7.0)),
    "step": (Step, Gate(KIND.SwigluStep, clamp_limit=3.0)),
    "geglu": (lambda: _with(F.gelu), Gate(KIND.Geglu)),
    "geglu-tanh": (lambda: _with(_tanh, is_transposed=True), Gate(KIND.GegluTanh)),
    "biases": (lambda: _with(F.silu, has_bias=True), Gate(KIND.Swiglu)),
    "relu2": (lambda: _with(_relu2, has_gate=False), Gate(KIND.Relu2)),
    "relu": (lambda: _with(F.relu, has_gate=False, has_bias=True), Gate(KIND.Relu)),
}


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setenv("FLASHINFER_DISABLE_FP4_QUANT_FAST_MATH", "1")  # the plain experts' math


def inputs(top_k=2):
    x = torch.randn(TOKENS, HIDDEN, dtype=torch.float32, device="cpu").bfloat16()
    ids = torch.randint(EXPERTS, (TOKENS, top_k))
    return x, ids, torch.rand(TOKENS, top_k, dtype=torch.float32, device="cpu")


def forward(module, *arguments, name="nvfp4_moe"):
    return experts_forward(IMPLEMENTATIONS[name], module, *arguments)


@pytest.mark.parametrize(("make", "gate"), SERVED.values(), ids=SERVED)
def test_a_module_is_read_and_computed(make, gate):
    """Its outputs are those of plain torch, which evaluates the module's own gate."""
    module = make()
    assert gate_of(module) == gate
    x, ids, weights = inputs()
    with torch.no_grad():
        for name, (activation, _) in IMPLEMENTATIONS.items():
            got = forward(module, x, ids, weights, name=name)
            want = experts_model.experts_forward(activation == "per-token", module, x, ids, weights)
            assert (got != want).float().mean() < 0.01, "an activation's last bit, at most"
            torch.testing.assert_close(got, want, rtol=0, atol=float(want.abs().max()) / 64)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (UpFirst, "_apply_gate computes none of Geglu, GegluTanh, Situ, Swiglu, SwigluStep"),
        (HiddenLimit, "_apply_gate computes none"),
        (Failing, "cannot be evaluated in fp32 on the CPU: NotImplementedError"),
        (lambda: _with(_quick_gelu), "_apply_gate computes none"),
        (lambda: _with(_quick_gelu, has_gate=False), "act_fn computes none of Gelu"),
    ],
    ids=["up-first", "hidden-limit", "failing", "quick-gelu", "no-gate"],
)
def test_an_activation_that_is_not_modelled_is_refused(make, message):
    with pytest.raises(UnsupportedError, match=message):
        forward(make(), *inputs())


def _flagged(name, value):
    module = Module()
    setattr(module, name, value)
    return module


def test_what_is_not_modelled_is_refused():
    x, ids, weights = inputs()
    with pytest.raises(UnsupportedError, match=r"Module has has_post_expert_norm, which is not"):
        forward(_flagged("has_post_expert_norm", True), x, ids, weights)
    forward(_flagged("has_post_expert_norm", False), x, ids, weights)
    with pytest.raises(UnsupportedError, match=r"Module has no flag is_transposed"):
        forward(_flagged("is_transposed", None), x, ids, weights)
    with pytest.raises(UnsupportedError, match=r"hidden states of torch.float32; .*dtype=torch.bf"):
        forward(Module(), x.float(), ids, weights)
    odd = Module()
    odd.down_proj = torch.nn.Parameter(odd.down_proj[..., :40])
    with pytest.raises(UnsupportedError, match="Module has I = 40; it must be a multiple of 16"):
        forward(odd, x, ids, weights)


def test_a_compiled_call_needs_quantized_weights(monkeypatch):
    module, arguments = Module(), inputs()
    want = forward(module, *arguments)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert_bitwise(forward(module, *arguments), want, "quantized before")
    with pytest.raises(UnsupportedError, match=r"call .*prepare\(model\) first"):
        forward(Module(), *arguments)


@torch.no_grad()
def test_weights_are_quantized_once_and_again_when_they_change():
    """In the same memory, which a CUDA graph reads."""
    module, arguments = InTurns(), inputs()
    forward(module, *arguments)
    packed = getattr(module, ATTRIBUTE)
    versions = [packed.experts.gemm1_weights._version, packed.experts.gemm1_weights.data_ptr()]
    forward(module, *arguments)
    assert packed.experts.gemm1_weights._version == versions[0], "quantized twice"

    def changed():
        fresh = InTurns()
        fresh.load_state_dict(module.state_dict())
        assert_bitwise(forward(module, *arguments), forward(fresh, *arguments), "new weights")
        assert getattr(module, ATTRIBUTE) is packed
        assert packed.experts.gemm1_weights.data_ptr() == versions[1]

    for parameter in module.parameters():
        parameter.mul_(2)
        changed()
    module.gate_up_proj = torch.nn.Parameter(module.gate_up_proj / 4)
    changed()
    module.load_state_dict(InTurns().state_dict())
    changed()
    module.down_proj.data.mul_(3)  # which torch does not count
    assert prepare(torch.nn.Sequential(module, torch.nn.Linear(2, 2))) == 1
    changed()


def test_a_copy_quantizes_its_own_weights():
    module, arguments = Module(), inputs()
    want = forward(module, *arguments)
    assert not any(name.startswith(ATTRIBUTE) for name in module.state_dict())
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_bitwise(forward(copied, *arguments), want, "a copy")
        assert getattr(copied, ATTRIBUTE) is not getattr(module, ATTRIBUTE)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@torch.no_grad()
def test_an_id_of_no_expert_here_adds_nothing(name):
    """Expert parallelism gives the slots of other ranks the id after the last one."""
    module = Module()
    x, ids, weights = inputs(1)
    want = forward(module, x, ids, weights, name=name)
    for absent in (EXPERTS, EXPERTS + 9, -1):
        more = torch.cat([ids, torch.full_like(ids, absent)], 1)
        weighted = torch.cat([weights, torch.full_like(weights, torch.nan)], 1)
        assert_bitwise(forward(module, x, more, weighted, name=name), want, f"id {absent}")


@pytest.mark.parametrize(
    ("name", "mode"),
    [("nvfp4_moe_batch_invariant", "per-token"), ("nvfp4_moe_w4a16_batch_invariant", "bf16")],
)
def test_gradients_are_those_of_the_fake_quantized_layer(name, mode):
    """They reach the module's own weights, and the forward keeps its bits."""
    module = InTurns()
    x, ids, weights = inputs()
    x.requires_grad_()
    with torch.no_grad():
        served = forward(module, x, ids, weights, name=name)
    got = forward(module, x, ids, weights, name=name)
    assert_bitwise(got.detach(), served, "with a gradient")
    got.sum().backward()

    def ours(t):
        return torch.cat([t[..., 1::2], t[..., ::2]], -1).detach()

    w13 = ours(module.gate_up_proj).mT.contiguous().requires_grad_()
    bias = ours(module.gate_up_proj_bias).requires_grad_()
    again = x.detach().requires_grad_()
    fake_quantized_moe(
        again,
        w13,
        module.down_proj.detach().mT.contiguous(),
        (ids.int(), weights),
        activation_mode=mode,
        w13_bias=bias,
        w2_bias=module.down_proj_bias.detach(),
        alpha=1.702,
        beta=1.0,
        clamp_limit=7.0,
    ).sum().backward()
    assert_bitwise(x.grad, again.grad, "x")
    assert_bitwise(ours(module.gate_up_proj.grad).mT.contiguous(), w13.grad, "w13")
    assert_bitwise(ours(module.gate_up_proj_bias.grad), bias.grad, "bias")
    assert module.down_proj.grad.abs().sum() > 0 < module.down_proj_bias.grad.abs().sum()


def test_registration_gives_transformers_every_name(monkeypatch, caplog):
    """On a stand-in for transformers, whose real one need not be here, and may be imported already."""
    registered, quantizers = {}, []
    package, integrations = ModuleType("transformers"), ModuleType("transformers.integrations.moe")
    quantizer = ModuleType("quantizer")
    quantizer.register = lambda: quantizers.append("ours")
    integrations.ExpertsInterface = SimpleNamespace(register=registered.__setitem__)
    monkeypatch.setitem(sys.modules, "transformers", package)
    monkeypatch.setitem(sys.modules, "transformers.integrations.moe", integrations)
    monkeypatch.setitem(sys.modules, "nvfp4_moe.serving.transformers.quantizer", quantizer)
    monkeypatch.setattr(nvfp4_moe.serving.transformers, "quantizer", quantizer, raising=False)
    package.__version__ = "5.6.2"
    with pytest.raises(UnsupportedError, match=r"transformers 5.6.2 is installed; .* 5.7 or later"):
        register()
    assert registered == {} and quantizers == []
    package.__version__ = "5.10.0.dev0"
    caplog.set_level("INFO", "transformers")
    say_active.cache_clear()
    register()
    assert set(registered) == set(IMPLEMENTATIONS) and quantizers == ["ours"]
    register()
    (said,) = caplog.messages
    assert "is active in transformers 5.10.0.dev0: experts_implementation of nvfp4_moe," in said
    module, arguments = Module(), inputs()
    with torch.no_grad():
        for name, function in registered.items():
            assert_bitwise(
                function(module, *arguments), forward(module, *arguments, name=name), name
            )
