"""The W&B server's side: what it has of one or many runs, uploads of records, used models."""

from __future__ import annotations

import itertools
import logging
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import wandb

from mnist_wandb.background import note_client_is_busy
from mnist_wandb.config import RunConfig
from mnist_wandb.errors import ConfigError, MnistWandbError, TrackingError
from mnist_wandb.loading import validate
from mnist_wandb.records import LeftOut, RunRecord
from mnist_wandb.runs import Row, RunFolder
from mnist_wandb.settings import Settings, keep_wandb_files_in
from mnist_wandb.tracking import (
    AXES,
    ENVIRONMENT_KEY,
    MODEL_FILE,
    client_settings,
    probe_server,
    project_name,
    silence_client,
)

log = logging.getLogger(__name__)

API_TIMEOUT_SECONDS = 20
CHECKS = 4
"""Times, a second apart, to look whether an upload has arrived: the server takes it in later."""
STOP_TIMEOUT_SECONDS = 5
"""Longest wait for whether the server stops a run: its machine may be about to go."""
STOP_QUERY = """
query RunStopped($entity: String, $project: String, $run: String!, $sweep: String!) {
    project(name: $project, entityName: $entity) {
        run(name: $run) { stopped shouldStop }
        sweep(sweepName: $sweep) { state }
    }
}
"""
UPLOAD_SECONDS = 600.0
"""Longest wait for the server in `sync`; nobody's training waits there."""
TIMED = ("train/images_per_second",)
"""Values that differ each time a row is made."""
SHORT_RUN_SECONDS = 60.0
"""Longest wait for the server at the end of a run that only uses a model."""
RUNS_PER_PAGE = 50
JOB_TYPES = ("explore", "check", "evaluate", "predict")
"""Job types of runs that train nothing."""
UNDER_WAY = ("pending", "running", "preempting")
"""W&B's states of a run that is to go on; its summary may be of an earlier session."""
FAILED = ("failed", "diverged")
SECTIONS = ("data", "model", "optimizer", "schedule", "training")
"""What the config of every training run has."""


@dataclass(frozen=True)
class RemoteRun:
    """What the server has of a run.

    Attributes:
        url: of its page.
        state: running, finished, failed, crashed, …
        num_rows: rows of its history.
        summary: final values by name.
        models: aliases of the model artifacts that it has logged.
        has_data: whether it uses a data-set artifact.
    """

    url: str
    state: str
    num_rows: int
    summary: Mapping[str, Any]
    models: frozenset[str]
    has_data: bool

    def is_complete(
        self, rows: Sequence[Row], summary: Mapping[str, Any] | None, *, log_model: bool
    ) -> bool:
        """Whether the server has all that a run folder has.

        Args:
            rows: of the run's metrics.
            summary: the run's summary; None where it was killed.
            log_model: whether the model belongs there.
        """
        final: dict[str, float] = {}
        for row in rows:
            final.update(row)
        if self.num_rows < len(rows) or not self.has_data:
            return False
        if any(self.summary.get(k) != v for k, v in final.items() if k not in TIMED):
            return False
        if summary is None:
            return True
        scored = "test/loss" in final
        return (
            self.summary.get("status") == summary["status"]
            and self.state != "running"
            and (not scored or "test/per_class" in self.summary)
            and (not scored or not log_model or "best" in self.models)
        )


def run_path(config: RunConfig, settings: Settings, folder: RunFolder) -> str:
    """`entity/project/id` of a run folder, as it was tracked, else as the surroundings say.

    Raises:
        ConfigError: there is no API key.
        TrackingError: the server cannot be asked for the key's owner.
    """
    recorded = folder.read_environment()
    entity = recorded.get("wandb_entity") or config.tracking.entity or settings.wandb_entity
    project = recorded.get("wandb_project") or project_name(config, settings)
    with _talking(settings) as api:
        return f"{entity or api.default_entity}/{project}/{folder.run_id}"


def read_remote(path: str, settings: Settings) -> RemoteRun | None:
    """Ask the server what it has of a run (`entity/project/id`); None where it has nothing.

    Raises:
        TrackingError: no answer, or a refusal.
    """
    with _talking(settings) as api:
        try:
            run = api.run(path)
            num_rows = run.lastHistoryStep + 1  # step n is row n
        except wandb.errors.CommError as error:
            from wandb.apis.public.runs import RunNotFoundError  # a quarter of a second

            if isinstance(error.__context__, RunNotFoundError):
                return None
            raise
        models = [a.aliases for a in run.logged_artifacts() if a.type == "model"]
        return RemoteRun(
            url=run.url,
            state=run.state,
            num_rows=num_rows,
            summary=dict(run.summary_metrics),
            models=frozenset(itertools.chain(*models)),
            has_data=any(artifact.type == "dataset" for artifact in run.used_artifacts()),
        )


