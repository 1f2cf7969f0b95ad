"""NVFP4 checkpoints in transformers' models: packed experts, without bf16 ones in memory."""

# SPDX-License-Identifier: Apache-2.0
import copy

import nvfp4_models
import pytest
import torch
import transformers_models
from memory_meter import MemoryMeter

from nvfp4_moe.checkpoints import CheckpointError
from nvfp4_moe.kernels.backends import UnsupportedError
from nvfp4_moe.serving.transformers import from_pretrained, prepare, register
from nvfp4_moe.serving.transformers.packed import ATTRIBUTE

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed (make test-transformers)"
)
PROMPTS = torch.tensor([[5, 9, 17, 33, 65]])


@pytest.fixture(autouse=True)
def registered():
    transformers.logging.set_verbosity_error()
    register()


def generated(model, implementation: str | None = None) -> torch.Tensor:
    if implementation is not None:
        model.set_experts_implementation(implementation)
    return model.generate(PROMPTS, max_new_tokens=8, do_sample=False)


def plain(folder, **options):
    auto = transformers.AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=torch.bfloat16, **options)


@pytest.mark.parametrize("form", nvfp4_models.FORMATS)
@pytest.mark.parametrize("name", transformers_models.CONFIGURATIONS)
def test_tokens_are_those_of_the_model_that_was_quantized_here(name, form, tmp_path):
    """`convert` and the layer's first call quantize to the same bits; of all four names."""
    model = transformers_models.model(transformers, name)
    loaded = from_pretrained(nvfp4_models.save(model, tmp_path, form))
    assert loaded.config._experts_implementation == "nvfp4_moe"
    for implementation in ("nvfp4_moe", "nvfp4_moe_w4a16_batch_invariant"):
        want = generated(model, implementation)
        assert torch.equal(generated(loaded, implementation), want)
    with torch.no_grad():
        assert torch.equal(loaded(PROMPTS).logits, model(PROMPTS).logits)
    held = [m for m in loaded.modules() if hasattr(m, ATTRIBUTE)]
    assert held and not any(list(m.parameters()) for m in held)


def test_plain_from_pretrained_reads_modelopt(tmp_path):
    model = transformers_models.model(transformers, "qwen3")
    folder = nvfp4_models.save(model, tmp_path, "modelopt")
    loaded = plain(folder, experts_implementation="nvfp4_moe_w4a16")
    assert torch.equal(generated(loaded), generated(model, "nvfp4_moe_w4a16"))


def test_transformers_keeps_its_own_quantizer_of_compressed_tensors():
    from transformers.quantizers import auto

    own = auto.AUTO_QUANTIZER_MAPPING["compressed-tensors"]
    assert own.__module__.startswith("transformers.")


def test_no_expert_is_in_memory_in_bf16(tmp_path, monkeypatch):
    """The same meter counts all of them when transformers loads the bf16 checkpoint."""
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # one thread, which the meter sees
    sizes = {"hidden_size": 128, "moe_intermediate_size": 128, "num_experts": 32}
    config = transformers.Qwen3MoeConfig(
        **transformers_models.SIZES | sizes, head_dim=32, intermediate_size=64
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    experts = sum(p.nbytes for n, p in model.named_parameters() if ".experts." in n)
    others = sum(p.nbytes for n, p in model.named_parameters() if ".experts." not in n)
    folder = nvfp4_models.save(model, tmp_path, "modelopt")
    peaks = {}
    for name, load in (("bf16", plain), ("modelopt", from_pretrained)):
        with MemoryMeter() as meter:
            load(folder.parent / name)
        peaks[name] = meter.peak / experts
    print(peaks, others / experts)
    packed = 0.5 * (1 + 1 / 8) / 2 * 2  # codes and block scales, of 2 bytes a weight
    assert peaks["bf16"] > 1
    # All layers packed, and one of two before and after it is laid out.
    assert peaks["modelopt"] < 2 * packed / 2 + others / experts + 0.1


def test_everything_that_is_wrong_is_one_error(tmp_path):
    model = transformers_models.model(transformers, "qwen3")
    folder = nvfp4_models.save(model, tmp_path, "modelopt")
    layer = "model.layers.{}.mlp.experts.{}.{}_proj.{}".format

    def edit(tensors):
        del tensors[layer(0, 3, "up", "weight_scale")]
        tensors[layer(0, 5, "down", "weight")] = tensors[layer(0, 5, "down", "weight")][:-1].clone()
        tensors[layer(1, 2, "gate", "weight_scale_2")] *= torch.nan
        tensors["model.layers.0.self_attn.q_proj.weight_scale"] = torch.ones(64, 4)

    nvfp4_models.change(folder, edit)
    for load in (from_pretrained, plain):
        with pytest.raises(CheckpointError) as raised:
            load(folder)
        problems = "\n".join(raised.value.problems)
        assert len(raised.value.problems) == 4
        for part in (
            "experts.3.up_proj.weight_scale: missing",
            "experts.5.down_proj.weight: its shape is",
            "experts.2.gate_proj.weight_scale_2: it is nan",
            "self_attn.q_proj: its weights are not NVFP4",
        ):
            assert part in problems


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (
            {"moe_intermediate_size": 64},
            r"it has \(experts, H, I\) = \(8, 64, 48\); by config.json",
        ),
        ({"num_hidden_layers": 3}, "no single layer of experts 'model.layers.2.mlp.experts'"),
        ({"num_experts": 4}, "by config.json|extra"),
    ],
)
def test_a_configuration_of_another_model_is_one_error(fields, text, tmp_path):
    model = transformers_models.model(transformers, "qwen3")
    folder = nvfp4_models.save(model, tmp_path, "modelopt")
    nvfp4_models.configure(folder, **fields)
    with pytest.raises(CheckpointError, match=text):
        from_pretrained(folder)


def test_a_checkpoint_that_is_not_nvfp4_is_refused(tmp_path):
    model = transformers_models.model(transformers, "qwen3")
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="its quant_algo is None"):
        from_pretrained(tmp_path)


def test_a_loaded_model_has_no_gradient_is_copied_and_is_not_saved(tmp_path):
    model = transformers_models.model(transformers, "qwen3")
    loaded = from_pretrained(nvfp4_models.save(model, tmp_path, "modelopt"))
    want = loaded(PROMPTS).logits
    assert not want.requires_grad
    assert prepare(loaded) == 2
    assert torch.equal(copy.deepcopy(loaded)(PROMPTS).logits, want)
    states = loaded.model.embed_tokens(PROMPTS).requires_grad_()
    with pytest.raises(UnsupportedError, match=r"read from an NVFP4 checkpoint.*no_grad"):
        loaded(inputs_embeds=states)
    with pytest.raises(ValueError, match="not serializable"):
        loaded.save_pretrained(tmp_path / "again")
