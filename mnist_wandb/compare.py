"""Many runs → groups that differ only by seed, with error bars, and paired tests of two groups.

Groups are sorted and chosen by validation scores; test scores are shown beside them.
"""

from __future__ import annotations

import csv
import difflib
import functools
import io
import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mnist_wandb.config import DEFAULT_METRIC, VARIANTS, RunConfig
from mnist_wandb.errors import ConfigError, RunError
from mnist_wandb.records import (
    LeftOut,
    RunRecord,
    find_differences,
    flatten,
    is_studied,
    read_predictions,
    show_value,
)
from mnist_wandb.significance import (
    ALPHA,
    MeanTest,
    Sample,
    describe_sample,
    mcnemar_test,
    paired_test,
    welch_test,
)

COMPLETE = ("finished", "early_stopped")
IDS_SHOWN = 10


@dataclass(frozen=True)
class Group:
    """Runs that differ only by seed (or that agree in the keys asked for).

    Attributes:
        letter: A is the best one.
        label: what sets it apart, in a few words (not all settings that do, where fewer suffice).
        parameters: the settings that set it apart, by dotted key.
        runs: the best one by validation first.
        scores: of the metric that groups are sorted by.
        test: of the same quantity on the test split; None where it was not scored.
    """

    letter: str
    label: str
    parameters: Mapping[str, Any]
    runs: tuple[RunRecord, ...]
    scores: Sample
    test: Sample | None

    @property
    def num_parameters(self) -> tuple[int, int]:
        """Smallest and largest number of parameters; as a rule they are equal."""
        counts = [run.num_parameters for run in self.runs]
        return min(counts), max(counts)

    @property
    def training_seconds(self) -> float:
        """Mean over the runs."""
        return sum(run.training_seconds for run in self.runs) / len(self.runs)

    @property
    def images_per_second(self) -> float:
        """Mean over the runs."""
        return sum(run.images_per_second for run in self.runs) / len(self.runs)


@dataclass(frozen=True)
class ImageTest:
    """McNemar's test of two runs on the same test images.

    Attributes:
        first, second: ids of the two runs.
        seed: the seed they share; None for the best runs of groups without a common seed.
        num_images: test images.
        fixed: ids of the images that only the first one got right.
        broken: ids of the images that only the second one got right.
        p_value: two-sided, exact.
    """

    first: str
    second: str
    seed: int | None
    num_images: int
    fixed: tuple[int, ...]
    broken: tuple[int, ...]
    p_value: float


@dataclass(frozen=True)
class Pair:
    """Two groups side by side.

    Attributes:
        first, second: the groups.
        seeds: t-test on the metric over the seeds; None where it cannot be made.
        images: one test for each common seed, the best runs first.
        note: why there are no tests on images, if so.
    """

    first: Group
    second: Group
    seeds: MeanTest | None
    images: tuple[ImageTest, ...]
    note: str | None = None


@dataclass(frozen=True)
class Comparison:
    """The result of `compare_runs`.

    Attributes:
        metric: what groups are sorted by.
        test_metric: the same quantity on the test split.
        lower_is_better: whether small values of both are good.
        columns: dotted keys of the settings that differ.
        groups: best first.
        pairs: the two best groups, then those asked for.
        left_out: runs that are not in any group.
        warnings: why runs may not be comparable.
    """

    metric: str
    test_metric: str
    lower_is_better: bool
    columns: tuple[str, ...]
    groups: tuple[Group, ...]
    pairs: tuple[Pair, ...]
    left_out: tuple[LeftOut, ...]
    warnings: tuple[str, ...]


# ── compare ──────────────────────────────────────────────────────────────────────────────────


