"""The drop-in for SGLang: its results on the reference, and its attributes in SGLang's own sources."""

# SPDX-License-Identifier: Apache-2.0
import ast
import enum
import importlib.util
import inspect
import sys
from dataclasses import dataclass, fields
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import moe_cases
import pytest
import torch
from assertions import assert_bitwise
from moe_cases import Shape
from server_sources import (
    VERSIONS,
    arguments_of,
    attributes_of,
    class_of,
    fields_of,
    folder_of,
    members_of,
    source_of,
)

import nvfp4_moe
from nvfp4_moe import UnsupportedError, nvfp4_quantize
from nvfp4_moe.kernels import environment
from nvfp4_moe.reference.activation import ActivationType
from nvfp4_moe.reference.moe.routing import pack_topk
from nvfp4_moe.reference.recipe import NVFP44Over6Config, Recipe, SfLayout
from nvfp4_moe.reference.weights.experts import Experts
from nvfp4_moe.serving import SERVERS, fused_experts_fp4
from nvfp4_moe.serving import sglang as ours
from nvfp4_moe.serving.sglang import fused_experts_none_to_flashinfer_trtllm_fp4 as drop_in

SHAPE = Shape(5, 128, 64, 8, 2, 3, 4)
TRTLLM = "srt/layers/moe/moe_runner/flashinfer_trtllm.py"
TOPK = "srt/layers/moe/topk.py"
STANDARD = "srt/layers/moe/token_dispatcher/standard.py"


class Format(enum.IntEnum):
    STANDARD = 1
    TRITON_KERNEL = 2
    BYPASSED = 3
    PACKED = 4


class Dispatched(NamedTuple):
    hidden_states: torch.Tensor
    hidden_states_scale: torch.Tensor | None
    topk_output: Any


class Combined(NamedTuple):
    hidden_states: Any


@dataclass
class Deferred:
    gemm2_out: torch.Tensor
    expert_weights: torch.Tensor
    expanded_idx_to_permuted_idx: torch.Tensor
    top_k: int


@dataclass
class QuantInfo:
    w13_weight: torch.Tensor
    w2_weight: torch.Tensor
    w13_weight_scale: torch.Tensor
    w2_weight_scale: torch.Tensor
    g1_scale_c: torch.Tensor
    g1_alphas: torch.Tensor
    g2_alphas: torch.Tensor
    w13_input_scale_quant: torch.Tensor
    global_num_experts: int
    local_expert_offset: int
    local_num_experts: int
    intermediate_size_per_partition: int
    routing_method_type: int | None
    use_per_token_activation: bool = False
    padded_hidden_size: int | None = None
    gemm1_alpha: torch.Tensor | None = None
    gemm1_beta: torch.Tensor | None = None
    gemm1_clamp_limit: torch.Tensor | None = None


def quant_info(experts: Experts, shape: Shape = SHAPE, **more: Any) -> QuantInfo:
    static = experts.input_scale is not None
    return QuantInfo(
        experts.gemm1_weights, experts.gemm2_weights, experts.gemm1_weights_scale,
        experts.gemm2_weights_scale, experts.output1_scale_scalar,
        experts.output1_scale_gate_scalar, experts.output2_scale_scalar,
        experts.input_scale.reshape(()) if static else torch.ones(()),
        shape.experts, shape.offset, shape.num_local, experts.padded_intermediate_size, 1,
        use_per_token_activation=not static, gemm1_alpha=experts.gemm1_alpha,
        gemm1_beta=experts.gemm1_beta, gemm1_clamp_limit=experts.gemm1_clamp_limit, **more,
    )  # fmt: skip


def config(activation: str = "silu", gated: bool = True, scaling: float | None = None):
    return SimpleNamespace(activation=activation, is_gated=gated, routed_scaling_factor=scaling)


def standard(ids, weights):
    return SimpleNamespace(format=Format.STANDARD, topk_ids=ids, topk_weights=weights)


def packed(ids, weights):
    return SimpleNamespace(format=Format.PACKED, packed_topk_ids=pack_topk(ids, weights))


