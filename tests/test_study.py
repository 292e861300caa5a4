"""The state of a sweep in its database: who gets which trial, what comes back, what is never lost."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from filelock import FileLock

from mnist_wandb.errors import SweepError
from mnist_wandb.study import MOST_DEATHS, SweepStudy
from mnist_wandb.sweep_messages import Worker, lock_path
from mnist_wandb.sweepfile import SweepFile, load_sweep

HEAD = "metric: {name: val/accuracy, goal: maximize}\n"
GRID = (
    HEAD
    + "method: grid\nparameters:\n  seed: {min: 0, max: 11}\n  data.scaling: {values: [unit, symmetric]}\n"
)
RANDOM = """
method: random
run_cap: 6
parameters:
  seed: {min: 0, max: 1000}
  optimizer:
    parameters:
      lr: {distribution: log_uniform_values, min: 0.001, max: 0.1}
      weight_decay: {distribution: beta, a: 1, b: 9}
  model.dropout: {values: [0.0, 0.5], probabilities: [0.2, 0.8]}
  training.batch_size: {distribution: q_uniform, min: 32, max: 128, q: 32}
  data.scaling: {values: [unit, symmetric]}
  name: {value: fixed}
"""


def sweep_of(text: str) -> SweepFile:
    Path("mine.yaml").write_text(text)
    return load_sweep("mine.yaml")


def open_study(text: str, storage: str | None = None) -> SweepStudy:
    Path("sweep/.workers").mkdir(parents=True, exist_ok=True)
    return SweepStudy(sweep_of(text), Path("sweep"), storage)


@pytest.fixture
def me() -> Iterator[Worker]:
    """A worker that lives, with a parent that lives."""
    Path("sweep/.workers").mkdir(parents=True)
    folder = Path("sweep").absolute()
    with FileLock(lock_path(folder, "me")), FileLock(lock_path(folder, "parent")):
        yield Worker("here", "me", "parent")


def claim_all(folder: str, text: str, results: Any) -> None:
    """Take trials until there are none; runs in a process of its own."""
    sweep = load_sweep(text)
    study = SweepStudy(sweep, Path(folder), None)
    name = multiprocessing.current_process().name
    with FileLock(lock_path(Path(folder), name)):
        while (claim := study.claim(Worker("here", name, "parent"))) is not None:
            results.put((name, claim.number, claim.run_id))
            study.end(claim, "finished", claim.number / 100)


def test_several_processes_take_every_grid_point_exactly_once() -> None:
    sweep_of(GRID)
    Path("sweep/.workers").mkdir(parents=True)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [
        context.Process(target=claim_all, args=("sweep", "mine.yaml", results)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    taken = [results.get(timeout=120) for _ in range(24)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert results.empty()
    assert sorted(number for _, number, _ in taken) == list(range(24))
    assert len({run_id for _, _, run_id in taken}) == 24
    sweep = load_sweep("mine.yaml")
    records = SweepStudy(sweep, Path("sweep"), None).records()
    assert [r.parameters for r in records] == [sweep.nest(sweep.grid_point(i)) for i in range(24)]
    assert {r.state for r in records} == {"finished"}


def test_random_draws_depend_on_the_number_only(me: Worker) -> None:
    study = open_study(RANDOM)
    sweep = study.sweep
    claims = [study.claim(me) for _ in range(7)]
    assert claims[6] is None  # run_cap
    for number, claim in enumerate(claims[:6]):
        assert claim is not None
        assert claim.number == number
        assert claim.parameters == sweep.nest(sweep.sample(number))
        assert claim.parameters["name"] == "fixed"


def test_bayes_learns_from_what_has_ended_and_repeats_itself(me: Worker) -> None:
    text = RANDOM.replace("random", "bayes").replace("run_cap: 6\n", "run_cap: 40\n" + HEAD)
    rates: list[list[float]] = []
    for folder in ("sweep", "again"):
        Path(folder, ".workers").mkdir(parents=True, exist_ok=True)
        study = SweepStudy(sweep_of(text), Path(folder), None)
        found = []
        for _ in range(40):
            claim = study.claim(me)
            assert claim is not None
            lr = claim.parameters["optimizer"]["lr"]
            assert 0.001 <= lr <= 0.1
            assert 0 <= claim.parameters["optimizer"]["weight_decay"] <= 1
            assert claim.parameters["training.batch_size"] in (32, 64, 96, 128)
            found.append(lr)
            study.end(claim, "finished", 1 - abs(lr - 0.01) * 10)
        rates.append(found)
    assert rates[0] == rates[1]
    early, late = rates[0][:10], rates[0][-10:]
    assert sum(abs(lr - 0.01) for lr in late) < sum(abs(lr - 0.01) for lr in early) / 2


def test_the_target_ends_a_sweep(me: Worker) -> None:
    study = open_study(GRID.replace("maximize", "maximize, target: 0.9"))
    first, second = study.claim(me), study.claim(me)
    assert first is not None
    assert second is not None
    study.end(first, "finished", 0.8)
    third = study.claim(me)
    study.end(second, "finished", 0.9)
    assert third is not None
    assert study.claim(me) is None


# ── what comes back ──────────────────────────────────────────────────────────────────────────


def test_a_trial_of_a_dead_worker_goes_on_and_that_of_a_live_one_stays(me: Worker) -> None:
    study = open_study(GRID)
    mine = study.claim(me)
    lost = study.claim(Worker("here", "dead", "dead-parent"))
    elsewhere = study.claim(Worker("there", "dead", "dead-parent"))
    assert None not in (mine, lost, elsewhere)
    again = open_study(GRID).claim(me)
    assert again is not None
    assert lost is not None
    assert (again.number, again.run_id, again.parameters) == (
        lost.number, lost.run_id, lost.parameters,
    )  # fmt: skip
    following = study.claim(me)
    assert following is not None
    assert following.number == 3


def test_a_trial_that_kills_its_workers_is_given_up(me: Worker) -> None:
    study = open_study(GRID)
    for _ in range(MOST_DEATHS):
        claim = study.claim(Worker("here", "dead", me.parent))
        assert claim is not None
        assert claim.number == 0
    following = study.claim(me)
    assert following is not None
    assert following.number == 1
    record = study.records()[0]
    assert record.state == "failed"
    assert record.error == "its worker process was killed 3 times (out of memory?)"


def test_deaths_with_the_parent_are_not_blamed_on_the_trial(me: Worker) -> None:
    study = open_study(GRID)
    for _ in range(2 * MOST_DEATHS):
        claim = study.claim(Worker("here", "dead", "dead-parent"))
        assert claim is not None
        assert claim.number == 0


def test_a_trial_that_was_put_back_comes_next(me: Worker) -> None:
    study = open_study(GRID)
    first, second = study.claim(me), study.claim(me)
    assert first is not None
    assert second is not None
    study.put_back(first, Worker("here", "another", me.parent))
    assert [r.state for r in study.records()] == ["running", "running"]
    study.put_back(first, me)
    assert [r.state for r in study.records()] == ["waiting", "running"]
    again = study.claim(me)
    assert again is not None
    assert (again.number, again.run_id) == (0, first.run_id)
    study.end(again, "finished", 0.5)
    study.put_back(again, me)
    assert [r.state for r in study.records()] == ["finished", "running"]


def test_a_kill_while_a_trial_is_made_costs_no_point(me: Worker) -> None:
    text = GRID.replace("grid", "bayes")
    study = open_study(text)
    study.study.ask()  # made, and then nothing more was written
    half = study.study.ask(study.space)
    half.set_user_attr("worker", vars(me))
    claim = study.claim(me)
    assert claim is not None
    assert claim.number == 0
    assert claim.parameters == study.records()[0].parameters
    assert len(study.records()) == 1


def test_what_hyperband_has_stopped_stays_stopped(me: Worker) -> None:
    study = open_study(GRID)
    claim = study.claim(Worker("here", "dead", "dead-parent"))
    assert claim is not None
    assert study.report(claim, 0, 0.5)
    assert study.mark_stopped(claim)
    again = study.claim(me)
    assert again is not None
    assert again.stopped
    study.end(again, "stopped")
    assert [(r.state, r.value) for r in study.records()] == [("stopped", 0.5)]


def test_a_worker_that_was_given_up_cannot_report(me: Worker) -> None:
    study = open_study(GRID)
    claim = study.claim(me)
    assert claim is not None
    study.study.tell(0, state=optuna.trial.TrialState.FAIL)
    assert not study.report(claim, 0, 0.5)
    assert not study.mark_stopped(claim)
    study.end(claim, "finished", 0.5)
    assert study.records()[0].state == "failed"


def test_other_histories_are_those_of_the_other_trials(me: Worker) -> None:
    study = open_study(GRID)
    first, second = study.claim(me), study.claim(me)
    assert first is not None
    assert second is not None
    for iteration, value in ((0, 0.1), (1, 0.3), (0, 0.2)):
        study.report(first, iteration, value)
    study.report(second, 0, 0.7)
    assert study.other_histories(second) == [[0.2, 0.3]]


def test_errors_are_kept(me: Worker) -> None:
    study = open_study(GRID)
    claim = study.claim(me)
    assert claim is not None
    study.end(claim, "failed", error="training diverged at step 3")
    (record,) = study.records()
    assert (record.state, record.value) == ("failed", None)
    assert record.error == "training diverged at step 3"
    assert record.seconds is not None


# ── databases ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("storage", "expected"),
    [
        ("nonsense", "--storage: not a database's address; expected postgresql://"),
        ("sqlite://", "names no file"),
        ("oracle://host/name", "--storage: got oracle, expected postgresql://"),
        ("postgresql://me:secret@127.0.0.1:1/sweeps", "--storage postgresql+psycopg://me:***@127.0.0.1:1"),
        ("sqlite:////nowhere/at/all.db", "--storage sqlite:////nowhere/at/all.db: no such folder"),
    ],
)  # fmt: skip
def test_a_database_that_cannot_be_used_is_told_without_its_password(
    storage: str, expected: str
) -> None:
    with pytest.raises(SweepError) as caught:
        open_study(GRID, storage)
    assert expected in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_damaged_file_is_told() -> None:
    Path("sweep").mkdir()
    Path("sweep/sweep.db").write_text("not a database, not at all " * 100)
    with pytest.raises(SweepError, match="file is not a database"):
        open_study(GRID)
