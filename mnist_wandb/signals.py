"""Ctrl-C and SIGTERM as a wish to stop, so that a run ends with a checkpoint."""

from __future__ import annotations

import _thread
import atexit
import contextlib
import os
import signal
import sys
import threading
import weakref
from types import FrameType

EXIT_INTERRUPTED = 128
"""Plus the signal's number: 130 for Ctrl-C, 143 for SIGTERM."""


PARENT_GRACE_SECONDS = 15.0
"""How long a child may go on to save its work when its parent has been killed."""
REPEAT_SECONDS = 0.2


class StoppedBeforeTraining(BaseException):
    """Ctrl-C or SIGTERM has come before the first step; there is nothing to save."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
        self.caught = threading.Event()

    def exit_code(self) -> int:
        """The exit code for whoever has caught this; the signal is not repeated then."""
        stop: BaseException | None = self
        while stop is not None:  # an earlier one may have been on its way
            if isinstance(stop, StoppedBeforeTraining):
                stop.caught.set()
            stop = stop.__context__
        return EXIT_INTERRUPTED + self.number


class StopSignals:
    """Turns Ctrl-C and SIGTERM into a wish to stop; a second Ctrl-C stops at once.

    Before training has begun, either ends the program at once. (A run that is stopped in the W&B
    app gets SIGTERM from its agent and SIGINT from the client: that is one wish.)

    Args:
        is_silent: say nothing; for one of several processes, which have to agree first.
    """

    def __init__(self, *, is_silent: bool = False) -> None:
        self.is_silent = is_silent
        self.received: int | None = None
        self.interrupts = 0
        self.training = False

    def is_asked_for(self) -> bool:
        """Whether to stop; the first question tells that training has begun."""
        self.training = True
        return self.received is not None

    def install(self) -> None:
        """Handle both signals from now on (not where the caller has them ignored)."""
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if not self.training:
            self.received = number  # ends the run after its first step, should it come to that
            stop = StoppedBeforeTraining(number)
            _repeat_if_dropped(weakref.ref(stop), stop.caught, number)
            try:
                raise stop
            finally:
                del stop  # the traceback holds this frame: a cycle would keep a dropped one alive
        self.interrupts += number == signal.SIGINT
        if self.interrupts > 1:
            os._exit(EXIT_INTERRUPTED + number)  # the last checkpoint is on the disk
        if self.received is not None:
            return
        self.received = number
        if not self.is_silent:
            hint = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
            os.write(2, f"\nstopping after this step, saving a checkpoint{hint}\n".encode())


def _repeat_if_dropped(
    stop: weakref.ref[StoppedBeforeTraining], caught: threading.Event, number: int
) -> None:
    """Send the signal again if the exception goes without having been caught.

    A handler runs between any two byte codes of the main thread. Where those are a finalizer's or
    a weak reference's callback (each import ends with one), Python prints "Exception ignored in"
    and goes on; the wish to stop would be lost, and a start that waits for a server with it.
    """

    def watch() -> None:
        while stop() is not None:
            if caught.wait(REPEAT_SECONDS):
                return
        main = threading.main_thread().ident
        if not caught.is_set() and main is not None:
            signal.pthread_kill(main, number)  # to that thread, whose waiting it interrupts

    _thread.start_new_thread(watch, ())  # `Thread.start` takes a lock that we may be inside of


def exit_at_once(code: int) -> None:
    """End the process without its exit hooks; what it has printed is shown.

    Taking torch down in order, as Python would, takes over a second.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def exit_after_hooks(code: int) -> None:
    """End the process after its exit hooks."""
    atexit._run_exitfuncs()
    exit_at_once(code)


def exit_after_parent() -> None:
    """End this child process soon after its parent has ended, however that went."""
    import multiprocessing  # 20 ms of every command else

    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        threading.Event().wait(PARENT_GRACE_SECONDS)
        os._exit(EXIT_INTERRUPTED + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
