"""Draw the model: what happens to one token in one layer, in six steps, each with its rule.

python examples/model_picture.py docs/model.svg

It is a drawing and no measurement: which cells are lit is made up, and only how many of them is about what trained models show.
"""

from __future__ import annotations

import argparse
import math
from html import escape
from pathlib import Path

WIDTH, HEIGHT = 660, 306
PANEL_W, PANEL_H = 196, 124
LEFT, TOP, GAP_X, GAP_Y = 8, 8, 28, 24

# The page decides by the reader's own colours; the ground is drawn, so that the picture can be read on any other.
STYLE = """
  svg { --ground: #ffffff; --panel: #f6f6f3; --line: #d9d9d2; --ink: #1b1b1b; --soft: #5c5c58; --cell: #e6e6df; --on: #0b7a6b;
        --gate: #c2440e; --minus: #a8327f }
  @media (prefers-color-scheme: dark) {
    svg { --ground: #14171a; --panel: #1d2125; --line: #363c42; --ink: #ececec; --soft: #a9b0b6; --cell: #30363c; --on: #35b8a4;
          --gate: #ff8a50; --minus: #e07fc1 }
  }
  text { font-family: system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: var(--ink); font-size: 13.5px }
  .title { font-size: 16px; font-weight: 700 }
  .soft { fill: var(--soft) }
  .rule { fill: var(--soft); font-size: 11.5px; text-anchor: end }
  .code { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, monospace; font-size: 12.5px }
  .end { text-anchor: end }
  .middle { text-anchor: middle }
  .ground { fill: var(--ground) } .panel { fill: var(--panel); stroke: var(--line) }
  .off { fill: var(--cell) } .on { fill: var(--on) } .gate { fill: var(--gate) } .minus { fill: var(--minus) }
  .arrow { fill: none; stroke: var(--soft); stroke-width: 1.8 } .head { fill: var(--soft) }
  .dial { fill: var(--ground); stroke: var(--line) } .hand { stroke: var(--on); stroke-width: 2.2; stroke-linecap: round }
"""
HEAD = '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
ARROW_HEAD = f'{HEAD}<path class="head" d="M0 0.6 L8 4 L0 7.4 z"/></marker>'

Box = tuple[float, float, float, float]


def corner(column: int, row: int) -> tuple[float, float]:
    """Where a panel begins."""
    return LEFT + column * (PANEL_W + GAP_X), TOP + row * (PANEL_H + GAP_Y)


def text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(words)}</text>'


def cell(box: Box, kind: str) -> str:
    x, y, width, height = box
    return f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="1.5"/>'


def arrow(path: str) -> str:
    return f'<path class="arrow" d="{path}" marker-end="url(#head)"/>'


