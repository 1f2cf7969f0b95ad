"""The experts and linear layers of an NVFP4 checkpoint in a model of transformers: no bf16 copy is made.

Before transformers loads the model's weights, each experts module gives up its parameters, and a module
of ours takes the place of each linear layer that is NVFP4 in the checkpoint. So transformers neither
makes memory for their weights nor reads them. Afterwards the codes and scales are read from the
checkpoint into packed weights. Everything that is wrong is one error, before a weight is read.
"""

# SPDX-License-Identifier: Apache-2.0
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from ...checkpoints.errors import CheckpointError
from ...checkpoints.folder import Folder
from ...checkpoints.formats import read_quantization
from ...checkpoints.layers import Layer, find_layers
from ...checkpoints.load import Plan, plan_layer
from ...checkpoints.naming import LAYER
from ...kernels.backends import UnsupportedError
from ..linear import LinearWeights
from .forward import DEFAULT, IMPLEMENTATIONS
from .gates import Gate
from .linear import Nvfp4Linear, find_linears
from .module import FLAGS, read_gate
from .packed import ATTRIBUTE, Packed


class Loading:
    """One checkpoint on its way into one model.

    Args:
        model: on the meta device, as `from_pretrained` makes it.
        folder: of the checkpoint.

    Raises:
        CheckpointError: everything that is wrong: no NVFP4 experts, missing or extra tensors, other
            sizes than the model's, quantized layers that are not served.
        UnsupportedError: a module of experts that is not modelled.
    """

    def __init__(self, model: Any, folder: Path | str):
        self._model = model
        source = Folder(folder)
        form = read_quantization(source).format
        modules = {name: m for name, m in model.named_modules() if _is_experts(m)}
        self._config = next((m.config for m in modules.values()), model.config)
        layers = find_layers(source)
        problems: list[str] = []
        self._plans: dict[str, tuple[Gate, Plan]] = {}
        for name, module in modules.items():
            gate = read_gate(module)
            try:
                plan = plan_layer(source, _layer_of(name, layers).module, **_arguments(gate))
            except CheckpointError as e:
                problems += e.problems
                continue
            problems += _other_sizes(name, module, plan)
            self._plans[name] = gate, plan
        if not modules:
            problems.append(f"{type(model).__name__} has no module of experts that is served here")
        linears = find_linears(model, source, form)
        self._linears = linears.layers
        problems += linears.problems
        if problems:
            raise CheckpointError(source.path, list(dict.fromkeys(problems)))

    def empty(self) -> None:
        """Take the parameters from the modules that are packed; transformers then reads none of them."""
        model = self._model
        ignored = model._keys_to_ignore_on_load_unexpected
        unread = set(ignored or ())
        for name, (_, plan) in self._plans.items():
            module = model.get_submodule(name)
            for parameter in list(module._parameters):
                module.register_parameter(parameter, None)
            module._is_hf_initialized = True
            unread |= {_tensors_of(part) for part in (name, plan.layer.module)}
        for name, linear in self._linears.items():
            replaced: Any = Nvfp4Linear(model.get_submodule(name), self._config)
            replaced._is_hf_initialized = True
            model.set_submodule(name, replaced)
            unread |= {_tensors_of(part) for part in (name, linear.module)}
        kind = set if isinstance(ignored, set) else list  # as transformers has it: 5.17, and 5.7
        model._keys_to_ignore_on_load_unexpected = kind(unread)
        if model.config._experts_implementation not in IMPLEMENTATIONS:
            model.set_experts_implementation(DEFAULT)

    def fill(self) -> None:
        """Read the packed weights, each layer's to the device of its block's other weights."""
        model = self._model
        for name, (gate, plan) in self._plans.items():
            experts = plan.read(_device_beside(model, name))
            setattr(model.get_submodule(name), ATTRIBUTE, Packed(gate, experts, None))
        for name, linear in self._linears.items():
            tensors = linear.read(_device_beside(model, name))
            model.get_submodule(name).weights = LinearWeights.of(*tensors)
        model.requires_grad_(False)


def _is_experts(module: torch.nn.Module) -> bool:
    return all(hasattr(module, flag) for flag in FLAGS)


def _layer_of(name: str, layers: Iterable[Layer]) -> Layer:
    """Return the checkpoint's layer for a module: the same name, else the only one of its number.

    A layer that the checkpoint lacks is returned without tensors, which `plan_layer` refuses by name.
    """
    found = [layer for layer in layers if layer.module == name]
    if not found:
        number = LAYER.findall(name)
        found = [x for x in layers if number and x.index == int(number[-1])]
    return found[0] if len(found) == 1 else Layer(name)


def _arguments(gate: Gate) -> dict[str, Any]:
    """Return the arguments that overrule config.json by what the module computes."""
    neutral = {"alpha": 1.0, "beta": 0.0, "clamp_limit": math.inf}
    given = {name: value for name, value in gate.parameters.items() if value is not None}
    return {"activation": gate.activation} | neutral | given


def _other_sizes(name: str, module: Any, plan: Plan) -> Iterator[str]:
    """Find sizes of the checkpoint's layer that are not the module's."""
    first = module.gate_up_proj if module.has_gate else module.up_proj
    experts, rows, hidden = first.mT.shape if module.is_transposed else first.shape
    theirs = experts, hidden, rows // 2 if module.has_gate else rows
    ours = len(plan.experts), *plan.sizes
    if ours != theirs:
        yield (
            f"{plan.layer.module}: it has (experts, H, I) = {ours}; by config.json {name} has {theirs}"
        )
    if bool(module.has_bias) != plan.layer.has_bias("down"):
        has = "has" if module.has_bias else "has no"
        yield f"{plan.layer.module}: {name} {has} biases, and the checkpoint differs"


def _tensors_of(module: str) -> str:
    """Return a pattern of the tensors of a module, and of the same module of other layers.

    transformers searches each unexpected name for every pattern: one for each layer would take minutes.
    """
    return re.sub(r"\d+", lambda _: r"\d+", re.escape(module)) + "[._]"


def _device_beside(model: Any, name: str) -> torch.device:
    """Return the device of the nearest weights: of the block that holds the experts, or around it."""
    while name:
        name = name.rpartition(".")[0]
        found = next(model.get_submodule(name).parameters(), None)
        if found is not None:
            return found.device
    raise UnsupportedError(f"{type(model).__name__} has no weights but its experts'")
