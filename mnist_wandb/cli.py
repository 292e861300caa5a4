"""The commands; the only place that prints or exits."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from mnist_wandb import __version__, commands_compare, commands_lab
from mnist_wandb.background import note_client_is_busy
from mnist_wandb.commands_seeds import (
    SeedsOption,
    TogetherOption,
    check_seed_options,
    describe_seeds,
    seed_lines,
    train_seeds,
)
from mnist_wandb.commands_sweep import sweep_app
from mnist_wandb.config import RunConfig
from mnist_wandb.errors import ConfigError, DivergedError, LostProcessError, MnistWandbError
from mnist_wandb.loading import (
    PRESETS_DIR,
    ResolvedConfig,
    json_schema,
    override_config,
    preset_names,
    resolve_config,
    settings_table,
    to_yaml,
)
from mnist_wandb.options import (
    EXIT_BAD_INPUT,
    EXIT_DONE,
    EXIT_FAILED,
    WITH_OVERRIDES,
    ConfigOption,
    JsonOption,
    ModelArgument,
    QuietOption,
)
from mnist_wandb.settings import (
    Launch,
    Settings,
    choose_wandb_mode,
    load_launch,
    load_settings,
)
from mnist_wandb.signals import EXIT_INTERRUPTED, StoppedBeforeTraining, StopSignals

if TYPE_CHECKING:
    from mnist_wandb.metrics import EvalResult
    from mnist_wandb.models import LayerRow
    from mnist_wandb.runs import RunFolder

# Newer releases of Typer carry their own copy of click: the class is taken from Typer's.
USAGE_ERROR: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

LINGER_SECONDS = 10.0
"""How long the first process of a machine has to show what is wrong before the others end."""

app = typer.Typer(
    name="mnist-wandb",
    help="Train, track and compare image classifiers on MNIST-like data with Weights & Biases.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    epilog="Exit codes: 0 done, 2 bad input, 1 a run failed or diverged, 130 Ctrl-C, 143 SIGTERM.",
)


app.add_typer(sweep_app, name="sweep")


class _CommandWithSettings(TyperCommand):
    """A command whose help ends with all settings; made when asked for, as it takes a while."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write name, default and documentation of each setting."""
        lines = ["\b", "Settings (section.field=value), defaults in brackets:"]  # \b: not wrapped
        for name, default, description in settings_table():
            lines.append(f"  {name} [{default if len(default) < 24 else '…'}]: {description}")
        self.epilog = "\n".join(lines)
        super().format_epilog(ctx, formatter)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"mnist-wandb {__version__}")
        raise typer.Exit


app.add_typer(commands_compare.app)
app.add_typer(commands_lab.app)


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


# ── run ──────────────────────────────────────────────────────────────────────────────────────


