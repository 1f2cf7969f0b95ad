"""Conversion by many threads, a piece at a time: the same bytes and errors, in bounded memory."""

# SPDX-License-Identifier: Apache-2.0
import threading

import pytest
import torch
from checkpoint_cases import bytes_of, ordinary, weights, write
from convert_cases import QWEN, by_layer, source
from memory_meter import MemoryMeter

from nvfp4_moe.checkpoints import convert, quantized_matrix
from nvfp4_moe.checkpoints.convert import estimate_seconds
from nvfp4_moe.checkpoints.folder import Folder
from nvfp4_moe.checkpoints.quantized_matrix import quantize_into, room_for
from nvfp4_moe.checkpoints.source import Matrix, open_source
from nvfp4_moe.checkpoints.workers import Workers, places_of
from nvfp4_moe.reference.recipe import Recipe
from nvfp4_moe.reference.weights.prepare import quantize_weight

CPU = torch.device("cpu")


@pytest.fixture
def threads():
    """Sets the number of torch's threads, for the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_the_bytes_do_not_depend_on_threads_and_pieces(tmp_path, threads, monkeypatch):
    source(tmp_path / "src", split=by_layer)
    threads(1)
    errors = convert(tmp_path / "src", tmp_path / "whole")
    monkeypatch.setattr(quantized_matrix, "_ON_CPU", 300)  # 3 rows
    pieces = []
    real = quantized_matrix.quantize_weight
    monkeypatch.setattr(
        quantized_matrix,
        "quantize_weight",
        lambda w, *rest: (pieces.append((len(w), threading.get_ident())), real(w, *rest))[1],
    )
    for count in (1, 5):
        threads(count)
        found = convert(tmp_path / "src", tmp_path / f"by {count}")
        assert bytes_of(tmp_path / f"by {count}") == bytes_of(tmp_path / "whole")
        for one, other in zip(found, errors, strict=True):
            assert one.relative() == pytest.approx(other.relative(), rel=1e-6)
    assert (
        max(rows for rows, _ in pieces) <= 6 and threading.get_ident() not in dict(pieces).values()
    )


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_the_error_is_right_for_weights_of_any_size(size):
    g = torch.Generator().manual_seed(1)
    w = torch.randn((33, 64), generator=g, dtype=torch.float32, device="cpu") * size
    amax = w.abs().amax()
    (room,) = room_for([Matrix("m", 0, "down", "m.0.down_proj", None, None, *w.shape)])
    squares = quantize_into(room, w, float(amax), Recipe("exact"))
    codes, scales, decode = quantize_weight(w, amax, Recipe("exact"))
    assert torch.equal(room.codes, codes) and torch.equal(room.scales, scales)
    assert torch.equal(room.decode, decode)
    signal = float(w.double().square().sum())
    assert squares.weights == pytest.approx(signal, rel=1e-5)
    assert 0.07 < (squares.error / signal) ** 0.5 < 0.12


def test_temporaries_are_of_a_piece():
    """However large the matrix is, and no more than 64 bytes for an element of a piece."""
    peaks = []
    for rows in (1024, 4096):
        w = torch.ones((rows, 512), dtype=torch.bfloat16, device="cpu")
        (room,) = room_for([Matrix("m", 0, "down", "m.0.down_proj", None, None, *w.shape)])
        with MemoryMeter() as meter:
            quantize_into(room, w, 1.0, Recipe("exact"))
        peaks.append(meter.peak)
    assert peaks[1] <= 64 * quantized_matrix._ON_CPU and peaks[1] < 1.1 * peaks[0]


def test_a_thread_has_a_device_and_one_thread_of_torch(threads):
    threads(3)
    assert places_of(CPU) == [CPU] * 3
    with Workers(places_of(CPU)) as workers:
        here = threading.get_ident()

        def work(device, item):
            assert threading.get_ident() != here and torch.get_num_threads() == 1
            return device, item

        assert list(workers.map(work, range(20))) == [(CPU, i) for i in range(20)]
        with pytest.raises(ZeroDivisionError):
            list(workers.map(lambda device, item: 1 // item, [1, 0, 1]))
    assert torch.get_num_threads() == 3
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [3]


def test_a_gpu_without_a_number_is_every_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    assert places_of(torch.device("cuda"))[:4] == [first, second] * 2
    assert set(places_of(second)) == {second}


def test_progress_begins_when_all_is_checked(tmp_path):
    write(tmp_path / "src", [ordinary(QWEN, 0, weights())], dict(QWEN.config))
    seen = []
    convert(tmp_path / "src", tmp_path / "dst", progress=lambda *step: seen.append(step))
    total = seen[0][1]
    assert [done for done, _, _ in seen] == list(range(total + 1))
    assert {of for _, of, _ in seen} == {total} and seen[-1][2].startswith(QWEN.of(0))


def test_a_trial_writes_nothing_and_scales_with_the_source(tmp_path, monkeypatch):
    source(tmp_path / "src", split=by_layer)
    plan = open_source(Folder(tmp_path / "src"), ())
    clock = iter(range(100))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    assert estimate_seconds(plan, Recipe("exact"), CPU) > 1
    assert [p.name for p in tmp_path.iterdir()] == ["src"]
