"""docs/quality.md: the methods beside each other."""

from __future__ import annotations

from collections.abc import Sequence

from .averages import Sample, sample
from .comparisons import (
    BETTER,
    UNDECIDED,
    AdaptiveCell,
    Duel,
    FlopsCell,
    adaptive_cells,
    cases_without_own,
    duels,
    flops_cells,
    kl_ratios,
)
from .goals import FLOPS_RATIO_MAX, HSHARE_SCANS_SHARE, scans_of_hshare
from .markdown import listing, number, of, percent, picture, section, table
from .measures import geometric_mean, mean
from .rows import (
    CALIBRATED,
    DEMO_MODEL,
    FIXED_BUDGETS,
    LEARNED_TEXTS,
    ORACLE,
    PUBLISHED,
    SCAN,
    SCANS_ALL,
    SEEDED,
    Case,
    Contender,
    Results,
    case_order,
    contender_label,
    has_both_halves,
    is_natural,
    method_order,
    missing_cells,
)
from .sharing import is_seeded, sharing_cells

HEADLINE_BUDGET = "512"
_LOSSES_SHOWN_MAX = 20


def _comparable(results: Results, cases: Sequence[Case]) -> list[Case]:
    """Cases on which both published methods and ours were measured; all, where there are none."""
    both = [case for case in cases if has_both_halves(results, case)]
    return both or list(cases)


def natural_cases(results: Results, model: str = DEMO_MODEL) -> list[Case]:
    """Natural texts of a model in the table over which methods are averaged."""
    return _comparable(results, [case for case in results.cases("table", is_natural)
                                 if case.model == model])


def needle_cases(results: Results, model: str = DEMO_MODEL) -> list[Case]:
    """Texts of a model in the table that ask for needles, over which methods are summed."""
    return _comparable(results, [case for case in results.cases("table",
                                                                lambda row: "needles" in row)
                                 if case.model == model])


def _left_out(results: Results, model: str) -> str:
    """Which texts no average holds."""
    averaged = natural_cases(results, model) + needle_cases(results, model)
    absent = [case.label for case in results.cases("table")
              if case.model == model and case not in averaged]
    return (" Not averaged, because only a part of the methods was measured there: "
            f"{', '.join(absent)}." if absent else "")


def _steps_text(results: Results) -> str:
    """Steps of every set."""
    steps: dict[str, set[int]] = {}
    for row in results.rows:
        steps.setdefault(row["set"], set()).add(row["steps"])
    found = [f"{name} {' or '.join(str(count) for count in sorted(counts))}"
             for name, counts in steps.items() if name != "tasks"]
    return f"Steps of a run, by set of contenders: {', '.join(found)}." if found else ""


