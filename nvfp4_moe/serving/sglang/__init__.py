"""SGLang's plug-in: its models run their experts in this library, with `--quantization nvfp4_moe`.

`register` is the entry point of this package in SGLang's group `sglang.srt.plugins`; nothing of SGLang
is replaced. `plugin.py` has the registration, `config.py` and `checkpoint.py` the configurations that
SGLang makes, `method.py` what it calls for each layer, `runner.py` the MoE runner that runs the layer,
`gate.py` the layer's activation.
"""

# SPDX-License-Identifier: Apache-2.0
from ..quantizations import QUANTIZATIONS
from .plugin import BACKEND, VERSION, install, register

__all__ = ["BACKEND", "QUANTIZATIONS", "VERSION", "install", "register"]
