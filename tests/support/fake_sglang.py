"""The parts of SGLang that the plug-in builds on, with its signatures, for a machine without SGLang.

`make sglang-test` compares every signature with the real one. Weights have SGLang's names, shapes and
order; configurations match modules by the simplest of its rules.
"""

# SPDX-License-Identifier: Apache-2.0
import fnmatch
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch

VERSION = "0.5.23"
SRT = "sglang.srt"
LAYERS = f"{SRT}.layers"
QUANTIZATION = f"{LAYERS}.quantization"
MOE = f"{LAYERS}.moe"

SETTINGS = SimpleNamespace(
    deterministic=SimpleNamespace(enable_deterministic_inference=False),
    moe=SimpleNamespace(enable_eplb=False),
    a2a="none",
    runner="auto",
)
"""What a user has asked of the server."""
RUNNERS: dict[str, Any] = {}


def get_exec():
    return SETTINGS


def get_moe_a2a_backend():
    return SimpleNamespace(value=SETTINGS.a2a, is_none=lambda: SETTINGS.a2a == "none")


def get_moe_runner_backend():
    return SimpleNamespace(value=SETTINGS.runner)


@dataclass(frozen=True)
class RegisteredMoeRunnerBackend:
    value: str


def resolve_moe_runner_backend(backend):
    if backend not in RUNNERS:
        raise ValueError(f"{backend!r} is neither built in nor registered")
    return RegisteredMoeRunnerBackend(backend)


def register_moe_runner_core(backend_name, factory):
    if backend_name in RUNNERS:
        raise ValueError(f"{backend_name!r} is already registered")
    RUNNERS[backend_name] = factory


class MoeQuantInfo(ABC):  # noqa: B024
    pass


class DispatchMoeRunnerCore(ABC):
    def __init__(self, config):
        self.config = config

    @abstractmethod
    def run_from_dispatch(self, dispatch_output, quant_info, runner_config, hooks=None): ...


class MoeRunner:
    def __init__(self, runner_backend, config, lora_enabled=False):
        self.runner_backend, self.config = runner_backend, config
        self.core = RUNNERS[runner_backend.value](config)

    def run(self, dispatch_output, quant_info, lora_info=None):
        return self.core.run_from_dispatch(
            dispatch_output, quant_info, self.config, hooks=lora_info
        )


class StandardCombineInput(NamedTuple):
    hidden_states: torch.Tensor


def set_weight_attrs(weight, weight_attrs):
    for name, value in (weight_attrs or {}).items():
        setattr(weight, name, value)


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
    def override_quantization_method(cls, hf_quant_cfg, user_quant):
        return None

    @abstractmethod
    def get_quant_method(self, layer, prefix): ...

    @abstractmethod
    def get_scaled_act_names(self): ...


class LinearBase(torch.nn.Module):
    pass


class UnquantizedLinearMethod:
    pass


def runner_config(activation="silu", gated=True, **more):
    """What the plug-in reads of SGLang's `MoeRunnerConfig`."""
    none = ("gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit", "swiglu_limit")
    options = dict.fromkeys(none) | {"gate_up_interleaved": True, "no_combine": False}
    options |= {"apply_router_weight_on_input": False, "activation": activation, "is_gated": gated}
    return SimpleNamespace(**(options | more))


class FusedMoE(torch.nn.Module):
    """What the plug-in reads of SGLang's layer of experts."""

    scheme = None

    def __init__(self, moe_runner_config: Any, experts: int, ep_size: int = 1):
        super().__init__()
        self.moe_runner_config = moe_runner_config
        self.num_local_experts, self.num_experts = experts // ep_size, experts
        self.moe_ep_size = ep_size
        self.layer_name = "model.layers.0.mlp.experts"


class QuantizeMethodBase(ABC):
    @abstractmethod
    def apply(self, layer, *args, **kwargs): ...

    def process_weights_after_loading(self, layer):
        return

    def restore_weights_before_loading(self, layer):
        return


class FusedMoEMethodBase(QuantizeMethodBase):
    runner = None

    def create_weights(
        self,
        layer,
        num_experts,
        hidden_size,
        intermediate_size_per_partition,
        params_dtype,
        **extra_weight_attrs,
    ):
        raise NotImplementedError

    def create_moe_runner(self, layer, moe_runner_config):
        raise NotImplementedError

    def get_moe_runner_backend(self, layer):
        return self.runner.runner_backend if self.runner is not None else None

    @abstractmethod
    def apply(self, layer, dispatch_output): ...


