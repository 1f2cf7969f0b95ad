"""Train, reload, write, compare: `python examples/rl_loop.py [--device cuda]`; see `docs/rl_loop.md`.

A model of the next byte, one layer of it a mixture of experts, learns the text of Python's own help
topics; then REINFORCE also raises the share of vowels in what it writes. A server, whose experts are
NVFP4, reloads and writes. The trainer computes the probabilities of what was written once more, as
every importance ratio needs them: with `fake_quantized_moe`, then with a bf16 layer of the same weights.

What is not the mixture is computed in fp64 and rounded, so that a batch does not show in its bits.
"""

# SPDX-License-Identifier: Apache-2.0
import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nvfp4_moe import Routing, RoutingMethodType, fake_quantized_moe, fused_moe, prepare_experts
from nvfp4_moe.reference.moe.routing import route

CONTEXT, WIDTH, HIDDEN, INNER, EXPERTS = 8, 32, 256, 128, 8
ROUTING = Routing(RoutingMethodType.Renormalize, 2)
Pair = tuple[torch.Tensor, torch.Tensor]
Layer = Callable[[torch.Tensor, Pair], torch.Tensor]  # of x and (ids, weights)


class Policy(torch.nn.Module):
    """[B, CONTEXT] bytes to [B, 256] fp32 log-probabilities of the next one."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)

        def weight(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.randn(shape, generator=g) / shape[-1] ** 0.5)

        self.bytes = weight(256, WIDTH)
        self.mix = weight(HIDDEN, CONTEXT * WIDTH)
        self.router = weight(EXPERTS, HIDDEN)
        self.head = weight(256, HIDDEN)
        self.w13 = weight(
            EXPERTS, 2 * INNER, HIDDEN
        )  # master weights, fp32; bf16 is what is shipped
        self.w2 = weight(EXPERTS, HIDDEN, INNER)

    def forward(self, context: torch.Tensor, layer: Layer) -> torch.Tensor:
        embedded = _normalized(self.bytes.double()[context].flatten(1))
        x = _normalized(functional.silu(embedded @ self.mix.double().T)).bfloat16()
        chosen = route((x.double() @ self.router.double().T).float(), ROUTING)
        y = layer(x, (chosen.ids, chosen.weights_bf16))
        logits = (_normalized(x.double() + y.double()) @ self.head.double().T).bfloat16()
        return logits.double().log_softmax(-1).float()

    def shipped(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.w13.detach().bfloat16(), self.w2.detach().bfloat16()


def _normalized(x: torch.Tensor) -> torch.Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def bf16_layer(policy: Policy) -> Layer:
    """The layer of a trainer without NVFP4."""

    def layer(x: torch.Tensor, routing: Pair) -> torch.Tensor:
        ids, weights = routing
        w13, w2 = policy.w13.bfloat16(), policy.w2.bfloat16()
        output = torch.zeros_like(x, dtype=torch.float32)
        for e in range(EXPERTS):
            token, slot = (ids == e).nonzero(as_tuple=True)
            up, gate = (x[token] @ w13[e].T).chunk(2, -1)
            row = (functional.silu(gate) * up) @ w2[e].T
            output = output.index_add(0, token, weights[token, slot, None].float() * row.float())
        return output.bfloat16()

    return layer


def fake_quantized_layer(policy: Policy) -> Layer:
    """The layer that the server computes."""
    return lambda x, routing: fake_quantized_moe(x, policy.w13, policy.w2, routing)


class Server:
    """Its own copy of the dense weights, and NVFP4 experts that stay where they are in memory."""

    def __init__(self, trainer: Policy) -> None:
        device = trainer.w13.device
        self.policy = Policy().to(device).requires_grad_(False)
        self.experts = prepare_experts(*self.policy.shipped())
        self.reload(trainer)

    def reload(self, trainer: Policy) -> None:
        self.policy.load_state_dict(trainer.state_dict())
        self.experts.load_(*trainer.shipped())

    @torch.no_grad()
    def write(self, prompts: torch.Tensor, length: int) -> "Written":
        """A byte of every text at a time, sampled."""
        text, told = prompts, []
        for _ in range(length):
            told.append(self.policy(text[:, -CONTEXT:], self.layer))
            text = torch.cat([text, told[-1].exp().multinomial(1)], 1)
        contexts = text.unfold(1, CONTEXT, 1)[:, :length]
        return Written(
            contexts.flatten(0, 1), text[:, CONTEXT:], torch.stack(told, 1).flatten(0, 1)
        )

    def layer(self, x: torch.Tensor, routing: Pair) -> torch.Tensor:
        return fused_moe(x, self.experts, routing, batch_invariant=True)


@dataclass(frozen=True)
class Written:
    contexts: torch.Tensor  # [texts * length, CONTEXT]
    sampled: torch.Tensor  # [texts, length] bytes
    told: torch.Tensor  # [texts * length, 256]: log-probabilities, as the server sampled by them

    def vowels(self) -> torch.Tensor:
        """[texts]: the reward, a share of the bytes."""
        return (
            torch.isin(self.sampled, torch.tensor(list(b"aeiou")).to(self.sampled)).float().mean(1)
        )


@dataclass(frozen=True)
class Row:
    step: int
    loss: float  # of the server's policy on the text, in nats a byte
    reward: float
    same_experts: bool  # the checksum of the server's is that of the trainer's
    differ: int  # log-probabilities that are not the same bits, of all
    largest_ratio: float  # |log of trainer's over server's probability| of a byte that was written
    kl: float  # server from trainer, mean, in nats a byte

    def __str__(self) -> str:
        experts = "same bits" if self.same_experts else "DIFFERENT"
        return (
            f"| {self.step} | {self.loss:.3f} | {self.reward:.3f} | {experts} | {self.differ} | "
            f"{self.largest_ratio:.3g} | {self.kl:.2g} |"
        )


HEAD = (
    "| step | server's loss | vowels | experts | log-probs that differ, of 131072 | largest "
    "\\|log ratio\\| | KL |\n" + "| ---: " * 7 + "|"
)


@torch.no_grad()
def compare(
    step: int, trainer: Policy, layer: Layer, server: Server, written: Written, test: Pair
) -> Row:
    """The trainer's view, in one batch, of what the server wrote byte by byte."""
    mine, told = trainer(written.contexts, layer), written.told
    ratio = (mine - told).gather(1, written.sampled.reshape(-1, 1))
    return Row(
        step,
        functional.nll_loss(server.policy(test[0], server.layer), test[1]).item(),
        written.vowels().mean().item(),
        prepare_experts(*trainer.shipped()).checksum() == server.experts.checksum(),
        int((mine.view(torch.int32) != told.view(torch.int32)).sum()),
        ratio.abs().max().item(),
        (told.double().exp() * (told.double() - mine.double())).sum(1).mean().item(),
    )


