"""A checkpoint's folder is not trusted: types, counts, links, kinds of files, names."""

# SPDX-License-Identifier: Apache-2.0
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_cases import (
    MODELOPT_KINDS,
    NAMINGS,
    assert_same_experts,
    bytes_of,
    compressed_config,
    modelopt_config,
    nvfp4,
    ordinary,
    quantized,
    weights,
    write,
)
from paths import ROOT
from safetensors.torch import load_file, save_file

from nvfp4_moe.checkpoints import CheckpointError, Folder, convert, find_layers, load_experts

QWEN = NAMINGS["qwen3-moe"]
BASE = QWEN.of(0)
CONFIG = dict(QWEN.config)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """An ordinary checkpoint and one in ModelOpt's format, without an index; not to be changed."""
    folder = tmp_path_factory.mktemp("sources")
    w = weights()
    tensors = nvfp4(QWEN, 0, quantized(w), MODELOPT_KINDS)
    write(folder / "bf16", [ordinary(QWEN, 0, w)], CONFIG, index=False)
    write(folder / "nvfp4", [tensors], CONFIG, index=False, hf_quant_config=modelopt_config())
    return folder


def copy(sources: Path, name: str, to: Path) -> Path:
    to.mkdir()
    for path in (sources / name).iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def refused(folder: Path, destination: Path | None = None) -> tuple[str, ...]:
    """The problems of loading, or of converting, which writes nothing."""
    with pytest.raises(CheckpointError) as e:
        load_experts(folder, 0) if destination is None else convert(folder, destination)
    assert destination is None or not destination.exists()
    return e.value.problems


def compressed(**more: object) -> dict:
    return {"config.json": CONFIG | {"quantization_config": compressed_config() | more}}


def modelopt(**more: object) -> dict:
    return {"hf_quant_config.json": modelopt_config(**more)}


def config(**more: object) -> dict:
    return {"config.json": CONFIG | more}


GROUP = compressed_config()["config_groups"]["group_0"]
WRONG = [
    (modelopt(exclude_modules=None), "quantization.exclude_modules is null; it must be an array"),
    (modelopt(exclude_modules="a"), 'quantization.exclude_modules is "a"; it must be an array'),
    (modelopt(exclude_modules=[None]), "exclude_modules[0] is null; it must be a string"),
    (modelopt(quantized_layers=[1]), "quantized_layers is an array of 1; it must be an object"),
    (modelopt(quantized_layers={"a": "NVFP4"}), 'quantized_layers.a is "NVFP4"; it must be an'),
    (modelopt(quantized_layers={"a": None}), "quantized_layers.a is null; it must be an object"),
    (modelopt(group_size=[16]), "group_size is an array of 1; it must be a whole number"),
    (modelopt(group_size=True), "group_size is true; it must be a whole number"),
    (modelopt(quant_algo={"a": 1}), "quant_algo is an object of 1; it must be a string"),
    ({"hf_quant_config.json": {"quantization": None}}, "quantization is null; it must be an obj"),
    ({"hf_quant_config.json": [1]}, "it is an array of 1; it must be an object"),
    (config(quantization_config="fp8"), 'quantization_config is "fp8"; it must be an object'),
    (config(quantization_config={"quantization": "x"}), 'config.quantization is "x"; it must be'),
    (compressed(config_groups=[1]), "config_groups is an array of 1; it must be an object"),
    (compressed(config_groups={"a": None}), "config_groups.a is null; it must be an object"),
    (compressed(config_groups={"a": GROUP | {"targets": "Linear"}}), 'a.targets is "Linear"'),
    (compressed(config_groups={"a b": GROUP | {"weights": 4}}), 'groups."a b".weights is 4'),
    (compressed(ignore=["re:("]), 'ignore[0] is "re:(", a pattern that is not served: it is no'),
    (compressed(ignore=["x*"] * 5001), "ignore has 5001 patterns with wildcards; at most 5000"),
    (
        modelopt(quantized_layers={f"a{i}*": {} for i in range(5001)}),
        "quantized_layers has 5001 patterns with wildcards; at most 5000",
    ),
    (config(num_experts=0), "num_experts is 0; it must be a whole number from 1"),
    (config(num_experts="4"), 'num_experts is "4"; it must be a whole number from 1'),
    (config(num_experts=float("nan")), "num_experts is NaN; it must be a whole number"),
    (config(text_config={"num_experts": 2**63}), f"text_config.num_experts is {2**63}; it must"),
    (config(hidden_act=["silu"]), "hidden_act is an array of 1; it must be a string"),
    ({"model.safetensors.index.json": {"weight_map": {}}}, "weight_map is {}; it must be an obj"),
    ({"model.safetensors.index.json": {"weight_map": {"a": 1}}}, "weight_map.a is 1; it must be"),
]


@pytest.mark.parametrize(("files", "wanted"), WRONG, ids=[wanted[:40] for _, wanted in WRONG])
def test_a_wrong_type_is_named(files, wanted, sources, tmp_path):
    folder = copy(sources, "nvfp4", tmp_path / "c")
    ((name, content),) = files.items()
    (folder / name).write_text(json.dumps(content))
    (problem,) = refused(folder)
    assert problem.startswith(f"{name}: ") and wanted in problem
    assert refused(folder, tmp_path / "o") == (problem,)


