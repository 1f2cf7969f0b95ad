"""The parameters of a layer that SGLang's loaders fill: made, watched for what was not read, dropped.

SGLang makes memory that holds anything, and its updates may name a part of a model's weights. Here every
float is NaN until it is read, so that a missing weight is an error and never a number.
"""

# SPDX-License-Identifier: Apache-2.0
from typing import Any

import torch

from ...kernels.backends import UnsupportedError

NAN_BYTE = 0x7F
"""E4M3's NaN, without its sign."""


class LoadedParameters:
    """The parameters of one layer, from `begin` until `drop`; between them SGLang reads weights."""

    def __init__(self) -> None:
        self.device: torch.device | None = None
        self._before: set[str] = set()
        self._names: list[str] = []
        self._placeholders: list[str] = []

    @property
    def are_there(self) -> bool:
        """True from when they are made until they are dropped."""
        return bool(self._names)

    def begin(self, layer: Any) -> None:
        """Make room for the names under which the parameters are about to be registered."""
        for name in self._placeholders:
            delattr(layer, name)
        self._placeholders = []
        self._before = set(layer._parameters)

    def made(self, layer: Any, unused: tuple[str, ...] = ()) -> None:
        """Take the parameters that have been registered since `begin`, and fill them with NaN.

        Args:
            unused: names of those that no loader fills; they are taken away.
        """
        for name in unused:
            delattr(layer, name)
        self._names = [name for name in layer._parameters if name not in self._before]
        for name in self._names:
            self.device = getattr(layer, name).data.device
        self.forget(layer)

    def forget(self, layer: Any) -> None:
        """Fill every float with NaN, as if nothing had been read."""
        for name in self._names:
            data = getattr(layer, name).data
            if data.is_floating_point():
                data.copy_(torch.full((), torch.nan, dtype=torch.float32, device=data.device))

    def are_untouched(self, layer: Any) -> bool:
        """Return True where nothing has been read since `made`."""
        return all(bool(_is_nan(data).all()) for data in self._floats(layer).values())

    def check_whole(self, layer: Any) -> None:
        """Raise ValueError for a weight of an expert that was not read, or not whole."""
        for name, data in self._floats(layer).items():
            missing = _is_nan(data).reshape(len(data), -1).any(1).nonzero().flatten().tolist()
            if missing:
                raise ValueError(
                    f"{layer.layer_name}: {name} has not been read whole for {len(missing)} of "
                    f"{len(data)} experts of this rank, the first is {missing[0]}; all weights of a "
                    "layer's experts must be given together"
                )

    def drop(self, layer: Any) -> None:
        """Put empty parameters in their place, by whose names SGLang finds that weights are packed."""
        for name in self._names:
            old = getattr(layer, name)
            empty = torch.empty(0, dtype=old.dtype, device=old.device)
            placeholder = torch.nn.Parameter(empty, requires_grad=False)
            placeholder.weight_loader = _refuse_to_load  # type: ignore[attr-defined]
            layer.register_parameter(name, placeholder)
        self._names, self._placeholders = [], self._names

    def _floats(self, layer: Any) -> dict[str, torch.Tensor]:
        """Return those that every checkpoint has; activation scales may be missing."""
        data = {name: getattr(layer, name).data for name in self._names if "input" not in name}
        return {name: tensor for name, tensor in data.items() if tensor.is_floating_point()}


def _is_nan(data: torch.Tensor) -> torch.Tensor:
    if data.dtype == torch.float8_e4m3fn:
        return data.view(torch.uint8).bitwise_and(NAN_BYTE) == NAN_BYTE
    return data.isnan()


def _refuse_to_load(*_: Any, **__: Any) -> None:
    raise UnsupportedError(
        "the experts' weights are packed for nvfp4-moe; SGLang must restore them before it loads new "
        "ones, as its updates from disk and between begin_weight_update and end_weight_update do"
    )