def compare_runs(
    records: Sequence[RunRecord],
    *,
    metric: str = DEFAULT_METRIC,
    group_by: Sequence[str] = (),
    pairs: Sequence[tuple[str, str]] = (),
    left_out: Sequence[LeftOut] = (),
) -> Comparison:
    """Group runs, sort the groups by a validation score and test the two best ones.

    Args:
        records: one for each run.
        metric: name of a recorded metric that is not of the test split.
        group_by: dotted keys of settings; default: all that `NOT_STUDIED` does not name.
        pairs: more groups to test, each named by its letter or by one of its runs.
        left_out: runs that could not be read.

    Raises:
        ConfigError: the metric, a key or a pair is not there.
        RunError: no run is complete.
    """
    if metric.startswith("test/"):
        raise ConfigError(
            f"--metric {metric}: test scores are shown and never choose; take a validation metric"
            f" like {DEFAULT_METRIC}"
        )
    complete = [record for record in records if record.status in COMPLETE]
    out = [*left_out, *(_leave_out(r) for r in records if r.status not in COMPLETE)]
    if not complete:
        named = "".join(f"\n{item.run}: {item.status}: {item.reason}" for item in out)
        raise RunError(f"no finished run among the {len(out)} given{named}")
    known = sorted({name for r in complete for name in r.metrics if not name.startswith("test/")})
    if metric not in known:
        raise ConfigError(f"--metric {metric}: no run has it; known: {', '.join(known)}")
    out += [
        LeftOut(r.title, str(r.status), f"has no {metric}")
        for r in complete
        if metric not in r.metrics
    ]
    complete = [record for record in complete if metric in record.metrics]
    lower = is_lower_better(metric)
    columns, groups = _make_groups(complete, metric, group_by, lower_is_better=lower)
    chosen = [(groups[0], groups[1])] if len(groups) > 1 else []
    for first, second in pairs:
        pair = (_find_group(first, groups), _find_group(second, groups))
        if pair[0] is pair[1]:
            raise ConfigError(f"--pair {first} {second}: both are group {pair[0].letter}")
        if pair not in chosen:
            chosen.append(pair)
    return Comparison(
        metric=metric,
        test_metric=_test_metric(metric),
        lower_is_better=lower,
        columns=columns,
        groups=groups,
        pairs=tuple(_compare_pair(a, b, metric) for a, b in chosen),
        left_out=tuple(out),
        warnings=(*find_differences(complete), *_find_mixtures(groups, group_by)),
    )


def is_lower_better(metric: str) -> bool:
    """Whether small values of a metric are good."""
    return metric.endswith(("loss", "calibration_error"))


def _test_metric(metric: str) -> str:
    quantity = metric.rpartition("/")[2].removeprefix("val_")
    return f"test/{quantity}" if quantity in ("loss", "macro_f1") else "test/accuracy"


def _leave_out(record: RunRecord) -> LeftOut:
    if record.status is None:
        reason = record.error or "under way, or killed before its end"
        return LeftOut(record.title, "unfinished", reason)
    reason = record.error or "stopped before its end"
    return LeftOut(record.title, record.status, " ".join(reason.split()))


def _make_groups(
    records: Sequence[RunRecord], metric: str, group_by: Sequence[str], *, lower_is_better: bool
) -> tuple[tuple[str, ...], tuple[Group, ...]]:
    flat = {record.location: flatten(record.config) for record in records}
    known = sorted({key for settings in flat.values() for key in settings})
    for key in group_by:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "; `mnist-wandb show` lists them"
            raise ConfigError(f"--group-by {key}: no run has such a setting{hint}")
    keys = list(dict.fromkeys(group_by)) or [key for key in known if is_studied(key)]
    members: dict[Hashable, list[RunRecord]] = {}
    for record in records:
        key = json.dumps([flat[record.location].get(key) for key in keys])
        members.setdefault(key, []).append(record)
    sign = 1 if lower_is_better else -1
    for runs in members.values():
        runs.sort(key=lambda run: (sign * run.metrics[metric], run.seed))
    described = [
        (describe_sample([r.metrics[metric] for r in runs], lower_is_better=lower_is_better), runs)
        for runs in members.values()
    ]
    described.sort(key=lambda pair: (sign * pair[0].mean, pair[1][0].num_parameters))
    settings = [flat[runs[0].location] for _, runs in described]
    columns = tuple(group_by and keys) or _telling_keys(settings, keys)
    naming = _naming_keys(settings, columns)
    groups = []
    for index, (scores, runs) in enumerate(described):
        parameters = {key: settings[index].get(key) for key in columns}
        label = ", ".join(_name_parameters({k: parameters[k] for k in naming})) or runs[0].name
        test = _describe_test(runs, metric)
        groups.append(Group(_letter(index), label, parameters, tuple(runs), scores, test))
    return columns, tuple(groups)


def _describe_test(runs: Sequence[RunRecord], metric: str) -> Sample | None:
    name = _test_metric(metric)
    values = [run.metrics[name] for run in runs if name in run.metrics]
    return describe_sample(values, lower_is_better=is_lower_better(name)) if values else None


