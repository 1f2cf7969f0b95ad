"""The layers of experts in a checkpoint, whatever their tensors are called.

    Qwen3-MoE, DeepSeek-V3   model.layers.N.mlp.experts.E.{gate_proj,up_proj,down_proj}.KIND
    Mixtral                  model.layers.N.block_sparse_moe.experts.E.{w1,w3,w2}.KIND
    Nemotron-H (not gated)   backbone.layers.N.mixer.experts.E.{up_proj,down_proj}.KIND
    fused, per expert        ...experts.E.{gate_up_proj,w13}.KIND and the down projection's
    stacked                  ...experts.{gate_up_proj,down_proj}[_KIND], [E, rows, columns]
                             (transformers 5), and ...experts.{w13,w2}_KIND (vLLM, SGLang)

Fused rows are [gate; up], as transformers 5, vLLM and SGLang have them. A KIND is `weight`, or a
scale of the format; a stacked tensor without one is the weight. Tensors of `shared_experts` are not
of experts here: they are ordinary layers.
"""

# SPDX-License-Identifier: Apache-2.0
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from .errors import CheckpointError
from .folder import Folder, Place

Projection = Literal["gate", "up", "down"]

_OF_EXPERT = re.compile(r"((?:.+\.)?experts)\.(\d+)\.(\w+)\.(\w+)")
_STACKED = re.compile(
    r"((?:.+\.)?experts)\.(gate_up_proj|gate_proj|up_proj|down_proj|w13|w1|w2|w3)(?:[._](\w+))?"
)
_OF_ANY = re.compile(r"((?:.+\.)?experts)\.")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)(?=\.|$)")
_MEANING = {
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down", "gate_up_proj": "fused",
    "w1": "gate", "w3": "up", "w2": "down", "w13": "fused",
}  # fmt: skip
_HALF = {"gate": 0, "up": 1}
_COUNTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")


@dataclass
class Layer:
    """One module of experts and the names of its tensors.

    `names` maps (expert, or None of a stacked tensor; gate, up, down or fused; kind) to a tensor's
    name. `strange` are tensors inside the module that fit none of the namings above.
    """

    module: str
    names: dict[tuple[int | None, str, str], str] = field(default_factory=dict)
    strange: list[str] = field(default_factory=list)
    short: bool = False  # w1, w3 and w2 instead of gate_proj, up_proj and down_proj
    num_experts: int = 0

    @property
    def index(self) -> int | None:
        """The number of the layer."""
        found = _LAYER.findall(self.module)
        return int(found[-1]) if found else None

    @property
    def gated(self) -> bool:
        return any(projection in ("gate", "fused") for _, projection, _ in self.names)

    @property
    def projections(self) -> tuple[Projection, ...]:
        return ("gate", "up", "down") if self.gated else ("up", "down")

    @property
    def found_experts(self) -> set[int]:
        """Experts that have a tensor of their own."""
        return {expert for expert, _, _ in self.names if expert is not None}

    def place(self, expert: int, projection: Projection, kind: str) -> Place | None:
        half = _HALF.get(projection)
        if (name := self.names.get((expert, projection, kind))) is not None:
            return Place(name)
        if half is not None and (name := self.names.get((expert, "fused", kind))) is not None:
            return Place(name, half=half)
        if (name := self.names.get((None, projection, kind))) is not None:
            return Place(name, expert)
        if half is not None and (name := self.names.get((None, "fused", kind))) is not None:
            return Place(name, expert, half)
        return None

    def module_of(self, expert: int, projection: Projection) -> str:
        """The name of one expert's projection, as per-expert checkpoints have it."""
        short = {"gate": "w1", "up": "w3", "down": "w2"}[projection]
        return f"{self.module}.{expert}.{short if self.short else f'{projection}_proj'}"


def find_layers(folder: Folder) -> list[Layer]:
    """Every layer of experts, by the number of the layer, then by name."""
    layers: dict[str, Layer] = {}
    for name in sorted(folder.shard_of):
        if (match := _OF_ANY.match(name)) is None:
            continue
        layer = layers.setdefault(match[1], Layer(match[1]))
        key = _key(name)
        if key is None or key in layer.names:
            layer.strange.append(name)
        else:
            layer.names[key] = name
            layer.short |= name.removeprefix(layer.module).lstrip(".0123456789").startswith("w")
    found = [layer for layer in layers.values() if layer.names]
    for layer in found:
        layer.num_experts = _count(folder, layer)
    return sorted(
        found, key=lambda layer: (-1 if layer.index is None else layer.index, layer.module)
    )


def find_layer(folder: Folder, layer: int | str) -> Layer:
    """The layer of experts of a number, or of a module's name.

    Raises:
        CheckpointError: there is none, or several have that number.
    """
    layers = find_layers(folder)
    found = [x for x in layers if layer in (x.module, x.index)]
    if len(found) == 1:
        return found[0]
    names = ", ".join(x.module for x in (found or layers)[:8]) or "none"
    told = f"{len(found)} have that number; give the name" if found else "there are"
    raise CheckpointError(folder.path, [f"no single layer of experts {layer!r}; {told}: {names}"])


def _key(name: str) -> tuple[int | None, str, str] | None:
    if (match := _OF_EXPERT.fullmatch(name)) is not None:
        meaning = _MEANING.get(match[3])
        return None if meaning is None else (int(match[2]), meaning, match[4])
    if (match := _STACKED.fullmatch(name)) is not None:
        kind = match[3] or "weight"
        # transformers 5 calls the block scales of a stacked FP8 tensor NAME_scale_inv.
        kind = "weight_scale_inv" if kind == "scale_inv" else kind
        return None, _MEANING[match[2]], kind
    return None


def _count(folder: Folder, layer: Layer) -> int:
    """What the configuration says; else as many as there are."""
    for config in _configs(folder.config):
        for key in _COUNTS:
            if isinstance(config.get(key), int):
                return config[key]
    if layer.found_experts:
        return max(layer.found_experts) + 1
    infos = (folder.info(name) for name in layer.names.values())
    return max((info.shape[0] for info in infos if info is not None and info.shape), default=0)


def _configs(config: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """The configuration, and the language model's inside it where there are several."""
    yield config
    if isinstance(inner := config.get("text_config"), dict):
        yield inner


def config_value(folder: Folder, *keys: str) -> Any:
    """The first of these entries that the configuration has; None without any."""
    for config in _configs(folder.config):
        for key in keys:
            if config.get(key) is not None:
                return config[key]
    return None
