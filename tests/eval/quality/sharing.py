"""Sharing along time: few scans at a KL near the oracle's, against HShare, and its triggers."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from .measures import geometric_mean, log_kl
from .rows import (
    DEMO_MODEL,
    FIXED_BUDGETS,
    HSHARE,
    ORACLE,
    Case,
    Contender,
    Results,
    Row,
    promised_cases,
)

SCANS_MAX = 0.10
SCANS_MAX_SEEDED = 0.05
KL_RATIO_NATURAL = 1.5
KL_RATIO_NEEDLES = 3.0
# What has to be shown about few scans is about a generation of so many steps, at this budget.
GENERATION_STEPS = 512
GENERATION_BUDGET = "512"


def is_seeded(contender: Contender) -> bool:
    """True if its anchors are made of prompt queries before the first step."""
    return contender[1].endswith("seeded")


def scans_max_of(contender: Contender) -> float:
    """The largest share of scans in the second half that counts as few."""
    return SCANS_MAX_SEEDED if is_seeded(contender) else SCANS_MAX


def needles_lost(row: Row) -> int:
    """Needles that dense attention finds beyond this row's."""
    return int(max(0, row.get("needles_right_dense", 0) - row.get("needles_right", 0)))


def scans_with_seeds(row: Row) -> float | None:
    """Scans per step, those for seeding spread over the steps; None where a seeded row does not say
    what seeding took."""
    seeds = row.get("seed_scans", None if is_seeded((row["method"], row["variant"])) else 0.0)
    return None if seeds is None else float(row["scans"] + seeds / row["steps"])


@dataclass(frozen=True)
class SharingCell:
    """A contender on a case at a fixed budget, beside the oracle and HShare."""

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
        """Needles that dense attention finds beyond the contender's."""
        return 0 if self.own is None else needles_lost(self.own)

    @property
    def is_near_oracle(self) -> bool | None:
        """Is the KL near the oracle's and no needle lost? None without rows."""
        ratio = self.kl_ratio
        if self.own is None or ratio is None:
            return None
        allowed = KL_RATIO_NEEDLES if "needles" in self.own else KL_RATIO_NATURAL
        return ratio <= allowed and self.needles_lost == 0

    def holds(self, scans_max: float) -> bool | None:
        """Near the oracle with few enough scans in the second half? None without rows."""
        near = self.is_near_oracle
        if self.own is None or near is None:
            return None
        return bool(near and self.own["scans_second_half"] <= scans_max)

    def beats_hshare(self, scans_share_max: float) -> bool | None:
        """At most that share of HShare's scans at equal or better KL, what seeding scanned
        included? None without rows."""
        if self.own is None or self.hshare is None:
            return None
        scans = scans_with_seeds(self.own)
        if scans is None:
            return None
        return bool(scans <= scans_share_max * self.hshare["scans"]
                    and self.own["kl_mean"] <= self.hshare["kl_mean"])


def _measured(row: Row | None) -> Row | None:
    """The row if it has a KL: one that says nothing is no row."""
    return row if row is not None and row.get("kl_mean") is not None else None


def _cell(results: Results, name: str, case: Case, contender: Contender,
          budget: str) -> SharingCell:
    rows = [_measured(results.get(name, case, one, budget)) for one in (contender, ORACLE, HSHARE)]
    return SharingCell(case, budget, *rows)


def sharing_cells(results: Results, contender: Contender,
                  model: str = DEMO_MODEL) -> list[SharingCell]:
    """Fixed budgets of one model's cases of the table."""
    return [_cell(results, "table", case, contender, budget) for case in results.cases("table")
            if case.model == model for budget in FIXED_BUDGETS]


def generation_cells(results: Results, contender: Contender,
                     model: str = DEMO_MODEL) -> list[SharingCell]:
    """A contender in set "sharing", on every text and length that is promised or measured there.
    Rows of fewer steps than asked for do not count: those cells are empty, as are cells of texts
    that were not measured."""
    found = {(case.model, case.tokens, case.text): case for case in results.cases("sharing")}
    wanted = {*found, *promised_cases(results)}
    cells = []
    for key in sorted(key for key in wanted if key[0] == model):
        case = found.get(key, Case(*key, name=""))
        cell = _cell(results, "sharing", case, contender, GENERATION_BUDGET)
        is_long = cell.own is not None and cell.own["steps"] >= GENERATION_STEPS
        cells.append(cell if is_long else SharingCell(case, cell.budget, None, cell.oracle,
                                                      cell.hshare))
    return cells