@app.command(context_settings=WITH_OVERRIDES, cls=_CommandWithSettings)
def run(
    context: typer.Context,
    config: ConfigOption = None,
    resume: Annotated[
        str | None,
        typer.Option(metavar="RUN", help="Continue a stopped run (its folder, id, or latest)."),
    ] = None,
    seeds: SeedsOption = None,
    together: TogetherOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Validate and describe; train nothing.")
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> int:
    """Train one configuration: [--config NAME|FILE] [section.field=value ...].

    Several devices: torchrun --nproc-per-node=N -m mnist_wandb run ...
    """
    settings = load_settings()
    check_seed_options(seeds, together, resume=resume, launch=settings.launch)
    folder: RunFolder | None
    if resume is not None:
        from mnist_wandb.runs import RunFolder

        if config is not None or context.args:
            raise ConfigError(
                "--resume: a run is continued with its own configuration; leave out --config"
                " and overrides"
            )
        folder = RunFolder.find(resume, settings.runs_dir)
        preset = str(folder.read_environment().get("preset", ""))
        resolved = ResolvedConfig(folder.read_config(), preset, {})
    else:
        resolved = resolve_config(config, context.args, sweep_parameters=settings.sweep_parameters)
        if seeds is not None:
            from mnist_wandb.seedgroup import seed_configs

            group = seed_configs(resolved.config, seeds, settings)
            resolved = replace(resolved, config=group[0])
        folder = _find_requeued(resolved.config, settings)
    if dry_run:
        _describe_run(resolved, settings, seeds=seeds, together=together, as_json=as_json)
        return EXIT_DONE
    if seeds is not None:
        words = ["mnist-wandb", "run", *(["--config", config] if config else []), *context.args]
        return train_seeds(
            resolved, settings, seeds, together or "auto", words, as_json=as_json, quiet=quiet
        )
    return _train(resolved, settings, folder, as_json=as_json, quiet=quiet)


def _find_requeued(config: RunConfig, settings: Settings) -> RunFolder | None:
    """The folder of a sweep run that was interrupted and is now handed out again."""
    from mnist_wandb.runs import RunFolder

    if settings.wandb_run_id is None:
        return None
    folder = RunFolder.with_id(settings.wandb_run_id, settings.runs_dir)
    if folder is not None and folder.read_config() != config:
        raise ConfigError(
            f"WANDB_RUN_ID: {settings.wandb_run_id} is the run {folder.path}, which has another"
            " configuration; unset WANDB_RUN_ID to start a new run"
        )
    return folder


def _train(
    resolved: ResolvedConfig, settings: Settings, folder: Any, *, as_json: bool, quiet: bool
) -> int:
    launch = settings.launch
    is_main = launch is None or launch.rank == 0
    stop = StopSignals(is_silent=launch is not None)
    stop.install()
    # From here on torch and W&B are needed.
    from mnist_wandb.display import (
        TrainingDisplay,
        hide_log_lines,
        make_console,
        print_summary,
        show_log_lines,
    )
    from mnist_wandb.experiment import python_command, run_experiment

    messages = make_console(stderr=True)
    if is_main:
        show_log_lines(messages, quiet=quiet)
    else:
        hide_log_lines()
    epochs = resolved.config.training.epochs
    try:
        with TrainingDisplay(messages, epochs=epochs, quiet=quiet or not is_main) as display:
            outcome = run_experiment(
                resolved.config,
                settings,
                preset=resolved.preset,
                resume=folder,
                command=python_command(),
                emit=display.show,
                should_stop=stop.is_asked_for,
                is_preempted=lambda: stop.received == signal.SIGTERM,
            )
    except MnistWandbError as error:
        if as_json and error.summary is not None:
            typer.echo(error.summary.to_json())
        raise
    if as_json:
        typer.echo(outcome.summary.to_json())
    else:
        print_summary(make_console(), outcome.summary, outcome.test)
    if outcome.stopped_by_sweep:
        return EXIT_DONE  # an agent would count anything else as a failure, and give up after three
    if outcome.summary.status == "interrupted":
        return EXIT_INTERRUPTED + (stop.received or signal.SIGTERM)
    return EXIT_DONE


def _plan_run(
    resolved: ResolvedConfig, settings: Settings, seeds: int | None, together: str | None
) -> tuple[dict[str, Any], list[LayerRow]]:
    """What the validated configuration would do, and the layers of its model."""
    from mnist_wandb.data import train_count
    from mnist_wandb.device import choose_plan
    from mnist_wandb.models import summarize_model
    from mnist_wandb.ranks import share_cores
    from mnist_wandb.sources import describe_source
    from mnist_wandb.train import check_batches, count_steps

    config, launch = resolved.config, settings.launch
    num_processes = launch.size if launch else 1
    share_cores(launch)
    plan = choose_plan(config, launch)
    source = describe_source(config.data, settings.data_dir)
    layers = summarize_model(config.model, source.image_shape, len(source.class_names))
    images = train_count(config.data, settings.data_dir)
    check_batches(config, images, num_processes)
    total = count_steps(config, images)
    mode, reason = choose_wandb_mode(config, settings)
    facts: dict[str, Any] = {
        "config": config.model_dump(mode="json"),
        "preset": resolved.preset,
        "num_parameters": sum(layer.num_parameters for layer in layers),
        "train_images": images,
        "steps_per_epoch": -(-images // config.training.batch_size),
        "total_steps": total,
        "num_processes": num_processes,
        "plan": plan.describe(),
        "data_dir": str(config.data.dir or settings.data_dir),
        "runs_dir": str(settings.runs_dir),
        "wandb": {"mode": mode, "reason": reason},
    }
    if seeds is not None:
        facts |= describe_seeds(config, seeds, together, plan, facts["num_parameters"])
    return facts, layers


def _describe_run(
    resolved: ResolvedConfig,
    settings: Settings,
    *,
    seeds: int | None,
    together: str | None,
    as_json: bool,
) -> None:
    """The validated configuration and what it would do."""
    from mnist_wandb.display import make_console, print_rows

    config = resolved.config
    facts, layers = _plan_run(resolved, settings, seeds, together)
    if as_json:
        typer.echo(json.dumps(facts))
        return
    console = make_console()
    console.print(to_yaml(config, resolved.origins))
    rows = [
        (row.path, row.kind, "×".join(map(str, row.output_shape)), f"{row.num_parameters:,}")
        for row in layers
    ]
    print_rows(console, ("layer", "type", "output", "parameters"), rows, title=config.model.name)
    plan = facts["plan"]
    lines = {
        "parameters": f"{facts['num_parameters']:,}",
        "training images": f"{facts['train_images']:,}",
        "steps": f"{facts['steps_per_epoch']:,} per epoch, {facts['total_steps']:,} in all",
        "device": f"{plan['device']} ({plan['device_reason']}), {plan['num_threads']} threads",
        "processes": str(facts["num_processes"]),
        "precision": f"{plan['precision']}, {plan['memory_format']}, compile: {plan['compile']}",
        "CUDA graph": str(plan["cuda_graph"]),
        "optimizer step": f"{plan['optimizer_step']}",
        "freed memory": f"{plan['allocator']}",
        "data folder": str(facts["data_dir"]),
        "runs folder": str(facts["runs_dir"]),
        "W&B": f"{facts['wandb']['mode']} ({facts['wandb']['reason']})",
    }
    if seeds is not None:
        lines |= seed_lines(facts)
    for key, value in lines.items():
        console.print(f"{key:<16} {value}")


@app.command()
def sync(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Run folders, ids, or latest.")
    ],
) -> int:
    """Upload runs to W&B, however they were recorded; what is there already stays as it is."""
    settings = load_settings()
    from mnist_wandb.runs import find_runs

    folders = [folder for run in runs for folder in find_runs(run, settings.runs_dir)]
    if not folders:
        raise ConfigError(f"sync: no runs in {', '.join(runs)}")
    from mnist_wandb.display import make_console, show_log_lines
    from mnist_wandb.sync import sync_run

    show_log_lines(make_console(stderr=True))
    failed = False
    for folder in folders:
        try:
            typer.echo(f"{folder.path} {sync_run(folder, settings)}")
        except MnistWandbError as error:
            failed = True
            _fail(str(error), EXIT_FAILED)
    return EXIT_FAILED if failed else EXIT_DONE


# ── evaluate, predict ────────────────────────────────────────────────────────────────────────


@contextmanager
def _open_model(
    spec: str, settings: Settings, job_type: str
) -> Iterator[tuple[Path, Callable[[dict[str, Any]], None]]]:
    """The checkpoint of a run folder, a file or a W&B artifact, and where to log what it does."""
    if re.fullmatch(r"[^/:]+/[^/:]+/[^/:]+:[^/:]+", spec) and not Path(spec).exists():
        from mnist_wandb.remote import use_model

        with use_model(spec, settings, job_type) as model:
            yield model.path, model.log
    else:
        from mnist_wandb.runs import find_checkpoint

        yield find_checkpoint(spec, settings.runs_dir), lambda values: None


@app.command(context_settings=WITH_OVERRIDES)
def evaluate(
    context: typer.Context,
    model: ModelArgument,
    split: Annotated[str, typer.Option(metavar="val|test", help="Split to score.")] = "test",
    tta: Annotated[
        int,
        typer.Option(
            metavar="PIXELS",
            min=0,
            max=14,
            help="Test-time augmentation: mean over each image and its four shifts by PIXELS.",
        ),
    ] = 0,
    as_json: JsonOption = False,
) -> int:
    """Score a trained model: RUN|CHECKPOINT [section.field=value ...]."""
    settings = load_settings()
    with _open_model(model, settings, "evaluate") as (path, record):
        from mnist_wandb.evaluate import evaluate_checkpoint

        result, config = evaluate_checkpoint(
            path,
            split=split,
            data_dir=settings.data_dir,
            override=lambda config: override_config(config, context.args),
            tta_pixels=tta,
        )
        metrics = result.metrics(split)
        record(metrics)
    if as_json:
        facts = {"checkpoint": str(path) if path.exists() else model, "split": split, "tta": tta}
        typer.echo(json.dumps({**facts, **_evaluation_json(result, metrics)}))
        return EXIT_DONE
    from mnist_wandb.display import make_console, print_evaluation, print_metrics

    console = make_console()
    title = f"{path if path.exists() else model}, {split} split of {config.data.dataset}"
    title += f", averaged over shifts by {tta} px" if tta else ""
    print_metrics(console, f"{title}, {len(result.labels):,} images", metrics)
    print_evaluation(console, result)
    return EXIT_DONE


def _evaluation_json(result: EvalResult, metrics: dict[str, float]) -> dict[str, Any]:
    from mnist_wandb.metrics import class_scores

    scores = class_scores(result.confusion)
    return {
        "num_images": len(result.labels),
        "metrics": metrics,
        "per_class": [
            {
                "class": name,
                "precision": float(scores.precision[i]),
                "recall": float(scores.recall[i]),
                "f1": float(scores.f1[i]),
                "images": int(scores.support[i]),
            }
            for i, name in enumerate(result.class_names)
        ],
        "confusion_matrix": result.confusion.tolist(),
    }


@app.command()
def predict(
    model: ModelArgument,
    pictures: Annotated[
        list[Path], typer.Argument(metavar="PICTURE...", help="Picture files or folders.")
    ],
    no_preprocess: Annotated[
        bool, typer.Option("--no-preprocess", help="Only turn grey and resize to 28×28.")
    ] = False,
    as_json: JsonOption = False,
) -> int:
    """Classify picture files of any size; dark on light is recognised and inverted."""
    from mnist_wandb.pictures import find_pictures

    files = find_pictures(pictures)
    with _open_model(model, load_settings(), "predict") as (path, record):
        from mnist_wandb.evaluate import predict_pictures

        predictions = predict_pictures(path, files, preprocess=not no_preprocess)
        record({"num_pictures": len(predictions)})
    if as_json:
        rows = [
            {"file": str(file), **vars(prediction)}
            for file, prediction in zip(files, predictions, strict=True)
        ]
        checkpoint = str(path) if path.exists() else model
        typer.echo(json.dumps({"checkpoint": checkpoint, "predictions": rows}))
        return EXIT_DONE
    from mnist_wandb.display import make_console, print_rows

    print_rows(
        make_console(),
        ("picture", "label", "confidence", "runner-up", "confidence"),
        [
            (str(f), p.label, f"{p.confidence:.3f}", p.runner_up, f"{p.runner_up_confidence:.3f}")
            for f, p in zip(files, predictions, strict=True)
        ],
    )
    return EXIT_DONE


# ── configs, show, schema, models, doctor ────────────────────────────────────────────────────


def _preset_header(name: str) -> dict[str, str]:
    """The comment lines `# Key: text` at the top of a preset; a text may go on in the next line."""
    fields: dict[str, str] = {}
    key = ""
    for line in (PRESETS_DIR / f"{name}.yaml").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        text = line.lstrip("# ")
        head, colon, rest = text.partition(": ")
        if colon and head in ("What", "From", "Measured"):
            key, text = head, rest
        fields[key] = f"{fields.get(key, '')} {text}".strip()
    return fields


@app.command()
def configs() -> int:
    """List the presets."""
    from mnist_wandb.display import make_console, print_rows

    rows = []
    for name in preset_names():
        header = _preset_header(name)
        rows.append((name, header.get("What", ""), header.get("Measured", "").partition(" (")[0]))
    print_rows(make_console(), ("preset", "what it is", "measured"), rows)
    return EXIT_DONE


@app.command(context_settings=WITH_OVERRIDES)
def show(
    context: typer.Context,
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="Preset name or YAML file.")
    ] = "quickstart",
) -> int:
    """Show a resolved configuration and where each value comes from."""
    arguments = list(context.args)
    if "=" in config or config.startswith(("-", "+", "{")):  # only overrides were given
        arguments.insert(0, config)
        config = "quickstart"
    sweep_parameters = load_settings().sweep_parameters
    resolved = resolve_config(config, arguments, sweep_parameters=sweep_parameters)
    typer.echo(to_yaml(resolved.config, resolved.origins), nl=False)
    return EXIT_DONE


