"""`python -m paramspec`, and the command `paramspec`."""

from __future__ import annotations

from paramspec.execution.ends import mind_signals


def main() -> None:
    """Run the command line; see `paramspec.cli.main`."""
    mind_signals()  # before imports that take time
    from paramspec import cli

    cli.main()


if __name__ == "__main__":
    main()
