"""The fields of a model's config.json that say what its experts compute, and those that do not: data.

Sources: transformers 5.24.0 (`models/*/configuration_*.py` and the `_apply_gate` of its experts),
sglang 0.5.23 (`srt/configs`, `srt/models/{bailing_moe_v3,kimi_k3,minimax_m3,step3p5}.py`), vllm 0.33.0
(`model_executor/layers/fused_moe/activation.py`).
"""

# SPDX-License-Identifier: Apache-2.0
import re
from dataclasses import dataclass

from ..reference.activation import ActivationType, ParameterName, by_name

LANGUAGE_MODELS = ("text_config", "language_config", "llm_config", "thinker_config")
"""Objects that hold the language model of a larger one; their fields count before the outer ones."""

EXPERT_COUNTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")

ACTIVATION_FIELDS = ("mlp_hidden_act", "hidden_act", "hidden_activation", "activation_function")

ACTIVATIONS = by_name("hugging_face")
"""The activation by its name in the configuration, and by the presence of gate projections."""


@dataclass(frozen=True)
class ParameterField:
    """A field that holds a parameter of the experts' activation.

    With `per_layer` it is a list with one entry a layer, in which None and 0 mean no limit.
    """

    parameter: ParameterName
    activation: ActivationType
    per_layer: bool = False


_SWIGLU, _STEP, _SITU = ActivationType.Swiglu, ActivationType.SwigluStep, ActivationType.Situ
PARAMETER_FIELDS = {
    # DeepSeek-V4, GLM-5.3, GigaChat-3.5, Hunyuan-V4, GPT-OSS, MiniMax-M3: before the SiLU.
    "swiglu_limit": ParameterField("clamp_limit", _SWIGLU),
    # Bailing-MoE-V3: SGLang passes it as gemm1_clamp_limit, which clamps before the SiLU.
    "expert_swiglu_limit_list": ParameterField("clamp_limit", _SWIGLU, per_layer=True),
    # Step-3.5 and Step-3.7: the SiLU's result is clamped.
    "swiglu_limits": ParameterField("clamp_limit", _STEP, per_layer=True),
    "swiglu_alpha": ParameterField("alpha", _SWIGLU),
    "swiglu_beta": ParameterField("beta", _SWIGLU),
    # Kimi-K3: a * tanh(gate / a) * sigmoid(gate) * b * tanh(up / b).
    "activation_situ_beta": ParameterField("alpha", _SITU),
    "activation_situ_linear_beta": ParameterField("beta", _SITU),
}

OAI = {"alpha": 1.702, "beta": 1.0, "clamp_limit": 7.0}
"""GPT-OSS's SwiGLU: gate * sigmoid(1.702 gate) * (up + 1), clamped at 7 or `swiglu_limit`."""
OAI_ACTIVATIONS = ("swigluoai", "swigluoai_uninterleave")
OAI_MODELS = ("gptoss", "minimaxm3", "openaiprivacyfilter")
"""Models that compute it whatever their `hidden_act` says: starts of a `model_type` or an architecture,
in lower case and without `_`."""

INTERLEAVED_MODELS = ("gptoss",)
"""Models whose fused rows are gate, up, gate, up, ...; all others have [gate; up]."""

WEIGHT_ON_INPUT_MODELS = ("llama4",)
WEIGHT_ON_INPUT_FIELDS = ("apply_router_weight_on_input", "moe_apply_router_weight_on_input")
"""The router's weight multiplies the rows before the experts (Llama 4, Laguna)."""

UNSERVED_MODELS = {
    "musespark": "normalizes each expert's result before it is weighted",
    "inkling2": "caps gate and up softly",
}

REFUSED_FIELDS = {"mlp_multipliers": "multiplies gate and the result of each expert"}
"""Fields that change the function, and that nothing here computes unless every number is 1: Falcon-H1's
are down(up(x) * act(gate(x) * m[0])) * m[1] (`modeling_falcon_h1.py`, `FalconH1MLP`)."""

SUSPECTS = (
    (re.compile(r"limit|clamp|clip|cap$|capp(ed|ing)"), "clamp_limit"),
    (re.compile(r"alpha(?!bet)"), "alpha"),
    (re.compile(r"(?<!alpha)beta"), "beta"),
    (re.compile(r"(^|_)(act|acts|actfn|activations?)(_|$)|glu|gelu|silu|swish|relu"), "activation"),
    (re.compile(r"multiplier"), "activation"),
)
"""Names that could mean a change of what the experts compute, and the argument that answers for it."""

ELSEWHERE = re.compile(
    r"^(vision|audio|image|video|mm|mamba|ssm|conv|attn|attention|linear_attn|full_attn|rope|rotary|"
    r"llama_4_scaling|router|moe_router|projector|lora|adam|shared_experts?|logits?|final_logits?|"
    r"layernorm|norm|embedding|residual|index)_"
)
"""Starts of names of other parts of a model."""

HARMLESS = frozenset(
    # Attention and residual stream: OLMoE, DBRX, MiniMax, Inkling, Bailing-Hybrid.
    ("clip_qkv", "mlp_alpha_factor", "mlp_beta_factor", "log_scaling_alpha", "qk_l2_clip_threshold",
     "rel_l2_clip_threshold", "linear_silu", "qk_clip",
     # Attention's keys, logits: Falcon-H1, Grok-1. The embedding's, the residual stream's (Granite-MoE
     # adds residual_multiplier times the layer's result), attention's and the SSM's: `ELSEWHERE`.
     "key_multiplier", "lm_head_multiplier", "output_multiplier_scale",
     # The size of dense layers: Llama.
     "ffn_dim_multiplier",
     # State-space layers: Nemotron-H, Granite-MoE-Hybrid.
     "time_step_limit",
     # Routing: Zaya, Inkling.
     "clamp_temp", "gate_activation",
     # Training: DeepSeek-V2, NLLB-MoE, Zaya.
     "aux_loss_alpha", "activation_dropout", "activation_func_fp8_input_store",
     "bias_activation_fusion", "activation_checkpointing", "gradient_clipping", "clip_grad",
     # ERNIE 4.5: one kernel for what is computed anyway.
     "fuse_swiglu",
     # Shared experts, which are ordinary layers: Step-3.5, Bailing-MoE-V3.
     "swiglu_limits_shared", "share_expert_swiglu_limit_list",
     # Encoders of images and sound: Gemma 4, Inkling.
     "use_clipped_linears", "clip_duration_s", "clip_min_duration_s",
     "speaker_activity_threshold")
)  # fmt: skip
