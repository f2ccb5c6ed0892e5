#!/usr/bin/env python3
"""Runs the closed-loop study of docs/quality.md, from models to the report.

    build/venv/bin/python tests/eval/run_quality.py --threads=8

exports models and texts, calibrates a policy per model, runs `kveval quality` for every text and
set of contenders, and makes the report. What is there already is skipped, so a run that was broken
off goes on where it stopped, and a rerun makes the report alone: delete build/eval/results (and
build/eval/*.policy.json) to measure again. `make quality` builds what this needs first.

Calibration reads texts that no contender is judged on. Exit status 1: a statement of a certificate
was wrong; the report is made all the same and says which.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EVAL = Path("build/eval")
_SCRIPTS = Path("tests/eval")
_KVEVAL = "build/bin/kveval"
_WRONG_STATEMENT = 1

# Sets of contenders, and how many steps of a text they take (0 = all). Both halves of the table
# take the same.
_STUDY_SETS = {"rivals": 256, "ours": 256, "sharing": 0, "axes": 256, "proof": 0, "tasks": 0}
_TEXT_SETS = ("rivals", "ours", "sharing", "axes", "proof")


@dataclass(frozen=True)
class Plan:
    """What is measured of one model: {texts: lengths}, and where its calibration comes from."""

    model: str
    texts: dict[tuple[str, ...], tuple[int, ...]]
    tasks: dict[tuple[str, ...], tuple[int, ...]]
    calibration_tokens: int
    # Of each calibration text (0 = all).
    calibration_steps: int
    # Text and length of what methods learn beforehand: sketch tables, channels, components.
    learning: tuple[str, int]


PLANS = (
    Plan("smollm2", {("prose", "code", "needles"): (2048, 4096, 8192)},
         {("arithmetic", "questions"): (2048, 4096)}, 4096, 0, ("mixed", 2048)),
    Plan("gemma3", {("prose", "needles"): (16384, 32000)}, {}, 16384, 128,
         ("calibration_prose", 16384)),
)
CALIBRATION_TEXTS = ("calibration_prose", "calibration_code", "calibration_needles")


@dataclass(frozen=True)
class Step:
    """A command and the file that it makes. `partial`: it writes there first, and the file gets its
    name when the command has ended, so that a file with its name is complete."""

    output: Path
    command: tuple[str, ...]
    partial: Path | None = None


@dataclass(frozen=True)
class Settings:
    """What the command line says."""

    threads: int
    batch: int | None
    models: tuple[str, ...]
    sets: tuple[str, ...]
    results: Path


def _text_file(model: str, tokens: int, text: str) -> Path:
    return EVAL / f"{model}-{tokens}-{text}.tokens.json"


def _python(script: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, str(_SCRIPTS / script), *arguments)


def _text_step(model: str, tokens: int, text: str) -> Step:
    return Step(_text_file(model, tokens, text),
                _python("tasks.py", f"--model={model}", f"--tokens={tokens}", f"--text={text}"))


def _common(plan: Plan, settings: Settings) -> tuple[str, ...]:
    """Options that calibrating and measuring share."""
    text, tokens = plan.learning
    calibration = _text_file(plan.model, tokens, text)
    options = (f"--model-file={EVAL / plan.model}.kvmodel", f"--calibration-text={calibration}",
               f"--prompts={EVAL / 'prompts'}", f"--threads={settings.threads}")
    return options if settings.batch is None else (*options, f"--batch={settings.batch}")


def _calibrate_step(plan: Plan, settings: Settings) -> Step:
    policy = EVAL / f"{plan.model}.policy.json"
    partial = policy.with_suffix(".part")
    texts = ",".join(str(_text_file(plan.model, plan.calibration_tokens, text))
                     for text in CALIBRATION_TEXTS)
    return Step(policy, (_KVEVAL, "calibrate", *_common(plan, settings), f"--texts={texts}",
                         f"--steps={plan.calibration_steps}", f"--policy-file={partial}",
                         f"--name={plan.model}-calibrated"), partial)


def _quality_step(plan: Plan, settings: Settings, tokens: int, text: str, name: str) -> Step:
    output = settings.results / f"{plan.model}-{tokens}-{text}-{name}.json"
    partial = output.with_suffix(".part")
    return Step(output, (_KVEVAL, "quality", *_common(plan, settings),
                         f"--texts={_text_file(plan.model, tokens, text)}", f"--sets={name}",
                         f"--steps={_STUDY_SETS[name]}",
                         f"--policy-file={EVAL / plan.model}.policy.json", f"--json={partial}"),
                partial)


def steps_of(plan: Plan, settings: Settings) -> list[Step]:
    """Everything for one model, in order."""
    judged: list[tuple[int, str, tuple[str, ...]]]
    judged = [(tokens, text, _TEXT_SETS) for texts, lengths in plan.texts.items()
              for tokens in lengths for text in texts]
    judged += [(tokens, text, ("tasks",)) for texts, lengths in plan.tasks.items()
               for tokens in lengths for text in texts]
    wanted = [(tokens, text, name) for tokens, text, names in judged for name in names
              if name in settings.sets]
    texts = [(plan.calibration_tokens, text) for text in CALIBRATION_TEXTS]
    texts.append((plan.learning[1], plan.learning[0]))
    texts += dict.fromkeys((tokens, text) for tokens, text, _ in wanted)
    return [Step(EVAL / f"{plan.model}.kvmodel", _python("export_model.py", plan.model)),
            *(_text_step(plan.model, tokens, text) for tokens, text in texts),
            _calibrate_step(plan, settings),
            *(_quality_step(plan, settings, tokens, text, name) for tokens, text, name in wanted)]


Run = Callable[[Sequence[str]], int]


def _run(command: Sequence[str]) -> int:
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def take(steps: Sequence[Step], root: Path, run: Run) -> bool:
    """Runs the steps whose files are missing. True if a statement of a certificate was wrong.
    RuntimeError if a command fails."""
    is_wrong = False
    for index, step in enumerate(steps):
        if (root / step.output).exists():
            continue
        print(f"[{index + 1}/{len(steps)}] {' '.join(step.command)}", flush=True)
        (root / step.output).parent.mkdir(parents=True, exist_ok=True)
        (root / EVAL / "prompts").mkdir(parents=True, exist_ok=True)
        status = run(step.command)
        is_measured = step.command[:2] == (_KVEVAL, "quality")
        if status == _WRONG_STATEMENT and is_measured:
            is_wrong = True
        elif status != 0:
            raise RuntimeError(f"exit status {status}: {' '.join(step.command)}")
        if step.partial is not None:
            (root / step.partial).rename(root / step.output)
        if not (root / step.output).exists():
            raise RuntimeError(f"{step.output} was not made by {' '.join(step.command)}")
    return is_wrong


def parse_arguments(arguments: Sequence[str] | None = None) -> tuple[Settings, bool]:
    """Reads the command line; also whether steps are listed only."""
    parser = argparse.ArgumentParser(prog="run_quality.py",
                                     description=(__doc__ or "").split("\n")[0])
    models = [plan.model for plan in PLANS]
    sets = list(_STUDY_SETS)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--batch", type=int, help="contenders in lockstep (kveval's default: 128)")
    parser.add_argument("--models", nargs="+", choices=models, default=models)
    parser.add_argument("--sets", nargs="+", choices=sets, default=sets)
    parser.add_argument("--results", type=Path, default=EVAL / "results", help="folder")
    parser.add_argument("--list", action="store_true", help="say what would be run")
    options = parser.parse_args(arguments)
    return Settings(options.threads, options.batch, tuple(options.models), tuple(options.sets),
                    options.results), options.list


def main() -> int:
    """The program; returns its exit status."""
    settings, only_list = parse_arguments()
    steps = [step for plan in PLANS if plan.model in settings.models
             for step in steps_of(plan, settings)]
    if only_list:
        for step in steps:
            print("done:" if (ROOT / step.output).exists() else "     ", " ".join(step.command))
        return 0
    try:
        is_wrong = take(steps, ROOT, _run)
    except RuntimeError as error:
        print(f"run_quality.py: {error}", file=sys.stderr)
        return 2
    results = sorted((ROOT / settings.results).glob("*.json"))
    status = _run([*_python("quality_report.py"), *map(str, results)])
    return status or (_WRONG_STATEMENT if is_wrong else 0)


if __name__ == "__main__":
    sys.exit(main())
