"""`python -m mnist_wandb`, and the entry point of the `mnist-wandb` command."""

import gc
import sys

COLLECT_AFTER = 20_000
"""New objects before garbage is looked for; with Python's 700, imports take 0.5 s longer."""


def main() -> None:
    """Run the command line and exit with its code."""
    gc.set_threshold(COLLECT_AFTER)
    from mnist_wandb.cli import main as run
    from mnist_wandb.signals import exit_after_hooks, exit_at_once

    code = run(sys.argv[1:])
    background = sys.modules.get("mnist_wandb.background")  # imported only where it was needed
    if background is not None and background.is_client_busy():
        exit_at_once(code)
    exit_after_hooks(code)


if __name__ == "__main__":
    main()
