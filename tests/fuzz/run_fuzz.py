#!/usr/bin/env python3
"""The long form of the fuzz targets: libFuzzer under the address sanitizer, for so long each.

    tests/fuzz/run_fuzz.py --seconds=600

Begins with the corpora in tests/fuzz/corpus; what it finds to be new is in build/fuzz/found. An
input that fails stays in build/fuzz/failures. Writes rows for tests/RELIABILITY.json to
build/fuzz/rows.json. The last line is "N passed, N failed".
"""

import argparse
import json
import os
import pathlib
import platform
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
BUILD = ROOT / "build" / "fuzz"
TARGETS = ["convert", "lane", "reply", "policy", "transfer", "stored", "recovery", "config",
           "text", "certificate"]


def unpack(target):
    """The corpus of the repository as libFuzzer wants it."""
    folder = BUILD / "corpus" / target
    folder.mkdir(parents=True, exist_ok=True)
    text = (ROOT / "tests" / "fuzz" / "corpus" / f"{target}.txt").read_text(encoding="utf-8")
    for i, line in enumerate(text.split()):
        (folder / f"{i:04}").write_bytes(bytes.fromhex(line))
    return folder


def machine():
    for line in pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n"):
        if line.startswith("model name"):
            return f"{line.split(':')[1].strip()}, {os.cpu_count()} CPUs"
    return platform.machine()


def commit():
    done = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE, check=False)
    return done.stdout.strip() or "unknown"


def fuzz(target, seconds, seed):
    found, failures = BUILD / "found" / target, BUILD / "failures" / target
    for folder in (found, failures):
        folder.mkdir(parents=True, exist_ok=True)
    command = [str(BUILD / "tests" / f"{target}_fuzz"), str(found), str(unpack(target)),
               f"-max_total_time={seconds}", f"-seed={seed}", "-max_len=16384", "-timeout=20",
               f"-artifact_prefix={failures}/", "-print_final_stats=1", "-close_fd_mask=1"]
    # gRPC and the fixtures live as long as the process.
    environment = dict(os.environ, ASAN_OPTIONS="detect_leaks=0")
    log = BUILD / f"{target}.log"
    with open(log, "w", encoding="utf-8") as output:
        status = subprocess.run(command, cwd=ROOT, env=environment, stdout=output,
                                stderr=subprocess.STDOUT, check=False).returncode
    text = log.read_text(encoding="utf-8", errors="replace")
    count = re.search(r"number_of_executed_units: (\d+)", text)
    return status == 0, int(count.group(1)) if count else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seconds", type=int, default=600, help="for each target")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", help="comma-separated names of targets")
    arguments = parser.parse_args()
    targets = arguments.only.split(",") if arguments.only else TARGETS
    for step in (["cmake", "--preset", "fuzz", "--log-level=WARNING"],
                 ["cmake", "--build", "--preset", "fuzz", "--target",
                  *[f"{target}_fuzz" for target in targets]]):
        if subprocess.run(step, cwd=ROOT, check=False).returncode != 0:
            print("0 passed, 1 failed")
            return 1
    rows = []
    for target in targets:
        passed, count = fuzz(target, arguments.seconds, arguments.seed)
        rows.append({"test": f"fuzz_{target}", "count": count, "failures": 0 if passed else 1,
                     "seed": arguments.seed, "seconds": arguments.seconds,
                     "checked": {"inputs": count}, "commit": commit(),
                     "command": f"tests/fuzz/run_fuzz.py --only={target} "
                                f"--seconds={arguments.seconds} --seed={arguments.seed}",
                     "machine": machine()})
        print(f"{target}: {count} inputs, {'nothing failed' if passed else 'FAILED'}", flush=True)
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    (BUILD / "rows.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    failed = sum(row["failures"] for row in rows)
    print(f"{len(rows) - failed} passed, {failed} failed")
    return 0 if failed == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
