"""The state of a sweep, kept by Optuna: which trials there are, who works on them, how they ended.

All of it is in one database: an SQLite file in the sweep's folder, or a server that several
machines share. A trial is taken under a lock that spans all of them, so no two workers ever have
the same one.
"""

from __future__ import annotations

import contextlib
import json
import math
import secrets
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from filelock import FileLock, Timeout
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, TrialState

from mnist_wandb.distributions import EDGE
from mnist_wandb.errors import SweepError
from mnist_wandb.runs import ID_LENGTH, study_name
from mnist_wandb.sweep_messages import Claim, Worker, lock_path
from mnist_wandb.sweepfile import Parameter, SweepFile

HEARTBEAT_SECONDS = 5
"""How often a parent tells a shared database that its trials are in hands."""
GRACE_SECONDS = 30
"""Silence after which another machine counts as dead."""
MOST_DEATHS = 3
"""A trial that has killed so many workers (out of memory, say) is given up."""
LOCK_SECONDS = 600

STATES = {
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "stopped",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
    TrialState.FAIL: "failed",
}


@dataclass(frozen=True)
class TrialRecord:
    """One point of a sweep and what has become of it.

    Attributes:
        number: of the point, from 0.
        state: waiting | running | finished | stopped (by hyperband) | failed.
        parameters: nested, as an agent would hand them over.
        run_id: of its run folder and W&B run.
        value: of the sweep's metric; the last one for stopped trials, None before the end.
        error: why it failed.
        seconds: how long the last session of it took, None before the end.
    """

    number: int
    state: str
    parameters: dict[str, Any]
    run_id: str
    value: float | None
    error: str | None
    seconds: float | None


def sweep_folder(sweep: SweepFile, runs_dir: Path) -> Path:
    """Where a sweep's run folders and its SQLite file are."""
    return runs_dir / study_name(sweep)


