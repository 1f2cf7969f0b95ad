"""The modules that a conversion leaves alone are described so that servers know their fused matrices."""

# SPDX-License-Identifier: Apache-2.0
import json

import fake_vllm
import pytest
import torch
from checkpoint_cases import NAMINGS, ordinary, weights, write

from nvfp4_moe.checkpoints import convert

QWEN = NAMINGS["qwen3-moe"]
FUSED = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
    "fused_qkv_a_proj": ["q_a_proj", "kv_a_proj_with_mqa"],
}
"""As models of vLLM have them in `packed_modules_mapping`."""
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "q_a_proj", "kv_a_proj_with_mqa")
DENSE = ("gate_proj", "up_proj", "down_proj")
PLACES = {"": "model.", "language model": "model.language_model."}


def converted(tmp_path, parent="model.", exclude=(), more=None):
    """Convert 12 layers, of which 0 is dense; returns vLLM's reading of the configuration."""
    modules = ["lm_head", f"{parent}embed_tokens", "model.visual.blocks.0.attn.qkv"]
    tensors = {}
    for layer in range(12):
        of = f"{parent}layers.{layer}"
        modules += [f"{of}.self_attn.{p}" for p in ATTENTION]
        if layer == 0:
            modules += [f"{of}.mlp.{p}" for p in DENSE]
            continue
        modules += [f"{of}.mlp.gate", f"{of}.mlp.shared_expert_gate"]
        modules += [f"{of}.mlp.shared_expert.{p}" for p in DENSE]
        experts = ordinary(QWEN, layer, weights(sizes=(32, 16)))
        tensors |= {n.replace("model.", parent, 1): t for n, t in experts.items()}
    one = torch.ones((16, 16), dtype=torch.bfloat16, device="cpu")
    tensors |= {f"{module}.weight": one.clone() for module in modules} | (more or {})
    config = dict(QWEN.config)
    if more:
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    write(tmp_path / "src", [tensors], config)
    convert(tmp_path / "src", tmp_path / "dst", exclude=exclude)
    written = json.loads((tmp_path / "dst" / "config.json").read_text())["quantization_config"]
    vllm = fake_vllm.ModelOptNvFp4Config.from_config(written)
    vllm.packed_modules_mapping = FUSED
    return vllm, written["ignore"]


def fused(layer: int, parent: str = "model.") -> list[str]:
    """The linear layers that vLLM makes of a layer, beside its experts."""
    of = f"{parent}layers.{layer}"
    names = [f"{of}.self_attn.{p}" for p in ("qkv_proj", "o_proj", "fused_qkv_a_proj")]
    if layer == 0:
        return [*names, f"{of}.mlp.gate_up_proj", f"{of}.mlp.down_proj"]
    shared = [f"{of}.mlp.shared_expert.{p}" for p in ("gate_up_proj", "down_proj")]
    return [*names, *shared, f"{of}.mlp.gate", f"{of}.mlp.shared_expert_gate"]


@pytest.mark.parametrize("place", PLACES)
def test_vllm_knows_what_is_left_alone(place, tmp_path):
    parent = PLACES[place]
    vllm, patterns = converted(tmp_path, parent)
    for layer in range(12):
        assert all(vllm.is_layer_excluded(name) for name in fused(layer, parent))
        for name in ("", ".0.gate_proj") if layer else ():
            assert not vllm.is_layer_excluded(f"{parent}layers.{layer}.mlp.experts{name}")
    assert vllm.is_layer_excluded("lm_head") and vllm.is_layer_excluded(
        "model.visual.blocks.3.attn"
    )
    assert f"{parent}layers.*.self_attn*" in patterns and "model.visual*" in patterns


def test_vllm_knows_excluded_experts(tmp_path):
    vllm, _ = converted(tmp_path, exclude=["model.layers.1.*"])
    assert vllm.is_layer_excluded("model.layers.1.mlp.experts")
    assert all(vllm.is_layer_excluded(name) for layer in range(12) for name in fused(layer))
    for layer in (2, 10, 11):
        assert not vllm.is_layer_excluded(f"model.layers.{layer}.mlp.experts")


def test_vllm_knows_fused_matrices_beside_quantized_ones(tmp_path):
    """o_proj of each layer stays FP8; the matrices beside it have names of their own."""
    of = [f"model.layers.{layer}.self_attn.o_proj" for layer in range(12)]
    fp8 = torch.ones((16, 16), dtype=torch.float32, device="cpu").to(torch.float8_e4m3fn)
    scale = torch.ones((1, 1), dtype=torch.float32, device="cpu")
    more = {f"{name}.weight": fp8.clone() for name in of}
    more |= {f"{name}.weight_scale_inv": scale.clone() for name in of}
    vllm, _ = converted(tmp_path, more=more)
    for layer, name in enumerate(of):
        assert not vllm.is_layer_excluded(name)
        assert all(vllm.is_layer_excluded(n) for n in fused(layer) if n != name)
