"""A training step as CUDA graphs: a small net's step is mostly launches, and a graph is one."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mnist_wandb.device import Plan

Step = Callable[[Tensor, float, bool], tuple[Tensor, ...]]
"""From int64 indices of a batch, the learning rate, and whether norms are wanted, to the step's
results on the device. It reads nothing back from the device."""
RecordableStep = Callable[[Tensor, float | Tensor, bool], tuple[Tensor, ...]]
"""A step that also takes the learning rate from the device, where a replay finds a new one."""


def make_step(step: RecordableStep, plan: Plan) -> Step:
    """The step itself, or as CUDA graphs where the plan says so."""
    return RecordedStep(step, plan.device) if plan.cuda_graph else step


@dataclass(frozen=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    index: Tensor
    results: tuple[Tensor, ...]


@functools.cache
def _stream_for_recording(device: torch.device) -> torch.cuda.Stream:
    """One for all runs of a process: libraries keep memory for each stream."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class RecordedStep:
    """A step that is computed once for each kind of batch, then recorded, then replayed.

    The first one is computed as it is: cuDNN chooses its algorithms in it and the optimizer makes
    its state, neither of which may be recorded. A replay does the same arithmetic, in the same
    order. Source: "CUDA Graphs" in PyTorch's notes on CUDA semantics.

    Args:
        step: the function to record. All tensors that it reads and changes must stay where they
            are, as long as batches have the same shape.
        device: a CUDA device.
    """

    def __init__(self, step: RecordableStep, device: torch.device) -> None:
        self.step = step
        self.lr = torch.zeros((), device=device)
        self.stream = _stream_for_recording(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.recordings: dict[tuple[torch.Size, bool], _Recording | None] = {}

    def __call__(self, index: Tensor, lr: float, with_norms: bool) -> tuple[Tensor, ...]:
        """Do one step, without waiting for it."""
        self.lr.fill_(lr)
        kind = (index.shape, with_norms)
        if kind not in self.recordings:
            self.recordings[kind] = None
            return self.step(index, self.lr, with_norms)
        recording = self.recordings[kind]
        if recording is None:
            recording = self.recordings[kind] = self.record(index, with_norms)
        recording.index.copy_(index)
        recording.graph.replay()
        return tuple(result.clone() for result in recording.results)

    def record(self, index: Tensor, with_norms: bool) -> _Recording:
        """Record a step on batches of this shape; nothing is computed yet."""
        graph, own_index = torch.cuda.CUDAGraph(), index.clone()
        # A graph of another run that the garbage collector found now would spoil this one.
        collects = gc.isenabled()
        gc.disable()
        try:
            with (
                # Of a device that need not be the process's first; left again whatever happens.
                torch.cuda.stream(self.stream),
                torch.cuda.graph(graph, pool=self.pool, stream=self.stream),
            ):
                results = self.step(own_index, self.lr, with_norms)
        except RuntimeError as error:
            if isinstance(error.__context__, torch.OutOfMemoryError):
                raise error.__context__ from None  # not that the recording has failed, too
            raise
        finally:
            if collects:
                gc.enable()
        return _Recording(graph, own_index, results)
