"""The parts of vLLM that the plug-in builds on, with its signatures, for a machine without vLLM.

`make server-test` compares every signature with the real one. Weights have vLLM's names, shapes and
order; configurations match modules by the simplest of its rules.
"""

# SPDX-License-Identifier: Apache-2.0
import fnmatch
import sys
from abc import ABC, abstractmethod
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

VERSION = "0.33.0"
LAYERS = "vllm.model_executor.layers"
REGISTERED: dict[str, type] = {}


def register_quantization_config(quantization: str):
    def registered(configuration: type) -> type:
        REGISTERED[quantization] = configuration
        return configuration

    return registered


class QuantizationConfig(ABC):
    def __init__(self):
        self.packed_modules_mapping: dict[str, list[str]] = {}

    @abstractmethod
    def get_name(self): ...

    @abstractmethod
    def get_supported_act_dtypes(self): ...

    @classmethod
    @abstractmethod
    def get_min_capability(cls): ...

    @staticmethod
    @abstractmethod
    def get_config_filenames(): ...

    @classmethod
    @abstractmethod
    def from_config(cls, config): ...

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg, user_quant, hf_config=None):
        return None

    @abstractmethod
    def get_quant_method(self, layer, prefix): ...


class LinearBase(torch.nn.Module):
    pass


class UnquantizedLinearMethod:
    pass


class RoutedExperts(torch.nn.Module):
    """What the plug-in reads of vLLM's layer of experts."""

    ckpt_gate_proj_name, ckpt_up_proj_name, ckpt_down_proj_name = (
        "gate_proj",
        "up_proj",
        "down_proj",
    )

    def __init__(self, moe_config: Any, expert_map: torch.Tensor | None = None):
        super().__init__()
        self.moe_config, self.expert_map = moe_config, expert_map
        self.apply_router_weight_on_input = False
        self.layer_name = "model.layers.0.mlp.experts"


class FusedMoEMethodBase(ABC):
    def __init__(self, moe):
        self.moe, self.moe_kernel = moe, None

    @abstractmethod
    def create_weights(
        self,
        layer,
        num_experts,
        hidden_size,
        intermediate_size_per_partition,
        params_dtype,
        **extra_weight_attrs,
    ): ...

    @abstractmethod
    def get_fused_moe_quant_config(self, layer): ...

    def process_weights_after_loading(self, layer):
        return None

    def apply(self, layer, x, topk_weights, topk_ids, shared_experts, shared_experts_input):
        raise NotImplementedError


def _add(layer, name: str, shape: tuple[int, ...], dtype: torch.dtype, device="cpu") -> None:
    empty = torch.zeros(shape, dtype=dtype, device=device)
    layer.register_parameter(name, torch.nn.Parameter(empty, requires_grad=False))


def _matrices(method, layer, experts, hidden, intermediate):
    """Yield (first, rows, columns) of w13 and w2."""
    rows = intermediate * (2 if method.moe.is_act_and_mul else 1)
    yield "w13", rows, hidden
    yield "w2", hidden, intermediate


class OnlineMoEMethodBase(FusedMoEMethodBase):
    uses_meta_device = True

    def create_weights(
        self,
        layer,
        num_experts,
        hidden_size,
        intermediate_size_per_partition,
        params_dtype,
        **extra_weight_attrs,
    ):
        sizes = num_experts, hidden_size, intermediate_size_per_partition
        for name, rows, columns in _matrices(self, layer, *sizes):
            _add(layer, f"{name}_weight", (num_experts, rows, columns), params_dtype)
            if self.moe.has_bias:
                _add(layer, f"{name}_bias", (num_experts, rows), params_dtype)

    def _zero_padding(self, layer): ...


