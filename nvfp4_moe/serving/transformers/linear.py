"""NVFP4 linear layers in a model of transformers: the module, and which of the model they replace."""

# SPDX-License-Identifier: Apache-2.0
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ...checkpoints.folder import Folder
from ...checkpoints.formats import Format
from ...checkpoints.linears import Linear, plan_linear, quantized_modules
from ...kernels.backends import UnsupportedError
from ..linear import LinearWeights, linear
from .forward import DEFAULT, IMPLEMENTATIONS, NO_GRADIENT


class Nvfp4Linear(torch.nn.Module):
    """A linear layer whose weights were read from an NVFP4 checkpoint.

    Its activations are those of the experts' implementation that the model has at the call. The weights
    are no parameters, as those of packed experts.

    Args:
        replaced: the linear layer in whose place it is.
        config: of the model, which names the experts' implementation.
    """

    def __init__(self, replaced: torch.nn.Linear, config: Any):
        super().__init__()
        self.in_features, self.out_features = replaced.in_features, replaced.out_features
        self.config = config
        self.weights: LinearWeights | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply [..., in_features] bf16: [..., out_features] bf16.

        Raises:
            UnsupportedError: x has another dtype, or a gradient is asked for.
        """
        if x.requires_grad and torch.is_grad_enabled():
            raise UnsupportedError(NO_GRADIENT.format("linear layers"))
        assert self.weights is not None, "they are read after transformers has loaded the others"
        name = self.config._experts_implementation
        chosen = IMPLEMENTATIONS.get(name, IMPLEMENTATIONS[DEFAULT])
        return linear(x, self.weights, chosen.activation, batch_invariant=chosen.batch_invariant)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, NVFP4"


@dataclass(frozen=True)
class Found:
    """The NVFP4 linear layers of a model by the names of its modules, and everything that is wrong."""

    layers: dict[str, Linear]
    problems: list[str]


def find_linears(model: Any, folder: Folder, form: Format) -> Found:
    """Find the module of each quantized linear layer of a checkpoint, and check both.

    A layer that the model does not have, and tells transformers to ignore, is left out: those of
    multi-token prediction, for example.

    Args:
        model: on the meta device, with the modules that transformers made.
    """
    layers: dict[str, Linear] = {}
    problems: list[str] = []
    quantized = quantized_modules(folder, form)
    names = _Names(model) if quantized else None
    for module, kinds in quantized.items():
        assert names is not None
        name, refusal = names.of(module)
        if name is None and names.are_ignored(module):
            continue
        if refusal is not None:
            problems.append(refusal)
            continue
        plan, wrong = plan_linear(folder, module, kinds, form)
        problems += wrong
        if plan is None or name is None:
            continue
        problems += _other_module(model, name, plan)
        layers[name] = plan
    return Found(layers, problems)


class _Names:
    """The names that transformers 5.17 gives to a checkpoint's tensors (`core_model_loading.py`)."""

    def __init__(self, model: Any):
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        transforms = get_model_conversion_mapping(model)
        self._renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self._prefix = model.base_model_prefix
        self._state = model.state_dict()
        self._modules = dict(model.named_modules())
        self._ignored = [re.compile(p) for p in model._keys_to_ignore_on_load_unexpected or ()]
        self._model = type(model).__name__

    def of(self, module: str) -> tuple[str | None, str | None]:
        """Return the model's name for a module of the checkpoint, or None; and why it is not served."""
        from transformers.core_model_loading import rename_source_key

        key = f"{module}.weight"
        where = self._prefix, self._state
        renamed, converted = rename_source_key(key, self._renamings, self._converters, *where)
        if renamed not in self._state and key in self._state:
            renamed, converted = rename_source_key(key, [], [], *where)
        name = renamed.removesuffix(".weight")
        if converted is not None:
            return name, (
                f"{module} is quantized, and transformers fuses, splits or reorders its weights when it "
                f"loads {self._model}; such layers are not served packed"
            )
        if name not in self._modules:
            return None, f"{module} is quantized, and {self._model} has no module of that name"
        return name, None

    def are_ignored(self, module: str) -> bool:
        """Return True if the model tells transformers to ignore the tensors of a module."""
        return any(pattern.search(f"{module}.weight") for pattern in self._ignored)


def _other_module(model: Any, name: str, plan: Linear) -> Iterator[str]:
    """Find why a module of the model is not the linear layer that the checkpoint has."""
    module = model.get_submodule(name)
    if type(module) is not torch.nn.Linear:
        yield (
            f"{plan.module} is quantized, and {name} is of the class {type(module).__name__}; of other "
            "modules than experts, torch.nn.Linear alone is served packed"
        )
        return
    if f"{name}.weight" in _tied(model):
        yield (
            f"{plan.module} is quantized, and {type(model).__name__} shares its weights with another "
            "module (tie_word_embeddings); such a layer is not served packed"
        )
    ours, theirs = (plan.rows, plan.columns), (module.out_features, module.in_features)
    if ours != theirs:
        yield f"{plan.module}: its weights are {list(ours)}; by config.json {name} has {list(theirs)}"
    if plan.has_bias != (module.bias is not None):
        has = "has no" if module.bias is None else "has a"
        yield f"{plan.module}: {name} {has} bias, and the checkpoint differs"


def _tied(model: Any) -> set[str]:
    """Return the names of the parameters that are one with another."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {*tied.keys(), *tied.values()}
