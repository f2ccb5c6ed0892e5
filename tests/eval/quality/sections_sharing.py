"""docs/quality.md: sharing along time, its trade-off and where it breaks."""

from __future__ import annotations

from collections.abc import Sequence

from .averages import sample
from .goals import places_text
from .markdown import number, of, percent, picture, section, table
from .rows import (
    CALIBRATED,
    DEMO_MODEL,
    HSHARE,
    ORACLE,
    SEEDED,
    Case,
    Contender,
    Results,
    contender_label,
)
from .sections_edits import lost, ratios_text, split
from .sharing import (
    BY_COSINE,
    GENERATION_BUDGET,
    GENERATION_STEPS,
    KL_RATIO_NATURAL,
    KL_RATIO_NEEDLES,
    SCANS_MAX,
    SCANS_MAX_SEEDED,
    VERIFIED,
    SharingCell,
    best_uncalibrated,
    best_uniform,
    generation_cells,
    is_seeded,
    loosest_safe,
    scans_max_of,
)

_KINDS = ((BY_COSINE, "lowest cosine"), (VERIFIED, "highest limit"))


def _cells_by_case(results: Results) -> dict[Case, list[tuple[Contender, SharingCell]]]:
    """Cells of long enough runs of the demo's model that can be judged."""
    found: dict[Case, list[tuple[Contender, SharingCell]]] = {}
    for contender in results.contenders("sharing"):
        for cell in generation_cells(results, contender):
            entries = found.setdefault(cell.case, [])
            if cell.kl_ratio is not None:
                entries.append((contender, cell))
    return found


def _few_scans_line(name: str, contender: Contender, cell: SharingCell) -> tuple[str, ...]:
    row = cell.own or {}
    needles = (f"{row['needles_right']}/{row['needles_right_dense']}" if "needles" in row else "-")
    holds = cell.holds(scans_max_of(contender))
    return (cell.case.label, name, percent(row.get("scans_second_half")), number(cell.kl_ratio),
            needles, seeds_text(contender, row.get("seed_scans")),
            number(None) if holds is None else "yes" if holds else "no")


def seeds_text(contender: Contender, seeds: float | None) -> str:
    """Scans for seeding as tables show them: nothing for who is not seeded."""
    return number(seeds) if is_seeded(contender) else "-"


def _few_scans_table(results: Results) -> str:
    """Per text and length: calibrated CPE, and the best uncalibrated CIS."""
    lines = []
    for entries in _cells_by_case(results).values():
        cells = dict(entries)
        lines += [_few_scans_line(contender_label(contender), contender, cells[contender])
                  for contender in (CALIBRATED, SEEDED, HSHARE) if contender in cells]
        for seeded in (False, True):
            best = best_uncalibrated(entries, seeded)
            if best is not None:
                lines.append(_few_scans_line(f"best: {contender_label(best[0])}", *best))
    return (f"{DEMO_MODEL}, {GENERATION_STEPS} steps at {GENERATION_BUDGET} tokens. \"Best\" is "
            "the uncalibrated CIS that comes nearest to few scans at a KL near the oracle's on "
            "this very text: known only with hindsight. Seed scans are those of prompt queries, "
            "once per layer and KV head before the first step; no other column holds them.\n\n"
            + table(("text", "contender", "scans, second half", "KL / oracle's",
                     "needles of dense's", "seed scans", "few scans near the oracle"), lines))


def _trade_off_table(results: Results, model: str, budget: str) -> str:
    natural, needles = split(results, "sharing", model)
    lines = []
    for contender in results.contenders("sharing"):
        everywhere = sample(results, "sharing", natural + needles, contender, budget)
        if not everywhere.rows:
            continue
        asked = sample(results, "sharing", needles, contender, budget)
        cells = [cell for cell in generation_cells(results, contender, model)
                 if cell.kl_ratio is not None]
        held = sum(bool(cell.holds(scans_max_of(contender))) for cell in cells)
        lines.append((contender_label(contender),
                      everywhere.show(everywhere.mean("scans"), percent),
                      percent(everywhere.mean("scans_second_half")),
                      seeds_text(contender, everywhere.mean("seed_scans")),
                      ratios_text(results, "sharing", contender, ORACLE, budget, natural),
                      ratios_text(results, "sharing", contender, ORACLE, budget, needles),
                      number(lost(asked)), percent(everywhere.mean("flops")),
                      of(held, len(cells))))
    return (f"{model}, {budget} tokens, {len(natural)} natural texts and lengths, {len(needles)} "
            "with needles:\n\n"
            + table(("contender", "scans", "second half", "seed scans",
                     "KL / oracle's, natural: mean / worst", "needles: mean / worst",
                     "needles lost", "FLOPs", "few scans near the oracle"), lines))


