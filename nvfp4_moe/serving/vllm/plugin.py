"""The registration with vLLM of the names in `serving/quantizations.py`.

Written against vllm 0.32.0 and 0.33.0: `vllm/plugins/__init__.py`,
`vllm/model_executor/layers/quantization/__init__.py`.
"""

# SPDX-License-Identifier: Apache-2.0
import warnings

from ...kernels import environment
from ...kernels.backends import UnsupportedError

VERSIONS = ("0.32", "0.33")
"""Versions of vLLM whose classes the plug-in is written against."""


def register() -> None:
    """Add our names to vLLM's quantization methods, in this process. It may be called again.

    vLLM calls it in every process, also where nobody asks for these names, so it refuses no version of
    vLLM: a model that asks for one of them does.
    """
    from vllm.model_executor.layers.quantization import register_quantization_config

    from .config import CONFIGURATIONS

    for configuration in CONFIGURATIONS:
        register_quantization_config(configuration.name)(configuration)


def install() -> None:
    """Serve ModelOpt's NVFP4 checkpoints with this library, also where no quantization is named.

    Deprecated: it replaced methods of two classes of vLLM in version 0.1. The plug-in needs no package
    of the user's own: take `--quantization nvfp4_moe`, or `nvfp4_moe_static`. As before, activations are
    static, or per token where the switch is on.

    Raises:
        UnsupportedError: this version of vLLM.
    """
    warnings.warn(
        "nvfp4_moe.serving.vllm.install is deprecated: vLLM finds nvfp4-moe's plug-in by itself; take "
        "--quantization nvfp4_moe, or nvfp4_moe_static for the checkpoint's activation scales",
        DeprecationWarning,
        stacklevel=2,
    )
    check_version()
    register()
    from .config import Nvfp4MoEConfig

    per_token = environment.per_token_activation()
    Nvfp4MoEConfig.modelopt_goes_to = "nvfp4_moe" if per_token else "nvfp4_moe_static"


def check_version() -> str:
    """Return the version of the installed vLLM.

    Raises:
        UnsupportedError: it is none of `VERSIONS`.
    """
    import vllm

    if ".".join(vllm.__version__.split(".")[:2]) not in VERSIONS:
        raise UnsupportedError(
            f"vllm {vllm.__version__} is installed; nvfp4-moe's quantization methods are written for "
            f"vllm {' and '.join(VERSIONS)}"
        )
    return str(vllm.__version__)
