"""docs/quality.md and docs/quality_tables.md as text."""

from __future__ import annotations

from . import (
    sections_edits,
    sections_methods,
    sections_models,
    sections_sharing,
    sections_trust,
)
from .goals import goals_text, obstacles_text
from .markdown import listing, number, percent, section, table
from .rows import (
    Case,
    Results,
    Row,
    case_order,
    contender_label,
    contender_of,
    missing_cells,
    row_order,
)

_MADE_BY = ("Made from docs/quality.json by `tests/eval/quality_report.py` (`make quality`); do "
            "not edit.")
_SECTIONS = (
    sections_methods.what_was_measured, sections_methods.headline,
    sections_methods.fixed_or_adaptive, sections_methods.oracle_distance,
    sections_methods.against_rivals, sections_methods.flops_at_equal_quality,
    sections_sharing.where_sharing_breaks, sections_edits.depth_and_layer_edits,
    sections_trust.worst_steps, sections_trust.certificates, sections_trust.when_dense_is_right,
    sections_trust.heat_map, sections_models.other_models)


def document_text(results: Results) -> str:
    """docs/quality.md."""
    return "\n\n".join([
        "# Quality of selectors on real attention", _MADE_BY,
        section("What had to be shown", goals_text(results),
                "All that stands in the way: [quality_tables.md](quality_tables.md)."),
        *(make(results) for make in _SECTIONS)]) + "\n"


_COLUMNS = (("tokens_read", number), ("scans", percent), ("scans_second_half", percent),
            ("seed_scans", number), ("bytes", percent), ("flops", percent), ("kl_mean", number),
            ("kl_p99", number), ("kl_max", number), ("top1", percent), ("nll_change", percent),
            ("dropped_mean", number), ("dropped_p99", number), ("excess_mean", number),
            ("output_error_mean", number))
_HEADER = ("method", "budget", "tokens", "scans", "2nd half", "seed scans", "bytes", "FLOPs", "KL",
           "KL p99", "KL max", "top-1", "NLL", "dropped", "dropped p99", "excess", "output error",
           "needles", "digits", "as dense")


def _counts(row: Row, part: str, whole: str) -> str:
    return f"{row[part]}/{row[whole]}" if whole in row else "-"


def _line(row: Row) -> list[str]:
    return [contender_label(contender_of(row)), row["budget"] or "-",
            *(text(row[field]) if field in row else "-" for field, text in _COLUMNS),
            _counts(row, "needles_right", "needles"), _counts(row, "digits_right", "digits"),
            _counts(row, "tasks_as_dense", "tasks")]


def _case_tables(results: Results, case: Case) -> str:
    parts = []
    for name in sorted({row["set"] for row in results.rows}):
        rows = [row for row in results.of_set(name)
                if (row["model"], row["tokens"], row["text"]) == (case.model, case.tokens,
                                                                  case.text)]
        if name == "tasks":
            rows = _sum_of_names(rows)
        if rows:
            parts.append(f"Set \"{name}\":\n\n"
                         + table(_HEADER, [_line(row) for row in sorted(rows, key=row_order)]))
    return section(case.label, *parts)


def _sum_of_names(rows: list[Row]) -> list[Row]:
    """Several prompts of one kind as one row: counts are added, the largest of
    maxima is kept, everything else is a mean."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["variant"], row["budget"]), []).append(row)
    summed = []
    for group in groups.values():
        one = dict(group[0])
        for field in ("tasks", "tasks_as_dense"):
            if field in one:
                one[field] = sum(row[field] for row in group)
        for field, _ in _COLUMNS:
            known = [row[field] for row in group if field in row]
            if known:
                one[field] = max(known) if field.endswith("_max") else sum(known) / len(known)
        summed.append(one)
    return summed


def tables_text(results: Results) -> str:
    """docs/quality_tables.md: everything, per text and length."""
    missing = missing_cells(results)
    cases: dict[str, Case] = {}
    for name in sorted({row["set"] for row in results.rows}):
        for case in results.cases(name):
            cases.setdefault(case.label, case)
    gaps = (listing(missing, len(missing)) if missing
            else "None: every promised combination was measured.")
    return "\n\n".join([
        "# Quality of selectors: every text and length", _MADE_BY,
        "Columns are explained in [quality.md](quality.md).", section("Missing cells", gaps),
        section("Goals: all that stands in the way", obstacles_text(results)),
        *(_case_tables(results, case) for case in sorted(cases.values(), key=case_order))]) + "\n"
