"""Run several seeds of one configuration, one after the other or as one batched model."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch

from mnist_wandb.config import RunConfig
from mnist_wandb.data import Splits, load_dataset
from mnist_wandb.device import Plan, choose_plan
from mnist_wandb.ensemble import pays, train_together, why_apart
from mnist_wandb.errors import MnistWandbError, TrackingError
from mnist_wandb.experiment import (
    describe_environment,
    open_folder,
    run_experiment,
    write_checkpoint,
)
from mnist_wandb.models import build_model, count_parameters
from mnist_wandb.runs import Confusion, Recorder, RunFolder, RunSummary, slug
from mnist_wandb.seedgroup import SeedsResult, seed_configs
from mnist_wandb.settings import Settings, choose_wandb_mode
from mnist_wandb.tracking import probe_server
from mnist_wandb.train import CheckpointReady, Event, Logged, Validated, check_batches

log = logging.getLogger(__name__)


def run_seeds(
    config: RunConfig,
    settings: Settings,
    num_seeds: int,
    *,
    together: str = "auto",
    preset: str = "",
    command: Sequence[str] = (),
    emit: Callable[[Event], None] = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> SeedsResult:
    """Run the seeds `config.seed` to `config.seed + num_seeds - 1`, each an ordinary run.

    The data set is loaded once. A seed that fails or diverges is recorded, the others still run. In
    the runs folder, `<time>-<group>.seeds.json` has what `SeedsResult.as_json` gives.

    Args:
        config: a validated configuration.
        settings: the surroundings; see `load_settings`.
        num_seeds: at least 1.
        together: `yes` trains the seeds as one batched model where that comes to the results of
            separate runs (see `ensemble.why_apart`), `auto` where it is faster, too; `no` trains
            them one after the other, to the very numbers of separate runs.
        preset: where the configuration is from.
        command: command line, for the record.
        emit: gets the events of the seed that is trained; of the first one of several.
        should_stop: asked after each step; true ends the run under way as `interrupted`.

    Returns:
        The summaries, with mean, deviation and interval of their final values.

    Raises:
        ConfigError: the seeds are not allowed, or the configuration does not fit the data.
        MnistWandbError: the first run could not begin; nothing is left behind.
    """
    configs = seed_configs(config, num_seeds, settings)
    group = str(configs[0].tracking.group)
    plan = choose_plan(config)
    log.info("device: %s (%s)", plan.device, plan.reason)
    splits = load_dataset(config.data, data_dir=settings.data_dir, device=plan.device)
    check_batches(config, len(splits.train))
    runs = _Runs(configs, settings, splits, preset, command, emit, should_stop)
    chosen, reason = choose_together(together, config, plan, _num_parameters(config, splits))
    if num_seeds > 1:
        how = "together" if chosen else "one after the other"
        log.info("%d seeds in group %s: %s (%s)", num_seeds, group, how, reason)
        if chosen:
            _check_server(config, settings)
            runs.train_together(plan)
    summaries, is_stopped = runs.run_all()
    seeds = tuple(config.seed for config in configs)
    result = SeedsResult(group, seeds, summaries, is_stopped)
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{slug(group)}.seeds.json"
    RunFolder(settings.runs_dir).write_json(name, result.as_json())
    return result


def choose_together(
    together: str, config: RunConfig, plan: Plan, num_parameters: int
) -> tuple[bool, str]:
    """Whether the seeds train together, and the reason in a few words."""
    if together == "no":
        return False, "--together no"
    reason = why_apart(config, plan)
    if reason is not None:
        return False, reason
    return (True, "--together yes") if together == "yes" else pays(config, plan, num_parameters)


def _check_server(config: RunConfig, settings: Settings) -> None:
    """Refuse before training, as a single run does, where W&B must be online and is not there."""
    mode, _ = choose_wandb_mode(config, settings)
    if mode == "online" and "online" in (config.tracking.mode, settings.wandb_mode):
        try:
            probe_server(settings.wandb_base_url)
        except OSError as error:
            raise TrackingError(
                f"W&B could not start (online): {error}; set tracking.mode=offline to record here"
                " and upload later"
            ) from None


def _num_parameters(config: RunConfig, splits: Splits) -> int:
    with torch.device("meta"):
        model = build_model(config.model, splits.image_shape, len(splits.class_names))
    return count_parameters(model)


class _Runs:
    """The runs of the seeds.

    Training together leaves the run folders as if each run had been killed after its last
    checkpoint. So `run_experiment` goes on with each: it scores the test split, sends what is
    recorded to W&B and writes the summary; a seed that has diverged or was left over continues.
    """

    def __init__(
        self,
        configs: Sequence[RunConfig],
        settings: Settings,
        splits: Splits,
        preset: str,
        command: Sequence[str],
        emit: Callable[[Event], None],
        should_stop: Callable[[], bool],
    ) -> None:
        self.configs, self.settings, self.splits = configs, settings, splits
        self.preset, self.command = preset, command
        self.emit, self.should_stop = emit, should_stop
        self.records: list[_Record] = []

    # ── Together.

    def train_together(self, plan: Plan) -> None:
        """Train all seeds as one batched model, recorded in their run folders."""
        shape, num_classes = self.splits.image_shape, len(self.splits.class_names)
        models = [
            build_model(config.model, shape, num_classes, seed=config.seed)
            for config in self.configs
        ]
        with ExitStack() as stack:
            size = count_parameters(models[0])
            for config in self.configs:
                manager = open_folder(config, self.settings, self.preset, None, size)
                folder = stack.enter_context(manager)
                facts = describe_environment(
                    config, plan, self.splits, self.settings, self.preset, self.command
                )
                seeds = [config.seed for config in self.configs]
                folder.write_environment({**facts, "trained_together": seeds})
                self.records.append(_Record(folder, len(self.configs)))
            log.info("the progress shown is that of seed %d", self.configs[0].seed)
            try:
                train_together(
                    models,
                    self.splits,
                    self.configs,
                    plan=plan,
                    emit=self.record,
                    should_stop=self.should_stop,
                )
            except (MnistWandbError, torch.OutOfMemoryError) as error:
                # Each run goes on from its last checkpoint, or fails with a summary of its own.
                reason = str(error).splitlines()[0]
                log.warning("not together any more, one after the other (%s)", reason)

    def record(self, position: int, event: Event) -> None:
        """Put an event of a seed into its run folder."""
        self.records[position].take(event)
        if position == 0:
            self.emit(event)

    # ── One after the other.

    def run_all(self) -> tuple[tuple[RunSummary, ...], bool]:
        """Run each seed, or what is left to do of it; returns summaries and whether stopped."""
        summaries: list[RunSummary] = []
        for position, config in enumerate(self.configs):
            # Asked before the first training, a stop would pass for one within it.
            if position and not self.records and self.should_stop():
                return tuple(summaries), True
            log.info("seed %d (%d of %d)", config.seed, position + 1, len(self.configs))
            summaries.append(self.run_one(position, config))
        is_stopped = any(summary.status == "interrupted" for summary in summaries)
        return tuple(summaries), is_stopped

    def run_one(self, position: int, config: RunConfig) -> RunSummary:
        """Run one seed to its summary, however that goes."""
        record = self.records[position] if self.records else None
        try:
            return run_experiment(
                config,
                self.settings,
                preset=self.preset,
                resume=None if record is None else record.folder,
                splits=self.splits,
                confusions=None if record is None else record.confusions,
                command=self.command,
                emit=self.emit,
                should_stop=self.should_stop,
            ).summary
        except MnistWandbError as error:
            if isinstance(error.summary, RunSummary):
                return error.summary  # the run has said why
            if position == 0 and record is None:
                raise  # it could not begin, and neither could the others
            return self.failed(config, record, str(error), str(error))
        except Exception as error:  # one seed's bug must not end the others
            text = f"{type(error).__name__}: {error}"
            return self.failed(config, record, text, traceback.format_exc())

    def failed(
        self, config: RunConfig, record: _Record | None, error: str, details: str
    ) -> RunSummary:
        """Say what has gone wrong, and make the summary of a run that has left none."""
        log.error("seed %d: %s", config.seed, details)
        if record is not None:
            log.error("go on with `mnist-wandb run --resume %s`", record.folder.path)
        return RunSummary(
            status="failed",
            run_dir="" if record is None else str(record.folder.path),
            name=config.run_name,
            preset=self.preset,
            seed=config.seed,
            device=config.device,
            num_parameters=_num_parameters(config, self.splits),
            epochs=0,
            steps=0,
            training_seconds=0.0,
            total_seconds=0.0,
            images_per_second=0.0,
            error=error,
        )


class _Record:
    """What one seed of several that train together leaves in its run folder."""

    def __init__(self, folder: RunFolder, num_seeds: int) -> None:
        self.folder, self.num_seeds = folder, num_seeds
        self.recorder = Recorder(folder)
        self.confusions: dict[int, Confusion] = {}
        self.started = time.perf_counter()

    def take(self, event: Event) -> None:
        """Record one event of training."""
        match event:
            case Logged(step, epoch, values):
                self.recorder.log(step, epoch, values)
            case Validated(step, _, result, improved) if improved:
                self.confusions[step] = result.confusion, result.class_names
            case CheckpointReady(checkpoint, best):
                if checkpoint.training is not None:
                    seconds = (time.perf_counter() - self.started) / self.num_seeds
                    checkpoint.training["total_seconds"] = seconds
                write_checkpoint(self.folder, checkpoint, self.recorder.final, best=best)
