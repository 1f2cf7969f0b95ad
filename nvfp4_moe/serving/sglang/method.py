"""The methods that SGLang calls for a layer of experts: to make, read and pack weights, and to run it.

Each class has SGLang's own weights of one format, under its names, so that every loader of SGLang fills
them. After loading, `Experts` take their place. SGLang routes; it runs shared experts beside the layer
or as experts of it, and sums over ranks.
"""

# SPDX-License-Identifier: Apache-2.0
import functools
import logging
from dataclasses import replace
from typing import Any

import torch
from sglang.srt.layers.moe.moe_runner import MoeRunner
from sglang.srt.layers.moe.utils import get_moe_a2a_backend, get_moe_runner_backend
from sglang.srt.layers.quantization.base_config import FusedMoEMethodBase
from sglang.srt.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsW4A16Nvfp4MoE,
)
from sglang.srt.layers.quantization.modelopt_quant import ModelOptNvFp4FusedMoEMethod
from sglang.srt.runtime_context import get_exec
from sglang.srt.utils import set_weight_attrs

from ...kernels.backends import UnsupportedError
from ...kernels.moe.call import Mode
from ...reference.weights.experts import Experts
from ..canary import canary_asked_for
from ..fused import refuse_a_dropped_switch
from ..packing import Packed, check_sizes, from_bf16, from_nvfp4, tensors_of
from ..quantizations import refuse_static_of_bf16
from .gate import gate_of, is_interleaved
from .parameters import LoadedParameters
from .plugin import BACKEND
from .runner import RUNNER, Nvfp4MoEQuantInfo

logger = logging.getLogger(__name__)


