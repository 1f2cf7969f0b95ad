"""A small Qwen3-MoE of transformers that writes bytes, and its trainer."""

# SPDX-License-Identifier: Apache-2.0
import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pydoc_data.topics import topics
from typing import Any

import torch
import transformers
from torch.nn import functional

from nvfp4_moe import Routing, RoutingMethodType
from nvfp4_moe.reference.moe.routing import route

HIDDEN, INNER, LAYERS, EXPERTS, TOP_K, VOCABULARY = 512, 64, 2, 16, 8, 256
BF16 = "grouped_mm"
"""transformers' own experts in bf16."""


def new_model() -> Any:
    """A model in fp32 with random weights, on the CPU."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        moe_intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        max_position_embeddings=128,
        initializer_range=0.05,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


class Text:
    """The bytes of Python's own help topics, in windows."""

    def __init__(self, length: int) -> None:
        text = "".join(topics[name] for name in sorted(topics)).encode()
        self._windows = torch.tensor(list(text), dtype=torch.int64, device="cpu").unfold(
            0, length, 1
        )
        self._draw = torch.Generator().manual_seed(1)

    def some(self, n: int) -> torch.Tensor:
        """Return [n, length] int64, drawn at random."""
        return self._windows[torch.randint(len(self._windows), (n,), generator=self._draw)]


def learn(model: Any, steps: int, device: str) -> float:
    """Train a model in fp32 on the text, and return the mean loss of the last 20 steps, in nats."""
    text, losses = Text(65), []
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, 2 * (1 - step / steps))
        bytes_ = text.some(8).to(device)
        logits = model(input_ids=bytes_[:, :-1]).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), bytes_[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-20:]) / len(losses[-20:])


def vowels(texts: torch.Tensor) -> torch.Tensor:
    """Return the reward [N] of texts [N, L]: the share of their bytes that are vowels."""
    vowels = torch.tensor(list(b"aeiou"), dtype=texts.dtype, device=texts.device)
    return torch.isin(texts, vowels).float().mean(1)


class Trainer:
    """A model in bf16 with master weights in fp32.

    Args:
        start: a model in fp32, which stays as it is.
        experts: the implementation of the experts, one of transformers' names or of ours.
    """

    def __init__(self, start: Any, experts: str, device: str) -> None:
        self.masters = [p.detach().clone().requires_grad_() for p in start.parameters()]
        self.model = copy.deepcopy(start).to(device, torch.bfloat16)
        self.use(experts)
        self.optimizer = torch.optim.Adam(self.masters, lr=1e-3)
        self._ship()

    @torch.no_grad()
    def _ship(self) -> None:
        for p, master in zip(self.model.parameters(), self.masters, strict=True):
            p.copy_(master)

    def use(self, experts: str) -> None:
        self.model.set_experts_implementation(experts)

    def log_probabilities(self, texts: torch.Tensor, first: int) -> torch.Tensor:
        """Return [N, S - first, V] fp32: those of every byte from `first` on, in one batch."""
        logits = self.model(input_ids=texts[:, :-1]).logits[:, first - 1 :]
        return logits.double().log_softmax(-1).float()

    def reinforce(self, texts: torch.Tensor, first: int) -> None:
        """One step of REINFORCE on texts [N, S] that a sampler wrote from byte `first` on."""
        written = texts[:, first:]
        chosen = self.log_probabilities(texts, first).gather(2, written[..., None])[..., 0]
        reward = vowels(written)
        loss = -((reward - reward.mean())[:, None] * chosen).mean()
        self.model.zero_grad()
        loss.backward()
        for master, p in zip(self.masters, self.model.parameters(), strict=True):
            master.grad = None if p.grad is None else p.grad.float()
        self.optimizer.step()
        self._ship()


def routers(model: Any) -> list[Any]:
    """The modules that choose experts, by layer."""
    return [layer.mlp.gate for layer in model.model.layers]


def experts_modules(model: Any) -> list[Any]:
    return [layer.mlp.experts for layer in model.model.layers]


@contextmanager
def replayed(model: Any, ids: torch.Tensor) -> Iterator[None]:
    """Let the routers choose what a sampler chose; `route` weighs it by their own logits.

    Args:
        ids: [N, S, layers, K], the experts of every byte that the model reads.
    """

    def hook(layer: int, module: Any, _: Any, output: Any) -> Any:
        logits = output[0]
        given = ids[:, :, layer].flatten(0, 1).contiguous()
        chosen = route(logits, Routing(RoutingMethodType.Renormalize, module.top_k), ids=given)
        return logits, chosen.weights_bf16, chosen.ids.long()

    handles = [
        router.register_forward_hook(lambda *a, layer=i: hook(layer, *a))
        for i, router in enumerate(routers(model))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
