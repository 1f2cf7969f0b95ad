"""NVFP4 attention, shared experts and dense layers of checkpoints in transformers' models."""

# SPDX-License-Identifier: Apache-2.0
import copy
import re

import nvfp4_models
import pytest
import torch
import transformers_models
from assertions import assert_bitwise, assert_inside
from memory_meter import MemoryMeter
from safetensors.torch import load_file

from nvfp4_moe.checkpoints import CheckpointError
from nvfp4_moe.checkpoints.formats import COMPRESSED_TENSORS, MODELOPT
from nvfp4_moe.kernels.backends import UnsupportedError
from nvfp4_moe.reference import dense
from nvfp4_moe.reference.bounds.accumulation import CONTIGUOUS
from nvfp4_moe.reference.bounds.dense import mm_bf16_fp4_bounds, mm_fp4_bounds
from nvfp4_moe.reference.bounds.interval import Interval
from nvfp4_moe.reference.layouts import from_linear
from nvfp4_moe.reference.quantize import quantize_per_token
from nvfp4_moe.reference.recipe import Recipe, SfLayout
from nvfp4_moe.serving.transformers import from_pretrained, register
from nvfp4_moe.serving.transformers.linear import Nvfp4Linear

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed (make test-transformers)"
)
PROMPTS = torch.tensor([[5, 9, 17, 33, 65]])
ATTENTION = r"self_attn\.\w+_proj\w*\."
LINEARS = {
    "qwen3": ATTENTION,
    "gpt-oss": ATTENTION,  # which has biases
    "deepseek-v3": ATTENTION + r"|shared_experts|layers\.0\.mlp\.\w+_proj\.",
}
COUNTS = {"qwen3": 8, "gpt-oss": 8, "deepseek-v3": 16}
Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture(autouse=True)
def registered():
    transformers.logging.set_verbosity_error()
    register()


def saved(name, folder, form="modelopt", linears=None):
    model = transformers_models.model(transformers, name)
    return nvfp4_models.save(model, folder, form, linears or LINEARS[name])


def linears_of(model) -> dict[str, Nvfp4Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, Nvfp4Linear)}


class Tensors:
    """The linear layers of a checkpoint, computed by the reference from the tensors of its file."""

    def __init__(self, folder, form: str):
        self.tensors = load_file(folder / nvfp4_models.FILE)
        self.form = {"modelopt": MODELOPT, "compressed-tensors": COMPRESSED_TENSORS}[form]

    def output(self, module: str, x: torch.Tensor, activation: str) -> torch.Tensor:
        """Return the output of a linear layer, with the bits of the reference."""
        if activation == "bf16":
            y = dense.mm_bf16_fp4(*self.product(module, x, activation))
        else:
            y = dense.mm_fp4(*self.product(module, x, activation))
        return self.biased(module, y).reshape(*x.shape[:-1], -1)

    def bounds(self, module: str, x: torch.Tensor, activation: str) -> Interval:
        """Bound the output [rows, N] of every implementation that keeps the contract."""
        of = mm_bf16_fp4_bounds if activation == "bf16" else mm_fp4_bounds
        ends = of(*self.product(module, x, activation), accumulation=CONTIGUOUS)
        low, high = (self.biased(module, end.bfloat16()).double() for end in (ends.low, ends.high))
        return Interval(low, high)

    def product(self, module: str, x: torch.Tensor, activation: str) -> tuple[torch.Tensor, ...]:
        """Return the arguments of the product."""
        codes, scales, scalar, _ = (self.tensors[f"{module}.{kind}"] for kind in self.form.kinds)
        decode = self.form.decode(scalar).reshape(1)
        layout = SfLayout.layout_128x4
        b = codes.T, from_linear(scales.view(torch.uint8), layout).T
        rows = x.reshape(-1, x.shape[-1])
        if activation == "bf16":
            return rows, *b, decode
        recipe = Recipe()
        q = quantize_per_token(rows, recipe.base_scale_inv, recipe, layout)
        return q.codes, b[0], q.block_scales, b[1], q.per_token_scale * decode

    def biased(self, module: str, y: torch.Tensor) -> torch.Tensor:
        bias = self.tensors.get(f"{module}.bias")
        return y if bias is None else y + bias


