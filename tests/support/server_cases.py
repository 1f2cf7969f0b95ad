"""Cases that the tests of more than one server's plug-in share: signatures, weights and checkpoints."""

# SPDX-License-Identifier: Apache-2.0
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import checkpoint_cases as cases
import torch

Parts = Mapping[str, Mapping[str, torch.Tensor]]


def signature(function: Any) -> list[tuple[Any, ...]]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


def methods_of(fake: ModuleType) -> list[tuple[str, Any, str | None]]:
    """Return (module, class or function, method's name or None) of all that a fake server has."""
    return [
        (module, thing, name)
        for module, things in fake.MODULES.items()
        for thing in things
        for name in (vars(thing) if isinstance(thing, type) else [None])
        if name is None
        or (callable(getattr(thing, name)) and not isinstance(vars(thing)[name], type))
    ]


def loaded_weights(
    parts: Parts, kinds: Mapping[str, str], inverse: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (parameter, value) of a layer whose server has read quantized parts.

    Args:
        kinds: the server's name of each kind of tensor, by ours.
        inverse: scalars are stored as their reciprocals.
    """
    for ours, kind in kinds.items():
        gate, up, down = (parts[p][ours] for p in ("gate", "up", "down"))
        w13 = torch.stack([gate, up], 1) if gate.dim() == 1 else torch.cat([gate, up], 1)
        for parameter, value in ((f"w13_{kind}", w13), (f"w2_{kind}", down)):
            yield parameter, 1 / value if inverse and gate.dim() == 1 else value


def written(
    folder: Path, parts: Parts, naming: cases.Naming, form: str, kinds: Mapping[str, str]
) -> Path:
    """Write layer 0 as a checkpoint of the format, "modelopt" or "compressed-tensors"."""
    tensors = cases.nvfp4(naming, 0, parts, kinds)
    files = {"hf_quant_config": cases.modelopt_config()} if form == "modelopt" else {}
    declared = {} if files else {"quantization_config": cases.compressed_config()}
    return cases.write(folder, [tensors], dict(naming.config) | declared, **files)
