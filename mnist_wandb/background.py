"""The W&B client's calls in a thread of their own, so that no server holds a run."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from mnist_wandb.errors import TrackingError

FINISH_GRACE_SECONDS = 2.0
"""How much longer than its time limit the client may take at the end."""


class Background:
    """Does the client's calls in a thread of its own, one after the other.

    The client takes plain rows at once and sends them later, but for each table and artifact it
    asks the server first, 19 s long where nothing answers. Training must not wait for that, and
    the program must not at its end: the client's own limit does not hold against every fault (seen
    with endless 500).
    """

    def __init__(self) -> None:
        self.calls: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self._work, name="mnist-wandb-uploads", daemon=True)
        self.thread.start()

    def put(self, call: Callable[[], object]) -> None:
        """Do a call soon; its errors are told by `end`."""
        self.calls.put(call)

    def end(self, timeout: float) -> None:
        """Wait for all calls.

        Raises:
            TrackingError: one has failed, or they take longer than `timeout` seconds.
        """
        self.calls.put(None)
        self.thread.join(timeout + FINISH_GRACE_SECONDS)
        if self.thread.is_alive():
            _hung.append(self)
            note_client_is_busy()
        if self.thread.is_alive() or isinstance(self.error, TimeoutError):
            raise TrackingError(f"the server did not take everything within {timeout:g} s")
        if self.error is not None:
            raise TrackingError(" ".join(str(self.error).split())[:300])

    def _work(self) -> None:
        while (call := self.calls.get()) is not None:
            try:
                call()
            except Exception as error:  # whatever the client raises; told at the end
                self.error = self.error or error
                if isinstance(error, TimeoutError):
                    note_client_is_busy()


_client_is_busy = False
_hung: list[Background] = []


def has_hung_run() -> bool:
    """Whether an earlier run of this process is still being sent."""
    return any(background.thread.is_alive() for background in _hung)


def note_client_is_busy() -> None:
    """Note that the client is still busy: its exit hooks must not run."""
    global _client_is_busy  # noqa: PLW0603 - so is the client and its exit hooks
    _client_is_busy = True


def is_client_busy() -> bool:
    """Whether a server did not answer in time; the client's own exit hooks would wait on for it."""
    return _client_is_busy
