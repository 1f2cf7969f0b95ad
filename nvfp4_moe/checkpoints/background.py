"""Runs one call at a time in a thread, beside the work of the caller."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any


class Background:
    """A thread for calls one after the other. It ends with the context, after its last call.

    An error of a call is raised by the next `start` or `wait`, or at the end of the context. There it
    goes before an error of the context's own, which happened later; an interrupt goes before it.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._last: Future[Any] | None = None

    def start(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Wait for the call before, then start this one."""
        self.wait()
        self._last = self._pool.submit(function, *arguments)

    def wait(self) -> None:
        """Wait for the last call, and raise its error."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def __enter__(self) -> "Background":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None or isinstance(error, Exception):
                self.wait()
        finally:
            self._pool.shutdown()