def direct(x, experts, routing, shape=SHAPE, four_over_six=None, **options):
    """The calls that a user of this library makes: the quantizer, then FlashInfer's function."""
    static = experts.input_scale is not None
    recipe = Recipe(four_over_six=four_over_six)
    codes, scales, *token = nvfp4_quantize(
        x,
        experts.input_scale if static else recipe.base_scale_inv,
        SfLayout.layout_linear,
        per_token_activation=not static,
        nvfp4_4over6=four_over_six,
    )
    ids = routing[0]
    return nvfp4_moe.trtllm_fp4_block_scale_routed_moe(
        routing, None, codes, scales.view(torch.float8_e4m3fn), experts.gemm1_weights,
        experts.gemm1_weights_scale, None, experts.gemm1_alpha, experts.gemm1_beta,
        experts.gemm1_clamp_limit, experts.gemm2_weights, experts.gemm2_weights_scale, None,
        experts.output1_scale_scalar, experts.output1_scale_gate_scalar,
        experts.output2_scale_scalar, shape.experts, ids.shape[1], None, None,
        experts.padded_intermediate_size, shape.offset, shape.num_local, None, 1,
        activation_type=int(experts.activation), per_token_scale=token[0] if token else None,
        **options,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def sglang(monkeypatch):
    """Modules of SGLang's names with what the adapter takes from them."""
    for name in environment.VARIABLES:
        if name not in environment.CACHE_VARIABLES:
            monkeypatch.delenv(name, raising=False)

    def module(name: str, **content: Any) -> ModuleType:
        parts = name.split(".")
        for i in range(1, len(parts)):
            parent = ".".join(parts[:i])
            if not isinstance(sys.modules.get(parent), Parent):
                monkeypatch.setitem(sys.modules, parent, Parent(parent))
        made = ModuleType(name)
        vars(made).update(content)
        monkeypatch.setitem(sys.modules, name, made)
        return made

    buffers: list[tuple] = []

    def buffer(num_tokens, hidden_size, dtype, device, symmetric):
        buffers.append((num_tokens, hidden_size, dtype, symmetric))
        return torch.full((num_tokens, hidden_size), torch.nan, dtype=dtype, device=device)

    module(
        "sglang.srt.layers.moe.token_dispatcher.standard",
        StandardCombineInput=Combined,
    )
    return module(
        ours.MODULE,
        is_deferred_finalize_enabled=lambda: False,
        trtllm_moe_enable_pdl=lambda tokens: None,
        _get_fp4_moe_output_buffer=buffer,
        FlashInferTrtllmDeferredFinalizeOutput=Deferred,
        buffers=buffers,
        fused_experts_none_to_flashinfer_trtllm_fp4=lambda *_: "SGLang's",
    )


class Parent(ModuleType):
    __path__: list[str] = []  # noqa: RUF012


@pytest.mark.parametrize("mode", ["per-token", "static"])
@pytest.mark.parametrize("kind", ["silu", "gelu", "situ", "relu2"])
@pytest.mark.parametrize("form", [standard, packed])
def test_the_calls_made_directly(mode, kind, form, sglang):
    gated = kind != "relu2"
    activation = {
        "silu": ActivationType.Swiglu,
        "gelu": ActivationType.Geglu,
        "situ": ActivationType.Situ,
        "relu2": ActivationType.Relu2,
    }[kind]
    limit = {"clamp_limit": 2.0, "alpha": 1.25} if kind == "silu" else {}
    shape = Shape(5, 128, 128, 8, 2, 3, 4)
    case = moe_cases.make(shape, activation, mode, **limit)
    got = drop_in(
        Dispatched(case.x, None, form(case.ids, case.weights)),
        quant_info(case.experts, shape),
        config(kind, gated),
        use_routed_topk=True,
    )
    (want,) = direct(case.x, case.experts, (case.ids, case.weights), shape)
    assert_bitwise(got.hidden_states, want, "output")
    assert isinstance(got, Combined)
    assert sglang.buffers == [(5, 128, torch.bfloat16, True)]
    layer = nvfp4_moe.fused_moe(
        case.x, case.experts, (case.ids, case.weights), num_experts=8, local_expert_offset=3
    )
    assert_bitwise(got.hidden_states, layer, "fused_moe of the same")


def test_routing_from_logits():
    case = moe_cases.make(Shape(5, 128, 64, 16, 4))
    shape = Shape(5, 128, 64, 16, 4)
    g = torch.Generator().manual_seed(3)
    logits, bias = torch.randn(5, 16, generator=g), torch.randn(16, generator=g)
    how = SimpleNamespace(top_k=4, num_expert_group=4, topk_group=2, correction_bias=bias)
    topk = SimpleNamespace(format=Format.BYPASSED, router_logits=logits, topk_config=how)
    info = quant_info(case.experts, shape)
    info.routing_method_type = 2
    got = drop_in(Dispatched(case.x, None, topk), info, config(scaling=2.5)).hidden_states
    want = nvfp4_moe.fused_moe(
        case.x,
        case.experts,
        (logits, nvfp4_moe.Routing(nvfp4_moe.RoutingMethodType.DeepSeekV3, 4, 4, 2, 2.5)),
        routing_bias=bias,
    )
    assert_bitwise(got, want, "output")
    info.routing_method_type = None
    how.num_expert_group = how.topk_group = how.correction_bias = None
    got = drop_in(Dispatched(case.x, None, topk), info, config()).hidden_states
    plain = nvfp4_moe.Routing(nvfp4_moe.RoutingMethodType.Default, 4)
    want = nvfp4_moe.fused_moe(case.x, case.experts, (logits, plain))
    assert_bitwise(got, want, "the default method")


@pytest.mark.parametrize("use_256", [False, True])
def test_four_over_six_of_the_environment(use_256, monkeypatch):
    case = moe_cases.make(SHAPE)
    dispatched = Dispatched(case.x, None, standard(case.ids, case.weights))
    plain = drop_in(dispatched, quant_info(case.experts), config()).hidden_states
    monkeypatch.setenv("FLASHINFER_NVFP4_4OVER6", "1")
    if use_256:
        monkeypatch.setenv("FLASHINFER_NVFP4_4OVER6_E4M3_USE_256", "1")
    got = drop_in(dispatched, quant_info(case.experts), config()).hidden_states
    recipe = NVFP44Over6Config(256 if use_256 else 448)
    (want,) = direct(
        case.x, case.experts, (case.ids, case.weights), four_over_six=recipe, nvfp4_4over6=recipe
    )
    assert_bitwise(got, want, "output")
    assert not torch.equal(got, plain)


@pytest.mark.parametrize("mode", ["per-token", "static"])
def test_no_tokens(mode):
    case = moe_cases.make(SHAPE, mode=mode)
    topk = standard(case.ids[:0], case.weights[:0])
    got = drop_in(Dispatched(case.x[:0], None, topk), quant_info(case.experts), config())
    assert got.hidden_states.shape == (0, 128) and got.hidden_states.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mode", ["per-token", "static"])
def test_deferred_finalize(mode, dtype, sglang, monkeypatch):
    monkeypatch.setattr(sglang, "is_deferred_finalize_enabled", lambda: True)
    case = moe_cases.make(SHAPE, mode=mode, weights_dtype=dtype)
    routing = case.ids, case.weights
    got = drop_in(
        Dispatched(case.x, None, standard(*routing)), quant_info(case.experts), config()
    ).hidden_states
    rows, _, permuted = direct(case.x, case.experts, routing, do_finalize=False)
    assert isinstance(got, Deferred) and got.top_k == 2 and not sglang.buffers
    assert_bitwise(got.gemm2_out, rows, "rows")
    assert_bitwise(got.expert_weights, case.weights, "weights, in their own dtype")
    assert_bitwise(got.expanded_idx_to_permuted_idx, permuted, "rows of slots")


def test_padded_hidden_size(sglang, monkeypatch):
    """SGLang pads H to 512 of per-token experts without a gate; the scratch is not its buffer."""
    monkeypatch.setattr(sglang, "is_deferred_finalize_enabled", lambda: True)  # not when padded
    shape = Shape(5, 512, 128, 4, 2)
    w13, w2 = moe_cases.weights_of(shape, ActivationType.Relu2)
    w13[:, :, 384:] = 0
    w2[:, 384:] = 0
    experts = nvfp4_moe.prepare_experts(w13, w2, ActivationType.Relu2)
    x = moe_cases.hidden_states(Shape(5, 384, 128, 4, 2))
    routing = moe_cases.routing_of(shape)
    got = drop_in(
        Dispatched(x, None, standard(*routing)),
        quant_info(experts, shape, padded_hidden_size=512),
        config("relu2", False),
    ).hidden_states
    (want,) = direct(moe_cases.padded(x, 512), experts, routing, shape)
    assert_bitwise(got, want[:, :384].contiguous(), "output")
    sizes = [(width, symmetric) for _, width, _, symmetric in sglang.buffers]
    assert sizes == [(512, False), (384, True)]


def test_codes_of_the_dispatcher_pass_through():
    case = moe_cases.make(SHAPE, mode="static")
    a = case.activations
    dispatched = Dispatched(
        a.hidden_states, a.block_scales.view(torch.uint8), standard(case.ids, case.weights)
    )
    got = drop_in(dispatched, quant_info(case.experts), config()).hidden_states
    (want,) = direct(case.x, case.experts, (case.ids, case.weights))
    assert_bitwise(got, want, "output")


def plain(case, info, **change):
    arguments = {
        name: getattr(info, name)
        for name in (
            "w13_weight",
            "w2_weight",
            "w13_weight_scale",
            "w2_weight_scale",
            "g1_scale_c",
            "g1_alphas",
            "g2_alphas",
            "w13_input_scale_quant",
            "use_per_token_activation",
            "local_expert_offset",
            "local_num_experts",
        )
    }
    arguments |= {
        "hidden_states": case.x,
        "num_experts": info.global_num_experts,
        "intermediate_size": info.intermediate_size_per_partition,
        "activation_type": 3,
        "topk": (case.ids, case.weights),
        "backend": "reference",
    }
    return fused_experts_fp4(**arguments | change)


def test_per_token_codes_of_a_dispatcher():
    case = moe_cases.make(SHAPE)
    a = case.activations
    codes = {
        "hidden_states": a.hidden_states,
        "hidden_states_scale": a.block_scales,
        "per_token_scale": a.per_token_scale,
    }
    info = quant_info(case.experts)
    assert_bitwise(plain(case, info, **codes)[0], plain(case, info)[0], "output")
    output = torch.empty_like(case.x)
    assert plain(case, info, output=output)[0] is output
    for change, message in (
        (codes | {"per_token_scale": None}, "True they need hidden_states_scale and per_token"),
        (codes | {"use_per_token_activation": False}, "False they need .* and no per_token_scale"),
        (codes | {"hidden_states": case.x}, "belong to uint8 codes"),
        ({"topk": None}, "one of topk and router_logits"),
        ({"router_logits": case.x}, "one of topk and router_logits"),
        ({"topk": None, "router_logits": case.x}, "top_k is None"),
        (
            {"use_per_token_activation": False, "w13_input_scale_quant": torch.ones(4)},
            r"w13_input_scale_quant is float32 \[4\]; it must be a tensor of one float32",
        ),
        ({"w13_weight_scale": None}, "w13_weight_scale is None; it must be a tensor of float8"),
        (
            {"use_per_token_activation": False, "w13_input_scale_quant": None},
            "w13_input_scale_quant is None; it must be a tensor of float32",
        ),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            plain(case, info, **change)


def test_the_switch_is_not_dropped_silently(monkeypatch):
    case = moe_cases.make(SHAPE, mode="static")
    dispatched = Dispatched(case.x, None, standard(case.ids, case.weights))
    monkeypatch.setenv(environment.SWITCH_VARIABLES[1], "1")
    with pytest.raises(UnsupportedError, match="has made this layer with static activation scales"):
        drop_in(dispatched, quant_info(case.experts), config())
    monkeypatch.setenv(environment.SWITCH_VARIABLES[1], "0")
    drop_in(dispatched, quant_info(case.experts), config())
    per_token = moe_cases.make(SHAPE)  # nvfp4_online: whatever the switch says
    drop_in(dispatched, quant_info(per_token.experts), config())


@pytest.mark.parametrize(
    ("topk", "runner", "routed", "message"),
    [
        (standard, config("swigluoai"), False, "activation is 'swigluoai', is_gated True"),
        (standard, config("relu2", True), False, "activation is 'relu2', is_gated True"),
        (Format.TRITON_KERNEL, config(), False, "TRITON_KERNEL; it must be STANDARD, PACKED or B"),
        (Format.BYPASSED, config(), True, "BYPASSED; it must be STANDARD or PACKED"),
    ],
)
def test_what_sglang_refuses_is_refused(topk, runner, routed, message):
    case = moe_cases.make(SHAPE)
    routing = topk(case.ids, case.weights) if callable(topk) else SimpleNamespace(format=topk)
    if isinstance(topk, Format):
        routing = SimpleNamespace(format=topk)
    with pytest.raises(UnsupportedError, match=message):
        drop_in(Dispatched(case.x, None, routing), quant_info(case.experts), runner, routed)


def test_install_replaces_sglangs_function(sglang, monkeypatch):
    """Through SGLang's own registry of hooks."""
    name = "sglang.srt.plugins.hook_registry"
    path = folder_of("sglang") / "srt/plugins/hook_registry.py"
    spec = importlib.util.spec_from_file_location(name, path)
    registry = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "sglang.srt.plugins", Parent("sglang.srt.plugins"))
    monkeypatch.setitem(sys.modules, name, registry)
    spec.loader.exec_module(registry)
    ours.install()
    registry.HookRegistry.apply_hooks()
    case = moe_cases.make(SHAPE)
    replaced = sglang.fused_experts_none_to_flashinfer_trtllm_fp4
    got = replaced(
        Dispatched(case.x, None, standard(case.ids, case.weights)),
        quant_info(case.experts),
        config(),
    )
    assert isinstance(got, Combined)


_TREE = ast.parse(inspect.getsource(ours))


def reads(*names: str) -> set[str]:
    """Attributes that the adapter reads of the objects of these names."""
    return {
        node.attr
        for node in ast.walk(_TREE)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in names
    }


@pytest.mark.parametrize(
    ("name", "path", "classes"),
    [
        ("quant_info", TRTLLM, ["FlashInferTrtllmFp4MoeQuantInfo"]),
        ("runner_config", "srt/layers/moe/moe_runner/base.py", ["MoeRunnerConfig"]),
        ("dispatch_output", STANDARD, ["StandardDispatchOutput"]),
        (
            "dispatch_output",
            "srt/layers/moe/token_dispatcher/flashinfer.py",
            ["FlashinferDispatchOutput"],
        ),
        ("config", TOPK, ["TopKConfig"]),
        ("topk", TOPK, ["StandardTopKOutput", "PackedTopKOutput", "BypassedTopKOutput"]),
    ],
)
def test_sglang_has_every_attribute_that_is_read(name, path, classes):
    has = set().union(*(attributes_of("sglang", path, c) for c in classes))
    assert reads(name), name
    assert reads(name) <= has, sorted(reads(name) - has)


def test_sglang_has_what_the_adapter_takes_from_its_module():
    tree = ast.parse(source_of("sglang", TRTLLM))
    has = {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    assert reads("theirs") and reads("theirs") <= has, sorted(reads("theirs") - has)
    assert drop_in.__name__ in has
    assert arguments_of("sglang", TRTLLM, drop_in.__name__) == list(
        inspect.signature(drop_in).parameters
    )
    assert arguments_of("sglang", TRTLLM, "_get_fp4_moe_output_buffer") == [
        "num_tokens",
        "hidden_size",
        "dtype",
        "device",
        "symmetric",
    ]
    deferred = "FlashInferTrtllmDeferredFinalizeOutput"
    assert fields_of("sglang", TRTLLM, deferred) == [f.name for f in fields(Deferred)]
    assert fields_of("sglang", STANDARD, "StandardCombineInput") == list(Combined._fields)
    assert list(members_of("sglang", TOPK, "TopKOutputFormat")) == [f.name for f in Format]


def test_the_stand_ins_have_sglangs_fields():
    info = "FlashInferTrtllmFp4MoeQuantInfo"
    assert fields_of("sglang", TRTLLM, info) == [f.name for f in fields(QuantInfo)]


def test_the_table_has_every_backend_of_sglang():
    theirs = members_of("sglang", "srt/layers/moe/utils.py", "MoeRunnerBackend").values()
    ours = {backend.partition("+")[0] for backend in SERVERS["sglang"].backends}
    assert ours == set(theirs) - {"auto"}


def test_the_variable_and_its_spellings_are_sglangs():
    text = source_of("sglang", "srt/environ.py")
    assert f"{environment.SWITCH_VARIABLES[1]} = EnvBool(False)" in text
    parse = ast.unparse(class_of("sglang", "srt/environ.py", "EnvBool").body[0])
    spelled = {n.value for n in ast.walk(ast.parse(parse)) if isinstance(n, ast.Constant)}
    assert set(environment._BOOLEANS) <= spelled


def test_versions_are_those_of_the_adapters():
    from nvfp4_moe.serving import vllm

    assert VERSIONS["sglang"] == ours.VERSION
    assert VERSIONS["vllm"].rsplit(".", 1)[0] == vllm.VERSIONS[-1]
