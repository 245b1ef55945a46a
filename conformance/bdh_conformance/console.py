"""The console script bdh-conform: as little as can be, so that what is missing is told in a sentence."""

from __future__ import annotations

import sys

OF_THE_EXTRA = ("hypothesis", "pytest", "jinja2")  # what [conformance] installs


def main() -> None:
    """Run the command, if all that it needs is there."""
    try:
        from bdh_conformance.cli import main as command
    except KeyboardInterrupt:
        print("bdh-conform: interrupted", file=sys.stderr)
        sys.exit(130)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in OF_THE_EXTRA:
            raise
        print(f"bdh-conform: {error.name} is not installed: pip install 'bdh-spec[conformance]'", file=sys.stderr)
        sys.exit(2)
    command()
