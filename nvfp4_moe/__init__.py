"""NVFP4 with per-token scales: a bit-exact reference, Triton kernels, FlashInfer behind one call.

The public names are loaded when one of them is first used, so that the command line starts without
torch. `public.py` says where each is defined.
"""

# SPDX-License-Identifier: Apache-2.0
from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import interrupts as _starting

_starting.leave_on_interrupt()

from . import earlier_paths as _earlier_paths
from .reference.weights.writers import WRITERS as _WRITERS

_earlier_paths.install()

if TYPE_CHECKING:
    from .public import *

    __version__: str

__all__ = [
    "ActivationType",
    "Experts",
    "Explanation",
    "LayerStatistics",
    "MoEStatistics",
    "NVFP44Over6Config",
    "NVFP44Over6ErrMode",
    "QuantizationStatistics",
    "Recipe",
    "Registration",
    "Routing",
    "RoutingMethodType",
    "SfLayout",
    "UnsupportedError",
    "__version__",
    "add_rmsnorm_nvfp4_quantize",
    "assemble_experts",
    "autotune_fused_moe",
    "explain",
    "explain_fused_moe",
    "explain_fused_moe_masked",
    "explain_mm_fp4",
    "explain_nvfp4_quantize_masked",
    "fake_quantized_moe",
    "fingerprint",
    "fused_moe",
    "fused_moe_masked",
    "mm_fp4",
    "nvfp4_quantize",
    "nvfp4_quantize_masked",
    "prepare_experts",
    "quantization_statistics",
    "register_backend",
    "rmsnorm_nvfp4_quantize",
    "silu_and_mul_nvfp4_quantize",
    "statistics_table",
    "trtllm_fp4_block_scale_moe",
    "trtllm_fp4_block_scale_routed_moe",
    "weight_statistics",
    "with_cute_dsl",
    "with_cutlass",
]

if not TYPE_CHECKING:  # else checkers would believe that every name exists

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            value = _version()
        elif name in __all__:
            value = getattr(import_module(".public", __name__), name)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("nvfp4-moe")
    except PackageNotFoundError:  # a checkout that was never installed
        return "0+checkout"


def _find_triton_writer(device: Any) -> Any:
    from .kernels.weights.update import find_writer

    return find_writer(device)


_WRITERS["triton"] = _find_triton_writer
