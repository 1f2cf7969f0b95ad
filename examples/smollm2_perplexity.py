"""Measures the perplexity of a real language model with NVFP4 experts: `make smollm2`.

The feed-forward layers of SmolLM2-135M-Instruct become mixtures of experts that take every token, and
are run with several kinds of NVFP4 on the text of Python's documentation. Writes the tables of
`docs/perplexity.md` and the plot `docs/perplexity.svg`.
"""

# SPDX-License-Identifier: Apache-2.0
import argparse
import hashlib
import platform
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pydoc_data.topics import topics
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
sys.path[:0] = [str(ROOT)]

import smollm2  # noqa: E402
from feed_forward import (  # noqa: E402
    Layer,
    Ranges,
    errors_by_layer,
    relative_error,
    unquantized_layer,
)
from methods import METHODS, nvfp4_layer  # noqa: E402
from pages import between_marks  # noqa: E402
from perplexity_page import BASELINE, EXACT, MARKS, SPLIT, Results, lines, plot, tables  # noqa: E402
from smollm2 import Dense, SmolLM2  # noqa: E402

from nvfp4_moe import ActivationType  # noqa: E402

if TYPE_CHECKING:
    from tokenizers import Tokenizer

EXPERTS = 6  # of 256 columns each
TEXTS, TOKENS = 12, 256
LABELS = (
    SPLIT,
    "NVFP4 weights, bf16 activations",
    "static scales, other texts",
    "per-token scales",
    "per-token, 4over6",
    "per-token, 4over6, weights too",
)
"""The methods of the page; `docs/embeddings.md` also has static scales that are wrong."""


def texts(tokenizer: "Tokenizer") -> tuple[torch.Tensor, torch.Tensor]:
    """(evaluated, calibrated on): the beginnings of topics of Python's documentation, token ids.

    Each is [TEXTS, TOKENS]. Every second topic is for calibration, the longest ones of each half.
    """
    names = sorted(topics)
    halves = []
    for half in (names[::2], names[1::2]):
        longest = sorted(half, key=lambda name: -len(topics[name]))[:TEXTS]
        ids = [tokenizer.encode(topics[name]).ids[:TOKENS] for name in longest]
        halves.append(torch.tensor(ids, dtype=torch.int64, device="cpu"))
    return halves[0], halves[1]


def split(dense: Dense, experts: int) -> dict[str, torch.Tensor]:
    """Divide a feed-forward layer into experts, whose sum is the layer: arguments of `prepare_experts`.

    Each expert has its share of the intermediate's columns: rows of up and gate, columns of down.
    """
    up, gate = (w.unflatten(0, (experts, -1)) for w in (dense.up, dense.gate))
    down = dense.down.unflatten(1, (experts, -1)).transpose(0, 1)
    return {"w13": torch.cat((up, gate), 1), "w2": down.contiguous()}


def experts_of(parts: Mapping[str, torch.Tensor]) -> list[Dense]:
    """Return each expert of a split layer as a layer of its own."""
    halves = (w13.chunk(2) for w13 in parts["w13"])
    return [Dense(gate, up, w2) for (up, gate), w2 in zip(halves, parts["w2"], strict=True)]


def layers_of(
    label: str, model: SmolLM2, ranges: Mapping[str, Ranges], experts: int
) -> list[Layer]:
    """Make the feed-forward layers of a method."""
    parts = [split(model.dense(i), experts) for i in range(model.config.num_hidden_layers)]
    if label == SPLIT:
        return [unquantized_layer(experts_of(each)) for each in parts]
    return [
        nvfp4_layer(METHODS[label], each, ActivationType.Swiglu, i, ranges)
        for i, each in enumerate(parts)
    ]


def ranges_of(model: SmolLM2, ids: torch.Tensor) -> Ranges:
    """Run the model on the texts, and keep its layers' inputs and row maxima."""
    return Ranges.of(model.dense, lambda layers: model.hidden(ids, layers))


def log_probabilities(model: SmolLM2, hidden: torch.Tensor) -> Iterator[torch.Tensor]:
    """Compute [T - 1, V] fp32 of each text's hidden states [T, H]: what its next tokens could be."""
    return (model.logits(text[:-1]).log_softmax(-1) for text in hidden)


