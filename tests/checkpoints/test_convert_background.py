"""A shard is written while the next one is quantized: one at a time, and no error is lost."""

# SPDX-License-Identifier: Apache-2.0
import errno
import os
import threading
import time

import pytest
import torch
from checkpoint_cases import bytes_of
from convert_cases import by_layer, source
from safetensors.torch import load_file, save_file

from nvfp4_moe.checkpoints import CheckpointError, convert, resumable_writer
from nvfp4_moe.checkpoints.background import Background
from nvfp4_moe.checkpoints.folder import Folder
from nvfp4_moe.checkpoints.source import open_source


def test_calls_follow_one_another_in_one_thread():
    seen = []

    def call(number):
        seen.append((number, "begins", threading.get_ident()))
        time.sleep(0.01)
        seen.append((number, "ends", threading.get_ident()))

    with Background() as background:
        for number in range(3):
            background.start(call, number)
    assert [s[:2] for s in seen] == [(n, e) for n in range(3) for e in ("begins", "ends")]
    assert len({s[2] for s in seen}) == 1 and threading.get_ident() not in {s[2] for s in seen}


class Interrupt(BaseException):
    """An interrupt, as of a keyboard."""


def fail(kind):
    raise kind("of the call")


@pytest.mark.parametrize("kind", [OSError, Interrupt])
def test_the_error_of_a_call_is_raised(kind):
    for following in (lambda b: b.start(len, ()), lambda b: b.wait(), lambda b: None):
        with pytest.raises(kind, match="of the call"), Background() as background:
            background.start(fail, kind)
            following(background)


def test_the_error_that_came_first_goes_before():
    with pytest.raises(OSError, match="of the call"), Background() as background:
        background.start(fail, OSError)
        raise ValueError("later")
    with pytest.raises(ValueError, match="alone"), Background() as background:
        background.start(len, ())
        raise ValueError("alone")
    with pytest.raises(Interrupt, match="of the user"), Background() as background:
        background.start(fail, OSError)
        raise Interrupt("of the user")


def shard_sizes(path) -> list[int]:
    """The number of matrices in each shard."""
    plan = open_source(Folder(path), ())
    counts = dict.fromkeys(plan.folder.shards, 0)
    for name, matrices in plan.matrices.items():
        counts[plan.folder.shard_of[name]] += len(matrices)
    return list(counts.values())


def test_a_shard_is_written_while_the_next_one_and_no_other_is_quantized(tmp_path, monkeypatch):
    source(tmp_path / "src", split=by_layer)
    sizes = shard_sizes(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "whole")
    done, progressed, real = [0], threading.Condition(), resumable_writer.save_file
    found = []

    def progress(count, total, what):
        with progressed:
            done[0] = count
            progressed.notify_all()

    def save(*arguments):
        after_next = sum(sizes[: len(found) + 2])
        with progressed:
            overlaps = progressed.wait_for(lambda: done[0] >= after_next, timeout=60)
        time.sleep(0.1)
        found.append((overlaps, done[0] == after_next))
        real(*arguments)

    monkeypatch.setattr(resumable_writer, "save_file", save)
    convert(tmp_path / "src", tmp_path / "dst", progress=progress)
    assert found == [(True, True)] * len(sizes)
    assert bytes_of(tmp_path / "dst") == bytes_of(tmp_path / "whole")


def test_an_error_of_the_next_shard_leaves_this_one_finished(tmp_path, monkeypatch):
    """A full disk, which came before it, is told first."""
    source(tmp_path / "src", split=by_layer)
    place = sorted((tmp_path / "src").glob("*.safetensors"))[1]
    tensors = load_file(place)
    name = next(name for name in tensors if ".experts." in name and name.endswith("weight"))
    tensors[name] = torch.full_like(tensors[name], torch.nan)
    save_file(tensors, place, {"format": "pt"})

    def slow(*arguments):
        time.sleep(0.5)
        real(*arguments)

    real = resumable_writer.save_file
    monkeypatch.setattr(resumable_writer, "save_file", slow)
    with pytest.raises(CheckpointError, match="it has NaN or infinite values"):
        convert(tmp_path / "src", tmp_path / "dst")
    assert [p.name for p in (tmp_path / "dst").glob("*.safetensors")] == [
        "model-00001-of-00003.safetensors"
    ]

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(resumable_writer, "save_file", full)
    with pytest.raises(CheckpointError, match="cannot be written: No space left on device"):
        convert(tmp_path / "src", tmp_path / "full")


def test_inference_mode_of_the_caller(tmp_path):
    source(tmp_path / "src", split=by_layer)
    convert(tmp_path / "src", tmp_path / "whole")
    with torch.inference_mode():
        convert(tmp_path / "src", tmp_path / "dst")
    assert bytes_of(tmp_path / "dst") == bytes_of(tmp_path / "whole")
