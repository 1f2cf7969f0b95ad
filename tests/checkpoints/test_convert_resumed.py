"""A conversion that ended in any operation is resumed to the same bytes; other folders stay."""

# SPDX-License-Identifier: Apache-2.0
import errno
import os
import resource
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoint_cases import apart, bytes_of, ordinary, weights, write
from convert_cases import QWEN, assert_converted, by_layer, source
from paths import ROOT, SUPPORT
from safetensors.torch import load_file, save_file

from nvfp4_moe.checkpoints import (
    CheckpointError,
    convert,
    load_experts,
    resumable_writer,
)
from nvfp4_moe.cli.convert import RECIPES


class Killed(BaseException):
    """An exception that no handler of errors catches."""


def kill(monkeypatch, name: str, at: int, half: bool = False) -> None:
    """End at the `at`-th call of a function of the workspace, or (half) in the middle of it."""
    original, calls = getattr(resumable_writer, name), iter(range(10**6))

    def dying(*arguments):
        if next(calls) == at:
            if half:
                original(*arguments)
                part = arguments[1]
                part.write_bytes(part.read_bytes()[:-100])
            raise Killed
        return original(*arguments)

    monkeypatch.setattr(resumable_writer, name, dying)


@pytest.fixture(scope="module")
def three_shards(tmp_path_factory):
    """A source of three shards, and the files of its conversion in one go."""
    folder = tmp_path_factory.mktemp("convert")
    source(folder / "src", split=by_layer)
    convert(folder / "src", folder / "whole")
    return folder / "src", bytes_of(folder / "whole")


@pytest.mark.parametrize("shard", [0, 1, 2])
@pytest.mark.parametrize("how", ["inside a shard", "before the name"])
def test_an_interrupted_conversion_resumes(how, shard, three_shards, tmp_path, monkeypatch):
    given, whole = three_shards
    dst = tmp_path / "dst"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        if how == "before the name":
            kill(patch, "_sync", 2 + 4 * shard)  # two each of the record and of a shard
        else:
            kill(patch, "save_file", shard, half=True)
        convert(given, dst)
    assert not (dst / "model.safetensors.index.json").exists()
    with pytest.raises(CheckpointError):
        load_experts(dst, 0)
    written = []
    real = resumable_writer.save_file
    monkeypatch.setattr(
        resumable_writer, "save_file", lambda *a: (written.append(a[1].name), real(*a))
    )
    convert(given, dst)
    assert bytes_of(dst) == whole
    assert len(written) == 3 - shard


