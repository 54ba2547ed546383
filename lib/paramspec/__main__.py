"""`python -m paramspec`, and the command `paramspec`."""

from __future__ import annotations

from paramspec.execution.ends import collect_seldom, mind_signals


def main() -> None:
    """Run the command line; see `paramspec.cli.main`."""
    mind_signals()  # before imports that take time
    collect_seldom()
    from paramspec import cli

    cli.main()


if __name__ == "__main__":
    main()