def what_was_measured(results: Results) -> str:
    """How the numbers came about."""
    cases = sorted({case for name in ("table", "sharing", "axes", "proof", "tasks")
                    for case in results.cases(name)}, key=case_order)
    steps = sum(row["steps"] for row in results.rows)
    where: dict[tuple[str, str], list[str]] = {}
    for case in cases:
        lengths = where.setdefault((case.model, case.text), [])
        lengths += [str(case.tokens)] if str(case.tokens) not in lengths else []
    missing = missing_cells(results)
    gaps = ("The table has no gaps." if not missing
            else f"Missing in the table: {len(missing):,} entries, listed in quality_tables.md.")
    learned = sorted({row["text"] for row in results.rows} & LEARNED_TEXTS)
    unjudged = (f"; rows of {', '.join(learned)} count for certificates alone" if learned else "")
    return section(
        "1. What was measured, and how",
        f"{len(results.rows):,} runs of {len(where)} combinations of model and text: {steps:,} "
        f"decoding steps. {gaps}",
        _steps_text(results),
        table(("model", "text", "tokens"),
              [(model, text, ", ".join(lengths)) for (model, text), lengths in where.items()]),
        "- Closed loop: sparse outputs feed the next layers and steps, so errors add up as they "
        "do in service. The prompt is prefilled densely; then tokens of the text are fed one by "
        "one (teacher forcing), so that all contenders answer for the same tokens. KL is that of "
        "the next token's distribution from dense attention's, in nats; NLL that of the text.\n"
        "- Every contender runs through the same engine and device. All read the same sinks, "
        "newest tokens and tokens that are not sealed yet; the same first layers are dense for "
        "all. A budget counts everything read, those included. \"mass x\" is the smallest set "
        "whose dropped mass is x by the method's own estimate, and at least 512 tokens for "
        "methods that reuse a choice.\n"
        "- Costs are counted, not timed, and alike for all: a scan looks at every token for one "
        "KV head in one layer and step; bytes and attention FLOPs include what it takes to "
        "choose, relative to dense attention of the same layers. Seeded contenders scan for the "
        "prompt's last queries before the first step: seed scans, once per layer and KV head, "
        "which scans, bytes and FLOPs of the steps do not hold. No number here depends on the "
        "machine.\n"
        "- What methods learn beforehand and what is calibrated comes from other texts than "
        f"those judged{unjudged}.\n"
        "- `make quality` does all of it: models, texts, calibration, runs, and this document.")


def _kl_table(results: Results, cases: Sequence[Case]) -> str:
    budgets = results.budgets("table")

    def line(contender: Contender) -> list[str]:
        samples = [sample(results, "table", cases, contender, budget) for budget in budgets]
        return [contender_label(contender),
                *(one.show(one.geometric("kl_mean")) for one in samples)]

    return table(("KL, geometric mean", *budgets),
                 [line(contender) for contender in results.contenders("table")])


def _headline_row(results: Results, contender: Contender, natural: Sample,
                  needles: Sequence[Case]) -> list[str]:
    found = sample(results, "table", needles, contender, HEADLINE_BUDGET)
    return [contender_label(contender), natural.show(natural.geometric("kl_mean")),
            percent(natural.largest("nll_change")),
            found.share("needles_right", "needles_right_dense"),
            number(natural.mean("tokens_read")), percent(natural.mean("scans")),
            number(natural.mean("seed_scans")) if is_seeded(contender) else "-",
            percent(natural.mean("bytes")), percent(natural.mean("flops"))]


def ranking(results: Results, cases: Sequence[Case]) -> list[tuple[Contender, Sample]]:
    """Contenders of the table at the headline's budget, the least KL on natural cases first."""
    entries = [(contender, sample(results, "table", cases, contender, HEADLINE_BUDGET))
               for contender in results.contenders("table")]
    entries = [entry for entry in entries if entry[1].rows]
    return sorted(entries, key=lambda entry: (entry[1].geometric("kl_mean") or 0.0, entry[0]))


def _first_without_scans(entries: Sequence[tuple[Contender, Sample]]) -> str:
    """Who is the best of those that do not scan every step."""
    few = [entry for entry in entries if (entry[1].mean("scans") or 0.0) < SCANS_ALL]
    if not few:
        return "No results yet: missing."
    place = [contender for contender, _ in entries].index(few[0][0]) + 1
    return (f"At {HEADLINE_BUDGET} tokens, {contender_label(few[0][0])} is the best of those "
            f"that do not scan every step: KL {number(few[0][1].geometric('kl_mean'))} with "
            f"{percent(few[0][1].mean('scans'))} scans, place {place} of {len(entries)} "
            f"overall (first: {contender_label(entries[0][0])}, "
            f"{number(entries[0][1].geometric('kl_mean'))}).")


def model_tables(results: Results, model: str) -> tuple[str, str, str]:
    """All methods on one model: who is best, the table of one budget, and KL at all budgets."""
    natural, needles = natural_cases(results, model), needle_cases(results, model)
    entries = ranking(results, natural)
    header = ("method", "KL", "worst change of NLL", "needles of dense's", "tokens read", "scans",
              "seed scans", "bytes", "FLOPs")
    return (_first_without_scans(entries),
            table(header, [_headline_row(results, contender, of_natural, needles)
                           for contender, of_natural in entries]),
            _kl_table(results, natural))


