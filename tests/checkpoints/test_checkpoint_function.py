"""The experts' function is what config.json says; a field that cannot be followed is refused by name."""

# SPDX-License-Identifier: Apache-2.0
import json
import math

import pytest
import torch
from checkpoint_cases import (
    MODELOPT_KINDS,
    NAMINGS,
    assert_same_experts,
    modelopt_config,
    nvfp4,
    quantized,
    weights,
    write,
)

from nvfp4_moe.checkpoints import CheckpointError, load_experts
from nvfp4_moe.reference.activation import ActivationType
from nvfp4_moe.reference.weights.prepare import assemble_experts

QWEN = NAMINGS["qwen3-moe"]
OAI = {"alpha": 1.702, "beta": 1.0, "clamp_limit": 7.0}
LAYER = 3


@pytest.fixture(scope="module")
def parts():
    """Gate and up of one scale, which a limit asks for."""
    w = quantized(weights())
    w["gate"]["decode"] = w["up"]["decode"]
    return w


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, parts):
    """Writes config.json of a checkpoint: `checkpoint(**fields)`."""
    folder = tmp_path_factory.mktemp("function") / "c"
    tensors = nvfp4(QWEN, LAYER, parts, MODELOPT_KINDS)
    write(folder, [tensors], {}, hf_quant_config=modelopt_config())

    def with_config(**config):
        content = {"hidden_act": "silu", "num_experts": 4} | config
        (folder / "config.json").write_text(json.dumps(content))
        return folder

    return with_config


def assembled(parts, activation=ActivationType.Swiglu, **parameters):
    first = [parts[p] for p in ("up", "gate")]
    return assemble_experts(
        torch.cat([p["codes"] for p in first], 1),
        torch.cat([p["scales"].view(torch.uint8) for p in first], 1),
        torch.stack([p["decode"] for p in first], 1),
        *(parts["down"][kind] for kind in ("codes", "scales", "decode")),
        activation,
        **parameters,
    )


