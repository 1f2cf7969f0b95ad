"""The plug-in for vLLM, on a fake of the classes that it builds on; `make server-test` has real ones."""

# SPDX-License-Identifier: Apache-2.0
import ast
import pickle
from dataclasses import replace
from types import SimpleNamespace

import checkpoint_cases as cases
import fake_vllm
import pytest
import torch
import torch.nn.functional as F
from assertions import assert_bitwise
from checkpoint_cases import EXPERTS, HIDDEN, INTERMEDIATE, assert_same_experts
from server_cases import loaded_weights, written
from server_sources import arguments_of, members_of, source_of

import nvfp4_moe
from nvfp4_moe import ActivationType, UnsupportedError
from nvfp4_moe.checkpoints.load import load_experts
from nvfp4_moe.kernels import environment
from nvfp4_moe.serving import SERVERS
from nvfp4_moe.serving import vllm as plugin
from nvfp4_moe.serving.active import say_active
from nvfp4_moe.serving.vllm import gate as vllm_gate

NAMING = cases.NAMINGS["qwen3-moe"]
PREFIX = NAMING.of(0)
FORMATS = {"modelopt": cases.MODELOPT_KINDS, "compressed-tensors": cases.COMPRESSED_KINDS}
TOKENS, TOP_K = 5, 2


@pytest.fixture(scope="module", autouse=True)
def fake():
    with pytest.MonkeyPatch.context() as patch:
        for name in environment.SWITCH_VARIABLES:
            patch.delenv(name, raising=False)
        fake_vllm.install(patch)
        plugin.register()
        yield


@pytest.fixture
def config():
    return fake_vllm.REGISTERED["nvfp4_moe"]


def moe_config(activation="silu", **more):
    options = {"swiglu_alpha": None, "swiglu_beta": None, "swiglu_limit": None}
    options |= {"activation_situ_beta": None, "activation_situ_linear_beta": None}
    options |= {"has_bias": False, "is_act_and_mul": not activation.endswith("_no_mul")}
    options |= {"activation": SimpleNamespace(value=activation)}
    return SimpleNamespace(
        **(options | more), moe_parallel_config=SimpleNamespace(use_ep=more.pop("use_ep", False))
    )


def layer_of(moe=None, expert_map=None):
    return fake_vllm.RoutedExperts(moe or moe_config(), expert_map)


def made(method, layer, experts=EXPERTS, hidden=HIDDEN, intermediate=INTERMEDIATE, all_experts=0):
    """Weights of a method, as vLLM asks for them."""
    method.create_weights(
        layer=layer,
        num_experts=experts,
        hidden_size=hidden,
        intermediate_size_per_partition=intermediate,
        params_dtype=torch.bfloat16,
        weight_loader=None,
        global_num_experts=all_experts or experts,
    )
    return method


def vllms_rows(w: cases.Weights, interleaved=False):
    """[gate; up], or both in turns."""
    if w.gate is None:
        return w.up
    pair = (w.gate, w.up)
    return torch.stack(pair, 2).flatten(1, 2) if interleaved else torch.cat(pair, 1)


def call(seed=3, experts=EXPERTS):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, HIDDEN, generator=g).bfloat16()
    ids = torch.stack([torch.randperm(experts, generator=g)[:TOP_K] for _ in range(TOKENS)])
    return x, torch.rand(TOKENS, TOP_K, generator=g), ids


def served(method, layer, x, weights, ids):
    return method.apply(layer, x, weights, ids, "shared experts", x)


def online(config, w, moe=None, expert_map=None):
    """A bf16 layer of vLLM after loading."""
    layer = layer_of(moe, expert_map)
    method = made(config().get_quant_method(layer, PREFIX), layer, experts=len(w.up))
    fill(layer, w)
    method.process_weights_after_loading(layer)
    return method, layer


def fill(layer, w):
    interleaved = layer.moe_config.activation.value == "swigluoai"
    layer.w13_weight.data.copy_(vllms_rows(w, interleaved))
    layer.w2_weight.data.copy_(w.down)
    if layer.moe_config.has_bias:
        b = cases.biases()
        pair = (b["gate"], b["up"])
        rows = torch.stack(pair, 2).flatten(1) if interleaved else torch.cat(pair, 1)
        layer.w13_bias.data.copy_(rows)
        layer.w2_bias.data.copy_(b["down"])


