"""What the pictures of docs/quality.md show: points, lines and panels, ready to be drawn."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .averages import sample
from .comparisons import kl_ratios
from .rows import (
    CALIBRATED,
    HSHARE,
    ORACLE,
    PUBLISHED,
    SCAN,
    SEEDED,
    Case,
    Contender,
    Results,
    Row,
    case_order,
    contender_label,
    row_order,
)
from .sections_edits import tau_of
from .sections_methods import HEADLINE_BUDGET, natural_cases
from .sections_trust import heat_rows

_POINTS_MAX = 350
_HEAT_MAPS_MAX = 6


@dataclass(frozen=True)
class Line:
    """One line or cloud of points; labels name single points."""

    name: str
    points: tuple[tuple[float, float], ...]
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class HeatMap:
    """Values by [layer][head]."""

    title: str
    values: tuple[tuple[float, ...], ...]


def _longest(results: Results, name: str) -> list[Case]:
    """Per model and text the longest case of a set."""
    longest: dict[tuple[str, str], Case] = {}
    for case in results.cases(name):
        longest[(case.model, case.text)] = case  # Cases come by tokens, ascending.
    return sorted(longest.values(), key=case_order)


def tokens_panels(results: Results) -> list[Panel]:
    """KL over tokens read, one line per method, at the longest length of every text."""
    shown: list[Contender] = [ORACLE, SCAN, CALIBRATED, SEEDED,
                              *((method, "") for method in PUBLISHED)]
    panels = []
    for case in _longest(results, "table"):
        lines = []
        for contender in shown:
            points = tuple((row["tokens_read"], row["kl_mean"])
                           for row in results.curve("table", case, contender)
                           if row["kl_mean"] > 0 and row["tokens_read"] > 0)
            if points:
                lines.append(Line(contender_label(contender), points))
        if lines:
            panels.append(Panel(case.label, tuple(lines)))
    return panels


def sharing_panels(results: Results, budget: str = HEADLINE_BUDGET) -> list[Panel]:
    """KL over the oracle's, over scans in the second half: a line of CIS by cosine, unseeded and
    seeded; single points of others."""
    panels = []
    for case in _longest(results, "sharing"):
        ratios = {contender: kl_ratios(results, "sharing", contender, ORACLE, budget).get(case)
                  for contender in results.contenders("sharing")}

        def point(contender: Contender, case: Case = case,
                  ratios: dict[Contender, float | None] = ratios) -> tuple[float, float] | None:
            row = results.get("sharing", case, contender, budget)
            ratio = ratios.get(contender)
            if row is None or ratio is None:
                return None
            return row["scans_second_half"], ratio

        lines = []
        for is_seeded, name in ((False, "CIS by cosine"), (True, "CIS by cosine, seeded")):
            found = [(tau[0], point(contender)) for contender in ratios
                     if (tau := tau_of(contender)) is not None and tau[1] == is_seeded]
            known = sorted((tau, at) for tau, at in found if at is not None)
            if known:
                # Labels of both lines would cover each other; the cosines are the same.
                labels = () if is_seeded else tuple(f"{tau:g}" for tau, _ in known)
                lines.append(Line(name, tuple(at for _, at in known), labels))
        for contender in (CALIBRATED, SEEDED, HSHARE, SCAN, ("cis", "blocks of 16"),
                          ("cis", "blocks of 16, whatever the cosine")):
            at = point(contender)
            if at is not None:
                lines.append(Line(contender_label(contender), (at,)))
        if lines:
            panels.append(Panel(case.label, tuple(lines)))
    return panels


def worst_lines(results: Results) -> list[tuple[str, dict[str, float]]]:
    """Per method: mean, p99 and largest KL over the natural texts, best mean first."""
    found = []
    for contender in results.contenders("table"):
        one = sample(results, "table", natural_cases(results), contender, HEADLINE_BUDGET)
        values = {"mean": one.geometric("kl_mean"), "p99": one.geometric("kl_p99"),
                  "largest": one.largest("kl_max")}
        known = {name: value for name, value in values.items() if value is not None and value > 0}
        if len(known) == len(values):
            found.append((contender_label(contender), known))
    return sorted(found, key=lambda entry: (entry[1]["mean"], entry[0]))


def bounds_lines(results: Results) -> list[Line]:
    """(truth, bound) of dropped mass by kind of proof, thinned evenly."""
    clouds: dict[str, list[tuple[float, float]]] = {}
    for row in results.rows:
        name = "sampled" if row.get("sampled_certificates", 0) > 0 else "always true"
        clouds.setdefault(name, []).extend(
            (truth, bound) for truth, bound in row.get("truth_and_bound", [])
            if truth > 0 and bound > 0)
    return [Line(name, tuple(thin(points, _POINTS_MAX)))
            for name, points in sorted(clouds.items()) if points]


def thin(points: list[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most so many of the points, evenly spaced."""
    if len(points) <= most:
        return points
    return [points[index * len(points) // most] for index in range(most)]


def heat_maps(results: Results) -> list[HeatMap]:
    """Dropped mass by layer and head: of the longest rows of every model and text."""
    longest: dict[tuple[str, str, str, str], Row] = {}
    for row in heat_rows(results):
        longest.setdefault((row["model"], row["text"], row["method"], row["variant"]), row)
    chosen = sorted(longest.values(), key=row_order)[:_HEAT_MAPS_MAX]
    return [HeatMap(f"{row['model']} {row['text']} {row['tokens']}: "
                    f"{contender_label((row['method'], row['variant']))} at {row['budget']}",
                    tuple(tuple(values) for values in row["dropped_by_head"]))
            for row in chosen]


def shorten(svg: str) -> str:
    """The same picture in fewer bytes: hundredths of a point are fine enough for places (not for
    the numbers that are shown), and blanks at the ends of lines say nothing."""
    def shorten_places(attribute: re.Match[str]) -> str:
        return re.sub(r"(\d\.\d\d)\d+", r"\1", attribute[0])

    return re.sub(r" +$", "", re.sub(r'"[^"]*"', shorten_places, svg), flags=re.MULTILINE)