STEP = ActivationType.SwigluStep
FOLLOWED = {
    "DeepSeek-V4": ({"swiglu_limit": 10.0}, {"clamp_limit": 10.0}),
    "a limit without a point": ({"swiglu_limit": 10}, {"clamp_limit": 10.0}),
    "no limit": ({"swiglu_limit": None}, {}),
    "a limit of zero is none": ({"swiglu_limit": 0.0}, {}),
    "Step-3.5, this layer": (
        {"swiglu_limits": [None, 0, 0.0, 7.0]},
        {"activation": STEP, "clamp_limit": 7.0},
    ),
    "Step-3.5, another layer": ({"swiglu_limits": [7, 7, 7, 0.0]}, {}),
    "Step-3.5, another layer of None": ({"swiglu_limits": [7, 7, 7, None]}, {}),
    "Step-3.5, nowhere": ({"swiglu_limits": []}, {}),
    "Step-3.5, shared experts": ({"swiglu_limits_shared": [7, 7, 7, 7]}, {}),
    "Bailing": ({"expert_swiglu_limit_list": [0, 0, 0, 5]}, {"clamp_limit": 5.0}),
    "all three": ({"swiglu_limit": 7.0, "swiglu_alpha": 1.702, "swiglu_beta": 1.0}, OAI),
    "neutral ones": ({"swiglu_alpha": 1.0, "swiglu_beta": 0.0}, {}),
    "beta alone": ({"swiglu_beta": 1.0}, {"beta": 1.0}),
    "GPT-OSS by its model_type": ({"model_type": "gpt_oss"}, OAI),
    "GPT-OSS by its architecture": ({"architectures": ["GptOssForCausalLM"]}, OAI),
    "GPT-OSS without hidden_act": ({"model_type": "gpt_oss", "hidden_act": None}, OAI),
    "GPT-OSS with another limit": (
        {"model_type": "gpt_oss", "swiglu_limit": 5.0},
        {**OAI, "clamp_limit": 5.0},
    ),
    "GPT-OSS without a limit": (
        {"model_type": "gpt_oss", "swiglu_limit": 0.0},
        {"alpha": 1.702, "beta": 1.0},
    ),
    "swigluoai": ({"hidden_act": "swigluoai"}, OAI),
    "swigluoai with alpha": (
        {"hidden_act": "swigluoai", "swiglu_alpha": 1.5},
        {**OAI, "alpha": 1.5},
    ),
    "swigluoai, not interleaved": ({"hidden_act": "swigluoai_uninterleave"}, OAI),
    "MiniMax-M3 as silu": (
        {"model_type": "minimax_m3", "swiglu_alpha": 1.702, "swiglu_limit": 7.0},
        OAI,
    ),
    "nested": ({"text_config": {"swiglu_limit": 10.0}}, {"clamp_limit": 10.0}),
    "nested twice": (
        {"thinker_config": {"text_config": {"swiglu_limit": 9}}},
        {"clamp_limit": 9.0},
    ),
    "the language model's own": (
        {"swiglu_limit": 1.0, "text_config": {"swiglu_limit": 10.0}},
        {"clamp_limit": 10.0},
    ),
    "the vision model's": ({"vision_config": {"swiglu_limit": 10.0, "moe_clamp": 1}}, {}),
    "gelu": ({"hidden_act": "gelu_pytorch_tanh"}, {"activation": ActivationType.GegluTanh}),
    "capitals": ({"hidden_act": "SiLU"}, {}),
    "Kimi-K3": (
        {"hidden_act": "situ", "activation_situ_beta": 4.0, "activation_situ_linear_beta": 2.0},
        {"activation": ActivationType.Situ, "alpha": 4.0, "beta": 2.0},
    ),
    "an unknown name for the same": ({"expert_act": "silu"}, {}),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_fields_are_followed(name, checkpoint, parts):
    config, parameters = FOLLOWED[name]
    got = load_experts(checkpoint(**config), LAYER)
    assert_same_experts(got, assembled(parts, **parameters))


REFUSED = {
    "unknown limit": ({"moe_output_limit": 3.0}, "moe_output_limit is 3.0", "clamp_limit"),
    "unknown clamp": ({"expert_clamp": [1, 2]}, "expert_clamp is an array of 2", "clamp_limit"),
    "unknown alpha": ({"glu_alpha": 1.7}, "glu_alpha is 1.7", "alpha"),
    "unknown beta": ({"up_beta": 0}, "up_beta is 0", "beta"),
    "unknown activation": ({"moe_act": "tanh"}, 'moe_act is "tanh"', "activation"),
    "unknown activation in camels": ({"expertActFn": "relu"}, 'expertActFn is "relu"', "activation"),
    "unknown glu": ({"use_reglu": True}, "use_reglu is true", "activation"),
    "in objects of an array": (
        {"block_configs": [{"ffn": {"hidden_act": "gelu"}}]},
        r'block_configs\[0\].ffn.hidden_act is "gelu"',
        "activation",
    ),
    "a limit in an array of objects": (
        {"ffn_config": [{"gate_limit": 7}]},
        r"ffn_config\[0\].gate_limit is 7",
        "clamp_limit",
    ),
    "in an object of experts": (
        {"moe_config": {"gate_limit": 7}},
        "moe_config.gate_limit is 7",
        "clamp_limit",
    ),
    "nested": ({"text_config": {"act_clamp": 1.0}}, "act_clamp is 1.0", "clamp_limit"),
    "a limit of gelu": (
        {"hidden_act": "gelu", "swiglu_limit": 7.0},
        "swiglu_limit is 7.0, of Swiglu; the activation is Geglu",
        "clamp_limit",
    ),
    "alpha after the SiLU's clamp": (
        {"swiglu_limits": [7] * 4, "swiglu_alpha": 1.702, "swiglu_beta": 0.0},
        "swiglu_alpha is 1.702, of Swiglu; the activation is SwigluStep",
        "alpha",
    ),
    "alpha without beta": ({"swiglu_alpha": 1.702}, "swiglu_alpha is 1.702 without swiglu_beta", "beta"),
    "two limits": (
        {"swiglu_limits": [7] * 4, "swiglu_limit": 7.0},
        "swiglu_limit is 7.0 and swiglu_limits is 7.0, which contradict",
        "clamp_limit",
    ),
    "a limit for no layer": ({"swiglu_limits": [7.0]}, "swiglu_limits has 1 entries", "clamp_limit"),
    "a word": ({"swiglu_limit": "7"}, 'swiglu_limit is "7"; it must be a number', "clamp_limit"),
    "a negative limit": ({"swiglu_limit": -7}, "swiglu_limit is -7; it must be", "clamp_limit"),
    "true": ({"swiglu_alpha": True, "swiglu_beta": 0}, "swiglu_alpha is true", "alpha"),
    "no list": ({"swiglu_limits": 7.0}, "swiglu_limits is 7.0; it must be a list", "clamp_limit"),
    "an object": ({"swiglu": {"limit": 7}}, "swiglu is an object of 1", "activation"),
    "an alpha beyond fp32": (
        {"swiglu_alpha": 10**60, "swiglu_beta": 0}, "it must be a number of fp32", "alpha",
    ),
    "a name with a hyphen": ({"moe-clamp": 1}, '"moe-clamp" is 1', "clamp_limit"),
    "an infinite alpha": (
        {"swiglu_alpha": math.inf, "swiglu_beta": 0}, "swiglu_alpha is Infinity", "alpha",
    ),
    "two activations": (
        {"hidden_activation": "gelu"}, 'hidden_act is "silu" and hidden_activation is "gelu"',
        "activation",
    ),
    "SiTU with a linear up": ({"hidden_act": "situ"}, "activation_situ_linear_beta is missing", "beta"),
    "an unknown name": ({"hidden_act": "xielu"}, 'hidden_act is "xielu"', "activation"),
    "a multiplier": ({"expert_multiplier": 0.5}, "expert_multiplier is 0.5", "activation"),
    "multipliers of gates": (
        {"moe_config": {"gate_multipliers": [1, 2]}},
        "moe_config.gate_multipliers is an array of 2",
        "activation",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_fields_that_cannot_be_followed_are_refused_by_name(name, checkpoint):
    config, message, argument = REFUSED[name]
    with pytest.raises(CheckpointError, match=message) as e:
        load_experts(checkpoint(**config), LAYER)
    assert f"`{argument}`" in str(e.value)
    given = {"clamp_limit": 3.0, "alpha": 1.5, "beta": 0.5, "activation": ActivationType.Swiglu}
    made = load_experts(checkpoint(**config), LAYER, **given)
    assert made.activation == ActivationType.Swiglu
    assert (made.gemm1_alpha == 1.5).all() and (made.gemm1_clamp_limit > 0).all()


def test_all_fields_are_listed_at_once(checkpoint):
    with pytest.raises(CheckpointError) as e:
        load_experts(checkpoint(moe_clamp=1, moe_alpha=2, swiglu_limit="x"), LAYER)
    assert len(e.value.problems) == 3


HARMLESS = {
    "mamba_hidden_act": "silu", "mamba_dt_limit": [0, 1], "time_step_limit": [0.0, 1.0],
    "clip_qkv": 8.0, "aux_loss_alpha": 0.001, "router_aux_loss_coef": 0.01, "rope_alpha": 1000.0,
    "moe_router_activation_func": "sigmoid", "activation_dropout": 0.1, "vision_hidden_act": "gelu",
    "linear_attn_alpha_factor": 1.5, "full_attn_beta_factor": 1.0, "mlp_alpha_factor": 2.0,
    "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "moe_layer_freq": 1,
    "num_experts_per_tok": 8, "alphabet_size": 26, "scale_factor": 2.0, "max_action_length": 5,
    "layernorm_mlp_alpha": 3.5, "num_activated_experts": 8, "logits_soft_cap": 30.0,
    "clip_config": {"hidden_act": "quick_gelu"}, "fuse_swiglu": True, "attention_bias": False,
    "expert_clamp": None, "use_glu_clamp": False,
    "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.0078125,
    "attention_in_multiplier": 0.5, "key_multiplier": 0.39, "lm_head_multiplier": 0.02,
    "ssm_multipliers": [0.35, 0.25, 0.17, 0.5, 0.35], "ssm_in_multiplier": 1.25,
    "ffn_dim_multiplier": 1.3, "mlp_multipliers": [1.0, 1], "expert_multiplier": 1,
}  # fmt: skip


def test_fields_of_other_parts_are_harmless(checkpoint, parts):
    assert_same_experts(load_experts(checkpoint(**HARMLESS), LAYER), assembled(parts))


@pytest.mark.parametrize("value", [[0.88, 0.59], [1.0, 0.5], 2, "1", True])
@pytest.mark.parametrize("given", [{}, {"activation": ActivationType.Swiglu}], ids=["", "given"])
def test_multipliers_inside_an_expert_are_refused(value, given, checkpoint):
    """No argument of ours says what Falcon-H1's do, so that none overrules them."""
    with pytest.raises(
        CheckpointError, match=r"mlp_multipliers is .*multiplies gate and the result"
    ):
        load_experts(checkpoint(mlp_multipliers=value), LAYER, **given)


def test_arguments_count_before_the_configuration(checkpoint, parts):
    folder = checkpoint(swiglu_limit=10.0, swiglu_alpha=1.702, swiglu_beta=1.0)
    got = load_experts(folder, LAYER, clamp_limit=3.0, alpha=1.0, beta=0.0)
    assert_same_experts(got, assembled(parts, clamp_limit=3.0))
    got = load_experts(folder, LAYER, clamp_limit=math.inf, alpha=1.0, beta=0.0)
    assert_same_experts(got, assembled(parts))
    geglu = ActivationType.Geglu
    with pytest.raises(CheckpointError, match=r"swiglu_limit is 10\.0, of Swiglu"):
        load_experts(folder, LAYER, activation=geglu)
    got = load_experts(folder, LAYER, activation=geglu, clamp_limit=math.inf, alpha=1.0, beta=0.0)
    assert_same_experts(got, assembled(parts, geglu))


@pytest.mark.parametrize("name", ["alpha", "beta", "clamp_limit"])
@pytest.mark.parametrize(
    "value",
    ["7", [1.0, 2.0], 1j, True, False, math.nan, 1e39, 10**400, torch.tensor([math.nan])],
    ids=lambda value: str(value)[:20],
)
def test_an_argument_of_no_meaning_is_named(name, value, checkpoint):
    with pytest.raises((TypeError, ValueError), match=rf"^{name}\b.* is .*; it must be "):
        load_experts(checkpoint(), LAYER, **{name: value})


def test_a_limit_needs_one_scale_for_gate_and_up(tmp_path):
    tensors = nvfp4(QWEN, LAYER, quantized(weights()), MODELOPT_KINDS)
    config = {**dict(QWEN.config), "swiglu_limit": 10.0}
    folder = write(tmp_path / "c", [tensors], config, hf_quant_config=modelopt_config())
    with pytest.raises(
        CheckpointError, match=r"differs between up and gate.*swiglu_limit of config"
    ):
        load_experts(folder, LAYER)
    with pytest.raises(CheckpointError, match="differs between up and gate") as e:
        load_experts(folder, LAYER, clamp_limit=7.0)
    assert "config.json" not in str(e.value)
    assert load_experts(folder, LAYER, clamp_limit=math.inf).gemm1_clamp_limit is None


def test_a_draft_layer_has_no_entry_in_a_list_of_layers(tmp_path, parts):
    module = "mtp.layers.0.mlp.experts"
    tensors = {
        name.replace(QWEN.of(LAYER), module): t
        for name, t in nvfp4(QWEN, LAYER, parts, MODELOPT_KINDS).items()
    }
    config = {**dict(QWEN.config), "swiglu_limits": [7.0, 7.0]}
    folder = write(tmp_path / "c", [tensors], config, hf_quant_config=modelopt_config())
    with pytest.raises(CheckpointError, match="none of which is for mtp"):
        load_experts(folder, module)


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({}, False),
        ({"model_type": "llama4_text"}, True),
        ({"architectures": ["Llama4ForConditionalGeneration"]}, True),
        ({"model_type": "llama"}, False),
        ({"apply_router_weight_on_input": True}, True),
        ({"moe_apply_router_weight_on_input": False}, False),
    ],
)
def test_where_the_router_weighs(config, wanted, checkpoint):
    assert load_experts(checkpoint(**config), LAYER).router_weight_on_input is wanted
