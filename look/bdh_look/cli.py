"""The command line of bdh-look: what it finds goes to stdout or to a file, talk to stderr."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import click

from bdh_look.commands import graph, neurons, state
from bdh_look.live import live
from bdh_look.options import Chosen, check_free, of_a_model, put
from bdh_spec import BDHError
from bdh_spec.files import shown

MISUSE, INTERRUPTED, TERMINATED = 2, 130, 143
PAGE = "page"  # the command that a text alone means


class TextOrCommand(click.Group):
    """A group in which a first word that names no command is the text of a page."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        if not args and not context.resilient_parsing:
            raise click.UsageError(f"there is nothing to look at: give a TEXT, or one of {', '.join(sorted(self.commands))}")
        own = {word for param in self.params for word in param.opts} | set(context.help_option_names)
        if args and args[0] not in self.commands and args[0] not in own:
            args = [PAGE, *args]
        return super().parse_args(context, args)


@click.group(cls=TextOrCommand, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="bdh-spec", message="%(prog)s %(version)s", prog_name="bdh-look")
def command() -> None:
    """Look inside a model: bdh-look TEXT -o page.html writes a page about how it reads TEXT.

    Its options are those of bdh-look page. A TEXT that is the name of a command goes after it: bdh-look page neurons.
    """


@command.command(PAGE, short_help="A page about how a model reads TEXT; its name may be left out.")
@click.argument("text")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default=Path("look.html"), show_default=True, help="- is stdout."
)
@click.option("--force", is_flag=True, help="Replace a file.")
@click.option("--causes/--no-causes", default=True, show_default=True, help="Read each byte again without some earlier ones.")
@of_a_model
def page_command(chosen: Chosen, text: str, output: Path, force: bool, causes: bool) -> None:
    """Write one self-contained HTML page about how a model reads TEXT, 2 to 2,000 bytes, or - for stdin.

    Of each byte: its loss, what was expected next, the earlier bytes and the synapses that it read, and the neurons that were
    active; of each neuron what excites it, what it speaks for, and its partners; the state over the text.
    """
    from bdh_look.page import check_length, page

    check_free(output, force)
    content = check_length(text_bytes(text))
    html = page(chosen.load(), content, chosen.name, with_causes=causes)
    put(output, html.encode())


command.add_command(neurons)
command.add_command(graph)
command.add_command(state)
command.add_command(live)


def text_bytes(text: str) -> bytes:
    """The text as the bytes that were typed or piped."""
    return sys.stdin.buffer.read() if text == "-" else os.fsencode(text)


def main() -> None:
    """Run the command: bad input is one sentence on stderr and exit status 2."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))  # so that what is half written goes too
    try:
        command.main(standalone_mode=False)
    except BrokenPipeError:  # whoever read the answer has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except ModuleNotFoundError as error:
        if error.name not in ("jinja2", "markupsafe", "matplotlib", "networkx", "scipy"):
            raise
        complain(f"{error.name} is not installed: pip install 'bdh-spec[look]'")
        sys.exit(MISUSE)
    except (click.ClickException, BDHError, OSError) as error:
        complain(error.format_message() if isinstance(error, click.ClickException) else str(error))
        sys.exit(MISUSE)
    except MemoryError:
        complain("the memory of this machine is not enough: give a shorter text, or less of it with --max-bytes")
        sys.exit(MISUSE)
    except (KeyboardInterrupt, click.Abort):
        complain("interrupted")
        sys.exit(INTERRUPTED)


def complain(sentence: str) -> None:
    print(f"bdh-look: {shown(sentence)}", file=sys.stderr)
