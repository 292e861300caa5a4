"""Early termination of sweep runs by W&B's hyperband rule.

Source: `hyperband_stop_runs` of W&B's open-source engine (PyPI `sweeps` 0.2.0), against which the
tests compare; after Li et al. 2018, "Hyperband", https://arxiv.org/abs/1603.06560.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

DEFAULT_ETA = 3
MOST_BANDS = 100


@dataclass(frozen=True)
class Hyperband:
    """When a run is stopped early.

    An iteration is one logged finite value of the sweep's metric, whatever its step; a run has
    reached band b when it has logged more than b values.

    Attributes:
        bands: iterations at which runs are compared, ascending.
        eta: of the runs that reached a band, the best 1/eta go on.
        strict: compare the value at the band, instead of the run's best value so far.
    """

    bands: tuple[int, ...]
    eta: float = DEFAULT_ETA
    strict: bool = False

    @classmethod
    def from_fields(cls, fields: Mapping[str, float | str | bool]) -> Hyperband:
        """From the fields of `early_terminate`, which are valid."""
        eta = float(fields.get("eta", DEFAULT_ETA))
        if "max_iter" in fields:
            last, count = float(fields["max_iter"]), int(fields.get("s", 0))
            bands = [last / eta**i for i in range(1, count + 1)]
        else:
            bands = [float(fields["min_iter"]) * eta**i for i in range(MOST_BANDS)]
        kept = sorted({int(band) for band in bands if 1 <= band < 1e15})
        return cls(tuple(kept), eta, bool(fields.get("strict", False)))

    def last_band(self, num_values: int) -> int | None:
        """The last band that a run with so many logged values has reached, or None."""
        return max((band for band in self.bands if band < num_values), default=None)

    def stopping_band(
        self, history: Sequence[float], others: Sequence[Sequence[float]], *, maximize: bool
    ) -> int | None:
        """The band at which a run has to stop now, or None where it goes on.

        Args:
            history: the finite values that the run has logged so far, oldest first.
            others: the same of all other runs of the sweep, ended or not.
            maximize: whether larger values are better.
        """
        band, sign = self.last_band(len(history)), -1 if maximize else 1
        if band is None:
            return None
        values = sorted(sign * h[band] for h in (history, *others) if len(h) > band)
        threshold = values[int(1 / self.eta * len(values))]
        own = sign * history[band] if self.strict else min(sign * value for value in history)
        return band if own > threshold else None
