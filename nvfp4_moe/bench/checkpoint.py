"""Conversion to NVFP4, and loading: bf16 experts in memory and on disk, NVFP4 experts from disk.

A conversion moves the bf16 source and the NVFP4 result. `convert` and `load_experts` read files that the
operating system keeps in memory, so their times are of the processor rather than of the disk.
"""

# SPDX-License-Identifier: Apache-2.0
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..checkpoints import convert, load_experts
from ..reference.weights.experts import Experts
from ..reference.weights.prepare import prepare_experts
from .case import Case, Operation, Prepared, Selection

SHAPES = {"4 experts of 1024 x 512": (4, 1024, 512), "16 experts of 2048 x 768": (16, 2048, 768)}
"""The number of experts, H and I."""
IN_MEMORY, TO_DISK = "prepare_experts", "checkpoints.convert"
FROM_DISK, IN_PLACE = "checkpoints.load_experts", "Experts.load_"
_MODULE = "model.layers.0.mlp.experts"


def prepare(case: Case, device: torch.device) -> Prepared:
    """Make a call for random bf16 weights of one layer."""
    w13, w2 = _weights(*SHAPES[case.shape], device)
    source, result = w13.nbytes + w2.nbytes, (w13.numel() + w2.numel()) * 9 / 16
    call, moved, capturable = _calls[case.backend](w13, w2), source + result, False
    if case.backend == FROM_DISK:
        moved = 2 * result  # read from the file, and written in the layout of the layer
    elif case.backend == IN_PLACE and device.type == "cuda":
        moved, capturable = moved + source, True  # the kernels read the weights twice
    return Prepared(call, 0, moved, capturable)


def _weights(
    experts: int, hidden: int, intermediate: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    sizes = (experts, 2 * intermediate, hidden), (experts, hidden, intermediate)
    w13, w2 = (torch.randn(s, dtype=torch.float32, device=device).bfloat16() for s in sizes)
    return w13, w2


def _in_memory(w13: torch.Tensor, w2: torch.Tensor) -> Callable[[], Experts]:
    return lambda: prepare_experts(w13, w2)


def _in_place(w13: torch.Tensor, w2: torch.Tensor) -> Callable[[], None]:
    experts = prepare_experts(w13, w2)
    return lambda: experts.load_(w13, w2)


def _to_disk(w13: torch.Tensor, w2: torch.Tensor) -> Callable[[], None]:
    folder = _Folder(w13, w2)
    device = w13.device

    def call() -> None:
        shutil.rmtree(folder.converted, ignore_errors=True)
        convert(folder.source, folder.converted, device=device)

    return call


def _from_disk(w13: torch.Tensor, w2: torch.Tensor) -> Callable[[], Experts]:
    folder = _Folder(w13, w2)
    device = w13.device
    convert(folder.source, folder.converted, device=device)
    return lambda: load_experts(folder.converted, 0, device=device)


class _Folder:
    """A checkpoint of one layer in a temporary folder, which is deleted with the object."""

    def __init__(self, w13: torch.Tensor, w2: torch.Tensor):
        self._temporary = tempfile.TemporaryDirectory(prefix="nvfp4-moe-bench-")
        self.source = Path(self._temporary.name) / "bf16"
        self.converted = Path(self._temporary.name) / "nvfp4"
        self.source.mkdir()
        tensors = {}
        for e, (first, down) in enumerate(zip(w13.cpu(), w2.cpu(), strict=True)):
            up, gate = first.chunk(2)
            for name, t in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
                tensors[f"{_MODULE}.{e}.{name}.weight"] = t.contiguous()
        save_file(tensors, self.source / "model.safetensors")
        config = {"hidden_act": "silu", "num_experts": len(w13)}
        (self.source / "config.json").write_text(json.dumps(config), "utf-8")


_calls: dict[str, Callable[[torch.Tensor, torch.Tensor], Callable[[], object]]] = {
    IN_MEMORY: _in_memory,
    TO_DISK: _to_disk,
    FROM_DISK: _from_disk,
    IN_PLACE: _in_place,
}


def _operation(name: str, backends: tuple[str, ...]) -> Operation:
    few = Selection(("4 experts of 1024 x 512",), (), backends)
    every = Selection(tuple(SHAPES), (), backends)
    return Operation(name, "", every, {"cpu": few, "cuda": every}, None, prepare)


CONVERT = _operation("convert", (IN_MEMORY, TO_DISK))
LOAD = _operation("load", (FROM_DISK, IN_PLACE))
