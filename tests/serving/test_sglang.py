"""The plug-in for SGLang, on a fake of what it builds on; `make sglang-test` has the real classes."""

# SPDX-License-Identifier: Apache-2.0
import ast
import enum
import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import checkpoint_cases as cases
import fake_sglang
import pytest
import torch
from assertions import assert_bitwise
from checkpoint_cases import EXPERTS, HIDDEN, INTERMEDIATE, assert_same_experts
from fake_sglang import runner_config
from server_cases import loaded_weights, written
from server_sources import VERSIONS, arguments_of, class_of, members_of, source_of

import nvfp4_moe
from nvfp4_moe import ActivationType, UnsupportedError
from nvfp4_moe.checkpoints.load import load_experts
from nvfp4_moe.kernels import environment
from nvfp4_moe.serving import SERVERS
from nvfp4_moe.serving import sglang as plugin
from nvfp4_moe.serving.packing import tensors_of
from nvfp4_moe.serving.sglang.gate import gate_of

NAMING = cases.NAMINGS["qwen3-moe"]
PREFIX = NAMING.of(0)
FORMATS = {"modelopt": cases.MODELOPT_KINDS, "compressed-tensors": cases.COMPRESSED_KINDS}
TOKENS, TOP_K = 5, 2
MODELOPT = {"quant_method": "modelopt_fp4", "quant_algo": "NVFP4", "ignore": []}


@pytest.fixture(scope="module", autouse=True)
def fake():
    with pytest.MonkeyPatch.context() as patch:
        for name in environment.SWITCH_VARIABLES:
            patch.delenv(name, raising=False)
        fake_sglang.install(patch)
        plugin.register()
        yield


@pytest.fixture
def config():
    return method_class("nvfp4_moe")


def method_class(name):
    from sglang.srt.layers.quantization import QUANTIZATION_METHODS

    return QUANTIZATION_METHODS[name]


class Form(enum.Enum):
    STANDARD = 1
    BYPASSED = 2


class Dispatched(NamedTuple):
    hidden_states: torch.Tensor
    topk_output: Any
    hidden_states_scale: torch.Tensor | None = None


def layer_of(moe=None, ep_size=1):
    return fake_sglang.FusedMoE(moe or runner_config(), EXPERTS, ep_size)


def made(method, layer, hidden=HIDDEN, intermediate=INTERMEDIATE, with_bias=False):
    """Weights and a runner of a method, as SGLang asks for them."""
    method.create_weights(
        layer=layer,
        num_experts=layer.num_local_experts,
        hidden_size=hidden,
        intermediate_size_per_partition=intermediate,
        params_dtype=torch.bfloat16,
        weight_loader="SGLang's loader",
        **({"with_bias": True} if with_bias else {}),
    )
    method.create_moe_runner(layer, layer.moe_runner_config)
    return method


def sglangs_rows(gate, up, interleaved=False):
    """[gate; up], or both in turns."""
    if gate is None:
        return up
    return torch.stack((gate, up), 2).flatten(1, 2) if interleaved else torch.cat((gate, up), 1)


def call(seed=3, experts=EXPERTS):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, HIDDEN, generator=g).bfloat16()
    ids = torch.stack([torch.randperm(experts, generator=g)[:TOP_K] for _ in range(TOKENS)])
    return x, torch.rand(TOKENS, TOP_K, generator=g), ids.int()


def served(method, layer, x, weights, ids, form=Form.STANDARD, **more):
    topk = SimpleNamespace(format=form, topk_weights=weights, topk_ids=ids)
    return method.apply(layer, Dispatched(x, topk, **more)).hidden_states


def fill(layer, w, biased=False):
    moe = layer.moe_runner_config
    interleaved = moe.activation == "silu" and moe.gemm1_alpha is not None
    interleaved = interleaved and moe.gate_up_interleaved
    layer.w13_weight.data.copy_(sglangs_rows(w.gate, w.up, interleaved))
    layer.w2_weight.data.copy_(w.down)
    if biased:
        b = cases.biases()
        layer.w13_weight_bias.data.copy_(sglangs_rows(b["gate"], b["up"], interleaved))
        layer.w2_weight_bias.data.copy_(b["down"])


