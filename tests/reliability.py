#!/usr/bin/env python3
"""Runs a long campaign and writes down what happened: a row in tests/RELIABILITY.json, and
tests/RELIABILITY.md anew from all rows.

    tests/reliability.py power_cut --cuts=20000 --seed=1
    tests/reliability.py fuzz_text 20000000 22      so many inputs made from a seed
    tests/reliability.py thread_sanitizer           all cases that the tsan preset has
    tests/reliability.py mutation --only=access_test    or without --only: all of them
    tests/reliability.py --check        RELIABILITY.md is what the rows say
"""

import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
ROWS = ROOT / "tests" / "RELIABILITY.json"
REPORT = ROOT / "tests" / "RELIABILITY.md"
PROGRAM = ROOT / "build" / "release" / "bin" / "kvstress"

MEANINGS = {
    "power_cut": "An engine works on a file system that keeps only what was synced; the power goes "
                 "in the middle of some operation, also while the store is opened or closed. After "
                 "each restart every sequence is compared with a client's ledger, byte by byte. A "
                 "failure: an acknowledged durable token is gone, a byte is wrong, a hole, a "
                 "dropped sequence is back, a stale handle is taken, the store does not open.",
    "sigkill": "Server processes are killed under gRPC load of three clients and started again; "
               "compared alike. The page cache survives a kill, so this says nothing about syncs.",
    "bit_flip": "A closed store is damaged: a flipped bit four times in five, else zeros, a cut "
                "end, two files that changed places, or a file of an earlier close. A failure: a "
                "wrong byte, or a sequence that is absent or shorter without an error.",
    "io_fault": "Every operation on files of one workload, its crash, its closing and its opening "
                "included, goes wrong in every way that it could, one at a time: errors once and "
                "from then on, no space, half done, done but reported as failed, a cut, short and "
                "flipped reads. A failure: an error that has no type or no reason, a store that "
                "does not open once the fault is over, an acknowledged durable token that is gone, "
                "a wrong byte, a sequence lost though no read was wrong, more than one experiment "
                "in a hundred whose operation 24 runs did not come to (background threads leave "
                "some out, by how busy the machine is).",
    "model_check": "Random commands of two tenants to an engine with a disk tier and little memory "
                   "(also beyond its limits, with wrong handles, closed and opened again); each "
                   "answer and output is compared with what vectors of words say. A failure is "
                   "told as the shortest program that was found.",
    "concurrent_history": "Threads use the same sequences at the same time (append, attend, "
                          "truncate, look, suspend, resume) while these leave memory and come "
                          "back. A failure: what was seen of a sequence is not linearizable.",
    "overload": "A server is offered ten times what it can do, at random times. A failure: goodput "
                "below 90 % of the peak, a 99th percentile of what is answered above twice that at "
                "the peak, more than two seconds until calls are as quick as before (medians of "
                "the rounds), or an error that is not OVERLOADED.",
    "noisy_neighbour": "A tenant calls steadily while another one offers 0.4 and then ten times "
                       "that of what the server can do. A failure: the steady tenant's median "
                       "goes up by more than a quarter or its 99th percentile by more than half "
                       "(medians of the rounds), or one of its calls is refused.",
    "soak": "Seconds of mixed load on a server with a disk tier and little memory: clients come "
            "and go, append, attend, fork, truncate, suspend, resume. A failure: an error, blocks, "
            "sequences or descriptors that stay, resident memory that grows by more than 4 MiB and "
            "its noise over the second half, or (rows with heap_growth_kib) a heap that grows by "
            "more than its noise there.",
    "restart": "GiB of sequences in a store that was closed: the seconds until a new engine has "
               "answered its first Attend. A failure: five or more.",
    "cancel_storm": "Calls of a served engine are cancelled at random moments: unary, Attend and "
                    "Append streams, lanes whose memory goes while the server works on it. A "
                    "failure: a crash, a descriptor or a mapping that stays, a wrong answer "
                    "afterwards, a drain that waits.",
    "thread_sanitizer": "Every test that does not link gRPC, built with the thread sanitizer: "
                        "engine, tenants, prefixes, scrub, disk tier, devices, and what threads "
                        "do to each other there. A failure: a report, or a case that fails.",
    "mutation": "Deliberate mistakes, one at a time: a rounding, a check, a defence is taken out, "
                "and the named test must fail. A failure: one that its test did not notice, or "
                "that has no verdict.",
    "fuzz_convert": "Bytes that may be a request become what the engine works on, or are refused "
                    "with a reason; what is accepted survives the client's way of writing it.",
    "fuzz_lane": "A lane's memory in front of a real engine: every request is answered with a "
                 "message that parses.",
    "fuzz_policy": "The text of a policy file: read, or refused in one line.",
    "fuzz_transfer": "Messages of a transfer in front of a real engine: taken, or refused with a "
                     "reason; no sequence comes of a wrong one, and nothing stays.",
    "fuzz_stored": "Rows, records, sketch tables and heads of transfers under a right checksum: "
                   "none, or what is written again as the same bytes.",
    "fuzz_recovery": "An engine opens a store whose rows were changed under right checksums: it "
                     "starts and answers, or says why not.",
    "fuzz_config": "Command lines and configuration files of the server: understood, or refused "
                   "in one line.",
    "fuzz_text": "Numbers, times, ids and addresses as people write them: what is understood is "
                 "written again with the same meaning; a bound that is shown still is one.",
    "fuzz_certificate": "The combiner of certificates, given any numbers: sums lie on the side "
                        "that they say, and nothing more is claimed than the parts do.",
    "fuzz_reply": "Replies of Attend, as a client reads them: what it makes of the columns where "
                  "they lie is what protobuf makes of the message, or both refuse.",
}