def averaged_over(results: Results, model: str) -> str:
    """What the tables of a model are averages of."""
    natural, needles = natural_cases(results, model), needle_cases(results, model)
    return (f"{model}, {HEADLINE_BUDGET} tokens; geometric mean of KL and means of costs over "
            f"{len(natural)} natural texts and lengths, needles over {len(needles)} lengths. Every "
            "text, length and budget: [quality_tables.md](quality_tables.md)."
            + _left_out(results, model))


def headline(results: Results) -> str:
    """All methods at one budget, and their KL at all."""
    answer, at_one_budget, at_all = model_tables(results, DEMO_MODEL)
    return section("2. Methods and budgets", answer, averaged_over(results, DEMO_MODEL),
                   at_one_budget, at_all,
                   picture("tokens", "KL against tokens read",
                           ranking(results, natural_cases(results))), _task_part(results))


def _task_part(results: Results) -> str:
    """Tasks judged by the dense model's own answers."""
    texts = sorted({case.text for case in results.cases("tasks", lambda row: "tasks" in row)})
    if not texts:
        return "Tasks judged by the dense model's own answers: missing."
    keys = sorted({(row["method"], row["variant"], row["budget"])
                   for row in results.of_set("tasks") if row["method"] != "dense"},
                  key=lambda key: (method_order(key[0]), key[1], key[2]))
    lines = []
    for method, variant, budget in keys:
        line = [contender_label((method, variant)), budget]
        for text in texts:
            cases = [case for case in results.cases("tasks") if case.text == text]
            line.append(sample(results, "tasks", cases, (method, variant), budget)
                        .share("tasks_as_dense", "tasks"))
        lines.append(line)
    return ("Greedy answers equal to those of dense attention, token by token:\n\n"
            + table(("method", "budget", *texts), lines))


def fixed_or_adaptive(results: Results) -> str:
    """Budgets by mass against fixed ones."""
    answers, lines = [], []
    for contender, name in ((SCAN, "estimated from sketches"), (ORACLE, "exact")):
        cells = adaptive_cells(results, contender)
        compared = [cell for cell in cells if cell.wins is not None]
        wins = sum(bool(cell.wins) for cell in compared)
        ratio = geometric_mean([cell.adaptive["kl_mean"] / cell.fixed_kl for cell in compared
                                if cell.fixed_kl])
        answers.append(f"Masses {name}: by mass wins {of(wins, len(compared))} comparisons at "
                       f"equal tokens read, with {number(ratio)} times the KL on average "
                       f"({len(cells) - len(compared)} read more or fewer tokens than any fixed "
                       "budget measured).")
        lines += _adaptive_lines(contender, cells)
    return section(
        "3. Fixed or adaptive budgets?", " ".join(answers),
        "Both sides scan every step. The fixed side is interpolated between its budgets: ln KL "
        "over ln tokens.",
        table(("method", "model", "budget", "texts and lengths", "tokens read",
               "by mass is better", "KL by mass / fixed", "beyond the fixed budgets"), lines))


def _adaptive_lines(contender: Contender, cells: Sequence[AdaptiveCell]) -> list[list[str]]:
    groups: dict[tuple[str, str], list[AdaptiveCell]] = {}
    for cell in cells:
        groups.setdefault((cell.case.model, cell.adaptive["budget"]), []).append(cell)
    lines = []
    for (model, budget), group in groups.items():
        compared = [cell for cell in group if cell.wins is not None]
        ratio = geometric_mean([cell.adaptive["kl_mean"] / cell.fixed_kl for cell in compared
                                if cell.fixed_kl])
        lines.append([contender_label(contender), model, budget, str(len(group)),
                      number(mean([cell.adaptive["tokens_read"] for cell in group])),
                      of(sum(bool(cell.wins) for cell in compared), len(compared)),
                      number(ratio) if compared else "-", str(len(group) - len(compared))])
    return lines


