"""What follows from a confusion matrix and from class probabilities (NumPy only)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.int64]

CALIBRATION_BINS = 15  # as in Guo et al. 2017


def confusion_matrix(labels: Ints, predictions: Ints, num_classes: int) -> Ints:
    """Count pairs of truth and prediction.

    Args:
        labels: int64 (N,), true classes.
        predictions: int64 (N,), predicted classes.
        num_classes: C.

    Returns:
        int64 (C, C); rows are true classes, columns are predictions.
    """
    pairs = labels * num_classes + predictions
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def calibration_error(probabilities: Floats, labels: Ints, bins: int = CALIBRATION_BINS) -> float:
    """Expected calibration error: mean gap between confidence and accuracy, weighted by images.

    Args:
        probabilities: (N, C), rows sum to one.
        labels: int64 (N,).
        bins: number of equally wide confidence bins over (0, 1].

    Returns:
        A value in [0, 1]; 0 is perfectly calibrated.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 3.
    """
    index, confidence, correct = _bin_confidence(probabilities, labels, bins)
    gap = np.bincount(index, weights=correct - confidence, minlength=bins)
    return float(np.abs(gap).sum() / len(labels))


def calibration_bins(
    probabilities: Floats, labels: Ints, bins: int = CALIBRATION_BINS
) -> list[tuple[float, float, int]]:
    """(mean confidence, accuracy, images) of each confidence bin that is not empty.

    The bins are those of `calibration_error`.
    """
    index, confidence, correct = _bin_confidence(probabilities, labels, bins)
    return [
        (float(confidence[index == i].mean()), float(correct[index == i].mean()), int(count))
        for i, count in enumerate(np.bincount(index, minlength=bins))
        if count
    ]


def _bin_confidence(
    probabilities: Floats, labels: Ints, bins: int
) -> tuple[Ints, Floats, npt.NDArray[np.bool_]]:
    """Bin of each image, its confidence and whether it is right, (N,) each."""
    confidence = probabilities.max(axis=1).astype(np.float64)
    correct = probabilities.argmax(axis=1) == labels
    # Bin b holds the confidences in (b / bins, (b + 1) / bins].
    index = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    return index, confidence, correct


@dataclass(frozen=True)
class ClassScores:
    """Precision, recall and F1 of each class, float64 (C,); 0 where a ratio is 0 / 0."""

    precision: Floats
    recall: Floats
    f1: Floats
    support: Ints


@dataclass(frozen=True)
class EvalResult:
    """What a model did on a split.

    Attributes:
        loss: mean over images of the training loss without label smoothing (cross-entropy in
            nats, or the squared error against one-hot targets).
        probabilities: float32 (N, C), softmax of the logits.
        labels: int64 (N,).
        ids: int64 (N,), index of each image in its source.
        class_names: C names.
        shortcut_agrees: bool (N,), whether an image's shortcut tells its class; None without one.
    """

    loss: float
    probabilities: Floats
    labels: Ints
    ids: Ints
    class_names: tuple[str, ...]
    shortcut_agrees: npt.NDArray[np.bool_] | None = None

    @cached_property
    def predictions(self) -> Ints:
        """int64 (N,): the most probable class of each image."""
        return np.asarray(self.probabilities.argmax(axis=1), dtype=np.int64)

    @cached_property
    def confidence(self) -> Floats:
        """float32 (N,): probability of the predicted class."""
        return np.asarray(self.probabilities.max(axis=1))

    @cached_property
    def confusion(self) -> Ints:
        """int64 (C, C): rows are true classes, columns are predictions."""
        return confusion_matrix(self.labels, self.predictions, len(self.class_names))

    @property
    def accuracy(self) -> float:
        """Share of images classified correctly, in [0, 1]."""
        return float(np.trace(self.confusion) / self.confusion.sum())

    @property
    def macro_f1(self) -> float:
        """Unweighted mean of the classes' F1 scores, in [0, 1]."""
        return float(class_scores(self.confusion).f1.mean())

    @property
    def calibration_error(self) -> float:
        """Expected calibration error, in [0, 1]; see `calibration_error`."""
        return calibration_error(self.probabilities, self.labels)

    def metrics(self, prefix: str) -> dict[str, float]:
        """The scores by metric name, for example `test/accuracy`.

        With a shortcut also the accuracy where it tells the class and where it tells another one.
        """
        scores = {
            f"{prefix}/loss": self.loss,
            f"{prefix}/accuracy": self.accuracy,
            f"{prefix}/macro_f1": self.macro_f1,
            f"{prefix}/calibration_error": self.calibration_error,
        }
        if self.shortcut_agrees is not None:
            hits = self.predictions == self.labels
            for name, chosen in (
                ("agrees", self.shortcut_agrees),
                ("disagrees", ~self.shortcut_agrees),
            ):
                if chosen.any():
                    scores[f"{prefix}/accuracy_shortcut_{name}"] = float(hits[chosen].mean())
        return scores


def class_scores(confusion: Ints) -> ClassScores:
    """Precision, recall and F1 per class from a confusion matrix (rows are true classes)."""
    hits = np.diag(confusion).astype(np.float64)
    support, predicted = confusion.sum(axis=1), confusion.sum(axis=0)

    def ratio(top: Floats, bottom: npt.NDArray[Any]) -> Floats:
        return np.asarray(np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0))

    return ClassScores(
        ratio(hits, predicted), ratio(hits, support), ratio(2 * hits, support + predicted), support
    )


def most_confident_mistakes(result: EvalResult, n: int) -> Ints:
    """Positions of the wrongly classified images, the most confident first; int64 (≤ n,)."""
    wrong = np.flatnonzero(result.predictions != result.labels)
    order = np.argsort(-result.confidence[wrong], kind="stable")
    return wrong[order][:n]


def sample_positions(result: EvalResult, n: int) -> Ints:
    """Positions of n images spread evenly over the split, the same for every run on it."""
    count = len(result.labels)
    return np.linspace(0, count - 1, min(n, count)).round().astype(np.int64)
