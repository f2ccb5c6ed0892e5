"""The demo's own parts: counting broken bounds, summing up, and writing for people."""

import io
from dataclasses import fields

import numpy as np
import pytest

from kvservice import Action, AttendResult, Certificates, GroupReports, Level, Selector
from kvservice_demo.__main__ import parse_arguments
from kvservice_demo.decoding import Decoded, ReplyLog, count_bound_violations
from kvservice_demo.policies import named_policy
from kvservice_demo.report import make_report, write_policy_table
from kvservice_demo.terminal import FlowingText, Progress, Terminal

LSE = np.array([2.0, 3.0])
DROPPED = np.array([0.25, 0.0])
KEPT = np.array([0.75, 1.0])


def reply(**changed):
    """A reply of two heads whose bounds are as tight as they can be."""
    with np.errstate(divide="ignore"):
        log_dropped = LSE + np.log(DROPPED)
    log_kept = LSE + np.log(KEPT)
    columns = {
        "level": np.full(2, Level.DETERMINISTIC),
        "action": np.full(2, Action.SELECTED),
        "met": np.ones(2, bool),
        "dropped_mass_upper": DROPPED.astype(np.float32),
        "dropped_mass_lower": DROPPED.astype(np.float32),
        "log_kept_lower": log_kept,
        "log_kept_upper": log_kept,
        "log_dropped_lower": log_dropped,
        "log_dropped_upper": log_dropped,
        "dropped_mass_estimate": np.full(2, -1, np.float32),
        "failure_probability": np.zeros(2),
        "output_error_upper": np.full(2, np.inf, np.float32),
        "output_error_relative_upper": np.full(2, np.inf, np.float32),
        "value_norm_lower": np.zeros(2, np.float32),
        "keys_sampled": np.zeros(2, np.uint32),
        "rows_sampled": np.zeros(2, np.uint32),
    } | changed
    groups = GroupReports(*(np.zeros(1) for _ in fields(GroupReports)))
    certificates = Certificates(**{name: np.array([row]) for name, row in columns.items()})
    out = np.zeros((1, 2, 4), np.float32)
    return AttendResult(out, LSE[None], Selector.CERTIFIED, 9, certificates, groups, None)


def test_bounds_that_are_just_met_hold():
    assert count_bound_violations(reply(), LSE, KEPT, DROPPED) == 0


@pytest.mark.parametrize("column,value", [
    ("dropped_mass_upper", [np.nextafter(np.float32(0.25), np.float32(0)), 0]),
    ("dropped_mass_lower", [0.25, np.nextafter(np.float32(0), np.float32(1))]),
    ("log_kept_lower", [np.nextafter(2 + np.log(0.75), 9), 3]),
    ("log_kept_upper", [2 + np.log(0.75), np.nextafter(3.0, 0)]),
    ("log_dropped_lower", [np.nextafter(2 + np.log(0.25), 9), -np.inf]),
    ("log_dropped_upper", [np.nextafter(2 + np.log(0.25), -9), -np.inf]),
    ("dropped_mass_upper", [np.nan, 0]),
])
def test_one_step_beyond_is_a_violation(column, value):
    assert count_bound_violations(reply(**{column: value}), LSE, KEPT, DROPPED) == 1


def decoded(token_ids, violations=0):
    log = ReplyLog(
        is_dense=[np.array([False, True]), np.array([False, False])],
        certified=[np.array([0.04, 0.0]), np.array([0.01, 0.02])],
        true=[np.array([0.03, 0.0]), np.array([0.001, 0.002])],
        tokens_read=[100.0, 300.0],
        tokens_visible=[1000, 1000],
        scanned=[True, False],
        bound_violations=violations,
    )
    return Decoded(token_ids, seconds=0.5, log=log)


def test_report():
    report = make_report("certified 0.05", 0.05, decoded([5, 6]), [decoded([5, 7], 3)], 0.5, "ab")
    assert report.tokens_per_second == 4.0
    assert (report.tokens_read_mean, report.tokens_visible_mean) == (200.0, 1000.0)
    assert (report.scan_ratio, report.dense_head_ratio) == (0.5, 0.25)
    assert report.certified_dropped_mass_median == 0.02
    assert report.certified_dropped_mass_max == 0.04
    assert report.true_dropped_mass_max == 0.03
    assert (report.bound_violations, report.certificates_checked) == (3, 8)
    required = {
        "name", "tokens_per_second", "tokens_read_mean", "scan_ratio", "agreement",
        "certified_dropped_mass_max", "true_dropped_mass_max", "bound_violations",
    }
    assert required <= report.to_json().keys()


def plain_terminal():
    stream = io.StringIO()
    return Terminal(stream), stream


def test_plain_output_has_no_escapes():
    terminal, stream = plain_terminal()
    terminal.mark(True, "fine")
    progress = Progress(terminal, "Prefill", 10, "tokens")
    progress.update(5)
    progress.finish("done")
    write_policy_table(terminal, [make_report("dense", None, decoded([1]), [], 1.0, "")])
    assert "\x1b" not in stream.getvalue() and "\r" not in stream.getvalue()
    assert "10 of 10 tokens" in stream.getvalue()


def test_the_table_is_aligned():
    terminal, stream = plain_terminal()
    reports = [make_report(name, None, decoded([1]), [], 1.0, "") for name in ("a", "a longer one")]
    write_policy_table(terminal, reports)
    assert len({len(line) for line in stream.getvalue().splitlines()}) == 1


class Screen(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("no_color,coloured", [("", True), ("1", False)])
def test_no_color_is_respected(monkeypatch, no_color, coloured):
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal(Screen())
    assert terminal.is_live
    assert ("\x1b[32m" in terminal.style("x", "green")) == coloured


def test_flowing_text_breaks_between_words():
    terminal, stream = plain_terminal()
    terminal.columns = 24
    text = FlowingText(terminal)
    for piece in ("The li", "ght on Harrow", " Skerry\nwas lit", " in 1873."):
        text.push(piece)
    text.close()
    assert stream.getvalue() == (
        "  │ The light on Harrow\n  │ Skerry\n  │ was lit in 1873.\n"
    )


def test_policies_carry_their_limit():
    assert named_policy("cpe", 0.05).max_dropped_mass is None
    policy = named_policy("certified", 0.02)
    assert policy.name == "certified 0.02"
    assert policy.message.max_dropped_mass <= policy.max_dropped_mass == 0.02


@pytest.mark.parametrize("arguments", [
    ["--max-dropped-mass", "0"],
    ["--max-dropped-mass", "nan"],
    ["--tokens", "0"],
    ["--policy", "guess"],
    ["--prompt", "a", "--file", "b"],
])
def test_wrong_arguments_end_with_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_arguments(arguments)
    assert stopped.value.code == 2
    assert "usage:" in capsys.readouterr().err
