from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as reference

from mnist_wandb.metrics import (
    EvalResult,
    calibration_error,
    class_scores,
    confusion_matrix,
    most_confident_mistakes,
    sample_positions,
)


def random_result(seed: int, count: int = 500, *, num_classes: int = 10) -> EvalResult:
    """Predictions that are right about half of the time."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, count)
    logits = rng.normal(size=(count, num_classes)) + 1.5 * np.eye(num_classes)[labels]
    return result_of(np.exp(logits), labels)


def result_of(weights: object, labels: object) -> EvalResult:
    weights, labels = np.asarray(weights, dtype=np.float64), np.asarray(labels, dtype=np.int64)
    probabilities = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    names = tuple(map(str, range(weights.shape[1])))
    return EvalResult(0.5, probabilities, labels, np.arange(len(labels)), names)


def without_class(result: EvalResult, missing: int, *, in_labels: bool) -> EvalResult:
    """The same without images of one class, or with one class never predicted."""
    if in_labels:
        keep = result.labels != missing
        return result_of(result.probabilities[keep], result.labels[keep])
    weights = result.probabilities.copy()
    weights[:, missing] = 1e-9
    return result_of(weights, result.labels)


RESULTS = {
    "random": random_result(0),
    "another": random_result(1, 37),
    "two classes": random_result(2, num_classes=2),
    "never predicted": without_class(random_result(3), 4, in_labels=False),
    "no images": without_class(random_result(4), 7, in_labels=True),
    "neither": without_class(
        without_class(random_result(5), 0, in_labels=True), 0, in_labels=False
    ),
    "all right": result_of(np.eye(10), np.arange(10)),
    "all wrong": result_of(np.eye(10), (np.arange(10) + 1) % 10),
}


@pytest.fixture(params=RESULTS.values(), ids=RESULTS.keys())
def result(request: pytest.FixtureRequest) -> EvalResult:
    return request.param


# ── confusion matrix and class scores ────────────────────────────────────────────────────────


def test_confusion_matrix_equals_scikit_learn(result: EvalResult) -> None:
    classes = range(len(result.class_names))
    expected = reference.confusion_matrix(result.labels, result.predictions, labels=classes)
    assert np.array_equal(result.confusion, expected)
    assert result.confusion.dtype == np.int64
    assert result.confusion.sum() == len(result.labels)


def test_confusion_matrix_has_truth_in_rows() -> None:
    matrix = confusion_matrix(np.array([0, 0, 2]), np.array([1, 1, 2]), 3)
    assert matrix.tolist() == [[0, 2, 0], [0, 0, 0], [0, 0, 1]]


def test_class_scores_equal_scikit_learn(result: EvalResult) -> None:
    classes = range(len(result.class_names))
    precision, recall, f1, support = reference.precision_recall_fscore_support(
        result.labels, result.predictions, labels=classes, zero_division=0
    )
    scores = class_scores(result.confusion)
    np.testing.assert_allclose(scores.precision, precision, rtol=1e-12)
    np.testing.assert_allclose(scores.recall, recall, rtol=1e-12)
    np.testing.assert_allclose(scores.f1, f1, rtol=1e-12)
    assert np.array_equal(scores.support, support)


def test_accuracy_and_macro_f1_equal_scikit_learn(result: EvalResult) -> None:
    truth, predictions, classes = result.labels, result.predictions, range(len(result.class_names))
    assert result.accuracy == pytest.approx(reference.accuracy_score(truth, predictions))
    expected = reference.f1_score(
        truth, predictions, labels=classes, average="macro", zero_division=0
    )
    assert result.macro_f1 == pytest.approx(expected)


# ── calibration ──────────────────────────────────────────────────────────────────────────────


def straightforward_calibration_error(
    probabilities: np.ndarray, labels: np.ndarray, bins: int
) -> float:
    total = 0.0
    for b in range(bins):
        inside = [
            (row.max(), row.argmax() == label)
            for row, label in zip(probabilities.astype(np.float64), labels, strict=True)
            if b / bins < row.max() <= (b + 1) / bins
        ]
        if inside:
            confidence, correct = np.mean(inside, axis=0)
            total += len(inside) / len(labels) * abs(correct - confidence)
    return total


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_error_equals_a_straightforward_one(result: EvalResult, bins: int) -> None:
    expected = straightforward_calibration_error(result.probabilities, result.labels, bins)
    measured = calibration_error(result.probabilities, result.labels, bins)
    assert measured == pytest.approx(expected, abs=1e-9)
    assert 0 <= measured <= 1


def test_calibration_error_has_15_bins_by_default(result: EvalResult) -> None:
    expected = straightforward_calibration_error(result.probabilities, result.labels, 15)
    assert result.calibration_error == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("confidence", "correct", "expected"),
    [
        ([0.75] * 4, [1, 1, 1, 0], 0.0),  # perfectly calibrated
        ([0.75] * 4 + [0.5] * 2, [1, 1, 0, 1, 0, 1], 0.0),
        ([1.0] * 5, [1] * 5, 0.0),
        ([1.0] * 5, [0] * 5, 1.0),  # confident and always wrong
        ([1.0, 1.0], [1, 0], 0.5),
        ([0.75] * 4, [0, 0, 0, 0], 0.75),
        ([0.75] * 4, [1, 1, 1, 1], 0.25),
        ([0.625, 0.625, 1.0, 1.0], [1, 0, 0, 1], (2 * 0.125 + 2 * 0.5) / 4),
    ],
)
def test_calibration_error_of_hand_made_cases(
    confidence: list[float], correct: list[int], expected: float
) -> None:
    top = np.array(confidence)
    probabilities = np.column_stack([top, 1 - top]).astype(np.float32)
    labels = 1 - np.array(correct)
    assert calibration_error(probabilities, labels) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("other", "expected"),
    [(0.625, abs(-0.75 + 0.375) / 2), (0.875, (0.75 + 0.125) / 2)],
    ids=["same bin", "next bin"],
)
def test_confidence_on_the_edge_belongs_to_the_lower_bin(other: float, expected: float) -> None:
    top = np.array([0.75, other])  # bins: (0.5, 0.75] and (0.75, 1]
    probabilities = np.column_stack([top, 1 - top])
    assert calibration_error(probabilities, np.array([1, 0]), bins=4) == pytest.approx(expected)


# ── results ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("prefix", ["val", "test"])
def test_metrics_have_the_promised_names(prefix: str) -> None:
    result = RESULTS["random"]
    assert result.metrics(prefix) == {
        f"{prefix}/loss": 0.5,
        f"{prefix}/accuracy": result.accuracy,
        f"{prefix}/macro_f1": result.macro_f1,
        f"{prefix}/calibration_error": result.calibration_error,
    }
    assert all(type(value) is float for value in result.metrics(prefix).values())


def test_predictions_and_confidence_are_of_the_most_probable_class() -> None:
    result = result_of([[1, 3], [8, 2], [1, 1]], [0, 0, 0])
    assert result.predictions.tolist() == [1, 0, 0]
    assert result.confidence.tolist() == pytest.approx([0.75, 0.8, 0.5])


def test_mistakes_come_most_confident_first() -> None:
    result = result_of([[6, 4], [9, 1], [1, 9], [2, 8], [2, 8], [9, 1]], [1, 1, 1, 0, 0, 0])
    assert most_confident_mistakes(result, 10).tolist() == [1, 3, 4, 0]
    assert most_confident_mistakes(result, 2).tolist() == [1, 3]
    assert most_confident_mistakes(result, 0).tolist() == []
    assert most_confident_mistakes(RESULTS["all right"], 5).tolist() == []


def test_mistakes_are_all_there_and_in_order(result: EvalResult) -> None:
    positions = most_confident_mistakes(result, len(result.labels))
    wrong = np.flatnonzero(result.predictions != result.labels)
    assert sorted(positions.tolist()) == wrong.tolist()
    assert np.all(np.diff(result.confidence[positions]) <= 0)


@pytest.mark.parametrize("count", [1, 2, 9, 100, 359])
def test_samples_are_spread_evenly_and_never_repeat(count: int) -> None:
    result = random_result(0, count)
    for n in range(count + 3):
        positions = sample_positions(result, n)
        assert len(positions) == min(n, count)
        steps = np.diff(positions)
        if len(steps):
            assert (positions[0], positions[-1]) == (0, count - 1)
            assert steps.min() >= 1
            assert steps.max() - steps.min() <= 1
        assert np.array_equal(sample_positions(random_result(1, count), n), positions)
