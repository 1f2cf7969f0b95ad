"""The drop-in for vLLM's TRT-LLM experts: its results on the reference, and vLLM's own sources."""

# SPDX-License-Identifier: Apache-2.0
import ast
import inspect
import sys
from types import ModuleType, SimpleNamespace

import moe_cases
import pytest
import torch
from assertions import assert_bitwise
from moe_cases import Shape
from server_sources import arguments_of, attributes_of, members_of, source_of

import nvfp4_moe
from nvfp4_moe import UnsupportedError
from nvfp4_moe.kernels import environment
from nvfp4_moe.reference.activation import ActivationType
from nvfp4_moe.serving import SERVERS
from nvfp4_moe.serving import vllm as ours

SHAPE = Shape(5, 128, 128, 8, 2, 4, 4)
EXPERTS = "model_executor/layers/fused_moe/experts/trtllm_nvfp4_moe.py"
SILU = SimpleNamespace(value="silu")


class Experts:
    """The attributes that vLLM's two classes get from their base and from the modular kernel."""

    def __init__(self, experts, shape, *, chunk=300000, defer=False, hook=None):
        static = experts.input_scale is not None
        self.quant_config = SimpleNamespace(
            w1_scale=experts.gemm1_weights_scale,
            w2_scale=experts.gemm2_weights_scale.view(torch.uint8),
            g1_alphas=experts.output1_scale_gate_scalar,
            g2_alphas=experts.output2_scale_scalar,
            a1_gscale=torch.ones(shape.num_local),
        )
        self.moe_config = SimpleNamespace(should_defer_moe_finalize=lambda t: defer and t > 0)
        self.g1_scale_c = experts.output1_scale_scalar
        self.per_token_activation = not static
        self.gemm1_alpha, self.gemm1_beta = experts.gemm1_alpha, experts.gemm1_beta
        self.gemm1_clamp_limit = experts.gemm1_clamp_limit
        self.routing_method_type, self.topk = 1, shape.top_k
        self.intermediate_size_per_partition = experts.padded_intermediate_size
        self.local_num_experts, self.ep_rank = shape.num_local, shape.offset // shape.num_local
        self.post_gemm2_hook, self._chunk = hook, chunk

    def _get_chunk_size(self):
        return self._chunk

    def _uses_post_gemm2_hook(self, tokens):
        return self.post_gemm2_hook is not None and tokens > 0

    def _run_post_gemm2_hook(self, unfinalized, output=None):
        if output is None:
            output = torch.empty(unfinalized.tokens, 128, dtype=torch.bfloat16)
        self.post_gemm2_hook(unfinalized, output)
        return output


@pytest.fixture(autouse=True)
def vllm(monkeypatch):
    for name in environment.VARIABLES:
        if name not in environment.CACHE_VARIABLES:
            monkeypatch.delenv(name, raising=False)
    parts = ["vllm", "model_executor", "layers", "fused_moe", "moe_output"]
    for i in range(1, len(parts) + 1):
        module = ModuleType(".".join(parts[:i]))
        module.__path__ = []
        monkeypatch.setitem(sys.modules, module.__name__, module)

    def convert(flashinfer_output, *, do_finalize, num_tokens, top_k):
        assert not do_finalize
        rows, weights, permuted = flashinfer_output
        return SimpleNamespace(
            rows=rows, weights=weights, permuted=permuted, tokens=num_tokens, top_k=top_k
        )

    module.convert_flashinfer_moe_output = convert


def arguments(case, activation=SILU, output=None):
    """Return the arguments of `apply_modular` after the experts."""
    a, e = case.activations, case.experts
    x, scale = (case.x, None) if e.input_scale is None else (a.hidden_states, a.block_scales)
    output = torch.full_like(case.x, torch.nan) if output is None else output
    return (
        output, x, e.gemm1_weights, e.gemm2_weights, case.weights, case.ids.long(), activation,
        SHAPE.experts, None, scale, None, torch.empty(0), torch.empty(0), None, False,
    )  # fmt: skip


def wanted(case):
    return nvfp4_moe.fused_moe(
        case.x, case.experts, (case.ids, case.weights), num_experts=8, local_expert_offset=4
    )


@pytest.mark.parametrize("chunk", [300000, 2])
@pytest.mark.parametrize("mode", ["per-token", "static"])
@pytest.mark.parametrize("kind", ["silu", "gelu", "situ", "relu2_no_mul"])
def test_modular(kind, mode, chunk):
    activation = {
        "silu": ActivationType.Swiglu,
        "gelu": ActivationType.Geglu,
        "situ": ActivationType.Situ,
        "relu2_no_mul": ActivationType.Relu2,
    }[kind]
    limit = {"clamp_limit": 2.0} if kind == "silu" else {}
    case = moe_cases.make(SHAPE, activation, mode, **limit)
    given = arguments(case, SimpleNamespace(value=kind))
    assert ours.apply_modular(Experts(case.experts, SHAPE, chunk=chunk), *given) is None
    assert_bitwise(given[0], wanted(case), "output")


@pytest.mark.parametrize("mode", ["per-token", "static"])
def test_no_tokens(mode):
    case = moe_cases.make(SHAPE, mode=mode)
    given = [a[:0] if isinstance(a, torch.Tensor) and len(a) == 5 else a for a in arguments(case)]
    assert ours.apply_modular(Experts(case.experts, SHAPE, defer=True), *given) is None


