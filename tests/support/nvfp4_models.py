"""Small models of transformers as NVFP4 checkpoints, in both formats."""

# SPDX-License-Identifier: Apache-2.0
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from nvfp4_moe.checkpoints import convert
from nvfp4_moe.checkpoints.formats import COMPRESSED_TENSORS, MODELOPT
from nvfp4_moe.reference.recipe import Recipe
from nvfp4_moe.reference.weights.prepare import quantize_weight

FORMATS = ("modelopt", "compressed-tensors")
FILE = "model.safetensors"


def save(model: Any, folder: Path, form: str, linears: str | None = None) -> Path:
    """Write a model's checkpoint, converted, and return its folder.

    Args:
        linears: a regular expression of the linear layers that are quantized besides the experts.
    """
    source, made = folder / "bf16", folder / form
    model.save_pretrained(source)
    convert(source, made)
    if linears is not None:
        quantize_linears(made, linears)
    if form == "compressed-tensors":
        _rename(made)
    return made


def change(folder: Path, edit: Any) -> None:
    """Let a function change the tensors of a checkpoint, a dict, in place."""
    tensors = load_file(folder / FILE)
    edit(tensors)
    save_file(tensors, folder / FILE, {"format": "pt"})
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)


def quantize_linears(folder: Path, pattern: str) -> None:
    """Quantize linear layers of a ModelOpt checkpoint; each has a scale of its own."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if re.search(pattern, n) and n.endswith(".weight")]:
            module, w = name.removesuffix(".weight"), tensors.pop(name)
            codes, scales, decode = quantize_weight(w, w.abs().amax(), Recipe("exact"))
            tensors[f"{module}.{MODELOPT.codes}"] = codes
            tensors[f"{module}.{MODELOPT.block_scales}"] = scales.view(torch.float8_e4m3fn)
            tensors[f"{module}.{MODELOPT.weight_scale}"] = decode
            tensors[f"{module}.{MODELOPT.input_scale}"] = torch.tensor(0.01)

    change(folder, edit)


def configure(folder: Path, **fields: Any) -> None:
    """Change fields of config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8")) | fields
    path.write_text(json.dumps(config), "utf-8")


def _rename(folder: Path) -> None:
    """Give a ModelOpt checkpoint the names and the encode scales of compressed-tensors."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.endswith(f".{MODELOPT.weight_scale}")]:
            projection = name.removesuffix(MODELOPT.weight_scale)
            for old, new in zip(MODELOPT.kinds, COMPRESSED_TENSORS.kinds, strict=True):
                t = tensors.pop(projection + old)
                scalar = old in (MODELOPT.weight_scale, MODELOPT.input_scale)
                tensors[projection + new] = _encode(t) if scalar else t

    change(folder, edit)
    (folder / "hf_quant_config.json").unlink()
    four = {"num_bits": 4, "type": "float", "group_size": 16, "strategy": "tensor_group"}
    group = {"targets": ["Linear"], "weights": four, "input_activations": four}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*mlp.gate$", "re:.*router.*"],
    }
    configure(folder, quantization_config=quantization)


def _encode(decode: torch.Tensor) -> torch.Tensor:
    """Return an fp32 number whose reciprocal is a decode scale, to the bit, [1]."""
    near = 1.0 / decode
    bits = near.view(torch.int32)
    for step in (0, 1, -1, 2, -2):
        candidate = (bits + step).view(torch.float32)
        if torch.equal(1.0 / candidate, decode):
            return candidate.reshape(1)
    raise AssertionError(f"{decode} is the reciprocal of no fp32 number")
