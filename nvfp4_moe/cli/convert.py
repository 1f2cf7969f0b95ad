"""`nvfp4-moe convert`: the experts of a Hugging Face checkpoint to NVFP4, as ModelOpt writes it."""

# SPDX-License-Identifier: Apache-2.0
import json
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

from safetensors import SafetensorError

from .. import files
from ..checkpoints.convert import convert
from ..checkpoints.errors import CheckpointError
from ..checkpoints.layer_error import print_errors
from ..checkpoints.resumable_writer import RECORD
from ..console import progress
from ..exits import CommandError, Exit
from ..reference import checks
from ..reference.recipe import Recipe, all_recipes
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
        with progress.bar("converting", 0):
            errors = convert(
                options.source,
                options.destination,
                recipe=RECIPES[options.recipe],
                exclude=options.exclude,
                input_scale=not options.no_input_scale,
                device=options.device,
                progress=progress.update,
            )
    except CheckpointError as e:
        broke_off = isinstance(e.__cause__, OSError | SafetensorError)
        raise CommandError(e.for_a_terminal(), Exit.BROKEN if broke_off else Exit.USAGE) from None
    print_errors(errors, sys.stdout)
    return Result(Exit.DONE, {"layers": [error.as_dict() for error in errors]})


def left(options: SimpleNamespace) -> str:
    """The state that an interrupt leaves, and how to continue."""
    done = 0
    with suppress(OSError, ValueError, KeyError, TypeError):
        record = json.loads((Path(options.destination) / RECORD).read_bytes())
        done = len(record["shards"])
    shards = f"{done} shard{'' if done == 1 else 's'}"
    return f"{shards} finished in {options.destination}, and the same command goes on from there"
