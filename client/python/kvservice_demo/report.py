"""What a run of a policy amounts to: numbers for the table and for the JSON file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from kvservice_demo.decoding import Decoded, ReplyLog
from kvservice_demo.terminal import Terminal, write_table


@dataclass(frozen=True)
class PolicyReport:
    """One policy's results. Ratios are in [0, 1]; dropped masses are shares of softmax attention.

    Dropped masses are over the query heads that were not answered densely, 0 if there were none; a
    head without a statement counts with the bound 1. Reads are per KV head, layer and step. The
    violations are over all runs of the policy, the rest over the greedy one.
    """

    name: str
    tokens: int
    tokens_per_second: float
    tokens_read_mean: float
    tokens_visible_mean: float
    scan_ratio: float
    dense_head_ratio: float
    certified_dropped_mass_median: float
    certified_dropped_mass_p95: float
    certified_dropped_mass_max: float
    true_dropped_mass_median: float
    true_dropped_mass_p95: float
    true_dropped_mass_max: float
    max_dropped_mass: float | None
    certificates_checked: int
    bound_violations: int
    limit_violations: int
    lse_error_max: float
    agreement: float
    text: str

    def to_json(self) -> dict[str, object]:
        """The fields by name."""
        return asdict(self)


def make_report(
    name: str,
    max_dropped_mass: float | None,
    greedy: Decoded,
    further_runs: Sequence[Decoded],
    agreement: float,
    text: str,
) -> PolicyReport:
    """Sums up the greedy run of a policy; `further_runs` add to what was checked."""
    log = greedy.log
    logs = [log, *(run.log for run in further_runs)]
    is_dense = np.concatenate(log.is_dense)
    certified = _median_p95_max(np.concatenate(log.certified)[~is_dense])
    true = _median_p95_max(np.concatenate(log.true)[~is_dense])
    return PolicyReport(
        name=name,
        tokens=len(greedy.token_ids),
        tokens_per_second=len(greedy.token_ids) / greedy.seconds,
        tokens_read_mean=float(np.mean(log.tokens_read)),
        tokens_visible_mean=float(np.mean(log.tokens_visible)),
        scan_ratio=float(np.mean(log.scanned)),
        dense_head_ratio=float(np.mean(is_dense)),
        certified_dropped_mass_median=certified[0],
        certified_dropped_mass_p95=certified[1],
        certified_dropped_mass_max=certified[2],
        true_dropped_mass_median=true[0],
        true_dropped_mass_p95=true[1],
        true_dropped_mass_max=true[2],
        max_dropped_mass=max_dropped_mass,
        certificates_checked=sum(each.certificate_count for each in logs),
        bound_violations=_sum(logs, "bound_violations"),
        limit_violations=_sum(logs, "limit_violations"),
        lse_error_max=max(each.lse_error_max for each in logs),
        agreement=agreement,
        text=text,
    )


def _sum(logs: Sequence[ReplyLog], name: str) -> int:
    return sum(getattr(each, name) for each in logs)


def _median_p95_max(values: np.ndarray) -> tuple[float, float, float]:
    if values.size == 0:
        return 0.0, 0.0, 0.0
    median, p95 = np.quantile(values, [0.5, 0.95], method="higher")
    return float(median), float(p95), float(values.max())


def write_policy_table(terminal: Terminal, reports: Sequence[PolicyReport]) -> None:
    """The comparison of the policies."""
    headers = [
        ["", "tokens", "tokens", "share", "layer-steps", "dropped", "", "", "", "same token"],
        ["policy", "per s", "read", "of all", "that scan", "mass", "median", "p95", "max",
         "as dense"],
    ]
    rows = []
    for report in reports:
        certified, true = _masses(report, "certified"), _masses(report, "true")
        rows.append([
            report.name,
            f"{report.tokens_per_second:.1f}",
            f"{report.tokens_read_mean:,.0f}",
            _percent(report.tokens_read_mean / report.tokens_visible_mean),
            _percent(report.scan_ratio),
            "proven",
            *certified,
            _percent(report.agreement),
        ])
        rows.append(["", "", "", "", "", "true", *true, ""])
    write_table(terminal, headers, rows)


def _masses(report: PolicyReport, kind: str) -> list[str]:
    fields = report.to_json()
    values = [fields[f"{kind}_dropped_mass_{name}"] for name in ("median", "p95", "max")]
    return [_mass(value, kind == "certified") for value in values]


def _mass(value: float, is_bound: bool) -> str:
    if value == 0.0:
        return "0"
    if is_bound and value >= 1.0:
        return "none"
    return f"{value:.4f}" if value >= 1e-4 else f"{value:.0e}"


def _percent(ratio: float) -> str:
    return f"{100 * ratio:.0f} %" if ratio in (0.0, 1.0) else f"{100 * ratio:.1f} %"
