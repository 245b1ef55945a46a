"""The console script bdh-convert: as little as can be, so that an interruption finds it ready from the first moment."""

from __future__ import annotations

import os
import signal
import sys

TERMINATED, INTERRUPTED = 143, 130


def main() -> None:
    """Run the command; whatever ends it early takes what is half written along."""
    try:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a terminal of ASCII is no reason to stop
        catches = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # and is not told to ignore it
        if catches:
            signal.signal(signal.SIGINT, leave)
        from bdh_convert.command import run

        if catches:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.exit(run(sys.argv[1:]))
    except KeyboardInterrupt:
        print("bdh-convert: interrupted, nothing was left behind", file=sys.stderr)
        sys.exit(INTERRUPTED)


def leave(*_: object) -> None:
    """End at once, while nothing is written yet: an exception would be lost in what the import system calls back."""
    os.write(2, b"bdh-convert: interrupted, nothing was left behind\n")
    os._exit(INTERRUPTED)
