"""docs/quality.md: worst steps, certificates, the shipped default, and when dense is right."""

from __future__ import annotations

from collections.abc import Sequence

from .averages import Sample, sample
from .goals import (
    CERTIFICATES_MIN,
    NLL_CHANGE_MAX,
    needles_lost,
    sampled_groups,
    shipped_rows,
)
from .markdown import number, of, percent, picture, section, table
from .measures import geometric_mean, mean, spearman
from .rows import (
    CALIBRATED,
    FIXED_BUDGETS,
    Case,
    Contender,
    Results,
    Row,
    case_order,
    contender_label,
)
from .sections_methods import HEADLINE_BUDGET, natural_cases

# Sparse attention has to save something, and to say nearly the same, to be worth its while.
DENSE_BYTES_SHARE = 0.5
DENSE_KL = 0.05
# What a ranking of methods may be made by, instead of by KL.
_PROXIES = (("dropped_mean", "mean dropped mass"), ("dropped_p95", "p95 of dropped mass"),
            ("dropped_p99", "p99 of dropped mass"), ("dropped_max", "largest dropped mass"),
            ("output_error_mean", "mean output error"), ("output_error_p95", "p95 of output error"),
            ("oracle_overlap", "overlap with the oracle (reversed)"))


def rank_correlations(results: Results, budget: str, field: str) -> dict[Case, float]:
    """Per case of the table: Spearman correlation over contenders of a field with the KL."""
    found = {}
    for case in results.cases("table"):
        rows = [results.get("table", case, contender, budget)
                for contender in results.contenders("table")]
        pairs = [(row[field], row["kl_mean"]) for row in rows
                 if row is not None and row.get("kl_mean") is not None and field in row]
        sign = -1.0 if field == "oracle_overlap" else 1.0
        value = spearman([sign * x for x, _ in pairs], [y for _, y in pairs])
        if value is not None:
            found[case] = value
    return found


def _worst_line(results: Results, contender: Contender, one: Sample,
                places: dict[str, dict[Contender, int]]) -> list[str]:
    return [contender_label(contender), number(one.geometric("kl_mean")),
            number(one.geometric("kl_p99")), number(one.largest("kl_max")),
            number(one.mean("dropped_mean")), number(one.mean("dropped_p99")),
            number(one.largest("dropped_max")), str(places["dropped_mean"][contender]),
            str(places["kl_mean"][contender])]


def worst_steps(results: Results) -> str:
    """Means against tails."""
    cases = natural_cases(results)
    entries = {contender: sample(results, "table", cases, contender, HEADLINE_BUDGET)
               for contender in results.contenders("table")}
    entries = {contender: one for contender, one in entries.items() if one.rows}
    places = {field: {contender: place + 1 for place, contender in enumerate(sorted(
        entries, key=lambda contender: (entries[contender].mean(field) or 0.0, contender)))}
        for field in ("dropped_mean", "kl_mean")}
    spreads = [row["kl_p99"] / row["kl_mean"] for one in entries.values() for row in one.rows
               if row.get("kl_mean")]
    correlation = rank_correlations(results, HEADLINE_BUDGET, "dropped_mean")
    lines = []
    for field, name in _PROXIES:
        found = rank_correlations(results, HEADLINE_BUDGET, field)
        lines.append((name, number(mean(list(found.values()))),
                      number(min(found.values(), default=None)), str(len(found))))
    return section(
        "9. How do the worst steps look?",
        f"The p99 of KL is {number(geometric_mean(spreads))} times its mean: a mean hides the "
        "damage of few steps. A ranking of the methods by mean dropped mass agrees with one by KL "
        f"to a Spearman correlation of {number(mean(list(correlation.values())))} on average, "
        f"{number(min(correlation.values(), default=None))} at worst.",
        picture("worst", "Mean, p99 and largest KL by method", entries),
        table(("method", "KL mean", "KL p99", "KL max", "dropped mean", "dropped p99",
               "dropped max", "place by dropped mean", "place by KL"),
              [_worst_line(results, contender, one, places)
               for contender, one in sorted(entries.items(),
                                            key=lambda entry: places["kl_mean"][entry[0]])]),
        f"What ranks methods as KL does (Spearman correlation over methods at {HEADLINE_BUDGET} "
        "tokens, per text and length):",
        table(("measure", "mean", "worst", "texts and lengths"), lines))


