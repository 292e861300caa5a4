"""The processes that train one run together, one for each device, as `torchrun` starts them.

`Ranks` is a run in one process: nothing in it costs or changes anything. `RankGroup` is one of
several processes. What they do together is decided from reduced values alone, so that all of them
do the same and none waits for the others in vain.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from mnist_wandb import errors
from mnist_wandb.errors import ConfigError, LostProcessError, MnistWandbError
from mnist_wandb.settings import Launch

log = logging.getLogger(__name__)

StepMetrics = tuple[Tensor, Tensor, int]
"""Loss, hits and size of one step's batch."""

COLLECTIVE_SECONDS = 300.0
"""Longest wait for the others in training; only a checkpoint or a first compilation is between."""
SETUP_SECONDS = 3600.0
"""Longest wait for the others before training: one machine may have to download the data."""
AGREE_SECONDS = 1.0
"""About how often the processes agree on whether to stop and to save."""
SPEAK_SECONDS = 3.0
"""How long the first process of a machine has to say what is wrong before another one does."""
POLL_SECONDS = 0.05


class Ranks:
    """A run in one process, which is all of it.

    Attributes:
        rank: number of this process.
        size: number of processes.
    """

    rank = 0
    size = 1

    # ── Before training.

    @contextmanager
    def first_on_machine(self) -> Iterator[None]:
        """Let the first process of each machine go ahead, which downloads what is missing."""
        yield

    def connect(self, device: torch.device, digest: str) -> None:
        """Wait until all are ready, with the same digest of what they train, and join them."""

    def share(self, value: Any = None) -> Any:
        """Give a value of process 0 to all; the others wait for it."""
        return value

    @contextmanager
    def guard(self, run_dir: str) -> Iterator[None]:
        """Turn the loss of another process into one error that says how to go on."""
        yield

    # ── Training.

    def prepare(self, model: nn.Module) -> nn.Module:
        """Change layers whose numbers depend on the whole batch; the parameters stay the same."""
        return model

    def wrap(self, forward: Any, batch_shape: Sequence[int]) -> Any:
        """The model's forward pass whose gradients are averaged over the processes.

        Args:
            forward: the model, maybe compiled.
            batch_shape: of the input of one batch of all processes together.
        """
        return forward

    def take(self, index: Tensor) -> Tensor:
        """This process's part of the index batch of a step; it becomes the batch at hand."""
        return index

    def seed_step(self, seed: int, step: int) -> None:
        """Seed what is drawn in a step, differently in each process."""

    def scale(self, loss: Tensor) -> Tensor:
        """Weight the mean loss of the batch at hand by this process's share of the whole batch.

        Averaged over the processes, as DDP averages gradients, the result is the mean over the
        images of the whole batch.
        """
        return loss

    def weigh(self, loss: Tensor, hits: Tensor, size: int) -> StepMetrics:
        """The metrics of the batch at hand in the form that `reduce` takes."""
        return loss, hits, size

    def reduce(self, pending: list[StepMetrics]) -> list[StepMetrics]:
        """Turn what `weigh` gave in each process into the metrics of the whole batches."""
        return pending

    def agrees_to_stop(self, wish: bool) -> bool:
        """Whether all stop before this step: soon after one of them has the wish to."""
        return wish

    def agrees_to_save(self, wish: bool) -> bool:
        """Whether all save after this step: soon after process 0 has the wish to."""
        return wish

    def sync_buffers(self, model: nn.Module) -> None:
        """Give the model the buffers (running statistics) that it has in process 0."""

    # ── Scoring.

    def part(self, images: Tensor) -> Tensor:
        """The images that this process scores: a slice of (N, …), never empty."""
        return images

    def gather(self, rows: Tensor, total: int) -> Tensor:
        """Put the rows of all processes' `part` together, in the order of one process."""
        return rows


ONE = Ranks()
"""A run without torchrun."""


