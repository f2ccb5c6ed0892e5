"""One method against another on one case: at equal tokens, and at equal quality."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .measures import interpolate, log_kl
from .rows import (
    CALIBRATED,
    FIXED_BUDGETS,
    ORACLE,
    PUBLISHED,
    SCANS_ALL,
    Case,
    Contender,
    Results,
    Row,
)

# Tokens read that count as equal.
_EQUAL_TOKENS = 0.05

BETTER, WORSE, UNDECIDED = "at least as good", "worse", "undecided"


def kl_at_tokens(curve: Sequence[Row], tokens: float) -> float | None:
    """KL of a method at a number of tokens read: straight lines in ln KL over ln tokens; None
    outside the curve."""
    points = [(math.log(row["tokens_read"]), log_kl(row["kl_mean"])) for row in curve
              if row["tokens_read"] > 0]
    value = interpolate(points, math.log(tokens)) if tokens > 0 else None
    return None if value is None else math.exp(value)


def compare_at_equal_tokens(curve: Sequence[Row], rival: Row) -> tuple[str, float | None]:
    """Is the method of `curve` at least as good in KL as the rival, at the rival's tokens? Also its
    KL there.

    Its row of the same budget counts where it reads the same number of tokens; otherwise its curve
    is interpolated. Beyond the ends of the curve only what needs no guess is decided: no more KL
    with fewer tokens is better, more KL with more tokens is worse.
    """
    if not curve:
        return UNDECIDED, None
    tokens, kl = rival["tokens_read"], rival["kl_mean"]
    for row in curve:
        if (row["budget"] == rival["budget"]
                and abs(row["tokens_read"] - tokens) <= _EQUAL_TOKENS * tokens):
            return (BETTER if row["kl_mean"] <= kl else WORSE), row["kl_mean"]
    if any(row["tokens_read"] <= tokens and row["kl_mean"] <= kl for row in curve):
        return BETTER, kl_at_tokens(curve, tokens)
    own = kl_at_tokens(curve, tokens)
    if own is not None:
        return (BETTER if own <= kl else WORSE), own
    least = min(curve, key=lambda row: row["tokens_read"])
    if least["tokens_read"] >= tokens and least["kl_mean"] > kl:
        return WORSE, None
    return UNDECIDED, None


@dataclass(frozen=True)
class Duel:
    """Calibrated CPE against a published method that scans less than all keys."""

    case: Case
    rival: Row
    own: Row | None
    verdict: str
    own_kl: float | None

    @property
    def loses_needles(self) -> bool:
        """Fewer needles than the rival at the same budget."""
        return (self.own is not None
                and self.own.get("needles_right", 0) < self.rival.get("needles_right", 0))

    @property
    def is_held(self) -> bool:
        """At least as good in KL and in needles."""
        return self.verdict == BETTER and not self.loses_needles


def duels(results: Results) -> list[Duel]:
    """Every published method that scans less than all keys, on every case at every budget."""
    found = []
    curves: dict[Case, list[Row]] = {}
    for case in results.cases("table"):
        curves[case] = results.curve("table", case, CALIBRATED)
        for method in PUBLISHED:
            for budget in results.budgets("table"):
                rival = results.get("table", case, (method, ""), budget)
                if rival is None or rival.get("kl_mean") is None or rival["scans"] >= SCANS_ALL:
                    continue
                own = results.get("table", case, CALIBRATED, budget)
                found.append(Duel(case, rival, own, *compare_at_equal_tokens(curves[case], rival)))
    return found


@dataclass(frozen=True)
class AdaptiveCell:
    """A budget by mass against fixed budgets of the same method at the same tokens read."""

    case: Case
    adaptive: Row
    # Of the fixed budgets at the same tokens; None = the fixed curve does not reach so far.
    fixed_kl: float | None

    @property
    def wins(self) -> bool | None:
        """None = cannot be told."""
        return None if self.fixed_kl is None else self.adaptive["kl_mean"] < self.fixed_kl


def adaptive_cells(results: Results, contender: Contender) -> list[AdaptiveCell]:
    """All budgets by mass of a method that scans every step."""
    cells = []
    for case in results.cases("table"):
        curve = results.curve("table", case, contender)
        fixed = [row for row in curve if row["budget"].isdigit()]
        cells += [AdaptiveCell(case, row, kl_at_tokens(fixed, row["tokens_read"]))
                  for row in curve if row["budget"].startswith("mass ")]
    return cells


def kl_ratios(results: Results, name: str, contender: Contender, reference: Contender,
              budget: str) -> dict[Case, float]:
    """KL of a contender over that of another at the same budget, per case of a set."""
    ratios = {}
    for case in results.cases(name):
        row = results.get(name, case, contender, budget)
        other = results.get(name, case, reference, budget)
        if row is not None and other is not None and "kl_mean" in row and "kl_mean" in other:
            ratios[case] = math.exp(log_kl(row["kl_mean"]) - log_kl(other["kl_mean"]))
    return ratios


# ---- Attention FLOPs at equal quality ------------------------------------------------------------


def frontier(rows: Sequence[Row]) -> list[Row]:
    """Rows that no other row beats in KL at no more FLOPs, cheapest first."""
    kept: list[Row] = []
    for row in sorted(rows, key=lambda row: (row["flops"], row["kl_mean"])):
        if not kept or row["kl_mean"] < kept[-1]["kl_mean"]:
            kept.append(row)
    return kept


def flops_at_kl(rows: Sequence[Row], kl: float) -> float | None:
    """Least FLOPs at which a method reaches a KL, between its rows by straight lines in ln KL.
    Where its cheapest row is good enough, that one counts; None where it never gets so good."""
    front = frontier(rows)
    if not front or front[-1]["kl_mean"] > kl:
        return None
    if front[0]["kl_mean"] <= kl:
        return float(front[0]["flops"])
    return interpolate([(log_kl(row["kl_mean"]), row["flops"]) for row in front], log_kl(kl))


@dataclass(frozen=True)
class FlopsCell:
    """A published method's row that no other published one beats, and what CPE needs for its KL."""

    case: Case
    rival: Row
    own_flops: float | None

    @property
    def ratio(self) -> float | None:
        """FLOPs of CPE over the rival's; None where CPE does not reach the rival's KL."""
        return None if self.own_flops is None else self.own_flops / self.rival["flops"]


