"""docs/quality.md: models beside the demo's, whose attention is another one."""

from __future__ import annotations

from collections.abc import Sequence

from .averages import sample
from .comparisons import adaptive_cells, duels, flops_cells, kl_ratios
from .goals import FLOPS_RATIO_MAX
from .markdown import number, of, percent, section, table
from .measures import geometric_mean
from .rows import (
    CALIBRATED,
    DEMO_MODEL,
    HSHARE,
    ORACLE,
    SCAN,
    SEEDED,
    Case,
    Contender,
    Results,
    contender_label,
)
from .sections_methods import (
    HEADLINE_BUDGET,
    averaged_over,
    model_tables,
    natural_cases,
    needle_cases,
)
from .sharing import needles_lost

_MASS_BUDGET = "mass 0.05"
_SHARING: tuple[Contender, ...] = (SCAN, HSHARE, ("cis", ""), ("cis", "seeded"),
                                   CALIBRATED, SEEDED)


def _demand(results: Results, model: str) -> str:
    """How many tokens the model's attention asks for, beside the demo's model."""
    parts = []
    for name in (model, DEMO_MODEL):
        cases = natural_cases(results, name)
        fixed = sample(results, "table", cases, ORACLE, HEADLINE_BUDGET)
        by_mass = sample(results, "table", cases, ORACLE, _MASS_BUDGET)
        read, visible = by_mass.mean("tokens_read"), by_mass.mean("tokens_visible")
        share = percent(read / visible) if read is not None and visible else number(None)
        parts.append(f"{name}: KL {number(fixed.geometric('kl_mean'))} at {HEADLINE_BUDGET} "
                     f"tokens; all but 5 % of the mass takes {number(read)} tokens, {share} of all")
    return f"The oracle on natural texts: {'; '.join(parts)}."


def _verdicts(results: Results, model: str) -> str:
    """What the goals' comparisons say about this model alone."""
    found = [duel for duel in duels(results) if duel.case.model == model]
    if not found:
        return "Calibrated CPE is missing, and with it every comparison."
    flops = [cell for cell in flops_cells(results) if cell.case.model == model]
    held = [cell for cell in flops if cell.ratio is not None and cell.ratio <= FLOPS_RATIO_MAX]
    ratios = [ratio for case, ratio in kl_ratios(results, "table", CALIBRATED, ORACLE,
                                                 HEADLINE_BUDGET).items() if case.model == model]
    return (f"Calibrated CPE: {number(geometric_mean(ratios))} times the oracle's KL at "
            f"{HEADLINE_BUDGET} tokens; at equal tokens read at least as good as methods that do "
            f"not scan every step in {of(sum(duel.is_held for duel in found), len(found))} "
            f"comparisons; at most {FLOPS_RATIO_MAX} of the attention FLOPs of the best published "
            f"results in {of(len(held), len(flops))} (mean ratio "
            f"{number(geometric_mean([cell.ratio for cell in flops if cell.ratio is not None]))}). "
            + _by_mass(results, model))


def _by_mass(results: Results, model: str) -> str:
    cells = [cell for cell in adaptive_cells(results, SCAN) if cell.case.model == model]
    compared = [cell for cell in cells if cell.wins is not None]
    if not compared:
        return "Budgets by mass read more tokens than any fixed budget measured."
    return (f"Budgets by estimated mass beat fixed ones in "
            f"{of(sum(bool(cell.wins) for cell in compared), len(compared))} comparisons.")


def _ratios(results: Results, contender: Contender, budget: str,
            cases: Sequence[Case]) -> list[float]:
    """KL over the oracle's."""
    return [ratio for case, ratio in
            kl_ratios(results, "table", contender, ORACLE, budget).items() if case in cases]


def _sharing(results: Results, model: str) -> str:
    """Scans and KL of those that share choices along time."""
    cases = natural_cases(results, model) + needle_cases(results, model)
    lines = []
    for budget in (HEADLINE_BUDGET, _MASS_BUDGET):
        for contender in _SHARING:
            one = sample(results, "table", cases, contender, budget)
            if not one.rows:
                continue
            ratios = _ratios(results, contender, budget, cases)
            lines.append((contender_label(contender), budget, percent(one.mean("scans")),
                          percent(one.mean("scans_second_half")),
                          f"{number(geometric_mean(ratios))} / "
                          f"{number(max(ratios, default=None))}",
                          str(sum(needles_lost(row) for row in one.rows)),
                          percent(one.mean("flops"))))
    here = sample(results, "table", cases, CALIBRATED, HEADLINE_BUDGET)
    by_mass = sample(results, "table", cases, CALIBRATED, _MASS_BUDGET)
    demo = sample(results, "table",
                  natural_cases(results) + needle_cases(results), CALIBRATED, HEADLINE_BUDGET)
    answer = ""
    if here.rows:
        ratio = geometric_mean(_ratios(results, CALIBRATED, _MASS_BUDGET, cases))
        answer = (f"How far sharing goes: calibrated CPE scans in {percent(here.mean('scans'))} of "
                  f"steps and KV heads at {HEADLINE_BUDGET} tokens, where it scans in "
                  f"{percent(demo.mean('scans'))} on {DEMO_MODEL}, and in "
                  f"{percent(by_mass.mean('scans'))} at {_MASS_BUDGET}, with {number(ratio)} times "
                  "the oracle's KL.\n\n")
    return (answer + "All texts and lengths:\n\n"
            + table(("contender", "budget", "scans", "second half", "KL / oracle's: mean / worst",
                     "needles lost", "FLOPs"), lines))


def other_models(results: Results) -> str:
    """Every model of the table but the demo's."""
    parts = []
    for model in sorted({case.model for case in results.cases("table")} - {DEMO_MODEL}):
        answer, at_one_budget, at_all = model_tables(results, model)
        parts += [f"{model}: {answer} {_verdicts(results, model)}", _demand(results, model),
                  averaged_over(results, model), at_one_budget, at_all,
                  _sharing(results, model)]
    return section("13. Does it hold for another model?",
                   *(parts or ["No other model is in the table: missing."]))
