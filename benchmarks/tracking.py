"""What tracking costs: whole runs, tracked offline, against `tracking.mode=disabled`.

    uv run python benchmarks/tracking.py [--repeats 5] [--epochs 10] [PRESET...]

Both sides write the run folder; the tracked one starts the W&B client, sends it all metrics,
confusion matrices, tables, pictures and the model, and ends it. Seconds are those of the whole
process. The sides take turns, and which goes first alternates.
"""

from __future__ import annotations

import argparse
import tempfile

from machine import median, print_conditions, print_table, run_json, watching_others

from mnist_wandb.settings import load_settings

MODES = ("disabled", "offline")


def main() -> None:
    """Measure in turns; print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("presets", nargs="*", default=["mlp_small", "cnn_small"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--epochs", type=float, default=10)
    options = parser.parse_args()
    data = f"data.dir={load_settings().data_dir.absolute()}"
    seconds: dict[tuple[str, str], list[float]] = {}
    with watching_others() as others:
        for repeat in range(options.repeats):
            for preset in options.presets:
                for mode in MODES if repeat % 2 else MODES[::-1]:
                    with tempfile.TemporaryDirectory() as folder:
                        value, _ = run_json(
                            "run", "--config", preset, f"training.epochs={options.epochs}",
                            f"tracking.mode={mode}", data, folder=folder,
                        )  # fmt: skip
                    seconds.setdefault((preset, mode), []).append(value)
    rows = []
    for preset in options.presets:
        without, tracked = (seconds[preset, mode] for mode in MODES)
        ratio = median([t / w for t, w in zip(tracked, without, strict=True)])
        rows.append(
            (f"`{preset}`", f"{median(without):.1f}", f"{median(tracked):.1f}", f"{ratio - 1:+.1%}")
        )
    print_table(("preset", "disabled, seconds", "offline", "tracking adds"), rows)
    print(f"\n{options.epochs:g} epochs")
    print_conditions(options.repeats, others[0])


if __name__ == "__main__":
    main()
