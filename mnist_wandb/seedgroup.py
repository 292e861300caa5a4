"""Several seeds of one configuration as a group: which runs, and what they say together."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mnist_wandb.compare import COMPLETE, is_lower_better
from mnist_wandb.config import RunConfig
from mnist_wandb.errors import ConfigError
from mnist_wandb.records import flatten, is_studied
from mnist_wandb.runs import RunSummary, slug
from mnist_wandb.settings import Settings
from mnist_wandb.significance import Sample, describe_sample

LARGEST_SEED = 2**32 - 1
DIGEST_LENGTH = 8


@dataclass(frozen=True)
class SeedsResult:
    """What `run_seeds` leaves for the caller.

    Attributes:
        group: name of the W&B group.
        seeds: asked for.
        runs: summaries of those that have begun, in the order of `seeds`.
        is_stopped: whether it was asked to stop before the last one was done.
    """

    group: str
    seeds: tuple[int, ...]
    runs: tuple[RunSummary, ...]
    is_stopped: bool = False

    @property
    def status(self) -> str:
        """One of finished, interrupted, failed (at least one seed has failed or diverged)."""
        if self.is_stopped:
            return "interrupted"
        return "finished" if all(run.status in COMPLETE for run in self.runs) else "failed"

    @property
    def metrics(self) -> dict[str, Sample]:
        """Mean, standard deviation and interval of each final value over the complete runs."""
        values: dict[str, list[float]] = {}
        for run in self.runs:
            if run.status in COMPLETE:
                for name, value in run.metrics.items():
                    values.setdefault(name, []).append(value)
        return {
            name: describe_sample(found, lower_is_better=is_lower_better(name))
            for name, found in values.items()
        }

    def as_json(self) -> dict[str, Any]:
        """What `run --seeds N --json` prints and the group's file holds."""
        names = ("mean", "std", "low", "high", "n")
        return {
            "status": self.status,
            "group": self.group,
            "seeds": list(self.seeds),
            "runs": [asdict(run) for run in self.runs],
            "metrics": {
                name: {key: getattr(sample, key) for key in names}
                for name, sample in self.metrics.items()
            },
        }

    def next_commands(self, words: Sequence[str]) -> list[str]:
        """How to go on: what continues each interrupted run, and what runs the seeds left.

        Args:
            words: the command line without `--seeds N`.
        """
        lines = [
            f"go on       mnist-wandb run --resume {shlex.quote(run.run_dir)}"
            for run in self.runs
            if run.status == "interrupted"
        ]
        left = self.seeds[len(self.runs) :]
        if left:
            command = shlex.join([*words, f"seed={left[0]}", "--seeds", str(len(left))])
            lines.append(f"then        {command}")
        lines.append(f"together    mnist-wandb compare {shlex.quote(self.group)}")
        return lines


def seed_configs(config: RunConfig, num_seeds: int, settings: Settings) -> tuple[RunConfig, ...]:
    """The configurations of `num_seeds` runs: seeds from `config.seed` on, in one W&B group.

    The group is `tracking.group`, else the run's name and a digest of the settings that decide what
    is learned, so that more seeds of them join it later.

    Raises:
        ConfigError: fewer than one seed, seeds beyond the largest one, or a W&B agent's run.
    """
    if num_seeds < 1:
        raise ConfigError(f"--seeds: got {num_seeds}, allowed: 1 or more")
    last = config.seed + num_seeds - 1
    if last > LARGEST_SEED:
        raise ConfigError(f"--seeds: the last seed would be {last}, the largest is {LARGEST_SEED}")
    if settings.wandb_run_id is not None or settings.sweep_id is not None:
        variable = "WANDB_RUN_ID" if settings.wandb_run_id is not None else "WANDB_SWEEP_ID"
        raise ConfigError(
            f"--seeds: {variable} is set, which stands for one run; make seed a parameter of the"
            " sweep instead"
        )
    group = config.tracking.group or _group_name(config)
    tracking = config.tracking.model_copy(update={"group": group})
    return tuple(
        config.model_copy(update={"seed": seed, "tracking": tracking})
        for seed in range(config.seed, last + 1)
    )


def _group_name(config: RunConfig) -> str:
    settings = flatten(config.model_dump(mode="json"))
    studied = {key: value for key, value in settings.items() if is_studied(key)}
    digest = hashlib.sha256(json.dumps(studied, sort_keys=True).encode()).hexdigest()
    return f"{slug(config.run_name)}-{digest[:DIGEST_LENGTH]}"
