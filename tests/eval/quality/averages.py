"""What a contender did on several cases at once, with a count of the cases that are missing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .markdown import MISSING, number
from .measures import geometric_mean, mean
from .rows import Case, Contender, Results, Row


@dataclass(frozen=True)
class Sample:
    """Rows of one contender and budget on the cases that were asked for."""

    rows: tuple[Row, ...]
    wanted: int

    def numbers(self, field: str) -> list[float]:
        """A field of all rows that have it."""
        return [row[field] for row in self.rows if row.get(field) is not None]

    def mean(self, field: str) -> float | None:
        """Arithmetic mean."""
        return mean(self.numbers(field))

    def geometric(self, field: str) -> float | None:
        """Geometric mean."""
        return geometric_mean(self.numbers(field))

    def largest(self, field: str) -> float | None:
        """The largest."""
        return max(self.numbers(field), default=None)

    def total(self, field: str) -> int:
        """Sum of counts."""
        return int(sum(self.numbers(field)))

    def share(self, part: str, whole: str) -> str:
        """Summed counts, so many of so many."""
        if not self.numbers(whole):
            return MISSING
        return f"{self.total(part)}/{self.total(whole)}"

    def show(self, value: float | None, text: Callable[[float | None], str] = number) -> str:
        """A number of this sample; incomplete samples carry the count of their cases."""
        shown = text(value)
        if value is None or len(self.rows) == self.wanted:
            return shown
        return f"{shown} ({len(self.rows)} of {self.wanted})"


def sample(results: Results, name: str, cases: Sequence[Case], contender: Contender,
           budget: str) -> Sample:
    """The rows of a contender in a set on these cases."""
    rows = [results.get(name, case, contender, budget) for case in cases]
    return Sample(tuple(row for row in rows if row is not None), len(cases))