def _safe_table(results: Results, budgets: Sequence[str]) -> str:
    lines = []
    for case in results.cases("sharing"):
        for budget in budgets:
            line = [case.label, budget]
            for kind, _ in _KINDS:
                for seeded, scans_max in ((False, SCANS_MAX), (True, SCANS_MAX_SEEDED)):
                    safe = loosest_safe(results, case, budget, kind, seeded)
                    enough = loosest_safe(results, case, budget, kind, seeded, scans_max)
                    line += ["none measured" if safe is None else f"{safe:g}",
                             "no" if enough is None else f"yes, at {enough:g}"]
            lines.append(line)
    header = [name for _, what in _KINDS
              for name in (what, "few scans", f"seeded: {what}", "few scans")]
    return ("How loosely CIS may share: the lowest cosine, and the highest limit on the list's "
            f"estimated dropped mass, at which the KL stays within {KL_RATIO_NATURAL:g}x the "
            f"oracle's ({KL_RATIO_NEEDLES:g}x on needles, none lost), as at all stricter ones; "
            "and whether some such value scans little enough in the second half (at most "
            f"{percent(SCANS_MAX)}, seeded {percent(SCANS_MAX_SEEDED)}):\n\n"
            + table(("text", "budget", *header), lines))


def _safe_answer(results: Results, kind: str, budget: str) -> str:
    """The strictest of what is safe, over texts and lengths."""
    cases = results.cases("sharing")
    safe = [loosest_safe(results, case, budget, kind, seeded=False) for case in cases]
    reached = [value for value in safe if value is not None]
    if not reached:
        name = "cosine" if kind == BY_COSINE else "limit on estimated dropped mass"
        return f"At {budget} tokens, no uniform {name} is near the oracle anywhere."
    what = (f"at a cosine of {max(reached):g} or more" if kind == BY_COSINE
            else f"while the estimated dropped mass stays under {min(reached):g}")
    where = ("every text and length." if len(reached) == len(cases) else
             f"{of(len(reached), len(cases))} texts and lengths; on the others nothing measured "
             "is.")
    return f"At {budget} tokens, sharing {what} is near the oracle on {where}"


def _few_scans_answer(results: Results) -> str:
    """What few scans took, calibrated and not."""
    parts = []
    for contender in (CALIBRATED, SEEDED):
        cells = [cell for cell in generation_cells(results, contender)
                 if cell.kl_ratio is not None]
        held = [cell for cell in cells if cell.holds(scans_max_of(contender))]
        text = (f"{contender_label(contender)} scans at most "
                f"{percent(scans_max_of(contender))} in the second half and stays near the oracle "
                f"on {of(len(held), len(cells))} texts and lengths")
        text += f" ({places_text(held)})" if held else ""
        best = best_uniform(results, is_seeded(contender))
        if best is not None:
            text += f"; the best uncalibrated, {contender_label(best[0])}, on {of(*best[1:])}"
        parts.append(text + ".")
    return " ".join(parts)


def where_sharing_breaks(results: Results) -> str:
    """The trade-off between scans and KL."""
    budgets = results.budgets("sharing")
    cases = results.cases("sharing")
    answers = [_safe_answer(results, kind, budget) for budget in budgets for kind, _ in _KINDS]
    if cases:
        answers.append(_few_scans_answer(results))
    models = sorted({case.model for case in cases})
    return section(
        "7. Where does sharing break?", " ".join(answers) or "No results yet: missing.",
        picture("sharing", "KL against scans, by cosine and by estimated dropped mass", cases),
        _few_scans_table(results), _safe_table(results, budgets),
        *(_trade_off_table(results, model, budget) for model in models for budget in budgets))