def wait_for_upload(
    path: str,
    settings: Settings,
    rows: Sequence[Row],
    summary: Mapping[str, Any] | None,
    *,
    log_model: bool,
) -> RemoteRun:
    """Ask the server until everything has arrived: a refusal there is no error to the client.

    Raises:
        TrackingError: the server does not answer, or still lacks something.
    """
    for _ in range(CHECKS):
        remote = read_remote(path, settings)
        if remote is not None and remote.is_complete(rows, summary, log_model=log_model):
            return remote
        time.sleep(1)
    found = 0 if remote is None else remote.num_rows
    raise TrackingError(f"the server has {found} of {len(rows)} rows, or lacks tables or artifacts")


def is_stopped(path: str, sweep_id: str, settings: Settings) -> bool:
    """Ask the server whether it wants a sweep's run to end.

    That is the stop button, early termination by hyperband, and the end of the whole sweep. The
    agent passes it on as SIGTERM, which is also what comes when a machine is preempted.

    Args:
        path: `entity/project/id` of the run.
        sweep_id: of its sweep.
        settings: the surroundings.

    Raises:
        TrackingError: no answer, or a refusal.
    """
    entity, project, run_id = path.split("/")
    names = {"entity": entity, "project": project, "run": run_id, "sweep": sweep_id}
    with _talking(settings, STOP_TIMEOUT_SECONDS) as api:
        # The public classes do not show these fields, which the client's own agent reads.
        found = api._service_api.execute_graphql(STOP_QUERY, variables=names)["project"] or {}
        run, sweep = found.get("run") or {}, found.get("sweep") or {}
        stopped = run.get("stopped") or run.get("shouldStop")
        return bool(stopped or sweep.get("state") == "CANCELED")


def upload_record(record: Path, path: str) -> str:
    """Upload a folder of the client's record; what the server has of it is written again.

    Returns:
        What `wandb sync` said, which exits with 0 even when it has failed.
    """
    entity, project, run_id = path.split("/")
    try:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "wandb", "sync", "--include-online", "--include-synced"),
                *("--entity", entity, "--project", project, "--id", run_id, str(record.absolute())),
            ],
            capture_output=True,
            text=True,
            check=False,
            timeout=UPLOAD_SECONDS,
            cwd=record,  # the command leaves a log where it runs
        )
    except subprocess.TimeoutExpired:
        raise TrackingError(
            f"the server did not take everything within {UPLOAD_SECONDS:g} s; try again"
        ) from None
    return " ".join((done.stdout + done.stderr).split())[-300:]


@contextmanager
def _talking(settings: Settings, timeout: int = API_TIMEOUT_SECONDS) -> Iterator[Any]:
    """The client's public API; every failure becomes a TrackingError."""
    if settings.api_key_source is None:  # the client would ask for one
        raise ConfigError("W&B: no API key found; log in with `wandb login` or set WANDB_API_KEY")
    try:
        probe_server(settings.wandb_base_url)
        silence_client()
        yield wandb.Api(timeout=timeout)
    except MnistWandbError:
        raise
    except Exception as error:  # the client raises many kinds
        raise TrackingError(
            f"W&B ({settings.wandb_base_url}): {' '.join(str(error).split())[:300]}"
        ) from None


@contextmanager
def use_model(name: str, settings: Settings, job_type: str) -> Iterator[UsedModel]:
    """Fetch a model artifact within an online run that records its use.

    Args:
        name: `entity/project/name:alias`.
        settings: the surroundings, with an API key.
        job_type: of the run that is made, for example `evaluate`.

    Raises:
        ConfigError: there is no API key.
        TrackingError: the server cannot be reached, or has no such model.
    """
    with tempfile.TemporaryDirectory(prefix="mnist-wandb-") as folder:
        keep_wandb_files_in(Path(folder))
        with _talking(settings):
            model = _fetch_model(name, job_type, Path(folder))
        done = False
        try:
            yield model
            done = True
        finally:
            try:
                model.run.finish(exit_code=0 if done else 1)
            except Exception as error:  # the result is there, whatever becomes of its record
                note_client_is_busy()
                log.warning("W&B: the use of %s may not have arrived (%s)", name, error)


def _fetch_model(name: str, job_type: str, folder: Path) -> UsedModel:
    entity, project, _ = name.split("/")
    run = wandb.init(
        entity=entity,
        project=project,
        job_type=job_type,
        dir=str(folder),
        mode="online",
        reinit="finish_previous",
        config={"model": name},
        settings=client_settings(SHORT_RUN_SECONDS),
    )
    try:
        run.use_artifact(name, type="model").download(root=str(folder), skip_cache=True)
    except BaseException:
        run.finish(exit_code=1)
        raise
    return UsedModel(folder / MODEL_FILE, run)