class ModelOptNvFp4FusedMoE(FusedMoEMethodBase):
    def __init__(self, quant_config, moe_config):
        raise NotImplementedError("it chooses a backend of vLLM, of which this machine has none")

    def uses_weight_scale_2_pattern(self):
        return True

    def create_weights(
        self,
        layer,
        num_experts,
        hidden_size,
        intermediate_size_per_partition,
        params_dtype,
        **extra_weight_attrs,
    ):
        block = self.quant_config.group_size
        halves = 2 if self.moe.is_act_and_mul else 1
        read = extra_weight_attrs["global_num_experts"] if self.use_global_sf else num_experts
        sizes = num_experts, hidden_size, intermediate_size_per_partition
        for name, rows, columns in _matrices(self, layer, *sizes):
            each = (halves,) if name == "w13" else ()
            _add(layer, f"{name}_weight", (num_experts, rows, columns // 2), torch.uint8)
            shape = num_experts, rows, columns // block
            _add(layer, f"{name}_weight_scale", shape, torch.float8_e4m3fn)
            _add(layer, f"{name}_weight_scale_2", (num_experts, *each), torch.float32)
            _add(layer, f"{name}_input_scale", (read, *each), torch.float32)


class CompressedTensorsW4A4Nvfp4MoEMethod(FusedMoEMethodBase):
    def __init__(self, moe, layer_name=None, use_a16=False):
        raise NotImplementedError("it chooses a backend of vLLM, of which this machine has none")

    def create_weights(
        self,
        layer,
        num_experts,
        hidden_size,
        intermediate_size_per_partition,
        params_dtype,
        **extra_weight_attrs,
    ):
        halves = 2 if self.moe.is_act_and_mul else 1
        sizes = num_experts, hidden_size, intermediate_size_per_partition
        for name, rows, columns in _matrices(self, layer, *sizes):
            each = (halves,) if name == "w13" else ()
            _add(layer, f"{name}_weight_packed", (num_experts, rows, columns // 2), torch.uint8)
            shape = num_experts, rows, columns // self.group_size
            _add(layer, f"{name}_weight_scale", shape, torch.float8_e4m3fn)
            _add(layer, f"{name}_weight_global_scale", (num_experts, *each), torch.float32)
            _add(layer, f"{name}_input_global_scale", (num_experts, *each), torch.float32)


class _ModelOptBase(QuantizationConfig):
    FusedMoEMethodCls: Any = None
    group_size = 16

    @classmethod
    def from_config(cls, config):
        made = cls.__new__(cls)
        QuantizationConfig.__init__(made)
        inner = config.get("quantization") or config
        made.exclude_modules = inner.get("exclude_modules") or inner.get("ignore") or []
        made.quantized_layers = inner.get("quantized_layers", {})
        made.nvfp4_config = SimpleNamespace(group_size=16)
        return made

    def get_name(self):
        return "modelopt_fp4"

    def get_supported_act_dtypes(self):
        return [torch.bfloat16, torch.half]

    @classmethod
    def get_min_capability(cls):
        return 75

    @staticmethod
    def get_config_filenames():
        return ["hf_quant_config.json"]

    def is_layer_excluded(self, prefix):
        """By `modelopt.py:187`, `is_layer_skipped` of `quant_utils.py:617`, and vLLM's renaming."""
        parent, _, name = prefix.rpartition(".")
        excluded = list(self.exclude_modules)
        for pattern in self.exclude_modules:
            if pattern[-1:] == "*" and pattern[-2:-1] not in ("", "."):
                excluded += [pattern[:-1], f"{pattern[:-1]}.*"]
                excluded.remove(pattern)
        parts = [f"{parent}.{p}" in excluded for p in self.packed_modules_mapping.get(name, ())]
        if prefix not in excluded and len(set(parts)) > 1:
            raise ValueError(f"Detected some but not all shards of {prefix} are quantized.")
        return (
            (bool(parts) and all(parts))
            or any(pattern in prefix for pattern in excluded)
            or any(fnmatch.fnmatch(prefix, pattern) for pattern in excluded)
        )

    def get_quant_method(self, layer, prefix):
        if self.is_layer_excluded(prefix):
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
        if isinstance(layer, RoutedExperts):
            return self.FusedMoEMethodCls(quant_config=self, moe_config=layer.moe_config)
        return "vLLM's own method"


class ModelOptNvFp4Config(_ModelOptBase):
    pass


class ModelOptMixedPrecisionConfig(_ModelOptBase):
    def _resolve_quant_algo(self, prefix):
        return self.quantized_layers.get(prefix, {}).get("quant_algo")

    def get_quant_method(self, layer, prefix):
        return "vLLM's own method"


class CompressedTensorsConfig(QuantizationConfig):
    @classmethod
    def from_config(cls, config):
        made = cls.__new__(cls)
        QuantizationConfig.__init__(made)
        made.config = config
        return made

    def get_name(self):
        return "compressed-tensors"

    def get_supported_act_dtypes(cls):  # vLLM's own name of it, a method all the same
        return [torch.bfloat16, torch.half]

    @classmethod
    def get_min_capability(cls):
        return 70

    @staticmethod
    def get_config_filenames():
        return []

    def _add_fused_moe_to_target_scheme_map(self): ...

    def get_scheme_dict(self, layer, layer_name=None):
        if any(layer_name.startswith(name) for name in self.config.get("ignore", ())):
            return None
        (group,) = self.config["config_groups"].values()
        return {"weights": group["weights"]}

    @staticmethod
    def _is_nvfp4_format(quant_args):
        return quant_args["num_bits"] == 4

    def get_quant_method(self, layer, prefix):
        return "vLLM's own method"


MODULES: dict[str, tuple[Any, ...]] = {
    f"{LAYERS}.quantization": (register_quantization_config,),
    f"{LAYERS}.quantization.base_config": (QuantizationConfig,),
    f"{LAYERS}.linear": (LinearBase, UnquantizedLinearMethod),
    f"{LAYERS}.fused_moe": (FusedMoEMethodBase, RoutedExperts),
    f"{LAYERS}.quantization.online.moe_base": (OnlineMoEMethodBase,),
    f"{LAYERS}.quantization.modelopt": (
        ModelOptNvFp4FusedMoE,
        ModelOptNvFp4Config,
        ModelOptMixedPrecisionConfig,
    ),
    f"{LAYERS}.quantization.compressed_tensors.compressed_tensors": (CompressedTensorsConfig,),
    f"{LAYERS}.quantization.compressed_tensors.compressed_tensors_moe."
    "compressed_tensors_moe_w4a4_nvfp4": (CompressedTensorsW4A4Nvfp4MoEMethod,),
}
"""The modules of vLLM, and what the plug-in takes from each."""

OURS = ("config", "checkpoint", "method")
"""Modules of the plug-in that import vLLM."""


def install(monkeypatch) -> None:
    """Put the fake in vLLM's place, and let the plug-in's modules be imported anew beside it."""
    for name in [*MODULES, "vllm.envs"]:
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            path = ".".join(parts[:i])
            if not isinstance(getattr(sys.modules.get(path), "fake", None), bool):
                module = ModuleType(path)
                module.__path__, module.fake = [], True  # type: ignore[attr-defined]
                monkeypatch.setitem(sys.modules, path, module)
            if i > 1:
                setattr(sys.modules[".".join(parts[: i - 1])], parts[i - 1], sys.modules[path])
        for thing in MODULES.get(name, ()):
            setattr(sys.modules[name], thing.__name__, thing)
    sys.modules["vllm"].__version__ = VERSION
    sys.modules["vllm.envs"].VLLM_BATCH_INVARIANT = False
    for name in OURS:
        monkeypatch.delitem(sys.modules, f"nvfp4_moe.serving.vllm.{name}", raising=False)
