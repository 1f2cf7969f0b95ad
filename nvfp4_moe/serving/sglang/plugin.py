"""The registration with SGLang of the names in `serving/quantizations.py`, and of an MoE runner.

Written against sglang 0.5.23: `srt/plugins/__init__.py`, `srt/arg_groups/choices.py`,
`srt/layers/quantization/__init__.py`, `srt/layers/moe/moe_runner/runner.py`.
"""

# SPDX-License-Identifier: Apache-2.0
import warnings
from collections.abc import Callable
from typing import Any

from ...kernels import environment
from ...kernels.backends import UnsupportedError
from ..quantizations import QUANTIZATIONS

VERSION = "0.5.23"
"""The version of SGLang whose classes the plug-in is written against."""
BACKEND = "nvfp4_moe"
"""The name of the MoE runner, for `--moe-runner-backend`."""


def register() -> None:
    """Add our names to SGLang's choices, methods and runners, in this process. It may be called again.

    SGLang calls it in every process, also where nobody asks for these names, so it refuses no version of
    SGLang: a model that asks for one of them does.
    """
    from sglang.srt.arg_groups import choices
    from sglang.srt.layers import quantization
    from sglang.srt.layers.moe.moe_runner import register_moe_runner_core

    from .config import CONFIGURATIONS
    from .runner import Nvfp4MoERunnerCore

    methods = quantization.QUANTIZATION_METHODS
    if next(iter(methods)) not in CONFIGURATIONS:
        # SGLang takes the first method that claims a checkpoint. Its own do so whatever the user names.
        theirs = dict(methods)
        methods.clear()
        methods.update(CONFIGURATIONS | theirs)
    quantization.CPU_QUANTIZATION_METHODS.update(CONFIGURATIONS)
    _add(choices.add_quantization_method_choices, choices.QUANTIZATION_CHOICES, QUANTIZATIONS)
    _add(choices.add_moe_runner_backend_choices, choices.MOE_RUNNER_BACKEND_CHOICES, (BACKEND,))
    if not _has_runner():
        register_moe_runner_core(BACKEND, Nvfp4MoERunnerCore)


def _add(add: Callable[[list[str]], None], present: list[str], names: Any) -> None:
    add([name for name in names if name not in present])


def _has_runner() -> bool:
    from sglang.srt.layers.moe.utils import resolve_moe_runner_backend

    try:
        resolve_moe_runner_backend(BACKEND)
    except ValueError:
        return False
    return True


def install() -> None:
    """Serve ModelOpt's NVFP4 checkpoints with this library, also where no quantization is named.

    Deprecated: it replaced a function of SGLang in version 0.1, from the user's own package. The plug-in
    needs none: take `--quantization nvfp4_moe`, or `nvfp4_moe_static`. As before, activations are
    static, or per token where the switch is on.
    """
    warnings.warn(
        "nvfp4_moe.serving.sglang.install is deprecated: SGLang finds nvfp4-moe's plug-in by itself; "
        "take --quantization nvfp4_moe, or nvfp4_moe_static for the checkpoint's activation scales",
        DeprecationWarning,
        stacklevel=2,
    )
    register()
    from .config import Nvfp4MoEConfig

    per_token = environment.per_token_activation()
    Nvfp4MoEConfig.modelopt_goes_to = "nvfp4_moe" if per_token else "nvfp4_moe_static"


def check_version() -> None:
    """Raise UnsupportedError unless the installed SGLang is `VERSION`."""
    import sglang

    if sglang.__version__.split("+")[0] != VERSION:
        raise UnsupportedError(
            f"sglang {sglang.__version__} is installed; nvfp4-moe's quantization methods are written "
            f"for sglang {VERSION}"
        )
