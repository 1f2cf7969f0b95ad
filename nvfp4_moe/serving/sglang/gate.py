"""The activation of a layer of SGLang, with its parameters.

SGLang's configuration is `MoeRunnerConfig`, `srt/layers/moe/moe_runner/base.py` of sglang 0.5.23; what
its Triton runner computes is in `moe_runner/triton_utils/fused_moe.py`. Its rows are [gate; up], but
those of a SwiGLU with `gemm1_alpha` and `gate_up_interleaved`, which take turns.
"""

# SPDX-License-Identifier: Apache-2.0
from typing import Any

from ...kernels.backends import UnsupportedError
from ...reference.activation import ActivationType, by_name
from ..gate import Gate

_ACTIVATIONS = by_name("sglang")
_SITU_ALPHA = 4.0
"""SGLang's where a model gives none."""


def gate_of(config: Any) -> Gate:
    """Return the activation of a layer, with its parameters.

    Args:
        config: SGLang's `MoeRunnerConfig`.

    Raises:
        UnsupportedError: an activation or a parameter that is not modelled here.
    """
    key = config.activation, bool(config.is_gated)
    if key not in _ACTIVATIONS:
        known = ", ".join(f"{name}{' gated' if gated else ''}" for name, gated in _ACTIVATIONS)
        raise UnsupportedError(
            f"activation is {key[0]!r}, is_gated {key[1]}; it must be one of {known}"
        )
    kind, limit = _ACTIVATIONS[key], config.gemm1_clamp_limit
    if kind is ActivationType.Situ:
        if limit is None or limit <= 0:
            raise UnsupportedError(
                f"gemm1_clamp_limit is {limit}, of up that is not bounded; it must be above 0"
            )
        alpha = _SITU_ALPHA if config.gemm1_alpha is None else config.gemm1_alpha
        return Gate(kind, alpha=alpha, beta=limit)
    if kind is ActivationType.Swiglu:
        if config.gemm1_alpha is not None:
            beta = 1.0 if config.gemm1_beta is None else config.gemm1_beta
            return Gate(kind, config.gemm1_alpha, beta, limit)
        if limit is not None:  # of the SiLU's result
            return Gate(ActivationType.SwigluStep, clamp_limit=limit)
        return Gate(kind, clamp_limit=config.swiglu_limit)
    return Gate(kind)


def is_interleaved(config: Any) -> bool:
    """Return True where rows of gate and up take turns in SGLang's weights."""
    swiglu = config.activation == "silu" and config.is_gated
    return bool(swiglu and config.gemm1_alpha is not None and config.gate_up_interleaved)
