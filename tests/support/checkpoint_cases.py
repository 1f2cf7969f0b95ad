"""Small checkpoints in every naming and format, written tensor by tensor."""

# SPDX-License-Identifier: Apache-2.0
import json
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors.torch import save_file

from nvfp4_moe.reference.activation import ActivationType
from nvfp4_moe.reference.quantize import quantize_global_scale
from nvfp4_moe.reference.recipe import Recipe
from nvfp4_moe.reference.weights.experts import Experts

Tensors = dict[str, torch.Tensor]
EXPERTS, HIDDEN, INTERMEDIATE = 4, 96, 48


@dataclass(frozen=True)
class Naming:
    """The names that a family of models gives the tensors of its experts.

    `style` is apart (a tensor for each expert and projection), fused (gate and up of an expert in
    one) or stacked (all experts in one, gate and up fused).
    """

    module: str  # {} is the layer
    names: tuple[str, str, str]  # gate, up (fused: both alike), down
    config: tuple[tuple[str, object], ...]
    style: str = "apart"
    activation: ActivationType = ActivationType.Swiglu
    join: str = "."  # between the name of a stacked tensor and its kind

    def of(self, layer: int) -> str:
        return self.module.format(layer)


_LLAMA = ("gate_proj", "up_proj", "down_proj")
_FUSED = ("gate_up_proj", "gate_up_proj", "down_proj")
NAMINGS = {
    "qwen3-moe": Naming(
        "model.layers.{}.mlp.experts", _LLAMA, (("hidden_act", "silu"), ("num_experts", EXPERTS))
    ),
    "deepseek-v3": Naming(
        "model.layers.{}.mlp.experts", _LLAMA,
        (("hidden_act", "silu"), ("n_routed_experts", EXPERTS), ("num_experts_per_tok", 2)),
    ),
    "mixtral": Naming(
        "model.layers.{}.block_sparse_moe.experts", ("w1", "w3", "w2"),
        (("hidden_act", "silu"), ("num_local_experts", EXPERTS)),
    ),
    "nemotron-h": Naming(
        "backbone.layers.{}.mixer.experts", ("", "up_proj", "down_proj"),
        (("mlp_hidden_act", "relu2"), ("n_routed_experts", EXPERTS)),
        activation=ActivationType.Relu2,
    ),
    "fused": Naming(
        "model.layers.{}.mlp.experts", _FUSED, (("hidden_act", "silu"),), style="fused"
    ),
    "fused-w13": Naming(
        "model.layers.{}.mlp.experts", ("w13", "w13", "w2"), (("hidden_act", "silu"),),
        style="fused",
    ),
    "stacked": Naming(
        "model.language_model.layers.{}.mlp.experts", _FUSED,
        (("text_config", {"hidden_act": "gelu", "num_experts": EXPERTS}),),
        style="stacked", activation=ActivationType.Geglu, join="_",
    ),
    "stacked-w13": Naming(
        "model.layers.{}.mlp.experts", ("w13", "w13", "w2"), (("hidden_act", "silu"),),
        style="stacked", join="_",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Weights:
    """The weights of one layer: [E, I, H] gate (gated only) and up, [E, H, I] down."""

    gate: torch.Tensor | None
    up: torch.Tensor
    down: torch.Tensor

    @property
    def w13(self) -> torch.Tensor:
        return self.up if self.gate is None else torch.cat((self.up, self.gate), 1)


def weights(
    gated: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    sizes: tuple[int, int] = (HIDDEN, INTERMEDIATE),
) -> Weights:
    """Random weights, of which expert 1 is zero, expert 2 has a larger gate, the others a larger up."""
    g = torch.Generator().manual_seed(seed)
    hidden, intermediate = sizes
    gate, up = (torch.randn(EXPERTS, intermediate, hidden, generator=g) for _ in range(2))
    down = torch.randn(EXPERTS, hidden, intermediate, generator=g)
    gate[2] *= 8
    up[0] *= 3
    up[3] *= 1e-3
    for t in (gate, up, down):
        t[1] = 0
    return Weights(gate.to(dtype) if gated else None, up.to(dtype), down.to(dtype))


def biases(dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """[E, I] of gate and up, [E, H] of down."""
    g = torch.Generator().manual_seed(5)
    sizes = {"gate": INTERMEDIATE, "up": INTERMEDIATE, "down": HIDDEN}
    return {p: torch.randn(EXPERTS, n, generator=g).to(dtype) for p, n in sizes.items()}


def tensors_of(naming: Naming, layer: int, kinds: dict[str, dict[str, torch.Tensor]]) -> Tensors:
    """The tensors of a layer's experts.

    Args:
        kinds: of gate, up and down, by the name of the kind, stacked [E, ...].
    """
    gate, up, down = naming.names
    module = naming.of(layer)
    made: Tensors = {}

    def put(name: str, kind: str, value: torch.Tensor) -> None:
        if naming.style == "stacked":
            bare = name == "gate_up_proj" or (name == "down_proj" and naming.join == "_")
            tail = "" if bare and kind == "weight" else naming.join + kind
            made[f"{module}.{name}{tail}"] = value
        else:
            for e, part in enumerate(value):
                made[f"{module}.{e}.{name}.{kind}"] = part.clone()

    for kind in kinds["up"]:
        pair = [kinds[p][kind] for p in ("gate", "up") if p in kinds]
        if naming.style == "apart":
            put(up, kind, pair[-1])
            if len(pair) == 2:
                put(gate, kind, pair[0])
        elif pair[0].dim() == 1:
            put(up, kind, torch.stack(pair, 1))
        else:
            put(up, kind, torch.cat(pair, 1))
        put(down, kind, kinds["down"][kind])
    return made


def ordinary(naming: Naming, layer: int, w: Weights) -> Tensors:
    """The experts of a layer in bf16 or fp16."""
    kinds = {"up": {"weight": w.up}, "down": {"weight": w.down}}
    if w.gate is not None:
        kinds["gate"] = {"weight": w.gate}
    return tensors_of(naming, layer, kinds)


def fp8(naming: Naming, layer: int, w: Weights) -> tuple[Tensors, Weights]:
    """The experts in e4m3 with a scale a block of 128x128, and what that stands for, in bf16."""
    kinds, meant = {}, {}
    for name in ("gate", "up", "down"):
        stack = [_fp8_blocks(m) for m in getattr(w, name).float()]
        codes, scales, values = (torch.stack(part) for part in zip(*stack, strict=True))
        kinds[name] = {"weight": codes, "weight_scale_inv": scales}
        meant[name] = values
    return tensors_of(naming, layer, kinds), Weights(**meant)


def _fp8_blocks(m: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    codes = torch.empty(m.shape, dtype=torch.float8_e4m3fn)
    values = torch.empty(m.shape, dtype=torch.bfloat16)
    scales = torch.empty(-(-m.shape[0] // 128), -(-m.shape[1] // 128))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = slice(i * 128, (i + 1) * 128), slice(j * 128, (j + 1) * 128)
            scales[i, j] = (m[block].abs().amax() / 448).clamp(min=1e-6)
            codes[block] = (m[block] / scales[i, j]).to(torch.float8_e4m3fn)
            values[block] = (codes[block].float() * scales[i, j]).bfloat16()
    return codes, scales, values


def quantized(w: Weights, seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    """codes, block scales and decode scales [E] of each projection, gate and up on their own."""
    g = torch.Generator().manual_seed(seed)
    found = {}
    for name in ("gate", "up", "down"):
        matrices = getattr(w, name)
        if matrices is None:
            continue
        amax = matrices.float().abs().amax((1, 2)).clamp(min=2.0**-20)
        quants = [
            quantize_global_scale(m, 2688 / a, Recipe("exact"))
            for m, a in zip(matrices, amax, strict=True)
        ]
        found[name] = {
            "codes": torch.stack([q.codes for q in quants]),
            "scales": torch.stack([q.block_scales for q in quants]).view(torch.float8_e4m3fn),
            "decode": amax / 2688,
            "input": 0.001 + torch.rand(len(amax), generator=g),
        }
    return found


MODELOPT_KINDS = {
    "codes": "weight",
    "scales": "weight_scale",
    "decode": "weight_scale_2",
    "input": "input_scale",
}
COMPRESSED_KINDS = {
    "codes": "weight_packed",
    "scales": "weight_scale",
    "decode": "weight_global_scale",
    "input": "input_global_scale",
}


def nvfp4(
    naming: Naming, layer: int, parts: dict[str, dict[str, torch.Tensor]], kinds: dict[str, str]
) -> Tensors:
    """The experts of a layer in one of the NVFP4 formats."""
    renamed = {
        name: {kinds[kind]: value for kind, value in part.items()} for name, part in parts.items()
    }
    if kinds is COMPRESSED_KINDS:
        for part in renamed.values():
            for kind in ("weight_global_scale", "input_global_scale"):
                part[kind] = 1 / part[kind]
    return tensors_of(naming, layer, renamed)


def others(naming: Naming, layer: int) -> Tensors:
    """Return the tensors that a layer has beside its experts."""
    g = torch.Generator().manual_seed(100 + layer)
    parent = naming.of(layer).rsplit(".", 2)[0]
    moe = naming.of(layer).rsplit(".", 1)[0]
    shapes = {
        f"{parent}.self_attn.q_proj.weight": (32, HIDDEN),
        f"{parent}.input_layernorm.weight": (HIDDEN,),
        f"{moe}.gate.weight": (EXPERTS, HIDDEN),
        f"{moe}.gate.e_score_correction_bias": (EXPERTS,),
        f"{moe}.shared_experts.up_proj.weight": (32, HIDDEN),
    }
    return {name: torch.randn(shape, generator=g).bfloat16() for name, shape in shapes.items()}


def write(
    folder: Path, shards: list[Tensors], config: dict, *, index: bool = True, **files: dict
) -> Path:
    """A checkpoint of these shards; `files` are further JSON files, by stem."""
    folder.mkdir()
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if not index:
        names = ["model.safetensors"]
    for name, tensors in zip(names, shards, strict=True):
        save_file(tensors, folder / name, {"format": "pt"})
    places = {t: name for name, tensors in zip(names, shards, strict=True) for t in tensors}
    if index:
        _json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": 1}, "weight_map": places},
        )
    _json(folder / "config.json", config)
    for stem, content in files.items():
        _json(folder / f"{stem}.json", content)
    return folder


def modelopt_config(**more: object) -> dict:
    """The content of hf_quant_config.json."""
    algorithm = {"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16}
    return {
        "producer": {"name": "modelopt", "version": "0.29.0"},
        "quantization": algorithm | {"exclude_modules": ["lm_head"]} | more,
    }


def compressed_config(*ignore: str) -> dict:
    """`quantization_config` of compressed-tensors."""
    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    return {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "config_groups": {"group_0": {"weights": weights, "targets": ["Linear"]}},
        "ignore": list(ignore),
    }


def apart(tensors: Tensors) -> list[Tensors]:
    """Two shards, so that gate and up of every expert lie in different ones."""
    first = {n: t for n, t in tensors.items() if ".gate_proj." in n or ".w1." in n}
    return [first, {n: t for n, t in tensors.items() if n not in first}]


def assert_same_experts(got: Experts, want: Experts) -> None:
    """Every field, to the bit."""
    for f in fields(Experts):
        a, b = getattr(got, f.name), getattr(want, f.name)
        if isinstance(b, torch.Tensor):
            assert a.dtype == b.dtype and a.shape == b.shape, f.name
            same = a.contiguous().view(torch.uint8) == b.contiguous().view(torch.uint8)
            assert same.all(), f"{f.name}: {int((~same).sum())} of {same.numel()} bytes differ"
        else:
            assert a == b, f.name


def bytes_of(folder: Path) -> dict[str, bytes]:
    """The content of every file."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def _json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content))
