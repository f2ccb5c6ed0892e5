"""A table of methods that is small enough for the README."""

from __future__ import annotations

from .averages import sample
from .markdown import percent, table
from .rows import (
    CALIBRATED,
    DEMO_MODEL,
    ORACLE,
    PUBLISHED,
    SCAN,
    Case,
    Contender,
    Results,
    contender_label,
    has_both_halves,
)

_TOKENS = (2048, 4096)
_NATURAL = ("prose", "code")
_NEEDLES = ("needles",)
_BUDGETS = ("128", "512")
_CONTENDERS: tuple[Contender, ...] = (
    ORACLE, SCAN, CALIBRATED, ("cis", ""), *((method, "") for method in PUBLISHED))


def _cases(results: Results, texts: tuple[str, ...]) -> list[Case]:
    """Those of these texts on which both published methods and ours were measured."""
    return [case for case in results.cases("table")
            if case.model == DEMO_MODEL and case.tokens in _TOKENS and case.text in texts
            and has_both_halves(results, case)]


def _gaps_text(results: Results) -> str:
    """What no number holds."""
    there = {(case.text, case.tokens) for case in _cases(results, (*_NATURAL, *_NEEDLES))}
    absent = [f"{text} {tokens}" for tokens in _TOKENS for text in (*_NATURAL, *_NEEDLES)
              if (text, tokens) not in there]
    return f" Not measured, or in part only, and left out: {', '.join(absent)}." if absent else ""


def _numbers(results: Results, contender: Contender, budget: str) -> list[str]:
    natural = sample(results, "table", _cases(results, _NATURAL), contender, budget)
    needles = sample(results, "table", _cases(results, _NEEDLES), contender, budget)
    costs = sample(results, "table", _cases(results, (*_NATURAL, *_NEEDLES)), contender, budget)

    found = needles.share("needles_right", "needles_right_dense")
    if needles.rows and len(needles.rows) < needles.wanted:
        found += f" ({len(needles.rows)} of {needles.wanted})"
    return [natural.show(natural.geometric("kl_mean")), found,
            *(costs.show(costs.mean(field), percent) for field in ("scans", "bytes", "flops"))]


def summary_text(results: Results) -> str:
    """Methods at two budgets, averaged over the texts of the demo's model."""
    header = ["method", *(f"{what} at {budget}" for budget in _BUDGETS
                          for what in ("KL", "needles", "scans", "bytes", "FLOPs"))]
    lines = [[contender_label(contender),
              *(text for budget in _BUDGETS for text in _numbers(results, contender, budget))]
             for contender in _CONTENDERS]
    lengths = " and ".join(map(str, _TOKENS))
    return (f"{DEMO_MODEL}, texts of {lengths} tokens, at {' and '.join(_BUDGETS)} tokens read. "
            f"KL: geometric mean over {' and '.join(_NATURAL)}, nats. Needles: found, of those "
            "that dense attention finds. Scans: share of steps, layers and KV heads that look at "
            "every key. Bytes and FLOPs: of dense attention's, choosing included. Means over "
            f"all texts.{_gaps_text(results)}\n\n" + table(header, lines))
