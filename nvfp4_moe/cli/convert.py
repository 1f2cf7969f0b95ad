"""`nvfp4-moe convert`: the experts of a Hugging Face checkpoint to NVFP4, as ModelOpt writes it."""

# SPDX-License-Identifier: Apache-2.0
import json
import shlex
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from safetensors import SafetensorError

from .. import files
from ..checkpoints.convert import convert
from ..checkpoints.disk_space import result_bytes
from ..checkpoints.errors import CheckpointError
from ..checkpoints.folder import Folder
from ..checkpoints.layer_error import print_errors
from ..checkpoints.resumable_writer import RECORD
from ..checkpoints.source import Source, open_source
from ..console import progress
from ..exits import CommandError, Exit
from ..reference import checks
from ..reference.recipe import Recipe, all_recipes
from ..report.tables import count_of
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
    """Says before the first shard is written what will be written, and at the end what was."""

    def __init__(self, plan: Source, options: SimpleNamespace):
        self._plan, self._options = plan, options
        self._start = time.monotonic()
        self._before: int | None = None  # matrices that an earlier call finished

    def step(self, done: int, total: int, what: str) -> None:
        """Take in that a matrix, or a shard of an earlier call, is done (`checkpoints.progress`)."""
        finished_before = what.endswith("was finished before")
        if self._before is None and not finished_before:
            self._before = done - 1
            self._announce(total)
        progress.update(done, total, what)

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
        words = ["python3", "-c", _READ.format(str(self._options.destination), self._first_layer())]
        print(f"next: {shlex.join(words)}")
        return {"source_bytes": source, "written_bytes": written, "seconds": round(seconds, 1)}

    def _announce(self, total: int) -> None:
        """Estimate the time by the first matrix, which has just been made."""
        plan, before = self._plan, self._before or 0
        shards = count_of(len(plan.folder.shards), "shard")
        each = time.monotonic() - self._start
        progress.note(
            f"{count_of(len(plan.layers), 'layer')} with {total - before} matrices become NVFP4 on "
            f"{self._options.device}; {self._options.destination} gets about "
            f"{_gigabytes(result_bytes(plan))} in {shards}, in about "
            f"{_time(each * (total - before))} by the first matrix"
        )

    def _first_layer(self) -> str:
        return self._plan.layers[0].module


_READ = "from nvfp4_moe.checkpoints import load_experts; print(load_experts({!r}, {!r}))"
"""Reads the first layer of the result."""


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
    done = 0
    with suppress(OSError, ValueError, KeyError, TypeError):
        record = json.loads((Path(options.destination) / RECORD).read_bytes())
        done = len(record["shards"])
    shards = f"{done} shard{'' if done == 1 else 's'}"
    return f"{shards} finished in {options.destination}, and the same command goes on from there"
