"""The console script bdh-look: as little as can be, so that an interruption finds it ready from the first moment."""

from __future__ import annotations

import os
import signal
import sys

INTERRUPTED = 130


def main() -> None:
    """Run the command. An interruption ends the process at once, until ``clean_up_when_interrupted`` is called."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a terminal of ASCII is no reason to stop
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and is not told to ignore it
        signal.signal(signal.SIGINT, leave)
    from bdh_look.cli import main as run

    try:
        run()
    except KeyboardInterrupt:
        leave()


def leave(*_: object) -> None:
    """End at once: an exception would be lost in what the import system and frameworks call back, or abort them."""
    os.write(2, b"bdh-look: interrupted\n")
    os._exit(INTERRUPTED)


def clean_up_when_interrupted() -> None:
    """From here on an interruption is an exception, so that what is half done is undone."""
    if signal.getsignal(signal.SIGINT) is leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