def judge(
    label: str,
    results: Results,
    ids: torch.Tensor,
    found: Iterable[torch.Tensor],
    wanted: Iterable[torch.Tensor],
) -> None:
    """Put a method's log-probabilities into the results, beside the bf16 model's, `wanted`."""
    losses, divergences, same = [], [], []
    for text, q, p in zip(ids, found, wanted, strict=True):
        losses.append(F.nll_loss(q, text[1:], reduction="none").double())
        divergences.append(F.kl_div(q, p, reduction="none", log_target=True).sum(-1).double())
        same.append((p.argmax(-1) == q.argmax(-1)).double())
    results.losses[label] = torch.stack(losses)
    results.divergences[label] = torch.stack(divergences)
    results.same_token[label] = torch.stack(same).mean().item()


def change_by_the_cut(model: SmolLM2, ids: torch.Tensor, experts: int) -> tuple[float, float]:
    """Compare the fp32 model with itself cut into experts: (relative change of a layer, of a logit).

    The first is the largest over the layers, the second the largest change over the largest logit.
    """
    cut = [unquantized_layer(experts_of(split(model.dense(i), experts)))
           for i in range(model.config.num_hidden_layers)]  # fmt: skip
    changes = []

    def feed_forward(layer: int, x: torch.Tensor) -> torch.Tensor:
        changes.append(relative_error(cut[layer](x), model.dense(layer)(x)))
        return cut[layer](x)

    wanted = model.logits(model.hidden(ids))
    off = model.logits(model.hidden(ids, feed_forward)) - wanted
    return max(changes), (off.abs().max() / wanted.abs().max()).item()


def outliers(dense: Dense, x: torch.Tensor) -> tuple[float, float]:
    """Return a row's maximum over its root mean square, the median: of input and intermediate."""
    rows = (t.float() for t in (x, dense.intermediate(x)))
    first, second = ((t.abs().amax(1) / t.square().mean(1).sqrt()).median().item() for t in rows)
    return first, second


@torch.inference_mode()
def measure(
    exact: SmolLM2,
    model: SmolLM2,
    ids: tuple[torch.Tensor, torch.Tensor],
    labels: Sequence[str],
    experts: int,
) -> Results:
    """Measure the methods of these labels.

    Args:
        exact: the model in fp32; `model` is the one in bf16.
        ids: evaluated and calibrated on, [N, T] each.
        experts: into how many a layer is cut.
    """
    these, others = ids
    ranges = {"these": ranges_of(model, these), "others": ranges_of(model, others)}
    count = model.config.num_hidden_layers
    results = Results(
        spread=[ranges["these"].spread(i) for i in range(count)],
        outliers=[outliers(model.dense(i), ranges["these"].inputs[i]) for i in range(count)],
        cut=change_by_the_cut(exact, these[:1], experts),
    )
    wanted = list(log_probabilities(exact, model.hidden(these)))
    judge(BASELINE, results, these, wanted, wanted)
    judge(EXACT, results, these, log_probabilities(exact, exact.hidden(these)), wanted)

    @torch.inference_mode()
    def run(label: str) -> None:
        started = time.monotonic()
        layers = layers_of(label, model, ranges, experts)
        found = model.hidden(these, lambda layer, x: layers[layer](x))
        judge(label, results, these, log_probabilities(exact, found), wanted)
        results.by_layer[label] = errors_by_layer(layers, model.dense, ranges["these"].inputs)
        print(
            f"{label}: perplexity {results.losses[label].mean().exp():.3f}, "
            f"{time.monotonic() - started:.0f} s",
            flush=True,
        )

    # PyTorch spends much of a small operation on waking its threads; one each, and two methods at once.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, labels))
    torch.set_num_threads(threads)
    return results


def origin(ids: tuple[torch.Tensor, torch.Tensor], device: str) -> str:
    """Write a line that identifies the texts, which differ a little between versions of Python."""
    digest = hashlib.sha256(str(ids[0].tolist()).encode()).hexdigest()[:16]
    return (
        f"{ids[0].numel()} tokens in {len(ids[0])} texts, calibration on {ids[1].numel()} others, of "
        f"Python {platform.python_version()}'s documentation (SHA-256 of the ids {digest}...), "
        f"torch {torch.__version__}, {device}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    exact, tokenizer = smollm2.load(torch.float32, options.device)
    model = exact.to(torch.bfloat16)
    these, others = texts(tokenizer)
    ids = these.to(options.device), others.to(options.device)
    results = measure(exact, model, ids, LABELS, EXPERTS)
    page = DOCS / "perplexity.md"
    content = f"{origin(ids, options.device)}\n\n{tables(results, LABELS)}"
    page.write_text(between_marks(page.read_text("utf-8"), content, MARKS), "utf-8")
    plot(lines(results, LABELS[1:]), DOCS / "perplexity.svg")


if __name__ == "__main__":
    main()
