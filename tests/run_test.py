"""`make test` must not call a failure a success: how run.py counts and ends."""

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import run  # noqa: E402

GTEST = """<testsuites tests="3" failures="{failures}" errors="0">
<testsuite name="A">
<testcase name="B" status="run" result="completed"/>
<testcase name="C" status="run" result="completed"/>
<testcase name="D" status="run" result="skipped"/>
</testsuite></testsuites>"""


def count(tmp_path, ctest_status, report):
    if report is not None:
        (tmp_path / "a_test.xml").write_text(report, encoding="utf-8")
    junit = tmp_path / "ctest.junit"
    junit.write_text(f'<testsuite><testcase name="a_test" status="{ctest_status}"/></testsuite>',
                     encoding="utf-8")
    return run.count_cases(junit, tmp_path)


def test_cases_are_counted_and_skipped_ones_are_not(tmp_path):
    assert count(tmp_path, "run", GTEST.format(failures=0)) == (2, 0)


def test_failed_cases_are_counted(tmp_path):
    assert count(tmp_path, "fail", GTEST.format(failures=1)) == (1, 1)


@pytest.mark.parametrize("report", [None, "", "<testsuites"])
def test_a_crash_is_a_failure(tmp_path, report):
    assert count(tmp_path, "fail", report) == (0, 1)


def test_a_failure_after_the_last_case_is_a_failure(tmp_path):
    assert count(tmp_path, "fail", GTEST.format(failures=0)) == (2, 1)


def test_what_failed_binaries_printed_is_shown_whatever_ran_after_them(tmp_path):
    junit = tmp_path / "ctest.junit"
    junit.write_text(
        '<testsuite><testcase name="a_test" status="fail"><system-out>x.cc:3: Failure'
        '</system-out></testcase><testcase name="b_test" status="run"><system-out>fine'
        "</system-out></testcase></testsuite>", encoding="utf-8")
    assert run.failures(junit) == "a_test:\nx.cc:3: Failure\n"


def test_a_failed_step_fails_those_that_need_it_and_no_others(capsys):
    good = run.Result(True, 5, 0, "")
    bad = run.Result(False, 2, 1, "broken here")
    passed, failed = run.run_steps([
        run.Step("build", lambda: bad, []),
        run.Step("tests", lambda: pytest.fail("ran without its build"), ["build"]),
        run.Step("other", lambda: good, []),
    ])
    assert (passed, failed) == (7, 2)
    output = capsys.readouterr().out
    assert "broken here" in output
    assert "failed: build, tests" in output


def test_a_command_that_fails_is_a_failed_case(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "LOGS", tmp_path)
    assert run.one("good", ["sh", "-c", "echo fine"]) == run.Result(True, 1, 0, "fine")
    result = run.one("bad", ["sh", "-c", "echo broken >&2; exit 3"])
    assert (result.ok, result.passed, result.failed, result.note) == (False, 0, 1, "broken")
    assert (tmp_path / "bad.log").read_text(encoding="utf-8") == "broken\n"


@pytest.mark.parametrize("arguments", [["--only=nothing"], ["--only=tidy,nothing"]])
def test_an_unknown_step_is_refused(monkeypatch, arguments):
    monkeypatch.setattr(sys, "argv", ["run.py"] + arguments)
    with pytest.raises(SystemExit):
        run.main()