def watched(model) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """Return a list to which every call of a linear layer adds its name, input and output."""
    calls = []
    for name, module in linears_of(model).items():
        module.register_forward_hook(
            lambda _, given, output, name=name: calls.append((name, given[0], output))
        )
    return calls


@pytest.mark.parametrize("form", nvfp4_models.FORMATS)
@pytest.mark.parametrize("name", LINEARS)
def test_outputs_are_the_references_while_a_model_generates(name, form, tmp_path):
    folder = saved(name, tmp_path, form)
    model = from_pretrained(folder)
    assert len(linears_of(model)) == COUNTS[name]
    tensors, calls, tokens = Tensors(folder, form), watched(model), {}
    for implementation, activation in (
        ("nvfp4_moe", "per-token"),
        ("nvfp4_moe_w4a16", "bf16"),
        ("nvfp4_moe_w4a16_batch_invariant", "bf16"),
    ):
        calls.clear()
        model.set_experts_implementation(implementation)
        tokens[implementation] = model.generate(PROMPTS, max_new_tokens=4, do_sample=False)
        assert len(calls) == 4 * COUNTS[name]
        for module, x, y in calls:
            assert_inside(y.flatten(0, -2), tensors.bounds(module, x, activation), module)
            assert_bitwise(y, tensors.output(module, x, activation), f"{module}, {implementation}")
    assert len({tuple(t[0].tolist()) for t in tokens.values()}) > 1
    assert torch.equal(tokens["nvfp4_moe_w4a16"], tokens["nvfp4_moe_w4a16_batch_invariant"])


def test_plain_from_pretrained_reads_them_too(tmp_path):
    folder = saved("qwen3", tmp_path)
    auto = transformers.AutoModelForCausalLM
    plain = auto.from_pretrained(folder, dtype=torch.bfloat16, experts_implementation="nvfp4_moe")
    with torch.no_grad():
        assert torch.equal(plain(PROMPTS).logits, from_pretrained(folder)(PROMPTS).logits)


@pytest.mark.parametrize("form", nvfp4_models.FORMATS)
def test_no_tensor_is_unexpected_or_missing(form, tmp_path):
    """Tensors of packed layers are nothing to warn of; one that no layer has is."""
    folder = saved("deepseek-v3", tmp_path, form)
    name = "model.layers.1.mlp.another.weight"
    nvfp4_models.change(folder, lambda t: t.update({name: torch.ones(2, 2)}))
    _, info = from_pretrained(folder, output_loading_info=True)
    assert set(info["unexpected_keys"]) == {name} and not info["missing_keys"]


def test_the_weights_with_bf16_activations_are_those_of_the_checkpoint(tmp_path):
    """A bf16 model of the same values gives nearly the same logits: the weights are in their places."""
    folder = saved("deepseek-v3", tmp_path)
    model = from_pretrained(folder, experts_implementation="nvfp4_moe_w4a16")
    other = transformers_models.model(transformers, "deepseek-v3")
    other.set_experts_implementation("nvfp4_moe_w4a16")
    tensors = Tensors(folder, "modelopt")
    for name in linears_of(model):
        identity = torch.eye(other.get_submodule(name).in_features).bfloat16()
        other.get_submodule(name).weight.data = tensors.output(
            name, identity, "bf16"
        ).T.contiguous()
    with torch.no_grad():
        ours, theirs = model(PROMPTS).logits.float(), other(PROMPTS).logits.float()
    assert (ours - theirs).abs().max() < 0.1 * theirs.std()


def test_no_linear_layer_is_in_memory_in_bf16(tmp_path, monkeypatch):
    """A meter counts all of them when transformers loads the bf16 checkpoint, and none here."""
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # one thread, which the meter sees
    sizes = {
        "hidden_size": 256,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 128,
    }
    small = {"moe_intermediate_size": 16, "num_experts": 4, "intermediate_size": 64}
    config = transformers.Qwen3MoeConfig(**transformers_models.SIZES | sizes | small)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    attention = sum(p.nbytes for n, p in model.named_parameters() if re.search(ATTENTION, n))
    others = sum(p.nbytes for n, p in model.named_parameters() if not re.search(ATTENTION, n))
    folder = nvfp4_models.save(model, tmp_path, "modelopt", ATTENTION)
    peaks = {}
    with MemoryMeter() as meter:
        transformers.AutoModelForCausalLM.from_pretrained(folder.parent / "bf16")
    peaks["bf16"] = meter.peak / attention
    with MemoryMeter() as meter:
        loaded = from_pretrained(folder)
    peaks["modelopt"] = meter.peak / attention
    print(peaks, others / attention)
    assert not any(list(m.parameters()) for m in linears_of(loaded).values())
    packed = (0.5 + 1 / 16) / 2  # codes and block scales, of 2 bytes a weight
    assert peaks["bf16"] > 1
    assert peaks["modelopt"] < packed + others / attention + 0.1


