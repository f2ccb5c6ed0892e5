"""What the study has to show, each goal with what was measured.

A goal is met, not met, or not measured: where rows are missing, nothing is assumed about them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .comparisons import (
    BETTER,
    UNDECIDED,
    adaptive_cells,
    cases_without_own,
    duels,
    flops_cells,
)
from .markdown import listing, number, of, percent, table
from .measures import binomial_tail, geometric_mean
from .rows import (
    BUDGETS,
    CALIBRATED,
    FEW_SCANS,
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
    contender_label,
    gaps,
    promised_cases,
)
from .sharing import (
    GENERATION_BUDGET,
    GENERATION_STEPS,
    KL_RATIO_NATURAL,
    KL_RATIO_NEEDLES,
    SharingCell,
    best_uniform,
    generation_cells,
    is_seeded,
    needles_lost,
    scans_max_of,
    scans_with_seeds,
    sharing_cells,
)

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
    missing = gaps(results)
    texts = {case.text for case in results.cases("table")}
    cells = len(promised_cases(results)) * len(TABLE_CONTENDERS) * len(BUDGETS)
    measured = f"{len(texts)} texts"
    if not missing:
        measured += f", all {cells:,} cells"
    else:
        absent = [gap for gap in missing if gap.is_whole_case]
        elsewhere = sum(gap.cells for gap in missing if not gap.is_whole_case)
        measured += (f", {of(cells - sum(gap.cells for gap in missing), cells)} cells; missing: "
                     f"{len(absent)} texts and lengths, {elsewhere:,} cells of others")
    return Goal("1. Complete", f"methods x texts x lengths x budgets, at least {TEXTS_MIN} texts",
                measured, not missing and len(texts) >= TEXTS_MIN,
                tuple(gap.where for gap in missing))


def _unmeasured(results: Results) -> tuple[str, ...]:
    return tuple(f"{case.label}: no row of calibrated CPE"
                 for case in cases_without_own(results))


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
    exceptions += _unmeasured(results)
    # A comparison that cannot be made is not one that holds.
    is_met = None if not found else not exceptions
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


def places_text(cells: Sequence[SharingCell]) -> str:
    """Texts, each with its lengths."""
    lengths: dict[str, list[str]] = {}
    for cell in cells:
        lengths.setdefault(cell.case.text, []).append(str(cell.case.tokens))
    return ", ".join(f"{text} {' '.join(found)}" for text, found in lengths.items())


def _sharing_exception(results: Results, contender: Contender, cell: SharingCell) -> str:
    where = f"{cell.case.label} at {cell.budget}: "
    if cell.own is not None and cell.oracle is not None:
        text = (f"{percent(cell.own['scans_second_half'])} scans in the second half, "
                f"{number(cell.kl_ratio)} times the oracle's KL ({number(cell.own['kl_mean'])})")
        return where + text + (f", {cell.needles_lost} needles lost" if cell.needles_lost else "")
    shorter = next((other for other in sharing_cells(results, contender)
                    if other.case.label == cell.case.label and other.budget == cell.budget
                    and other.kl_ratio is not None), None)
    where += f"no {GENERATION_STEPS} steps measured"
    if shorter is None or shorter.own is None:
        return where
    return (where + f" (in the table's {shorter.own['steps']}: "
            f"{percent(shorter.own['scans_second_half'])} scans in the second half, "
            f"{number(shorter.kl_ratio)} times the oracle's KL)")


def _few_scans(results: Results, contender: Contender) -> Goal:
    seeded = is_seeded(contender)
    scans_max = scans_max_of(contender)
    cells = generation_cells(results, contender)

    def judge(cell: SharingCell) -> bool | None:
        return cell.holds(scans_max)

    held, is_met = _verdicts(cells, judge)
    there = [cell for cell in cells if cell.own is not None and cell.oracle is not None]
    measured = f"{contender_label(contender)}: {of(held, len(there))} texts and lengths"
    if there:
        scans = [cell.own["scans_second_half"] for cell in there if cell.own is not None]
        measured += f" ({places_text(there)}); scans at most {percent(max(scans))}"
    measured += f"; {len(cells) - len(there)} missing" if len(there) < len(cells) else ""
    best = best_uniform(results, seeded)
    if best is not None:
        measured += f"; best uncalibrated: {contender_label(best[0])}, {of(best[1], best[2])}"
    return Goal(f"2b. Few scans{', seeded' if seeded else ''}",
                f"second half of {GENERATION_STEPS} steps at {GENERATION_BUDGET} tokens: at most "
                f"{percent(scans_max)} scans, KL at most {KL_RATIO_NATURAL:g}x the same-budget "
                f"oracle ({KL_RATIO_NEEDLES:g}x on needles, none lost)", measured, is_met,
                tuple(_sharing_exception(results, contender, cell) for cell in cells
                      if not judge(cell)))


def _hshare_exception(cell: SharingCell) -> str:
    where = f"{cell.case.label} at {cell.budget}: "
    if cell.own is None or cell.hshare is None:
        return where + "rows missing"
    seeds = cell.own.get("seed_scans", 0.0)
    return (where + f"scans {percent(cell.own['scans'])} against {percent(cell.hshare['scans'])}"
            + (f" and {number(seeds)} once per layer and KV head for seeding" if seeds else "")
            + f", KL {number(cell.own['kl_mean'])} against {number(cell.hshare['kl_mean'])}")


def scans_of_hshare(cells: Sequence[SharingCell]) -> list[float]:
    """Scans over HShare's, what seeding scanned included, where both are there."""
    shares = []
    for cell in cells:
        scans = None if cell.own is None else scans_with_seeds(cell.own)
        if scans is not None and cell.hshare is not None and cell.hshare["scans"] > 0:
            shares.append(scans / cell.hshare["scans"])
    return shares


def _third_of_hshare(results: Results, contender: Contender) -> Goal:
    cells = sharing_cells(results, contender)

    def judge(cell: SharingCell) -> bool | None:
        return cell.beats_hshare(HSHARE_SCANS_SHARE)

    held, is_met = _verdicts(cells, judge)
    measured = (f"{of(held, len(cells))} cells; scans "
                f"{number(geometric_mean(scans_of_hshare(cells)))} of HShare's on average")
    if is_seeded(contender):
        shares = [cell.own["scans"] / cell.hshare["scans"] for cell in cells
                  if cell.own is not None and cell.hshare is not None and cell.hshare["scans"] > 0]
        measured += (", those for seeding spread over the steps; "
                     f"{number(geometric_mean(shares))} without them")
    suffixes = {SEEDED: ", seeded", FEW_SCANS: ", few scans"}
    return Goal(f"2c. HShare{suffixes.get(contender, '')}",
                "at most a third of HShare's scans at equal or better KL, every text, length and "
                "fixed budget", measured,
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
    is_met = None if not cells else len(held) == len(cells)
    absent = _unmeasured(results)
    return Goal("6. FLOPs", "attention FLOPs of calibrated CPE at most 0.85 of the best published "
                "sparse method's at equal KL",
                f"{of(len(held), len(cells))} results of the frontier; ratio {number(middle)} on "
                "average where CPE reaches the KL",
                None if is_met and absent else is_met, (*exceptions, *absent))


def goals(results: Results) -> list[Goal]:
    """The whole list."""
    return [_complete_table(results), _equal_tokens(results),
            _few_scans(results, CALIBRATED), _few_scans(results, SEEDED),
            _third_of_hshare(results, CALIBRATED), _third_of_hshare(results, SEEDED),
            _third_of_hshare(results, FEW_SCANS),
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
