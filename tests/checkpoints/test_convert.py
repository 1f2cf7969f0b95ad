"""Conversion gives the bits of `prepare_experts`, copies the rest, and refuses bad sources."""

# SPDX-License-Identifier: Apache-2.0
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_cases import (
    EXPERTS,
    HIDDEN,
    NAMINGS,
    Naming,
    Weights,
    apart,
    assert_same_experts,
    bytes_of,
    fp8,
    ordinary,
    others,
    weights,
    write,
)
from convert_cases import LAYERS, QWEN, assert_converted, by_layer, source
from paths import ROOT
from safetensors.torch import load_file, save_file

from nvfp4_moe import __main__
from nvfp4_moe.checkpoints import (
    CheckpointError,
    convert,
    load_experts,
    resumable_writer,
)
from nvfp4_moe.cli.convert import RECIPES


@pytest.mark.parametrize("name", NAMINGS)
def test_the_bits_are_those_of_preparing_in_memory(name, tmp_path):
    naming = NAMINGS[name]
    made = source(tmp_path / "src", naming)
    convert(tmp_path / "src", tmp_path / "dst")
    assert_converted(tmp_path / "dst", naming, made)


@pytest.mark.parametrize("name", ["qwen3-moe", "mixtral"])
def test_gate_and_up_in_different_shards(name, tmp_path):
    naming = NAMINGS[name]
    made = source(tmp_path / "src", naming, split=apart)
    convert(tmp_path / "src", tmp_path / "dst")
    assert_converted(tmp_path / "dst", naming, made)
    first, second = (load_file(p) for p in sorted((tmp_path / "dst").glob("*.safetensors")))
    assert all(".gate_proj." in n or ".w1." in n for n in first)
    assert not any(".gate_proj." in n or ".w1." in n for n in second)


@pytest.mark.parametrize("recipe", ["exact-4over6-448-mae", "exact-4over6-256-mse"])
def test_four_over_six(recipe, tmp_path):
    made = source(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "dst", recipe=RECIPES[recipe])
    assert_converted(tmp_path / "dst", QWEN, made, recipe)


def test_fp16(tmp_path):
    made = source(tmp_path / "src", dtype=torch.float16)
    convert(tmp_path / "src", tmp_path / "dst")
    assert_converted(tmp_path / "dst", QWEN, made)


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}


def fp8_source(path: Path, naming: Naming, sizes: tuple[int, int], scales_apart: bool) -> Weights:
    tensors, meant = fp8(naming, 0, weights(sizes=sizes))
    scales = {n: t for n, t in tensors.items() if "scale_inv" in n and scales_apart}
    rest = {n: t for n, t in tensors.items() if n not in scales} | others(naming, 0)
    attention = "model.layers.0.self_attn.kv_b_proj"
    rest |= {
        f"{attention}.weight": torch.ones(128, 128).to(torch.float8_e4m3fn),
        f"{attention}.weight_scale_inv": torch.ones(1, 1),
    }
    shards = [rest, scales] if scales_apart else [rest]
    write(path, shards, {**dict(naming.config), "quantization_config": FP8})
    return meant


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("deepseek-v3", (272, 144)), ("fused", (144, 128)), ("stacked", (144, 256))],
)
def test_fp8_blocks(name, sizes, tmp_path):
    naming = NAMINGS[name]
    meant = fp8_source(tmp_path / "src", naming, sizes, scales_apart=name == "deepseek-v3")
    convert(tmp_path / "src", tmp_path / "dst")
    assert_converted(tmp_path / "dst", naming, {0: meant})
    if name == "deepseek-v3":
        config = json.loads((tmp_path / "dst" / "hf_quant_config.json").read_text())["quantization"]
        assert config["quant_algo"] == "MIXED_PRECISION"
        assert config["quantized_layers"] == {
            "model.layers.0.mlp.experts": {"quant_algo": "NVFP4", "group_size": 16},
            "model.layers.0.self_attn.kv_b_proj": {"quant_algo": "FP8_PB_WO"},
        }
        assert "model.layers.0.self_attn.q_proj" in config["exclude_modules"]
        assert not any("kv_b_proj" in pattern for pattern in config["exclude_modules"])
    names = {n for p in (tmp_path / "dst").glob("*.safetensors") for n in load_file(p)}
    assert [n for n in names if n.endswith("scale_inv")] == [
        "model.layers.0.self_attn.kv_b_proj.weight_scale_inv"
    ]


