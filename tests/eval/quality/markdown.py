"""Numbers, sentences and tables as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

MISSING = "missing"


def number(value: float | None) -> str:
    """Three significant digits; what is not there says so."""
    if value is None:
        return MISSING
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if isinstance(value, int):
        return f"{value:,}"
    if 1e-4 <= abs(value) < 1e4:
        digits = max(0, 2 - math.floor(math.log10(abs(value))))
        return f"{value:.{digits}f}"
    return f"{value:.3g}" if abs(value) < 1 else f"{value:,.0f}"


def percent(value: float | None) -> str:
    """A share, three significant digits."""
    return MISSING if value is None else f"{100 * value:.3g} %"


def of(part: int, whole: int) -> str:
    """So many of so many."""
    return f"{part:,} of {whole:,}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; a placeholder sentence where there are no rows."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    if not lines:
        return "No rows of this kind are in the results: missing."
    return "\n".join(["| " + " | ".join(header) + " |", "|" + "---|" * len(header), *lines])


def listing(items: Sequence[str], shown_max: int) -> str:
    """Items as a list; the rest is counted."""
    lines = [f"- {item}" for item in items[:shown_max]]
    if len(items) > shown_max:
        lines.append(f"- and {len(items) - shown_max:,} more")
    return "\n".join(lines)


def section(title: str, *parts: str) -> str:
    """A section of the document; empty parts are left out."""
    return "\n\n".join([f"## {title}", *(part for part in parts if part)])


def picture(name: str, description: str, is_there: object) -> str:
    """A picture beside the document; nothing where there are no rows to draw."""
    return f"![{description}](images/quality_{name}.svg)" if is_there else ""
