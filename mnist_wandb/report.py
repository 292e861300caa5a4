"""Many runs → one HTML page that needs no network: charts, tables and pictures.

`page/` holds the template, the style and the script; Vega-Lite draws the charts.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mnist_wandb import __version__, charts
from mnist_wandb.compare import (
    Comparison,
    Group,
    differing_keys,
    explain_images,
    explain_seeds,
    short_keys,
    show_ids,
    show_sample,
)
from mnist_wandb.errors import MnistWandbError
from mnist_wandb.gallery import MISTAKES, PictureBook
from mnist_wandb.metrics import EvalResult, calibration_bins, class_scores
from mnist_wandb.records import (
    RunRecord,
    describe_machine,
    flatten,
    is_studied,
    read_predictions,
    show_value,
)
from mnist_wandb.significance import explained_variance, rank_correlation

PAGE_DIR = Path(__file__).parent / "page"
MAX_DETAILED = 24
"""Runs with confusion matrix and pictures."""
MAX_CURVES = 60
"""Runs with learning curves."""
MAX_POINTS = 200
"""Points of one curve."""
MAX_CHARTED = charts.NUM_COLOURS
"""Groups in the charts that have one mark for each group and class."""
MIN_BIN = 5
"""Images in a bin of the calibration plot; fewer say nothing."""
MIN_RUNS_FOR_IMPORTANCE = 6
MAX_AXES = 8
MAX_ROW_LABEL = 16
"""Characters of a group's label beside the leaderboard."""
CURVES = {
    "val/accuracy": "validation accuracy",
    "val/loss": "validation loss",
    "val/macro_f1": "validation macro F1",
    "train/accuracy": "training accuracy",
    "train/loss": "training loss",
    "train/lr": "learning rate",
    "train/grad_norm": "norm of the gradient",
    "train/images_per_second": "images per second",
}


@dataclass(frozen=True)
class Shown:
    """A run as the page shows it."""

    record: RunRecord
    group: Group
    colour: str
    result: EvalResult | None

    @property
    def label(self) -> str:
        """Short and unique on the page."""
        return f"{self.group.letter} · {self.group.label} · seed {self.record.seed}"


def build_report(comparison: Comparison, *, data_dir: Path, title: str = "") -> str:
    """Make the page.

    Args:
        comparison: of runs whose folders are at hand, see `compare_runs`.
        data_dir: where data sets lie whose configuration does not name a folder.
        title: heading; default: from the number of runs and the data sets.

    Returns:
        One HTML document without references to other files.
    """
    import jinja2

    shown, problems = _show_runs(comparison)
    book = PictureBook(data_dir)
    payload = _make_payload(comparison, shown, book)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGE_DIR), autoescape=True, undefined=jinja2.StrictUndefined
    )
    datasets = sorted({s.record.config["data"]["dataset"] for s in shown})
    return environment.get_template("report.html").render(
        title=title or f"{len(shown)} runs on {', '.join(datasets)}",
        comparison=comparison,
        datasets=datasets,
        shown=shown,
        payload=payload,
        groups=list(zip(comparison.groups, _colours(comparison), strict=True)),
        findings=_findings(comparison),
        problems=problems,
        missing=list(book.missing),
        num_detailed=len(payload["runs"]),
        settings=_settings_table(comparison),
        facts=_environment_table(shown),
        total_seconds=sum(s.record.training_seconds for s in shown),
        max_charted=MAX_CHARTED,
        short=short_keys(comparison.columns),
        show_sample=show_sample,
        show_value=show_value,
        style=_safe(PAGE_DIR / "report.css"),
        script=_safe(PAGE_DIR / "report.js"),
        library=_library(),
        version=__version__,
        made=time.strftime("%Y-%m-%d %H:%M"),
    )


def _safe(path: Path) -> Any:
    import markupsafe

    return markupsafe.Markup(path.read_text(encoding="utf-8"))  # the package's own file


@functools.cache
def _library() -> Any:
    """Vega, Vega-Lite and Vega-Embed as one script, from the vl-convert package."""
    import markupsafe
    import vl_convert

    script = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return markupsafe.Markup(script.replace("</script", "<\\/script"))