@contextmanager
def join_ranks(launch: Launch | None) -> Iterator[Ranks]:
    """Meet the other processes of the run; an error inside is told to them.

    Args:
        launch: which process this is; None for the only one.
    """
    if launch is None:
        yield ONE
        return
    group = RankGroup(launch)
    try:
        with group.guard(""):  # inside of it another one knows the run folder
            yield group
    except BaseException as error:
        group.announce(error)
        raise
    if dist.is_initialized():  # after an error it would wait for those who are gone
        dist.destroy_process_group()


def share_cores(launch: Launch | None) -> None:
    """Divide the cores among the processes of a machine, unless the user has chosen."""
    if launch is not None and not launch.has_chosen_threads:
        affinity = getattr(os, "sched_getaffinity", None)  # Linux only
        cores = len(affinity(0)) if affinity else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // launch.local_size))


def _named(prefix: str, store: Any) -> Any:
    """The part of a key-value store whose keys have a prefix."""
    return dist.PrefixStore(prefix, store)  # type: ignore[attr-defined]


_joined = itertools.count()
"""Runs that this process has joined; each has its own names in the store."""


class RankGroup(Ranks):
    """One of several processes.

    Before training they meet in torchrun's key-value store and look into it again and again: a
    signal gets through meanwhile, and no wait ends too early. In training they use collectives,
    Gloo for values on the CPU and NCCL for those on GPUs.
    """

    def __init__(self, launch: Launch) -> None:
        self.launch, self.rank, self.size = launch, launch.rank, launch.size
        self.run_dir = ""
        share_cores(launch)
        timeout = timedelta(seconds=COLLECTIVE_SECONDS)
        try:
            store, _, _ = next(
                rendezvous("env://", rank=launch.rank, world_size=launch.size, timeout=timeout)
            )
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise LostProcessError(
                f"the store of torchrun (MASTER_ADDR, MASTER_PORT) does not answer: {reason}"
            ) from None
        self.store = _named(f"mnist-wandb/{next(_joined)}", store)
        # The batch at hand: its size over all processes, this one's share, and its weight.
        self.batch_size, self.num_taken, self.weight = 0, 0, 0.0
        # What is to be agreed on, and when next.
        self.wishes_to_stop = self.wishes_to_save = False
        self.has_agreed_to_stop = self.has_agreed_to_save = False
        self.interval, self.steps_left = 1, 0
        self.agreed_at = time.perf_counter()

    # ── Before training.

    @contextmanager
    def first_on_machine(self) -> Iterator[None]:
        """See `Ranks.first_on_machine`."""
        key = f"first/{self.launch.machine}"
        if self.launch.local_rank > 0:
            self.wait([key])
        yield
        if self.launch.local_rank == 0:
            self.store.set(key, "done")

    def connect(self, device: torch.device, digest: str) -> None:
        """See `Ranks.connect`.

        Raises:
            ConfigError: another process has another digest.
            LostProcessError: not all have come.
        """
        keys = [f"ready/{rank}" for rank in range(self.size)]
        self.store.set(keys[self.rank], digest)
        self.wait(keys)
        digests = [self.store.get(key) for key in keys]
        for rank, other in enumerate(digests):
            if other != digests[0]:
                raise ConfigError(
                    f"process {rank} has another configuration, other data or another version of"
                    " torch than process 0; start all with the same command and the same files"
                )
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend,
            store=_named("group", self.store),
            rank=self.rank,
            world_size=self.size,
            timeout=timedelta(seconds=COLLECTIVE_SECONDS),
        )
        log.info(
            "%s processes on %s machine(s), %s: threads of each here: %s",
            self.size, self.launch.num_machines, backend.rpartition(":")[2],
            torch.get_num_threads(),
        )  # fmt: skip

    def share(self, value: Any = None) -> Any:
        """See `Ranks.share`."""
        if self.rank == 0:
            self.store.set("shared", "now")
        else:
            self.wait(["shared"])
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def wait(self, keys: list[str]) -> None:
        """Wait until all keys are set.

        Raises:
            MnistWandbError: what another process has failed with.
            LostProcessError: the time is over.
        """
        end = time.monotonic() + SETUP_SECONDS
        while not self.store.check(keys):
            if self.store.check(["error"]):
                raise self.read_error()
            if time.monotonic() > end:
                missing = sum(not self.store.check([key]) for key in keys)
                raise self.lost(f"{missing} of {self.size} processes have not come")
            time.sleep(POLL_SECONDS)

    # ── Errors.

    def announce(self, error: BaseException) -> None:
        """Tell the others why this process ends; the first of them to fail is heard."""
        if isinstance(error, LostProcessError):
            return
        text = str(error) if isinstance(error, MnistWandbError) else type(error).__name__
        with contextlib.suppress(RuntimeError):  # the store may be gone as well
            if self.launch.local_rank == 0:
                self.store.set(f"said/{self.launch.machine}", "done")
            self.store.compare_set("error", "", f"{self.rank}\n{type(error).__name__}\n{text}")

    def read_error(self) -> MnistWandbError:
        """What another process has announced, as an error of the same class."""
        rank, name, text = self.store.get("error").decode().split("\n", 2)
        kind = getattr(errors, name, None)
        if kind is None or not issubclass(kind, MnistWandbError) or kind is errors.DivergedError:
            return self.lost(f"process {rank} has failed ({text})")
        found: MnistWandbError = kind(f"process {rank}: {text}")
        return found

    @contextmanager
    def guard(self, run_dir: str) -> Iterator[None]:
        """See `Ranks.guard`.

        Raises:
            LostProcessError: another process has ended or does not answer.
        """
        self.run_dir = run_dir
        try:
            yield
        except RuntimeError as error:
            # Gloo has no exception of its own; its messages name its source files.
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):
                raise
            raise self.lost(self.find_reason(str(error))) from error

    def find_reason(self, message: str) -> str:
        """Why another process is gone: in its own words where it has left any."""
        with contextlib.suppress(RuntimeError):
            end = time.monotonic() + SPEAK_SECONDS / 3
            while time.monotonic() < end:
                if self.store.check(["error"]):
                    rank, _, text = self.store.get("error").decode().split("\n", 2)
                    return f"process {rank} has failed ({text})"
                time.sleep(POLL_SECONDS)
        if "imed out" in message:
            return f"another of the {self.size} processes has not answered in time"
        return f"another of the {self.size} processes has ended"

    def lost(self, reason: str) -> LostProcessError:
        """The error for a run that others have left; one process of each machine shows it."""
        go_on = f"; go on with `torchrun … -m mnist_wandb run --resume {self.run_dir}`"
        error = LostProcessError(f"{reason}{go_on if self.run_dir else ''}")
        error.speaks = self.launch.local_rank == 0
        key = f"said/{self.launch.machine}"
        with contextlib.suppress(RuntimeError):
            if error.speaks:
                self.store.set(key, "done")
                return error
            end = time.monotonic() + SPEAK_SECONDS
            while time.monotonic() < end:
                if self.store.check([key]):
                    return error
                time.sleep(POLL_SECONDS)
            # The first process is itself the one that is gone: the next one speaks.
            error.speaks = self.store.add(f"speaker/{self.launch.machine}", 1) == 1
        return error

    # ── Training.

    def prepare(self, model: nn.Module) -> nn.Module:
        """Batch normalisation over the whole batch on GPUs; torch has that for GPUs only."""
        if not any(isinstance(module, _BatchNorm) for module in model.modules()):
            return model
        if next(model.parameters()).device.type == "cuda":
            return nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore
        log.warning(
            "batch normalisation uses the statistics of each process's part of the batch on the"
            " CPU: the numbers are not those of one process"
        )
        return model

    def wrap(self, forward: Any, batch_shape: Sequence[int]) -> Any:
        """See `Ranks.wrap`.

        DDP takes the order in which the first backward pass yields gradients for the layout of its
        buckets from the second on, and where a gradient lies decides the order of its additions.
        One pass that changes nothing makes this the same for a new run and a resumed one.
        """
        parameter = next(forward.parameters())
        cuda = parameter.device.type == "cuda"
        wrapped = DistributedDataParallel(forward, [parameter.device] if cuda else None)
        buffers = [(buffer, buffer.clone()) for buffer in forward.buffers()]
        wrapped.train()  # type: ignore[no-untyped-call]
        size = max(1, batch_shape[0] // self.size)
        zeros = torch.zeros(size, *batch_shape[1:], device=parameter.device)
        (wrapped(zeros).sum() * 0).backward()
        for buffer, before in buffers:
            buffer.copy_(before)
        wrapped.zero_grad(set_to_none=True)
        return wrapped

    def take(self, index: Tensor) -> Tensor:
        """See `Ranks.take`; one image of weight 0 where the batch has fewer than processes."""
        part = torch.tensor_split(index, self.size)[self.rank]
        self.batch_size, self.num_taken = len(index), len(part)
        self.weight = self.size * self.num_taken / self.batch_size
        return part if self.num_taken else index[:1]

    def seed_step(self, seed: int, step: int) -> None:
        """See `Ranks.seed_step`; no generator's state has to be saved and brought back."""
        mixed = np.random.SeedSequence((seed, self.rank, step)).generate_state(1, np.uint64)
        torch.manual_seed(int(mixed[0] >> 1))

    def scale(self, loss: Tensor) -> Tensor:
        """See `Ranks.scale`."""
        return loss * self.weight

    def weigh(self, loss: Tensor, hits: Tensor, size: int) -> StepMetrics:
        """See `Ranks.weigh`."""
        return loss * self.weight, hits if self.num_taken else hits * 0, self.batch_size

    def reduce(self, pending: list[StepMetrics]) -> list[StepMetrics]:
        """See `Ranks.reduce`."""
        if not pending:
            return []
        device = pending[0][0].device
        losses = torch.stack([loss for loss, _, _ in pending])
        hits = torch.stack([hits for _, hits, _ in pending])
        mine = torch.stack([losses.double(), hits.double()]).cpu()
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine)
        total = torch.zeros_like(mine)
        for part in parts:  # in this order, whatever the number of steps
            total += part
        losses = (total[0] / self.size).float().to(device)
        hits = total[1].long().to(device)
        sizes = [size for _, _, size in pending]
        return list(zip(losses, hits, sizes, strict=True))

    def agrees_to_stop(self, wish: bool) -> bool:
        """See `Ranks.agrees_to_stop`: asks the others about once in `AGREE_SECONDS`."""
        self.wishes_to_stop |= wish
        self.steps_left -= 1
        if self.steps_left >= 0 or self.has_agreed_to_stop:
            return self.has_agreed_to_stop
        now = time.perf_counter()
        saves = self.wishes_to_save and self.rank == 0
        answers = torch.tensor(
            [self.wishes_to_stop, saves, now - self.agreed_at], dtype=torch.float64
        )
        dist.all_reduce(answers, dist.ReduceOp.MAX)
        stop, save, seconds = answers.tolist()
        self.has_agreed_to_stop, self.has_agreed_to_save = stop > 0, save > 0
        self.wishes_to_save = False
        # The same number everywhere, as it follows from the slowest process's time.
        fitting = int(self.interval * AGREE_SECONDS / max(seconds, 1e-9))
        self.interval = max(1, min(2 * self.interval, fitting))
        self.steps_left, self.agreed_at = self.interval - 1, time.perf_counter()
        if self.has_agreed_to_stop:
            log.info("stopping, saving a checkpoint")
        return self.has_agreed_to_stop

    def agrees_to_save(self, wish: bool) -> bool:
        """See `Ranks.agrees_to_save`."""
        self.wishes_to_save = wish
        agreed, self.has_agreed_to_save = self.has_agreed_to_save, False
        return agreed

    def sync_buffers(self, model: nn.Module) -> None:
        """See `Ranks.sync_buffers`."""
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)

    # ── Scoring.

    def part(self, images: Tensor) -> Tensor:
        """See `Ranks.part`."""
        each = -(-len(images) // self.size)
        part = images[self.rank * each : (self.rank + 1) * each]
        return part if len(part) else images[:1]

    def gather(self, rows: Tensor, total: int) -> Tensor:
        """See `Ranks.gather`; what fills up the last parts is cut off again."""
        each = -(-total // self.size)
        mine = torch.zeros(each, *rows.shape[1:], dtype=rows.dtype, device=rows.device)
        mine[: len(rows)] = rows
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine)
        return torch.cat(parts)[:total]
