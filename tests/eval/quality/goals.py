"""What the study has to show, each goal with what was measured.

A goal is met, not met, or not measured: where rows are missing, nothing is assumed about them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .comparisons import (
    BETTER,
    UNDECIDED,
    SharingCell,
    adaptive_cells,
    duels,
    flops_cells,
    sharing_cells,
)
from .markdown import listing, number, of, percent, table
from .measures import binomial_tail, geometric_mean
from .rows import (
    BUDGETS,
    CALIBRATED,
    DEMO_MODEL,
    FIXED_BUDGETS,
    ORACLE,
    SCAN,
    SEEDED,
    SHIPPED,
    TABLE_CONTENDERS,
    TEXTS_MIN,
    Case,
    Contender,
    Results,
    Row,
    missing_cells,
    promised_cases,
)

SCANS_MAX = 0.10
SCANS_MAX_SEEDED = 0.05
KL_RATIO_NATURAL = 1.5
KL_RATIO_NEEDLES = 3.0
HSHARE_SCANS_SHARE = 1 / 3
NLL_CHANGE_MAX = 0.01
CERTIFICATES_MIN = 10_000_000
# Missing more often than stated would be claimed below this probability of seeing it by chance.
SIGNIFICANCE = 0.01
FLOPS_RATIO_MAX = 0.85
_SHOWN_MAX = 5


@dataclass(frozen=True)
class Goal:
    """One line of the list."""

    name: str
    wanted: str
    measured: str
    is_met: bool | None
    # What stands in the way, one text each.
    exceptions: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """As the list shows it."""
        return {True: "met", False: "**not met**", None: "**not measured**"}[self.is_met]


def _complete_table(results: Results) -> Goal:
    missing = missing_cells(results)
    texts = {case.text for case in results.cases("table")}
    cells = len(promised_cases(results)) * len(TABLE_CONTENDERS) * len(BUDGETS)
    measured = f"{len(texts)} texts"
    if not missing:
        measured += f", all {cells:,} cells"
    else:
        absent = [cell for cell in missing if cell.endswith("every cell")]
        measured += f"; missing: {len(absent)} texts and lengths"
        measured += f", {len(missing) - len(absent)} cells of others"
    return Goal("1. Complete", f"methods x texts x lengths x budgets, at least {TEXTS_MIN} texts",
                measured, not missing and len(texts) >= TEXTS_MIN, tuple(missing))


def _equal_tokens(results: Results) -> Goal:
    found = duels(results)
    held = [duel for duel in found if duel.is_held]
    undecided = [duel for duel in found if duel.verdict == UNDECIDED and not duel.loses_needles]
    measured = (f"{of(len(held), len(found))} comparisons held"
                + (f", {len(undecided)} undecided (no common number of tokens)" if undecided
                   else ""))
    exceptions = tuple(
        f"{duel.case.label}, {duel.rival['method']} at {duel.rival['budget']}: "
        f"KL {number(duel.own_kl)} against {number(duel.rival['kl_mean'])}, {duel.verdict}"
        + (", fewer needles" if duel.loses_needles else "")
        for duel in found if not duel.is_held)
    # A comparison that cannot be made is not one that holds.
    is_met = None if not found else len(held) == len(found)
    if is_met is False and all(duel.verdict in (BETTER, UNDECIDED) and not duel.loses_needles
                               for duel in found):
        is_met = None
    return Goal("2a. Equal tokens",
                "calibrated CPE at least as good in KL and needles as every published method that "
                "scans less than all keys, at equal tokens read", measured, is_met, exceptions)


def _verdicts(cells: Sequence[SharingCell],
              judge: Callable[[SharingCell], bool | None]) -> tuple[int, bool | None]:
    """How many cells hold, and whether all do: None where some cannot be judged and none fails."""
    judged = [judge(cell) for cell in cells]
    if not cells or (None in judged and False not in judged):
        return judged.count(True), None
    return judged.count(True), False not in judged


def _sharing_exception(cell: SharingCell) -> str:
    where = f"{cell.case.label} at {cell.budget}: "
    if cell.own is None or cell.oracle is None:
        return where + "rows missing"
    text = (f"{percent(cell.own['scans_second_half'])} scans in the second half, "
            f"{number(cell.kl_ratio)} times the oracle's KL ({number(cell.own['kl_mean'])})")
    return where + text + (f", {cell.needles_lost} needles lost" if cell.needles_lost else "")


def _few_scans(results: Results, contender: Contender, budget: str) -> Goal:
    seeded = contender == SEEDED
    scans_max = SCANS_MAX_SEEDED if seeded else SCANS_MAX
    cells = [cell for cell in sharing_cells(results, contender, DEMO_MODEL)
             if cell.budget == budget]

    def judge(cell: SharingCell) -> bool | None:
        return cell.holds(scans_max, KL_RATIO_NATURAL, KL_RATIO_NEEDLES)

    held, is_met = _verdicts(cells, judge)
    scans = [cell.own["scans_second_half"] for cell in cells if cell.own is not None]
    measured = of(held, len(cells)) + " texts and lengths"
    if scans:
        measured += f"; scans at most {percent(max(scans))}"
    return Goal(f"2b. Few scans{', seeded' if seeded else ''}, {budget} tokens",
                f"second half of 512 steps: at most {percent(scans_max)} scans, KL at most "
                f"{KL_RATIO_NATURAL:g}x the same-budget oracle ({KL_RATIO_NEEDLES:g}x on needles, "
                "none lost)", measured, is_met,
                tuple(_sharing_exception(cell) for cell in cells if not judge(cell)))


def _hshare_exception(cell: SharingCell) -> str:
    where = f"{cell.case.label} at {cell.budget}: "
    if cell.own is None or cell.hshare is None:
        return where + "rows missing"
    return (where + f"scans {percent(cell.own['scans'])} against {percent(cell.hshare['scans'])}, "
            f"KL {number(cell.own['kl_mean'])} against {number(cell.hshare['kl_mean'])}")


def _third_of_hshare(results: Results, contender: Contender) -> Goal:
    cells = sharing_cells(results, contender, DEMO_MODEL)

    def judge(cell: SharingCell) -> bool | None:
        return cell.beats_hshare(HSHARE_SCANS_SHARE)

    held, is_met = _verdicts(cells, judge)
    shares = [cell.own["scans"] / cell.hshare["scans"] for cell in cells
              if cell.own is not None and cell.hshare is not None and cell.hshare["scans"] > 0]
    middle = geometric_mean(shares)
    return Goal(f"2c. HShare{', seeded' if contender == SEEDED else ''}",
                "at most a third of HShare's scans at equal or better KL, every text, length and "
                "fixed budget",
                of(held, len(cells)) + f" cells; scans {number(middle)} of HShare's on average",
                is_met, tuple(_hshare_exception(cell) for cell in cells if not judge(cell)))


def _adaptive(results: Results, contender: Contender) -> Goal:
    cells = adaptive_cells(results, contender)
    compared = [cell for cell in cells if cell.wins is not None]
    lost = [cell for cell in compared if not cell.wins]
    name = "exact masses" if contender == ORACLE else "estimated masses"
    exceptions = [f"{cell.case.label}, {cell.adaptive['budget']}: KL "
                  f"{number(cell.adaptive['kl_mean'])} against {number(cell.fixed_kl)} "
                  f"with {number(cell.adaptive['tokens_read'])} tokens" for cell in lost]
    return Goal(f"3. By mass, {name}",
                "every step scans: budgets by mass beat fixed ones at equal mean tokens",
                f"{of(len(compared) - len(lost), len(compared))} cells; "
                f"{len(cells) - len(compared)} more read fewer or more tokens than any fixed "
                "budget measured",
                None if not compared else not lost, tuple(exceptions))


def shipped_rows(results: Results) -> dict[Case, Row]:
    """Rows of the shipped default, per case."""
    rows = {}
    for name in ("tasks", "proof"):
        for case in results.cases(name):
            row = results.get(name, case, SHIPPED, "")
            if row is not None:
                rows[case] = row
    return rows


def needles_lost(row: Row) -> int:
    """Needles that dense attention finds beyond this row's."""
    return int(max(0, row.get("needles_right_dense", 0) - row.get("needles_right", 0)))


