"""The canary: takes rows of a layer's calls, at the first and at every so many, and judges them.

A call outside a CUDA graph is counted in Python, and its rows are copied when it is due. A call that is
captured gets one small kernel behind it, which counts and copies at each replay (`row_samples/`). One
thread reads what was copied and judges it on the CPU. It begins some seconds after the last capture,
since a call to CUDA from another thread can make a capture fail.
"""

# SPDX-License-Identifier: Apache-2.0
import functools
import logging
import os
import queue
import threading
import time
import weakref
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch

from ..exits import Exit
from ..kernels import environment
from ..kernels.moe.api import fused_moe, layer_call
from ..kernels.moe.backends import FUSED_MOE
from ..kernels.moe.call import MoECall
from ..kernels.moe.row_samples.buffer import (
    BEGUN,
    DONE,
    FIRST,
    TOKENS,
    RowBuffer,
    take_rows,
)
from ..reference import checks
from ..reference.weights.experts import Experts
from ..reference.weights.versions import versions
from .copies import beside
from .judge import Alarm, judge
from .sample import Sample, refusal, sample_of, taken_now

MOST_FILES = 12
"""The most replay files that a process writes; later alarms are logged alone."""
QUIET_SECONDS = 5.0
"""The thread leaves the GPU alone for so long after a captured call."""
log = logging.getLogger("nvfp4_moe.canary")


@dataclass
class Counts:
    """Samples so far: all of them, and those that ended in each way."""

    taken: int = 0
    inside: int = 0
    outside: int = 0
    overtaken: int = 0  # weights were written meanwhile: not judged
    missed: int = (
        0  # of replays, the next came before they were read; of calls, the judge was behind
    )
    failed: int = 0  # the judge raised


@dataclass
class _Watch:
    """One layer: the steps that it made outside graphs, and the memory that its replays fill."""

    layer: str
    number: int
    experts: weakref.ref[Experts]
    calls: int = 0
    taken: int = 0
    captures: int = 0
    buffer: RowBuffer | None = None
    template: MoECall | None = None  # of a captured call, without its tensors and its experts
    backend: str = ""
    seen: int = 0  # samples of replays
    written: list[int] = field(default_factory=list)  # versions of the weights when last looked