def test_a_module_quantized_in_some_layers_is_named_in_the_others(tmp_path):
    tensors, _ = fp8(QWEN, 0, weights())
    for layer in LAYERS:
        tensors[f"model.layers.{layer}.self_attn.o_proj.weight"] = torch.ones(128, 128).bfloat16()
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors[f"{name}_scale_inv"] = torch.ones(1, 1)
    write(tmp_path / "src", [tensors], {**dict(QWEN.config), "quantization_config": FP8})
    convert(tmp_path / "src", tmp_path / "dst")
    config = json.loads((tmp_path / "dst" / "hf_quant_config.json").read_text())["quantization"]
    assert config["exclude_modules"] == ["model.layers.1.self_attn*"]


def test_fused_gate_and_up_may_not_share_an_fp8_block(tmp_path):
    fp8_source(tmp_path / "src", NAMINGS["deepseek-v3"], (128, 144), scales_apart=False)
    stack = {n: t for n, t in load_file(next((tmp_path / "src").glob("*"))).items()}
    fused = {}
    for name, tensor in stack.items():
        if ".gate_proj." in name:
            up = stack[name.replace("gate_proj", "up_proj")]
            fused[name.replace("gate_proj", "gate_up_proj")] = torch.cat((tensor, up))
        elif ".up_proj." not in name or "shared" in name:
            fused[name] = tensor
    write(tmp_path / "fused", [fused], {"n_routed_experts": EXPERTS, "quantization_config": FP8})
    with pytest.raises(CheckpointError, match="gate and up, of 144 rows each, share an FP8 block"):
        convert(tmp_path / "fused", tmp_path / "dst")


def test_everything_else_is_copied(tmp_path):
    source(tmp_path / "src", split=by_layer)
    (tmp_path / "src" / "tokenizer.json").write_text("{}")
    (tmp_path / "src" / "more").mkdir()
    (tmp_path / "src" / "more" / "a.py").write_text("pass\n")
    (tmp_path / "src" / "pytorch_model.bin").write_text("weights again")
    (tmp_path / "src" / ".gitattributes").write_text("")
    convert(tmp_path / "src", tmp_path / "dst")
    before, after = bytes_of(tmp_path / "src"), bytes_of(tmp_path / "dst")
    shards = {n for n in before if n.endswith(".safetensors")}
    assert set(after) == shards | {
        "config.json",
        "hf_quant_config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "more/a.py",
    }
    assert after["more/a.py"] == before["more/a.py"]
    index = json.loads(after["model.safetensors.index.json"])
    size = 0
    for shard in shards:
        old, new = load_file(tmp_path / "src" / shard), load_file(tmp_path / "dst" / shard)
        for name, tensor in old.items():
            if ".experts." not in name:
                assert torch.equal(new[name], tensor) and new[name].dtype == tensor.dtype
        assert {n for n, s in index["weight_map"].items() if s == shard} == set(new)
        size += sum(t.nbytes for t in new.values())
    assert index["metadata"]["total_size"] == size
    assert len(index["weight_map"]) == len(LAYERS) * (EXPERTS * 3 * 4 + 5) + 1


def test_the_configuration_says_what_is_nvfp4(tmp_path):
    source(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "dst", exclude=["model.layers.1.*"])
    config = json.loads((tmp_path / "dst" / "config.json").read_text())
    outer = json.loads((tmp_path / "dst" / "hf_quant_config.json").read_text())
    assert config["hidden_act"] == "silu"
    assert config["quantization_config"]["quant_method"] == "modelopt"
    assert outer["producer"]["name"] == "modelopt"
    assert outer["quantization"]["quant_algo"] == "NVFP4"
    left = outer["quantization"]["exclude_modules"]
    assert (
        left
        == config["quantization_config"]["ignore"]
        == [
            "lm_head",
            "model.layers.*.mlp.shared_experts*",
            "model.layers.*.self_attn*",
            "model.layers.0.mlp.gate",
            "model.layers.1.mlp*",
            "model.layers.1.mlp.experts*",
        ]
    )


