"""NVFP4 checkpoints are read to the bit, in every naming and format, and refused with a list."""

# SPDX-License-Identifier: Apache-2.0
import json
from dataclasses import replace

import pytest
import torch
from checkpoint_cases import (
    COMPRESSED_KINDS,
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    MODELOPT_KINDS,
    NAMINGS,
    Naming,
    assert_same_experts,
    compressed_config,
    modelopt_config,
    nvfp4,
    others,
    quantized,
    weights,
    write,
)
from safetensors.torch import load_file, save_file

from nvfp4_moe.checkpoints import CheckpointError, Folder, find_layers, load_experts
from nvfp4_moe.reference.activation import ActivationType
from nvfp4_moe.reference.weights.experts import Experts
from nvfp4_moe.reference.weights.prepare import assemble_experts

QWEN = NAMINGS["qwen3-moe"]


def assembled(parts: dict, naming: Naming, rows: slice = slice(None), **static: float) -> Experts:
    """Return the experts that the parts of a layer must become, without any checkpoint."""
    first = [parts[p] for p in ("up", "gate") if p in parts]
    decode = torch.stack([p["decode"][rows] for p in first], 1)
    return assemble_experts(
        torch.cat([p["codes"][rows] for p in first], 1),
        torch.cat([p["scales"].view(torch.uint8)[rows] for p in first], 1),
        decode if len(first) == 2 else decode[:, 0],
        *(parts["down"][kind][rows] for kind in ("codes", "scales", "decode")),
        naming.activation,
        **static,
    )


def checkpoint(path, naming=QWEN, parts=None, layers=(3,), **config):
    """One in ModelOpt's format, its tensors over two shards."""
    parts = parts or quantized(weights(naming.activation.gated))
    tensors = {}
    for layer in layers:
        tensors |= nvfp4(naming, layer, parts, MODELOPT_KINDS) | others(naming, layer)
    names = sorted(tensors)
    shards = [{n: tensors[n] for n in names[i::2]} for i in range(2)]
    return write(
        path, shards, dict(naming.config), hf_quant_config=modelopt_config(**config)
    ), parts


@pytest.mark.parametrize("name", NAMINGS)
def test_modelopt_in_every_naming(name, tmp_path):
    naming = NAMINGS[name]
    folder, parts = checkpoint(tmp_path / "c", naming, layers=(2, 3))
    assert_same_experts(load_experts(folder, 3), assembled(parts, naming))


@pytest.mark.parametrize("name", NAMINGS)
def test_compressed_tensors_has_reciprocal_scales(name, tmp_path):
    naming = NAMINGS[name]
    parts = quantized(weights(naming.activation.gated))
    tensors = nvfp4(naming, 0, parts, COMPRESSED_KINDS)
    config = {**dict(naming.config), "quantization_config": compressed_config("lm_head")}
    folder = write(tmp_path / "c", [tensors], config, index=False)
    for part in parts.values():  # twice rounded
        part["decode"] = 1 / (1 / part["decode"])
    assert_same_experts(load_experts(folder, 0), assembled(parts, naming))


@pytest.mark.parametrize("form", ["modelopt", "compressed-tensors"])
def test_static_scales_are_the_largest_over_all_experts(form, tmp_path):
    parts = quantized(weights())
    parts["gate"]["input"] = torch.tensor([0.5, 0.25, 0.125, 0.3])
    parts["up"]["input"] = torch.tensor([0.1, 0.1, 0.1, 0.7])
    parts["down"]["input"] = torch.tensor([0.1, 0.3, 0.0078125, 0.1])
    kinds = MODELOPT_KINDS if form == "modelopt" else COMPRESSED_KINDS
    quantization = (
        {"quant_algo": "NVFP4", "quant_method": "modelopt"}
        if form == "modelopt"
        else compressed_config()
    )
    folder = write(
        tmp_path / "c",
        [nvfp4(QWEN, 0, parts, kinds)],
        {**dict(QWEN.config), "quantization_config": quantization},
    )
    got = load_experts(folder, 0, static=True, local=range(1, 3))
    assert got.input_scale.item() == (1 / torch.tensor(0.7)).item()
    assert got.intermediate_scale.item() == (1 / torch.tensor(0.3)).item()
    assert got.num_local == 2
    per_token = load_experts(folder, 0)
    assert per_token.input_scale is None and per_token.intermediate_scale is None


