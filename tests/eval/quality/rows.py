"""Rows of `kveval quality`, merged and in order.

A row is a JSON object that says what one contender did on one text; its fields are those of
tests/eval/quality_study.cc. A case is a text of a certain length for a certain model.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
# Method and variant.
Contender = tuple[str, str]

DENSE: Contender = ("dense", "")
ORACLE: Contender = ("oracle", "")
HSHARE: Contender = ("hshare", "")
SCAN: Contender = ("scan", "")
CALIBRATED: Contender = ("cpe", "calibrated")
SEEDED: Contender = ("cpe", "calibrated, seeded")
# A loose cosine, for as few scans as published sharing makes; no row of the table.
FEW_SCANS: Contender = ("cis", "tau 0.65")
SHIPPED: Contender = ("auto", "as shipped")

# Published methods, in the order of tables.
PUBLISHED = ("hshare", "h2o", "streaming_llm", "snapkv", "quest", "double_sparsity", "loki",
             "twilight", "tidal_decode", "token_select", "magicpig", "vattention")
OWN = ("scan", "cis", "psaw", "etf", "cpe", "certified", "auto")
METHODS = ("dense", "oracle", *PUBLISHED, *OWN)
FIXED_BUDGETS = ("128", "256", "512")
MASS_BUDGETS = ("mass 0.1", "mass 0.05", "mass 0.01")
BUDGETS = FIXED_BUDGETS + MASS_BUDGETS
# The table must have these for every case.
TABLE_CONTENDERS: tuple[Contender, ...] = (
    ORACLE, *((method, "") for method in PUBLISHED), SCAN, ("cis", ""), ("cis", "seeded"),
    ("psaw", ""), ("etf", ""), ("cpe", "phi = psi = 0.85"), CALIBRATED, SEEDED)
# The model whose results are averaged, and the lengths and texts that the study promises.
DEMO_MODEL = "smollm2"
PROMISED = {"smollm2": ((2048, 4096, 8192), ("prose", "code", "needles")),
            "gemma3": ((16384, 32000), ("prose", "needles"))}
TEXTS_MIN = 3
SETS = ("table", "sharing", "axes", "proof", "tasks", "quick")
# Parts of a set that are measured apart: who reads them finds one set.
_PARTS = {"rivals": "table", "ours": "table"}
# Methods learn from these and policies are calibrated on them: nobody is judged there. What their
# rows say about certificates counts all the same.
LEARNED_TEXTS = frozenset(("mixed", "calibration_prose", "calibration_code",
                           "calibration_needles"))
# Every run has a dense contender of its own to compare with. They agree if their NLL differs by no
# more than this, relatively: the order of sums depends on how many contenders run in lockstep.
_DENSE_NLL_AGREEMENT = 1e-3
# Scanning less than all keys: a share of scanned steps below this.
SCANS_ALL = 0.999


@dataclass(frozen=True)
class Case:
    """A text of a length for a model."""

    model: str
    tokens: int
    text: str
    name: str

    @property
    def label(self) -> str:
        """As tables show it."""
        return f"{self.model} {self.text} {self.tokens}"


def case_of(row: Row) -> Case:
    """The row's case."""
    return Case(row["model"], row["tokens"], row["text"], row["name"])


def case_order(case: Case) -> tuple[bool, str, int, bool, str, str]:
    """A case's place: the demo's model first, by length, needles last."""
    return (case.model != DEMO_MODEL, case.model, case.tokens, case.text == "needles", case.text,
            case.name)


def contender_of(row: Row) -> Contender:
    """The row's method and variant."""
    return row["method"], row["variant"]


def contender_label(contender: Contender) -> str:
    """A method and its variant as tables show them."""
    method, variant = contender
    return f"{method} ({variant})" if variant else method


def is_natural(row: Row) -> bool:
    """True for a text that asks for nothing: judged by KL and NLL alone."""
    return "needles" not in row and "tasks" not in row and row.get("kl_mean") is not None


def budget_order(budget: str) -> tuple[int, float, str]:
    """Fixed budgets first, small to large; then masses, loose to strict; then the rest."""
    if budget.isdigit():
        return 0, float(budget), ""
    match = re.fullmatch(r"mass ([0-9.e-]+)", budget)
    return (1, -float(match[1]), "") if match else (2, 0.0, budget)


def method_order(method: str) -> tuple[int, str]:
    """Place of a method in tables; new ones come last."""
    return (METHODS.index(method) if method in METHODS else len(METHODS)), method


def row_order(row: Row) -> tuple[Any, ...]:
    """A row's place in docs/quality.json."""
    name = row["set"]
    place = SETS.index(name) if name in SETS else len(SETS)
    return (place, name, case_order(case_of(row)), budget_order(row["budget"]),
            method_order(row["method"]), row["variant"])


def _agree(row: Row, other: Row) -> bool:
    """Do two rows of one contender say the same? Dense ones may differ in rounding."""
    if contender_of(row) != DENSE:
        return row == other
    return (all(row.get(field) == other.get(field) for field in ("steps", "needles_right"))
            and math.isclose(row.get("nll", 0.0), other.get("nll", 0.0),
                             rel_tol=_DENSE_NLL_AGREEMENT))


def _fullness(row: Row) -> tuple[int, str]:
    """Orders rows that agree, so that the same one is kept whatever the order of files."""
    return len(row), json.dumps(row, sort_keys=True)