@app.command()
def schema(
    what: Annotated[
        str, typer.Argument(metavar="run|sweep", help="Which files the schema is for.")
    ] = "run",
) -> int:
    """Print the JSON Schema of config files or of sweep files, for editors."""
    from mnist_wandb.sweepschema import sweep_schema

    schemas = {"run": json_schema, "sweep": sweep_schema}
    if what not in schemas:
        raise ConfigError(f"schema: got {what!r}, allowed: {', '.join(schemas)}")
    typer.echo(json.dumps(schemas[what](), indent=2))
    return EXIT_DONE


@app.command()
def models() -> int:
    """List the architectures."""
    from mnist_wandb.display import make_console, print_rows
    from mnist_wandb.models import zoo_table

    rows = [(name, family, f"{count:,}", source) for name, family, count, source in zoo_table()]
    print_rows(make_console(), ("name", "family", "parameters", "where from"), rows)
    return EXIT_DONE


@app.command()
def doctor(as_json: JsonOption = False) -> int:
    """Say what this machine has: versions, devices, folders, W&B login and mode."""
    settings = load_settings()
    from mnist_wandb.data import DATASETS, is_present
    from mnist_wandb.device import available_devices
    from mnist_wandb.experiment import package_versions, processor_name

    mode, reason = choose_wandb_mode(RunConfig(), settings)
    present = [name for name, row in DATASETS.items() if is_present(row, settings.data_dir)]
    facts = {
        "python": sys.version.split()[0],
        **package_versions(),
        "processor": processor_name(),
        "devices": ", ".join(available_devices()),
        "data folder": str(settings.data_dir),
        "data sets there": ", ".join(present),
        "runs folder": f"{settings.runs_dir} ({_describe_folder(settings.runs_dir)})",
        "W&B server": settings.wandb_base_url,
        "W&B login": f"key in {settings.api_key_source}" if settings.api_key_source else "none",
        "W&B mode": f"{mode} ({reason})",
    }
    if as_json:
        typer.echo(json.dumps(facts))
    else:
        for key, value in facts.items():
            typer.echo(f"{key:<16} {value}")
    return EXIT_DONE