def test_the_names_of_a_model_without_its_head(tmp_path):
    folder = saved("qwen3", tmp_path)
    model = from_pretrained(folder, auto_class=transformers.AutoModel)
    assert len(linears_of(model)) == 8 and "layers.0.self_attn.q_proj" in linears_of(model)
    whole = from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(model(PROMPTS)[0], whole.model(PROMPTS)[0])


def test_a_quantized_head(tmp_path):
    folder = saved("qwen3", tmp_path, linears="lm_head")
    model = from_pretrained(folder)
    assert list(linears_of(model)) == ["lm_head"]
    calls = watched(model)
    model.generate(PROMPTS, max_new_tokens=2, do_sample=False)
    for module, x, y in calls:
        assert_bitwise(y, Tensors(folder, "modelopt").output(module, x, "per-token"), module)


def test_scales_of_a_cache_are_left_alone(tmp_path):
    folder = saved("qwen3", tmp_path)
    want = from_pretrained(folder)(PROMPTS).logits
    for kind, projection in (("k_scale", "k_proj"), ("v_scale", "v_proj")):
        name = f"model.layers.0.self_attn.{projection}.{kind}"
        nvfp4_models.change(folder, lambda t, name=name: t.update({name: torch.tensor(0.5)}))
    with torch.no_grad():
        assert torch.equal(from_pretrained(folder)(PROMPTS).logits, want)


def test_layers_that_the_model_ignores_may_be_of_any_format(tmp_path):
    """DeepSeek-V3's checkpoints have one layer more, of multi-token prediction."""
    folder = saved("deepseek-v3", tmp_path)
    extra = "model.layers.61.self_attn.o_proj"
    fp8 = torch.ones(16, 16).to(torch.float8_e4m3fn)
    nvfp4_models.change(
        folder,
        lambda t: t.update({f"{extra}.weight": fp8, f"{extra}.weight_scale": torch.ones(())}),
    )
    assert len(linears_of(from_pretrained(folder))) == COUNTS["deepseek-v3"]


def fp8(t, module):
    t[f"{module}.weight"] = t[f"{module}.weight"][:, :16].contiguous().view(torch.float8_e4m3fn)
    for kind in MODELOPT.kinds[1:]:
        t.pop(f"{module}.{kind}")
    t[f"{module}.weight_scale_inv"] = torch.ones(1, 1)


def scaled(t, module):
    t[f"{module}.weight_scale"].view(torch.uint8)[3, 1] = 0x7F


def bare(t, module):
    t[f"{module}.weight"] = torch.zeros(64, 64).bfloat16()