def online(config, w, moe=None, ep_size=1, biased=False):
    """A bf16 layer of SGLang after loading."""
    layer = layer_of(moe, ep_size)
    method = made(config().get_quant_method(layer, PREFIX), layer, with_bias=biased)
    fill(layer, w, biased)
    method.process_weights_after_loading(layer)
    return method, layer


def test_everything_is_registered_once():
    from sglang.srt.arg_groups import choices
    from sglang.srt.layers import quantization

    plugin.register()
    assert list(plugin.QUANTIZATIONS) == choices.QUANTIZATION_CHOICES[1:]
    assert choices.MOE_RUNNER_BACKEND_CHOICES == ["auto", plugin.BACKEND]
    names = list(quantization.QUANTIZATION_METHODS)
    assert names[-2:] == ["fp8", "modelopt_fp4"] and len(names) == 8
    assert set(quantization.CPU_QUANTIZATION_METHODS) == {*names[:6], "fp8"}
    assert list(fake_sglang.RUNNERS) == [plugin.BACKEND]


@pytest.mark.parametrize("name", plugin.QUANTIZATIONS)
def test_the_two_methods_of_a_name(name):
    """A checkpoint in bf16 has no file that SGLang could read; a quantized one may have it alone."""
    bf16, quantized = method_class(name), method_class(f"{name}_checkpoint")
    assert bf16.get_config_filenames() == []
    assert quantized.get_config_filenames() == ["hf_quant_config.json"]
    for cls in (bf16, quantized):
        made = cls()
        assert made.get_name() == name and made.get_scaled_act_names() == []
        assert made.get_supported_act_dtypes() == [torch.bfloat16]
        assert cls.get_min_capability() == 80
    take = bf16.override_quantization_method
    assert take(MODELOPT, name) == take(MODELOPT, f"{name}_checkpoint") == f"{name}_checkpoint"
    assert take(MODELOPT, None) is None and take(MODELOPT, "modelopt_fp4") is None
    assert quantized.override_quantization_method(MODELOPT, name) is None


def test_another_version_is_registered_and_refused_where_it_is_asked_for(config, monkeypatch):
    import sglang

    monkeypatch.setattr(sglang, "__version__", "0.5.22")
    plugin.register()
    for make in (config, lambda: config.from_config(MODELOPT)):
        with pytest.raises(UnsupportedError, match=r"sglang 0\.5\.22 .* for sglang 0\.5\.23"):
            make()


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", ["nvfp4_moe", "nvfp4_moe_w4a16"])
def test_weights_in_bf16(name, deterministic, monkeypatch):
    setting = fake_sglang.SETTINGS.deterministic
    monkeypatch.setattr(setting, "enable_deterministic_inference", deterministic)
    w = cases.weights()
    method, layer = online(method_class(name), w)
    x, weights, ids = call()
    want = nvfp4_moe.fused_moe(
        x,
        nvfp4_moe.prepare_experts(w.w13, w.down),
        (ids, weights),
        activation=plugin.QUANTIZATIONS[name],
        batch_invariant=deterministic,
    )
    assert_bitwise(served(method, layer, x, weights, ids), want, name)
    assert_bitwise(served(method, layer, x, weights, ids.long()), want, "int64")
    assert method.batch_invariant is deterministic
    kept = sum(p.numel() for n, p in layer.named_parameters() if not n.startswith("nvfp4_"))
    assert kept == 0, "bf16 weights are gone"
    assert method.get_moe_runner_backend(layer).value == plugin.BACKEND
    assert method.fuse_routed_scaling_factor_in_topk and not method.load_up_proj_weight_first
    assert served(method, layer, x[:0], weights[:0], ids[:0]).shape == (0, HIDDEN)


