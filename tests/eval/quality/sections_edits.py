"""docs/quality.md: what sharing along time and edits of depth and layers cost."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .averages import Sample, sample
from .comparisons import kl_ratios
from .goals import (
    KL_RATIO_NATURAL,
    KL_RATIO_NEEDLES,
    SCANS_MAX,
    SCANS_MAX_SEEDED,
    needles_lost,
)
from .markdown import number, percent, picture, section, table
from .measures import geometric_mean
from .rows import (
    ORACLE,
    SCAN,
    Case,
    Contender,
    Results,
    contender_label,
    is_natural,
)

_TAU = re.compile(r"tau ([0-9.]+)(, seeded)?")


def tau_of(contender: Contender) -> tuple[float, bool] | None:
    """The cosine and whether anchors were seeded, of CIS in its plain form."""
    match = _TAU.fullmatch(contender[1]) if contender[0] == "cis" else None
    return (float(match[1]), match[2] is not None) if match else None


def _split(results: Results, name: str, model: str) -> tuple[list[Case], list[Case]]:
    """Natural cases and those with needles."""
    natural = [case for case in results.cases(name, is_natural) if case.model == model]
    needles = [case for case in results.cases(name, lambda row: "needles" in row)
               if case.model == model]
    return natural, needles


def _ratios(results: Results, name: str, contender: Contender, reference: Contender, budget: str,
            cases: Sequence[Case]) -> str:
    ratios = [ratio for case, ratio in
              kl_ratios(results, name, contender, reference, budget).items() if case in cases]
    if not ratios:
        return number(None)
    return f"{number(geometric_mean(ratios))} / {number(max(ratios))}"


def _lost(one: Sample) -> int | None:
    return sum(needles_lost(row) for row in one.rows) if one.rows else None


def _sharing_table(results: Results, model: str, budget: str) -> str:
    natural, needles = _split(results, "sharing", model)
    lines = []
    for contender in results.contenders("sharing"):
        everywhere = sample(results, "sharing", natural + needles, contender, budget)
        if not everywhere.rows:
            continue
        asked = sample(results, "sharing", needles, contender, budget)
        lines.append((contender_label(contender),
                      everywhere.show(everywhere.mean("scans"), percent),
                      percent(everywhere.mean("scans_second_half")),
                      _ratios(results, "sharing", contender, ORACLE, budget, natural),
                      _ratios(results, "sharing", contender, ORACLE, budget, needles),
                      number(_lost(asked)), percent(everywhere.mean("flops"))))
    return (f"{model}, {budget} tokens, {len(natural)} natural texts and lengths, {len(needles)} "
            "with needles:\n\n"
            + table(("contender", "scans", "second half", "KL / oracle's, natural: mean / worst",
                     "needles: mean / worst", "needles lost", "FLOPs"), lines))


def lowest_safe_tau(results: Results, case: Case, budget: str, seeded: bool,
                    scans_max: float | None = None) -> float | None:
    """The smallest cosine measured at which, and above which, CIS keeps its KL near the oracle's
    and loses no needle on a case (and scans little enough, if asked). None = no such one."""
    lowest = None
    found = [(tau_of(contender), contender) for contender in results.contenders("sharing")]
    for tau, contender in sorted(((tau, contender) for tau, contender in found
                                  if tau is not None and tau[1] == seeded), reverse=True):
        row = results.get("sharing", case, contender, budget)
        ratio = kl_ratios(results, "sharing", contender, ORACLE, budget).get(case)
        if row is None or ratio is None:
            continue
        allowed = KL_RATIO_NEEDLES if "needles" in row else KL_RATIO_NATURAL
        if ratio > allowed or needles_lost(row) > 0:
            break
        if scans_max is None or row["scans_second_half"] <= scans_max:
            lowest = tau[0]
    return lowest


def _safe_table(results: Results, budgets: Sequence[str]) -> str:
    lines = []
    for case in results.cases("sharing"):
        for budget in budgets:
            line = [case.label, budget]
            for seeded, scans_max in ((False, SCANS_MAX), (True, SCANS_MAX_SEEDED)):
                tau = lowest_safe_tau(results, case, budget, seeded)
                enough = lowest_safe_tau(results, case, budget, seeded, scans_max)
                line += ["none measured" if tau is None else f"{tau:g}",
                         "no" if enough is None else f"yes, at {enough:g}"]
            lines.append(line)
    return ("The lowest cosine down to which the KL stays within "
            f"{KL_RATIO_NATURAL:g}x the oracle's ({KL_RATIO_NEEDLES:g}x on needles, none lost), "
            "and whether some such cosine scans little enough in the second half (at most "
            f"{percent(SCANS_MAX)}, seeded {percent(SCANS_MAX_SEEDED)}):\n\n"
            + table(("text", "budget", "lowest cosine", "few scans", "seeded: lowest cosine",
                     "few scans"), lines))


def where_sharing_breaks(results: Results) -> str:
    """The trade-off between scans and KL."""
    budgets = results.budgets("sharing")
    cases = results.cases("sharing")
    answers = []
    for budget in budgets:
        safe = [lowest_safe_tau(results, case, budget, seeded=False) for case in cases]
        reached = [tau for tau in safe if tau is not None]
        reached_everywhere = len(reached) == len(cases)
        answers.append(
            f"At {budget} tokens, sharing at a cosine of {max(reached):g} or more is near the "
            "oracle on " + ("every text and length." if reached_everywhere else
                            f"{len(reached)} of {len(cases)} texts and lengths; on the others no "
                            "uniform cosine that was measured is.")
            if reached else f"At {budget} tokens, no uniform cosine is near the oracle anywhere.")
    models = sorted({case.model for case in cases})
    return section(
        "7. Where does sharing break?", " ".join(answers) or "No results yet: missing.",
        picture("sharing", "KL against scans, by cosine", cases), _safe_table(results, budgets),
        *(_sharing_table(results, model, budget) for model in models for budget in budgets))


def depth_and_layer_edits(results: Results) -> str:
    """PSAW and ETF alone."""
    lines, answers = [], []
    budgets = results.budgets("axes")
    for model in sorted({case.model for case in results.cases("axes")}):
        natural, needles = _split(results, "axes", model)
        for budget in budgets:
            scan = sample(results, "axes", natural + needles, SCAN, budget)
            for contender in results.contenders("axes"):
                one = sample(results, "axes", natural + needles, contender, budget)
                asked = sample(results, "axes", needles, contender, budget)
                if not one.rows:
                    continue
                flops, reference = one.mean("flops"), scan.mean("flops")
                saved = 1 - flops / reference if flops is not None and reference else None
                lines.append((model, contender_label(contender),
                              _ratios(results, "axes", contender, SCAN, budget, natural),
                              _ratios(results, "axes", contender, SCAN, budget, needles),
                              number(_lost(asked)), number(one.mean("tokens_read")),
                              percent(saved)))
        answers += _edit_answers(results, model, natural, needles, budgets)
    return section(
        "8. What do depth and layer edits cost?", " ".join(answers) or "No results yet: missing.",
        "Against scanning every step without the edit, at the same budget; every layer edited "
        "alike (a calibrated policy edits layers by what they can bear).",
        table(("model", "edit", "KL / without, natural: mean / worst", "needles: mean / worst",
               "needles lost", "tokens read", "FLOPs saved"), lines))


def _edit_answers(results: Results, model: str, natural: Sequence[Case], needles: Sequence[Case],
                  budgets: Sequence[str]) -> list[str]:
    """The worst of each kind of edit in a sentence."""
    answers = []
    for method, what in (("psaw", "hiding the past of deep layers"),
                         ("etf", "taking a shallower layer's choice")):
        ratios: dict[str, list[float]] = {"natural": [], "needles": []}
        for contender in results.contenders("axes"):
            if contender[0] != method:
                continue
            for budget in budgets:
                for case, ratio in kl_ratios(results, "axes", contender, SCAN, budget).items():
                    if case in natural:
                        ratios["natural"].append(ratio)
                    if case in needles:
                        ratios["needles"].append(ratio)
        middle = [number(geometric_mean(ratios[kind])) for kind in ("natural", "needles")]
        worst = [number(max(ratios[kind], default=None)) for kind in ("natural", "needles")]
        answers.append(f"{model}, {what} ({method.upper()}): {middle[0]} times the KL on natural "
                       f"texts, {middle[1]} times on needles; at worst {worst[0]} and {worst[1]}.")
    return answers