def differing_keys(settings: Sequence[Mapping[str, Any]], keys: Iterable[str]) -> list[str]:
    """The keys under which several mappings do not all have the same value."""
    return [key for key in keys if len({json.dumps(s.get(key)) for s in settings}) > 1]


def _telling_keys(settings: Sequence[Mapping[str, Any]], keys: Iterable[str]) -> tuple[str, ...]:
    """The differing keys without those that only follow from the name of a model or optimizer.

    A zoo name stands for its sizes, an optimizer for its default of momentum.
    """
    differing = differing_keys(settings, keys)

    def follows(key: str) -> bool:
        section, _, rest = key.partition(".")
        name = f"{section}.name"
        if section not in VARIANTS or rest == "name" or name not in differing:
            return False
        return all(_default_value(section, s[name], key) == s.get(key) for s in settings)

    first = [key for key in differing if key.endswith(".name")]
    rest = [key for key in differing if not key.endswith(".name") and not follows(key)]
    return (*first, *rest)


def _naming_keys(
    settings: Sequence[Mapping[str, Any]], columns: tuple[str, ...]
) -> tuple[str, ...]:
    """As many columns, from the first, as tell all groups apart: the model's name, if it does."""
    for count in range(1, len(columns)):
        values = {json.dumps([s.get(key) for key in columns[:count]]) for s in settings}
        if len(values) == len(settings):
            return columns[:count]
    return columns


@functools.cache
def _section_defaults(section: str, name: str) -> dict[str, Any]:
    config = RunConfig.model_validate({section: {"name": name}})
    return flatten(config.model_dump(mode="json"))