def published_rows(results: Results, case: Case) -> list[Row]:
    """Rows of published methods on a case of the table."""
    return [row for method in PUBLISHED for row in results.curve("table", case, (method, ""))]


def flops_cells(results: Results) -> list[FlopsCell]:
    """The best published results of every case, by FLOPs."""
    cells = []
    for case in results.cases("table"):
        own = results.curve("table", case, CALIBRATED)
        cells += [FlopsCell(case, rival, flops_at_kl(own, rival["kl_mean"]))
                  for rival in frontier(published_rows(results, case)) if rival["flops"] > 0]
    return cells


# ---- Scans against the oracle and HShare ---------------------------------------------------------


@dataclass(frozen=True)
class SharingCell:
    """CPE on a case at a fixed budget, beside the oracle and HShare."""

    case: Case
    budget: str
    own: Row | None
    oracle: Row | None
    hshare: Row | None

    @property
    def kl_ratio(self) -> float | None:
        """KL over the oracle's."""
        if self.own is None or self.oracle is None:
            return None
        return math.exp(log_kl(self.own["kl_mean"]) - log_kl(self.oracle["kl_mean"]))

    @property
    def needles_lost(self) -> int:
        """Needles that dense attention finds beyond CPE's."""
        if self.own is None:
            return 0
        return int(max(0, self.own.get("needles_right_dense", 0)
                       - self.own.get("needles_right", 0)))

    def holds(self, scans_max: float, ratio_natural: float, ratio_needles: float) -> bool | None:
        """Few enough scans in the second half at a KL near the oracle's? None without rows."""
        ratio = self.kl_ratio
        if self.own is None or ratio is None:
            return None
        allowed = ratio_needles if "needles" in self.own else ratio_natural
        return bool(self.own["scans_second_half"] <= scans_max and ratio <= allowed
                    and self.needles_lost == 0)

    def beats_hshare(self, scans_share_max: float) -> bool | None:
        """At most that share of HShare's scans at equal or better KL? None without rows."""
        if self.own is None or self.hshare is None:
            return None
        return bool(self.own["scans"] <= scans_share_max * self.hshare["scans"]
                    and self.own["kl_mean"] <= self.hshare["kl_mean"])


def sharing_cells(results: Results, contender: Contender, model: str) -> list[SharingCell]:
    """Fixed budgets of one model's cases of the table."""
    return [SharingCell(case, budget, results.get("table", case, contender, budget),
                        results.get("table", case, ORACLE, budget),
                        results.get("table", case, ("hshare", ""), budget))
            for case in results.cases("table") if case.model == model for budget in FIXED_BUDGETS]
