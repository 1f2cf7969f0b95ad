"""The activation policy: static or per-token scales, for each MoE backend that serves NVFP4 experts.

The same loader serves many backends, and some of them take static activation scales alone. Where
per-token activations are asked for and the loader replaces the scales by ones, such a backend would go
on, and quantize everything with the scale 1. Here every combination has an answer or an error.

Written against sglang 0.5.23 (`modelopt_quant.py`, `nvfp4_online.py`, `moe/utils.py`) and vllm 0.33.0
(`fused_moe/oracle/nvfp4.py`, `quantization/modelopt.py`).
"""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..kernels import environment
from ..kernels.backends import UnsupportedError
from ..kernels.moe.call import Mode
from ..reference import checks

Activation = Mode
Quantization = Literal["as the switch says", "static", "per-token"]


@dataclass(frozen=True)
class Backend:
    """The support of one MoE backend for NVFP4 experts."""

    default: Activation | None  # of a serialized checkpoint, the switch off; None: it serves none
    refusal: str | None = None  # why it does not quantize per token
    per_token_only_of: str | None = None  # the one quantization of which it does


@dataclass(frozen=True)
class Server:
    backends: Mapping[str, Backend]
    quantizations: Mapping[str, Quantization]


_W4A16 = "its activations stay bf16"
_STATIC = "it takes static activation scales alone"
_NO_NVFP4 = Backend(None, "it serves no NVFP4 experts")
_EITHER = Backend("static")

SERVERS = {
    "nvfp4-moe": Server(
        {
            "auto": _EITHER,
            "flashinfer:trtllm": _EITHER,
            "flashinfer:cute-dsl": Backend(None),
            "flashinfer:cutlass": Backend("static", _STATIC),
            "triton": _EITHER,
            "reference": _EITHER,
        },
        {"modelopt": "as the switch says", "compressed-tensors": "as the switch says"},
    ),
    "sglang": Server(
        {
            "flashinfer_trtllm": _EITHER,
            "flashinfer_trtllm_routed": _EITHER,
            "flashinfer_cutedsl": _EITHER,
            "flashinfer_cutedsl+deepep": Backend("static", _STATIC),
            "flashinfer_cutlass": Backend(
                "static", f"{_STATIC}; sglang 0.5.23 gives it scales of one, and it runs"
            ),
            "flashinfer_megamoe": Backend("static", _STATIC),
            "marlin": Backend("bf16", _W4A16),
            "experimental_sgl_marlin": Backend("bf16", _W4A16),
            "lora_marlin": Backend("bf16", _W4A16),
            "experimental_sgl_trtllm": Backend(None, "it is experimental, and not examined here"),
        }
        | dict.fromkeys(
            (
                "deep_gemm", "triton", "triton_kernel", "ascend", "flashinfer_mxfp4", "cutlass",
                "humming", "lora_cutedsl", "lora_triton", "aiter", "hpc_ops", "intel_xpu",
            ),
            _NO_NVFP4,
        ),
        {
            "modelopt_fp4": "as the switch says",
            "modelopt_fp4 online": "static",  # sglang ignores the variable here
            "nvfp4_online": "per-token",
            "compressed-tensors": "static",
        },
    ),
    "vllm": Server(
        {
            "flashinfer_trtllm": _EITHER,
            "flashinfer_cutedsl": Backend("static", per_token_only_of="nvfp4_per_token"),
            "flashinfer_cutlass": Backend("static", _STATIC),
            "flashinfer_b12x": Backend("static", _STATIC),
            "b12x": Backend("static", _STATIC),
            "cutlass": Backend("static", _STATIC),
            "emulation": Backend("static", _STATIC),
            "marlin": Backend("bf16", _W4A16),
            "humming": Backend(None, "it is not examined here"),
            "flashinfer_moe_ep_cutedsl": Backend(None, "it is not examined here"),
        },
        {
            "modelopt_fp4": "as the switch says",
            "nvfp4_per_token": "per-token",
            "compressed-tensors": "static",
        },
    ),
}  # fmt: skip
"""Backends and quantizations, by the names that each server's options have for them.

`flashinfer_cutedsl+deepep` is `flashinfer_cutedsl` with `--moe-a2a-backend deepep`. DeepGEMM's
`--moe-a2a-backend megamoe` is not here: it quantizes its input per token and the intermediate with
static scales, whatever is asked for.
"""


def activation_of(
    server: str, backend: str, quantization: str, *, per_token: bool | None = None
) -> Activation:
    """Return the activations with which a backend serves a layer of NVFP4 experts.

    Args:
        server: "nvfp4-moe", "sglang" or "vllm".
        backend: its MoE backend; "auto" of the servers depends on the GPU, and is not a name here.
        quantization: of the checkpoint, by the server's name for it.
        per_token: the switch; omitted, the environment's.

    Raises:
        UnsupportedError: per-token activations are asked for, or the quantization has no others, and
            the backend has none; or it serves no NVFP4 experts.
        ValueError: a name that is not in `SERVERS`, or a variable that cannot be read.
    """
    if per_token is not None:
        checks.flag("per_token", per_token)
    known = _named("server", server, SERVERS)
    kept: Quantization = _named("quantization", quantization, known.quantizations)
    row: Backend = _named("backend", backend, known.backends)
    asked = environment.per_token_activation() if per_token is None else per_token
    if asked and kept == "static":
        raise UnsupportedError(
            f"{server} serves {quantization} with static activation scales, whatever the switch says"
        )
    wanted = asked or kept == "per-token"
    reason = row.refusal
    if wanted and row.per_token_only_of not in (None, quantization):
        reason = f"it does so with {row.per_token_only_of} only"
    if reason is not None and (wanted or row.default is None):
        what = "quantize activations per token" if wanted else f"serve {quantization}"
        raise UnsupportedError(f"{server}'s backend {backend} does not {what}: {reason}")
    if wanted:
        return "per-token"
    if row.default is None:
        raise UnsupportedError(
            f"{server}'s backend {backend} takes per-token activations alone: set "
            f"{environment.SWITCH_VARIABLES[0]}=1"
        )
    return row.default


def _named(what: str, given: str, known: Mapping[str, Any]) -> Any:
    checks.one_of(what, given, known)
    return known[given]