def test_excluded_experts_are_left_alone(tmp_path):
    made = source(tmp_path / "src")
    errors = convert(tmp_path / "src", tmp_path / "dst", exclude=["model.layers.1.*"])
    assert [e.module for e in errors] == [QWEN.of(0)]
    assert_converted(tmp_path / "dst", QWEN, {0: made[0]})
    (shard,) = (tmp_path / "dst").glob("*.safetensors")
    kept = load_file(shard)[f"{QWEN.of(1)}.2.up_proj.weight"]
    assert torch.equal(kept, made[1].up[2])
    with pytest.raises(CheckpointError, match="is excluded from quantization"):
        load_experts(tmp_path / "dst", 1)


def test_input_scales_are_ones_or_absent(tmp_path):
    source(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "with")
    convert(tmp_path / "src", tmp_path / "without", input_scale=False)
    with_ones, without = (
        load_file(next((tmp_path / name).glob("*.safetensors"))) for name in ("with", "without")
    )
    scales = [t for n, t in with_ones.items() if n.endswith("input_scale")]
    assert len(scales) == len(LAYERS) * EXPERTS * 3
    assert all(t == 1 and t.shape == () and t.dtype == torch.float32 for t in scales)
    assert set(with_ones) - set(without) == {n for n in with_ones if n.endswith("input_scale")}
    assert_same_experts(load_experts(tmp_path / "with", 0), load_experts(tmp_path / "without", 0))


def test_zero_experts_have_scale_one_and_gate_and_up_share_theirs(tmp_path):
    made = source(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "dst")
    tensors = load_file(next((tmp_path / "dst").glob("*.safetensors")))
    for expert in range(EXPERTS):
        gate, up, down = (tensors[f"{QWEN.of(0)}.{expert}.{p}.weight_scale_2"] for p in QWEN.names)
        assert gate == up
        if expert == 1:
            assert gate == down == 1
        else:
            amax = made[0].w13[expert].abs().max().float()
            assert torch.isclose(gate, amax / 2688, rtol=1e-6)


def test_no_tensor_takes_the_name_of_one_that_is_made(tmp_path):
    """Stacked experts of `moe` become `moe.experts.E`, where there are others already."""
    stacked = {f"model.layers.0.moe.{n}_proj.weight": t for n, t in vars(weights()).items()}
    apart_ = Naming("model.layers.0.moe.experts", QWEN.names, QWEN.config)
    write(tmp_path / "src", [stacked | ordinary(apart_, 0, weights())], dict(QWEN.config))
    with pytest.raises(CheckpointError) as e:
        convert(tmp_path / "src", tmp_path / "dst")
    assert not (tmp_path / "dst").exists()
    assert len(e.value.problems) == EXPERTS * 3 * 4
    assert e.value.problems[0].endswith("2 tensors of the source would become one of this name")
    with pytest.raises(CheckpointError, match=r"extra: the conversion makes a tensor of this name"):
        convert(tmp_path / "src", tmp_path / "dst", exclude=["*.experts"])
    assert not (tmp_path / "dst").exists()