def _proof_lines(results: Results) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = []
    for contender in results.contenders("proof"):
        for budget in sorted({row["budget"] for row in results.of_set("proof")}):
            one = sample(results, "proof", results.cases("proof"), contender, budget)
            count = one.total("certificates") + one.total("sampled_certificates")
            if not one.rows or count == 0:
                continue
            lines.append((contender_label(contender), budget or "-", f"{count:,}",
                          str(one.total("bound_violations")),
                          f"{one.total('sampled_misses')} / "
                          f"{number(float(sum(one.numbers('expected_misses'))))}",
                          number(one.geometric("bound_median")),
                          number(one.geometric("dropped_mean")), percent(_mean_read_share(one)),
                          percent(one.mean("bytes")), percent(one.mean("dense_groups")),
                          number(one.geometric("kl_mean"))))
    return lines


def _mean_read_share(one: Sample) -> float | None:
    """Mean share of the visible tokens that was read."""
    return mean([share for row in one.rows if (share := _read_share(row)) is not None])


def _read_share(row: Row) -> float | None:
    """Share of the visible tokens that was read."""
    return row["tokens_read"] / row["tokens_visible"] if row["tokens_visible"] else None


def _shipped_table(results: Results) -> str:
    lines = [(case.label, percent(row.get("nll_change")), number(row.get("kl_mean")),
              f"{row['needles_right']}/{row['needles_right_dense']}" if "needles" in row else "-",
              percent(_read_share(row)),
              percent(row["bytes"]), percent(row["flops"]), percent(row["dense_groups"]))
             for case, row in sorted(shipped_rows(results).items(),
                                key=lambda entry: case_order(entry[0]))
             if "nll_change" in row and "tasks" not in row]
    return ("The shipped default (auto):\n\n"
            + table(("text", "change of NLL", "KL", "needles of dense's", "tokens read", "bytes",
                     "FLOPs", "read whole"), lines))


def _assumed_table(results: Results) -> str:
    """Numbers of the theory, which assume something, beside what was measured."""
    fields = sorted({field for row in results.rows for field in row
                     if field.startswith("assumed_")})
    lines = []
    for field in fields:
        by_contender: dict[tuple[str, str], list[Row]] = {}
        for row in results.rows:
            if row.get(field) is not None:
                by_contender.setdefault((row["method"], row["variant"]), []).append(row)
        lines += [(field, contender_label(contender), str(len(rows)),
                   number(mean([row[field] for row in rows])),
                   number(mean([row["excess_mean"] for row in rows])),
                   number(mean([row["dropped_mean"] for row in rows])))
                  for contender, rows in sorted(by_contender.items())]
    return ("The theory's analytic numbers, which assume something and prove nothing, beside the "
            "truth:\n\n" + table(("field", "method", "rows", "assumed", "measured excess",
                                  "measured dropped mass"), lines))


def certificates(results: Results) -> str:
    """What is proven, what it costs, and the default."""
    proven = sum(row.get("certificates", 0) for row in results.rows)
    violations = sum(row.get("bound_violations", 0) for row in results.rows)
    groups = sampled_groups(results)
    looseness = geometric_mean([bound / truth for row in results.rows
                                for truth, bound in row.get("truth_and_bound", []) if truth > 0])
    shipped = shipped_rows(results)
    worst = max((abs(row["nll_change"]) for row in shipped.values() if "nll_change" in row),
                default=None)
    return section(
        "10. Certificates and the shipped default",
        f"{violations:,} wrong statements among {proven:,} that must always hold "
        f"({CERTIFICATES_MIN:,} were asked for); sampled ones missed "
        f"{sum(group.misses for group in groups):,} times of "
        f"{sum(group.statements for group in groups):,}, at most "
        f"{number(float(sum(group.expected for group in groups)))} expected. A bound is "
        f"{number(looseness)} times the truth (geometric mean of a sample). The shipped default "
        f"changes NLL by at most {percent(worst)} (limit {percent(NLL_CHANGE_MAX)}) and loses "
        f"{sum(needles_lost(row) for row in shipped.values())} needles.",
        picture("bounds", "Bound against truth", looseness),
        table(("method", "limit or budget", "certificates", "violations",
               "sampled: missed / expected", "median bound", "dropped", "tokens read", "bytes",
               "read whole", "KL"), _proof_lines(results)),
        "The binomial test: chance of so many misses or more if every statement failed as often as "
        "it says.",
        table(("failure probability", "statements", "misses", "expected", "chance"),
              [(f"{group.failure_probability:g}", f"{group.statements:,}", f"{group.misses:,}",
                number(group.expected), number(group.chance)) for group in groups]),
        _shipped_table(results), _assumed_table(results))


