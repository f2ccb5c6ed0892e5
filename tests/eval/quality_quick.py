#!/usr/bin/env python3
"""The short form of the closed-loop study that `make test` runs: a small real model, a short text.

    build/venv/bin/python tests/eval/quality_quick.py

decodes 24 tokens of prose with the contenders of the set "quick" (build/bin/kveval). Exit status 1:
a statement of a certificate was wrong, or the table cannot be right, because the oracle is not
closer to the dense model than StreamingLLM is. Model and prefilled prompts stay in build/eval.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EVAL = ROOT / "build/eval"
MODEL = "smollm2"
# 512 of them are the continuation, of which the first few are decoded.
TOKENS = 1536
STEPS = 24
_TEXT, _CALIBRATION = "prose", "calibration_prose"

Row = dict[str, object]


def _text_file(text: str) -> Path:
    return EVAL / f"{MODEL}-{TOKENS}-{text}.tokens.json"


def _prepare() -> None:
    """Makes the model if it is not there, and the texts."""
    scripts = ROOT / "tests/eval"
    commands = [[scripts / "export_model.py", MODEL]]
    commands += [[scripts / "tasks.py", f"--model={MODEL}", f"--tokens={TOKENS}", f"--text={text}"]
                 for text in (_TEXT, _CALIBRATION)]
    for command in commands:
        subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)
    (EVAL / "prompts").mkdir(parents=True, exist_ok=True)


def _measure(results: Path) -> int:
    return subprocess.run(
        [ROOT / "build/bin/kveval", "quality", f"--model-file={EVAL / MODEL}.kvmodel",
         f"--texts={_text_file(_TEXT)}", f"--calibration-text={_text_file(_CALIBRATION)}",
         f"--prompts={EVAL / 'prompts'}", "--sets=quick", f"--steps={STEPS}",
         f"--threads={os.cpu_count() or 1}", f"--json={results}"], cwd=ROOT,
        check=False).returncode


def problems_of(rows: Sequence[Row]) -> list[str]:
    """What must not be in the results; empty if all is well."""
    problems = [f"{row['method']}: {row['bound_violations']} wrong statements"
                for row in rows if row["bound_violations"] != 0]
    if sum(row.get("certificates", 0) for row in rows) == 0:
        problems.append("nothing was proven")
    divergence = {row["method"]: row["kl_mean"] for row in rows}
    if not 0 < divergence["oracle"] < divergence["streaming_llm"]:
        problems.append(f"mean KL {divergence['oracle']} of the oracle, "
                        f"{divergence['streaming_llm']} of streaming_llm")
    return problems


def summary_of(rows: Sequence[Row]) -> str:
    """One line for who looks on."""
    divergence = {row["method"]: row["kl_mean"] for row in rows}
    certificates = sum(row.get("certificates", 0) for row in rows)
    return (f"{len(rows)} contenders, {certificates} proven statements, none wrong; mean KL "
            f"{divergence['oracle']} (oracle) to {divergence['streaming_llm']} (streaming_llm)")


def main() -> int:
    """The program; returns its exit status."""
    results = EVAL / "quality-quick.json"
    _prepare()
    results.unlink(missing_ok=True)
    status = _measure(results)
    # With status 1 there are results, which say what is wrong.
    if status not in (0, 1):
        print(f"kveval: exit status {status}", file=sys.stderr)
        return 1
    rows = json.loads(results.read_text(encoding="utf-8"))["rows"]
    problems = problems_of(rows)
    print("\n".join(problems) if problems else summary_of(rows))
    return 1 if problems or status != 0 else 0


if __name__ == "__main__":
    sys.exit(main())
