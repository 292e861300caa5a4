"""Pictures for the report: which images to show, and their pixels from the data set by id."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mnist_wandb.config import DataConfig
from mnist_wandb.errors import MnistWandbError
from mnist_wandb.metrics import EvalResult, most_confident_mistakes, sample_positions
from mnist_wandb.records import RunRecord

SAMPLES, MISTAKES, OF_EACH_PAIR = 32, 48, 2
"""Pictures of each run: evenly spread over the test split; the most confident mistakes; and some
of each pair of true and predicted class, so that every cell of the confusion matrix has one."""

Item = tuple[str, int, int, float]
"""Key of the picture, true class, predicted class, confidence."""


class PictureBook:
    """Test images by id as PNG data; each data configuration is read once, and never downloaded.

    Attributes:
        pictures: `data:` addresses by key.
        missing: why pictures are not there, one line for each reason.
    """

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.pictures: dict[str, str] = {}
        self.missing: dict[str, None] = {}
        self._images: dict[str, dict[int, tuple[npt.NDArray[np.uint8], int]]] = {}

    def items(self, record: RunRecord, result: EvalResult, positions: Iterable[int]) -> list[Item]:
        """The images at some positions of a result; their pictures are added to the book."""
        images = self._read(record)
        dataset = record.config["data"]["dataset"]
        found = []
        for i in map(int, positions):
            number, truth = int(result.ids[i]), int(result.labels[i])
            key = f"{dataset}:{number}"
            pixels, label = images.get(number, (None, -1))
            if pixels is not None and label == truth:
                self.pictures.setdefault(key, encode_png(pixels))
            elif images:
                self.missing[f"{dataset}: the data at hand are not those of {record.title}"] = None
            confidence = round(float(result.confidence[i]), 4)
            found.append((key, truth, int(result.predictions[i]), confidence))
        return found

    def samples(self, record: RunRecord, result: EvalResult) -> list[Item]:
        """The same images for each run on a data set."""
        return self.items(record, result, sample_positions(result, SAMPLES))

    def mistakes(self, record: RunRecord, result: EvalResult) -> list[Item]:
        """The most confident mistakes, and those of each pair of classes; most confident first."""
        kept, seen = [], Counter[tuple[int, int]]()
        for rank, i in enumerate(most_confident_mistakes(result, len(result.labels)).tolist()):
            pair = (int(result.labels[i]), int(result.predictions[i]))
            seen[pair] += 1
            if rank < MISTAKES or seen[pair] <= OF_EACH_PAIR:
                kept.append(i)
        return self.items(record, result, kept)

    def _read(self, record: RunRecord) -> dict[int, tuple[npt.NDArray[np.uint8], int]]:
        key = json.dumps(record.config["data"], sort_keys=True)
        if key not in self._images:
            try:
                self._images[key] = _read_test_images(record.config["data"], self.data_dir)
            except (MnistWandbError, ValueError, OSError) as error:
                self._images[key] = {}
                self.missing[" ".join(str(error).split())] = None
        return self._images[key]


def _read_test_images(
    config: dict[str, Any], data_dir: Path
) -> dict[int, tuple[npt.NDArray[np.uint8], int]]:
    from mnist_wandb.data import load_dataset

    data = DataConfig.model_validate(config)
    test = load_dataset(data, data_dir=data_dir, download=False).test
    images, labels = test.images[:, 0].numpy(), test.labels.tolist()
    return {number: (images[i], labels[i]) for i, number in enumerate(test.ids.tolist())}


def encode_png(pixels: npt.NDArray[np.uint8]) -> str:
    """A grey picture, uint8 (H, W), as a `data:` address."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
