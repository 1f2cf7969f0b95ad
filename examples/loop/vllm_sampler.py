"""A sampler that is vLLM, in this process, with our plug-in.

What is hooked is hooked on objects of the engine: the `apply` of a layer's method, the forward of the
model. vLLM's option for recorded routes needs another runner than the CPU build has, so its recorder,
`RoutedExpertsCapturer`, is bound to the model here as its other runner binds it.
"""

# SPDX-License-Identifier: Apache-2.0
import gc
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from nvfp4_moe.checkpoints.convert import convert

from .calls import Layer, Recorder
from .policy import VOCABULARY
from .samplers import Amax, Written, joined, weights_of

QUANTIZATIONS = {
    "bf16": None,
    "static": "nvfp4_moe_static",
    "per token": "nvfp4_moe",
    "4over6 per token": "loop_4over6",
    "W4A16": "nvfp4_moe_w4a16",
}
"""vLLM's `--quantization` by the names of the tables; one is registered here."""
VARIABLES = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


def prepare_process() -> None:
    """Set vLLM's variables, before it is imported."""
    os.environ.update(VARIABLES)


def register() -> None:
    """Add the plug-in's names to vLLM's quantizations, and 4over6, which the plug-in has no name for."""
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.quantization import register_quantization_config

    from nvfp4_moe.serving.gate import up_then_gate
    from nvfp4_moe.serving.vllm import register as register_plugin
    from nvfp4_moe.serving.vllm.config import Nvfp4MoEConfig
    from nvfp4_moe.serving.vllm.method import OnlineNvfp4MoE

    from .arithmetic import ARITHMETIC

    arithmetic = ARITHMETIC["4over6 per token"]

    class FourOverSix(OnlineNvfp4MoE):
        """The plug-in's method with another recipe."""

        def packed(self, layer: Any) -> Any:
            experts = super().packed(layer)
            w13 = up_then_gate(layer.w13_weight.data, interleaved=False)
            experts.load_(w13, layer.w2_weight.data.contiguous(), **arithmetic.options(None))
            return experts

        def apply(
            self, layer: Any, x: Any, topk_weights: Any, topk_ids: Any, *_: Any, **__: Any
        ) -> torch.Tensor:
            assert self.experts is not None, "vLLM has not packed the weights"
            return arithmetic.run(x, self.experts, topk_ids, topk_weights)

    class FourOverSixConfig(Nvfp4MoEConfig):
        name = "loop_4over6"

        @classmethod
        def activation(cls) -> Any:
            return "per-token"

        def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
            if isinstance(layer, RoutedExperts):
                return FourOverSix(layer.moe_config, "per-token")
            return super().get_quant_method(layer, prefix)

    register_plugin()
    register_quantization_config(FourOverSixConfig.name)(FourOverSixConfig)