def _shipped(results: Results) -> Goal:
    rows = {case: row for case, row in shipped_rows(results).items() if "nll_change" in row}
    have = {(case.model, case.tokens, case.text) for case in rows}
    absent = [wanted for wanted in promised_cases(results) if wanted not in have]
    bad = {case: row for case, row in rows.items()
           if abs(row["nll_change"]) >= NLL_CHANGE_MAX or needles_lost(row) > 0}
    exceptions = [f"{case.label}: NLL {percent(row['nll_change'])}, "
                  f"{needles_lost(row)} needles lost" for case, row in bad.items()]
    exceptions += [f"{model} {text} {tokens}: missing" for model, tokens, text in absent]
    worst = max((abs(row["nll_change"]) for row in rows.values()), default=None)
    lost = sum(needles_lost(row) for row in rows.values())
    measured = f"NLL at most {percent(worst)}, {lost} needles lost, {len(rows)} texts and lengths"
    is_met = False if bad else (None if absent or not rows else True)
    measured += f", {len(absent)} missing" if absent else ""
    return Goal("4. Shipped default", "change of NLL under 1 %, no needle lost against dense, "
                "every text and length", measured, is_met, tuple(exceptions))


def _always_true(results: Results) -> Goal:
    proven = sum(row.get("certificates", 0) for row in results.rows)
    wrong = [row for row in results.rows if row.get("bound_violations", 0) > 0]
    violations = sum(row["bound_violations"] for row in wrong)
    is_met = None if proven == 0 else violations == 0 and proven >= CERTIFICATES_MIN
    return Goal("5a. Deterministic", f"0 violations over at least {CERTIFICATES_MIN:,} head-steps",
                f"{violations:,} of {proven:,}", is_met,
                tuple(f"{row['name']}, {row['method']}, {row['variant']}: "
                      f"{row['bound_violations']}" for row in wrong))