def _default_value(section: str, name: str, key: str) -> Any:
    """What a setting is when nothing but the section's name is said; None where it has none."""
    return _section_defaults(section, name).get(key)


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Dotted keys as people say them: `model`, `lr`; the whole key where that is not unique."""
    short = {k: k.removesuffix(".name").rpartition(".")[2] for k in keys}
    counts = list(short.values())
    return {key: word if counts.count(word) == 1 else key for key, word in short.items()}


def _name_parameters(parameters: Mapping[str, Any]) -> list[str]:
    return [
        show_value(value)
        if key.endswith(".name")
        else f"{key.rpartition('.')[2]} {show_value(value)}"
        for key, value in parameters.items()
        if value is not None
    ]


def _letter(index: int) -> str:
    """A to Z, then AA, AB, and so on."""
    head, last = divmod(index, 26)
    return (_letter(head - 1) if head else "") + chr(ord("A") + last)


def _find_group(spec: str, groups: Sequence[Group]) -> Group:
    for group in groups:
        names = {name for run in group.runs for name in (run.run_id, Path(run.location).name)}
        if spec.upper() == group.letter or spec in names or spec == group.label:
            return group
    raise ConfigError(
        f"--pair: got {spec!r}, allowed: a group's letter (A to {groups[-1].letter}), or one of the"
        " runs compared"
    )


# ── tests of two groups ──────────────────────────────────────────────────────────────────────


def _compare_pair(first: Group, second: Group, metric: str) -> Pair:
    seeds = [[run.seed for run in group.runs] for group in (first, second)]
    matched = sorted(seeds[0]) == sorted(seeds[1]) and len(set(seeds[0])) == len(seeds[0])
    values = [
        [run.metrics[metric] for run in sorted(group.runs, key=lambda run: run.seed)]
        for group in (first, second)
    ]
    test = paired_test(*values) if matched else welch_test(*values)
    try:
        images = tuple(_test_images(a, b) for a, b in _match_runs(first, second))
    except RunError as error:
        return Pair(first, second, test, (), str(error))
    return Pair(first, second, test, images)


def _match_runs(first: Group, second: Group) -> list[tuple[RunRecord, RunRecord]]:
    """Runs with a common seed (the better of several), or the best two; runs are best first."""
    found = {}
    for group in (second, first):
        found[group.letter] = {run.seed: run for run in reversed(group.runs)}
    ones, others = found[first.letter], found[second.letter]
    common = [run.seed for run in first.runs if ones[run.seed] is run and run.seed in others]
    if not common:
        return [(first.runs[0], second.runs[0])]
    return [(ones[seed], others[seed]) for seed in common]


def _test_images(first: RunRecord, second: RunRecord) -> ImageTest:
    """McNemar's test of two runs.

    Raises:
        RunError: a run has no predictions at hand, or they are of other images.
    """
    results = []
    for run in (first, second):
        result = read_predictions(run)
        if result is None:
            reason = f"{run.title} has no predictions of test images at hand"
            if run.folder is None:
                reason += ": they stay in the run folder; compare the folders for this test"
            raise RunError(reason)
        order = np.argsort(result.ids, kind="stable")
        results.append((result.ids[order], result.labels[order], result.predictions[order]))
    (ids, labels, ones), (other_ids, other_labels, others) = results
    datasets = {run.config["data"]["dataset"] for run in (first, second)}
    same = np.array_equal(ids, other_ids) and np.array_equal(labels, other_labels)
    if len(datasets) > 1 or not same:
        raise RunError(f"{first.title} and {second.title} have other test images")
    fixed = ids[(ones == labels) & (others != labels)]
    broken = ids[(ones != labels) & (others == labels)]
    return ImageTest(
        first=first.run_id,
        second=second.run_id,
        seed=first.seed if first.seed == second.seed else None,
        num_images=len(ids),
        fixed=tuple(map(int, fixed)),
        broken=tuple(map(int, broken)),
        p_value=mcnemar_test(len(fixed), len(broken)),
    )


def explain_seeds(pair: Pair, comparison: Comparison) -> str:
    """What the t-test says, in one sentence."""
    a, b = pair.first.letter, pair.second.letter
    if pair.seeds is None:
        if min(pair.first.scores.n, pair.second.scores.n) < 2:
            return f"{a} and {b} over seeds: one run says nothing; train more seeds of both"
        if pair.first.scores.mean == pair.second.scores.mean:
            return f"{a} and {b} over seeds: no difference at all"
        return f"{a} and {b} over seeds: the same difference for each seed, nothing to test"
    test = pair.seeds
    better = a if (test.difference < 0) == comparison.lower_is_better else b
    verdict = f"{better} is better" if test.p_value < ALPHA else "the difference is within noise"
    return (
        f"{a} and {b} over seeds, {comparison.metric}: {verdict}: {test.difference:+.4f}"
        f" (95 % interval {test.low:+.4f} to {test.high:+.4f}, p = {show_p(test.p_value)},"
        f" {test.method}, n = {pair.first.scores.n} and {pair.second.scores.n})"
    )


def explain_images(pair: Pair, test: ImageTest) -> str:
    """What McNemar's test says, in one sentence."""
    a, b = pair.first.letter, pair.second.letter
    better = a if len(test.fixed) > len(test.broken) else b
    verdict = f"{better} is better" if test.p_value < ALPHA else "the difference is within noise"
    runs = f"seed {test.seed}" if test.seed is not None else f"runs {test.first} and {test.second}"
    return (
        f"{a} and {b} on {test.num_images:,} test images, {runs}: {verdict}: {a} fixes"
        f" {len(test.fixed)} that {b} gets wrong and breaks {len(test.broken)}"
        f" (p = {show_p(test.p_value)}, McNemar's test, exact)"
    )


def explain_pair(pair: Pair, comparison: Comparison) -> list[str]:
    """All that is known of two groups, in a few lines; images are named for the best runs."""
    lines = [explain_seeds(pair, comparison), *(explain_images(pair, t) for t in pair.images)]
    for test in pair.images[:1]:
        lines.insert(2, f"    images fixed: {show_ids(test.fixed)}")
        lines.insert(3, f"    images broken: {show_ids(test.broken)}")
    if pair.note:
        lines.append(f"no test on images: {pair.note}")
    return lines


def show_sample(sample: Sample | None) -> str:
    """Mean ± standard deviation."""
    if sample is None:
        return "–"
    return f"{sample.mean:.4f}" + ("" if sample.std is None else f" ± {sample.std:.4f}")


def show_p(p_value: float) -> str:
    """A p-value in as many digits as say something."""
    return f"{p_value:.2g}" if p_value >= 0.0001 else "0.0001 or less"


def show_ids(ids: Sequence[int]) -> str:
    """The first few ids, and how many more there are."""
    more = f" and {len(ids) - IDS_SHOWN} more" if len(ids) > IDS_SHOWN else ""
    return (", ".join(map(str, ids[:IDS_SHOWN])) or "none") + more