@pytest.mark.parametrize("name", plugin.QUANTIZATIONS)
def test_a_configuration_reaches_another_process(name):
    cls = fake_vllm.REGISTERED[name]
    there = pickle.loads(pickle.dumps(cls()))
    assert type(there) is cls and there.get_name() == name
    assert there.get_supported_act_dtypes() == [torch.bfloat16]
    assert cls.get_min_capability() == 80 and cls.get_config_filenames() == []


def test_another_version_is_registered_and_refused_where_it_is_asked_for(config, monkeypatch):
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.31.2+cpu")
    plugin.register()
    for make in (config, lambda: config.from_config({"quant_method": "modelopt"})):
        with pytest.raises(UnsupportedError, match=r"vllm 0\.31\.2\+cpu .* vllm 0\.32 and 0\.33"):
            make()
    with (
        pytest.raises(UnsupportedError, match=r"vllm 0\.31\.2\+cpu is installed"),
        pytest.warns(DeprecationWarning),
    ):
        plugin.install()
    assert config.modelopt_goes_to is None
    monkeypatch.setattr(vllm, "__version__", "0.32.0+cpu")
    config()


def test_it_says_once_that_it_is_active(config, caplog):
    import vllm

    caplog.set_level("INFO", "vllm")
    say_active.cache_clear()
    plugin.register()
    with pytest.raises(ValueError, match="quant_method is 'awq'"):
        config.from_config({"quant_method": "awq"})
    assert not caplog.messages, "nobody has a model of ours yet"
    for _ in range(2):
        config()
        config.from_config({"quant_method": "modelopt", "quant_algo": "NVFP4"})
    fake_vllm.REGISTERED["nvfp4_moe_w4a16"]()
    here = f"nvfp4-moe {nvfp4_moe.__version__} is active in vllm {vllm.__version__}: --quantization"
    assert caplog.messages == [f"{here} nvfp4_moe", f"{here} nvfp4_moe_w4a16"]
    assert {record.name for record in caplog.records} == {"vllm.nvfp4_moe"}


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("name", ["nvfp4_moe", "nvfp4_moe_w4a16"])
def test_weights_in_bf16(name, batch_invariant, monkeypatch):
    import vllm

    monkeypatch.setattr(vllm.envs, "VLLM_BATCH_INVARIANT", batch_invariant)
    w = cases.weights()
    method, layer = online(fake_vllm.REGISTERED[name], w)
    x, weights, ids = call()
    want = nvfp4_moe.fused_moe(
        x,
        nvfp4_moe.prepare_experts(w.w13, w.down),
        (ids.int(), weights),
        activation=plugin.QUANTIZATIONS[name],
        batch_invariant=batch_invariant,
    )
    assert_bitwise(served(method, layer, x, weights, ids), want, name)
    assert_bitwise(served(method, layer, x, weights, ids.int()), want, "int32")
    assert method.batch_invariant is batch_invariant
    assert all(p.startswith("nvfp4_") for p in dict(layer.named_parameters()))
    assert method.get_fused_moe_quant_config(layer) is None
    assert not (
        method.supports_eplb or method.is_monolithic or method.supports_pre_processed_weights
    )


def test_a_canary_watches_the_layers(config, monkeypatch, tmp_path):
    from nvfp4_moe.canary import from_environment

    monkeypatch.setenv("NVFP4_MOE_CANARY", "1")
    monkeypatch.setenv("NVFP4_MOE_CANARY_FOLDER", str(tmp_path))
    w, (x, weights, ids) = cases.weights(), call()
    method, layer = online(config, w)
    got = served(method, layer, x, weights, ids)
    experts = nvfp4_moe.prepare_experts(w.w13, w.down)
    assert_bitwise(got, nvfp4_moe.fused_moe(x, experts, (ids.int(), weights)), "output")
    canary = from_environment()
    canary.wait()
    assert canary is method.canary
    assert canary.counts.taken == canary.counts.inside == 1, canary.counts


