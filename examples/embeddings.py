"""Measures the error of NVFP4 in the sentence embeddings of a real model: `make embeddings`.

The feed-forward layers of all-MiniLM-L6-v2 become mixtures of experts that take every token, and are
run with several kinds of NVFP4. The error of a sentence is 1 - cosine to its embedding by the bf16
model. Writes the tables of `docs/embeddings.md` and the plot
`docs/embeddings.svg`.
"""

# SPDX-License-Identifier: Apache-2.0
import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
sys.path[:0] = [str(ROOT)]

from embeddings_page import BASELINE, SPLIT, Results, between_marks, tables  # noqa: E402
from minilm import LAYERS, Dense, MiniLM, packaged  # noqa: E402
from sentences import origin, sentences  # noqa: E402
from strips import strips  # noqa: E402

from nvfp4_moe import (  # noqa: E402
    ActivationType,
    Experts,
    NVFP44Over6Config,
    Recipe,
    fused_moe,
    prepare_experts,
)

EXPERTS = 6  # of 256 rows each: without a gate, an intermediate size is a multiple of 128
UNCALIBRATED = 6.0 * 448  # the maximum at which an encode scale is 1


@dataclass(frozen=True)
class Method:
    """A way to prepare and call the experts."""

    calibrated: str | None = None  # on which sentences; None: no static scales
    factor: float = 1.0  # on the calibrated maxima
    prepare: Mapping[str, Any] = field(default_factory=dict)
    call: Mapping[str, Any] = field(default_factory=dict)


METHODS = {
    "NVFP4 weights, bf16 activations": Method(call={"activation": "bf16"}),
    "static scales of one (never calibrated)": Method("nothing", call={"activation": "static"}),
    "static scales, maxima 4 times too small": Method(
        "others", 0.25, call={"activation": "static"}
    ),
    "static scales, other sentences": Method("others", call={"activation": "static"}),
    "static scales, these sentences": Method("these", call={"activation": "static"}),
    "per-token scales": Method(),
    "per-token, 4over6": Method(call={"nvfp4_4over6": NVFP44Over6Config()}),
    "per-token, 4over6, weights too": Method(
        prepare={"recipe": Recipe("exact", NVFP44Over6Config())},
        call={"nvfp4_4over6": NVFP44Over6Config()},
    ),
}


def split(dense: Dense, experts: int) -> dict[str, torch.Tensor]:
    """A feed-forward layer as experts, whose sum is the layer: arguments of `prepare_experts`.

    Each expert has its share of the intermediate's rows; the second bias is the first expert's.
    """
    w2_bias = dense.b2.new_zeros(experts, dense.b2.shape[0])
    w2_bias[0] = dense.b2
    return {
        "w13": dense.w1.unflatten(0, (experts, -1)),
        "w2": dense.w2.unflatten(1, (experts, -1)).transpose(0, 1).contiguous(),
        "w13_bias": dense.b1.unflatten(0, (experts, -1)),
        "w2_bias": w2_bias,
    }


def nvfp4_layer(experts: Experts, call: Mapping[str, Any]) -> Callable[..., torch.Tensor]:
    """[T, H] bf16 to the same: every token takes every expert, with weight 1."""

    def layer(x: torch.Tensor) -> torch.Tensor:
        ids = torch.arange(experts.num_local, device=x.device, dtype=torch.int32)
        ids = ids.repeat(x.shape[0], 1)
        return fused_moe(x, experts, (ids, torch.ones_like(ids, dtype=torch.bfloat16)), **call)

    return layer


