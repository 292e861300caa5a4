"""What a step as CUDA graphs keeps apart; tests/test_cuda.py has the graphs themselves."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from mnist_wandb.device import choose_plan
from mnist_wandb.loading import load_config
from mnist_wandb.stepgraph import RecordedStep, make_step


class FakeGraph:
    """Repeats what ran while it was recorded, with what its tensors hold by then."""

    def __init__(self) -> None:
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's calls, for the bookkeeping alone: there may be no GPU."""

    @contextmanager
    def record(graph: FakeGraph, **_: Any) -> Iterator[None]:
        assert not gc.isenabled()
        yield

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", record)


@pytest.mark.usefixtures("without_gpu")
def test_each_kind_of_batch_is_computed_then_recorded_then_replayed() -> None:
    computed: list[tuple[int, bool]] = []

    def compute(index: Tensor, lr: float | Tensor, with_norms: bool) -> tuple[Tensor, ...]:
        computed.append((len(index), with_norms))
        results = (index.sum() * lr, index.max())
        return (*results, results[0] * 2) if with_norms else results

    step = RecordedStep(compute, torch.device("cpu"))
    kinds = [(4, False), (4, True), (3, False), (3, True)]
    for kind in kinds:
        for time in range(5):
            step(torch.arange(kind[0]) + time, 0.5 + time, kind[1])
    assert computed == [kind for kind in kinds for _ in range(2)]
    for kind in kinds:
        recording = step.recordings[torch.Size((kind[0],)), kind[1]]
        assert recording is not None
        assert recording.graph.replays == 4
        assert torch.equal(recording.index, torch.arange(kind[0]) + 4)
        assert len(recording.results) == (3 if kind[1] else 2)
    assert float(step.lr) == 4.5
    assert gc.isenabled()


@pytest.mark.usefixtures("without_gpu")
def test_results_of_a_replay_are_not_those_of_the_next() -> None:
    step = RecordedStep(lambda index, lr, norms: (index.sum(),), torch.device("cpu"))
    index = torch.arange(3)
    for _ in range(2):
        (result,) = step(index, 0.1, False)
    recording = step.recordings[index.shape, False]
    assert recording is not None
    recording.results[0].fill_(99)  # as the next replay does
    assert result.item() == 3


@pytest.mark.usefixtures("without_gpu")
def test_too_little_memory_while_recording_is_said_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def record(graph: FakeGraph, **_: Any) -> Iterator[None]:
        try:
            yield
        finally:  # what torch says when a recording has been broken off
            raise RuntimeError("operation failed due to a previous error during capture")

    def compute(index: Tensor, lr: float | Tensor, with_norms: bool) -> tuple[Tensor, ...]:
        if len(done) == 1:
            raise torch.OutOfMemoryError("too little")
        done.append(index)
        return ()

    done: list[Tensor] = []
    monkeypatch.setattr(torch.cuda, "graph", record)
    step = RecordedStep(compute, torch.device("cpu"))
    step(torch.arange(3), 0.1, False)
    with pytest.raises(torch.OutOfMemoryError, match="too little"):
        step(torch.arange(3), 0.1, False)
    assert gc.isenabled()
    monkeypatch.setattr(step, "step", lambda *_: ())
    with pytest.raises(RuntimeError, match="previous error"):
        step(torch.arange(3), 0.1, False)


def test_a_step_on_a_cpu_stays_as_it_is() -> None:
    plan = choose_plan(load_config("quickstart", ["device=cpu"]))

    def compute(index: Tensor, lr: float | Tensor, with_norms: bool) -> tuple[Tensor, ...]:
        return ()

    assert make_step(compute, plan) is compute