class Canary:
    """Watches the layers that call the fused experts through it.

    Every layer's first call is judged; then, every `every` steps, `rows` rows of one layer, in turn. A
    step is one call of each layer. Nothing is judged within the call.

    Args:
        every: steps between two samples, at least 1.
        rows: of a call, at least 1; the first of them differs from sample to sample.
        folder: of replay files; None: none are written.
        fatal: an alarm ends the process with exit status 1. Otherwise it is logged, as an error of the
            logger "nvfp4_moe.canary".
        layers_per_graph: layers that a CUDA graph watches: each one costs a launch in every replay.
            Graphs that are captured one after another watch different ones.
        poll_seconds: between two looks at what replays have copied.

    Raises:
        TypeError, ValueError: an argument, what was given and what is allowed.
    """

    def __init__(
        self,
        every: int = 1000,
        *,
        rows: int = 1,
        folder: Path | str | None = None,
        fatal: bool = False,
        layers_per_graph: int = 2,
        poll_seconds: float = 1.0,
    ):
        checks.integer("every", every, 1)
        checks.integer("rows", rows, 1)
        checks.flag("fatal", fatal)
        checks.integer("layers_per_graph", layers_per_graph, 1)
        if folder is not None:
            checks.path("folder", folder)
        self.every, self.rows, self.fatal = every, rows, fatal
        self.folder = None if folder is None else Path(folder)
        self.layers_per_graph, self.poll_seconds = layers_per_graph, poll_seconds
        self.counts = Counts()
        self.alarms: list[Alarm] = []
        """The first alarms, at most `MOST_FILES`."""
        self._watches: dict[int, _Watch] = {}
        self._queue: queue.Queue[tuple[Sample, Any]] = queue.Queue()
        self._judging = threading.RLock()
        self._thread: threading.Thread | None = None
        self._captured_at = -QUIET_SECONDS
        log.info("on: a layer every %d steps, %d rows; files in %s", every, rows, self.folder)

    def fused_moe(
        self,
        hidden_states: torch.Tensor,
        experts: Experts,
        routing: tuple[torch.Tensor, torch.Tensor],
        *,
        layer: str = "layer",
        **options: Any,
    ) -> torch.Tensor:
        """`nvfp4_moe.fused_moe`, watched.

        Args:
            hidden_states: [T, H] bf16.
            experts: must live as long as the layer: a new object is a new layer.
            routing: (ids int32 [T, K], weights bf16 or fp32 [T, K]).
            layer: its name, for messages and files.
            options: as for `fused_moe`, but `stats`.

        Returns:
            [T, H], the bits of `fused_moe` of the same arguments.

        Raises:
            What `fused_moe` raises. An alarm raises nothing.
        """
        if options.get("stats"):
            checks.wrong_value("stats", True, "False in a layer that is watched")
        output = fused_moe(hidden_states, experts, routing, **options)
        if torch.compiler.is_compiling() or len(hidden_states) == 0:
            return output
        watch = self._watch(experts, layer)
        captured = hidden_states.is_cuda and torch.cuda.is_current_stream_capturing()
        if self._captures(watch) if captured else self._is_due(watch):
            # Checked again, for the few calls of which rows are taken: the others may be repeated
            # from a record.
            call, backend = layer_call(hidden_states, experts, routing, **options)
            if (reason := refusal(call)) is not None:
                _warn(watch.layer, reason)
            elif captured:
                self._capture(watch, call, backend, output)
            else:
                self._take(watch, call, backend, output)
        return output

    def poll(self) -> None:
        """Read what replays have copied since the last time, and judge it, in this thread.

        It does not wait for replays that still run.
        """
        for watch in list(self._watches.values()):
            if watch.template is not None:
                with self._judging:
                    self._poll(watch)

    def wait(self) -> None:
        """Wait until every sample has been judged, also those of replays that still run."""
        self._queue.join()
        if any(watch.template is not None for watch in self._watches.values()):
            torch.cuda.synchronize()
        self.poll()

    def _watch(self, experts: Experts, layer: str) -> _Watch:
        key = id(experts)
        watch = self._watches.get(key)
        if watch is None or watch.experts() is not experts:
            number = len(self._watches)
            name = layer if layer != "layer" else f"layer {number}"
            reference = weakref.ref(experts, lambda _: self._watches.pop(key, None))
            watch = self._watches[key] = _Watch(name, number, reference)
        return watch

    def _is_due(self, watch: _Watch) -> bool:
        """Count a call; True for the first, and once in as many samples as there are layers."""
        layers, calls = len(self._watches), watch.calls
        watch.calls += 1
        return not calls or calls % (self.every * layers) == self.every * (watch.number % layers)

    def _captures(self, watch: _Watch) -> bool:
        """Count a captured call; True if this graph watches the layer."""
        self._captured_at = time.monotonic()
        watch.captures += 1
        return (watch.number + watch.captures - 1) % self._apart() == 0

    def _apart(self) -> int:
        """Return the layers from one that a graph watches to the next."""
        return -(-len(self._watches) // self.layers_per_graph)

    def _take(self, watch: _Watch, call: MoECall, backend: str, output: torch.Tensor) -> None:
        """Copy rows of a call that was made outside a graph, for the thread to judge."""
        if watch.buffer is None and call.device.type == "cuda":
            watch.buffer = self._allocate(call, output)
        if self._queue.qsize() >= len(self._watches):
            self.counts.missed += 1
            return
        name = FUSED_MOE.resolve(call, backend)
        sample = taken_now(watch.layer, call, name, output, watch.taken, self.rows)
        watch.taken += 1
        event = None
        if call.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
        self.counts.taken += 1
        self._queue.put((sample, event))
        self._start()

    def _allocate(self, call: MoECall, output: torch.Tensor) -> RowBuffer:
        """Allocate memory for the layer's replays, and compile the kernel that fills it."""
        tensors = _tensors(call, output)
        buffer = RowBuffer.like(self.rows, *tensors)
        take_rows(buffer, tensors, 1, 0)
        buffer.counts.zero_()
        return buffer

    def _capture(self, watch: _Watch, call: MoECall, backend: str, output: torch.Tensor) -> None:
        """Put the kernel behind the captured call."""
        tensors = _tensors(call, output)
        if watch.buffer is None or any(
            a.shape[1] != b.shape[1] or a.dtype != b.dtype
            for a, b in zip(watch.buffer.rows, tensors, strict=True)
        ):
            _warn(watch.layer, "it was captured before a call like it outside a graph")
            return
        apart = self._apart()
        period = self.every * -(-len(self._watches) // apart)
        take_rows(watch.buffer, tensors, period, self.every * (watch.number // apart) % period)
        # Without the graph's own tensors, whose memory would otherwise be kept.
        watch.template = replace(
            call,
            activations=cast(Any, None),
            ids=None,
            weights=None,
            experts=cast(Any, None),
            output=None,
        )
        watch.backend = FUSED_MOE.resolve(call, backend)
        watch.written = versions(call.experts)
        self._start()

    def _poll(self, watch: _Watch) -> None:
        """Judge a new sample of a layer's replays, if all of it is there."""
        experts, buffer, template = watch.experts(), watch.buffer, watch.template
        if experts is None or buffer is None or template is None:
            return
        with beside(buffer.counts.device):
            counts = buffer.counts.tolist()
            done = counts[DONE]
            if done == watch.seen or counts[BEGUN] != done:
                return
            tensors = tuple(t.cpu() for t in buffer.rows)
            if buffer.counts.tolist()[BEGUN] != done:
                return  # the next sample came meanwhile; the next look finds it
        self.counts.taken += 1
        self.counts.missed += done - watch.seen - 1
        watch.seen = done
        before, watch.written = watch.written, versions(experts)
        if before != watch.written:
            self.counts.overtaken += 1  # nobody knows of which weights it is
            return
        tokens, first = counts[TOKENS], counts[FIRST]
        rows = [(first + i) % tokens for i in range(min(self.rows, tokens))]
        tensors = tuple(t[: len(rows)] for t in tensors)
        call = replace(template, experts=experts)
        sample = sample_of(watch.layer, call, watch.backend, rows, tensors, tokens, watch.written)
        self._judge(sample, None)

    def _start(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._work, name="nvfp4-moe canary", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        while True:
            try:
                sample, event = self._queue.get(timeout=self.poll_seconds)
            except queue.Empty:
                self._rest()
                self.poll()
                continue
            try:
                self._rest()
                self._judge(sample, event)
            finally:
                del sample, event  # or the layer would live until the next one
                self._queue.task_done()

    def _rest(self) -> None:
        while (left := self._captured_at + QUIET_SECONDS - time.monotonic()) > 0:
            time.sleep(left)

    def _judge(self, sample: Sample, event: Any) -> None:
        with self._judging:
            try:
                with beside(sample.call.experts.gemm1_weights.device, event):
                    alarm = judge(sample)
                # Asked last: a write is counted after its kernels have been launched.
                if sample.overtaken:
                    self.counts.overtaken += 1
                elif alarm is None:
                    self.counts.inside += 1
                else:
                    self._report(alarm)
            except Exception:  # a judge that cannot judge must not end a server
                self.counts.failed += 1
                log.exception("%s could not be judged", sample.layer)

    def _report(self, alarm: Alarm) -> None:
        self.counts.outside += 1
        again = ""
        if len(self.alarms) < MOST_FILES:
            self.alarms.append(alarm)
            if self.folder is not None:
                try:
                    again = f"; nvfp4-moe replay {alarm.write(self.folder, len(self.alarms))}"
                except OSError as error:
                    again = f"; no replay file: {error}"
        log.error("wrong output: %s%s", alarm, again)
        if self.fatal:
            log.critical("the process ends, as it was told for a wrong output")
            logging.shutdown()
            os._exit(Exit.DIFFERENCE)


@functools.cache
def _of_process(every: int, folder: Path | None, fatal: bool) -> Canary:
    return Canary(every, folder=folder, fatal=fatal)


def from_environment() -> Canary | None:
    """Return the process's canary as NVFP4_MOE_CANARY and its like say; None: it is off.

    Raises:
        ValueError: a variable's value.
    """
    every = environment.canary_steps()
    if every is None:
        return None
    return _of_process(every, environment.canary_folder(), environment.canary_fatal())


def _tensors(call: MoECall, output: torch.Tensor) -> tuple[torch.Tensor, ...]:
    assert call.ids is not None and call.weights is not None, "refused otherwise"
    return call.activations.hidden_states, call.ids, call.weights, output


@functools.lru_cache(maxsize=256)
def _warn(layer: str, reason: str) -> None:
    """Log that a layer is not watched, once for each reason."""
    log.warning("%s is not watched: %s", layer, reason)
