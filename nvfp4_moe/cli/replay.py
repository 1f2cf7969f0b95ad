"""`nvfp4-moe replay`: run the failing case of a file again."""

# SPDX-License-Identifier: Apache-2.0
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace

from .. import files
from ..console import progress
from ..differential import own_backend
from ..exits import CommandError, Exit
from ..failures import replay
from ..failures.replay_file import Failure, QuantizerFailure, ReplayFileError, load
from ..report.parts import MOE, QUANTIZERS
from .output import Result


def run(options: SimpleNamespace) -> Result:
    files.check_safetensors("FILE", options.file)
    try:
        with (
            _own_backend(failure := load(options.file), options.backend),
            progress.bar("running the case again"),
        ):
            result = replay.replay(failure, options.backend)
    except (ReplayFileError, replay.UnknownBackendError) as error:
        raise CommandError(str(error)) from None
    except replay.CannotRunError as error:
        hint = f". On a machine where it can, the file {options.file} is all that replay needs"
        raise CommandError(f"{error}{hint}", Exit.NOT_RUN) from None
    print(result.text)
    status = Exit.DIFFERENCE if result.differs else Exit.DONE
    return Result(status, {"differs": result.differs, **result.facts})


def _own_backend(failure: Failure, name: str | None) -> AbstractContextManager[object]:
    """Within, a backend that is named as module:function is known.

    A file's own text never names the module: to run a file runs no code but ours.
    """
    if name is None or ":" not in name or name.startswith("flashinfer:"):
        return nullcontext()
    part = QUANTIZERS if isinstance(failure, QuantizerFailure) else MOE
    return own_backend.register(name, part.operation)