def test_a_static_scale_is_the_correctly_rounded_reciprocal(tmp_path):
    parts = quantized(weights())
    for seed in range(40):
        g = torch.Generator().manual_seed(seed)
        scale = torch.rand(1, generator=g) * 2.0 ** (seed - 20)
        for p in ("gate", "up", "down"):
            parts[p]["input"] = scale.expand(EXPERTS)
        folder, _ = checkpoint(tmp_path / str(seed), parts=parts)
        assert load_experts(folder, 3, static=True, local=range(1)).input_scale == 1 / scale


def test_local_experts(tmp_path):
    folder, parts = checkpoint(tmp_path / "c")
    got = load_experts(folder, 3, local=range(1, 3))
    want = assembled(parts, QWEN, slice(1, 3))
    assert_same_experts(got, replace(want, first_expert=1))
    with pytest.raises(
        ValueError, match=r"local is range\(3, 5\); it must be a part of range\(4\)"
    ):
        load_experts(folder, 3, local=range(3, 5))


def test_a_rank_does_not_ask_for_the_shards_of_others(tmp_path):
    parts = quantized(weights())
    tensors = nvfp4(QWEN, 0, parts, MODELOPT_KINDS)
    mine = {n: t for n, t in tensors.items() if ".experts.0." in n or ".experts.1." in n}
    rest = {n: t for n, t in tensors.items() if n not in mine}
    folder = write(
        tmp_path / "c", [mine, rest], dict(QWEN.config), hf_quant_config=modelopt_config()
    )
    (folder / "model-00002-of-00002.safetensors").unlink()
    got = load_experts(folder, 0, local=range(2))
    want = assembled(parts, QWEN, slice(0, 2))
    assert_same_experts(got, replace(want, first_expert=0))


def test_layers_are_found_by_number_and_by_name(tmp_path):
    parts = quantized(weights())
    draft = Naming("mtp.layers.{}.mlp.experts", QWEN.names, QWEN.config)
    tensors = nvfp4(QWEN, 0, parts, MODELOPT_KINDS) | nvfp4(draft, 0, parts, MODELOPT_KINDS)
    tensors |= nvfp4(QWEN, 10, parts, MODELOPT_KINDS) | nvfp4(QWEN, 9, parts, MODELOPT_KINDS)
    folder = write(tmp_path / "c", [tensors], dict(QWEN.config), hf_quant_config=modelopt_config())
    found = find_layers(Folder(folder))
    assert [(x.index, x.module.split(".")[0]) for x in found] == [
        (0, "model"),
        (0, "mtp"),
        (9, "model"),
        (10, "model"),
    ]
    assert_same_experts(load_experts(folder, draft.of(0)), assembled(parts, QWEN))
    with pytest.raises(CheckpointError, match=r"2 have that number.*mtp\.layers\.0\.mlp\.experts"):
        load_experts(folder, 0)
    with pytest.raises(CheckpointError, match="no single layer of experts 7; there are: model"):
        load_experts(folder, 7)


