"""SGLang's own modules in this process, on a machine without a GPU: settings, a loaded model, a layer.

Empty modules stand for the packages in `EMPTY`. SGLang's layer of experts, its loaders and Qwen3-MoE
import with these. A kernel of sgl_kernel that is called ends in an AttributeError of torch.
"""

# SPDX-License-Identifier: Apache-2.0
import importlib.abc
import importlib.machinery
import os
import socket
import sys
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from nvfp4_moe.serving import sglang as plugin

EMPTY = ("IPython", "sgl_kernel", "torchvision")
"""Packages that SGLang imports at once; sgl_kernel needs a GPU's libraries."""


class Nothing:
    def __init__(self, *_: Any, **__: Any): ...

    def __call__(self, *arguments: Any, **__: Any) -> Any:
        """As a decorator, it returns what it decorates."""
        return arguments[0] if arguments and callable(arguments[0]) else Nothing()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing()


class Empty(ModuleType):
    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {}) if name[0].isupper() else Nothing()


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname, path, target=None):
        if fullname.partition(".")[0] in EMPTY:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec):
        return Empty(spec.name)

    def exec_module(self, module): ...


def install() -> None:
    """Let SGLang be imported in this process, as its engine for CPUs, and register the plug-in."""
    import transformers.image_utils
    import transformers.loss.loss_utils
    import transformers.modeling_utils  # noqa: F401  - it looks for torchvision when it is imported

    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.meta_path.insert(0, Finder())
    plugin.register()


def settings(folder, quantization, **more):
    """Make the settings of a server known to this process, as SGLang's scheduler does."""
    from sglang.srt.distributed import parallel_state
    from sglang.srt.layers.dp_attention import initialize_dp_attention
    from sglang.srt.layers.moe.utils import initialize_moe_config
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import ServerArgs

    arguments = ServerArgs(
        model_path=str(folder), quantization=quantization, device="cpu", dtype="bfloat16", **more
    )
    publish(arguments, role="scheduler", ranks=SpawnRanks(world_rank=0, gpu_id=0, dp_rank=None))
    initialize_moe_config()
    if not torch.distributed.is_initialized():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        parallel_state.init_distributed_environment(1, 0, address, 0, "gloo")
        parallel_state.initialize_model_parallel("gloo")
    initialize_dp_attention(arguments)
    return arguments


def loaded(folder, quantization, **more):
    """Return a model that SGLang's own loader has read, and the name of its quantization method."""
    from sglang.srt.configs.device_config import DeviceConfig
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.model_loader import get_model

    config = ModelConfig.from_server_args(settings(folder, quantization, **more))
    model = get_model(
        model_config=config, load_config=LoadConfig(), device_config=DeviceConfig("cpu")
    )
    return model, config.quantization


def update_from_disk(model, folder):
    """Load other weights into a model, as SGLang's `update_weights_from_disk` does."""
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.model_loader.loader import DefaultModelLoader

    cpu = torch.device("cpu")
    DefaultModelLoader.restore_weights_before_loading(model, cpu)
    loader = DefaultModelLoader(LoadConfig())
    source = DefaultModelLoader.Source(str(folder), revision=None)
    loader.load_weights_and_postprocess(model, loader._get_weights_iterator(source), cpu)


@contextmanager
def one_rank_of_experts(number: int, ranks: int):
    """Let this process be one rank of expert parallelism, without the others."""
    from sglang.srt.runtime_context import get_parallel

    group = SimpleNamespace(world_size=ranks)
    widths = dict.fromkeys(("tp_size", "attn_tp_size", "moe_ep_size"), ranks)
    numbers = dict.fromkeys(("tp_rank", "attn_tp_rank", "moe_ep_rank"), number)
    groups = dict.fromkeys(("tp_group", "attn_tp_group", "moe_ep_group"), group)
    with get_parallel().override(moe_tp_size=1, moe_tp_rank=0, **widths, **numbers, **groups):
        yield


def served(layer, x, weights, ids):
    """Run SGLang's layer of experts: [T, H] bf16."""
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    logits = torch.zeros(len(x), layer.num_experts, dtype=torch.float32, device="cpu")
    return layer(x.clone(), StandardTopKOutput(weights, ids, logits))