def loop(
    make_layer: Callable[[Policy], Layer],
    device: str = "cpu",
    *,
    steps: int = 240,
    rl_steps: int = 60,
    every: int = 60,
    report: Callable[[object], None] = print,
) -> list[Row]:
    """Train on the text for `steps`, then on the reward too; compare after every `every`."""
    torch.manual_seed(0)
    text = "".join(topics[name] for name in sorted(topics)).encode()
    data = torch.tensor(list(text), device=device).unfold(0, CONTEXT + 1, 1)
    draw = torch.Generator().manual_seed(1)

    def some(n: int) -> Pair:
        rows = data[torch.randint(len(data), (n,), generator=draw).to(device)]
        return rows[:, :-1], rows[:, -1]

    trainer = Policy().to(device)
    layer, server, test = make_layer(trainer), Server(trainer), some(1024)
    optimizer = torch.optim.Adam(trainer.parameters(), lr=3e-3)
    found: list[Row] = []
    for step in range(steps + rl_steps + 1):
        if step >= steps or step % every == 0:
            server.reload(trainer)
            written = server.write(some(32)[0], 16)
        if step % every == 0:
            found.append(compare(step, trainer, layer, server, written, test))
            report(found[-1])
        contexts, target = some(512)
        loss = functional.nll_loss(trainer(contexts, layer), target)
        if step >= steps:
            mine = trainer(written.contexts, layer).gather(1, written.sampled.reshape(-1, 1))
            advantage = written.vowels() - written.vowels().mean()
            loss = loss - 10 * (advantage[:, None] * mine.view_as(written.sampled)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Trainer and server, to the bit.")
    parser.add_argument("--device", default="cpu")
    device = parser.parse_args().device
    torch.set_num_threads(1)  # threads share a tensor in pieces that depend on its size
    for name, layer in (("fake_quantized_moe", fake_quantized_layer), ("bf16", bf16_layer)):
        print(f"\ntrainer's layer: {name}\n\n{HEAD}")
        start = time.perf_counter()
        loop(layer, device)
        print(f"\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