class Served:
    """The part that is the same for all formats; each class has a base of SGLang beside it."""

    fuse_routed_scaling_factor_in_topk = True  # SGLang then multiplies the router's weights by it
    load_up_proj_weight_first = False
    unused_parameters: tuple[str, ...] = ()
    runner: Any = None

    def _serve(self, layer: Any, activation: Mode) -> None:
        """Take the layer's settings; refuse what is not served before any weight is read."""
        config = layer.moe_runner_config
        self.gate, self.interleaved = gate_of(config), is_interleaved(config)
        _refuse_settings(config)
        refuse_a_dropped_switch(activation != "static")
        self.activation = activation
        self.batch_invariant = bool(get_exec().deterministic.enable_deterministic_inference)
        self.canary = canary_asked_for()
        self.experts: Experts | None = None
        self.parameters = LoadedParameters()
        _say_once(activation, self.batch_invariant, self.canary is not None)

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Make the parameters that SGLang reads the checkpoint into, with NaN for every float of them.

        Raises:
            UnsupportedError: sizes that are not whole blocks.
        """
        check_sizes(hidden_size, intermediate_size_per_partition)
        sizes = num_experts, hidden_size, intermediate_size_per_partition, params_dtype
        self.parameters.begin(layer)
        super().create_weights(layer, *sizes, **extra_weight_attrs)  # type: ignore[misc]
        self.parameters.made(layer, self.unused_parameters)
        self._sizes, self._attributes = sizes, extra_weight_attrs

    def create_moe_runner(self, layer: Any, moe_runner_config: Any) -> None:
        self.runner = MoeRunner(RUNNER, moe_runner_config)

    def get_moe_runner_backend(self, layer: Any) -> Any:
        return RUNNER

    def packed(self, layer: Any) -> Experts:
        """Return experts of the weights that have been read."""
        raise NotImplementedError

    def process_weights_after_loading(self, layer: Any) -> None:
        """Put `Experts` in the place of the weights that have been read.

        SGLang's update of weights calls it again, after `restore_weights_before_loading`. The new
        experts are then written into the memory of the first ones, which CUDA graphs have captured. A
        layer whose weights are not among the new ones keeps its own.

        Raises:
            ValueError: a weight that has not been read, or that cannot be packed. What has been read is
                forgotten, so that a later update does not mix with it.
        """
        if not self.parameters.are_there:
            return
        if self.experts is None or not self.parameters.are_untouched(layer):
            try:
                self.parameters.check_whole(layer)
                self._take(layer, self.packed(layer))
            except Exception:
                self.parameters.forget(layer)
                raise
        self.parameters.drop(layer)

    def _take(self, layer: Any, experts: Experts) -> None:
        if self.experts is not None:
            _write(experts, self.experts)
            return
        self.experts = experts
        for name, tensor in tensors_of(experts).items():
            parameter = torch.nn.Parameter(tensor, requires_grad=False)
            layer.register_parameter(f"nvfp4_{name}", parameter)

    def restore_weights_before_loading(self, layer: Any) -> None:
        """Make the parameters again that SGLang reads new weights into; `experts` stay as they are."""
        if self.parameters.are_there or self.parameters.device is None:
            return
        with torch.device(self.parameters.device):
            self.create_weights(layer, *self._sizes, **self._attributes)

    def apply(self, layer: Any, dispatch_output: Any) -> Any:
        """Run the routed experts of this rank: [T, H] bf16 to [T, H] bf16, as `runner.py` says."""
        assert self.experts is not None and self.runner is not None, "no weights have been packed"
        info = Nvfp4MoEQuantInfo(
            self.experts, self.activation, self.batch_invariant, self.canary, layer.layer_name
        )
        return self.runner.run(dispatch_output, info)

    def _laid_out(self, layer: Any, w13: Packed, w2: Packed) -> Experts:
        """Return experts of a checkpoint that is quantized already."""
        static = self.activation == "static"
        experts = from_nvfp4(self.gate, w13, w2, static=static, interleaved=self.interleaved)
        return _in_place(experts, layer)


class _Bf16Weights(FusedMoEMethodBase):
    """Weights in bf16 under SGLang's names, as its `UnquantizedFusedMoEMethod` has them on a GPU."""

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        with_bias = extra_weight_attrs.pop("with_bias", False)
        rows = intermediate_size_per_partition * (2 if layer.moe_runner_config.is_gated else 1)
        shapes = {
            "w13_weight": (num_experts, rows, hidden_size),
            "w2_weight": (num_experts, hidden_size, intermediate_size_per_partition),
        }
        for name, shape in shapes.items():
            _add(layer, name, shape, params_dtype, extra_weight_attrs)
        if with_bias:
            for name, shape in shapes.items():
                _add(layer, f"{name}_bias", shape[:2], torch.float32, extra_weight_attrs)


class OnlineNvfp4MoE(Served, _Bf16Weights):
    """Weights in bf16, which are quantized layer by layer when all have been read."""

    def __init__(self, layer: Any, activation: Mode):
        refuse_static_of_bf16(activation)
        self._serve(layer, activation)

    def packed(self, layer: Any) -> Experts:
        experts = from_bf16(
            self.gate,
            layer.w13_weight.data,
            layer.w2_weight.data,
            _data(layer, "w13_weight_bias"),
            _data(layer, "w2_weight_bias"),
            interleaved=self.interleaved,
        )
        return _in_place(experts, layer)


class ModelOptNvfp4MoE(Served, ModelOptNvFp4FusedMoEMethod):
    """ModelOpt's NVFP4. SGLang's loader reads two scales of w13 where the class's name has ModelOpt."""

    # Of SGLang's class, whose own __init__ refuses GPUs that its backends do not serve.
    enable_flashinfer_trtllm_moe = False
    use_flashinfer_trtllm_weight_layout = False
    unused_parameters = ("w13_blockscale_swizzled", "w2_blockscale_swizzled")  # other backends'

    def __init__(self, quant_config: Any, layer: Any, activation: Mode):
        self.quant_config = quant_config
        self._serve(layer, activation)

    def packed(self, layer: Any) -> Experts:
        return self._laid_out(
            layer,
            Packed(
                layer.w13_weight.data,
                layer.w13_weight_scale.data,
                layer.w13_weight_scale_2.data,
                layer.w13_input_scale.data,
            ),
            Packed(
                layer.w2_weight.data,
                layer.w2_weight_scale.data,
                layer.w2_weight_scale_2.data,
                layer.w2_input_scale.data,
            ),
        )


