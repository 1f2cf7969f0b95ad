"""`nvfp4-moe convert`: the experts of a Hugging Face checkpoint to NVFP4, as ModelOpt writes it."""

# SPDX-License-Identifier: Apache-2.0
import json
import shlex
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError

from .. import files
from ..checkpoints.convert import convert, estimate_seconds
from ..checkpoints.disk_space import result_bytes
from ..checkpoints.errors import CheckpointError
from ..checkpoints.folder import Folder
from ..checkpoints.layer_error import print_errors
from ..checkpoints.resumable_writer import RECORD
from ..checkpoints.source import Source, open_source
from ..checkpoints.workers import are_processes, places_of
from ..console import progress
from ..exits import CommandError, Exit
from ..reference import checks
from ..reference.recipe import Recipe, all_recipes
from ..report.data import count_of
from .output import Result

RECIPES: dict[str, Recipe] = {
    str(r).removesuffix("-cuda"): r
    for r in all_recipes()
    if r.math == "exact" and r.build == "cuda"
}


def run(options: SimpleNamespace) -> Result:
    files.check_folder("DST", options.destination)
    try:
        checks.device("--device", options.device)
    except ValueError as e:
        raise CommandError(str(e)) from None
    try:
        plan = open_source(Folder(Path(options.source)), options.exclude)
        work = _Work(plan, options)
        with progress.bar("converting", 0):
            errors = convert(
                options.source,
                options.destination,
                recipe=RECIPES[options.recipe],
                exclude=options.exclude,
                input_scale=not options.no_input_scale,
                device=options.device,
                progress=work.step,
            )
    except CheckpointError as e:
        broke_off = isinstance(e.__cause__, OSError | SafetensorError)
        raise CommandError(e.for_a_terminal(), Exit.BROKEN if broke_off else Exit.USAGE) from None
    print_errors(errors, sys.stdout)
    facts = work.end()
    return Result(Exit.DONE, {**facts, "layers": [error.as_dict() for error in errors]})


class _Work:
    """Says before the conversion what will be written, and at the end what was."""

    def __init__(self, plan: Source, options: SimpleNamespace):
        self._plan, self._options = plan, options
        self._start = time.monotonic()

    def step(self, done: int, total: int, what: str) -> None:
        """Take in how far the conversion is (`checkpoints.progress`)."""
        if done == 0:
            self._announce()
        progress.update(done, total, what)

    def _announce(self) -> None:
        """Print what will be written, where, and how long that takes by a trial."""
        plan, options = self._plan, self._options
        device = torch.device(options.device)
        matrices = [m for found in plan.matrices.values() for m in found]
        finished = _finished_shards(options)
        left = sum(
            m.elements
            for name, found in plan.matrices.items()
            if plan.folder.shard_of[name] not in finished
            for m in found
        )
        seconds = estimate_seconds(plan, RECIPES[options.recipe], device) * left / plan.elements
        shards = count_of(len(plan.folder.shards), "shard")
        before = f", of which {len(finished)} were finished before" if finished else ""
        progress.note(
            f"{count_of(len(plan.layers), 'layer')} with {len(matrices)} matrices become NVFP4 on "
            f"{_named(device)}; {options.destination} gets about {_gigabytes(result_bytes(plan))} in "
            f"{shards}{before}, in about {_time(seconds)} by a trial, and the time of the disk"
        )
        self._start = time.monotonic()

    def end(self) -> dict[str, Any]:
        """Print the summary and the next command; returns the facts for `--json`."""
        seconds = time.monotonic() - self._start
        source, written = (
            _bytes_of(self._plan.folder),
            _bytes_below(Path(self._options.destination)),
        )
        print(
            f"wrote {self._options.destination}: {_gigabytes(written)} from {_gigabytes(source)} in "
            f"{_time(seconds)} ({source / seconds / 1e6:.1f} MB of source a second)"
        )
        names = json.dumps(str(self._options.destination)), json.dumps(self._first_layer())
        words = ["python3", "-c", _READ.format(*names)]
        print(f"next: {shlex.join(words)}")
        return {"source_bytes": source, "written_bytes": written, "seconds": round(seconds, 1)}

    def _first_layer(self) -> str:
        return self._plan.layers[0].module


_READ = "from nvfp4_moe.checkpoints import load_experts; print(load_experts({}, {}))"
"""Reads the first layer of the result."""


def _named(device: torch.device) -> str:
    """Name the places of a conversion."""
    places = Counter(map(str, places_of(device)))
    if device.type == "cpu":
        count = places.total()
        if not are_processes(places_of(device)):
            return f"the CPU in {count_of(count, 'thread')}"
        return f"the CPU in {count:,} process{'es' if count != 1 else ''}"
    return ", ".join(places)


def _bytes_of(folder: Folder) -> int:
    return sum(folder.file_path(shard).stat().st_size for shard in folder.shards)


def _bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def left(options: SimpleNamespace) -> str:
    """The state that an interrupt leaves, and how to continue."""
    shards = count_of(len(_finished_shards(options)), "shard")
    return f"{shards} finished in {options.destination}, and the same command goes on from there"


def _finished_shards(options: SimpleNamespace) -> set[str]:
    """Return the shards that an unfinished conversion recorded as finished."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        record = json.loads((Path(options.destination) / RECORD).read_bytes())
        return set(record["shards"])
    return set()
