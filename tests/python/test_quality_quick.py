"""The short study of `make test` must not pass over results that cannot be right."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "eval"))

from quality_quick import problems_of, summary_of  # noqa: E402


@pytest.fixture
def rows():
    return [{"method": "dense", "bound_violations": 0, "kl_mean": 0.0},
            {"method": "oracle", "bound_violations": 0, "kl_mean": 0.02},
            {"method": "streaming_llm", "bound_violations": 0, "kl_mean": 0.3},
            {"method": "certified", "bound_violations": 0, "kl_mean": 0.01, "certificates": 600}]


def test_good_results_have_no_problems(rows):
    assert problems_of(rows) == []
    assert summary_of(rows) == ("4 contenders, 600 proven statements, none wrong; mean KL 0.02 "
                                "(oracle) to 0.3 (streaming_llm)")


@pytest.mark.parametrize(
    ("row", "field", "value", "problem"),
    [(3, "bound_violations", 2, "certified: 2 wrong statements"),
     (3, "certificates", 0, "nothing was proven"),
     (1, "kl_mean", 0.3, "mean KL 0.3 of the oracle, 0.3 of streaming_llm"),
     (1, "kl_mean", 0.0, "mean KL 0.0 of the oracle, 0.3 of streaming_llm"),
     (1, "kl_mean", float("nan"), "mean KL nan of the oracle, 0.3 of streaming_llm")])
def test_what_cannot_be_right_is_named(rows, row, field, value, problem):
    rows[row][field] = value
    assert problems_of(rows) == [problem]
