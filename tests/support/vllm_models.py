"""A small Qwen3-MoE with a tokenizer of its own, and its greedy tokens in transformers."""

# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

VOCABULARY = 256
PROMPTS = [[5, 9, 17, 33, 65], [1, 2, 3, 4, 5]]
TOKENS = 8
SEED = 1
"""A model whose tokens change with its experts' arithmetic and not with the rounding of attention: its
two largest logits differ by a tenth of a standard deviation at every step (bf16, per token, W4A16)."""


def write(folder: Path) -> None:
    """Write the model in bf16 and its tokenizer, in which `t7` is the token 7."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    config = transformers.Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        initializer_range=0.05,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(SEED)
    transformers.Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)


def text(prompt: list[int]) -> str:
    return " ".join(f"t{token}" for token in prompt)


def generated(folder: Path, implementation: str) -> list[list[int]]:
    """Return the greedy tokens that transformers generates with an implementation of the experts."""
    import transformers

    from nvfp4_moe.serving.transformers import register

    register()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.eval().set_experts_implementation(implementation)
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        made = model.generate(ids, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None)
        found.append(made[0, len(prompt) :].tolist())
    return found


def write_compressed(modelopt: Path, folder: Path) -> None:
    """Write ModelOpt's NVFP4 experts as compressed-tensors, whose scalars are the reciprocals."""
    folder.mkdir()
    for file in modelopt.iterdir():
        if (
            file.suffix != ".safetensors"
            and "index" not in file.name
            and "hf_quant" not in file.name
        ):
            (folder / file.name).write_bytes(file.read_bytes())
    names = {
        "weight_scale_2": "weight_global_scale",
        "input_scale": "input_global_scale",
    }
    tensors = {}
    for file in sorted(modelopt.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            module, _, kind = name.rpartition(".")
            if kind in names:
                tensors[f"{module}.{names[kind]}"] = (1 / tensor).reshape(1)
            elif tensor.dtype == torch.uint8:
                tensors[f"{module}.weight_packed"] = tensor
            else:
                tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    four = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    four |= {"symmetric": True}
    group = {"weights": four, "input_activations": four | {"dynamic": "local"}}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "config_groups": {"group_0": group | {"targets": ["Linear"]}},
        "ignore": ["re:.*self_attn.*", "re:.*mlp.gate$", "lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