OTHERS = {
    "a link out": (lambda path: path.symlink_to("/etc/hostname"), "it is a link out of the folder"),
    "a link to a folder": (lambda path: path.symlink_to("."), "it is a folder; only regular files"),
    "a broken link": (lambda path: path.symlink_to("none"), "it cannot be read: No such file"),
    "a FIFO": (os.mkfifo, "it is a FIFO; only regular files are opened"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_files_that_may_not_be_copied(kind, tmp_path):
    write(tmp_path / "src", [ordinary(QWEN, 0, weights())], dict(QWEN.config))
    (tmp_path / "src" / "more").mkdir()
    make, reason = OTHERS[kind]
    make(tmp_path / "src" / "more" / "x.txt")
    with pytest.raises(CheckpointError, match=f"more/x.txt: {reason}"):
        convert(tmp_path / "src", tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_a_file_whose_name_is_not_utf_8(tmp_path):
    write(tmp_path / "src", [ordinary(QWEN, 0, weights())], dict(QWEN.config))
    with open(os.fsencode(tmp_path / "src") + b"/\xff.txt", "w"):
        pass
    with pytest.raises(CheckpointError, match=r"xff.txt': its name is not UTF-8"):
        convert(tmp_path / "src", tmp_path / "dst")


def bad_sources():
    def change(name, value):
        return lambda tensors: tensors.update({f"{QWEN.of(0)}.{name}": value(tensors)})

    def weight(e, p):
        return f"{QWEN.of(0)}.{e}.{p}.weight"

    def nan(tensors):
        tensors[weight(2, "up_proj")][3, 4] = torch.nan
        tensors[weight(3, "down_proj")][3, 4] = torch.inf

    def missing(tensors):
        del tensors[weight(2, "up_proj")], tensors[weight(0, "down_proj")]
        for p in QWEN.names:
            del tensors[weight(3, p)]

    name = weight(0, "up_proj")
    return {
        "NaN": (nan, ["2.up_proj.weight: it has NaN", "3.down_proj.weight: it has NaN"]),
        "missing": (
            missing,
            ["0.down_proj.weight: missing", "2.up_proj.weight: missing", "3: missing"],
        ),
        "extra": (
            change("4.up_proj.weight", lambda t: t[name].clone()),
            ["4: extra: there are 4 experts"],
        ),
        "fp64": (
            change("0.up_proj.weight", lambda t: t[name].double()),
            ["0.up_proj.weight: its dtype is F64; it must be BF16 or F16 or F32"],
        ),
        "FP8 without scales": (
            change("0.up_proj.weight", lambda t: t[name].to(torch.float8_e4m3fn)),
            ["0.up_proj.weight: its dtype is F8_E4M3; it must be BF16 or F16 or F32"],
        ),
        "a kind that is unknown": (
            change("0.up_proj.pre_quant_scale", lambda t: torch.ones(HIDDEN)),
            ["0.up_proj.pre_quant_scale: extra: the kinds of a source are"],
        ),
        "misshapen": (
            change("0.up_proj.weight", lambda t: t[name].T.contiguous()),
            ["0.up_proj.weight: its shape is [96, 48]; it must be [48, 96]"],
        ),
    }


@pytest.mark.parametrize("name", bad_sources())
def test_bad_sources_are_refused_with_the_list(name, tmp_path):
    source(tmp_path / "src", split=by_layer)
    spoil, wanted = bad_sources()[name]
    shard = tmp_path / "src" / "model-00001-of-00003.safetensors"
    tensors = {n: t.clone() for n, t in load_file(shard).items()}
    spoil(tensors)
    save_file(tensors, shard)
    path = tmp_path / "src" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = {
        n: s for n, s in index["weight_map"].items() if s != shard.name
    } | dict.fromkeys(tensors, shard.name)
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as e:
        convert(tmp_path / "src", tmp_path / "dst")
    assert len(e.value.problems) == len(wanted)
    for problem, start in zip(e.value.problems, wanted, strict=True):
        assert problem.startswith(f"{QWEN.of(0)}.{start}")
    assert not list(tmp_path.glob("dst/*.safetensors"))


def test_a_nan_in_the_partner_of_another_shard(tmp_path):
    """Gate's shard comes first, and its scale depends on up."""
    source(tmp_path / "src", split=apart)
    shard = tmp_path / "src" / "model-00002-of-00002.safetensors"
    tensors = {n: t.clone() for n, t in load_file(shard).items()}
    tensors[f"{QWEN.of(0)}.0.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, shard)
    with pytest.raises(CheckpointError, match=r"0\.up_proj\.weight: it has NaN"):
        convert(tmp_path / "src", tmp_path / "dst")
    assert not list((tmp_path / "dst").glob("*.safetensors"))


def test_a_truncated_source_writes_nothing(tmp_path):
    source(tmp_path / "src", split=by_layer)
    shard = tmp_path / "src" / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors: cannot be read"):
        convert(tmp_path / "src", tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "mxfp4"},
        {"quant_method": "modelopt", "quant_algo": "INT8_SQ"},
        {
            "quant_method": "modelopt",
            "quant_algo": "MIXED_PRECISION",
            "quantized_layers": {"lm_head": {"quant_algo": "NVFP4"}},
        },
        {
            "quant_method": "compressed-tensors",
            "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "int"}}},
        },
    ],
)
def test_other_quantized_sources_are_refused(config, tmp_path):
    tensors = ordinary(QWEN, 0, weights())
    write(tmp_path / "src", [tensors], {**dict(QWEN.config), "quantization_config": config})
    with pytest.raises(CheckpointError, match="its quant_method is"):
        convert(tmp_path / "src", tmp_path / "dst")


def test_a_source_without_experts(tmp_path):
    write(tmp_path / "src", [{"lm_head.weight": torch.ones(2, 2)}], {})
    with pytest.raises(CheckpointError, match="no layers of experts"):
        convert(tmp_path / "src", tmp_path / "dst")


def test_the_errors_are_those_of_the_weights(tmp_path):
    made = source(tmp_path / "src", split=apart)
    errors = convert(tmp_path / "src", tmp_path / "dst")
    tensors = {}
    for path in (tmp_path / "dst").glob("*.safetensors"):
        tensors |= load_file(path)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = torch.cat((values, -values)).double()
    for layer, error in zip(LAYERS, errors, strict=True):
        for p, side in (("gate", ("gate",)), ("up", ("up",)), ("down", ("down",))):
            w = getattr(made[layer], p).double()
            total = 0.0
            for e in range(EXPERTS):
                name = f"{QWEN.of(layer)}.{e}.{p}_proj"
                codes = tensors[f"{name}.weight"]
                code = torch.stack((codes & 15, codes >> 4), -1).flatten(-2).long()
                scale = tensors[f"{name}.weight_scale"].double().repeat_interleave(16, 1)
                got = values[code] * scale * tensors[f"{name}.weight_scale_2"].double()
                total += float((got - w[e]).square().sum())
            want = (total / float(w.square().sum())) ** 0.5
            assert error.relative(*side) == pytest.approx(want, rel=1e-4)
            assert 0.05 < want < 0.15
        assert error.snr("down") == pytest.approx(20.0, abs=2.0)


def test_the_command(tmp_path, capsys):
    made = source(tmp_path / "src", split=by_layer)
    arguments = ["convert", str(tmp_path / "src"), str(tmp_path / "dst")]
    assert __main__.main([*arguments, "--recipe", "exact-4over6-448-mse", "--no-input-scale"]) == 0
    assert_converted(tmp_path / "dst", QWEN, made, "exact-4over6-448-mse")
    announced, _, *lines, wrote, following = capsys.readouterr().out.splitlines()
    assert announced.startswith(f"{len(LAYERS)} layers with ")
    assert f" matrices become NVFP4 on the CPU in {torch.get_num_threads()} process" in announced
    assert f"{tmp_path / 'dst'} gets about " in announced and " s by a trial" in announced
    assert len(lines) == len(LAYERS)
    assert lines[0].startswith(QWEN.of(0)) and lines[0].endswith(" dB")
    assert wrote.startswith(f"wrote {tmp_path / 'dst'}: ") and "of source a second" in wrote
    python, *words = shlex.split(following.removeprefix("next: "))
    assert python == "python3"
    shown = subprocess.check_output([sys.executable, *words], cwd=ROOT, text=True)
    assert shown.startswith("Experts(")
    assert __main__.main(arguments) == 2
    assert "it is complete" in capsys.readouterr().err


def test_one_shard_is_held_at_a_time(tmp_path, monkeypatch):
    source(tmp_path / "src", split=by_layer)
    held = []
    real = resumable_writer.Workspace.write_shard
    monkeypatch.setattr(
        resumable_writer.Workspace,
        "write_shard",
        lambda self, shard, tensors, *rest: (
            held.append(set(tensors)),
            real(self, shard, tensors, *rest),
        ),
    )
    convert(tmp_path / "src", tmp_path / "dst")
    assert not any(a & b for i, a in enumerate(held) for b in held[:i])
    assert all(sum(f"layers.{n}." in name for name in held[n]) == len(held[n]) for n in LAYERS)
