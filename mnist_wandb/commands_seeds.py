"""`run --seeds N`: several seeds of one configuration."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from mnist_wandb.config import RunConfig
from mnist_wandb.errors import ConfigError
from mnist_wandb.loading import ResolvedConfig
from mnist_wandb.options import EXIT_DONE, EXIT_FAILED
from mnist_wandb.settings import Launch, Settings
from mnist_wandb.signals import EXIT_INTERRUPTED, StopSignals

SeedsOption = Annotated[
    int | None,
    typer.Option(metavar="N", help="Run N seeds (seed, seed+1, …) as one group of N runs."),
]
TOGETHER = ("auto", "yes", "no")
TogetherOption = Annotated[
    str | None,
    typer.Option(
        metavar="auto|yes|no",
        help="With --seeds: train the seeds as one batched model; auto: where it is faster.",
    ),
]


def check_seed_options(
    seeds: int | None, together: str | None, *, resume: str | None, launch: Launch | None
) -> None:
    """Refuse what does not go together.

    Raises:
        ConfigError: with the option, and what to do.
    """
    if together is not None and together not in TOGETHER:
        raise ConfigError(f"--together: got {together!r}, allowed: {', '.join(TOGETHER)}")
    if together is not None and seeds is None:
        raise ConfigError("--together: says how several seeds are trained; add --seeds N")
    if seeds is not None and launch is not None:
        raise ConfigError(
            f"--seeds: torchrun has started {launch.size} processes for one run; start this without"
            " torchrun, or run each seed by itself with seed=N"
        )
    if seeds is not None and resume is not None:
        raise ConfigError(
            "--seeds: a run is continued with its own seed; leave out --seeds, and continue each"
            " run by itself"
        )


def describe_seeds(
    config: RunConfig, seeds: int, together: str | None, plan: Any, num_parameters: int
) -> dict[str, Any]:
    """What `--dry-run` says about the seeds."""
    from mnist_wandb.seeds import choose_together

    chosen, reason = choose_together(together or "auto", config, plan, num_parameters)
    return {
        "runs": seeds,
        "seeds": list(range(config.seed, config.seed + seeds)),
        "group": config.tracking.group,
        "together": chosen and seeds > 1,
        "together_reason": reason,
    }


def seed_lines(facts: Mapping[str, Any]) -> dict[str, str]:
    """The same for people, by title."""
    seeds = facts["seeds"]
    how = "together" if facts["together"] else "one after the other"
    names = f"seeds {seeds[0]} to {seeds[-1]}, {how} ({facts['together_reason']})"
    if len(seeds) == 1:
        names = f"seed {seeds[0]}"
    return {"runs": f"{facts['runs']}: {names}", "group": facts["group"]}


def train_seeds(
    resolved: ResolvedConfig,
    settings: Settings,
    seeds: int,
    together: str,
    words: Sequence[str],
    *,
    as_json: bool,
    quiet: bool,
) -> int:
    """Run the seeds, show what they say together, return the exit code.

    Args:
        resolved: the first seed's configuration.
        settings: the surroundings.
        seeds: how many.
        together: auto | yes | no.
        words: the command line without the options of this module, to name what is left to do.
        as_json: one JSON object instead of tables.
        quiet: no progress.
    """
    stop = StopSignals()
    stop.install()
    # From here on torch and W&B are needed.
    from mnist_wandb.display import TrainingDisplay, make_console, print_seeds, show_log_lines
    from mnist_wandb.experiment import python_command
    from mnist_wandb.seeds import run_seeds

    messages = make_console(stderr=True)
    show_log_lines(messages, quiet=quiet)
    epochs = resolved.config.training.epochs
    with TrainingDisplay(messages, epochs=epochs, quiet=quiet) as display:
        result = run_seeds(
            resolved.config,
            settings,
            seeds,
            together=together,
            preset=resolved.preset,
            command=python_command(),
            emit=display.show,
            should_stop=stop.is_asked_for,
        )
    if as_json:
        typer.echo(json.dumps(result.as_json(), allow_nan=False))
    else:
        print_seeds(make_console(), result)
    lines = result.next_commands(
        [*words, *(["--together", together] if together != "auto" else [])]
    )
    for line in lines:
        (messages if as_json else make_console()).print(line)
    if result.status == "interrupted":
        return EXIT_INTERRUPTED + (stop.received or signal.SIGTERM)
    return EXIT_DONE if result.status == "finished" else EXIT_FAILED
