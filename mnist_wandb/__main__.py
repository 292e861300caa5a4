"""`python -m mnist_wandb`, and the entry point of the `mnist-wandb` command."""

import sys


def main() -> None:
    """Run the command line and exit with its code."""
    from mnist_wandb.cli import main as run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
