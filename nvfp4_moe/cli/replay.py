"""`nvfp4-moe replay`: run the failing case of a file again."""

# SPDX-License-Identifier: Apache-2.0
import argparse
import json
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from .. import files
from ..differential import own_backend
from ..exits import CommandError, Exit
from ..failures import replay
from ..failures.replay_file import Failure, QuantizerFailure, ReplayFileError, load
from ..report.parts import MOE, QUANTIZERS


def run(options: argparse.Namespace) -> Exit:
    files.check_safetensors("FILE", options.file)
    if options.json not in (None, "-"):
        files.check_file("--json", options.json)
    try:
        with _own_backend(failure := load(options.file), options.backend):
            result = replay.replay(failure, options.backend)
    except (ReplayFileError, replay.UnknownBackendError) as error:
        raise CommandError(str(error)) from None
    except replay.CannotRunError as error:
        hint = f". On a machine where it can, the file {options.file} is all that replay needs"
        raise CommandError(f"{error}{hint}", Exit.NOT_RUN) from None
    print(result.text, file=sys.stderr if options.json == "-" else sys.stdout)
    if options.json:
        text = json.dumps({"differs": result.differs, **result.facts}, indent=1)
        print(text) if options.json == "-" else Path(options.json).write_text(text + "\n", "utf-8")
    return Exit.DIFFERENCE if result.differs else Exit.DONE


def _own_backend(failure: Failure, name: str | None) -> AbstractContextManager[object]:
    """Within, a backend that is named as module:function is known.

    A file's own text never names the module: to run a file runs no code but ours.
    """
    if name is None or ":" not in name or name.startswith("flashinfer:"):
        return nullcontext()
    part = QUANTIZERS if isinstance(failure, QuantizerFailure) else MOE
    return own_backend.register(name, part.operation)