def test_it_says_once_what_it_serves(config, caplog):
    from nvfp4_moe.serving.sglang.method import _say_once

    _say_once.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            config().get_quant_method(layer_of(), PREFIX)
    said = [r.getMessage() for r in caplog.records if r.name.startswith("nvfp4_moe")]
    assert said == ["nvfp4-moe serves this model's experts: activations per-token"]


def test_a_canary_watches_the_layers(config, monkeypatch, tmp_path):
    from nvfp4_moe.canary import from_environment

    monkeypatch.setenv("NVFP4_MOE_CANARY", "1")
    monkeypatch.setenv("NVFP4_MOE_CANARY_FOLDER", str(tmp_path))
    w, (x, weights, ids) = cases.weights(), call()
    method, layer = online(config, w)
    got = served(method, layer, x, weights, ids)
    experts = nvfp4_moe.prepare_experts(w.w13, w.down)
    assert_bitwise(got, nvfp4_moe.fused_moe(x, experts, (ids, weights)), "output")
    canary = from_environment()
    canary.wait()
    assert canary is method.canary
    assert canary.counts.taken == canary.counts.inside == 1, canary.counts


KIND = ActivationType
OPEN_AI = {"gemm1_alpha": 1.702, "gemm1_clamp_limit": 7.0}
ACTIVATIONS = {
    "silu": (KIND.Swiglu, {}, {}),
    "silu, V4's limit": (KIND.Swiglu, {"swiglu_limit": 0.5}, {"clamp_limit": 0.5}),
    "silu, Step's limit": (KIND.SwigluStep, {"gemm1_clamp_limit": 0.5}, {"clamp_limit": 0.5}),
    "silu, GPT-OSS": (KIND.Swiglu, OPEN_AI, {"alpha": 1.702, "beta": 1.0, "clamp_limit": 7.0}),
    "silu, MiniMax-M3": (
        KIND.Swiglu,
        OPEN_AI | {"gemm1_beta": 0.5, "gate_up_interleaved": False},
        {"alpha": 1.702, "beta": 0.5, "clamp_limit": 7.0},
    ),
    "gelu": (KIND.Geglu, {}, {}),
    "gelu_tanh": (KIND.GegluTanh, {}, {}),
    "situ": (
        KIND.Situ,
        {"gemm1_alpha": 3.0, "gemm1_clamp_limit": 25.0},
        {"alpha": 3.0, "beta": 25.0},
    ),
    "situ, no alpha": (KIND.Situ, {"gemm1_clamp_limit": 25.0}, {"alpha": 4.0, "beta": 25.0}),
    "relu2, not gated": (KIND.Relu2, {}, {}),
    "silu, not gated": (KIND.Silu, {}, {}),
    "gelu, not gated": (KIND.Gelu, {}, {}),
}


@pytest.mark.parametrize("case", ACTIVATIONS)
def test_activations(case, config):
    kind, given, parameters = ACTIVATIONS[case]
    biased = case == "silu, GPT-OSS"
    w = cases.weights(kind.gated)
    moe = runner_config(case.partition(",")[0], kind.gated, **given)
    method, _ = online(config, w, moe, biased=biased)
    b = cases.biases()
    biases = {"w13_bias": torch.cat((b["up"], b["gate"]), 1).float(), "w2_bias": b["down"].float()}
    want = nvfp4_moe.prepare_experts(
        w.w13, w.down, kind, **parameters, **(biases if biased else {})
    )
    assert_same_experts(method.experts, want)


def test_a_limit_without_alpha_bounds_the_silu():
    """As `_swiglu_silu_clamp_mul` of SGLang's Triton runner."""
    from nvfp4_moe.reference.activation import activate

    gate = gate_of(runner_config(gemm1_clamp_limit=0.5))
    g = torch.Generator().manual_seed(2)
    rows = torch.randn(64, 32, generator=g, dtype=torch.float32, device="cpu")
    up, curve = rows[:, :16], torch.nn.functional.silu(rows[:, 16:])
    want = curve.clamp(max=0.5) * up.clamp(-0.5, 0.5)
    ours = activate(rows, gate.activation, clamp_limit=gate.clamp_limit)
    assert (ours - want).abs().max() < 1e-6
    assert (curve > 0.5).any() and (rows[:, 16:] > 0.5).sum() != (curve > 0.5).sum()


