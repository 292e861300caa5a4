"""One exception tree."""

from __future__ import annotations

import inspect

import pytest

from mnist_wandb import errors
from mnist_wandb.errors import DivergedError, MnistWandbError

CLASSES = [cls for _, cls in inspect.getmembers(errors, inspect.isclass)]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_error_is_of_one_tree_and_is_described(cls: type[Exception]) -> None:
    assert issubclass(cls, MnistWandbError)
    assert cls.__name__.endswith("Error")
    assert cls.__dict__.get("__doc__")


def test_diverged_error_carries_its_step() -> None:
    error = DivergedError("loss is nan", step=12)
    assert (str(error), error.step) == ("loss is nan", 12)
