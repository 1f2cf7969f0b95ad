"""Python imports this first, in every process that a rehearsed command starts: see `rehearse.py`."""

# SPDX-License-Identifier: Apache-2.0
import os
import runpy
import sys
import traceback
from pathlib import Path

try:
    rehearse = runpy.run_path(str(Path(__file__).resolve().parent.parent / "rehearse.py"))
    rehearse["prepare"](os.environ[rehearse["VARIABLE"]] or None)
except BaseException:  # Python would only print it, and go on without the fake
    traceback.print_exc()
    sys.stderr.flush()
    os._exit(1)