def test_experts_of_another_rank_add_nothing(config):
    """SGLang maps ids to this rank's experts, and gives -1 for another's."""
    w, (x, weights, ids) = cases.weights(), call()
    part = cases.Weights(w.gate[2:], w.up[2:], w.down[2:])
    method, layer = online(config, part, ep_size=2)
    local = torch.where(ids >= 2, ids - 2, -1)
    assert (local == -1).any() and (local >= 0).any()
    experts = nvfp4_moe.prepare_experts(part.w13, part.down)
    want = nvfp4_moe.fused_moe(x, experts, (local, weights))
    assert_bitwise(served(method, layer, x, weights, local), want, "output")


def test_router_weights_on_the_input(config):
    w, (x, weights, ids) = cases.weights(), call()
    method, layer = online(config, w, runner_config(apply_router_weight_on_input=True))
    experts = replace(nvfp4_moe.prepare_experts(w.w13, w.down), router_weight_on_input=True)
    one = weights[:, :1].contiguous(), ids[:, :1].contiguous()
    want = nvfp4_moe.fused_moe(x, experts, (one[1], one[0]))
    assert_bitwise(served(method, layer, x, *one), want, "output")


def test_new_weights_run_in_the_memory_of_the_first(config):
    """As SGLang's update does: restore, load, process."""
    first, second, (x, weights, ids) = cases.weights(), cases.weights(seed=1), call()
    method, layer = online(config, first)
    before = {name: t.data_ptr() for name, t in tensors_of(method.experts).items()}
    method.process_weights_after_loading(layer)
    method.restore_weights_before_loading(layer)
    method.restore_weights_before_loading(layer)
    assert layer.w13_weight.weight_loader == "SGLang's loader"
    assert layer.w13_weight.isnan().all()
    fill(layer, second)
    method.process_weights_after_loading(layer)
    assert {name: t.data_ptr() for name, t in tensors_of(method.experts).items()} == before
    want = nvfp4_moe.prepare_experts(second.w13, second.down)
    assert_same_experts(method.experts, want)
    expected = nvfp4_moe.fused_moe(x, want, (ids, weights))
    assert_bitwise(served(method, layer, x, weights, ids), expected, "the second weights")
    assert layer.w13_weight.numel() == 0


@pytest.mark.parametrize("form", ["bf16", *FORMATS])
def test_an_update_of_other_layers_keeps_the_weights(form, config):
    if form == "bf16":
        method, layer = online(config, cases.weights())
    else:
        method, layer, _ = of_checkpoint("nvfp4_moe", form)
        method.process_weights_after_loading(layer)
    kept = {name: t.clone() for name, t in tensors_of(method.experts).items()}
    method.restore_weights_before_loading(layer)
    method.process_weights_after_loading(layer)
    for name, tensor in tensors_of(method.experts).items():
        assert_bitwise(tensor, kept[name], name)


@pytest.mark.parametrize("name", ["w13_weight", "w2_weight"])
def test_weights_that_nobody_has_read_are_refused(name, config):
    w, layer = cases.weights(), layer_of()
    method = made(config().get_quant_method(layer, PREFIX), layer)
    missing = rf"{name} has not been read whole for 1 of 4 experts of this rank, the first is 2"
    fill(layer, w)
    getattr(layer, name).data[2, -1] = torch.nan  # as `create_weights` left it
    with pytest.raises(ValueError, match=missing):
        method.process_weights_after_loading(layer)
    fill(layer, w)
    method.process_weights_after_loading(layer)
    with pytest.raises(UnsupportedError, match=r"packed for nvfp4-moe; .* begin_weight_update"):
        layer.w13_weight.weight_loader(layer.w13_weight, w.gate, "x", shard_id="w1", expert_id=0)