def test_one_error_lists_every_wrong_type_of_every_file(sources, tmp_path):
    folder = copy(sources, "nvfp4", tmp_path / "c")
    bad = modelopt(exclude_modules=[1, "a", 2], quant_algo=3) | config(num_experts=[], hidden_act=1)
    bad |= {
        "model.safetensors.index.json": {"metadata": [1], "weight_map": {"a": "/etc/x.safetensors"}}
    }
    for name, content in bad.items():
        (folder / name).write_text(json.dumps(content))
    found = [" ".join(p.split()[:2]) for p in refused(folder)]
    assert found == [
        "config.json: hidden_act",
        "config.json: num_experts",
        "hf_quant_config.json: quantization.quant_algo",
        "hf_quant_config.json: quantization.exclude_modules[0]",
        "hf_quant_config.json: quantization.exclude_modules[2]",
        "model.safetensors.index.json: weight_map.a",
        "model.safetensors.index.json: metadata",
    ]


@pytest.mark.parametrize(
    "content",
    [
        b'{"num_experts": 4, "hidden_act": "silu", "time_step_limit": [0.0, Infinity]}',
        b'\xef\xbb\xbf{"hidden_act": "silu", "num_experts": null, "x": "\xc3\xa9"}',
        b'{"hidden_act": "silu", "quantization_config": null, "text_config": null, "m": 1e30}',
    ],
)
def test_what_configurations_have_is_read(content, sources, tmp_path):
    folder = copy(sources, "nvfp4", tmp_path / "c")
    (folder / "config.json").write_bytes(content)
    assert_same_experts(load_experts(folder, 0), load_experts(sources / "nvfp4", 0))


