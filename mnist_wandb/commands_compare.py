"""The commands that look at many runs: compare, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mnist_wandb.config import DEFAULT_METRIC
from mnist_wandb.errors import ConfigError, RunError
from mnist_wandb.options import EXIT_DONE, JsonOption
from mnist_wandb.settings import Settings, load_settings

if TYPE_CHECKING:  # both import NumPy, which `--help` does without
    from mnist_wandb.compare import Comparison

app = typer.Typer()

RunsArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="RUN|FOLDER|SWEEP...",
        help="Runs (folder, id or latest), folders of runs, sweeps by file, name or id (those of an"
        " agent by W&B's id); default: the runs folder.",
        show_default=False,
    ),
]
MetricOption = Annotated[
    str, typer.Option(metavar="NAME", help="Recorded metric to sort by; none of the test split.")
]
GroupByOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY", help="Group by this setting instead of all but the seed (several times)."
    ),
]
PairOption = Annotated[
    tuple[str, str] | None,
    typer.Option(metavar="A B", help="Test these two groups as well, named by letter or by a run."),
]


def _read_comparison(
    settings: Settings,
    runs: list[str] | None,
    metric: str,
    group_by: list[str] | None,
    pair: tuple[str, str] | None,
    wandb: str | None = None,
) -> Comparison:
    from mnist_wandb.compare import compare_runs

    if wandb is not None:
        from mnist_wandb.remote import read_remote_records

        records, left_out = read_remote_records(wandb, settings)
    else:
        from mnist_wandb.records import find_runs, read_records

        folders = find_runs(runs or [str(settings.runs_dir)], settings.runs_dir)
        records, left_out = read_records(folders)
    pairs = () if pair is None else (pair,)
    return compare_runs(
        records, metric=metric, group_by=group_by or (), pairs=pairs, left_out=left_out
    )


@app.command()
def compare(
    runs: RunsArgument = None,
    metric: MetricOption = DEFAULT_METRIC,
    group_by: GroupByOption = None,
    pair: PairOption = None,
    wandb: Annotated[
        str | None,
        typer.Option(
            metavar="ENTITY/PROJECT[/sweeps/ID]",
            help="Take the runs of this project or sweep from W&B, instead of folders.",
        ),
    ] = None,
    as_json: JsonOption = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="One line per group on stdout.")] = False,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="The table of groups alone, as Markdown.")
    ] = False,
) -> int:
    """Compare runs: means over seeds with intervals, and whether differences are real."""
    forms = {"--json": as_json, "--csv": as_csv, "--markdown": as_markdown}
    chosen = [form for form, is_chosen in forms.items() if is_chosen]
    if len(chosen) > 1:
        raise ConfigError(f"{' and '.join(chosen)}: choose one")
    if wandb is not None and runs:
        raise ConfigError(f"--wandb {wandb} and {runs[0]}: choose one, runs in W&B or folders")
    comparison = _read_comparison(load_settings(), runs, metric, group_by, pair, wandb)
    from mnist_wandb.compare import comparison_csv, comparison_json, comparison_markdown
    from mnist_wandb.display import WIDTH_OF_COMPARISONS, make_console, print_comparison

    if as_json:
        typer.echo(json.dumps(comparison_json(comparison), allow_nan=False))
    elif as_csv:
        typer.echo(comparison_csv(comparison), nl=False)
    else:
        if as_markdown:
            typer.echo(comparison_markdown(comparison), nl=False)
        else:
            print_comparison(make_console(width=WIDTH_OF_COMPARISONS), comparison)
        _print_left_out(comparison)
        for warning in comparison.warnings:
            typer.echo(f"warning: {warning}", err=True)
    return EXIT_DONE


def _print_left_out(comparison: Comparison) -> None:
    for item in comparison.left_out:
        typer.echo(f"left out: {item.run}: {item.status}: {item.reason}", err=True)


@app.command()
def report(
    runs: RunsArgument = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="HTML file to write.")
    ] = Path("report.html"),
    metric: MetricOption = DEFAULT_METRIC,
    group_by: GroupByOption = None,
    pair: PairOption = None,
) -> int:
    """Show runs on one HTML page that needs no network: charts, mistakes, tables."""
    if output.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--output {output}: expected a file that ends in .html")
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"--output {output}: there is no folder {output.parent}")
    settings = load_settings()
    comparison = _read_comparison(settings, runs, metric, group_by, pair)
    from mnist_wandb.display import make_console
    from mnist_wandb.report import build_report

    _print_left_out(comparison)
    page = build_report(comparison, data_dir=settings.data_dir)
    temporary = output.with_name(f".{output.name}.tmp")
    try:
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(output)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunError(f"{output}: cannot be written: {error.strerror}") from None
    make_console().print(f"report      {output} ({len(page.encode()) / 2**20:.1f} MiB)")
    return EXIT_DONE