def _colours(comparison: Comparison) -> list[str]:
    return [charts.colour_of(index) for index in range(len(comparison.groups))]


def _show_runs(comparison: Comparison) -> tuple[list[Shown], list[str]]:
    """All runs, the best of each group first; predictions of the first `MAX_DETAILED`."""
    shown: list[Shown] = []
    problems: list[str] = []
    groups = list(zip(comparison.groups, _colours(comparison), strict=True))
    for place in range(max(len(group.runs) for group in comparison.groups)):
        for group, colour in groups:
            if place >= len(group.runs):
                continue
            record, result = group.runs[place], None
            if len(shown) < MAX_DETAILED:
                try:
                    result = read_predictions(record)
                except MnistWandbError as error:
                    problems.append(str(error))
            shown.append(Shown(record, group, colour, result))
    return shown, problems


def _findings(comparison: Comparison) -> list[dict[str, Any]]:
    """What the tests of each pair say, for people."""
    return [
        {
            "first": pair.first,
            "second": pair.second,
            "seeds": explain_seeds(pair, comparison),
            "images": [
                (explain_images(pair, test), show_ids(test.fixed), show_ids(test.broken))
                for test in pair.images
            ],
            "note": pair.note,
        }
        for pair in comparison.pairs
    ]


# ── data of the script ───────────────────────────────────────────────────────────────────────


def _make_payload(
    comparison: Comparison, shown: Sequence[Shown], book: PictureBook
) -> dict[str, Any]:
    detailed = [(s, s.result) for s in shown if s.result is not None]
    return {
        "charts": _make_charts(comparison, shown),
        "curves": _make_curves(shown[:MAX_CURVES]),
        "runs": [
            {
                "id": s.record.run_id,
                "label": s.label,
                "classes": list(result.class_names),
                "confusion": result.confusion.tolist(),
                "samples": book.samples(s.record, result),
                "mistakes": book.mistakes(s.record, result),
            }
            for s, result in detailed
        ],
        "pair": _show_pair(comparison, book),
        "pictures": book.pictures,
    }


def _show_pair(comparison: Comparison, book: PictureBook) -> dict[str, Any] | None:
    """Images that one of the two best groups gets right and the other wrong."""
    pair = comparison.pairs[0] if comparison.pairs else None
    if pair is None or not pair.images:
        return None
    test = pair.images[0]
    first = next(run for run in pair.first.runs if run.run_id == test.first)
    second = next(run for run in pair.second.runs if run.run_id == test.second)
    ours, theirs = read_predictions(first), read_predictions(second)
    if ours is None or theirs is None:
        return None
    lists = {}
    for name, ids in (("fixed", test.fixed), ("broken", test.broken)):
        chosen = ids[:MISTAKES]
        where = {int(number): i for i, number in enumerate(ours.ids)}
        there = {int(number): i for i, number in enumerate(theirs.ids)}
        items = book.items(first, ours, [where[number] for number in chosen])
        others = theirs.predictions[[there[number] for number in chosen]].tolist()
        lists[name] = [(*item, other) for item, other in zip(items, others, strict=True)]
    return {
        "first": pair.first.letter,
        "second": pair.second.letter,
        "classes": list(ours.class_names),
        "total": {"fixed": len(test.fixed), "broken": len(test.broken)},
        **lists,
    }


def _make_curves(shown: Sequence[Shown]) -> dict[str, Any]:
    """Points (epoch, value) by metric and run."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {name: {} for name in CURVES}
    for s in shown:
        if s.record.folder is None:
            continue
        try:
            rows = s.record.folder.read_metrics()
        except MnistWandbError:
            continue
        for name in CURVES:
            points = [(row["epoch"], row[name]) for row in rows if name in row]
            if points:
                found[name][s.record.run_id] = _thin(points)
    return {
        "metrics": [[name, CURVES[name]] for name, runs in found.items() if runs],
        "points": {name: runs for name, runs in found.items() if runs},
        "runs": {s.record.run_id: {"name": s.label, "colour": s.colour} for s in shown},
        "spec": charts.learning_curves(),
    }


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `MAX_POINTS`, evenly spread, the last one kept."""
    chosen = np.linspace(0, len(points) - 1, min(len(points), MAX_POINTS)).round().astype(int)
    return [(float(f"{points[i][0]:.5g}"), float(f"{points[i][1]:.5g}")) for i in chosen]


