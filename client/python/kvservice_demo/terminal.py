"""Output for people: colours, a progress bar, flowing text and a table, all in plain ANSI.

Colours follow NO_COLOR and are off when the output is not a terminal; there, a progress bar is only
its last line, so a log stays readable.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Sequence
from typing import TextIO

_MARGIN = "  "
_COLUMNS_MAX = 100
_BAR_COLUMNS = 28
_REDRAW_S = 0.05

_STYLES = {
    "bold": "1",
    "dim": "2",
    "red": "31",
    "green": "32",
    "yellow": "33",
    "cyan": "36",
}


class Terminal:
    """Writes to one stream; not safe to share between threads."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self.is_live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._has_colour = self.is_live and not os.environ.get("NO_COLOR")
        self.columns = min(_COLUMNS_MAX, shutil.get_terminal_size((_COLUMNS_MAX, 24)).columns)

    def style(self, text: str, *names: str) -> str:
        """The text in the given styles (keys of _STYLES), unchanged where colours are off."""
        if not self._has_colour or not names:
            return text
        codes = ";".join(_STYLES[name] for name in names)
        return f"\x1b[{codes}m{text}\x1b[0m"

    def line(self, text: str = "") -> None:
        """One line inside the margin."""
        self.write((_MARGIN + text if text else "") + "\n")

    def field(self, label: str, text: str) -> None:
        """A labelled line; labels form a column."""
        self.line(self.style(f"{label:<10}", "dim") + text)

    def mark(self, is_good: bool, text: str) -> None:
        """The outcome of a check."""
        sign = self.style("✓", "green") if is_good else self.style("✗ FAILED", "red")
        self.line(f"{sign} {text}")

    def write(self, text: str) -> None:
        """Writes at once, so that streamed text is seen when it is made."""
        self._stream.write(text)
        self._stream.flush()


class Progress:
    """A bar that redraws itself in place and leaves its last state behind, or nothing."""

    def __init__(self, terminal: Terminal, label: str, total: int, unit: str) -> None:
        self._terminal = terminal
        self._label = label
        self.total = total
        self._unit = unit
        self._started_s = time.monotonic()
        self._drawn_s = 0.0

    def update(self, done: int, note: str = "") -> None:
        """Redraws, at most twenty times a second."""
        now_s = time.monotonic()
        if self._terminal.is_live and (now_s - self._drawn_s > _REDRAW_S or done == self.total):
            self._drawn_s = now_s
            self._terminal.write("\r\x1b[2K" + _MARGIN + self._render(done, note))

    def finish(self, note: str = "") -> None:
        """Draws the full bar, or on a plain stream its only line."""
        text = _MARGIN + self._render(self.total, note) + "\n"
        self._terminal.write("\r\x1b[2K" + text if self._terminal.is_live else text)

    def erase(self) -> None:
        """Removes the bar."""
        if self._terminal.is_live:
            self._terminal.write("\r\x1b[2K")

    def _render(self, done: int, note: str) -> str:
        style = self._terminal.style
        filled = _BAR_COLUMNS * done // max(1, self.total)
        bar = style("━" * filled, "cyan") + style("━" * (_BAR_COLUMNS - filled), "dim")
        rate = done / max(1e-9, time.monotonic() - self._started_s)
        counts = f"{done:,} of {self.total:,} {self._unit} · {rate:,.0f}/s"
        suffix = f" · {note}" if note else ""
        return style(f"{self._label:<10}", "dim") + f"{bar}  {counts}{suffix}"


class FlowingText:
    """Streams text into indented lines, breaking between words."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self._indent = _MARGIN + terminal.style("│ ", "dim")
        self._columns = terminal.columns - len(_MARGIN) - 2
        self._column = 0
        self._word = ""
        terminal.write(self._indent)

    def push(self, piece: str) -> None:
        """Adds text; a word appears when it is complete."""
        for character in piece:
            if character.isspace():
                self._flush()
                if character == "\n":
                    self._break_line()
            else:
                self._word += character

    def close(self) -> None:
        """Writes what is left and ends the line."""
        self._flush()
        self._terminal.write("\n")

    def _flush(self) -> None:
        if not self._word:
            return
        gap = " " if self._column else ""
        if self._column + len(gap) + len(self._word) > self._columns:
            self._break_line()
            gap = ""
        self._terminal.write(gap + self._word)
        self._column += len(gap) + len(self._word)
        self._word = ""

    def _break_line(self) -> None:
        self._terminal.write("\n" + self._indent)
        self._column = 0


def write_table(
    terminal: Terminal, headers: Sequence[Sequence[str]], rows: Sequence[Sequence[str]]
) -> None:
    """A table with header lines; the first column is left-aligned and bold, the others right."""
    widths = [max(map(len, column)) for column in zip(*headers, *rows, strict=True)]

    def join(cells: Sequence[str], *first_styles: str) -> str:
        first = terminal.style(f"{cells[0]:<{widths[0]}}", *first_styles)
        rest = [f"{cell:>{width}}" for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return "  ".join([first, *rest])

    for header in headers:
        terminal.line(terminal.style(join(header), "dim"))
    terminal.line(terminal.style("─" * (sum(widths) + 2 * (len(widths) - 1)), "dim"))
    for row in rows:
        terminal.line(join(row, "bold"))
