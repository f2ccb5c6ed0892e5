#!/usr/bin/env python3
"""Makes docs/quality.json, docs/quality.md, docs/quality_tables.md and docs/images/quality_*.svg.

    build/venv/bin/python tests/eval/quality_report.py build/eval/results/*.json

merges result files of `kveval quality`; without files, docs/quality.json is read again. The list of
goals is printed too. Pictures need tests/eval/requirements-pictures.txt. Exit status 1: files
disagree, or a picture is too large to be kept.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# At the end: numpy is the client's.
sys.path.append(str(ROOT / "build/eval_pictures"))

from quality.document import document_text, tables_text  # noqa: E402
from quality.goals import goals_text  # noqa: E402
from quality.rows import Results, read_rows, rows_text  # noqa: E402


def write_report(files: list[Path], docs: Path, with_pictures: bool) -> str:
    """Writes everything into `docs`; returns the list of goals."""
    rows = read_rows(files or [docs / "quality.json"])
    results = Results(rows)
    docs.mkdir(parents=True, exist_ok=True)
    (docs / "quality.json").write_text(rows_text(rows), encoding="utf-8")
    (docs / "quality.md").write_text(document_text(results), encoding="utf-8")
    (docs / "quality_tables.md").write_text(tables_text(results), encoding="utf-8")
    if with_pictures:
        from quality.pictures import write_pictures

        write_pictures(results, docs / "images")
    return goals_text(results)


def main() -> int:
    """The program; returns its exit status."""
    parser = argparse.ArgumentParser(prog="quality_report.py",
                                     description=(__doc__ or "").split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="results of `kveval quality`")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder to write to")
    parser.add_argument("--no-pictures", action="store_true", help="text alone")
    options = parser.parse_args()
    try:
        print(write_report(options.files, options.docs, not options.no_pictures))
    except ValueError as error:
        print(f"quality_report.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