def cells(x: float, y: float, columns: int, rows: int, size: float, lit: dict[int, str]) -> list[str]:
    """A grid of cells, numbered row by row; those in ``lit`` have a colour."""
    return [
        cell((x + i % columns * size, y + i // columns * size, size - 2, size - 2), lit.get(i, "off"))
        for i in range(columns * rows)
    ]


def panel(column: int, row: int, title: str, rule: str, said: str, inside: list[str]) -> list[str]:
    x, y = corner(column, row)
    frame = f'<rect class="panel" x="{x:g}" y="{y:g}" width="{PANEL_W}" height="{PANEL_H}" rx="8"/>'
    head = [text(x + 10, y + 20, title, "title"), text(x + PANEL_W - 10, y + 20, rule, "rule")]
    return [frame, *head, *inside, text(x + 10, y + PANEL_H - 9, said, "soft")]


SPARSE = (3, 11, 20, 27, 33, 38, 46, 52, 57, 63, 70)  # of 5 rows of 15
FEATURES = ["off", "on", "minus", "on", "off", "minus", "on"]
DECODED = ["gate", "off", "gate", "off", "off", "gate", "off"]


def numbers(x: float, y: float, kinds: list[str]) -> list[str]:
    """A column of D numbers: those that are near zero, and those on either side of it."""
    return [cell((x, y + 10 * i, 24, 8), kind) for i, kind in enumerate(kinds)]


def token() -> list[str]:
    x, y = corner(0, 0)
    key = f'<rect class="dial" x="{x + 30:g}" y="{y + 46:g}" width="38" height="38" rx="6"/>'
    letter = f'<text x="{x + 49:g}" y="{y + 72:g}" class="middle code" style="font-size:20px">d</text>'
    return [key, letter, arrow(f"M{x + 76:g} {y + 65:g} H{x + 128:g}"), *numbers(x + 137, y + 30, FEATURES)]


def code() -> list[str]:
    x, y = corner(1, 0)
    return cells(x + 11, y + 33, 15, 5, 11.8, dict.fromkeys(SPARSE, "on"))


def rotation() -> list[str]:
    x, y = corner(2, 0)
    drawn: list[str] = []
    for i in range(8):
        cx, cy = x + 29 + 46 * (i % 4), y + 46 + 36 * (i // 4)
        turn = 2 * math.pi * (2.8 * 0.55**i % 1)  # each pair is slower than the one before
        tip = f'x2="{cx + 12 * math.sin(turn):.1f}" y2="{cy - 12 * math.cos(turn):.1f}"'
        drawn += [f'<circle class="dial" cx="{cx:g}" cy="{cy:g}" r="15.5"/>']
        drawn += [f'<line class="hand" x1="{cx:g}" y1="{cy:g}" {tip}/>']
    return drawn


def state() -> list[str]:
    x, y = corner(2, 1)
    written = {3: "on", 4: "on", 12: "minus", 18: "on", 20: "minus", 27: "on", 33: "on", 37: "minus", 43: "on", 49: "on"}
    read = [text(x + 10, y + 54, "read", "code"), text(x + 10, y + 70, "q S", "code")]
    write = [text(x + 146, y + 54, "write", "code"), text(x + 146, y + 70, "+ qᵀx", "code")]
    ways = [arrow(f"M{x + 53:g} {y + 80:g} H{x + 12:g}"), arrow(f"M{x + 186:g} {y + 80:g} H{x + 145:g}")]
    return [*cells(x + 60, y + 30, 8, 7, 10.2, written), *read, *write, *ways]


def gate() -> list[str]:
    x, y = corner(1, 1)
    rows = (("x_sparse", (1, 4, 6, 9), "on"), ("× y_sparse", (0, 4, 5, 9), "on"), ("= xy_sparse", (4, 9), "gate"))
    drawn: list[str] = []
    for i, (name, lit, kind) in enumerate(rows):
        drawn += [text(x + (26 if i == 0 else 10), y + 47 + 23 * i, name, "code")]
        drawn += cells(x + 101, y + 38 + 23 * i, 10, 1, 9, dict.fromkeys(lit, kind))
    return drawn


def back() -> list[str]:
    x, y = corner(0, 1)
    both = [b if b != "off" else a for a, b in zip(FEATURES, DECODED, strict=True)]
    columns = (numbers(x + 25 + 56 * i, y + 30, kinds) for i, kinds in enumerate((FEATURES, DECODED, both)))
    signs = [text(x + 65, y + 70, "+", "middle title"), text(x + 121, y + 70, "=", "middle title")]
    return [*(drawn for column in columns for drawn in column), *signs]


def arrows() -> list[str]:
    """The way of a token: over the top from left to right, back below, and round again for each layer."""
    (x1, y1), (x2, _), (x3, y2) = corner(0, 0), corner(1, 0), corner(2, 1)
    top, low, below = y1 + PANEL_H / 2, y2 + PANEL_H / 2, y1 + PANEL_H
    across = [arrow(f"M{a + PANEL_W + 3:g} {top:g} H{a + PANEL_W + GAP_X - 3:g}") for a in (x1, x2)]
    home = [arrow(f"M{a - 3:g} {low:g} H{a - GAP_X + 3:g}") for a in (x2, x3)]
    down = [arrow(f"M{a + PANEL_W / 2:g} {below + 3:g} V{y2 - 4:g}") for a in (x2, x3)]
    again = arrow(f"M{x1 + 149:g} {y2 - 3:g} V{below + 4:g}")
    words = [
        text(x1 + 140, below + 17, "next layer", "soft end"),
        text(x2 + PANEL_W / 2 + 8, below + 17, "unrotated", "soft"),
        text(x3 + PANEL_W / 2 + 8, below + 17, "q", "code"),
    ]
    out = [arrow(f"M{x1 + 149:g} {y2 + PANEL_H + 3:g} V{HEIGHT - 4:g}")]
    said = text(x1 + 159, HEIGHT - 8, "after the last layer: the next byte (R11)", "soft")
    return [*across, *home, *down, again, *words, *out, said]


def picture() -> str:
    """The drawing as SVG."""
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="One token in one layer of BDH:'
        ' token, sparse code, rotation, state, gate, and back">',
        f"<style>{STYLE}</style>",
        f"<defs>{ARROW_HEAD}</defs>",
        f'<rect class="ground" width="{WIDTH}" height="{HEIGHT}" rx="10"/>',
        *panel(0, 0, "Token", "R1", "a byte, as D numbers: x", token()),
        *panel(1, 0, "Sparse code", "R3", "many neurons, most silent", code()),
        *panel(2, 0, "Rotation", "R4", "pairs turn with position", rotation()),
        *panel(2, 1, "State", "R5, R13", "its size never grows", state()),
        *panel(1, 1, "Gate", "R6 to R8", "what both have stays", gate()),
        *panel(0, 1, "Back", "R9, R10", "decoded, and added to x", back()),
        *arrows(),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("file", type=Path)
    parser.parse_args().file.write_text(picture(), encoding="utf-8")


if __name__ == "__main__":
    main()