KIND = ActivationType
ACTIVATIONS = {
    "silu": (KIND.Swiglu, {}, {}),
    "silu with a limit": (KIND.Swiglu, {"swiglu_limit": 0.5}, {"clamp_limit": 0.5}),
    "swigluoai": (KIND.Swiglu, {}, {"alpha": 1.702, "beta": 1.0, "clamp_limit": 7.0}),
    "swigluoai_uninterleave": (
        KIND.Swiglu,
        {"swiglu_alpha": 1.5, "swiglu_beta": 0.5, "swiglu_limit": 2.0},
        {"alpha": 1.5, "beta": 0.5, "clamp_limit": 2.0},
    ),
    "gelu": (KIND.Geglu, {}, {}),
    "gelu_tanh": (KIND.GegluTanh, {}, {}),
    "situ": (
        KIND.Situ,
        {"activation_situ_beta": 3.0, "activation_situ_linear_beta": 25.0},
        {"alpha": 3.0, "beta": 25.0},
    ),
    "relu2_no_mul": (KIND.Relu2, {}, {}),
    "silu_no_mul": (KIND.Silu, {}, {}),
    "gelu_no_mul": (KIND.Gelu, {}, {}),
}


@pytest.mark.parametrize("case", ACTIVATIONS)
def test_activations(case, config):
    kind, given, parameters = ACTIVATIONS[case]
    biased = case.startswith("swigluoai")
    w = cases.weights(kind.gated)
    moe = moe_config(case.partition(" ")[0], has_bias=biased, **given)
    method, _ = online(config, w, moe)
    b = cases.biases()
    biases = {"w13_bias": torch.cat((b["up"], b["gate"]), 1), "w2_bias": b["down"]}
    want = nvfp4_moe.prepare_experts(
        w.w13, w.down, kind, **parameters, **(biases if biased else {})
    )
    assert_same_experts(method.experts, want)


GELU = {"gelu": "none", "gelu_tanh": "tanh"}


@pytest.mark.parametrize("name", GELU)
def test_both_gelus_are_vllms(name, config):
    """vLLM's `gelu_and_mul` is exact, its `gelu_tanh_and_mul` is not: 3e-4 apart at the most."""
    x = torch.linspace(-4, 4, 401, dtype=torch.float32, device="cpu")
    kind = vllm_gate.gate_of(moe_config(name)).activation
    from nvfp4_moe.reference.activation import activate

    ours = activate(torch.stack([torch.ones_like(x), x], 1), kind)[:, 0]
    assert (ours - F.gelu(x, approximate=GELU[name])).abs().max() < 2e-6


@pytest.mark.parametrize("placement", ["linear", "round robin"])
def test_experts_of_another_rank_add_nothing(placement, config):
    w, (x, weights, ids) = cases.weights(), call()
    ids[0, 1] = -1
    here = [2, 3] if placement == "linear" else [1, 3]
    expert_map = torch.full((EXPERTS,), -1, dtype=torch.int32)
    expert_map[here] = torch.arange(2, dtype=torch.int32)
    part = cases.Weights(w.gate[here], w.up[here], w.down[here])
    got = served(*online(config, part, expert_map=expert_map), x, weights, ids)
    local = [[here.index(i) if i in here else -1 for i in row] for row in ids.tolist()]
    routing = torch.tensor(local, dtype=torch.int32), weights
    experts = nvfp4_moe.prepare_experts(part.w13, part.down)
    assert_bitwise(got, nvfp4_moe.fused_moe(x, experts, routing), placement)
    assert (routing[0] == -1).any() and (routing[0] >= 0).any()


def test_router_weights_on_the_input(config):
    w, (x, weights, ids) = cases.weights(), call()
    layer = layer_of()
    layer.apply_router_weight_on_input = True
    method = made(config().get_quant_method(layer, PREFIX), layer)
    fill(layer, w)
    method.process_weights_after_loading(layer)
    experts = replace(nvfp4_moe.prepare_experts(w.w13, w.down), router_weight_on_input=True)
    one = weights[:, :1].contiguous(), ids[:, :1].int().contiguous()
    want = nvfp4_moe.fused_moe(x, experts, (one[1], one[0]))
    assert_bitwise(served(method, layer, x, *one), want, "output")


