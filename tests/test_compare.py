"""Groups, their order, and the tests of two groups, on real runs."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import Finished
from scipy import stats

from mnist_wandb.compare import (
    Comparison,
    compare_runs,
    comparison_csv,
    comparison_json,
    explain_pair,
    show_ids,
    show_p,
)
from mnist_wandb.errors import ConfigError, RunError
from mnist_wandb.records import RunRecord, read_predictions, read_records
from mnist_wandb.runs import list_runs

Cli = Callable[..., Finished]
METRIC = "best/val_accuracy"


@pytest.fixture
def records(example_runs: Path) -> list[RunRecord]:
    return read_records(list_runs(example_runs))[0]


def score(record: RunRecord, value: float, **changes: object) -> RunRecord:
    """The record with another validation score and other settings (`section__key=value`)."""
    config = dict(record.config)
    for key, setting in changes.items():
        section, _, name = key.partition("__")
        config[section] = {**config[section], name: setting} if name else setting
    return replace(record, metrics={**record.metrics, METRIC: value}, config=config)


def made(record: RunRecord, *scores: tuple[float, ...], start: int = 0) -> list[RunRecord]:
    """One group for each tuple of scores, with seeds from `start`, told apart by batch size."""
    return [
        replace(
            score(record, value, seed=start * i + j, training__batch_size=32 * (i + 1)),
            location=f"runs/{i}-{j}",
            run_id=f"{i}-{j}",
        )
        for i, values in enumerate(scores)
        for j, value in enumerate(values)
    ]


# ── groups ───────────────────────────────────────────────────────────────────────────────────


def test_runs_that_differ_only_by_seed_make_a_group(records: list[RunRecord]) -> None:
    comparison = compare_runs(records[:4])
    best, other = comparison.groups
    assert (best.letter, other.letter) == ("A", "B")
    assert {best.label, other.label} == {"linear", "mlp_128"}
    runs = records[:2] if best.label == "linear" else records[2:4]
    assert [run.seed for run in sorted(best.runs, key=lambda run: run.seed)] == [0, 1]
    assert comparison.columns == ("model.name",)  # hidden_sizes and the like follow from it
    values = [run.metrics[METRIC] for run in runs]
    assert best.scores.mean == pytest.approx(np.mean(values))
    assert best.scores.std == pytest.approx(np.std(values, ddof=1))
    assert best.scores.best == max(values) == best.runs[0].metrics[METRIC]
    assert best.test is not None
    assert best.test.mean == pytest.approx(np.mean([r.metrics["test/accuracy"] for r in best.runs]))
    assert best.num_parameters[0] == best.num_parameters[1] == runs[0].num_parameters


def test_name_tracking_device_and_folder_do_not_split_a_group(records: list[RunRecord]) -> None:
    run = records[0]
    tracking = {**run.config["tracking"], "notes": "other", "tags": ["x"]}
    other = score(run, 0.5, name="other", device="cpu", data__dir="/elsewhere", tracking=tracking)
    assert len(compare_runs([run, replace(other, location="x")]).groups) == 1


def test_groups_are_sorted_by_validation_never_by_test(records: list[RunRecord]) -> None:
    low, high = made(records[0], (0.8,), (0.9,))
    low = replace(low, metrics={**low.metrics, "test/accuracy": 0.99})
    high = replace(high, metrics={**high.metrics, "test/accuracy": 0.11})
    assert [g.label for g in compare_runs([low, high]).groups] == ["batch_size 64", "batch_size 32"]


def test_a_loss_is_sorted_from_the_smallest(records: list[RunRecord]) -> None:
    comparison = compare_runs(records, metric="val/loss")
    means = [group.scores.mean for group in comparison.groups]
    assert comparison.lower_is_better
    assert means == sorted(means)
    assert comparison.test_metric == "test/loss"
    assert comparison.groups[0].scores.best == min(
        run.metrics["val/loss"] for run in comparison.groups[0].runs
    )


def test_group_by_asks_for_other_groups_and_says_what_they_mix(records: list[RunRecord]) -> None:
    comparison = compare_runs(records, group_by=["model.name"])
    assert sorted((g.label, g.scores.n) for g in comparison.groups) == [
        ("linear", 5), ("mlp_128", 2)
    ]  # fmt: skip
    letter = next(g.letter for g in comparison.groups if g.label == "linear")
    assert comparison.warnings == (f"group {letter} mixes runs that differ in optimizer.lr",)


def test_columns_leave_out_what_follows_from_an_optimizer(records: list[RunRecord]) -> None:
    adam = {"name": "adam", "lr": 0.001, "weight_decay": 0.0, "betas": [0.9, 0.999], "eps": 1e-8}
    sgd = {"name": "sgd", "lr": 0.1, "weight_decay": 0.0, "momentum": 0.9, "nesterov": True}
    runs = [
        replace(score(records[0], 0.9, optimizer=o), location=o["name"]) for o in (adam, sgd)
    ]  # fmt: skip
    comparison = compare_runs(runs)
    assert comparison.columns == ("optimizer.name", "optimizer.lr")
    assert sorted(g.label for g in comparison.groups) == ["adam", "sgd"]
    other = replace(score(records[0], 0.9, optimizer={**sgd, "lr": 0.2}), location="other")
    labels = [g.label for g in compare_runs([*runs, other]).groups]
    assert sorted(labels) == ["adam, lr 0.001", "sgd, lr 0.1", "sgd, lr 0.2"]


def test_letters_go_on_after_z(records: list[RunRecord]) -> None:
    groups = compare_runs(made(records[0], *((0.9 - i / 100,) for i in range(28)))).groups
    assert [group.letter for group in groups[24:]] == ["Y", "Z", "AA", "AB"]


def test_runs_that_did_not_finish_are_named_and_left_out(records: list[RunRecord]) -> None:
    diverged = replace(records[1], status="diverged", error="loss is\nnan at step 3")
    running = replace(records[2], status=None)
    comparison = compare_runs([records[0], diverged, running])
    assert [run.run_id for group in comparison.groups for run in group.runs] == [records[0].run_id]
    assert [(item.run, item.status, item.reason) for item in comparison.left_out] == [
        (records[1].title, "diverged", "loss is nan at step 3"),
        (records[2].title, "unfinished", "under way, or killed before its end"),
    ]
    with pytest.raises(RunError, match=r"no finished run among the 1 given\n.*: diverged: loss is"):
        compare_runs([diverged])


# ── two groups ───────────────────────────────────────────────────────────────────────────────


def test_groups_with_the_same_seeds_get_a_paired_test(records: list[RunRecord]) -> None:
    a, b = (0.95, 0.93, 0.94, 0.96), (0.90, 0.91, 0.89, 0.90)
    (pair,) = compare_runs(made(records[0], b, a)).pairs
    assert pair.seeds is not None
    assert pair.seeds.method == "paired t-test"
    assert pair.seeds.p_value == pytest.approx(stats.ttest_rel(a, b).pvalue)
    assert [(t.seed, t.fixed, t.broken, t.p_value) for t in pair.images[:1]] == [(3, (), (), 1.0)]


def test_groups_with_other_seeds_get_welchs_test(records: list[RunRecord]) -> None:
    a, b = (0.95, 0.93, 0.94), (0.90, 0.91, 0.89, 0.90)
    (pair,) = compare_runs(made(records[0], b, a, start=10)).pairs
    assert pair.seeds is not None
    assert pair.seeds.method == "Welch's t-test"
    assert pair.seeds.p_value == pytest.approx(stats.ttest_ind(a, b, equal_var=False).pvalue)
    assert [test.seed for test in pair.images] == [None]  # the best run of each


def words(comparison: Comparison) -> str:
    return explain_pair(comparison.pairs[0], comparison)[0]


def test_the_verdict_over_seeds_is_in_words(records: list[RunRecord]) -> None:
    clear = compare_runs(made(records[0], (0.95, 0.96, 0.94), (0.80, 0.82, 0.81)))
    assert "A and B over seeds, best/val_accuracy: A is better: +0.1400 (95 % interval" in words(
        clear
    )
    noise = compare_runs(made(records[0], (0.95, 0.85, 0.91), (0.92, 0.90, 0.86)))
    assert "the difference is within noise" in words(noise)
    single = compare_runs(made(records[0], (0.95,), (0.9, 0.8)))
    assert "one run says nothing; train more seeds of both" in words(single)
    same = compare_runs(made(records[0], (0.95, 0.95), (0.95, 0.95)))
    assert "no difference at all" in words(same)
    constant = compare_runs(made(records[0], (0.95, 0.95), (0.90, 0.90)))
    assert "the same difference for each seed, nothing to test" in words(constant)


def test_the_better_group_of_a_loss_is_the_lower_one(records: list[RunRecord]) -> None:
    runs = made(records[0], (0.95, 0.96, 0.94), (0.80, 0.82, 0.81))
    runs = [replace(r, metrics={**r.metrics, "val/loss": 1 - r.metrics[METRIC]}) for r in runs]
    assert "A is better: -0.1400" in words(compare_runs(runs, metric="val/loss"))


def test_images_fixed_and_broken_are_counted_from_the_predictions(records: list[RunRecord]) -> None:
    comparison = compare_runs(records[:4])
    (pair,) = comparison.pairs
    by_id = {record.run_id: record for record in records}
    assert sorted(str(test.seed) for test in pair.images) == ["0", "1"]
    for test in pair.images:
        first, second = (read_predictions(by_id[run]) for run in (test.first, test.second))
        assert first is not None
        assert second is not None
        right = [result.predictions == result.labels for result in (first, second)]
        assert list(test.fixed) == sorted(first.ids[right[0] & ~right[1]])
        assert list(test.broken) == sorted(first.ids[~right[0] & right[1]])
        n = len(test.fixed) + len(test.broken)
        assert test.p_value == pytest.approx(stats.binomtest(len(test.fixed), n).pvalue)
    lines = explain_pair(pair, comparison)
    assert "A and B on 359 test images, seed " in lines[1]
    assert lines[2].startswith("    images fixed: ")


def test_runs_on_other_test_images_get_no_test_on_images(records: list[RunRecord]) -> None:
    other = score(records[2], 0.1, data__dataset="mnist")
    (pair,) = compare_runs([records[0], other]).pairs
    assert pair.images == ()
    assert "have other test images" in str(pair.note)
    (pair,) = compare_runs([records[0], replace(records[2], folder=None)]).pairs
    assert "has no predictions of test images at hand" in str(pair.note)


def test_ids_and_p_values_are_shown_short() -> None:
    assert show_ids([]) == "none"
    assert show_ids(range(12)) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"
    assert (show_p(0.0321), show_p(1e-9)) == ("0.032", "0.0001 or less")


# ── bad input ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"metric": "test/accuracy"},
            "--metric test/accuracy: test scores are shown and never choose",
        ),
        ({"metric": "val/acc"}, "--metric val/acc: no run has it; known: best/epoch, best/val_acc"),
        ({"group_by": ["model.nam"]}, "--group-by model.nam: .* did you mean 'model.name'"),
        ({"pairs": [("A", "Q")]}, r"--pair: got 'Q', allowed: a group's letter \(A to E\), or"),
        ({"pairs": [("B", "b")]}, "--pair B b: both are group B"),
    ],
)
def test_bad_questions_are_refused(
    records: list[RunRecord], arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        compare_runs(records, **arguments)  # type: ignore[arg-type]


# ── the command ──────────────────────────────────────────────────────────────────────────────


def test_compare_prints_a_table_and_the_tests(cli: Cli, runs_dir: Path) -> None:
    done = cli("compare")
    assert (done.code, done.err) == (0, "")
    for text in ("95 % interval", "test/accuracy is shown", "mlp_128", "over seeds", "McNemar's"):
        assert text in done.out
    assert cli("compare", "runs").out == done.out


def test_compare_json_and_csv_hold_the_same_groups(cli: Cli, runs_dir: Path) -> None:
    found = json.loads(cli("compare", "runs", "--json", "--pair", "A", "C").out)
    rows = list(csv.DictReader(io.StringIO(cli("compare", "runs", "--csv").out)))
    assert list(found) == [
        "metric", "test_metric", "lower_is_better", "groups", "pairs", "left_out", "warnings"
    ]  # fmt: skip
    assert [pair["groups"] for pair in found["pairs"]] == [["A", "B"], ["A", "C"]]
    assert [group["group"] for group in found["groups"]] == [row["group"] for row in rows]
    assert [group["mean"] for group in found["groups"]] == [float(row["mean"]) for row in rows]
    assert sum(group["n"] for group in found["groups"]) == 7


def test_compare_as_markdown_is_the_table_alone(
    cli: Cli, runs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    for run in list_runs(runs_dir)[4:]:  # of one sweep: a bar in a name must not end a cell
        text = (run.path / "config.yaml").read_text()
        (run.path / "config.yaml").write_text(re.sub("^name: .*", "name: a|b", text, flags=re.M))
    options = ("--group-by", "name", "--group-by", "optimizer.lr")
    found = json.loads(cli("compare", *options, "--json").out)
    lines = cli("compare", *options, "--markdown").out.splitlines()
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert {len(row) for row in cells} == {len(cells[0])}
    assert cells[0][0] == "group"
    assert {cell.rstrip(":") for cell in cells[1]} == {"---"}
    assert [row[0] for row in cells[2:]] == [group["group"] for group in found["groups"]]
    name, mean = cells[0].index("name"), cells[0].index("best/val_accuracy ± std")
    for row, group in zip(cells[2:], found["groups"], strict=True):
        assert row[name].replace("\\|", "|") == (group["parameters"]["name"] or "–")
        assert row[mean].startswith(f"{group['mean']:.4f}")
    assert "a\\|b" in {row[name] for row in cells}


def test_a_sweep_that_is_not_there_is_told(cli: Cli, runs_dir: Path) -> None:
    Path("sweep.yaml").write_text(
        "method: grid\nprogram: mnist-wandb\nmetric: {name: best/val_accuracy, goal: maximize}\n"
        'command: ["${program}", run, "${args_no_hyphens}"]\nparameters: {seed: {values: [0]}}\n'
    )
    Path("lab.yaml").write_text("model: {name: linear}\n")
    for spec, message in {
        "sweep.yaml": "sweep.yaml: this sweep has no runs in runs; `mnist-wandb sweep run sweep.yaml`"
        " makes them",
        "lab.yaml": "lab.yaml",
        "missing.yaml": "missing.yaml: no such sweep file",
        "x" * 300 + ".yaml": "x",
        "nowhere/small_sweep": "nowhere/small_sweep: no run folder of that path, name or id",
    }.items():
        done = cli("compare", spec)
        assert done.code == 2
        assert done.err.startswith(f"error: {message}")
        assert len(done.err.splitlines()) == 1
    assert "give a run, a folder of runs or a sweep" in cli("compare", "lab.yaml").err


def test_compare_takes_a_sweep_by_name_and_a_pair_by_run(cli: Cli, runs_dir: Path) -> None:
    runs = list_runs(runs_dir)
    pair = (runs[4].run_id, runs[6].path.name)
    found = json.loads(cli("compare", "small_sweep", "--json", "--pair", *pair).out)
    assert [list(group["parameters"]) for group in found["groups"]] == [["optimizer.lr"]] * 3
    assert {run["run_id"] for group in found["groups"] for run in group["runs"]} == {
        run.run_id for run in runs[4:]
    }


def test_compare_says_what_it_leaves_out_and_warns_on_stderr(cli: Cli, runs_dir: Path) -> None:
    first, second, *_ = list_runs(runs_dir)
    first.summary_path.unlink()
    environment = second.read_environment()
    second.write_environment({**environment, "versions": {**environment["versions"], "torch": "1"}})
    done = cli("compare")
    assert done.code == 0
    assert "left out: digits-linear (example0): unfinished" in done.err
    assert "warning: version of torch: " in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--json", "--csv"), "error: --json and --csv: choose one"),
        (("--csv", "--markdown"), "error: --csv and --markdown: choose one"),
        (("--metric", "test/loss"), "error: --metric test/loss: test scores are shown and never"),
        (("nowhere",), "error: nowhere: no run folder of that path, name or id in runs"),
    ],
)
def test_compare_refuses_bad_input(
    cli: Cli, runs_dir: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = cli("compare", *arguments)
    assert (done.code, done.out) == (2, "")
    assert message in done.err


def test_json_and_csv_are_plain_for_a_single_run(records: list[RunRecord]) -> None:
    comparison = compare_runs(records[:1])
    assert json.loads(json.dumps(comparison_json(comparison), allow_nan=False))["pairs"] == []
    assert comparison_csv(comparison).count("\n") == 2