def test_killed_at_every_operation_on_a_file(tmp_path):
    tensors = ordinary(QWEN, 0, weights(sizes=(32, 16)))
    write(tmp_path / "src", apart(tensors), dict(QWEN.config))
    (tmp_path / "src" / "more").mkdir()
    (tmp_path / "src" / "more" / "a.py").write_text("pass\n")
    paths = os.pathsep.join(map(str, (ROOT, SUPPORT)))
    ran = subprocess.run(
        [sys.executable, SUPPORT / "convert_kills.py", tmp_path / "src", tmp_path / "made"],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    operations = Counter(ran.stdout.split())
    assert set(operations) == {
        "fsync",
        "open",
        "os.mkdir",
        "os.remove",
        "os.rename",
        "shutil.copyfile",
    }
    assert operations["os.rename"] == 9 and operations["fsync"] > 18


def unfinished(given: Path, dst: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill(patch, "save_file", 2)
        convert(given, dst)


def test_a_finished_shard_is_known_by_its_content(three_shards, tmp_path, monkeypatch):
    given, whole = three_shards
    dst = tmp_path / "dst"
    unfinished(given, dst, monkeypatch)
    first = dst / "model-00001-of-00003.safetensors"
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    first.write_bytes(content)
    convert(given, dst)
    assert bytes_of(dst) == whole


def test_other_settings_or_sources_make_every_shard_anew(three_shards, tmp_path, monkeypatch):
    given, _ = three_shards
    dst = tmp_path / "dst"
    unfinished(given, dst, monkeypatch)
    recipe = RECIPES["exact-4over6-256-mse"]
    convert(given, dst, recipe=recipe)
    convert(given, tmp_path / "straight", recipe=recipe)
    assert bytes_of(dst) == bytes_of(tmp_path / "straight")

    made = source(tmp_path / "src", split=by_layer)
    unfinished(tmp_path / "src", tmp_path / "again", monkeypatch)
    shard = tmp_path / "src" / "model-00001-of-00003.safetensors"
    tensors = {n: t.clone() for n, t in load_file(shard).items()}
    name = f"{QWEN.of(0)}.0.up_proj.weight"
    tensors[name] = -tensors[name]
    save_file(tensors, shard, {"format": "pt"})
    convert(tmp_path / "src", tmp_path / "again")
    up = made[0].up.clone()
    up[0] = -up[0]
    assert_converted(tmp_path / "again", QWEN, {0: replace(made[0], up=up)})


def test_the_table_of_a_resumed_conversion_is_whole(three_shards, tmp_path, monkeypatch):
    given, _ = three_shards
    unfinished(given, tmp_path / "dst", monkeypatch)
    resumed = convert(given, tmp_path / "dst")
    assert resumed == convert(given, tmp_path / "straight")


def test_a_destination_that_is_not_ours_is_left_alone(three_shards, tmp_path):
    given, _ = three_shards
    convert(given, tmp_path / "dst")
    before = bytes_of(tmp_path / "dst")
    with pytest.raises(CheckpointError, match="it is complete"):
        convert(given, tmp_path / "dst")
    assert bytes_of(tmp_path / "dst") == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("dear")
    with pytest.raises(CheckpointError, match="neither empty nor an unfinished conversion"):
        convert(given, tmp_path / "other")
    for inside in (given, given / "dst"):
        with pytest.raises(CheckpointError, match="it is inside the source"):
            convert(given, inside)


def test_what_an_unfinished_conversion_left_is_tidied(three_shards, tmp_path, monkeypatch):
    """An index beside a record, temporary files, and files that the source has no more."""
    given, whole = three_shards
    shutil.copytree(given, tmp_path / "src")
    (tmp_path / "src" / "more").mkdir()
    (tmp_path / "src" / "more" / "old.txt").write_text("old")
    dst = tmp_path / "dst"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill(patch, "_remove", 0)
        convert(tmp_path / "src", dst)
    assert (dst / "model.safetensors.index.json").exists() and (
        dst / resumable_writer.RECORD
    ).exists()
    for path in (dst / resumable_writer.PART, dst / "more" / resumable_writer.PART):
        path.write_text("half")
    (tmp_path / "src" / "more" / "old.txt").unlink()
    monkeypatch.setattr(resumable_writer, "save_file", lambda *a: pytest.fail("a shard again"))
    convert(tmp_path / "src", dst)
    assert bytes_of(dst) == whole


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[" * 100_000,
        '{"identity": 1, "names": [], "shards": []}',
        '{"identity": "a", "names": ["../precious.txt"], "shards": {}}',
        '{"identity": "a", "names": ["/precious.txt"], "shards": {}}',
        '{"identity": "a", "names": [], "shards": {"m": {"sha256": "a", "facts": {"e": {"up": [1]}}}}}',
    ],
)
def test_a_damaged_record_is_refused(content, three_shards, tmp_path):
    given, _ = three_shards
    (tmp_path / "precious.txt").write_text("dear")
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / resumable_writer.RECORD).write_text(content)
    before = bytes_of(tmp_path)
    with pytest.raises(CheckpointError, match=r"nvfp4-moe-convert\.json is damaged: "):
        convert(given, tmp_path / "dst")
    assert bytes_of(tmp_path) == before


@pytest.mark.parametrize("name", ["save_file", "sha256", "_sync", "_make_folder"])
def test_a_full_disk_is_one_error_and_the_conversion_is_resumed(
    name, three_shards, tmp_path, monkeypatch
):
    given, whole = three_shards
    dst = tmp_path / "dst"

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")

    with monkeypatch.context() as patch:
        patch.setattr(resumable_writer, name, full)
        with pytest.raises(CheckpointError) as e:
            convert(given, dst)
    (problem,) = e.value.problems
    assert problem.endswith(
        "it cannot be written: No space left on device; called again, the conversion is resumed"
    )
    convert(given, dst)
    assert bytes_of(dst) == whole


def test_a_limit_of_the_system_on_files_is_one_error(three_shards, tmp_path):
    given, whole = three_shards
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(
            CheckpointError, match=r"model-00001-of-00003\.safetensors: it cannot be wr"
        ):
            convert(given, tmp_path / "dst")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    convert(given, tmp_path / "dst")
    assert bytes_of(tmp_path / "dst") == whole


def test_a_destination_that_cannot_be_a_folder(three_shards, tmp_path):
    given, _ = three_shards
    (tmp_path / "file").write_text("dear")
    for place in (tmp_path / "file", tmp_path / "file" / "dst"):
        with pytest.raises(CheckpointError, match="it cannot be written"):
            convert(given, place)
    assert bytes_of(tmp_path) == {"file": b"dear"}