def test_two_updates_that_are_each_half_are_not_one(config):
    """The rest of a refused update does not wait for another version's weights."""
    method, layer = online(config, cases.weights())
    kept = {name: t.clone() for name, t in tensors_of(method.experts).items()}
    for seed, other in ((1, slice(2, 4)), (2, slice(0, 2))):
        method.restore_weights_before_loading(layer)
        both = layer.w13_weight.data, layer.w2_weight.data
        before = [data[other].clone() for data in both]
        fill(layer, cases.weights(seed=seed))
        for data, kept_half in zip(both, before, strict=True):
            data[other] = kept_half
        with pytest.raises(ValueError, match="w13_weight has not been read whole for 2 of 4"):
            method.process_weights_after_loading(layer)
    for name, tensor in tensors_of(method.experts).items():
        assert_bitwise(tensor, kept[name], name)


def test_block_scales_that_nobody_has_read_are_refused():
    method, layer, _ = of_checkpoint("nvfp4_moe", "modelopt")
    layer.w2_weight_scale.data[1, 0] = torch.tensor(torch.nan).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="w2_weight_scale has not been read whole for 1 of 4"):
        method.process_weights_after_loading(layer)


def of_checkpoint(name, form, ep_size=1, rank=0, configuration=None):
    """(method, layer) of SGLang with a checkpoint's tensors, and the checkpoint's parts."""
    parts = cases.quantized(cases.weights())
    parts["up"]["decode"][2] = parts["gate"]["decode"][2]
    kinds, inverse = FORMATS[form], form == "compressed-tensors"
    if configuration is None:
        configuration = cases.compressed_config() if inverse else MODELOPT
    layer = layer_of(ep_size=ep_size)
    cls = method_class(f"{name}_checkpoint")
    method = cls.from_config(configuration).get_quant_method(layer, PREFIX)
    made(method, layer)
    here = slice(rank * layer.num_local_experts, (rank + 1) * layer.num_local_experts)
    for parameter, value in loaded_weights(parts, kinds, inverse):
        if hasattr(layer, parameter):
            target = getattr(layer, parameter).data
            target.copy_(value if len(target) == EXPERTS else value[here])
    return method, layer, parts


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", plugin.QUANTIZATIONS)
def test_quantized_checkpoints_have_the_bits_of_our_loader(name, form, tmp_path):
    static = name == "nvfp4_moe_static"
    method, layer, parts = of_checkpoint(name, form)
    method.process_weights_after_loading(layer)
    folder = written(tmp_path / "m", parts, NAMING, form, FORMATS[form])
    want = load_experts(folder, 0, static=static)
    assert_same_experts(method.experts, replace(want, first_expert=None))
    x, weights, ids = call()
    expected = nvfp4_moe.fused_moe(x, want, (ids, weights), activation=plugin.QUANTIZATIONS[name])
    assert_bitwise(served(method, layer, x, weights, ids), expected, name)
    assert not any("swizzled" in n for n, _ in layer.named_parameters()), "of other backends"


def test_static_scales_are_the_largest_of_all_ranks():
    method, layer, parts = of_checkpoint("nvfp4_moe_static", "modelopt", ep_size=2)
    method.process_weights_after_loading(layer)
    largest = torch.maximum(parts["gate"]["input"], parts["up"]["input"])
    assert largest.argmax() > 1, "of an expert of another rank"
    assert_bitwise(method.experts.input_scale[0], 1 / largest.max(), "input scale")
    with pytest.raises(UnsupportedError, match="of this rank's experts alone"):
        of_checkpoint("nvfp4_moe_static", "compressed-tensors", ep_size=2)


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        (1.0, "never calibrated"),
        (0.0, "above 0 for every expert"),
        (torch.nan, "above 0 for every"),  # of an expert that has none: SGLang's own default is 1
    ],
)
def test_static_scales_that_nobody_measured(scales, message):
    method, layer, _ = of_checkpoint("nvfp4_moe_static", "modelopt")
    for name in ("w13_input_scale", "w2_input_scale"):
        getattr(layer, name).data.fill_(scales)
    with pytest.raises(ValueError, match=message):
        method.process_weights_after_loading(layer)


