"""docs/quality.md: what edits of depth and layers cost."""

from __future__ import annotations

from collections.abc import Sequence

from .averages import Sample, sample
from .comparisons import kl_ratios
from .markdown import number, percent, section, table
from .measures import geometric_mean
from .rows import (
    SCAN,
    Case,
    Contender,
    Results,
    contender_label,
    is_natural,
)
from .sharing import needles_lost


def split(results: Results, name: str, model: str) -> tuple[list[Case], list[Case]]:
    """A model's natural cases of a set, and those with needles."""
    natural = [case for case in results.cases(name, is_natural) if case.model == model]
    needles = [case for case in results.cases(name, lambda row: "needles" in row)
               if case.model == model]
    return natural, needles


def ratios_text(results: Results, name: str, contender: Contender, reference: Contender,
                budget: str, cases: Sequence[Case]) -> str:
    """KL of a contender over that of another: geometric mean and largest."""
    ratios = [ratio for case, ratio in
              kl_ratios(results, name, contender, reference, budget).items() if case in cases]
    if not ratios:
        return number(None)
    return f"{number(geometric_mean(ratios))} / {number(max(ratios))}"


def lost(one: Sample) -> int | None:
    """Needles lost on all cases of a sample."""
    return sum(needles_lost(row) for row in one.rows) if one.rows else None


def depth_and_layer_edits(results: Results) -> str:
    """PSAW and ETF alone."""
    lines, answers = [], []
    budgets = results.budgets("axes")
    for model in sorted({case.model for case in results.cases("axes")}):
        natural, needles = split(results, "axes", model)
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
                              ratios_text(results, "axes", contender, SCAN, budget, natural),
                              ratios_text(results, "axes", contender, SCAN, budget, needles),
                              number(lost(asked)), number(one.mean("tokens_read")),
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
