"""Imports all that a trial needs; for the process that workers are forked from, or a worker itself.

Temporary files of that process and of its workers go into one folder, which is removed at the end,
also of workers that were killed.
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator

from mnist_wandb.signals import exit_at_once

PR_SET_PDEATHSIG = 1
"""See prctl(2): the signal that this process gets when its parent has ended."""
LATE_IMPORTS = (
    "numpy.random",
    "opentelemetry.exporter.otlp.proto.http._log_exporter",
    "opentelemetry.exporter.otlp.proto.http.metric_exporter",
    "PIL.ImageSequence",
    "PIL.PngImagePlugin",
    "requests",
    "torch.nested._internal.nested_tensor",
    "wandb.sdk.artifacts._internal_artifact",
)
"""What numpy, torch and W&B would import in a worker's first trial."""
ENDING_SIGNALS = (signal.SIGTERM, signal.SIGHUP)

_OWNER = os.getpid()
_folder: str | None = None


def remove_temporary_files() -> None:
    """Remove the folder for temporary files, if this is the process that has made it."""
    if _folder is not None and os.getpid() == _OWNER:
        shutil.rmtree(_folder, ignore_errors=True)


def _leave(*_: object) -> None:
    if os.getpid() == _OWNER:
        remove_temporary_files()
        exit_at_once(0)


@contextlib.contextmanager
def _ending_with_parent() -> Iterator[None]:
    """End where the parent ends; else a pipe that both write to would stay open for seconds."""
    libc = ctypes.CDLL(None)
    for number in ENDING_SIGNALS:
        signal.signal(number, _leave)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    try:
        yield
    finally:
        libc.prctl(PR_SET_PDEATHSIG, 0)  # its workers then outlive their parent a little
        for number in ENDING_SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # its end is that of a pipe to them all
    atexit.register(_leave)


_is_worker = multiprocessing.parent_process() is not None
if not _is_worker:
    sys.path[:] = filter(None, sys.path)  # not the working folder, whatever lies there
with contextlib.nullcontext() if _is_worker else _ending_with_parent():
    _folder = tempfile.mkdtemp(prefix="mnist-wandb-")
    tempfile.tempdir = _folder  # before W&B asks for its place

    gc.disable()  # what is imported stays
    import mnist_wandb.experiment  # noqa: F401

    for name in LATE_IMPORTS:
        with contextlib.suppress(ImportError):  # with another version it only takes longer
            importlib.import_module(name)
    gc.freeze()  # so that the workers go on sharing its memory
    gc.enable()