def is_dense_right(row: Row) -> bool:
    """True where the row saves too little or changes too much."""
    return bool(row["bytes"] >= DENSE_BYTES_SHARE or row["kl_mean"] > DENSE_KL)


def when_dense_is_right(results: Results) -> str:
    """Lengths and budgets at which sparse attention is not worth it."""
    cases = results.cases("table")
    lines, dense, judged = [], 0, 0
    for model, tokens in dict.fromkeys((case.model, case.tokens) for case in cases):
        alike = [case for case in cases if (case.model, case.tokens) == (model, tokens)]
        for budget in FIXED_BUDGETS:
            one = sample(results, "table", alike, CALIBRATED, budget)
            right = sum(is_dense_right(row) for row in one.rows)
            dense, judged = dense + right, judged + len(one.rows)
            lines.append((model, str(tokens), budget, percent(_mean_read_share(one)),
                          percent(one.mean("bytes")), percent(one.mean("flops")),
                          number(one.geometric("kl_mean")), number(one.largest("kl_mean")),
                          of(right, len(one.rows)), str(one.wanted - len(one.rows))))
    shipped = [row for case, row in shipped_rows(results).items() if "tasks" not in row]
    by_length: dict[tuple[str, int], list[Row]] = {}
    for row in shipped:
        by_length.setdefault((row["model"], row["tokens"]), []).append(row)
    length_lines = [(model, str(tokens), percent(mean([row["dense_groups"] for row in rows])),
                     percent(mean([row["bytes"] for row in rows])))
                    for (model, tokens), rows in sorted(by_length.items())]
    return section(
        "11. When is dense right?",
        f"By this rule dense attention is right in {of(dense, judged)} cells: calibrated CPE "
        f"reads at least {percent(DENSE_BYTES_SHARE)} of dense attention's bytes, or its KL is "
        f"above {DENSE_KL:g} nats.",
        table(("model", "tokens", "budget", "tokens read", "bytes", "FLOPs", "KL", "worst KL",
               "dense is right", "missing"), lines),
        "How often the shipped default itself reads a KV head whole:",
        table(("model", "tokens", "read whole", "bytes"), length_lines))


def heat_rows(results: Results) -> list[Row]:
    """Rows with dropped mass by layer and head: of the longest text first."""
    rows = [row for row in results.rows if "dropped_by_head" in row]
    return sorted(rows, key=lambda row: (-row["tokens"], row["model"], row["text"], row["set"],
                                         row["method"], row["variant"], row["budget"]))


def _layers_line(row: Row) -> list[str]:
    heads = [(value, layer, head) for layer, values in enumerate(row["dropped_by_head"])
             for head, value in enumerate(values)]
    layers = [mean(values) or 0.0 for values in row["dropped_by_head"]]
    worst, layer, head = max(heads)
    ordered = sorted(range(len(layers)), key=lambda index: -layers[index])[:3]
    return [f"{row['model']} {row['text']} {row['tokens']}",
            contender_label((row["method"], row["variant"])), row["budget"],
            number(mean([value for value, _, _ in heads])),
            f"{number(worst)} (layer {layer}, head {head})",
            ", ".join(f"{index} ({number(layers[index])})" for index in ordered)]


def heat_map(results: Results) -> str:
    """Dropped mass by layer and head."""
    rows = heat_rows(results)
    return section(
        "12. Which layers and heads drop mass?",
        _heat_answer(rows), picture("heads", "Dropped mass by layer and head", rows),
        table(("text", "method", "budget", "mean", "worst head", "layers that drop most"),
              [_layers_line(row) for row in rows]),
        "Layers are counted from the first that is sparse.")


def _heat_answer(rows: Sequence[Row]) -> str:
    if not rows:
        return "No row carries dropped mass by layer and head: missing."
    values = sorted((value for line in rows[0]["dropped_by_head"] for value in line), reverse=True)
    total = sum(values)
    top = values[:max(1, len(values) // 10)]
    share = sum(top) / total if total > 0 else None
    return (f"On {rows[0]['model']} {rows[0]['text']} {rows[0]['tokens']} "
            f"({contender_label((rows[0]['method'], rows[0]['variant']))} at {rows[0]['budget']}), "
            f"a tenth of the heads has {percent(share)} of all dropped mass.")
