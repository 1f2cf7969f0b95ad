"""GGUF files made by hand, and a small model of llama.cpp among them."""

# SPDX-License-Identifier: Apache-2.0
import struct
from pathlib import Path

import torch

F32, F16, Q4_1, Q8_0 = 0, 1, 3, 8
LAYERS, HEADS, KEYS, SIZE, INNER, VOCABULARY = 2, 4, 2, 8, 64, 11
HIDDEN = HEADS * SIZE
EPSILON, THETA = 1e-5, 1000.0


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def value(given) -> bytes:
    """The type and the bytes of a value of the metadata."""
    match given:
        case bool():
            return struct.pack("<I?", 7, given)
        case int():
            return struct.pack("<II", 4, given)
        case float():
            return struct.pack("<If", 6, given)
        case str():
            return struct.pack("<I", 8) + string(given)
        case list():
            each = [value(item) for item in given]
            return (
                struct.pack("<I", 9)
                + each[0][:4]
                + struct.pack("<Q", len(each))
                + b"".join(item[4:] for item in each)
            )
    raise TypeError(given)


def written(path: Path, metadata: dict, tensors: dict[str, tuple[list[int], int, bytes]]) -> Path:
    """Write a GGUF file; a tensor is its shape, its type and its bytes."""
    alignment = metadata.get("general.alignment", 32)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(string(key) + value(item) for key, item in metadata.items())
    data = b""
    for name, (shape, number, raw) in tensors.items():
        head += string(name) + struct.pack("<I", len(shape))
        head += b"".join(struct.pack("<Q", size) for size in reversed(shape))
        head += struct.pack("<IQ", number, len(data))
        data += raw + bytes(-len(raw) % alignment)
    path.write_bytes(head + bytes(-len(head) % alignment) + data)
    return path


def halves(*numbers: float) -> bytes:
    return struct.pack(f"<{len(numbers)}e", *numbers)


def tiny_file(path: Path) -> Path:
    """Write a Llama model of random fp32 weights, under llama.cpp's names and in its order."""
    g = torch.Generator().manual_seed(2)
    shapes = {"token_embd": [VOCABULARY, HIDDEN], "output_norm": [HIDDEN]}
    for i in range(LAYERS):
        parts = {
            "attn_norm": [HIDDEN], "ffn_norm": [HIDDEN],
            "attn_q": [HIDDEN, HIDDEN], "attn_output": [HIDDEN, HIDDEN],
            "attn_k": [KEYS * SIZE, HIDDEN], "attn_v": [KEYS * SIZE, HIDDEN],
            "ffn_gate": [INNER, HIDDEN], "ffn_up": [INNER, HIDDEN], "ffn_down": [HIDDEN, INNER],
        }  # fmt: skip
        shapes |= {f"blk.{i}.{part}": shape for part, shape in parts.items()}
    tensors = {}
    for name, shape in shapes.items():
        drawn = torch.randn(shape, generator=g).flatten().tolist()
        tensors[f"{name}.weight"] = (shape, F32, struct.pack(f"<{len(drawn)}f", *drawn))
    metadata = {
        "llama.vocab_size": VOCABULARY, "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": INNER, "llama.block_count": LAYERS,
        "llama.attention.head_count": HEADS, "llama.attention.head_count_kv": KEYS,
        "llama.attention.layer_norm_rms_epsilon": EPSILON, "llama.rope.freq_base": THETA,
        "llama.context_length": 64,
    }  # fmt: skip
    return written(path, metadata, tensors)