class SweepStudy:
    """A sweep in its database; each parent of workers opens its own.

    Raises (any method):
        SweepError: the database cannot be reached.
    """

    def __init__(self, sweep: SweepFile, folder: Path, storage: str | None) -> None:
        """Open a sweep's state, or begin it.

        Args:
            sweep: the sweep file.
            folder: its folder, which exists.
            storage: address of a shared database; default: an SQLite file in the folder.
        """
        self.sweep, self.folder = sweep, folder
        self.metric = sweep.objective
        self.address = _address(storage or f"sqlite:///{folder.absolute() / 'sweep.db'}")
        self.space = {p.name: _optuna_distribution(sweep, p) for p in _varied(sweep)}
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # For locks only; the first process also makes the tables, and only one may.
        with self._telling_errors():
            self.engine = sqlalchemy.create_engine(self.address, poolclass=sqlalchemy.NullPool)
        with self._telling_errors(), self.lock():
            self.storage = self._open_storage()
            self.study = optuna.create_study(
                storage=self.storage,
                study_name=study_name(sweep),
                direction=self.metric.goal,
                load_if_exists=True,
            )
            if "sweep" not in self.study.user_attrs:
                self.study.set_user_attr("sweep", sweep.text)
                self.study.set_user_attr("metric", self.metric.name)

    def _open_storage(self) -> optuna.storages.RDBStorage:
        with warnings.catch_warnings(action="ignore"):  # heartbeats are experimental in Optuna
            return optuna.storages.RDBStorage(
                self.address.render_as_string(hide_password=False),
                engine_kwargs=_engine_arguments(self.address),
                # One file is for one machine, where the workers' locks tell who is alive.
                heartbeat_interval=None if self.is_file else HEARTBEAT_SECONDS,
                grace_period=None if self.is_file else GRACE_SECONDS,
                heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(
                    inherit_intermediate_values=True
                ),
            )

    def close(self) -> None:
        """End the connections to the database."""
        self.storage.remove_session()
        self.storage.engine.dispose()

    @property
    def is_file(self) -> bool:
        """Whether the state is an SQLite file."""
        return self.address.get_backend_name() == "sqlite"

    # ── Locks.

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep all other processes of this sweep from taking trials; ends with the process."""
        name = study_name(self.sweep)
        if self.is_file:
            with FileLock(f"{self.address.database}.lock", timeout=LOCK_SECONDS):
                yield
            return
        # A session lock of the server, on a connection of its own.
        take, give = {
            "postgresql": (
                "SELECT pg_advisory_lock(hashtext(:name))",
                "SELECT pg_advisory_unlock(hashtext(:name))",
            ),
            "mysql": (f"SELECT GET_LOCK(LEFT(:name, 64), {LOCK_SECONDS})",
                      "SELECT RELEASE_LOCK(LEFT(:name, 64))"),
        }[self.address.get_backend_name()]  # fmt: skip
        with self.engine.connect() as connection:
            connection.execute(sqlalchemy.text(take), {"name": name})
            try:
                yield
            finally:
                connection.execute(sqlalchemy.text(give), {"name": name})

    @contextlib.contextmanager
    def _telling_errors(self) -> Iterator[None]:
        try:
            yield
        except (
            optuna.exceptions.StorageInternalError,
            sqlalchemy.exc.SQLAlchemyError,
            ImportError,
            Timeout,
            OSError,
        ) as error:
            cause = error.__cause__ or error
            reason = " ".join(str(getattr(cause, "orig", None) or cause).split())[:300]
            hint = "; a driver is missing" if isinstance(error, ImportError) else ""
            raise SweepError(f"--storage {self.shown}: {reason}{hint}") from None

    @property
    def shown(self) -> str:
        """The database's address without its password."""
        return self.address.render_as_string(hide_password=True)

    def is_alive(self, name: str) -> bool:
        """Whether the process with this lock file lives."""
        path = lock_path(self.folder, name)
        if not path.exists():
            return False
        probe = FileLock(path)
        try:
            probe.acquire(timeout=0)
        except Timeout:
            return True
        probe.release()
        path.unlink(missing_ok=True)
        return False

    # ── Trials.

    def claim(self, worker: Worker) -> Claim | None:
        """Take a trial: one that was under way, else the next point; None where there is none."""
        # Heartbeats are experimental in Optuna, and it warns of asking without `optimize`.
        with (
            self._telling_errors(),
            self.lock(),
            warnings.catch_warnings(action="ignore"),
        ):
            claim = self._take(self._release_dead(worker.place), worker)
            if claim is not None:
                self.heartbeat(claim)
        return claim

    def _take(self, trials: Sequence[FrozenTrial], worker: Worker) -> Claim | None:
        facts = {"worker": vars(worker)}
        for trial in trials:
            if trial.state == TrialState.WAITING:
                self.storage.set_trial_user_attr(trial._trial_id, "worker", facts["worker"])
                self.storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
                return _claim(trial._trial_id, trial.user_attrs)
        point = 1 + max(
            (t.user_attrs["point"] for t in trials if "point" in t.user_attrs), default=-1
        )
        if self._is_over(trials, point):
            return None
        if self.sweep.method == "bayes":
            self.study.sampler = optuna.samplers.TPESampler(seed=point)
            asked = self.study.ask(self.space)
            attributes = self._attributes(point, self._values(asked.params))
            for key, value in {**facts, **attributes}.items():
                asked.set_user_attr(key, value)
            return _claim(asked._trial_id, attributes)
        fixed, values = self._next_point(point)
        attributes = self._attributes(point, values)
        template = optuna.trial.create_trial(
            state=TrialState.RUNNING,
            params=fixed,
            distributions=self.space,
            user_attrs={**attributes, **facts},
        )
        # One transaction; `enqueue_trial` and `ask` would be five.
        number = self.storage.create_new_trial(self.study._study_id, template)
        return _claim(number, attributes)

    def _is_over(self, trials: Sequence[FrozenTrial], point: int) -> bool:
        size = self.sweep.num_points
        if size is not None and point >= size:
            return True
        values = [t.value for t in trials if t.state == TrialState.COMPLETE and t.value is not None]
        return any(self.metric.reached(value) for value in values)

    def _attributes(self, point: int, values: Sequence[Any]) -> dict[str, Any]:
        return {
            "parameters": json.dumps(self.sweep.nest(values)),
            "run_id": secrets.token_hex(ID_LENGTH // 2),
            "point": point,  # last: who has it has all of them, where they are written singly
        }

    def _next_point(self, point: int) -> tuple[dict[str, Any], list[Any]]:
        """The point of a grid or a random search: what Optuna is told, and the real values."""
        fixed: dict[str, Any] = {}
        if self.sweep.method == "grid":
            values = self.sweep.grid_point(point)
            for parameter, value in zip(self.sweep.parameters, values, strict=True):
                fixed[parameter.name] = json.dumps(value)
        else:
            values = self.sweep.sample(point)
            quantiles = self.sweep.quantiles(point)
            for parameter, value, u in zip(self.sweep.parameters, values, quantiles, strict=True):
                match self.space.get(parameter.name):
                    case CategoricalDistribution():
                        fixed[parameter.name] = json.dumps(value)
                    case IntDistribution() | FloatDistribution() as native if (
                        parameter.distribution.kind in _NATIVE
                    ):  # rounding may have taken it a little further
                        fixed[parameter.name] = min(max(value, native.low), native.high)
                    case _:
                        fixed[parameter.name] = min(max(u, EDGE), 1 - EDGE)
        return {name: value for name, value in fixed.items() if name in self.space}, values

    def _values(self, params: Mapping[str, Any]) -> list[Any]:
        """Real values from what Optuna suggests."""
        values = []
        for parameter in self.sweep.parameters:
            distribution = parameter.distribution
            if parameter.name not in self.space:
                values.append(distribution.at(0.5))
            elif isinstance(self.space[parameter.name], CategoricalDistribution):
                values.append(json.loads(params[parameter.name]))
            elif distribution.kind in _NATIVE:
                values.append(params[parameter.name])
            else:
                values.append(distribution.at(params[parameter.name]))
        return values

    def _release_dead(self, place: str) -> list[FrozenTrial]:
        """Put back what workers had that live no more, under the lock; returns all trials."""
        if not self.is_file:
            optuna.storages.fail_stale_trials(self.study)
        trials = self.study.get_trials(deepcopy=False)
        released = False
        for trial in trials:
            if trial.state != TrialState.RUNNING:
                continue
            if "point" not in trial.user_attrs:  # its worker died while it was made
                self.study.tell(trial.number, state=TrialState.FAIL)
                released = True
                continue
            worker = trial.user_attrs["worker"]
            if worker["place"] == place and not self.is_alive(worker["name"]):
                self._count_death(trial, blame=self.is_alive(worker["parent"]))
                released = True
        return self.study.get_trials(deepcopy=False) if released else trials

    def _count_death(self, trial: FrozenTrial, *, blame: bool) -> None:
        """A worker has died; where its parent lives on, the trial itself may have killed it."""
        deaths = trial.user_attrs.get("deaths", 0) + blame
        self.storage.set_trial_user_attr(trial._trial_id, "deaths", deaths)
        if deaths >= MOST_DEATHS:
            text = f"its worker process was killed {deaths} times (out of memory?)"
            self.storage.set_trial_user_attr(trial._trial_id, "error", text)
            self.study.tell(trial.number, state=TrialState.FAIL)
        else:
            self._put_back(trial._trial_id)

    def _put_back(self, trial_id: int) -> None:
        self.storage.set_trial_state_values(trial_id, TrialState.WAITING)

    def heartbeat(self, claim: Claim) -> None:
        """Tell a shared database that a trial is in hands."""
        if not self.is_file:
            with self._telling_errors():
                self.storage.record_heartbeat(claim.trial_id)

    def report(self, claim: Claim, iteration: int, value: float) -> bool:
        """Record a value of the metric; False where the trial is not this parent's any more."""
        with self._telling_errors():
            try:
                # A resumed run reports some again; `Trial.report` would warn of that.
                self.storage.set_trial_intermediate_value(claim.trial_id, iteration, value)
            except optuna.exceptions.UpdateFinishedTrialError:
                return False
        return True

    def other_histories(self, claim: Claim) -> list[list[float]]:
        """The reported values of all other trials, oldest first."""
        with self._telling_errors():
            trials = self.study.get_trials(deepcopy=False)
        return [
            [value for _, value in sorted(trial.intermediate_values.items())]
            for trial in trials
            if trial._trial_id != claim.trial_id and not _is_superseded(trial, trials)
        ]

    def mark_stopped(self, claim: Claim) -> bool:
        """Remember that hyperband stops a trial; False where it is not this parent's any more."""
        with self._telling_errors():
            try:
                self.storage.set_trial_user_attr(claim.trial_id, "stopped", True)
            except optuna.exceptions.UpdateFinishedTrialError:
                return False
        return True

    def end(
        self, claim: Claim, state: str, value: float | None = None, error: str | None = None
    ) -> None:
        """Record how a trial ended: finished (with a value) | stopped | failed."""
        trial_id = claim.trial_id
        # Optuna's `tell` would read the trial three times around the same write.
        with (
            self._telling_errors(),
            # Another machine had given this one up, and has it now.
            contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError),
        ):
            if error is not None:
                self.storage.set_trial_user_attr(trial_id, "error", error[:2000])
            match state:
                case "finished":
                    assert value is not None
                    self.storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [value])
                case "stopped":
                    reported = self.storage.get_trial(trial_id).intermediate_values
                    values = [reported[max(reported)]] if reported else None
                    self.storage.set_trial_state_values(trial_id, TrialState.PRUNED, values)
                case "failed":
                    self.storage.set_trial_state_values(trial_id, TrialState.FAIL)

    def put_back(self, claim: Claim, worker: Worker) -> None:
        """Let others take a trial that a worker has not ended, unless somebody has it already."""
        with self._telling_errors(), self.lock():
            trial = self.storage.get_trial(claim.trial_id)
            if (
                trial.state == TrialState.RUNNING
                and trial.user_attrs["worker"]["name"] == worker.name
            ):
                self._put_back(claim.trial_id)

    def records(self) -> list[TrialRecord]:
        """All points so far, by number."""
        with self._telling_errors():
            trials = self.study.get_trials(deepcopy=False)
        found = [
            _record(trial)
            for trial in trials
            if "point" in trial.user_attrs and not _is_superseded(trial, trials)
        ]
        return sorted(found, key=lambda record: record.number)