def read_rows(paths: Iterable[Path]) -> list[Row]:
    """Rows of all files, ordered. ValueError where two files disagree about a row, or a row lacks
    what says whose it is."""
    known: dict[tuple[Any, ...], tuple[Row, Path]] = {}
    for path in paths:
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
            for field in ("set", "model", "text", "tokens", "name", "method", "variant", "budget"):
                if field not in row:
                    raise ValueError(f"{path}: a row has no {field}")
            row["set"] = _PARTS.get(row["set"], row["set"])
            key = (row["set"], case_of(row), *contender_of(row), row["budget"])
            if key in known and not _agree(known[key][0], row):
                raise ValueError(f"{path} and {known[key][1]} disagree: {row['set']}, "
                                 f"{case_of(row).label}, {contender_label(contender_of(row))}, "
                                 f"{row['budget']}")
            if key not in known or _fullness(row) > _fullness(known[key][0]):
                known[key] = (row, path)
    return sorted((row for row, _ in known.values()), key=row_order)


def rows_text(rows: Sequence[Row]) -> str:
    """docs/quality.json: one row a line, so that a changed result is a changed line."""
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
    return '{"rows": [\n' + lines + "\n]}\n"


class Results:
    """Rows with an index. A row that is not there is None, never an error."""

    def __init__(self, rows: Sequence[Row]) -> None:
        """Expects at most one row per set, case, contender and budget, as read_rows gives."""
        self.rows = rows
        self._by_key: dict[tuple[str, Case, Contender, str], Row] = {}
        self._by_contender: dict[tuple[str, Case, Contender], list[Row]] = {}
        for row in rows:
            key = (row["set"], case_of(row), contender_of(row))
            self._by_key[(*key, row["budget"])] = row
            self._by_contender.setdefault(key, []).append(row)

    def of_set(self, name: str) -> list[Row]:
        """Rows of one set."""
        return [row for row in self.rows if row["set"] == name]

    def cases(self, name: str, wanted: Callable[[Row], bool] = lambda row: True) -> list[Case]:
        """Cases of a set on which contenders are judged and that have a row which is wanted."""
        found = {case_of(row) for row in self.of_set(name)
                 if row["text"] not in LEARNED_TEXTS and wanted(row)}
        return sorted(found, key=case_order)

    def contenders(self, name: str) -> list[Contender]:
        """Contenders of a set, the dense one left out."""
        found = {contender_of(row) for row in self.of_set(name)} - {DENSE}
        return sorted(found, key=lambda contender: (method_order(contender[0]), contender[1]))

    def budgets(self, name: str) -> list[str]:
        """Budgets of a set, the empty one left out."""
        return sorted({row["budget"] for row in self.of_set(name)} - {""}, key=budget_order)

    def get(self, name: str, case: Case, contender: Contender, budget: str) -> Row | None:
        """A single row."""
        return self._by_key.get((name, case, contender, budget))

    def curve(self, name: str, case: Case, contender: Contender) -> list[Row]:
        """One contender's rows on a case that have a KL, by tokens read."""
        rows = self._by_contender.get((name, case, contender), [])
        return sorted((row for row in rows if row.get("kl_mean") is not None),
                      key=lambda row: row["tokens_read"])


def promised_cases(results: Results) -> list[tuple[str, int, str]]:
    """(model, tokens, text) that the table must hold: what is promised, and every text that a model
    has at some length, at all its lengths."""
    wanted = {(model, tokens, text) for model, (lengths, texts) in PROMISED.items()
              for tokens in lengths for text in texts}
    for case in results.cases("table"):
        lengths = PROMISED.get(case.model, ((case.tokens,), ()))[0]
        wanted |= {(case.model, tokens, case.text) for tokens in lengths}
        wanted.add((case.model, case.tokens, case.text))
    return sorted(wanted, key=lambda entry: (entry[0] != DEMO_MODEL, *entry))


@dataclass(frozen=True)
class Gap:
    """Cells of the table that no row fills: of a case, or of a contender on it."""

    where: str
    cells: int
    is_whole_case: bool = False


def gaps(results: Results) -> list[Gap]:
    """All cells of the table that no row fills; what is missing whole is one entry."""
    cases = {(case.model, case.tokens, case.text): case for case in results.cases("table")}
    found = []
    for model, tokens, text in promised_cases(results):
        case = cases.get((model, tokens, text))
        if case is None:
            found.append(Gap(f"{model} {text} {tokens}: every cell",
                             len(TABLE_CONTENDERS) * len(BUDGETS), is_whole_case=True))
            continue
        for contender in TABLE_CONTENDERS:
            absent = [budget for budget in BUDGETS
                      if not _is_measured(results.get("table", case, contender, budget))]
            where = f"{case.label}: {contender_label(contender)} at "
            if len(absent) == len(BUDGETS):
                found.append(Gap(where + "every budget", len(absent)))
            else:
                found += [Gap(where + budget, 1) for budget in absent]
    return found


def missing_cells(results: Results) -> list[str]:
    """Cells of the table that no row fills, one text for each gap."""
    return [gap.where for gap in gaps(results)]


def has_both_halves(results: Results, case: Case) -> bool:
    """True for a case of the table that has published methods and calibrated CPE: only there can
    averages be compared."""
    published = any(results.curve("table", case, (method, "")) for method in PUBLISHED)
    return published and bool(results.curve("table", case, CALIBRATED))


def _is_measured(row: Row | None) -> bool:
    return row is not None and row.get("kl_mean") is not None
