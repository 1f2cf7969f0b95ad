"""vLLM's plug-in: its models run their experts in this library, with `--quantization nvfp4_moe`.

`register` is the entry point of this package in vLLM's group `vllm.general_plugins`; nothing of vLLM is
replaced. `plugin.py` has the registration, `config.py` and `checkpoint.py` the configurations that vLLM
makes, `method.py` what it calls for each layer, `gate.py` the layer's activation.
"""

# SPDX-License-Identifier: Apache-2.0
from ..quantizations import QUANTIZATIONS
from .plugin import VERSIONS, install, register

__all__ = ["QUANTIZATIONS", "VERSIONS", "install", "register"]