def _calibrate(folder: Path, amax: Amax) -> None:
    """Write activation scales into a checkpoint of `nvfp4-moe convert`, whose own are neutral."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors:
            if name.endswith("input_scale"):
                layer = int(name.split("layers.")[1].split(".")[0])
                largest = amax[layer]["down_proj" in name]
                tensors[name] = torch.full_like(tensors[name], largest / (6 * 448))
        save_file(tensors, file, {"format": "pt"})


class VllmSampler:
    """An engine of vLLM; the dense weights are reloaded by vLLM, the experts by `load_`.

    Args:
        trained: the trainer's model.
        name: of `QUANTIZATIONS`.
        folder: an empty one, for the checkpoint.
        amax: for "static".
    """

    def __init__(self, trained: Any, name: str, folder: Path, amax: Amax | None = None) -> None:
        from vllm import LLM

        register()
        trained.save_pretrained(folder / "bf16")
        source = folder / "bf16"
        if name == "static":
            assert amax is not None, "static activations were not calibrated"
            convert(source, folder / "nvfp4")
            source = folder / "nvfp4"
            _calibrate(source, amax)
        self.recorder = Recorder()
        self.engine = LLM(
            str(source),
            quantization=QUANTIZATIONS[name],
            skip_tokenizer_init=True,
            enforce_eager=True,
            dtype="bfloat16",
            max_model_len=128,
            max_num_seqs=32,
            max_num_batched_tokens=1024,
            max_logprobs=VOCABULARY,
            enable_prefix_caching=False,
            async_scheduling=False,
            disable_log_stats=True,
            seed=0,
        )
        self._runners: list[Any] = []
        self._steps: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self.engine.apply_model(self._hook)

    def _hook(self, model: torch.nn.Module) -> None:
        from vllm.model_executor.layers.fused_moe.layer import MoERunner
        from vllm.model_executor.layers.fused_moe.routed_experts_capturer import (
            RoutedExpertsCapturer,
            bind_routed_experts_capturer,
        )

        found = (m for m in model.modules() if isinstance(m, MoERunner))
        self._runners = sorted(found, key=lambda runner: runner.layer_id)
        capturer = RoutedExpertsCapturer(1024, self.engine.llm_engine.vllm_config)
        bind_routed_experts_capturer(model, capturer)

        def after(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            read = kwargs["input_ids"]
            routes = capturer.snapshot_routing_data(len(read))
            self._steps.append((read.clone(), kwargs["positions"].clone(), routes))

        model.register_forward_hook(after, with_kwargs=True)
        for number, runner in enumerate(self._runners):
            method = runner.routed_experts.quant_method
            if hasattr(method, "batch_invariant"):
                self._record(number, method)
        self.set_batch_invariant(True)

    def _record(self, number: int, method: Any) -> None:
        apply = method.apply

        def recorded(layer: Any, x: Any, topk_weights: Any, topk_ids: Any, **shared: Any) -> Any:
            y = apply(layer, x, topk_weights, topk_ids, **shared)
            self.recorder.add(number, x, topk_ids, topk_weights, y)
            return y

        method.apply = recorded

    def set_batch_invariant(self, value: bool) -> None:
        """Do for the experts what VLLM_BATCH_INVARIANT=1 does; that also asks for kernels of a GPU."""
        for runner in self._runners:
            method = runner.routed_experts.quant_method
            if hasattr(method, "batch_invariant"):
                method.batch_invariant = value

    @property
    def experts(self) -> list[Any]:
        """The plug-in's `Experts`, by layer."""
        return [runner.routed_experts.quant_method.experts for runner in self._runners]

    def layers(self) -> list[Layer]:
        """The experts of each layer, as the engine calls them."""

        def layer(runner: Any) -> Layer:
            inner = runner.routed_experts
            shared = {"shared_experts": None, "shared_experts_input": None}
            return lambda x, ids, w: inner.quant_method.apply(inner, x, w, ids, **shared)

        return [layer(runner) for runner in self._runners]

    def reload(self, trained: Any) -> None:
        """Take the trainer's weights into the memory of the engine's."""
        dense = [(n, p) for n, p in trained.state_dict().items() if ".mlp.experts." not in n]
        self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": dense})
        for experts, w in zip(self.experts, weights_of(trained), strict=True):
            experts.load_(*w)

    def write(
        self, prompts: torch.Tensor, length: int, seed: int, batch: int | None = None
    ) -> Written:
        """Sample texts of `length` tokens behind prompts [N, P], `batch` at a time."""
        batch, seed = batch or len(prompts), seed * len(prompts)
        starts = range(0, len(prompts), batch)
        return joined([self._write(prompts[i : i + batch], length, seed + i) for i in starts])

    def _write(self, prompts: torch.Tensor, length: int, seed: int) -> Written:
        """Each text has a seed of its own, the first one `seed`."""
        from vllm import SamplingParams

        self._steps.clear()
        sampling = [
            SamplingParams(
                temperature=1.0,
                max_tokens=length,
                ignore_eos=True,
                detokenize=False,
                logprobs=VOCABULARY,
                seed=seed + i,
            )
            for i in range(len(prompts))
        ]
        asked = [{"prompt_token_ids": prompt} for prompt in prompts.tolist()]
        outputs = [o.outputs[0] for o in self.engine.generate(asked, sampling, use_tqdm=False)]
        told = torch.empty(len(outputs), length, VOCABULARY, dtype=torch.float32, device="cpu")
        for row, output in zip(told, outputs, strict=True):
            for place, found in zip(row, output.logprobs, strict=True):
                order = sorted(found)
                place.copy_(torch.tensor([found[v].logprob for v in order], dtype=torch.float32))
        written = torch.tensor([list(o.token_ids) for o in outputs], device="cpu")
        texts = torch.cat([prompts, written], 1)
        return Written(texts, prompts.shape[1], told, self._routes(texts))

    def _routes(self, texts: torch.Tensor) -> torch.Tensor:
        """Put the recorded routes of every step into the places of the texts.

        Raises:
            RuntimeError: the engine read other bytes at these places.
        """
        count, places = len(texts), texts.shape[1] - 1
        first = self._steps[0][2]
        found = torch.zeros(count, places, *first.shape[1:], dtype=torch.int64, device="cpu")
        for read, positions, routes in self._steps:
            text = -1
            for row, place in enumerate(positions.tolist()):
                # A prompt begins at place 0; a step of one byte a text has the texts in order.
                text = text + 1 if place == 0 or len(read) == count else text
                if text >= count or place >= places or texts[text, place] != read[row]:
                    raise RuntimeError(f"row {row} of a step is byte {read[row]} at place {place}")
                found[text, place] = routes[row].long()
        return found

    def close(self) -> None:
        """Give the engine's memory back."""
        self._runners.clear()
        del self.engine
        gc.collect()
