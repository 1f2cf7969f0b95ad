"""The layers of experts in a checkpoint, whatever their tensors are called (`naming.py`).

Fused rows are [gate; up], as transformers 5, vLLM and SGLang have them, or alternate (GPT-OSS).
"""

# SPDX-License-Identifier: Apache-2.0
import re
from dataclasses import dataclass, field
from itertools import product
from typing import Literal

from .errors import CheckpointError
from .folder import Folder, TensorInfo
from .locations import Place
from .model_config import is_model, model_config
from .model_fields import EXPERT_COUNTS, INTERLEAVED_MODELS
from .naming import LAYER, OF_EXPERTS, PERHAPS, parse

Projection = Literal["gate", "up", "down"]

MOST_EXPERTS = 16_384
_HALF = {"gate": 0, "up": 1}
WEIGHTS = ("weight", "weight_packed")
"""Kinds that are the matrix itself, in one format or another."""


@dataclass
class Layer:
    """One module of experts and the names of its tensors.

    `names` maps (expert, or None of a stacked tensor; gate, up, down or fused; kind) to a tensor's
    name. `strange` are tensors inside the module that fit none of the namings. `flat` are stacked
    tensors whose first dimension is that of all experts' rows.
    """

    module: str
    names: dict[tuple[int | None, str, str], str] = field(default_factory=dict)
    strange: list[str] = field(default_factory=list)
    flat: set[str] = field(default_factory=set)
    short: bool = False  # w1, w3 and w2 instead of gate_proj, up_proj and down_proj
    transposed: bool = False  # stacked matrices are [E, columns, rows]
    interleaved: bool = False
    num_experts: int = 0

    @property
    def index(self) -> int | None:
        """The number of the layer."""
        found = LAYER.findall(self.module)
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

    @property
    def target(self) -> str:
        """The module of the same experts, one by one, in a converted checkpoint."""
        last = self.module.rpartition(".")[2]
        return self.module if last == "experts" else f"{self.module}.experts"

    def has_bias(self, projection: Projection) -> bool:
        """True if any expert has a bias in the GEMM of a projection; all must then."""
        down = projection == "down"
        return any(kind == "bias" and (p == "down") == down for _, p, kind in self.names)

    def place(self, expert: int, projection: Projection, kind: str) -> Place | None:
        half = _HALF.get(projection)
        for owner in (expert, None):
            for part in (None, half) if half is not None else (None,):
                key = owner, projection if part is None else "fused", kind
                if (name := self.names.get(key)) is not None:
                    return Place(
                        name,
                        None if owner is not None else expert,
                        part,
                        self.num_experts if name in self.flat else 0,
                        self.transposed and owner is None,
                        self.interleaved and part is not None,
                    )
        return None

    def module_of(self, expert: int, projection: Projection) -> str:
        """The name of one expert's projection, as per-expert checkpoints have it."""
        return f"{self.target}.{expert}.{self._projection(projection)}"

    def called(self, expert: int, projection: Projection) -> list[str]:
        """Names by which a checkpoint's description may mean one expert's projection."""
        fused = "fused" if projection in _HALF else projection
        own = {
            name.removesuffix(f".{kind}")
            for e, p, kind in product((expert, None), (projection, fused), WEIGHTS)
            if (name := self.names.get((e, p, kind))) is not None
        }
        return [self.module_of(expert, projection), *sorted(own)]

    def _projection(self, projection: Projection) -> str:
        short = {"gate": "w1", "up": "w3", "down": "w2"}[projection]
        return short if self.short else f"{projection}_proj"


def find_layers(folder: Folder) -> list[Layer]:
    """Every layer of experts, by the number of the layer, then by name."""
    layers: dict[str, Layer] = {}
    for name in sorted(folder.shard_of):
        parts = parse(name)
        if parts is None:
            if (match := OF_EXPERTS.match(name)) is not None:
                module = match["module"]
                layers.setdefault(module, Layer(module)).strange.append(name)
            continue
        layer = layers.setdefault(parts.module, Layer(parts.module))
        key = parts.expert, parts.projection, parts.kind
        if key in layer.names:
            layer.strange.append(name)
        else:
            layer.names[key] = name
            layer.short |= parts.short
    found = [layer for layer in layers.values() if layer.names]
    interleaved = is_model(model_config(folder), INTERLEAVED_MODELS) is not None
    for layer in found:
        layer.interleaved = interleaved
        layer.num_experts = _count(folder, layer)
    return sorted(
        found, key=lambda layer: (-1 if layer.index is None else layer.index, layer.module)
    )


def find_layer(folder: Folder, layer: int | str) -> Layer:
    """The layer of experts of a number, or of a module's name.

    Raises:
        CheckpointError: there is none, several have that number, or its number of experts is impossible.
    """
    layers = find_layers(folder)
    found = [x for x in layers if layer in (x.module, x.index)]
    if len(found) == 1:
        if problem := count_problem(folder, found[0]):
            raise CheckpointError(folder.path, [*folder.broken.values(), problem])
        return found[0]
    names = ", ".join(x.module for x in (found or layers)[:8]) or f"none{_perhaps(folder)}"
    told = f"{len(found)} have that number; give the name" if found else "there are"
    problem = f"no single layer of experts {layer!r}; {told}: {names}"
    raise CheckpointError(folder.path, [*folder.broken.values(), problem])


def count_problem(folder: Folder, layer: Layer) -> str | None:
    """Why a layer's number of experts cannot be right; None if it can.

    It comes from the configuration or from names, and is asked for before anything counts up to it.
    """
    infos = (folder.info(name) for (expert, _, _), name in layer.names.items() if expert is None)
    stacked = (i.shape[0] for i in infos if i is not None and i.shape and all(i.shape))
    most = min(max([len(layer.names), *stacked]), MOST_EXPERTS)
    if 1 <= layer.num_experts <= most:
        return None
    return (
        f"{layer.module}: by config.json or its names it has {layer.num_experts} experts; by its "
        f"tensors it can have 1 to {most}"
    )


def _count(folder: Folder, layer: Layer) -> int:
    """The number of experts: the configuration's, else as many as there are."""
    config = model_config(folder)
    for key in EXPERT_COUNTS:
        if isinstance(config.get(key), int):
            return config[key]
    if layer.found_experts:
        return max(layer.found_experts) + 1
    infos = [i for n in layer.names.values() if (i := folder.info(n)) is not None]
    return max((i.shape[0] for i in infos if len(i.shape) > 2), default=_by_vectors(infos))


def _by_vectors(infos: list[TensorInfo]) -> int:
    """The number of experts in flattened stacks: that of the scales of one value each."""
    return max((i.shape[0] for i in infos if len(i.shape) == 1), default=0)


def _perhaps(folder: Folder) -> str:
    """Names that could be of experts, to be told where none are found."""
    names = {re.sub(r"\d+", "N", name) for name in folder.shard_of if PERHAPS.search(name)}
    shown = ", ".join(sorted(names)[:6])
    return f"; of no scheme that is known here: {shown}" if names else ""