def _make_charts(comparison: Comparison, shown: Sequence[Shown]) -> dict[str, Any]:
    rows = _group_rows(comparison)
    metric = comparison.metric
    made = {"leaderboard": charts.leaderboard(rows, metric, comparison.test_metric)}
    scores = _class_rows(comparison, shown)
    if scores:
        made["classes"] = charts.class_scores_chart(scores)
    bins = [
        {"name": s.label, "colour": s.colour, "confidence": c, "accuracy": a, "images": n}
        for s in _best_runs(comparison, shown)
        if s.result is not None
        for c, a, n in calibration_bins(s.result.probabilities, s.result.labels)
        if n >= MIN_BIN
    ]
    if bins:
        made["calibration"] = charts.calibration(bins)
    for field, title in (("parameters", "parameters"), ("seconds", "training seconds")):
        if len({row[field] for row in rows}) > 1:
            made[field] = charts.cost(rows, field, title, metric)
    return made | _sweep_charts(comparison)


def _group_rows(comparison: Comparison) -> list[dict[str, Any]]:
    return [
        {
            "group": group.letter,
            "name": f"{group.letter} · {group.label}",
            "row": _row_label(group, comparison),
            "colour": colour,
            "mean": group.scores.mean,
            "low": group.scores.low,
            "high": group.scores.high,
            "test": group.test.mean if group.test else None,
            "runs": [run.metrics[comparison.metric] for run in group.runs],
            "parameters": group.num_parameters[1],
            "seconds": group.training_seconds,
        }
        for group, colour in zip(comparison.groups, _colours(comparison), strict=True)
    ]


def _row_label(group: Group, comparison: Comparison) -> str:
    """Beside the leaderboard: the letter alone where labels are long; the table has them."""
    longest = max(len(other.label) for other in comparison.groups)
    return f"{group.letter} · {group.label}" if longest <= MAX_ROW_LABEL else group.letter


def _best_runs(comparison: Comparison, shown: Sequence[Shown]) -> list[Shown]:
    """The best run of each of the best groups."""
    best = {id(group.runs[0]) for group in comparison.groups[:MAX_CHARTED]}
    return [s for s in shown if id(s.record) in best]


def _class_rows(comparison: Comparison, shown: Sequence[Shown]) -> list[dict[str, Any]]:
    """F1 of each class and group: mean, smallest and largest over the group's runs."""
    rows = []
    classes: tuple[str, ...] = ()
    for group in comparison.groups[:MAX_CHARTED]:
        members = [s for s in shown if s.group is group and s.result is not None]
        results = [s.result for s in members if s.result is not None]
        classes = classes or (results[0].class_names if results else ())
        results = [result for result in results if result.class_names == classes]
        if not results:
            continue
        f1 = np.array([class_scores(result.confusion).f1 for result in results])
        for i, name in enumerate(classes):
            rows.append(
                {
                    "class": name,
                    "name": f"{group.letter} · {group.label}",
                    "colour": members[0].colour,
                    "mean": float(f1[:, i].mean()),
                    "low": float(f1[:, i].min()),
                    "high": float(f1[:, i].max()),
                }
            )
    order = {name: i for i, name in enumerate(classes)}
    return sorted(rows, key=lambda row: order[row["class"]])


# ── settings ─────────────────────────────────────────────────────────────────────────────────


