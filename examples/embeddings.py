"""Measures the error of NVFP4 in the sentence embeddings of a real model: `make embeddings`.

The feed-forward layers of all-MiniLM-L6-v2 become mixtures of experts that take every token, and are
run with several kinds of NVFP4. The error of a sentence is 1 - cosine to its embedding by the bf16
model. Writes the tables of `docs/embeddings.md` and the plot
`docs/embeddings.svg`.
"""

# SPDX-License-Identifier: Apache-2.0
import argparse
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
sys.path[:0] = [str(ROOT)]

from embeddings_page import BASELINE, MARKS, SPLIT, Results, tables  # noqa: E402
from feed_forward import Layer, Ranges, errors_by_layer, unquantized_layer  # noqa: E402
from methods import METHODS, nvfp4_layer  # noqa: E402
from minilm import LAYERS, Dense, MiniLM, packaged  # noqa: E402
from pages import between_marks  # noqa: E402
from sentences import origin, sentences  # noqa: E402
from strips import strips  # noqa: E402

from nvfp4_moe import ActivationType  # noqa: E402

EXPERTS = 6  # of 256 rows each: without a gate, an intermediate size is a multiple of 128


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


def experts_of(parts: dict[str, torch.Tensor]) -> list[Dense]:
    """Return each expert of a split layer as a layer of its own."""
    tensors = zip(*(parts[name] for name in ("w13", "w13_bias", "w2", "w2_bias")), strict=True)
    return [Dense(*each) for each in tensors]


def layers_of(label: str, model: MiniLM, ranges: Mapping[str, Ranges]) -> list[Layer]:
    """Make the feed-forward layers of a method."""
    parts = [split(model.dense(i), EXPERTS) for i in range(LAYERS)]
    if label == SPLIT:
        return [unquantized_layer(experts_of(each)) for each in parts]
    method = METHODS[label]
    return [
        nvfp4_layer(method, each, ActivationType.Gelu, i, ranges) for i, each in enumerate(parts)
    ]


def ranges_of(model: MiniLM, sentences: Sequence[Sequence[int]]) -> Ranges:
    """Run the model on the sentences, and keep its layers' inputs and row maxima."""
    return Ranges.of(model.dense, lambda layers: model.embed(sentences, layers))


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
    ranges = {"these": ranges_of(model, these), "others": ranges_of(model, others)}
    results = Results(spread=[ranges["these"].spread(i) for i in range(LAYERS)])
    results.to_fp32[BASELINE] = errors(wanted, exact)

    def run(label: str) -> None:
        layers = layers_of(label, model, ranges)
        found = model.embed(these, lambda layer, x: layers[layer](x))
        results.to_bf16[label] = errors(found, wanted)
        results.to_fp32[label] = errors(found, exact)
        same = neighbours(found) == neighbours(wanted)
        results.same_nearest[label] = same.double().mean().item()
        results.by_layer[label] = errors_by_layer(layers, model.dense, ranges["these"].inputs)
        print(f"{label}: median error {results.to_bf16[label].median():.2e}", flush=True)

    # PyTorch spends much of a small operation on waking its threads; one each, and two methods at once.
    torch.set_num_threads(1)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, (SPLIT, *METHODS)))
    return results


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
    page.write_text(between_marks(page.read_text("utf-8"), content, MARKS), "utf-8")
    title = "Error of sentence embeddings by kind of NVFP4"
    plot = strips(
        title,
        "1 - cosine to the bf16 model, of each sentence",
        {label: results.to_bf16[label].tolist() for label in METHODS},
    )
    (DOCS / "embeddings.svg").write_text(plot + "\n", "utf-8")


if __name__ == "__main__":
    main()
