"""Says in a server's own log, once in a process, that its plug-in is active."""

# SPDX-License-Identifier: Apache-2.0
import functools
import logging

from .. import __version__


@functools.cache
def say_active(server: str, version: str, how: str) -> None:
    """Log a line at INFO, by a logger below the server's, whose level and handlers it has.

    Args:
        server: the name of its package, and of its logger.
        version: the one that is installed.
        how: the choice of the user that the plug-in serves.
    """
    log = logging.getLogger(f"{server}.nvfp4_moe")
    log.info("nvfp4-moe %s is active in %s %s: %s", __version__, server, version, how)