def test_weights_only_compressed_tensors():
    """SGLang's parameters of the activation scales stay as they were made."""
    for name, refused in (("nvfp4_moe_w4a16", False), ("nvfp4_moe_static", True)):
        method, layer, _ = of_checkpoint(name, "compressed-tensors")
        layer.w13_input_global_scale.data.fill_(torch.nan)
        if refused:
            with pytest.raises(ValueError, match="no input scale above 0 for every expert"):
                method.process_weights_after_loading(layer)
        else:
            method.process_weights_after_loading(layer)


def test_layers_that_stay_sglangs(config):
    from nvfp4_moe.serving.sglang import method

    linear, other, experts = fake_sglang.LinearBase(), torch.nn.Embedding(2, 2), layer_of()
    bf16 = config()
    assert isinstance(bf16.get_quant_method(linear, "x"), fake_sglang.UnquantizedLinearMethod)
    assert bf16.get_quant_method(other, "x") is None
    modelopt = config.from_config(MODELOPT | {"ignore": ["mtp.*"]})
    assert modelopt.get_quant_method(linear, "x") == "SGLang's own method"
    assert modelopt.get_quant_method(experts, "mtp.experts") is None
    assert modelopt.get_name() == "modelopt_fp4", "models of SGLang ask for it"
    assert not modelopt.is_layer_excluded("model.layers.0.qkv_proj"), "no mapping"
    modelopt.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    modelopt.exclude_modules = ["*.q_proj", "*.k_proj"]
    assert not modelopt.is_layer_excluded("model.layers.0.qkv_proj")
    modelopt.exclude_modules = ["*.q_proj", "*.k_proj", "*.v_proj"]
    assert modelopt.is_layer_excluded("model.layers.0.qkv_proj")
    algorithms = {"a.experts": {"quant_algo": "NVFP4"}, "b.experts": {"quant_algo": "FP8"}}
    mixed = config.from_config(
        MODELOPT | {"quant_algo": "mixed_precision", "quantized_layers": algorithms}
    )
    assert type(mixed.get_quant_method(experts, "a.experts")) is method.ModelOptNvfp4MoE
    assert mixed.get_quant_method(experts, "b.experts") == "SGLang's own method"
    compressed = config.from_config(cases.compressed_config("mtp."))
    assert compressed.get_quant_method(experts, "mtp.experts") == "SGLang's own method"
    assert compressed.get_quant_method(linear, PREFIX) == "SGLang's own method"
    for configuration in (modelopt, mixed, compressed):
        assert configuration.get_supported_act_dtypes() == [torch.bfloat16]
        assert configuration.get_min_capability() == 80


@pytest.mark.parametrize(
    "declared",
    [
        {"quant_method": "fp8"},
        {"quant_method": "modelopt_fp8", "quant_algo": "FP8"},
        {
            "quant_method": "compressed-tensors",
            "config_groups": {"g": {"weights": {"num_bits": 8, "type": "float"}}},
        },
    ],
)
def test_other_checkpoints_are_refused(declared, config):
    with pytest.raises(ValueError, match=r"nvfp4-moe serves checkpoints in bf16, and NVFP4 of"):
        config.from_config(declared)