_NATIVE = ("int_uniform", "uniform", "log_uniform_values")
"""What Optuna has itself; the others are searched by their quantiles, as W&B's engine does."""


def _claim(trial_id: int, attributes: Mapping[str, Any]) -> Claim:
    return Claim(
        trial_id,
        attributes["point"],
        json.loads(attributes["parameters"]),
        attributes["run_id"],
        "stopped" in attributes,
    )


def _varied(sweep: SweepFile) -> list[Parameter]:
    return [p for p in sweep.parameters if p.distribution.kind != "constant"]


def _optuna_distribution(sweep: SweepFile, parameter: Parameter) -> BaseDistribution:
    distribution, fields = parameter.distribution, parameter.distribution.fields
    values = fields.get("values")
    if sweep.method == "grid":
        values = sweep.grid_columns[sweep.parameters.index(parameter)]
    if values is not None and "probabilities" not in fields:
        return CategoricalDistribution(list(dict.fromkeys(map(json.dumps, values))))
    if distribution.kind == "int_uniform":
        return IntDistribution(fields["min"], fields["max"])
    if distribution.kind in _NATIVE:
        return FloatDistribution(
            fields["min"], fields["max"], log=distribution.kind == "log_uniform_values"
        )
    return FloatDistribution(EDGE, 1 - EDGE)


