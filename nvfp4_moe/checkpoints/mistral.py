"""Mistral's own `params.json`, which takes the place of config.json."""

# SPDX-License-Identifier: Apache-2.0
from typing import Any

MISTRAL = "params.json"
_NAMES = {"dim": "hidden_size", "hidden_dim": "intermediate_size", "activation": "hidden_act"}
"""Mistral's fields, and those of config.json (vllm 0.33.0, `transformers_utils/configs/mistral.py`)."""


def mistral_config(params: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of config.json that `params` stands for; an empty `params` gives none.

    A model that does not name its activation has SiLU.
    """
    if not params:
        return {}
    config = {_NAMES.get(name, name): value for name, value in params.items()}
    if isinstance(moe := config.pop("moe", None), dict):
        config = {**moe, **config}
    config.setdefault("hidden_act", "silu")
    if isinstance(quantization := config.pop("quantization", None), dict):
        config["quantization_config"] = quantization
    return config
