"""A sampler that is transformers' `generate`, with NVFP4 experts that stay where they are in memory."""

# SPDX-License-Identifier: Apache-2.0
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.integrations.moe import ExpertsInterface

from nvfp4_moe.serving.transformers.module import projections

from .arithmetic import ARITHMETIC, Arithmetic
from .calls import Layer, Recorder
from .policy import BF16, experts_modules, routers

Amax = list[tuple[float, float]]
"""The largest magnitudes of a layer's input and of its intermediate, by layer."""


@dataclass(frozen=True)
class Written:
    """Texts, and what the sampler says of them."""

    texts: torch.Tensor  # [N, P + L] int64
    first: int  # P, the first place that the sampler wrote
    told: torch.Tensor  # [N, L, V] fp32: the log-probabilities that it sampled from
    ids: torch.Tensor  # [N, P + L - 1, layers, K]: the experts that it chose


def joined(parts: list[Written]) -> Written:
    """Put texts of one length together."""
    return Written(
        torch.cat([p.texts for p in parts]),
        parts[0].first,
        torch.cat([p.told for p in parts]),
        torch.cat([p.ids for p in parts]),
    )


def weights_of(model: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return (w13, w2) of every layer in bf16, as `prepare_experts` takes them."""
    found = (projections(module) for module in experts_modules(model))
    return [(p.w13.detach().contiguous(), p.w2.detach()) for p in found]


class TransformersSampler:
    """A model of its own, in transformers, with `load_` between two texts.

    Args:
        trained: the trainer's model.
        name: of `ARITHMETIC`, or "bf16" for transformers' own experts.
        amax: for "static".
    """

    def __init__(self, trained: Any, name: str, amax: Amax | None = None) -> None:
        self._arithmetic = ARITHMETIC.get(name)
        self.recorder = Recorder()
        self.model = copy.deepcopy(trained).requires_grad_(False)
        layers = len(experts_modules(trained))
        self._amax: Sequence[tuple[float, float] | None] = amax or [None] * layers
        self.experts: list[Any] = []
        if self._arithmetic is not None:
            pairs = zip(weights_of(trained), self._amax, strict=True)
            self.experts = [self._arithmetic.prepare(*w, amax) for w, amax in pairs]
            ExpertsInterface.register("sampler", self._forward)
        self.model.set_experts_implementation("sampler" if self.experts else BF16)
        for number, module in enumerate(experts_modules(self.model)):
            module.number = number
        self.reload(trained)

    def set_batch_invariant(self, value: bool) -> None:
        """Let a token's bits depend on its row alone, or not."""
        if self._arithmetic is not None:
            self._arithmetic = replace(self._arithmetic, batch_invariant=value)

    @property
    def _quantized(self) -> Arithmetic:
        """The arithmetic of NVFP4 experts, which a sampler in bf16 has not."""
        assert self._arithmetic is not None, "the experts are in bf16"
        return self._arithmetic

    def _forward(self, module: Any, x: torch.Tensor, ids: Any, weights: Any) -> torch.Tensor:
        y = self.layers()[module.number](x, ids, weights)
        self.recorder.add(module.number, x, ids, weights, y)
        return y

    def layers(self) -> list[Layer]:
        """The experts of each layer, as a function."""

        def layer(experts: Any) -> Layer:
            return lambda x, ids, weights: self._quantized.run(x, experts, ids, weights)

        return [layer(experts) for experts in self.experts]

    def reload(self, trained: Any) -> None:
        """Take the trainer's weights, the experts by `load_`."""
        self.model.load_state_dict(trained.state_dict())
        if self.experts:
            loaded = zip(self.experts, weights_of(trained), self._amax, strict=True)
            for experts, w, amax in loaded:
                experts.load_(*w, **self._quantized.options(amax))

    @torch.no_grad()
    def write(
        self, prompts: torch.Tensor, length: int, seed: int, batch: int | None = None
    ) -> Written:
        """Sample texts of `length` tokens behind prompts [N, P], `batch` at a time."""
        torch.manual_seed(seed)
        return joined([self._write(p, length) for p in prompts.split(batch or len(prompts))])

    def _write(self, prompts: torch.Tensor, length: int) -> Written:
        chosen: list[list[torch.Tensor]] = [[] for _ in routers(self.model)]
        handles = [
            router.register_forward_hook(
                lambda m, a, out, kept=kept: kept.append(out[2].unflatten(0, (len(prompts), -1)))
            )
            for router, kept in zip(routers(self.model), chosen, strict=True)
        ]
        try:
            made = self.model.generate(
                prompts.to(self.model.device),
                attention_mask=torch.ones_like(prompts, device=self.model.device),
                max_new_tokens=length,
                do_sample=True,
                top_k=0,
                eos_token_id=None,
                return_dict_in_generate=True,
                output_logits=True,
            )
        finally:
            for handle in handles:
                handle.remove()
        told = torch.stack(made.logits, 1).double().log_softmax(-1).float()
        ids = torch.stack([torch.cat(kept, 1) for kept in chosen], 2)
        return Written(made.sequences, prompts.shape[1], told, ids)


@torch.no_grad()
def calibrated(model: Any, read: Callable[[], Any]) -> Amax:
    """Return the largest magnitudes that the experts in bf16 meet while `read` runs the model."""
    found: Amax = []
    handles = []
    for number, module in enumerate(experts_modules(model)):
        found.append((0.0, 0.0))

        def hook(module: Any, args: Any, number: int = number) -> None:
            x, ids, _ = args
            inner = 0.0
            for e in range(module.gate_up_proj.shape[0]):
                rows = x[(ids == e).any(1)]
                gate, up = (rows @ module.gate_up_proj[e].T).chunk(2, -1)
                if len(rows):
                    inner = max(inner, (module.act_fn(gate) * up).abs().max().item())
            old = found[number]
            found[number] = max(old[0], x.abs().max().item()), max(old[1], inner)

        handles.append(module.register_forward_pre_hook(hook))
    try:
        read()
    finally:
        for handle in handles:
            handle.remove()
    return found
