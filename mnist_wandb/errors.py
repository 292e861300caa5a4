"""One exception tree. Anything that is not one of these is a bug and keeps its traceback."""

import typing


class MnistWandbError(Exception):
    """Root of all errors that a user can cause and mend.

    The message is made of short lines: where, what was found, what is allowed, what to do.

    Attributes:
        summary: the run's summary (runs.RunSummary) where a run had begun and was ended by this.
        is_told: whether the message has been shown, so that it is in the run's own console log,
            too.
    """

    summary: typing.Any = None
    is_told: bool = False


class ConfigError(MnistWandbError):
    """A configuration, an override, an environment variable or an argument is wrong."""


class SweepError(MnistWandbError):
    """A sweep file or its storage is wrong."""


class DatasetError(MnistWandbError):
    """A data set or a picture cannot be found, fetched or read."""


class RunError(MnistWandbError):
    """A run folder cannot be found, read, written or is in use."""


class LostProcessError(RunError):
    """Another process of a run on several devices has ended, has failed or does not answer.

    Attributes:
        speaks: whether this process is the one of its machine that shows the message.
    """

    speaks: bool = False


class CheckpointError(MnistWandbError):
    """A file is not a checkpoint, is damaged, or holds another model."""


class TrackingError(MnistWandbError):
    """Weights & Biases cannot be reached or refused what was asked for."""


class DivergedError(MnistWandbError):
    """The training loss became NaN or infinite.

    Attributes:
        step: optimizer step (from 1) at which the loss was not finite any more.
    """

    def __init__(self, message: str, *, step: int) -> None:
        super().__init__(message)
        self.step = step