def test_reloaded_weights_run_in_the_memory_of_the_first(config):
    """As vLLM's reload does: the read parameters come back, and the packed ones are copied over."""
    first, second, (x, weights, ids) = cases.weights(), cases.weights(seed=1), call()
    method, layer = online(config, first)
    before = dict(layer.named_parameters())
    method.process_weights_after_loading(layer)
    assert dict(layer.named_parameters()) == before, "packed once, until vLLM reloads"
    for name in before:
        delattr(layer, name)
    made(method, layer)
    fill(layer, second)
    delattr(layer, "_already_called_process_weights_after_loading")
    method.process_weights_after_loading(layer)
    assert set(dict(layer.named_parameters())) == set(before)
    for name, parameter in before.items():
        parameter.data.copy_(getattr(layer, name))
    want = nvfp4_moe.fused_moe(
        x, nvfp4_moe.prepare_experts(second.w13, second.down), (ids.int(), weights)
    )
    assert_bitwise(served(method, layer, x, weights, ids), want, "the second weights")


def of_checkpoint(name, form, expert_map=None, here=range(EXPERTS), use_ep=False):
    """(method, layer) of vLLM with a checkpoint's tensors, and the checkpoint's parts."""
    parts = cases.quantized(cases.weights())
    parts["up"]["decode"][2] = parts["gate"]["decode"][2]
    kinds, inverse = FORMATS[form], form == "compressed-tensors"
    configuration = (
        cases.compressed_config()
        if inverse
        else {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": []}
    )
    layer = layer_of(moe_config(use_ep=use_ep), expert_map)
    method = fake_vllm.REGISTERED[name].from_config(configuration).get_quant_method(layer, PREFIX)
    made(method, layer, experts=len(here), all_experts=EXPERTS)
    for parameter, value in loaded_weights(parts, kinds, inverse):
        target = getattr(layer, parameter).data
        target.copy_(value if len(target) == EXPERTS else value[list(here)])
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
    expected = nvfp4_moe.fused_moe(
        x, want, (ids.int(), weights), activation=plugin.QUANTIZATIONS[name]
    )
    assert_bitwise(served(method, layer, x, weights, ids), expected, name)


def test_static_scales_are_the_largest_of_all_ranks():
    expert_map = torch.tensor([0, 1, -1, -1], dtype=torch.int32)
    method, layer, parts = of_checkpoint(
        "nvfp4_moe_static", "modelopt", expert_map, here=(0, 1), use_ep=True
    )
    method.process_weights_after_loading(layer)
    largest = torch.maximum(parts["gate"]["input"], parts["up"]["input"])
    assert largest.argmax() > 1, "of an expert of another rank"
    assert_bitwise(method.experts.input_scale[0], 1 / largest.max(), "input scale")
    with pytest.raises(UnsupportedError, match="of this rank's experts alone"):
        of_checkpoint("nvfp4_moe_static", "compressed-tensors", expert_map, (0, 1), use_ep=True)


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        (1.0, "never calibrated"),
        (0.0, "above 0 for every expert"),
        (torch.nan, "above 0 for every"),
    ],
)
def test_static_scales_that_nobody_measured(scales, message):
    method, layer, _ = of_checkpoint("nvfp4_moe_static", "modelopt")
    for name in ("w13_input_scale", "w2_input_scale"):
        getattr(layer, name).data.fill_(scales)
    with pytest.raises(ValueError, match=message):
        method.process_weights_after_loading(layer)


