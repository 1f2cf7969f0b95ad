"""Conversion by many workers, a piece at a time: the same bytes and errors, in bounded memory."""

# SPDX-License-Identifier: Apache-2.0
import errno
import os
import resource
import signal
import threading
import time

import pytest
import torch
from checkpoint_cases import bytes_of, ordinary, weights, write
from convert_cases import QWEN, by_layer, source
from memory_meter import MemoryMeter

from nvfp4_moe import host
from nvfp4_moe.checkpoints import (
    CheckpointError,
    convert,
    processes,
    quantized_matrix,
)
from nvfp4_moe.checkpoints.convert import estimate_seconds
from nvfp4_moe.checkpoints.folder import Folder
from nvfp4_moe.checkpoints.quantized_matrix import bytes_for, quantize_into, room_at
from nvfp4_moe.checkpoints.source import Matrix, open_source
from nvfp4_moe.checkpoints.workers import are_processes, places_of, start_workers
from nvfp4_moe.reference.recipe import Recipe
from nvfp4_moe.reference.weights.prepare import quantize_weight

CPU = torch.device("cpu")


@pytest.fixture
def threads():
    """Sets the number of torch's threads, for the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=["processes", "threads"])
def kind(request, monkeypatch):
    """Chooses the workers of the CPU."""
    if request.param == "threads":
        monkeypatch.setattr(processes, "POSSIBLE", False)
    elif not processes.POSSIBLE:
        pytest.skip("processes are forked on Linux alone")
    return request.param


def room_for(rows: int, columns: int) -> quantized_matrix.Quantized:
    matrix = Matrix("m", 0, "down", "m.0.down_proj", None, None, rows, columns)
    memory = torch.empty(bytes_for(matrix), dtype=torch.uint8, device="cpu")
    return room_at(memory, 0, matrix)


def test_the_bytes_do_not_depend_on_workers_and_pieces(kind, tmp_path, threads, monkeypatch):
    source(tmp_path / "src", split=by_layer)
    threads(1)
    errors = convert(tmp_path / "src", tmp_path / "whole")
    monkeypatch.setattr(quantized_matrix, "_ON_CPU", 300)  # 3 rows
    real, here = quantized_matrix.quantize_weight, (os.getpid(), threading.get_ident())

    def of_a_worker(w, *rest):
        assert len(w) <= 6 and (os.getpid(), threading.get_ident()) != here
        return real(w, *rest)

    monkeypatch.setattr(quantized_matrix, "quantize_weight", of_a_worker)
    for count in (1, 5):
        threads(count)
        found = convert(tmp_path / "src", tmp_path / f"by {count}")
        assert bytes_of(tmp_path / f"by {count}") == bytes_of(tmp_path / "whole")
        for one, other in zip(found, errors, strict=True):
            assert one.relative() == pytest.approx(other.relative(), rel=1e-6)
    monkeypatch.setattr(quantized_matrix, "_ON_CPU", 1 << 20)
    with pytest.raises(AssertionError):
        convert(tmp_path / "src", tmp_path / "whole pieces")


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_the_error_is_right_for_weights_of_any_size(size):
    g = torch.Generator().manual_seed(1)
    w = torch.randn((33, 64), generator=g, dtype=torch.float32, device="cpu") * size
    amax = w.abs().amax()
    room = room_for(*w.shape)
    (squares,) = quantize_into([room], [w], float(amax), Recipe("exact"))
    codes, scales, decode = quantize_weight(w, amax, Recipe("exact"))
    assert torch.equal(room.codes, codes) and torch.equal(room.scales, scales)
    assert torch.equal(room.decode, decode)
    signal = float(w.double().square().sum())
    assert squares.weights == pytest.approx(signal, rel=1e-5)
    assert 0.07 < (squares.error / signal) ** 0.5 < 0.12


@pytest.mark.parametrize("piece, calls", [(6 * 64, 1), (6 * 64 - 1, 3), (64, 6)])
def test_matrices_that_fit_into_a_piece_are_joined(piece, calls, monkeypatch):
    g = torch.Generator().manual_seed(2)
    weights = [
        torch.randn((rows, 64), generator=g, dtype=torch.float32, device="cpu")
        for rows in (2, 1, 3)
    ]
    amax = max(float(w.abs().amax()) for w in weights)
    apart = [room_for(*w.shape) for w in weights]
    expected = [
        quantize_into([room], [w], amax, Recipe("exact"))[0]
        for room, w in zip(apart, weights, strict=True)
    ]
    real, seen = quantized_matrix.quantize_weight, []
    monkeypatch.setattr(
        quantized_matrix, "quantize_weight", lambda w, *rest: (seen.append(w), real(w, *rest))[1]
    )
    monkeypatch.setattr(quantized_matrix, "_ON_CPU", piece)
    rooms = [room_for(*w.shape) for w in weights]
    found = quantize_into(rooms, weights, amax, Recipe("exact"))
    assert len(seen) == calls
    for room, other in zip(rooms, apart, strict=True):
        assert all(map(torch.equal, room, other))
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-6)
    mixed = [weights[0], weights[1].bfloat16()]
    quantize_into(rooms[:2], mixed, amax, Recipe("exact"))
    codes, scales, _ = real(mixed[1], host.fp32(amax), Recipe("exact"))
    assert torch.equal(rooms[1].codes, codes) and torch.equal(rooms[1].scales, scales)


def test_temporaries_are_of_a_piece():
    """However large the matrix is, and no more than 64 bytes for an element of a piece."""
    peaks = []
    for rows in (1024, 4096):
        w = torch.ones((rows, 512), dtype=torch.bfloat16, device="cpu")
        room = room_for(*w.shape)
        with MemoryMeter() as meter:
            quantize_into([room], [w], 1.0, Recipe("exact"))
        peaks.append(meter.peak)
    assert peaks[1] <= 64 * quantized_matrix._ON_CPU and peaks[1] < 1.1 * peaks[0]


def test_a_worker_has_a_device_and_one_thread_of_torch(kind, threads):
    threads(3)
    assert places_of(CPU) == [CPU] * 3 and are_processes([CPU]) == (kind == "processes")
    here = os.getpid(), threading.get_ident()

    def work(device, item):
        worker = os.getpid(), threading.get_ident()
        return device, item, worker != here, torch.get_num_threads(), 1 // item

    with start_workers(places_of(CPU), work) as workers:
        found = list(workers.map(range(1, 20)))
        assert found == [(CPU, i, True, 1, 1 // i) for i in range(1, 20)]
        assert list(workers.map([])) == []
        with pytest.raises(ZeroDivisionError):
            list(workers.map([1, 0, 1]))
    assert torch.get_num_threads() == 3
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [3]


linux = pytest.mark.skipif(not processes.POSSIBLE, reason="processes are forked on Linux alone")


class Unsendable(Exception):
    """An error that pickle does not take back."""

    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


@linux
def test_an_error_comes_back_from_a_process():
    errors = {
        "checkpoint": CheckpointError("place", ["one", "two"]),
        "unsendable": Unsendable(1, 2),
    }

    def fail(name):
        raise errors[name]

    for name, expected in (("checkpoint", CheckpointError), ("unsendable", RuntimeError)):
        with processes.Processes(2, fail) as pool, pytest.raises(expected) as e:
            list(pool.map([name]))
        assert str(errors[name]) in str(e.value)
        assert getattr(e.value, "problems", None) == getattr(errors[name], "problems", None)


@linux
def test_processes_end_with_the_context_and_when_their_parent_is_killed():
    def alive(pid):
        try:
            with open(f"/proc/{pid}/stat", encoding="ascii") as file:
                return file.read().rsplit(")", 1)[1].split()[0] != "Z"
        except FileNotFoundError:
            return False

    with processes.Processes(2, lambda _: os.getpid()) as pool:
        pids = set(pool.map(range(6)))
        assert len(pids) == 2 and all(map(alive, pids))
    assert not any(map(alive, pids))

    read, write = os.pipe()
    if (parent := os.fork()) == 0:
        try:
            with processes.Processes(2, lambda _: os.getpid()) as pool:
                os.write(write, repr(set(pool.map(range(6)))).encode())
                time.sleep(60)
        finally:
            os._exit(1)
    pids = set(map(int, os.read(read, 1000).decode().strip("{}").split(",")))
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    os.close(read)
    os.close(write)
    assert len(pids) == 2
    end = time.monotonic() + 20
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.01)
    left = list(filter(alive, pids))
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


@linux
def test_a_process_that_is_ended_is_one_error_and_the_conversion_is_resumed(tmp_path, monkeypatch):
    source(tmp_path / "src", split=by_layer)
    convert(tmp_path / "src", tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(CheckpointError) as e:
        patch.setattr(
            quantized_matrix, "quantize_weight", lambda *a: os.kill(os.getpid(), signal.SIGKILL)
        )
        convert(tmp_path / "src", tmp_path / "dst")
    (problem,) = e.value.problems
    assert problem.startswith("a process that it forked was ended")
    assert problem.endswith("called again, the conversion is resumed")
    convert(tmp_path / "src", tmp_path / "dst")
    assert bytes_of(tmp_path / "dst") == bytes_of(tmp_path / "whole")


@linux
def test_fewer_processes_share_the_work_where_the_system_refuses_more(monkeypatch):
    """A container may allow fewer processes than it has cores."""
    fork, allowed = os.fork, 2

    def limited():
        nonlocal allowed
        if allowed == 0:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        allowed -= 1
        return fork()

    monkeypatch.setattr(os, "fork", limited)
    with processes.Processes(4, lambda item: (item, os.getpid())) as pool:
        found = list(pool.map(range(8)))
    assert [item for item, _ in found] == list(range(8)) and len({pid for _, pid in found}) == 2
    with pytest.raises(BlockingIOError):
        processes.Processes(4, lambda item: item)


@linux
def test_freed_memory_is_kept():
    """A process that gives memory back takes its pages from the kernel anew: 23,020 faults here."""

    def faults(rows):
        w = torch.ones((rows, 512), dtype=torch.bfloat16, device="cpu")
        room = room_for(rows, 512)
        quantize_into([room], [w], 1.0, Recipe("exact"))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        quantize_into([room], [w], 1.0, Recipe("exact"))
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    with processes.Processes(1, faults) as pool:
        (found,) = pool.map([4096])
    assert found < 4096


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
