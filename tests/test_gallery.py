"""The report's pictures: the right pixels, each data set read once, nothing downloaded."""

from __future__ import annotations

import base64
import io
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mnist_wandb.data import Splits
from mnist_wandb.gallery import MISTAKES, OF_EACH_PAIR, SAMPLES, PictureBook, encode_png
from mnist_wandb.metrics import EvalResult
from mnist_wandb.records import RunRecord, read_predictions, read_records
from mnist_wandb.runs import list_runs


@pytest.fixture
def record(example_runs: Path) -> RunRecord:
    return read_records(list_runs(example_runs))[0][0]


@pytest.fixture
def result(record: RunRecord) -> EvalResult:
    found = read_predictions(record)
    assert found is not None
    return found


def decode(address: str) -> np.ndarray:
    head, _, content = address.partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))


def test_a_picture_survives_its_encoding() -> None:
    pixels = np.arange(29 * 28, dtype=np.uint8).reshape(29, 28)
    assert (decode(encode_png(pixels)) == pixels).all()


def test_pictures_are_those_of_the_ids(
    record: RunRecord, result: EvalResult, digits: Splits
) -> None:
    book = PictureBook(Path("nowhere"))
    items = book.mistakes(record, result)
    assert len(items) >= MISTAKES
    images = dict(zip(digits.test.ids.tolist(), digits.test.images[:, 0].numpy(), strict=True))
    for key, truth, predicted, _ in items:
        assert truth != predicted
        assert (decode(book.pictures[key]) == images[int(key.removeprefix("digits:"))]).all()
    assert [c for *_, c in items] == sorted((c for *_, c in items), reverse=True)
    assert book.missing == {}


def test_every_cell_of_the_confusion_matrix_has_a_picture(
    record: RunRecord, result: EvalResult
) -> None:
    items = PictureBook(Path("nowhere")).mistakes(record, result)
    shown = Counter((truth, predicted) for _, truth, predicted, _ in items)
    for truth, row in enumerate(result.confusion.tolist()):
        for predicted, count in enumerate(row):
            if truth != predicted:
                assert shown[truth, predicted] >= min(count, OF_EACH_PAIR)
    assert sum(shown.values()) <= np.sum(result.predictions != result.labels)


def test_runs_on_one_data_set_share_pictures(record: RunRecord, result: EvalResult) -> None:
    book = PictureBook(Path("nowhere"))
    assert len(book.samples(record, result)) == SAMPLES == len(book.pictures)
    assert book.samples(replace(record, run_id="other"), result)
    assert len(book.pictures) == SAMPLES
    assert len(book._images) == 1


def test_data_that_are_not_at_hand_are_not_downloaded(
    record: RunRecord, result: EvalResult
) -> None:
    data = {**record.config["data"], "dataset": "mnist"}
    book = PictureBook(Path("nowhere"))
    items = book.samples(replace(record, config={**record.config, "data": data}), result)
    assert len(items) == SAMPLES
    assert list(book.missing) == ["mnist is not in nowhere; nothing is downloaded for this"]
    assert book.pictures == {}
    assert not Path("nowhere").exists()


def test_other_data_than_those_of_the_run_are_refused(
    record: RunRecord, result: EvalResult, mnist_like: Path
) -> None:
    data = {**record.config["data"], "dataset": "mnist"}
    book = PictureBook(mnist_like)
    other = replace(record, config={**record.config, "data": data})
    book.items(other, replace(result, labels=(result.labels + 1) % 10), range(3))
    (reason,) = book.missing
    assert reason == f"mnist: the data at hand are not those of {record.title}"