def test_layers_that_stay_vllms(config):
    from nvfp4_moe.serving.vllm import method

    linear, other, experts = fake_vllm.LinearBase(), torch.nn.Embedding(2, 2), layer_of()
    bf16 = config()
    assert isinstance(bf16.get_quant_method(linear, "x"), fake_vllm.UnquantizedLinearMethod)
    assert bf16.get_quant_method(other, "x") is None
    algorithm = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["mtp.*"]}
    modelopt = config.from_config(algorithm)
    assert modelopt.get_quant_method(linear, "x") == "vLLM's own method"
    assert modelopt.get_quant_method(experts, "mtp.experts") is None
    assert modelopt.get_name() == "modelopt_fp4", "models of vLLM ask for it"
    modelopt.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    modelopt.exclude_modules = ["*.q_proj", "*.k_proj"]
    assert not modelopt.is_layer_excluded("model.layers.0.qkv_proj")
    modelopt.exclude_modules = ["*.q_proj", "*.k_proj", "*.v_proj"]
    assert modelopt.is_layer_excluded("model.layers.0.qkv_proj")
    assert not modelopt.is_layer_excluded("model.layers.0.o_proj")
    algorithms = {"a.experts": {"quant_algo": "NVFP4"}, "b.experts": {"quant_algo": "FP8"}}
    mixed = config.from_config(
        {
            "quant_method": "modelopt",
            "quant_algo": "mixed_precision",
            "quantized_layers": algorithms,
        }
    )
    assert type(mixed.get_quant_method(experts, "a.experts")) is method.ModelOptNvfp4MoE
    assert mixed.get_quant_method(experts, "b.experts") == "vLLM's own method"
    compressed = config.from_config(cases.compressed_config("mtp."))
    assert compressed.get_quant_method(experts, "mtp.experts") == "vLLM's own method"
    assert compressed.get_quant_method(linear, PREFIX) == "vLLM's own method"
    for configuration in (modelopt, mixed, compressed):
        assert configuration.get_supported_act_dtypes() == [torch.bfloat16]
        assert configuration.get_min_capability() == 80
        assert pickle.loads(pickle.dumps(configuration)).activation == "per-token"


@pytest.mark.parametrize(
    "declared",
    [
        {"quant_method": "fp8"},
        {"quant_method": "modelopt", "quant_algo": "FP8"},
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
    def asked(moe, cls=config):
        return cls().get_quant_method(layer_of(moe), PREFIX)

    with pytest.raises(
        UnsupportedError, match="activation is 'swiglustep'; it must be one of gelu"
    ):
        asked(moe_config("swiglustep"))
    with pytest.raises(UnsupportedError, match="activation_situ_linear_beta is None"):
        asked(moe_config("situ", activation_situ_beta=1.0))
    static = fake_vllm.REGISTERED["nvfp4_moe_static"]
    with pytest.raises(UnsupportedError, match="in bf16 and has no static activation scales"):
        asked(moe_config(), static)
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


def test_a_checkpoint_is_taken_over_where_the_user_names_us(config, monkeypatch):
    declared = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    take = config.override_quantization_method
    assert take(declared, "nvfp4_moe") == "nvfp4_moe"
    assert take(declared, None) is None and take(declared, "nvfp4_moe_w4a16") is None
    for switch, name in (("0", "nvfp4_moe_static"), ("1", "nvfp4_moe")):
        monkeypatch.setenv(environment.SWITCH_VARIABLES[0], switch)
        with pytest.warns(DeprecationWarning, match="--quantization nvfp4_moe"):
            plugin.install()
        for user in (None, "modelopt_fp4"):
            found = {
                c.override_quantization_method(declared, user)
                for c in fake_vllm.REGISTERED.values()
            }
            assert found == {None, name}
        assert take({"quant_method": "fp8"}, None) is None
    config.modelopt_goes_to = None


def test_vllm_has_every_activation_that_is_served():
    path = "model_executor/layers/fused_moe/activation.py"
    values = set(members_of("vllm", path, "MoEActivation").values())
    assert {*vllm_gate._ACTIVATIONS, vllm_gate.INTERLEAVED} <= values


def test_the_policy_has_every_backend_of_vllm():
    tree = ast.parse(source_of("vllm", "model_executor/layers/fused_moe/oracle/nvfp4.py"))
    (function,) = [
        n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "map_nvfp4_backend"
    ]
    (mapping,) = [n for n in ast.walk(function) if isinstance(n, ast.Dict)]
    assert {key.value for key in mapping.keys} == set(SERVERS["vllm"].backends)


def test_apply_has_vllms_arguments():
    from nvfp4_moe.serving.vllm.method import Served

    path = "model_executor/layers/fused_moe/fused_moe_method_base.py"
    theirs = arguments_of("vllm", path, "apply", "FusedMoEMethodBase")
    code = Served.apply.__code__
    assert list(code.co_varnames[: code.co_argcount]) == theirs