def test_refusals(config, monkeypatch):
    def asked(moe=None, cls=config):
        return cls().get_quant_method(layer_of(moe), PREFIX)

    for moe, message in (
        (runner_config("silu_rounded"), "activation is 'silu_rounded', is_gated True; it must be"),
        (runner_config("relu2"), "activation is 'relu2', is_gated True"),
        (runner_config("situ"), "gemm1_clamp_limit is None, of up that is not bounded"),
        (runner_config(no_combine=True), "no_combine is True; with nvfp4-moe's experts it must be"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            asked(moe)
    with pytest.raises(UnsupportedError, match="in bf16 and has no static activation scales"):
        asked(cls=method_class("nvfp4_moe_static"))
    for owner, name, value, message in (
        (fake_sglang.SETTINGS, "a2a", "deepep", "--moe-a2a-backend is deepep; .* it must be none"),
        (fake_sglang.SETTINGS, "runner", "marlin", "--moe-runner-backend is marlin; .* auto or nv"),
        (fake_sglang.SETTINGS.moe, "enable_eplb", True, "--enable-eplb is on"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            with pytest.raises(UnsupportedError, match=message):
                asked()
    monkeypatch.setattr(fake_sglang.SETTINGS, "runner", plugin.BACKEND)
    asked()
    for sizes, message in (
        ({"hidden": 100}, "hidden_size is 100; it must be a multiple of 16"),
        ({"intermediate": 24}, "intermediate_size_per_partition is 24"),
    ):
        layer = layer_of()
        with pytest.raises(UnsupportedError, match=message):
            made(config().get_quant_method(layer, PREFIX), layer, **sizes)
    monkeypatch.setenv(environment.SWITCH_VARIABLES[0], "1")
    with pytest.raises(UnsupportedError, match="static"):
        of_checkpoint("nvfp4_moe_static", "modelopt")


def test_calls_that_the_runner_refuses(config):
    from nvfp4_moe.serving.sglang.runner import Nvfp4MoERunnerCore

    method, layer = online(config, cases.weights())
    x, weights, ids = call()
    with pytest.raises(UnsupportedError, match="topk_output is BYPASSED; it must be STANDARD"):
        served(method, layer, x, weights, ids, form=Form.BYPASSED)
    with pytest.raises(UnsupportedError, match="quantized already; they must be bf16"):
        served(method, layer, x, weights, ids, hidden_states_scale=weights)
    core = Nvfp4MoERunnerCore(layer.moe_runner_config)
    assert core.runner_backend.value == plugin.BACKEND
    with pytest.raises(
        UnsupportedError, match=r"has got str .*; give --quantization nvfp4_moe, too"
    ):
        core.run_from_dispatch(None, "Marlin's", None)
    with pytest.raises(UnsupportedError, match="no LoRA adapters"):
        method.runner.run(
            Dispatched(x, SimpleNamespace(format=Form.STANDARD)),
            info_of(method, layer),
            lora_info="hooks",
        )


def info_of(method, layer):
    from nvfp4_moe.serving.sglang.runner import Nvfp4MoEQuantInfo

    return Nvfp4MoEQuantInfo(method.experts, "per-token", False, None, layer.layer_name)


def test_a_checkpoint_is_taken_over_after_the_deprecated_install(config, monkeypatch):
    classes = [method_class(name) for name in plugin.QUANTIZATIONS]
    for switch, name in (("0", "nvfp4_moe_static"), ("1", "nvfp4_moe")):
        monkeypatch.setenv(environment.SWITCH_VARIABLES[0], switch)
        with pytest.warns(DeprecationWarning, match="--quantization nvfp4_moe"):
            plugin.install()
        for user in (None, "modelopt_fp4"):
            found = {c.override_quantization_method(MODELOPT, user) for c in classes}
            assert found == {None, f"{name}_checkpoint"}
        assert config.override_quantization_method({"quant_method": "fp8"}, None) is None
    config.modelopt_goes_to = None


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


def test_the_runner_has_sglangs_arguments():
    from nvfp4_moe.serving.sglang.runner import Nvfp4MoERunnerCore

    path = "srt/layers/moe/moe_runner/base.py"
    theirs = arguments_of("sglang", path, "run_from_dispatch", "DispatchMoeRunnerCore")
    code = Nvfp4MoERunnerCore.run_from_dispatch.__code__
    assert list(code.co_varnames[: code.co_argcount]) == theirs


def test_versions_are_those_of_the_plugins():
    from nvfp4_moe.serving import vllm

    assert VERSIONS["sglang"] == plugin.VERSION
    assert VERSIONS["vllm"].rsplit(".", 1)[0] == vllm.VERSIONS[-1]