def _sweep_charts(comparison: Comparison) -> dict[str, Any]:
    """Importance and parallel coordinates, where enough runs differ in their settings."""
    runs = [run for group in comparison.groups for run in group.runs]
    keys = [key for key in comparison.columns if _varies(key, runs)]
    columns = {key: [flatten(run.config).get(key) for run in runs] for key in keys}
    telling = len(keys) > 1 or any(all(map(charts.is_number, c)) for c in columns.values())
    if len(runs) < MIN_RUNS_FOR_IMPORTANCE or not telling:
        return {}  # one choice of models, say: the leaderboard shows it better
    scores = [run.metrics[comparison.metric] for run in runs]
    rows = [
        _weigh(key, values, scores, lower_is_better=comparison.lower_is_better)
        for key, values in columns.items()
    ]
    rows.sort(key=lambda row: -row["share"])
    shown = [row["setting"] for row in rows[: MAX_AXES - 1]]
    short = short_keys(keys)
    axes = {short[key]: columns[key] for key in shown} | {comparison.metric: scores}
    names = [run.title for run in runs]
    for row in rows:
        row["setting"] = short[row["setting"]]
    return {
        "importance": charts.importance(rows),
        "parallel": charts.parallel_coordinates(axes, names),
    }


def _varies(key: str, runs: Sequence[RunRecord]) -> bool:
    return bool(differing_keys([flatten(run.config) for run in runs], [key]))


def _weigh(
    key: str, values: Sequence[Any], scores: Sequence[float], *, lower_is_better: bool
) -> dict[str, Any]:
    """How much of the scores' variance one setting explains alone, and in which direction."""
    if all(charts.is_number(value) for value in values):
        share = explained_variance(scores, _bin_numbers(values))
        correlation = rank_correlation(values, scores)
        rising = (correlation > 0) != lower_is_better
        words = (
            "no clear direction"
            if abs(correlation) < 0.3
            else ("higher is better" if rising else "lower is better")
        )
        return {"setting": key, "share": share, "direction": f"{words} (ρ = {correlation:+.2f})"}
    texts = [show_value(value) for value in values]
    means = {t: np.mean([s for s, u in zip(scores, texts, strict=True) if u == t]) for t in texts}
    best = (min if lower_is_better else max)(means, key=lambda text: means[text])
    return {
        "setting": key,
        "share": explained_variance(scores, texts),
        "direction": f"best mean: {best}",
    }


def _bin_numbers(values: Sequence[float]) -> list[int]:
    """Each distinct number, or quarters of equal size where there are more than five."""
    distinct = sorted(set(values))
    if len(distinct) <= 5:
        return [distinct.index(value) for value in values]
    edges = np.quantile(values, [0.25, 0.5, 0.75])
    return [int(np.searchsorted(edges, value)) for value in values]


def _settings_table(comparison: Comparison) -> dict[str, Any]:
    """Settings of each group's best run: those that differ, and those that are common."""
    flats = [flatten(group.runs[0].config) for group in comparison.groups]
    keys = list(dict.fromkeys(key for flat in flats for key in flat if is_studied(key)))
    differing = differing_keys(flats, keys)
    common = [(key, show_value(flats[0].get(key))) for key in keys if key not in differing]
    rows = [(key, [show_value(flat.get(key)) for flat in flats]) for key in differing]
    return {"differing": rows, "common": common}


def _environment_table(shown: Sequence[Shown]) -> list[tuple[str, list[tuple[str, int]]]]:
    """Facts about where the runs ran: each value with its number of runs."""
    facts: dict[str, Iterable[str]] = {
        "machine": (describe_machine(s.record) for s in shown),
        "platform": (_fact(s, "platform") for s in shown),
        "Python": (_fact(s, "python") for s in shown),
        "git commit": (_fact(s, "git_commit") for s in shown),
        "precision": (_fact(s, "precision") for s in shown),
        "data fingerprint": (_fact(s, "data_fingerprint")[:16] for s in shown),
    }
    versions = [s.record.environment.get("versions") or {} for s in shown]
    for package in dict.fromkeys(name for found in versions for name in found):
        facts[package] = [str(found.get(package, "unknown")) for found in versions]
    return [(name, _count(values)) for name, values in facts.items()]


def _fact(shown: Shown, key: str) -> str:
    value = shown.record.environment.get(key)
    return "unknown" if value is None else str(value)


def _count(values: Iterable[str]) -> list[tuple[str, int]]:
    counts: dict[str, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return sorted(counts.items(), key=lambda pair: -pair[1])