class CompressedTensorsNvfp4MoE(Served, CompressedTensorsW4A16Nvfp4MoE, FusedMoEMethodBase):
    """compressed-tensors' NVFP4, whose scalars are reciprocals."""

    def __init__(self, quant_config: Any, layer: Any, activation: Mode):
        # A checkpoint of weights alone leaves them unread; SGLang's loader fails without them.
        CompressedTensorsW4A16Nvfp4MoE.__init__(self, has_input_global_scale=True)
        self.quant_config = quant_config
        self._serve(layer, activation)
        if activation == "static" and layer.moe_ep_size > 1:
            raise UnsupportedError(
                "SGLang reads compressed-tensors' activation scales of this rank's experts alone; "
                "static scales are the largest over all: take nvfp4_moe, or no expert parallelism"
            )

    def apply_weights(self, layer: Any, dispatch_output: Any) -> Any:
        return self.apply(layer, dispatch_output)

    def packed(self, layer: Any) -> Experts:
        return self._laid_out(
            layer,
            Packed(
                layer.w13_weight_packed.data,
                layer.w13_weight_scale.data,
                1.0 / layer.w13_weight_global_scale.data,
                1.0 / layer.w13_input_global_scale.data,
            ),
            Packed(
                layer.w2_weight_packed.data,
                layer.w2_weight_scale.data,
                1.0 / layer.w2_weight_global_scale.data,
                1.0 / layer.w2_input_global_scale.data,
            ),
        )


def _refuse_settings(config: Any) -> None:
    """Raise UnsupportedError for a setting of SGLang that these experts do not have."""
    a2a, backend = get_moe_a2a_backend(), get_moe_runner_backend()
    moe = get_exec().moe
    for given, what, allowed in (
        (not a2a.is_none(), f"--moe-a2a-backend is {a2a.value}", "none"),
        (
            backend.value not in ("auto", BACKEND),
            f"--moe-runner-backend is {backend.value}",
            f"auto or {BACKEND}",
        ),
        (moe.enable_eplb, "--enable-eplb is on, which moves SGLang's own weights", "off"),
        (config.no_combine, "no_combine is True", "False"),
    ):
        if given:
            raise UnsupportedError(f"{what}; with nvfp4-moe's experts it must be {allowed}")


@functools.cache
def _say_once(activation: Mode, batch_invariant: bool, canary: bool) -> None:
    invariant = ", batch-invariant" if batch_invariant else ""
    logger.info(
        "nvfp4-moe serves this model's experts: activations %s%s%s",
        activation,
        invariant,
        ", watched by a canary" if canary else "",
    )


def _add(
    layer: Any, name: str, shape: tuple[int, ...], dtype: torch.dtype, attributes: dict[str, Any]
) -> None:
    device = torch.get_default_device()  # SGLang makes models under the one that they are to lie on
    empty = torch.empty(shape, dtype=dtype, device=device)
    parameter = torch.nn.Parameter(empty, requires_grad=False)
    layer.register_parameter(name, parameter)
    set_weight_attrs(parameter, attributes)


def _write(new: Experts, first: Experts) -> None:
    """Copy new experts into the memory of the first ones."""
    given, kept = tensors_of(new), tensors_of(first)
    same = {name: tensor.shape for name, tensor in given.items()} == {
        name: tensor.shape for name, tensor in kept.items()
    }
    if not same:
        raise ValueError("the new weights have another layout than the first ones")
    for name, tensor in kept.items():
        tensor.copy_(given[name])


def _in_place(experts: Experts, layer: Any) -> Experts:
    """The experts, whose rows the router's weights multiply first where the model has it so."""
    weighted = bool(layer.moe_runner_config.apply_router_weight_on_input)
    return replace(experts, router_weight_on_input=weighted)


def _data(layer: Any, name: str) -> torch.Tensor | None:
    parameter = getattr(layer, name, None)
    return None if parameter is None else parameter.data
