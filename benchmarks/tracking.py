"""What tracking costs: whole runs, tracked offline, against `tracking.mode=disabled`.

    uv run python benchmarks/tracking.py [--repeats 5] [--epochs 10] [PRESET...]

Both sides write the run folder; the tracked one starts the W&B client, sends it all metrics,
confusion matrices, tables, pictures and the model, and ends it. Seconds are those of the whole
process. The sides take turns, and which goes first alternates. "Outside of the steps" is what is
left without the training steps, whose speed wanders more than tracking costs.
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
    outside: dict[tuple[str, str], list[float]] = {}
    with watching_others() as others:
        for repeat in range(options.repeats):
            for preset in options.presets:
                for mode in MODES if repeat % 2 else MODES[::-1]:
                    with tempfile.TemporaryDirectory() as folder:
                        value, summary = run_json(
                            "run", "--config", preset, f"training.epochs={options.epochs}",
                            f"tracking.mode={mode}", data, folder=folder,
                        )  # fmt: skip
                    seconds.setdefault((preset, mode), []).append(value)
                    rest = value - summary["training_seconds"]
                    outside.setdefault((preset, mode), []).append(rest)
    rows = []
    for preset in options.presets:
        without, tracked = (seconds[preset, mode] for mode in MODES)
        ratio = median([t / w for t, w in zip(tracked, without, strict=True)])
        rest, rest_tracked = (median(outside[preset, mode]) for mode in MODES)
        share = (rest_tracked - rest) / median(without)
        rows.append(
            (f"`{preset}`", f"{median(without):.1f}", f"{median(tracked):.1f}", f"{ratio - 1:+.1%}",
             f"{rest:.1f}", f"{rest_tracked:.1f}", f"{share:+.1%}")
        )  # fmt: skip
    print_table(
        ("preset", "disabled, seconds", "offline", "tracking adds",
         "disabled, outside of the steps", "offline", "tracking adds there, of the whole"),
        rows,
    )  # fmt: skip
    print(f"\n{options.epochs:g} epochs")
    print_conditions(options.repeats, others[0])


if __name__ == "__main__":
    main()