def test_the_activation_must_fit_the_tensors(tmp_path):
    parts = quantized(weights())
    parts["gate"]["decode"] = parts["up"]["decode"]
    folder, _ = checkpoint(tmp_path / "c", parts=parts)
    situ = load_experts(folder, 3, activation=ActivationType.Situ)
    assert situ.activation == ActivationType.Situ
    with pytest.raises(ValueError, match="activation is Relu2, which is not gated"):
        load_experts(folder, 3, activation=ActivationType.Relu2)
    (folder / "config.json").write_text('{"hidden_act": "swoosh"}')
    with pytest.raises(CheckpointError, match='hidden_act is "swoosh", with gate projections'):
        load_experts(folder, 3)


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ("modelopt", "model.layers.3.mlp.experts"),
        ("modelopt", "model.layers.3*"),
        ("modelopt", "*.experts.1.up_proj"),
        ("compressed-tensors", "re:.*layers.3.*experts"),
        ("compressed-tensors", "model.layers.3.mlp.experts.0.gate_proj"),
    ],
)
def test_excluded_experts_are_refused(form, pattern, tmp_path):
    folder, _ = checkpoint(tmp_path / "c", exclude_modules=[pattern])
    if form == "compressed-tensors":
        config = {**dict(QWEN.config), "quantization_config": compressed_config(pattern)}
        (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as e:
        load_experts(folder, 3)
    assert "is excluded from quantization (by " + repr(pattern) in str(e.value)


def test_patterns_of_other_modules_exclude_nothing(tmp_path):
    patterns = ["lm_head", "model.layers.*.mlp.gate", "model.layers.30*", "*shared_experts*"]
    folder, parts = checkpoint(tmp_path / "c", exclude_modules=patterns)
    assert_same_experts(load_experts(folder, 3), assembled(parts, QWEN))


def test_mixed_precision_names_the_algorithm_of_a_module(tmp_path):
    layers = {"model.layers.3.mlp.experts": {"quant_algo": "NVFP4", "group_size": 16}}
    mixed = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    folder, parts = checkpoint(tmp_path / "c", **mixed)
    assert_same_experts(load_experts(folder, 3), assembled(parts, QWEN))
    layers["model.layers.3.mlp.experts"] = {"quant_algo": "FP8_PB_WO"}
    folder, _ = checkpoint(tmp_path / "d", **mixed)
    with pytest.raises(CheckpointError, match=r"its algorithm is .'FP8_PB_WO'"):
        load_experts(folder, 3)


def rewritten(folder, change) -> None:
    """Apply `change` to the tensors of each shard, and follow it in the index."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors = {name: t.clone() for name, t in load_file(path).items()}
        change(tensors)
        save_file(tensors, path)
        index["weight_map"] |= dict.fromkeys(tensors, path.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


BASE = "model.layers.3.mlp.experts"


def _drop(*names):
    return lambda tensors: [tensors.pop(f"{BASE}.{n}", None) for n in names]


def _set(name, value):
    def change(tensors):
        if f"{BASE}.{name}" in tensors:
            tensors[f"{BASE}.{name}"] = value(tensors[f"{BASE}.{name}"])

    return change


def _add(name, value):
    def change(tensors):
        if f"{BASE}.0.up_proj.weight" in tensors:
            tensors[f"{BASE}.{name}"] = value

    return change


def _first_block(byte):
    def value(scales):
        scales.view(torch.uint8)[0, :2] = byte
        return scales

    return value


KINDS = ("weight", "weight_scale", "weight_scale_2", "input_scale")
EVERY_TENSOR = [f"2.{p}.{k}" for p in ("gate_proj", "up_proj", "down_proj") for k in KINDS]
CORRUPT = {
    "missing tensor": (
        _drop("1.up_proj.weight_scale"),
        [f"{BASE}.1.up_proj.weight_scale: missing"],
    ),
    "missing expert": (_drop(*EVERY_TENSOR), [f"{BASE}.2: missing"]),
    "extra expert": (
        _add("4.up_proj.weight", torch.zeros(INTERMEDIATE, HIDDEN // 2, dtype=torch.uint8)),
        [f"{BASE}.4: extra: there are 4 experts, from 0"],
    ),
    "extra kind": (
        _add("0.up_proj.pre_quant_scale", torch.ones(HIDDEN)),
        [f"{BASE}.0.up_proj.pre_quant_scale: extra"],
    ),
    "extra projection": (_add("0.side_proj.weight", torch.ones(1)), [f"{BASE}.0.side_proj.weight"]),
    "twice": (_add("0.w3.weight", torch.ones(1)), [f"{BASE}.0.w3.weight: extra"]),
    "fused and apart": (
        _add(
            "0.gate_up_proj.weight", torch.zeros(2 * INTERMEDIATE, HIDDEN // 2, dtype=torch.uint8)
        ),
        [f"{BASE}.0.gate_up_proj.weight: extra: other tensors have its values"],
    ),
    "codes of one dimension": (
        _set("3.down_proj.weight", lambda t: t.flatten()),
        [f"{BASE}.3.down_proj.weight: its shape is [2304]; it must be"] * 2,
    ),
    "misshapen codes": (
        _set("3.down_proj.weight", lambda t: t[:, 1:].contiguous()),
        [f"{BASE}.3.down_proj.weight: its shape is [96, 23]; it must be [96, 24]"],
    ),
    "misshapen scales": (
        _set("0.gate_proj.weight_scale", lambda t: t.T.contiguous()),
        [f"{BASE}.0.gate_proj.weight_scale: its shape is [6, 48]; it must be [48, 6]"],
    ),
    "vector for a scalar": (
        _set("0.gate_proj.weight_scale_2", lambda t: t.repeat(3)),
        [f"{BASE}.0.gate_proj.weight_scale_2: its shape is [3]; it must be [] or [1]"],
    ),
    "dtype of codes": (
        _set("0.up_proj.weight", lambda t: t.view(torch.int8)),
        [f"{BASE}.0.up_proj.weight: its dtype is I8; it must be U8"],
    ),
    "dtype of scales": (
        _set("0.up_proj.weight_scale", lambda t: t.bfloat16()),
        [f"{BASE}.0.up_proj.weight_scale: its dtype is BF16; it must be F8_E4M3"],
    ),
    "dtype of a scalar": (
        _set("0.up_proj.weight_scale_2", lambda t: t.half()),
        [f"{BASE}.0.up_proj.weight_scale_2: its dtype is F16; it must be F32"],
    ),
    "NaN block scales": (
        _set("1.down_proj.weight_scale", _first_block(0x7F)),
        [f"{BASE}.1.down_proj.weight_scale: 2 of 288 block scales are NaN"],
    ),
    "negative NaN": (
        _set("1.down_proj.weight_scale", _first_block(0xFF)),
        [f"{BASE}.1.down_proj.weight_scale: 2 of 288 block scales are NaN"],
    ),
    "negative block scales": (
        _set("1.down_proj.weight_scale", _first_block(0x81)),
        [f"{BASE}.1.down_proj.weight_scale: 2 of 288 block scales are negative"],
    ),
    "NaN scalar": (
        _set("2.up_proj.weight_scale_2", lambda t: t * torch.nan),
        [f"{BASE}.2.up_proj.weight_scale_2: it is nan, not a scale"],
    ),
}


@pytest.mark.parametrize("name", CORRUPT)
def test_corrupt_tensors_are_listed(name, tmp_path):
    folder, _ = checkpoint(tmp_path / "c")
    change, wanted = CORRUPT[name]
    rewritten(folder, change)
    with pytest.raises(CheckpointError) as e:
        load_experts(folder, 3)
    assert len(e.value.problems) == len(wanted), e.value
    for problem, start in zip(e.value.problems, wanted, strict=True):
        assert problem.startswith(start)


def test_one_error_lists_everything(tmp_path, monkeypatch):
    folder, _ = checkpoint(tmp_path / "c")
    together = ("missing tensor", "extra expert", "misshapen codes", "dtype of scales")
    chosen = [CORRUPT[name] for name in (*together, "NaN block scales", "NaN scalar")]
    for change, _ in chosen:
        rewritten(folder, change)
    monkeypatch.setattr(
        "nvfp4_moe.checkpoints.load.assemble_experts", lambda *a, **k: pytest.fail("built")
    )
    with pytest.raises(CheckpointError) as e:
        load_experts(folder, 3)
    assert sorted(e.value.problems) == sorted(p for _, wanted in chosen for p in wanted)
    assert str(e.value).startswith(f"{folder}: {len(chosen)} problems\n")


def test_a_long_list_is_cut_but_counted(tmp_path):
    folder, _ = checkpoint(tmp_path / "c")
    scales = [f"{e}.{p}.{k}" for e in range(4) for p in QWEN.names for k in KINDS[1:3]]
    rewritten(folder, _drop(*scales))
    with pytest.raises(CheckpointError, match=r"24 problems") as e:
        load_experts(folder, 3)
    assert str(e.value).endswith("... and 4 more")
    assert len(e.value.problems) == 24


@pytest.mark.parametrize("length", [4, 100, -1])
def test_a_truncated_shard_is_refused(length, tmp_path):
    folder, _ = checkpoint(tmp_path / "c")
    shard = folder / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:length])
    with pytest.raises(CheckpointError) as e:
        load_experts(folder, 3)
    (problem,) = e.value.problems
    assert problem.startswith("model-00001-of-00002.safetensors: cannot be read")


def test_a_missing_shard_and_a_name_that_its_shard_lacks(tmp_path):
    folder, _ = checkpoint(tmp_path / "c")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name = f"{BASE}.0.up_proj.weight"
    other = {"1": "2", "2": "1"}[index["weight_map"][name][10]]
    index["weight_map"][name] = f"model-0000{other}-of-00002.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"{name}: missing: not in model-0000{other}"):
        load_experts(folder, 3)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors: cannot be read"):
        load_experts(folder, 3)


def test_static_scales_must_be_there(tmp_path):
    folder, parts = checkpoint(tmp_path / "c")
    rewritten(folder, _drop("0.up_proj.input_scale", "3.down_proj.input_scale"))
    assert_same_experts(load_experts(folder, 3), assembled(parts, QWEN))
    with pytest.raises(CheckpointError) as e:
        load_experts(folder, 3, static=True, local=range(1, 2))
    assert [p.split(BASE)[1] for p in e.value.problems] == [
        ".0.up_proj.input_scale: missing",
        ".3.down_proj.input_scale: missing",
    ]


@pytest.mark.parametrize("form", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize(
    "value", [None, torch.nan, torch.inf, -1.0, torch.ones(7), torch.ones(1).half()]
)
def test_input_scales_that_are_not_used_are_not_judged(value, form, tmp_path):
    kinds = MODELOPT_KINDS if form == "modelopt" else COMPRESSED_KINDS
    tensors = nvfp4(QWEN, 3, quantized(weights()), kinds)
    config = dict(QWEN.config)
    if form == "modelopt":
        files = {"hf_quant_config": modelopt_config()}
    else:
        files, config = {}, {**config, "quantization_config": compressed_config()}
    good = load_experts(write(tmp_path / "good", [tensors], config, **files), 3)
    name = f"{BASE}.2.up_proj.{kinds['input']}"
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value if isinstance(value, torch.Tensor) else torch.tensor(value)
    folder = write(tmp_path / "bad", [tensors], config, **files)
    assert_same_experts(load_experts(folder, 3), good)
    if form == "compressed-tensors" and value is torch.inf:
        return  # a decode scale of zero, which is not the largest
    with pytest.raises(CheckpointError, match=rf"{name}: (missing|it is|its )"):
        load_experts(folder, 3, static=True)


def test_an_unused_input_scale_of_a_zero_expert_is_harmless(tmp_path):
    """compressed-tensors has infinite encode scales of experts that no calibration token reached."""
    parts = quantized(weights())
    parts["down"]["input"] = torch.tensor([0.0, 0.5, 0.0, 0.25])
    config = {**dict(QWEN.config), "quantization_config": compressed_config()}
    folder = write(tmp_path / "c", [nvfp4(QWEN, 0, parts, COMPRESSED_KINDS)], config)
    assert load_experts(folder, 0, static=True).intermediate_scale == 2.0
    parts["down"]["input"] = torch.zeros(4)
    folder = write(tmp_path / "d", [nvfp4(QWEN, 0, parts, COMPRESSED_KINDS)], config)
    with pytest.raises(CheckpointError, match="every static scale of the intermediate is zero"):
        load_experts(folder, 0, static=True)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"hf_quant_config.json": None}, "its quant_algo is None"),
        (
            {"hf_quant_config.json": '{"quantization": {"quant_algo": "FP8"}}'},
            "quant_algo is 'FP8'",
        ),
        ({"hf_quant_config.json": json.dumps(modelopt_config(group_size=32))}, "group_size is 32"),
        ({"config.json": "{"}, "config.json: not JSON that is read"),
        ({"config.json": "[]"}, r"config.json: it is \[\]; it must be an object"),
        (
            {"model.safetensors.index.json": "{}"},
            "weight_map is missing; it must be an object with",
        ),
        (
            {"model.safetensors.index.json": '{"weight_map": {"a": "../b.safetensors"}}'},
            r'weight_map.a is "../b.safetensors"; it must be the name of a \*.safetensors file',
        ),
        (
            {"model.safetensors.index.json": '{"weight_map": {"a": "sub/b.safetensors"}}'},
            r'weight_map.a is "sub/b.safetensors"; it must be the name of a \*.safetensors file',
        ),
        (
            {"model.safetensors.index.json": '{"weight_map": {"a": "b.bin"}}'},
            r'weight_map.a is "b.bin"; it must be the name of a \*.safetensors file',
        ),
    ],
)
def test_files_that_say_nothing_of_use(files, message, tmp_path):
    folder, _ = checkpoint(tmp_path / "c")
    for name, content in files.items():
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load_experts(folder, 3)


def test_no_folder_and_no_tensors(tmp_path):
    with pytest.raises(CheckpointError, match="there is no such folder"):
        load_experts(tmp_path / "none", 0)
    with pytest.raises(CheckpointError, match=r"no model\.safetensors\.index\.json and no"):
        load_experts(tmp_path, 0)


def test_progress_counts_experts_twice(tmp_path, capsys):
    folder, _ = checkpoint(tmp_path / "c")
    seen = []
    load_experts(folder, 3, progress=lambda *step: seen.append(step))
    assert [s[:2] for s in seen] == [(i, EXPERTS) for i in range(1, EXPERTS + 1)] * 2
    assert seen[0][2].startswith("checked expert 0") and seen[-1][2].startswith("read expert 3")