# ---- Triggers of uncalibrated CIS ----------------------------------------------------------------

BY_COSINE, VERIFIED = "tau", "verified"
_TRIGGER = re.compile(rf"({BY_COSINE}|{VERIFIED}) ([0-9.]+)(, seeded)?")


@dataclass(frozen=True)
class Trigger:
    """When CIS in its plain form shares: at a cosine of `value` or more (BY_COSINE), or while the
    list's estimated dropped mass stays under `value` (VERIFIED)."""

    kind: str
    value: float
    seeded: bool

    @property
    def looseness(self) -> float:
        """Larger: shares more often."""
        return -self.value if self.kind == BY_COSINE else self.value


def trigger_of(contender: Contender) -> Trigger | None:
    """The trigger of CIS in its plain form; None for everyone else."""
    match = _TRIGGER.fullmatch(contender[1]) if contender[0] == "cis" else None
    return Trigger(match[1], float(match[2]), match[3] is not None) if match else None


def triggers(results: Results, kind: str, seeded: bool) -> list[tuple[Trigger, Contender]]:
    """The triggers of one kind that were measured, strictest first."""
    found = [(trigger, contender) for contender in results.contenders("sharing")
             if (trigger := trigger_of(contender)) is not None
             and (trigger.kind, trigger.seeded) == (kind, seeded)]
    return sorted(found, key=lambda entry: entry[0].looseness)


def loosest_safe(results: Results, case: Case, budget: str, kind: str, seeded: bool,
                 scans_max: float | None = None) -> float | None:
    """The loosest trigger measured at which, and at all stricter ones, CIS keeps its KL near the
    oracle's and loses no needle on a case (and scans little enough, if asked). None = no such
    one."""
    loosest = None
    for trigger, contender in triggers(results, kind, seeded):
        cell = _cell(results, "sharing", case, contender, budget)
        near = cell.is_near_oracle
        if cell.own is None or near is None:
            continue
        if not near:
            break
        if scans_max is None or cell.own["scans_second_half"] <= scans_max:
            loosest = trigger.value
    return loosest


def best_uncalibrated(cells: Sequence[tuple[Contender, SharingCell]],
                      seeded: bool) -> tuple[Contender, SharingCell] | None:
    """Of cells of one case: CIS with the plain trigger that comes nearest to few scans at a KL near
    the oracle's: what holds comes first, then what scans little enough, then the least KL."""
    def rank(entry: tuple[Contender, SharingCell]) -> tuple[bool, bool, float]:
        contender, cell = entry
        most = scans_max_of(contender)
        scans = 1.0 if cell.own is None else cell.own["scans_second_half"]
        return (not cell.holds(most), scans > most, cell.kl_ratio or 0.0)

    plain = [(contender, cell) for contender, cell in cells
             if (trigger := trigger_of(contender)) is not None and trigger.seeded == seeded
             and cell.kl_ratio is not None]
    return min(plain, key=rank, default=None)


def best_uniform(results: Results, seeded: bool) -> tuple[Contender, int, int] | None:
    """The plain trigger that holds on most texts and lengths of the demo's model: on how many, and
    on how many it was measured. Of equals one that scans little enough on all, then the one with
    the least KL over the oracle's. Chosen by the texts that it is judged on."""
    ranked = []
    for kind in (BY_COSINE, VERIFIED):
        for _, contender in triggers(results, kind, seeded):
            cells = [(cell.own, cell) for cell in generation_cells(results, contender)
                     if cell.own is not None and cell.kl_ratio is not None]
            if not cells:
                continue
            most = scans_max_of(contender)
            held = sum(bool(cell.holds(most)) for _, cell in cells)
            too_many = max(row["scans_second_half"] for row, _ in cells) > most
            ratio = geometric_mean([cell.kl_ratio or 0.0 for _, cell in cells])
            ranked.append((-held, too_many, ratio, contender, len(cells)))
    if not ranked:
        return None
    held, _, _, contender, count = min(ranked)
    return contender, -held, count