def oracle_distance(results: Results) -> str:
    """How far every method is from the best set of the same size."""
    budgets = [budget for budget in results.budgets("table") if budget in ("128", "512",
                                                                           "mass 0.05")]
    cases = natural_cases(results) + needle_cases(results)
    lines, ours = [], None
    for contender in results.contenders("table"):
        if contender == ORACLE:
            continue
        line = [contender_label(contender)]
        for budget in budgets:
            ratios = [ratio for case, ratio in
                      kl_ratios(results, "table", contender, ORACLE, budget).items()
                      if case in cases]
            ratio = geometric_mean(ratios)
            line.append(number(ratio) + (f" / {number(max(ratios))}" if ratios else ""))
            if contender == CALIBRATED and budget == HEADLINE_BUDGET:
                ours = ratio
        one = sample(results, "table", cases, contender, HEADLINE_BUDGET)
        line += [number(one.mean("excess_mean")), percent(one.mean("oracle_overlap")),
                 number(one.mean("output_error_mean"))]
        lines.append(line)
    return section(
        "4. How far from the oracle?",
        f"Calibrated CPE has {number(ours)} times the oracle's KL at {HEADLINE_BUDGET} tokens "
        f"(geometric mean over {len(cases)} texts and lengths of {DEMO_MODEL}).",
        "The oracle keeps the tokens with the largest sum of exact probabilities over the query "
        "heads of a KV head, in its own loop. Excess: dropped mass beyond that of the best set of "
        "the same size for the same query; overlap: share of the chosen tokens in that set.",
        table(("method", *(f"KL / oracle's at {budget}: mean / worst" for budget in budgets),
               f"excess at {HEADLINE_BUDGET}", "overlap", "output error"), lines))


def _loss(duel: Duel) -> str:
    own = duel.own
    needles = ""
    if duel.loses_needles and own is not None:
        needles = (f"; needles {own.get('needles_right', 0)} against "
                   f"{duel.rival['needles_right']}")
    return (f"{duel.case.label}, {duel.rival['method']} at {duel.rival['budget']}: KL "
            f"{number(duel.own_kl)} against {number(duel.rival['kl_mean'])} with "
            f"{number(duel.rival['tokens_read'])} tokens read, {duel.verdict}{needles}")


def _not_compared(results: Results) -> str:
    absent = [case.label for case in cases_without_own(results)]
    return f" Not compared, for want of CPE's rows: {', '.join(absent)}." if absent else ""


def against_rivals(results: Results) -> str:
    """CPE against HShare and every method that does not scan all keys."""
    found = duels(results)
    lost = [duel for duel in found if not duel.is_held]
    undecided = sum(duel.verdict == UNDECIDED for duel in found)
    lines = []
    for method in PUBLISHED:
        mine = [duel for duel in found if duel.rival["method"] == method]
        if mine:
            ratio = geometric_mean([max(duel.own_kl, 1e-9) / max(duel.rival["kl_mean"], 1e-9)
                                    for duel in mine if duel.own_kl is not None])
            lines.append((method, of(sum(duel.verdict == BETTER for duel in mine), len(mine)),
                          number(ratio), str(sum(duel.loses_needles for duel in mine))))
    shares = []
    for contender in (CALIBRATED, SEEDED):
        cells = [cell for cell in sharing_cells(results, contender)
                 if cell.own is not None and cell.hshare is not None]
        held = sum(bool(cell.beats_hshare(HSHARE_SCANS_SHARE)) for cell in cells)
        scans = geometric_mean(scans_of_hshare(cells))
        seeds = " (what seeding scanned included)" if is_seeded(contender) else ""
        shares.append(f"{contender_label(contender)} scans {number(scans)} times as often as "
                      f"HShare{seeds}; at most a third as often at equal or better KL in "
                      f"{of(held, len(cells))} cells")
    return section(
        "5. Against methods that do not scan every step",
        f"At equal tokens read, calibrated CPE is at least as good in KL and needles in "
        f"{of(len(found) - len(lost), len(found))} comparisons ({undecided} cannot be decided). "
        + "; ".join(shares) + ".",
        "The row of the same budget decides where it reads the same number of tokens within 5 %; "
        "otherwise CPE's curve is interpolated at the rival's tokens." + _not_compared(results),
        table(("method", "CPE at least as good in KL", "KL of CPE / its KL",
               "fewer needles than it"), lines),
        ("Comparisons that do not hold (all of them: [quality_tables.md](quality_tables.md)):\n\n"
         + listing([_loss(duel) for duel in lost], _LOSSES_SHOWN_MAX)) if lost else "",
        _best_table(results))


