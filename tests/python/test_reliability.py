"""What campaigns found is what the rows say."""

import json
import pathlib
import subprocess
import sys

TESTS = pathlib.Path(__file__).resolve().parent.parent


def test_the_report_is_made_of_the_rows():
    script = str(TESTS / "reliability.py")
    done = subprocess.run(
        [sys.executable, script, "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_no_campaign_failed():
    rows = json.loads((TESTS / "RELIABILITY.json").read_text(encoding="utf-8"))
    assert {row["test"] for row in rows} >= {"power_cut", "sigkill", "bit_flip"}
    for row in rows:
        assert row["count"] > 0
        assert row["failures"] == 0, row
