"""The activation of a layer of vLLM, with its parameters.

vLLM's rows are [gate; up], but those of its activation "swigluoai", which take turns. Its configuration
is `FusedMoEConfig` of vllm 0.32 and 0.33, `fused_moe/config.py`; what it computes is in
`fused_moe/activation.py`.
"""

# SPDX-License-Identifier: Apache-2.0
from typing import Any

from ...kernels.backends import UnsupportedError
from ...reference.activation import ActivationType, by_name
from ..gate import Gate

INTERLEAVED = "swigluoai"
_OPEN_AI = Gate(ActivationType.Swiglu, alpha=1.702, beta=1.0, clamp_limit=7.0)
"""The parameters of `INTERLEAVED`, which vLLM's kernel has as constants and does not read."""
_ACTIVATIONS = {name: kind for (name, _), kind in by_name("vllm").items()}


def gate_of(config: Any) -> Gate:
    """Return the activation of a layer, with its parameters.

    Args:
        config: vLLM's `FusedMoEConfig`.

    Raises:
        UnsupportedError: an activation or a parameter that is not modelled here.
    """
    name = config.activation.value
    if name == INTERLEAVED:
        return _OPEN_AI
    if name not in _ACTIVATIONS:
        allowed = ", ".join(sorted([*_ACTIVATIONS, INTERLEAVED]))
        raise UnsupportedError(f"activation is {name!r}; it must be one of {allowed}")
    kind = _ACTIVATIONS[name]
    if kind is ActivationType.Situ:
        linear = config.activation_situ_linear_beta
        if linear is None or linear <= 0:
            raise UnsupportedError(
                f"activation_situ_linear_beta is {linear}, of up that is not bounded; it must be above 0"
            )
        return Gate(kind, alpha=config.activation_situ_beta, beta=linear)
    if kind is not ActivationType.Swiglu:
        return Gate(kind)
    if name == "silu":  # vLLM reads the limit alone
        return Gate(kind, clamp_limit=config.swiglu_limit)
    return Gate(kind, config.swiglu_alpha, config.swiglu_beta, config.swiglu_limit)


def is_interleaved(config: Any) -> bool:
    """Return True where rows of gate and up take turns in vLLM's weights."""
    return config.activation.value == INTERLEAVED
