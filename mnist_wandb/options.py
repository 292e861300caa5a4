"""What several commands share: options, arguments, exit codes."""

from __future__ import annotations

from typing import Annotated

import typer

from mnist_wandb.loading import preset_names

EXIT_DONE, EXIT_FAILED, EXIT_BAD_INPUT = 0, 1, 2
WITH_OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}


def _complete_preset(incomplete: str) -> list[str]:
    return [name for name in preset_names() if name.startswith(incomplete)]


ConfigOption = Annotated[
    str | None,
    typer.Option(
        "--config",
        "-c",
        metavar="NAME|FILE",
        help="Preset name or YAML file; default: quickstart.",
        autocompletion=_complete_preset,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="RUN|CHECKPOINT|ARTIFACT",
        help="Run folder, its id, or latest; a .pt file; or entity/project/name:alias in W&B.",
    ),
]
