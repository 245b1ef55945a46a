"""The console script bdh-convert: as little as can be, so that an interruption finds it ready from the first moment."""

from __future__ import annotations

import signal
import sys

TERMINATED, INTERRUPTED = 143, 130


def main() -> None:
    """Run the command; whatever ends it early takes what is half written along."""
    try:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a terminal of ASCII is no reason to stop
        from bdh_convert.command import run

        sys.exit(run(sys.argv[1:]))
    except KeyboardInterrupt:
        print("bdh-convert: interrupted, nothing was left behind", file=sys.stderr)
        sys.exit(INTERRUPTED)