EDITS = {
    "FP8": (fp8, r"q_proj: its weights are not NVFP4.*q_proj.weight is F8_E4M3 \[64, 16\]"),
    "bf16 with scales": (bare, "q_proj: its weights are not NVFP4.*q_proj.weight is BF16"),
    "no scales": (lambda t, m: t.pop(f"{m}.weight_scale"), "q_proj.weight_scale: missing"),
    "no scale": (lambda t, m: t.pop(f"{m}.weight_scale_2"), "q_proj.weight_scale_2: missing"),
    "NaN": (scaled, "q_proj.weight_scale: 1 of 256 block scales are NaN"),
    "AWQ": (
        lambda t, m: t.update({f"{m}.pre_quant_scale": torch.ones(64)}),
        "q_proj.pre_quant_scale: extra: the kinds of modelopt are",
    ),
    "infinite": (
        lambda t, m: t.update({f"{m}.weight_scale_2": torch.tensor(torch.inf)}),
        "q_proj.weight_scale_2: it is inf, not a scale",
    ),
    "bias": (
        lambda t, m: t.update({f"{m}.bias": torch.zeros(64)}),
        "q_proj has no bias, and the checkpoint differs",
    ),
    "rows": (
        lambda t, m: t.update(
            {f"{m}.{kind}": t[f"{m}.{kind}"][:32].clone() for kind in ("weight", "weight_scale")}
        ),
        r"its weights are \[32, 64\]; by config.json .*q_proj has \[64, 64\]",
    ),
    "another name": (
        lambda t, m: t.update({f"{m}2.{k}": t.pop(f"{m}.{k}") for k in (*MODELOPT.kinds,)}),
        "q_proj2 is quantized, and Qwen3MoeForCausalLM has no module of that name",
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_what_is_refused(name, tmp_path):
    edit, text = EDITS[name]
    folder = saved("qwen3", tmp_path)
    nvfp4_models.change(folder, lambda t: edit(t, Q_PROJ))
    with pytest.raises(CheckpointError) as raised:
        from_pretrained(folder)
    assert len(raised.value.problems) == 1
    assert re.search(text, raised.value.problems[0]), raised.value.problems


@pytest.mark.parametrize(
    ("linears", "tied", "text"),
    [
        (r"mlp\.gate\.", False, "mlp.gate is of the class Qwen3MoeTopKRouter"),
        ("embed_tokens", False, "embed_tokens is of the class Embedding"),
        ("lm_head", True, "lm_head is quantized, and Qwen3MoeForCausalLM shares its weights"),
    ],
)
def test_other_modules_are_refused(linears, tied, text, tmp_path):
    folder = saved("qwen3", tmp_path, linears=linears)
    nvfp4_models.configure(folder, tie_word_embeddings=tied)
    with pytest.raises(CheckpointError, match=text):
        from_pretrained(folder)


def test_layers_that_transformers_fuses_are_refused(tmp_path, monkeypatch):
    from transformers import conversion_mapping
    from transformers.core_model_loading import Concatenate, WeightConverter

    parts = [f"self_attn.{name}_proj.weight" for name in "qk"]
    fused = WeightConverter(parts, "self_attn.o_proj.weight", operations=[Concatenate(dim=0)])
    folder = saved("qwen3", tmp_path)
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda model: [fused])
    with pytest.raises(CheckpointError, match="transformers fuses, splits or reorders") as raised:
        from_pretrained(folder)
    assert len(raised.value.problems) == 4


def test_a_loaded_model_is_copied_and_compiled_and_has_no_gradient(tmp_path):
    model = from_pretrained(saved("qwen3", tmp_path))
    with torch.no_grad():
        want = model(PROMPTS).logits
        assert torch.equal(copy.deepcopy(model)(PROMPTS).logits, want)
    module, x = linears_of(model)[Q_PROJ], torch.randn(2, 3, 64).bfloat16()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert_bitwise(compiled(x), module(x), "compiled")
    assert module(x[:0]).shape == (0, 3, 64)
    with pytest.raises(UnsupportedError, match=r"linear layers were read from an NVFP4.*no_grad"):
        module(x.requires_grad_())
    with pytest.raises(
        UnsupportedError, match=r"was given torch\.float32; it must be torch\.bfloat16"
    ):
        module(torch.randn(3, 64))


@pytest.mark.gpu
@pytest.mark.parametrize("name", LINEARS)
def test_on_a_gpu_a_model_generates_and_a_graph_replays_a_layer(name, tmp_path):
    """Outputs differ from the reference's by the order of sums alone."""
    folder = saved(name, tmp_path)
    model = from_pretrained(folder, device_map="cuda")
    tensors, calls = Tensors(folder, "modelopt"), watched(model)
    for implementation, activation in (("nvfp4_moe", "per-token"), ("nvfp4_moe_w4a16", "bf16")):
        calls.clear()
        model.set_experts_implementation(implementation)
        model.generate(PROMPTS.cuda(), max_new_tokens=4, do_sample=False)
        assert len(calls) == 4 * COUNTS[name]
        for module, x, y in calls:
            bounds = tensors.bounds(module, x.cpu(), activation)
            assert_inside(y.cpu().flatten(0, -2), bounds, f"{module}, {implementation}")
        module, x, _ = calls[-1]
        layer, given = model.get_submodule(module), x.clone()
        want = layer(given)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            captured = layer(given)
        given.copy_(x)
        graph.replay()
        assert_bitwise(captured, want, f"replayed {module}")
