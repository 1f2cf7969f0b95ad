"""Small models of transformers, made from configurations with random weights."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from typing import Any

import torch

SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "num_experts_per_tok": 2,
    "initializer_range": 0.2,  # so that the experts decide tokens
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def qwen3(transformers: Any) -> Any:
    sizes = {"head_dim": 32, "intermediate_size": 64, "moe_intermediate_size": 48, "num_experts": 8}
    return transformers.Qwen3MoeConfig(**SIZES, **sizes, norm_topk_prob=True)


def gpt_oss(transformers: Any) -> Any:
    sizes = {"head_dim": 32, "intermediate_size": 48, "num_local_experts": 8}
    return transformers.GptOssConfig(**SIZES, **sizes, layer_types=["full_attention"] * 2)


def deepseek_v3(transformers: Any) -> Any:
    sizes = {"intermediate_size": 64, "moe_intermediate_size": 48, "n_routed_experts": 8}
    groups = {"n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
    heads = {"qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32}
    ranks = {"q_lora_rank": 32, "kv_lora_rank": 32}
    return transformers.DeepseekV3Config(**SIZES, **sizes, **groups, **heads, **ranks)


def mixtral(transformers: Any) -> Any:
    sizes = {"head_dim": 32, "intermediate_size": 48, "num_local_experts": 8}
    return transformers.MixtralConfig(**SIZES, **sizes)


CONFIGURATIONS: dict[str, Callable[[Any], Any]] = {
    "qwen3": qwen3,
    "gpt-oss": gpt_oss,
    "deepseek-v3": deepseek_v3,
    "mixtral": mixtral,
}


def model(transformers: Any, name: str) -> Any:
    """A model in bf16 whose biases are not 0, as those of new models are."""
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(
        CONFIGURATIONS[name](transformers), dtype=torch.bfloat16
    )
    with torch.no_grad():
        for parameter, value in made.named_parameters():
            if parameter.endswith("proj_bias"):
                value.normal_(std=0.5)
    return made.eval()
