"""The names of experts' tensors in checkpoints, as data.

    MODULE.EXPERT.PROJECTION.KIND   Qwen3-MoE, DeepSeek-V3 (mlp.experts), Mixtral, MiniMax
                                    (block_sparse_moe.experts), DeepSeek-V4 (ffn.experts), Nemotron-H
                                    (mixer.experts, not gated), Step-3.5 (moe.experts), Gemma 4 and
                                    Mistral's params.json (layers.N.experts)
    MODULE.PROJECTION.EXPERT.KIND   Qwen3-VL-MoE of ModelOpt
    MODULE.PROJECTION[_KIND]        stacked, [E, rows, columns]: transformers 5, Llama 4, GPT-OSS, vLLM
                                    and SGLang; Step-3.5 without `experts` (moe.gate_proj); Granite
                                    (block_sparse_moe.input_linear, fused, and output_linear); flattened
                                    to [E * rows, columns] by llm-compressor

PROJECTION is gate_proj, up_proj, down_proj, or w1, w3, w2 for the same; gate_up_proj or w13 where gate
and up are fused. A KIND is `weight`, `bias`, or a scale of the format; a stacked tensor without one is
the weight. Tensors of `shared_experts` are not of experts here: they are ordinary layers.
"""

# SPDX-License-Identifier: Apache-2.0
import re
from typing import NamedTuple

MEANING = {
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "gate_up_proj": "fused",
    "w1": "gate",
    "w3": "up",
    "w2": "down",
    "w13": "fused",
    "input_linear": "fused",
    "output_linear": "down",
}
_LONG = "gate_up_proj|gate_proj|up_proj|down_proj"
_ANY = f"{_LONG}|w13|w1|w2|w3"
_NUMBER = r"0|[1-9][0-9]{0,5}"  # no longer: names are not trusted
SCHEMES = tuple(
    re.compile(pattern)
    for pattern in (
        rf"(?P<module>(?:.+\.)?experts)\.(?P<expert>{_NUMBER})\.(?P<projection>\w+)\.(?P<kind>\w+)",
        rf"(?P<module>(?:.+\.)?experts)\.(?P<projection>{_ANY})\.(?P<expert>{_NUMBER})\.(?P<kind>\w+)",
        rf"(?P<module>(?:.+\.)?experts)\.(?P<projection>{_ANY})(?:[._](?P<kind>\w+))?",
        rf"(?P<module>(?:.+\.)?moe)\.(?P<projection>{_LONG})(?:[._](?P<kind>\w+))?",
        r"(?P<module>(?:.+\.)?block_sparse_moe)\.(?P<projection>(?:in|out)put_linear)\.(?P<kind>\w+)",
    )
)
"""The schemes of names; the first that a tensor's whole name matches counts."""
OF_EXPERTS = re.compile(r"(?P<module>(?:.+\.)?experts)\.")
"""A tensor inside a module of experts, whatever the rest of its name."""
LAYER = re.compile(rf"(?:^|\.)(?:layers|blocks|h)\.({_NUMBER})(?=\.|$)")
PERHAPS = re.compile(r"(?<!shared_)expert|moe|ffn")
"""A part of a name that could belong to experts: an error shows such names if no experts are found."""
KINDS = {"scale_inv": "weight_scale_inv"}
"""Kinds of stacked tensors with another name elsewhere: transformers 5 calls FP8's NAME_scale_inv."""


class Name(NamedTuple):
    """A tensor's name, taken apart; `expert` is None of a stacked one."""

    module: str
    expert: int | None
    projection: str
    kind: str
    short: bool  # w1, w3 and w2 instead of gate_proj, up_proj and down_proj


def parse(name: str) -> Name | None:
    """Parse a tensor's name; None if no scheme fits it."""
    match = next((m for s in SCHEMES if (m := s.fullmatch(name)) is not None), None)
    if match is None or match["projection"] not in MEANING:
        return None
    parts, projection = match.groupdict(), match["projection"]
    kind = parts["kind"] or "weight"
    expert = parts.get("expert")
    return Name(
        parts["module"],
        None if expert is None else int(expert),
        MEANING[projection],
        KINDS.get(kind, kind),
        projection.startswith("w"),
    )