def _best_table(results: Results) -> str:
    """Who has the least KL among those that do not scan every step."""
    lines = []
    for case in results.cases("table"):
        line = [case.label]
        for budget in FIXED_BUDGETS:
            rows = [results.get("table", case, contender, budget)
                    for contender in (*((method, "") for method in PUBLISHED), CALIBRATED)]
            less = [row for row in rows if row is not None and row.get("kl_mean") is not None
                    and row["scans"] < SCANS_ALL]
            best = min(less, key=lambda row: row["kl_mean"], default=None)
            line.append(number(None) if best is None
                        else f"{best['method']} ({number(best['kl_mean'])})")
        lines.append(line)
    return ("Least KL among published methods and calibrated CPE that do not scan every step:\n\n"
            + table(("text", *FIXED_BUDGETS), lines))


def _flops_line(case: Case, cells: Sequence[FlopsCell]) -> list[str]:
    ratios = [cell.ratio for cell in cells if cell.ratio is not None]
    methods = sorted({cell.rival["method"] for cell in cells}, key=method_order)
    held = sum(ratio <= FLOPS_RATIO_MAX for ratio in ratios)
    return [case.label, ", ".join(methods), number(geometric_mean(ratios)),
            number(max(ratios, default=None)), of(held, len(cells)),
            str(len(cells) - len(ratios))]


def flops_at_equal_quality(results: Results) -> str:
    """Attention FLOPs against the best published result of the same KL."""
    cells = flops_cells(results)
    ratios = [cell.ratio for cell in cells if cell.ratio is not None]
    by_case: dict[Case, list[FlopsCell]] = {}
    for cell in cells:
        by_case.setdefault(cell.case, []).append(cell)
    by_method: dict[str, list[float | None]] = {}
    for cell in cells:
        by_method.setdefault(cell.rival["method"], []).append(cell.ratio)
    method_lines = []
    for method, found in sorted(by_method.items(), key=lambda entry: method_order(entry[0])):
        reached = [ratio for ratio in found if ratio is not None]
        method_lines.append((method, str(len(found)), str(len(reached)),
                             number(geometric_mean(reached))))
    return section(
        "6. FLOPs at equal quality",
        f"For the KL of the best published results, calibrated CPE needs "
        f"{number(geometric_mean(ratios))} times their attention FLOPs on average; it reaches "
        f"{of(len(ratios), len(cells))} of these KLs within the budgets measured.",
        "A published result counts if no other published one on the same text has less KL at no "
        "more FLOPs (all methods, budgets and scan rates). CPE's FLOPs are interpolated between "
        "its budgets in ln KL; where its cheapest budget is good enough, that one counts."
        + _not_compared(results),
        table(("text", "best published methods", "FLOPs ratio, mean", "worst",
               f"at most {FLOPS_RATIO_MAX}", "KL not reached"),
              [_flops_line(case, found) for case, found in by_case.items()]),
        table(("best published method", "results", "KL reached by CPE", "FLOPs ratio, mean"),
              method_lines))