def test_deferred_finalize_and_the_hook():
    case = moe_cases.make(SHAPE, weights_dtype=torch.float32)
    given = arguments(case)
    got = ours.apply_modular(Experts(case.experts, SHAPE, defer=True), *given)
    assert got.tokens == 5 and got.top_k == 2 and given[0].isnan().all()
    assert_bitwise(got.weights, case.weights, "weights, in their own dtype")

    calls = []

    def hook(unfinalized, output):
        calls.append(unfinalized)
        output.fill_(1)

    experts = Experts(case.experts, SHAPE, hook=hook, chunk=3, defer=True)
    assert ours.apply_modular(experts, *given) is None
    assert [c.tokens for c in calls] == [3, 2] and given[0].eq(1).all()


@pytest.mark.parametrize("mode", ["per-token", "static"])
def test_monolithic(mode):
    case = moe_cases.make(SHAPE, mode=mode)
    g = torch.Generator().manual_seed(3)
    logits, bias = torch.randn(5, 8, generator=g), torch.randn(8, generator=g)
    x, scale = arguments(case)[1], arguments(case)[9]
    e = case.experts
    experts = Experts(e, SHAPE)
    experts.routing_method_type = 2
    given = (
        x,
        e.gemm1_weights,
        e.gemm2_weights,
        logits,
        SILU,
        8,
        None,
        scale,
        False,
        4,
        bias,
        2.5,
        2,
    )
    got = ours.apply_monolithic(experts, *given)
    want = nvfp4_moe.fused_moe(
        case.x,
        e,
        (logits, nvfp4_moe.Routing(nvfp4_moe.RoutingMethodType.DeepSeekV3, 2, 4, 2, 2.5)),
        routing_bias=bias,
        local_expert_offset=4,
    )
    assert_bitwise(got, want, "output")

    deferred = Experts(e, SHAPE, defer=True)
    deferred.routing_method_type = 2
    assert ours.apply_monolithic(deferred, *given).tokens == 5
    hooked = Experts(e, SHAPE, hook=lambda unfinalized, output: output.fill_(1))
    hooked.routing_method_type = 2
    assert ours.apply_monolithic(hooked, *given).eq(1).all()
    with pytest.raises(UnsupportedError, match="routing_replay_out"):
        ours.apply_monolithic(experts, *given, routing_replay_out=logits)
    with pytest.raises(UnsupportedError, match="is False with routing method 3, Llama4"):
        experts.routing_method_type = 3
        ours.apply_monolithic(experts, *given)


def test_refusals(monkeypatch):
    case = moe_cases.make(SHAPE, mode="static")
    given = arguments(case)
    with pytest.raises(UnsupportedError, match="apply_router_weight_on_input"):
        ours.apply_modular(Experts(case.experts, SHAPE), *given[:-1], True)
    with pytest.raises(UnsupportedError, match="activation is 'swiglustep'"):
        experts = Experts(case.experts, SHAPE)
        ours.apply_modular(experts, *arguments(case, SimpleNamespace(value="swiglustep")))
    monkeypatch.setenv(environment.SWITCH_VARIABLES[0], "1")
    with pytest.raises(UnsupportedError, match="has made this layer with static activation scales"):
        ours.apply_modular(Experts(case.experts, SHAPE), *given)


_TREE = ast.parse(inspect.getsource(ours))


def reads(name: str) -> set[str]:
    return {
        n.attr
        for n in ast.walk(_TREE)
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == name
    }


def test_vllm_has_every_attribute_that_is_read():
    kernel = "model_executor/layers/fused_moe/modular_kernel.py"
    has = attributes_of("vllm", EXPERTS, "TrtLlmNvFp4ExpertsBase")
    for name in ("FusedMoEExperts", "FusedMoEExpertsModular", "FusedMoEExpertsMonolithic"):
        has |= attributes_of("vllm", kernel, name)
    assert reads("experts") <= has, sorted(reads("experts") - has)
    quant = attributes_of(
        "vllm", "model_executor/layers/fused_moe/config.py", "FusedMoEQuantConfig"
    )
    assert reads("scales") <= quant, sorted(reads("scales") - quant)
    config = "model_executor/layers/fused_moe/config.py"
    assert "should_defer_moe_finalize" in attributes_of("vllm", config, "FusedMoEConfig")


def test_apply_has_vllms_arguments():
    for function, name in (
        (ours.apply_modular, "TrtLlmNvFp4ExpertsModular"),
        (ours.apply_monolithic, "TrtLlmNvFp4ExpertsMonolithic"),
    ):
        theirs = arguments_of("vllm", EXPERTS, "apply", name)
        assert ["experts", *theirs[1:]] == list(inspect.signature(function).parameters)


def test_activations_are_those_of_vllms_experts():
    path = "model_executor/layers/fused_moe/activation.py"
    values = members_of("vllm", path, "MoEActivation")
    supported = source_of("vllm", EXPERTS).partition("def _supports_activation")[2]
    accepted = supported.partition("@staticmethod")[0]
    names = {name for name in values if f"MoEActivation.{name}," in accepted} | {"SITU"}
    assert {values[name] for name in names} == set(ours._ACTIVATIONS)


def test_the_table_has_every_backend_of_vllm():
    tree = ast.parse(source_of("vllm", "model_executor/layers/fused_moe/oracle/nvfp4.py"))
    (function,) = [
        n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "map_nvfp4_backend"
    ]
    (mapping,) = [n for n in ast.walk(function) if isinstance(n, ast.Dict)]
    assert {key.value for key in mapping.keys} == set(SERVERS["vllm"].backends)


def test_llama4_has_the_number_that_is_written():
    config = "model_executor/layers/fused_moe/config.py"
    theirs = members_of("vllm", config, "RoutingMethodType")["Llama4"]
    assert theirs == nvfp4_moe.RoutingMethodType.Llama4 == 3
