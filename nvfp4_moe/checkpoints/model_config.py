"""The fields of a language model's configuration, wherever config.json or params.json has them."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterable, Mapping
from typing import Any

from .folder import Folder
from .model_fields import LANGUAGE_MODELS


def model_config(folder: Folder) -> dict[str, Any]:
    """Return the fields of the language model, and those of the larger model that it lacks."""
    return _flat(folder.config)


def config_value(folder: Folder, *keys: str) -> Any:
    """Return the first of these entries that the configuration has; None without any."""
    config = model_config(folder)
    return next((config[key] for key in keys if config.get(key) is not None), None)


def is_model(config: Mapping[str, Any], starts: Iterable[str]) -> str | None:
    """Return the first of these that begins `model_type` or an architecture, without case and `_`."""
    architectures = config.get("architectures")
    names = [config.get("model_type"), *(architectures if isinstance(architectures, list) else ())]
    plain = [name.lower().replace("_", "") for name in names if isinstance(name, str)]
    return next((start for start in starts if any(n.startswith(start) for n in plain)), None)


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    fields = dict(config)
    for key in LANGUAGE_MODELS:
        if isinstance(inner := config.get(key), dict):
            own = {k: v for k, v in _flat(inner).items() if v is not None}
            fields = {**fields, **own}
    return fields
