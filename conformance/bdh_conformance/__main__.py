"""The door of bdh-conform: ``vectors`` needs nothing but the core, everything else needs Hypothesis."""

from __future__ import annotations

import sys

import click

from bdh_conformance.files.cli import vectors
from bdh_spec import BDHError
from bdh_spec.files import shown

MISUSE, INTERRUPTED = 2, 130


def main() -> None:
    """The console script."""
    arguments = sys.argv[1:]
    try:
        if arguments[:1] == ["vectors"]:
            vectors.main(arguments[1:], prog_name="bdh-conform vectors", standalone_mode=False)
            sys.exit(0)
        sys.exit(command().main(arguments, prog_name="bdh-conform", standalone_mode=False))
    except (click.ClickException, BDHError, OSError) as error:
        complain(error.format_message() if isinstance(error, click.ClickException) else str(error))
        sys.exit(MISUSE)
    except (KeyboardInterrupt, click.Abort):
        complain("interrupted")
        sys.exit(INTERRUPTED)


def command() -> click.Command:
    """The command that runs the suite, if what it needs is installed."""
    try:
        from bdh_conformance import cli
    except ModuleNotFoundError as error:
        needed = (error.name or "").split(".")[0]
        if needed not in ("hypothesis", "jinja2"):
            raise
        raise click.UsageError(f"{needed} is not installed: pip install 'bdh-spec[conformance]'") from None
    return cli.command


def complain(sentence: str) -> None:
    print(f"bdh-conform: {shown(sentence)}", file=sys.stderr)


if __name__ == "__main__":
    main()