def load():
    return json.loads(ROWS.read_text(encoding="utf-8")) if ROWS.exists() else []


def report(rows):
    lines = [
        "# What campaigns found",
        "",
        "Made by `tests/reliability.py` from `RELIABILITY.json`; do not edit. Every row can be run",
        "again: the seed is in its command.",
        "",
        "| test | count | failures | seed | seconds | commit | machine |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(f"| {row['test']} | {row['count']:,} | {row['failures']} | {row['seed']} | "
                     f"{row['seconds']:.0f} | {row['commit']} | {row['machine']} |")
    lines += ["", "What was looked at, and how to run it again:", ""]
    for row in rows:
        checked = ", ".join(f"{name.replace('_', ' ')} {count:,}"
                            for name, count in row["checked"].items())
        lines.append(f"- `{row['command']}`: {checked}")
    lines += ["", "What the tests do:", ""]
    lines += [f"- **{test}**: {meaning}" for test, meaning in MEANINGS.items()]
    return "\n".join(lines) + "\n"


def machine():
    model = platform.machine()
    for line in pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n"):
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    return f"{os.cpu_count()} CPUs, {model}"


def commit():
    return subprocess.run(["git", "-C", ROOT, "rev-parse", "--short=12", "HEAD"], text=True,
                          stdout=subprocess.PIPE, check=True).stdout.strip()


def run(arguments):
    with tempfile.NamedTemporaryFile(suffix=".json") as row_file:
        environment = dict(os.environ, KVSERVICE_BIN_DIR=str(PROGRAM.parent))
        done = subprocess.run([PROGRAM, *arguments, f"--row={row_file.name}"], env=environment,
                              check=False)
        text = pathlib.Path(row_file.name).read_text(encoding="utf-8")
    if not text:
        return done.returncode or 1
    keep(json.loads(text), " ".join(["kvstress", *arguments]))
    return done.returncode


def run_fuzz(test, count, seed):
    """Inputs made from the corpus by a seed, without coverage: the fast form (run_fuzz.py has the
    other). The first wrong one ends the program."""
    target = test.removeprefix("fuzz_")
    program = [f"build/release/tests/{target}_fuzz", f"tests/fuzz/corpus/{target}.txt"]
    setting = {"KVSERVICE_FUZZ_RUNS": str(count), "KVSERVICE_FUZZ_SEED": str(seed)}
    begun = time.monotonic()
    done = subprocess.run(program, cwd=ROOT, env=dict(os.environ, **setting), check=False)
    row = {"test": test, "count": count, "failures": 0 if done.returncode == 0 else 1,
           "seed": seed, "seconds": round(time.monotonic() - begun, 1),
           "checked": {"inputs": count}}
    words = [f"{name}={value}" for name, value in setting.items()]
    keep(row, " ".join(words + program))
    return done.returncode


def run_told(test, command, told):
    """A program that says on its last line what came of it; `told` reads that line and gives the
    row's count, failures and what was checked."""
    begun = time.monotonic()
    lines = []
    with subprocess.Popen([sys.executable, *command], cwd=ROOT, text=True, errors="replace",
                          stdout=subprocess.PIPE) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.strip())
    count, failures, checked = told(lines)
    row = {"test": test, "count": count, "failures": failures, "seed": 0,
           "seconds": round(time.monotonic() - begun, 1), "checked": checked}
    keep(row, " ".join(command))
    return process.returncode


def numbers(line):
    return [int(number) for number in re.findall(r"\d+", line)]


def told_by_tests(lines):
    """`N passed, N failed`"""
    passed, failed = numbers(lines[-1])
    return passed + failed, failed, {"passed": passed}


def told_by_mutations(lines):
    """`N without a verdict, N s` and `N caught, N survived`"""
    unsure = numbers(lines[-2])[0]
    caught, survived = numbers(lines[-1])
    return caught + survived + unsure, survived + unsure, {"caught": caught}


def keep(row, command):
    row["commit"] = commit()
    row["command"] = command
    row["machine"] = machine()
    # The latest of each command counts.
    rows = [other for other in load() if other["command"] != row["command"]] + [row]
    rows.sort(key=lambda other: (list(MEANINGS).index(other["test"]), other["command"]))
    ROWS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    REPORT.write_text(report(rows), encoding="utf-8")


def main():
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 2
    if arguments == ["--check"]:
        right = REPORT.read_text(encoding="utf-8") == report(load())
        if not right:
            print("tests/RELIABILITY.md is not what tests/RELIABILITY.json says")
        return 0 if right else 1
    if arguments[0].startswith("fuzz_"):
        return run_fuzz(arguments[0], int(arguments[1]), int(arguments[2]))
    if arguments[0] == "thread_sanitizer":
        return run_told("thread_sanitizer", ["tests/run.py", "--campaign",
                                             "--only=tsan-build,tsan-tests"], told_by_tests)
    if arguments[0] == "mutation":
        return run_told("mutation", ["tests/mutations.py", *arguments[1:]], told_by_mutations)
    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