def unquantized_layer(parts: dict[str, torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return these experts in bf16: the layer rounds each expert's result and their sum to bf16."""
    tensors = zip(*(parts[name] for name in ("w13", "w13_bias", "w2", "w2_bias")), strict=True)
    experts = [Dense(*each) for each in tensors]
    return lambda x: torch.stack([expert(x).float() for expert in experts]).sum(0).to(x.dtype)


@dataclass
class Ranges:
    """The row maxima of the feed-forward's input and of its intermediate, for each layer, in bf16."""

    inputs: list[torch.Tensor] = field(default_factory=list)
    row_maxima: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    @classmethod
    def of(cls, model: MiniLM, sentences: Sequence[Sequence[int]]) -> "Ranges":
        found = cls()

        def feed_forward(layer: int, x: torch.Tensor) -> torch.Tensor:
            dense = model.dense(layer)
            maxima = (x.abs().amax(1).float(), dense.intermediate(x).abs().amax(1).float())
            found.inputs.append(x)
            found.row_maxima.append(maxima)
            return dense(x)

        model.embed(sentences, feed_forward)
        return found

    def amax(self, layer: int) -> dict[str, float]:
        names = ("input_amax", "intermediate_amax")
        maxima = self.row_maxima[layer]
        return {name: m.max().item() for name, m in zip(names, maxima, strict=True)}


def layers_of(
    label: str, model: MiniLM, ranges: Mapping[str, Ranges]
) -> list[Callable[..., torch.Tensor]]:
    """The feed-forward layers of a method."""
    if label == SPLIT:
        return [unquantized_layer(split(model.dense(i), EXPERTS)) for i in range(LAYERS)]
    layers, method = [], METHODS[label]
    for layer in range(LAYERS):
        amax: dict[str, float] = {}
        if method.calibrated == "nothing":
            amax = dict.fromkeys(("input_amax", "intermediate_amax"), UNCALIBRATED)
        elif method.calibrated:
            found = ranges[method.calibrated].amax(layer)
            amax = {name: value * method.factor for name, value in found.items()}
        experts = prepare_experts(
            **split(model.dense(layer), EXPERTS),
            activation=ActivationType.Gelu,
            **amax,
            **method.prepare,
        )
        layers.append(nvfp4_layer(experts, method.call))
    return layers


def errors(given: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """1 - cosine of unit vectors, without the cancellation: half the squared distance."""
    return (given - wanted).square().sum(1) / 2


def neighbours(embeddings: torch.Tensor) -> torch.Tensor:
    """[N]: which other sentence is nearest."""
    return (embeddings @ embeddings.T).fill_diagonal_(-1).argmax(1)


def measure(folder: Path, device: str, texts: tuple[Sequence[str], Sequence[str]]) -> Results:
    these, others = (token_ids(folder, some) for some in texts)
    exact = MiniLM.load(folder, torch.float32, device).embed(these)
    model = MiniLM.load(folder, torch.bfloat16, device)
    wanted = model.embed(these)
    ranges = {"these": Ranges.of(model, these), "others": Ranges.of(model, others)}
    results = Results()
    for inputs, intermediates in ranges["these"].row_maxima:
        results.spread.append((spread(inputs), spread(intermediates)))
    results.to_fp32[BASELINE] = errors(wanted, exact)

    def run(label: str) -> None:
        layers = layers_of(label, model, ranges)
        found = model.embed(these, lambda layer, x: layers[layer](x))
        results.to_bf16[label] = errors(found, wanted)
        results.to_fp32[label] = errors(found, exact)
        same = neighbours(found) == neighbours(wanted)
        results.same_nearest[label] = same.double().mean().item()
        results.by_layer[label] = [
            relative_error(layers[i](some), model.dense(i)(some))
            for i, some in enumerate(x[::8].contiguous() for x in ranges["these"].inputs)
        ]
        print(f"{label}: median error {results.to_bf16[label].median():.2e}", flush=True)

    # PyTorch spends much of a small operation on waking its threads; one each, and two methods at once.
    torch.set_num_threads(1)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, (SPLIT, *METHODS)))
    return results


def spread(row_maxima: torch.Tensor) -> float:
    return (row_maxima.max() / row_maxima.min()).item()


def relative_error(given: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((given.double() - wanted).norm() / wanted.double().norm()).item()


def token_ids(folder: Path, texts: Sequence[str]) -> list[list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    return [encoded.ids for encoded in tokenizer.encode_batch(list(texts))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", type=Path, help="folder of the checkpoint; default: the package's"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    texts = sentences()
    results = measure(options.model or packaged(), options.device, texts)
    page = DOCS / "embeddings.md"
    content = f"{origin(texts)}, {options.device}.\n\n{tables(results, (SPLIT, *METHODS))}"
    page.write_text(between_marks(page.read_text("utf-8"), content), "utf-8")
    title = "Error of sentence embeddings by kind of NVFP4"
    plot = strips(
        title,
        "1 - cosine to the bf16 model, of each sentence",
        {label: results.to_bf16[label].tolist() for label in METHODS},
    )
    (DOCS / "embeddings.svg").write_text(plot + "\n", "utf-8")


if __name__ == "__main__":
    main()