def _find_mixtures(groups: Sequence[Group], group_by: Sequence[str]) -> list[str]:
    """With `--group-by`, a group may hold runs that differ by more than the seed."""
    warnings = []
    for group in groups if group_by else ():
        settings = [flatten(run.config) for run in group.runs]
        keys = sorted({key for s in settings for key in s if is_studied(key)})
        mixed = _telling_keys(settings, keys)
        if mixed:
            warnings.append(f"group {group.letter} mixes runs that differ in {', '.join(mixed)}")
    return warnings


# ── as JSON and CSV ──────────────────────────────────────────────────────────────────────────


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison as `compare --json` prints it."""
    return {
        "metric": comparison.metric,
        "test_metric": comparison.test_metric,
        "lower_is_better": comparison.lower_is_better,
        "groups": [_group_json(group, comparison) for group in comparison.groups],
        "pairs": [
            {
                "groups": [pair.first.letter, pair.second.letter],
                "seeds": asdict(pair.seeds) if pair.seeds else None,
                "images": [asdict(test) for test in pair.images],
                "note": pair.note,
                "words": [
                    explain_seeds(pair, comparison),
                    *(explain_images(pair, test) for test in pair.images),
                ],
            }
            for pair in comparison.pairs
        ],
        "left_out": [asdict(item) for item in comparison.left_out],
        "warnings": list(comparison.warnings),
    }


def _group_json(group: Group, comparison: Comparison) -> dict[str, Any]:
    return {
        "group": group.letter,
        "label": group.label,
        "parameters": dict(group.parameters),
        **asdict(group.scores),
        "test": asdict(group.test) if group.test else None,
        "num_parameters": group.num_parameters[1],
        "training_seconds": round(group.training_seconds, 3),
        "images_per_second": round(group.images_per_second, 1),
        "runs": [
            {
                "run_id": run.run_id,
                "name": run.name,
                "location": run.location,
                "seed": run.seed,
                comparison.metric: run.metrics[comparison.metric],
                comparison.test_metric: run.metrics.get(comparison.test_metric),
            }
            for run in group.runs
        ],
    }


def comparison_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Headings and one row for each group, as texts for people."""
    words = short_keys(comparison.columns).values()
    scores = (f"{comparison.metric} ± std", "95 % interval", "best")
    headings = [
        *("group", *words, "n", *scores, f"{comparison.test_metric} ± std"),
        *("parameters", "seconds", "images/s"),
    ]
    rows = []
    for group in comparison.groups:
        sample = group.scores
        low, high = group.num_parameters
        rows.append(
            [
                group.letter,
                *(show_value(group.parameters[key]) for key in comparison.columns),
                str(sample.n),
                show_sample(sample),
                "–" if sample.low is None else f"{sample.low:.4f}–{sample.high:.4f}",
                f"{sample.best:.4f}",
                show_sample(group.test),
                f"{low:,}" if low == high else f"{low:,} to {high:,}",
                f"{group.training_seconds:.1f}",
                f"{group.images_per_second:,.0f}",
            ]
        )
    return headings, rows


def comparison_markdown(comparison: Comparison) -> str:
    """The table of groups as Markdown (the tables of GitHub's)."""
    headings, rows = comparison_table(comparison)
    num_words = 1 + len(comparison.columns)
    rule = ["---"] * num_words + ["---:"] * (len(headings) - num_words)
    lines = ([text.replace("|", "\\|") for text in row] for row in (headings, rule, *rows))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def comparison_csv(comparison: Comparison) -> str:
    """One line for each group, with a header."""
    table = io.StringIO()
    names = ("n", "mean", "std", "low", "high", "best")
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(
        [
            "group", *comparison.columns, *names, "num_parameters", "training_seconds",
            "images_per_second", "test_mean", "test_std", "runs",
        ]
    )  # fmt: skip
    for group in comparison.groups:
        settings = [_plain(group.parameters[key]) for key in comparison.columns]
        test = (group.test.mean, group.test.std) if group.test else (None, None)
        numbers = [getattr(group.scores, name) for name in names]
        costs = (group.num_parameters[1], group.training_seconds, group.images_per_second)
        runs = " ".join(run.run_id for run in group.runs)
        writer.writerow([group.letter, *settings, *numbers, *costs, *test, runs])
    return table.getvalue()


def _plain(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list) else value
