"""The commands of the labs: export-images, explore, check, export."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mnist_wandb.errors import ConfigError
from mnist_wandb.loading import load_config
from mnist_wandb.options import (
    EXIT_DONE,
    EXIT_FAILED,
    WITH_OVERRIDES,
    ConfigOption,
    JsonOption,
    ModelArgument,
    QuietOption,
)
from mnist_wandb.settings import load_settings
from mnist_wandb.signals import StoppedBeforeTraining, StopSignals

if TYPE_CHECKING:
    from mnist_wandb.checks import CheckResult

app = typer.Typer()


@app.command("export-images")
def export_images(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make or to complete.")],
    dataset: Annotated[
        str, typer.Option(metavar="NAME", help="Data set to write out, for example fashion_mnist.")
    ] = "mnist",
    workers: Annotated[
        int | None, typer.Option(metavar="N", help="Processes; default: one for each core.")
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Write a data set as numbered PNG files with labels.json, for data.dataset=image_folder."""
    data = load_config(None, [f"data.dataset={dataset}"]).data
    if data.dataset in ("image_folder", "shortcut_mnist"):
        raise ConfigError(
            f"--dataset: got {data.dataset}; allowed are data sets of 28×28 pixels that are not a"
            " folder of pictures already"
        )
    if workers is not None and not 1 <= workers <= 64:
        raise ConfigError(f"--workers: got {workers}, allowed: 1 to 64")
    settings = load_settings()
    StopSignals().install()
    from mnist_wandb.display import CountDisplay, make_console
    from mnist_wandb.folders import write_image_folder
    from mnist_wandb.sources import read_source

    source = read_source(data, settings.data_dir)
    splits = {
        "train": (source.train_images, source.train_labels),
        "test": (source.test_images, source.test_labels),
    }
    counts = {name: len(labels) for name, (_, labels) in splits.items()}
    try:
        with CountDisplay(make_console(stderr=True), "pictures") as display:
            written = write_image_folder(
                out,
                splits,
                source.class_names,
                origin={"dataset": data.dataset, "images": counts},
                num_workers=workers,
                on_progress=display.show,
            )
    except StoppedBeforeTraining as stop:
        typer.echo("stopped; the same command goes on from here", err=True)
        return stop.exit_code()
    total = sum(counts.values())
    facts = {"folder": str(out), "dataset": data.dataset, "images": total, "written": written}
    if as_json:
        typer.echo(json.dumps(facts))
        return EXIT_DONE
    typer.echo(f"{total:,} pictures of {data.dataset} in {out} ({written:,} written now)")
    typer.echo(f"use them    mnist-wandb run data.dataset=image_folder data.dir={out}")
    return EXIT_DONE


@app.command(context_settings=WITH_OVERRIDES)
def explore(
    context: typer.Context,
    config: ConfigOption = None,
    pictures: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where the pictures go; default: its run folder."),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> int:
    """Say and show what is in a data set: [--config NAME|FILE] [section.field=value ...]."""
    settings = load_settings()
    resolved = load_config(config, context.args)
    StopSignals().install()
    from mnist_wandb.display import make_console, print_rows, record_lines, show_log_lines
    from mnist_wandb.explore import run_exploration

    show_log_lines(make_console(stderr=True), quiet=quiet)
    outcome = run_exploration(resolved, settings, pictures_dir=pictures)
    if as_json:
        facts = {
            **asdict(outcome.exploration),
            "folder": str(outcome.folder),
            "pictures": [str(path) for path in outcome.pictures],
            "wandb": outcome.wandb,
        }
        typer.echo(json.dumps(facts))
        return EXIT_DONE
    console = make_console()
    for table in outcome.exploration.tables():
        print_rows(console, table.columns, table.rows, title=table.title)
    for path in outcome.pictures:
        console.print(f"picture     {path}")
    for line in record_lines(outcome.folder, outcome.wandb):
        console.print(line)
    return EXIT_DONE


@app.command(context_settings=WITH_OVERRIDES)
def check(
    context: typer.Context,
    config: ConfigOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> int:
    """Check that a recipe can be trusted: [--config NAME|FILE] [section.field=value ...]."""
    settings = load_settings()
    resolved = load_config(config, context.args)
    StopSignals().install()
    from mnist_wandb.checks import PROTOCOL, results_table, run_checks
    from mnist_wandb.display import make_console, print_rows, record_lines, show_log_lines

    messages = make_console(stderr=True)
    show_log_lines(messages, quiet=quiet)
    outcome = run_checks(
        resolved,
        settings,
        on_result=lambda result: None if quiet else messages.print(_result_line(result)),
    )
    code = EXIT_DONE if outcome.passed else EXIT_FAILED
    if as_json:
        facts = {
            "passed": outcome.passed,
            "protocol": PROTOCOL,
            "results": [asdict(result) for result in outcome.results],
            "folder": str(outcome.folder),
            "wandb": outcome.wandb,
        }
        typer.echo(json.dumps(facts))
        return code
    console = make_console()
    table = results_table(outcome.results)
    print_rows(console, table.columns, table.rows)
    console.print(f"used: {PROTOCOL}")
    for line in record_lines(outcome.folder, outcome.wandb):
        console.print(line)
    return code


def _result_line(result: CheckResult) -> str:
    return f"{'ok' if result.passed else 'FAILED':<7} {result.name}: {result.measured}"


@app.command()
def export(
    model: ModelArgument,
    to: Annotated[
        str, typer.Option("--format", metavar="onnx", help="File format to write.")
    ] = "onnx",
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="File; default: model.onnx of the run."),
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Write a trained model for other programs (needs the extra `onnx`)."""
    if to != "onnx":
        raise ConfigError(f"--format: got {to!r}, allowed: onnx")
    from mnist_wandb.runs import find_checkpoint

    path = find_checkpoint(model, load_settings().runs_dir)
    from mnist_wandb.onnx_export import export_onnx

    default = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    exported = export_onnx(path, out or default / "model.onnx")
    if as_json:
        typer.echo(json.dumps({**asdict(exported), "path": str(exported.path)}))
        return EXIT_DONE
    typer.echo(f"{exported.path} ({exported.num_bytes / 2**20:.1f} MiB, opset {exported.opset})")
    typer.echo(
        f"checked with ONNX Runtime: logits differ by at most {exported.largest_difference:.1e}"
    )
    for key, value in exported.metadata.items():
        typer.echo(f"{key:<20} {value}")
    return EXIT_DONE
