"""How the worker processes of a sweep start: forked from one that has imported torch, on Linux."""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import signal
import sys
from multiprocessing.context import ForkServerContext, SpawnContext

TEMPLATE = "mnist_wandb.sweep_template"
"""What the process imports that the workers are forked from."""


def start_importing() -> ForkServerContext | SpawnContext:
    """Begin to import what workers need; returns how to start them. More calls do nothing more.

    Importing torch and W&B takes seconds. A worker that is forked from a process that has done so
    starts at once, and shares that process's memory; it has no threads and has not touched a GPU,
    which would not survive the fork. On macOS the system's libraries forbid forking after use.
    """
    if sys.platform == "linux":
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([TEMPLATE])
        # Ctrl-C goes to all processes of a terminal; what it means here is for this one to say.
        multiprocessing.resource_tracker.ensure_running()  # starting it would unblock the signal
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            multiprocessing.forkserver.ensure_running()
        except OSError:  # with a very long TMPDIR, where its socket would be
            pass
        else:
            return context
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return multiprocessing.get_context("spawn")