@pytest.mark.parametrize(
    "value", [f"{name}.safetensors" for name in ("/etc/passwd", "../a", "a/b", "", "a\0", "\ud800")]
)
def test_an_index_names_files_of_its_folder_alone(value, sources, tmp_path):
    folder = copy(sources, "bf16", tmp_path / "c")
    index = {"weight_map": dict.fromkeys(load_file(folder / "model.safetensors"), value)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for problems in (refused(folder), refused(folder, tmp_path / "o")):
        assert all(p.startswith("model.safetensors.index.json: ") for p in problems)


@pytest.mark.parametrize("count", [5, 10**8, 2**31 - 1])
def test_a_count_is_bounded_by_what_the_files_hold(count, sources, tmp_path):
    for name in ("bf16", "nvfp4"):
        folder = copy(sources, name, tmp_path / name)
        (folder / "config.json").write_text(json.dumps(CONFIG | {"num_experts": count}))
        problems = refused(folder, tmp_path / "o") if name == "bf16" else refused(folder)
        if count == 5:
            assert problems == (f"{BASE}.4: missing",)
        else:
            assert f"{BASE}: by config.json or its names it has {count} experts" in problems[0]


@pytest.mark.parametrize("number", ["999999", "999999999", "9" * 400, "007", "\u0663"])
def test_a_number_in_a_name_is_bounded(number, sources, tmp_path):
    for name, kind in (("bf16", "gate_proj.weight"), ("nvfp4", "gate_proj.weight")):
        folder = copy(sources, name, tmp_path / name)
        shard = folder / "model.safetensors"
        tensors = load_file(shard)
        tensors[f"{BASE}.{number}.{kind}"] = torch.zeros(2, 2, dtype=torch.uint8)
        save_file(tensors, shard)
        (folder / "config.json").write_text('{"hidden_act": "silu"}')
        problems = refused(folder, tmp_path / "o") if name == "bf16" else refused(folder)
        assert number in problems[0] or str(int(number) + 1) in problems[0]


def test_a_folder_that_cannot_be_reached(tmp_path):
    with pytest.raises(CheckpointError, match="it cannot be opened: File name too long"):
        load_experts(tmp_path / ("x" * 5000), 0)


def test_a_name_that_is_too_long(sources, tmp_path):
    folder = copy(sources, "bf16", tmp_path / "c")
    shard = folder / "model.safetensors"
    save_file(load_file(shard) | {"a" * 501: torch.ones(1)}, shard)
    (problem,) = refused(folder, tmp_path / "o")
    assert problem.startswith("model.safetensors: the name ") and problem.endswith("500 characters")
    for name in ("x.9.", f"model.layers.{'9' * 400}.mlp.experts.0."):
        save_file(
            load_file(sources / "bf16" / shard.name) | {f"{name}up_proj.weight": torch.ones(2, 2)},
            shard,
        )
        found = {layer.index for layer in find_layers(Folder(folder))}
        assert found <= {0, None}


KINDS = {
    "fifo": lambda path: os.mkfifo(path),
    "folder": lambda path: path.mkdir(),
    "nothing": lambda path: path.symlink_to("nowhere"),
    "itself": lambda path: path.symlink_to(path.name),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "outside": lambda path: path.symlink_to("/etc/hostname"),
}


@pytest.mark.parametrize(
    "name", ["z.safetensors", "config.json", "hf_quant_config.json", "model.safetensors.index.json"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_only_regular_files_of_the_folder_are_opened(kind, name, sources, tmp_path):
    folder = copy(sources, "nvfp4", tmp_path / "c")
    (folder / name).unlink(missing_ok=True)
    KINDS[kind](folder / name)
    problems = refused(folder)
    assert problems[0].startswith(f"{name}: cannot be read: ")
    told = {
        "fifo": "it is a FIFO; only regular files are opened",
        "folder": "it is a folder; only regular files are opened",
        "device": "it is a link out of the folder, to /dev/zero",
        "outside": "it is a link out of the folder, to /etc/hostname",
    }
    assert told.get(kind, "") in problems[0]


def test_links_in_the_folder_and_in_a_cache_of_hugging_face(sources, tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0f3c"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, path in enumerate((sources / "nvfp4").iterdir()):
        (blobs / str(i)).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    want = load_experts(sources / "nvfp4", 0)
    assert_same_experts(load_experts(snapshot, 0), want)
    (tmp_path / "link").symlink_to(snapshot)
    assert_same_experts(load_experts(tmp_path / "link", 0), want)

    (snapshot.parent / "other").mkdir()  # of another revision is not of the blobs
    (snapshot.parent / "other" / "c.json").write_bytes((snapshot / "config.json").read_bytes())
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../other/c.json")
    assert "it is a link out of the folder" in refused(snapshot)[0]

    folder = copy(sources, "nvfp4", tmp_path / "c")
    (folder / "model.safetensors").rename(folder / "weights.bin")
    (folder / "model.safetensors").symlink_to("weights.bin")
    assert_same_experts(load_experts(folder, 0), want)


def _header(change):
    """The bytes of a shard whose header was changed."""

    def changed(content: bytes) -> bytes:
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + content[8 + size :]

    return changed


def _first(**changes):
    return _header(lambda header: header[f"{BASE}.0.up_proj.weight"].update(changes))


HEADERS = {
    "empty": lambda content: b"",
    "length alone": lambda content: content[:8],
    "truncated": lambda content: content[:-1],
    "longer": lambda content: content + b"\0",
    "absurd length": lambda content: (2**63).to_bytes(8, "little") + content[8:],
    "not JSON": lambda content: content[:8] + b"x" + content[9:],
    "unknown dtype": _first(dtype="F3"),
    "negative size": _first(shape=[-1, 4]),
    "absurd size": _first(shape=[2**62, 2**62]),
    "overlapping": _first(data_offsets=[0, 64]),
    "no dtype": _header(lambda header: header[f"{BASE}.0.up_proj.weight"].pop("dtype")),
    "metadata of numbers": _header(lambda header: header.update(__metadata__={"format": 1})),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_damaged_header_is_named(kind, sources, tmp_path):
    for name, destination in (("nvfp4", None), ("bf16", tmp_path / "o")):
        shard = copy(sources, name, tmp_path / name) / "model.safetensors"
        shard.write_bytes(HEADERS[kind](shard.read_bytes()))
        assert refused(shard.parent, destination)[0].startswith(f"{shard.name}: cannot be read: ")


def test_a_tensor_in_two_files(sources, tmp_path):
    folder = copy(sources, "bf16", tmp_path / "c")
    name = f"{BASE}.0.up_proj.weight"
    save_file({name: torch.zeros(2, 2)}, folder / "other.safetensors")
    (problem,) = refused(folder, tmp_path / "o")
    assert problem == f"other.safetensors: it has {name}, which model.safetensors has too"


def test_names_are_utf_8_under_any_locale(sources, tmp_path):
    """Folder, shard, tensors and configuration with letters that ASCII lacks."""
    folder = copy(sources, "bf16", tmp_path / "modèle")
    tensors = load_file(folder / "model.safetensors") | {"tête.weight": torch.ones(2, 2)}
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "poids-é.safetensors")
    (folder / "config.json").write_text(
        json.dumps(CONFIG | {"_name": "é"}, ensure_ascii=False), "utf-8"
    )
    (folder / "lisez-moi-é.txt").write_text("é", "utf-8")
    code = (
        "import sys; from nvfp4_moe.checkpoints import convert, load_experts\n"
        "assert sys.getfilesystemencoding() == 'ascii', sys.getfilesystemencoding()\n"
        "convert(sys.argv[1], sys.argv[2]); load_experts(sys.argv[2], 0)"
    )
    environment = os.environ | {
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", code, folder, tmp_path / "ascii"]
    ran = subprocess.run(command, env=environment, capture_output=True)
    assert ran.returncode == 0, ran.stderr.decode()
    convert(folder, tmp_path / "utf8")
    assert bytes_of(tmp_path / "ascii") == bytes_of(tmp_path / "utf8")
    assert_same_experts(load_experts(tmp_path / "ascii", 0), load_experts(tmp_path / "utf8", 0))