def _describe_folder(folder: Path) -> str:
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return "cannot be written"
    return "can be written" if existing == folder.absolute() else "will be made"


# ── entry ────────────────────────────────────────────────────────────────────────────────────


def main(arguments: Sequence[str]) -> int:
    """Run one command; turns errors into one message on stderr and an exit code.

    Of several processes that torchrun has started, the first of each machine shows errors, and
    process 0 alone everything else.
    """
    launch = None
    try:
        launch = load_launch()
        if launch is not None and list(arguments[:1]) != ["run"]:
            raise ConfigError(
                f"mnist-wandb {' '.join(arguments[:1])}: torchrun has started {launch.size}"
                " processes, and only `run` works in several; start this without torchrun"
            )
        with contextlib.ExitStack() as stack:
            if launch is not None and launch.rank > 0:
                nowhere = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
            code = app(args=list(arguments), prog_name="mnist-wandb", standalone_mode=False)
    except MnistWandbError as error:
        # Once a run has begun, its end is a failed run and no bad input any more.
        if error.is_told:
            return EXIT_FAILED
        failed = isinstance(error, DivergedError | LostProcessError)
        speaks = isinstance(error, LostProcessError) and error.speaks
        return _fail(str(error), EXIT_FAILED if failed else EXIT_BAD_INPUT, launch, speaks=speaks)
    except USAGE_ERROR as error:
        message = error.format_message().rstrip(".")
        return _fail(f"{message}; see `mnist-wandb --help`", EXIT_BAD_INPUT, launch)
    except (typer.Abort, KeyboardInterrupt):
        return _fail("stopped", EXIT_INTERRUPTED + signal.SIGINT, launch)
    except StoppedBeforeTraining as stop:
        if "wandb" in sys.modules:  # maybe busy with a server that does not answer
            note_client_is_busy()
        return _fail("stopped before training began", stop.exit_code(), launch)
    except (BrokenPipeError, SystemExit) as stop:
        # `mnist-wandb show | head`; click and rich turn the closed pipe into an exit.
        if isinstance(stop, SystemExit) and not isinstance(stop.__context__, BrokenPipeError):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE
    return code if isinstance(code, int) else EXIT_DONE


def _fail(message: str, code: int, launch: Launch | None = None, *, speaks: bool = False) -> int:
    if launch is not None and launch.local_rank > 0 and not speaks:
        _let_first_process_speak()
        return code
    for line in message.splitlines():
        sys.stderr.write(f"error: {line}\n")
    return code


def _let_first_process_speak() -> None:
    """Wait a little: torchrun stops the others as soon as one of its processes has failed."""
    stop = StopSignals(is_silent=True)
    stop.install()
    end = time.monotonic() + LINGER_SECONDS
    while not stop.is_asked_for() and time.monotonic() < end:
        time.sleep(0.05)