def _add(layer, name: str, shape: tuple[int, ...], dtype: torch.dtype, attributes) -> None:
    device = torch.get_default_device()
    empty = torch.zeros(shape, dtype=dtype, device=device)
    parameter = torch.nn.Parameter(empty, requires_grad=False)
    layer.register_parameter(name, parameter)
    set_weight_attrs(parameter, attributes)


def _matrices(layer, hidden, intermediate):
    """Yield (first, rows, columns) of w13 and w2."""
    rows = intermediate * (2 if layer.moe_runner_config.is_gated else 1)
    yield "w13", rows, hidden
    yield "w2", hidden, intermediate


class ModelOptNvFp4FusedMoEMethod(FusedMoEMethodBase):
    def __init__(self, quant_config):
        raise NotImplementedError("it refuses a GPU before Blackwell, and this machine has none")

    @property
    def load_up_proj_weight_first(self):
        raise NotImplementedError

    def create_weights(
        self,
        layer,
        num_experts,
        hidden_size,
        intermediate_size_per_partition,
        params_dtype,
        **extra_weight_attrs,
    ):
        assert not self.enable_flashinfer_trtllm_moe
        loader = {"weight_loader": extra_weight_attrs["weight_loader"]}
        block, gated = self.quant_config.group_size, layer.moe_runner_config.is_gated
        local, experts = layer.num_local_experts, layer.num_experts
        for name, rows, columns in _matrices(layer, hidden_size, intermediate_size_per_partition):
            each = (2 if gated else 1,) if name == "w13" else ()
            _add(layer, f"{name}_weight", (local, rows, columns // 2), torch.uint8, loader)
            scales = local, rows, columns // block
            _add(layer, f"{name}_weight_scale", scales, torch.float8_e4m3fn, loader)
            swizzled = torch.zeros(scales, dtype=torch.float32, device="cpu")
            setattr(layer, f"{name}_blockscale_swizzled", torch.nn.Parameter(swizzled))
            decode = (local, *(each if gated else ()))
            _add(layer, f"{name}_weight_scale_2", decode, torch.float32, loader)
            _add(layer, f"{name}_input_scale", (experts, *each), torch.float32, loader)

    def apply(self, layer, dispatch_output):
        raise NotImplementedError


class CompressedTensorsW4A16Nvfp4MoE(ABC):  # noqa: B024
    def __init__(self, has_input_global_scale=False):
        self.has_input_global_scale, self.group_size = has_input_global_scale, 16

    def create_weights(
        self,
        layer,
        num_experts,
        hidden_size,
        intermediate_size_per_partition,
        params_dtype,
        **extra_weight_attrs,
    ):
        for name, rows, columns in _matrices(layer, hidden_size, intermediate_size_per_partition):
            halves = (2 if layer.moe_runner_config.is_gated else 1,) if name == "w13" else ()
            shape, attributes = (num_experts, rows, columns // 2), extra_weight_attrs
            _add(layer, f"{name}_weight_packed", shape, torch.uint8, attributes)
            scales = num_experts, rows, columns // self.group_size
            _add(layer, f"{name}_weight_scale", scales, torch.float8_e4m3fn, attributes)
            each = num_experts, *halves
            _add(layer, f"{name}_weight_global_scale", each, torch.float32, attributes)
            if self.has_input_global_scale:
                _add(layer, f"{name}_input_global_scale", each, torch.float32, attributes)

    def apply_weights(self, layer, dispatch_output):
        raise NotImplementedError


class _ModelOptBase(QuantizationConfig):
    group_size = 16

    @classmethod
    def from_config(cls, config):
        made = cls.__new__(cls)
        QuantizationConfig.__init__(made)
        inner = config.get("quantization") or config
        made.exclude_modules = inner.get("exclude_modules") or inner.get("ignore") or []
        made.quantized_layers = inner.get("quantized_layers", {})
        made.packed_modules_mapping = config.get("packed_modules_mapping")
        made.nvfp4_config = SimpleNamespace(group_size=16)
        return made

    @classmethod
    def get_name(cls):
        return "modelopt_fp4"

    @classmethod
    def get_supported_act_dtypes(cls):
        return [torch.bfloat16, torch.half]

    @classmethod
    def get_min_capability(cls):
        return 80

    @staticmethod
    def get_config_filenames():
        return ["hf_quant_config.json"]

    def get_scaled_act_names(self):
        return []

    def is_layer_excluded(self, prefix):
        return any(fnmatch.fnmatch(prefix, pattern) for pattern in self.exclude_modules)

    def get_quant_method(self, layer, prefix):
        return None if self.is_layer_excluded(prefix) else "SGLang's own method"


class ModelOptFp4Config(_ModelOptBase):
    pass


class ModelOptMixedPrecisionConfig(_ModelOptBase):
    def resolve_quant_algo(self, prefix):
        return self.quantized_layers.get(prefix, {}).get("quant_algo")


class CompressedTensorsConfig(QuantizationConfig):
    @classmethod
    def from_config(cls, config):
        made = cls.__new__(cls)
        QuantizationConfig.__init__(made)
        made.config = config
        return made

    def get_name(self):
        return "compressed_tensors"

    def get_supported_act_dtypes(cls):  # SGLang's own name of it, a method all the same
        return [torch.bfloat16, torch.half]

    @classmethod
    def get_min_capability(cls):
        return 70

    @classmethod
    def get_config_filenames(cls):
        return []

    def get_scaled_act_names(self):
        return []

    def _add_fused_moe_to_target_scheme_map(self): ...

    def get_scheme_dict(self, layer, layer_name=None, matched_target=None):
        if any(layer_name.startswith(name) for name in self.config.get("ignore", ())):
            return None
        (group,) = self.config["config_groups"].values()
        return {"weights": group["weights"]}

    def _is_fp4a16_nvfp4(self, weight_quant, input_quant):
        return input_quant is None and weight_quant["num_bits"] == 4

    def get_quant_method(self, layer, prefix):
        return "SGLang's own method"


MODULES: dict[str, tuple[Any, ...]] = {
    f"{SRT}.runtime_context": (get_exec,),
    f"{SRT}.utils": (set_weight_attrs,),
    f"{QUANTIZATION}.base_config": (QuantizationConfig, FusedMoEMethodBase),
    f"{QUANTIZATION}.unquant": (UnquantizedLinearMethod,),
    f"{LAYERS}.linear": (LinearBase,),
    f"{MOE}.fused_moe_triton": (FusedMoE,),
    f"{MOE}.moe_runner": (MoeRunner, register_moe_runner_core),
    f"{MOE}.moe_runner.base": (DispatchMoeRunnerCore, MoeQuantInfo),
    f"{MOE}.token_dispatcher.standard": (StandardCombineInput,),
    f"{MOE}.utils": (
        RegisteredMoeRunnerBackend,
        get_moe_a2a_backend,
        get_moe_runner_backend,
        resolve_moe_runner_backend,
    ),
    f"{QUANTIZATION}.modelopt_quant": (
        ModelOptFp4Config,
        ModelOptMixedPrecisionConfig,
        ModelOptNvFp4FusedMoEMethod,
    ),
    f"{QUANTIZATION}.compressed_tensors.compressed_tensors": (CompressedTensorsConfig,),
    f"{QUANTIZATION}.compressed_tensors.schemes": (CompressedTensorsW4A16Nvfp4MoE,),
}
"""The modules of SGLang, and what the plug-in takes from each."""

OURS = ("config", "checkpoint", "method", "runner")
"""Modules of the plug-in that import SGLang."""


def install(monkeypatch) -> None:
    """Put the fake in SGLang's place, and let the plug-in's modules be imported anew beside it."""
    choices = f"{SRT}.arg_groups.choices"
    for name in [*MODULES, choices]:
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
    sys.modules["sglang"].__version__ = VERSION
    quantization = sys.modules[QUANTIZATION]
    quantization.QUANTIZATION_METHODS = {"fp8": None, "modelopt_fp4": ModelOptFp4Config}
    quantization.CPU_QUANTIZATION_METHODS = {"fp8": None}
    there = sys.modules[choices]
    there.QUANTIZATION_CHOICES, there.MOE_RUNNER_BACKEND_CHOICES = ["fp8"], ["auto"]
    there.add_quantization_method_choices = there.QUANTIZATION_CHOICES.extend
    there.add_moe_runner_backend_choices = there.MOE_RUNNER_BACKEND_CHOICES.extend
    monkeypatch.setattr(sys.modules[__name__], "RUNNERS", {})
    for name in OURS:
        monkeypatch.delitem(sys.modules, f"nvfp4_moe.serving.sglang.{name}", raising=False)