def _is_superseded(trial: FrozenTrial, trials: Sequence[FrozenTrial]) -> bool:
    """Whether a trial was given up as stale and goes on as another one."""
    return (
        trial.state == TrialState.FAIL
        and "error" not in trial.user_attrs
        and any(t.number > trial.number and _point(t) == _point(trial) for t in trials)
    )


def _point(trial: FrozenTrial) -> int | None:
    return trial.user_attrs.get("point")


def _record(trial: FrozenTrial) -> TrialRecord:
    ended = trial.state.is_finished()
    value = trial.values[0] if ended and trial.values else None
    error = trial.user_attrs.get("error") if trial.state == TrialState.FAIL else None
    return TrialRecord(
        number=trial.user_attrs["point"],
        state=STATES[trial.state],
        parameters=json.loads(trial.user_attrs["parameters"]),
        run_id=trial.user_attrs["run_id"],
        value=value if value is None or math.isfinite(value) else None,
        error=error,
        seconds=trial.duration.total_seconds() if ended and trial.duration else None,
    )


# ── databases ────────────────────────────────────────────────────────────────────────────────


def _address(storage: str) -> sqlalchemy.URL:
    """An address with a driver that is installed.

    Raises:
        SweepError: it is none, or of a database that is not supported.
    """
    allowed = "expected postgresql://USER@HOST/DATABASE, mysql://… or sqlite:///FILE"
    try:
        address = sqlalchemy.make_url(storage)
        backend = address.get_backend_name()
    except (sqlalchemy.exc.ArgumentError, ValueError):
        raise SweepError(f"--storage: not a database's address; {allowed}") from None
    if backend == "sqlite" and not address.database:
        raise SweepError(f"--storage {storage}: names no file; {allowed}")
    if backend == "sqlite" and not Path(str(address.database)).parent.is_dir():
        raise SweepError(f"--storage {storage}: no such folder")
    if backend not in ("sqlite", "postgresql", "mysql"):
        raise SweepError(f"--storage: got {backend}, {allowed}")
    if address.drivername == "postgresql":
        address = address.set(drivername="postgresql+psycopg")
    if address.drivername == "mysql":
        address = address.set(drivername="mysql+pymysql")
    return address


def _engine_arguments(address: sqlalchemy.URL) -> dict[str, Any]:
    if address.get_backend_name() == "sqlite":
        return {"connect_args": {"timeout": LOCK_SECONDS}}  # wait for other parents' writes
    return {"pool_pre_ping": True, "connect_args": {"connect_timeout": 10}}