@dataclass(frozen=True)
class UsedModel:
    """A model artifact on this machine, and the run that uses it."""

    path: Path
    run: wandb.Run

    def log(self, values: Mapping[str, Any]) -> None:
        """Record what came of it."""
        self.run.log(dict(values))


# ── many runs, to compare ────────────────────────────────────────────────────────────────────


def read_remote_records(spec: str, settings: Settings) -> tuple[list[RunRecord], list[LeftOut]]:
    """Read the training runs of a W&B project or sweep, oldest first; none has a folder.

    Args:
        spec: `entity/project` or `entity/project/sweeps/id`.
        settings: the surroundings, with an API key.

    Returns:
        The runs of mnist-wandb, those that have not ended as well, and the other runs, with why
        they cannot be compared. Runs that train nothing are passed over.

    Raises:
        ConfigError: the text has another form, or there is no API key.
        TrackingError: no answer, a refusal, or no such project, sweep or runs.
    """
    found = re.fullmatch(r"([^/]+)/([^/]+)(?:/sweeps/([^/]+))?", spec)
    if found is None:
        raise ConfigError(
            f"--wandb: got {spec!r}, expected ENTITY/PROJECT or ENTITY/PROJECT/sweeps/ID"
        )
    entity, project, sweep = found.groups()
    records, left_out = [], []
    for run in _list_runs(entity, project, sweep, settings):
        if run.job_type in JOB_TYPES and "status" not in run.summary_metrics:
            continue
        read = _read_record(run)
        if isinstance(read, RunRecord):
            records.append(read)
        else:
            left_out.append(read)
    if not records and not left_out:
        raise TrackingError(f"--wandb {spec}: no training runs are there")
    return records, left_out


def _list_runs(entity: str, project: str, sweep: str | None, settings: Settings) -> list[Any]:
    """All runs with their configs and summaries, a page at a time."""
    with _talking(settings) as api:
        try:
            if sweep is not None:
                api.sweep(f"{entity}/{project}/{sweep}")
            runs = api.runs(
                f"{entity}/{project}",
                filters={"sweep": sweep} if sweep else None,
                per_page=RUNS_PER_PAGE,
                lazy=False,  # else it would ask once more for each run
            )
            return list(runs)
        except (ValueError, wandb.Error) as error:
            if not str(error).startswith("Could not find"):
                raise
            what = f"sweep {sweep} in" if sweep else "project"
            raise TrackingError(
                f"W&B ({settings.wandb_base_url}): there is no {what} {entity}/{project}"
                " that this API key may see"
            ) from None


def _read_record(run: Any) -> RunRecord | LeftOut:
    """What is compared of one run of the public API, or why it cannot be."""
    title, summary = f"{run.name} ({run.id})", run.summary_metrics
    # A sweep adds its parameters as keys of their own, like `model.name`.
    values = {key: run.config[key] for key in RunConfig.model_fields if key in run.config}
    if not all(isinstance(values.get(section), Mapping) for section in SECTIONS):
        sections = ", ".join(SECTIONS)
        return LeftOut(title, run.state, f"has no configuration of mnist-wandb ({sections})")
    try:
        config = validate(values)
    except ConfigError as error:
        reason = str(error).splitlines()[0]
        return LeftOut(title, "damaged", f"its configuration is not understood: {reason}")
    facts = summary.get(ENVIRONMENT_KEY)
    record = RunRecord(
        run_id=run.id,
        name=config.run_name,
        location=run.url,
        status=None,
        config=config.model_dump(mode="json"),
        environment=facts if isinstance(facts, Mapping) else {},
        error=f"{run.state} in W&B, without a summary of its end",
    )
    if run.state in UNDER_WAY or "status" not in summary:
        return record
    status = str(summary["status"])
    try:
        return replace(
            record,
            status=status,
            metrics=_final_metrics(summary),
            num_parameters=int(summary["num_parameters"]),
            training_seconds=float(summary["training_seconds"]),
            images_per_second=float(summary["images_per_second"]),
            error=f"its log says why: {run.url}/logs" if status in FAILED else None,
        )
    except (KeyError, TypeError, ValueError):
        return LeftOut(title, "damaged", "its summary is not that of a run of mnist-wandb")


def _final_metrics(summary: Mapping[str, Any]) -> dict[str, float]:
    """The final values by metric name, without tables and charts."""
    sections = tuple(pattern.removesuffix("*") for pattern in AXES)
    return {
        name: float(value)
        for name, value in summary.items()
        if name.startswith(sections) and isinstance(value, int | float)
    }