@dataclass(frozen=True)
class SampledGroup:
    """Sampled statements with the same failure probability."""

    failure_probability: float
    statements: int
    misses: int
    expected: float
    # P(at least so many misses) if every statement failed as often as it says. With unequal
    # probabilities the binomial tail above its mean is the larger one (Hoeffding 1956).
    chance: float


def sampled_groups(results: Results) -> list[SampledGroup]:
    """Sampled statements by the failure probability that they state, rounded."""
    sums: dict[float, list[float]] = {}
    for row in results.rows:
        statements = row.get("sampled_certificates", 0)
        if statements > 0:
            key = float(f"{row['expected_misses'] / statements:.1g}")
            entry = sums.setdefault(key, [0, 0, 0.0])
            for index, field in enumerate(("sampled_certificates", "sampled_misses",
                                           "expected_misses")):
                entry[index] += row[field]
    return [SampledGroup(key, int(statements), int(misses), expected,
                         binomial_tail(int(statements), expected / statements, int(misses)))
            for key, (statements, misses, expected) in sorted(sums.items())]


def _sampled(results: Results) -> Goal:
    groups = sampled_groups(results)
    wrong = [group for group in groups if group.chance < SIGNIFICANCE]
    misses = sum(group.misses for group in groups)
    expected = sum(group.expected for group in groups)
    return Goal("5b. Confidence", "misses within an exact binomial test, at significance "
                f"{SIGNIFICANCE:g} per failure probability",
                f"{misses:,} misses of {sum(group.statements for group in groups):,}; at most "
                f"{number(expected)} expected", None if not groups else not wrong,
                tuple(f"failure probability {group.failure_probability:g}: {group.misses} misses, "
                      f"{number(group.expected)} expected" for group in wrong))


def _flops(results: Results) -> Goal:
    cells = flops_cells(results)
    held = [cell for cell in cells if cell.ratio is not None and cell.ratio <= FLOPS_RATIO_MAX]
    middle = geometric_mean([cell.ratio for cell in cells if cell.ratio is not None])
    exceptions = [f"{cell.case.label}: {cell.rival['method']} at {cell.rival['budget']} "
                  f"(KL {number(cell.rival['kl_mean'])}, {percent(cell.rival['flops'])} of dense): "
                  + ("no budget of CPE reaches this KL" if cell.ratio is None
                     else f"CPE needs {number(cell.ratio)} of it")
                  for cell in cells if cell not in held]
    return Goal("6. FLOPs", "attention FLOPs of calibrated CPE at most 0.85 of the best published "
                "sparse method's at equal KL",
                f"{of(len(held), len(cells))} results of the frontier; ratio {number(middle)} on "
                "average where CPE reaches the KL",
                None if not cells else len(held) == len(cells), tuple(exceptions))


def goals(results: Results) -> list[Goal]:
    """The whole list."""
    few = [_few_scans(results, contender, budget) for contender in (CALIBRATED, SEEDED)
           for budget in reversed(FIXED_BUDGETS)]
    return [_complete_table(results), _equal_tokens(results), *few,
            _third_of_hshare(results, CALIBRATED), _third_of_hshare(results, SEEDED),
            _adaptive(results, SCAN), _adaptive(results, ORACLE), _shipped(results),
            _always_true(results), _sampled(results), _flops(results)]


def goals_text(results: Results) -> str:
    """The list as a table, and the first of what stands in the way."""
    listed = goals(results)
    met = sum(goal.is_met is True for goal in listed)
    rows = [(goal.name, goal.wanted, goal.measured, goal.verdict) for goal in listed]
    text = (f"{of(met, len(listed))} goals are met.\n\n"
            + table(("goal", "wanted", "measured", "verdict"), rows))
    return "\n\n".join([text, *_obstacles(listed, _SHOWN_MAX)])


def _obstacles(listed: Sequence[Goal], shown_max: int) -> list[str]:
    return [f"**{goal.name}**, what stands in the way:\n\n"
            + listing(goal.exceptions, min(shown_max, len(goal.exceptions)))
            for goal in listed if goal.is_met is not True and goal.exceptions]


def obstacles_text(results: Results) -> str:
    """Everything that stands in the way of goals."""
    return "\n\n".join(_obstacles(goals(results), len(results.rows))) or "Nothing."
