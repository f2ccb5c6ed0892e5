#!/usr/bin/env python3
"""Runs everything `make test` promises, one step after the other, and says how it ended.

A step that fails does not stop the ones that do not need it, so one run shows all that is wrong.
The whole output of a step is in build/test/STEP.log; of a failed one the end is printed too.
The last line is "N passed, N failed": test cases of all suites, and each other step as one.
"""

import argparse
import collections
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as xml

ROOT = pathlib.Path(__file__).resolve().parent.parent
LOGS = ROOT / "build" / "test"
SOURCE_FOLDERS = ["attention", "selector", "kvservice", "client", "wire", "tests"]
FAILURE_LINES = 80

# name, function that runs it, names of the steps it cannot do without
Step = collections.namedtuple("Step", "name action needs")
# What a step says of itself: did it work, how many cases passed and failed, one line to print.
Result = collections.namedtuple("Result", "ok passed failed note")


def run(name, command, extra_env=None):
    """Runs the command into build/test/NAME.log; shows its latest line on a terminal. Returns the
    exit status and the output."""
    show = sys.stdout.isatty()
    lines = []
    environment = dict(os.environ, **(extra_env or {}))
    with open(LOGS / f"{name}.log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, errors="replace",
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for line in process.stdout:
            log.write(line)
            lines.append(line)
            if show:
                width = shutil.get_terminal_size().columns - 1
                print("\r\033[K" + line.rstrip()[:width], end="", flush=True)
        status = process.wait()
    if show:
        print("\r\033[K", end="")
    return status, "".join(lines)


def one(name, command, note=""):
    """A step that counts as a single case."""
    status, output = run(name, command)
    if status != 0:
        return Result(False, 0, 1, tail(output))
    last = output.strip().rsplit("\n", 1)[-1]
    return Result(True, 1, 0, note or last)


def tail(output):
    return "\n".join(output.rstrip().split("\n")[-FAILURE_LINES:])


def check_format():
    files = sorted(str(path.relative_to(ROOT)) for folder in SOURCE_FOLDERS
                   for path in (ROOT / folder).rglob("*") if path.suffix in (".h", ".cc", ".cu"))
    return one("format", ["clang-format", "--dry-run", "-Werror"] + files,
               note=f"{len(files)} files are formatted")


def build(preset):
    name = f"{preset}-build"
    configure = one(name, ["cmake", "--preset", preset, "--log-level=WARNING"])
    if not configure.ok:
        return configure
    targets = ["all", "kv_python_stubs"] if preset == "release" else ["all"]
    result = one(name, ["cmake", "--build", "--preset", preset, "--target"] + targets)
    return result if not result.ok else result._replace(note="")


def read_gtest(path):
    """Passed and failed cases in one GoogleTest report; None when the binary died before writing
    it."""
    try:
        suites = xml.parse(path).getroot()
    except (OSError, xml.ParseError):
        return None
    ran = sum(case.get("result") == "completed" for case in suites.iter("testcase"))
    failed = int(suites.get("failures")) + int(suites.get("errors"))
    return ran - failed, failed


def count_cases(junit, reports):
    """Sums the reports of the binaries that ctest ran. A binary that failed without a failed case
    (a crash, a sanitizer message at exit) is one failure."""
    passed = failed = 0
    for binary in xml.parse(junit).getroot().iter("testcase"):
        binary_ok = binary.get("status") == "run"
        cases = read_gtest(reports / (binary.get("name") + ".xml"))
        if cases is None:
            cases = (1, 0) if binary_ok else (0, 1)
        passed += cases[0]
        failed += cases[1] or (0 if binary_ok else 1)
    return passed, failed


def failures(junit):
    """What the binaries that failed have printed: ctest's own output shows them among others."""
    text = ""
    for binary in xml.parse(junit).getroot().iter("testcase"):
        if binary.get("status") != "run":
            text += f"{binary.get('name')}:\n{tail(binary.findtext('system-out') or '')}\n"
    return text


def ctest(preset, repeat=1):
    name = f"{preset}-tests" if repeat == 1 else f"{preset}-repeat"
    reports = ROOT / "build" / preset / "reports"
    shutil.rmtree(reports, ignore_errors=True)
    reports.mkdir(parents=True)
    junit = reports / "ctest.junit"
    command = ["ctest", "--preset", preset, "-j", str(os.cpu_count()), "--no-tests=error",
               "--output-junit", str(junit)]
    extra_env = {}
    if repeat > 1:
        command += ["--repeat", f"until-fail:{repeat}"]
        extra_env["GTEST_SHUFFLE"] = "1"
    status, output = run(name, command, extra_env)
    if not junit.exists():
        return Result(False, 0, 1, tail(output))
    passed, failed = count_cases(junit, reports)
    if status != 0:
        return Result(False, passed, max(failed, 1), failures(junit) + tail(output))
    closing = [line for line in output.split("\n") if "tests passed" in line]
    return Result(True, passed, failed, f"{closing[0]} ({passed} cases)")


def pytest(name, python, arguments, path):
    """The tests of some folders, with the packages of others on the path."""
    report = LOGS / f"{name}.xml"
    report.unlink(missing_ok=True)
    status, output = run(name, [
        str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}",
        "-o", "python_files=test_*.py *_test.py", *arguments],
        {"PYTHONPATH": ":".join(map(str, path)), "KVSERVICE_BIN_DIR": f"{ROOT}/build/bin"})
    if not report.exists():
        return Result(False, 0, 1, tail(output))
    suite = xml.parse(report).getroot().find("testsuite")
    failed = int(suite.get("failures")) + int(suite.get("errors"))
    passed = int(suite.get("tests")) - failed - int(suite.get("skipped"))
    if status != 0:
        return Result(False, passed, max(failed, 1), tail(output))
    return Result(True, passed, failed, output.strip().rsplit("\n", 1)[-1].strip("= "))


def python_tests():
    return pytest("python-tests", ROOT / "build" / "venv" / "bin" / "python",
                  ["tests/tidy_test.py", "tests/run_test.py", "tests/python"],
                  [ROOT / "client" / "python", ROOT / "build" / "python"])


def huggingface_tests():
    """The adapter with a real model, out of the wheel, in an environment of its own."""
    folder = ROOT / "build" / "huggingface"
    made = one("huggingface-environment", ["tests/huggingface/environment.sh"])
    if made.ok:
        made = one("huggingface-wheel", ["make", "--silent", "wheel"])
    if not made.ok:
        return made
    shutil.rmtree(folder / "wheel", ignore_errors=True)
    for wheel in (ROOT / "build" / "wheel").glob("*.whl"):
        shutil.unpack_archive(wheel, folder / "wheel", "zip")
    # The demo, which reads the model's file, is not in the wheel.
    return pytest("huggingface-tests", folder / "python", ["tests/huggingface"],
                  [folder / "wheel", ROOT / "client" / "python"])


def adversary(name, *flags):
    """The long form of the attack on certificates; what it found is in build/NAME.json."""
    return one(name, ["build/bin/kvadversary", f"--json=build/{name}.json", *flags],
               note=f"counts in build/{name}.json")


def served_adversary():
    """The same through a server of its own."""
    with tempfile.TemporaryDirectory() as folder:
        socket = f"unix:{folder}/data"
        server = subprocess.Popen(
            ["build/bin/kvservice", "--listen", socket, "--admin-listen", f"unix:{folder}/admin"],
            cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        with server:
            for line in server.stdout:
                if line.strip() == "ready":
                    break
            # Read on, or the server would wait for its log to be taken.
            threading.Thread(target=server.stdout.read, daemon=True).start()
            result = adversary("adversary-served", f"--endpoint={socket}", "--cases=1000000")
            server.terminate()
    return result


def cancels():
    """Ten thousand calls that are cancelled at random moments."""
    status, output = run("cancels", ["build/release/tests/cancel_test"],
                         {"KVSERVICE_CANCELS": "10000"})
    return Result(status == 0, int(status == 0), int(status != 0), tail(output).split("\n")[-1])


def steps(campaign):
    everyday = [
        Step("format", check_format, []),
        Step("tidy", lambda: one("tidy", [sys.executable, "tests/tidy.py"]), []),
        Step("mutation-list",
             lambda: one("mutation-list", [sys.executable, "tests/mutations.py", "--check"]), []),
        Step("release-build", lambda: build("release"), []),
        Step("release-tests", lambda: ctest("release"), ["release-build"]),
        Step("python-tests", python_tests, ["release-build"]),
        # A real model in transformers: three quarters of a minute, and as long once to install it.
        Step("huggingface-tests", huggingface_tests, ["release-build"]),
        # A real model in a closed loop, for half a minute.
        Step("quality-quick",
             lambda: one("quality-quick",
                         ["build/venv/bin/python", "tests/eval/quality_quick.py"]),
             ["release-build"]),
        Step("asan-build", lambda: build("asan"), []),
        Step("asan-tests", lambda: ctest("asan"), ["asan-build"]),
        Step("clang-tidy",
             lambda: one("clang-tidy", [sys.executable, "tests/clang_tidy.py"]),
             ["release-build"]),
    ]
    long_forms = [
        Step("tsan-build", lambda: build("tsan"), []),
        Step("tsan-tests", lambda: ctest("tsan"), ["tsan-build"]),
        Step("release-repeat", lambda: ctest("release", repeat=20), ["release-build"]),
        Step("asan-repeat", lambda: ctest("asan", repeat=5), ["asan-build"]),
        Step("adversary-cpu",
             lambda: adversary("adversary-cpu", "--device=cpu", "--cases=10000000"),
             ["release-build"]),
        Step("adversary-coverage",
             lambda: adversary("adversary-coverage", "--device=cpu", "--coverage",
                               "--cases=3000000"), ["release-build"]),
        Step("adversary-served", served_adversary, ["release-build"]),
        Step("cancels", cancels, ["release-build"]),
        Step("fuzz", lambda: one("fuzz", [sys.executable, "tests/fuzz/run_fuzz.py"]), []),
        Step("compilers", lambda: one("compilers", [sys.executable, "tests/compilers.py"]), []),
        Step("mutations", lambda: one("mutations", [sys.executable, "tests/mutations.py"]), []),
    ]
    return everyday + (long_forms if campaign else [])


def run_steps(chosen):
    """Returns the number of passed and failed cases over all steps."""
    began = time.monotonic()
    broken = set()
    passed = failed = 0
    for step in chosen:
        print(f"== {step.name}", flush=True)
        step_began = time.monotonic()
        missing = sorted(broken.intersection(step.needs))
        if missing:
            result = Result(False, 0, 1, f"not run: {', '.join(missing)} failed")
        else:
            result = step.action()
        if not result.ok:
            broken.add(step.name)
        passed += result.passed
        failed += result.failed
        verdict = "ok" if result.ok else "FAILED"
        now = time.monotonic()
        if result.note:
            print(result.note)
        print(f"-- {step.name}: {verdict}, {now - step_began:.0f} s "
              f"({now - began:.0f} s in all)\n", flush=True)
    if broken:
        print("failed: " + ", ".join(step.name for step in chosen if step.name in broken))
    return passed, failed


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--campaign", action="store_true", help="add the long forms")
    parser.add_argument("--only", help="comma-separated names of the steps to run")
    arguments = parser.parse_args()
    chosen = steps(arguments.campaign)
    if arguments.only:
        names = arguments.only.split(",")
        unknown = set(names) - {step.name for step in chosen}
        if unknown:
            parser.error(f"no step called {', '.join(sorted(unknown))}")
        chosen = [step for step in chosen if step.name in names]
    LOGS.mkdir(parents=True, exist_ok=True)
    passed, failed = run_steps(chosen)
    print(f"{passed} passed, {failed} failed")
    return 0 if failed == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
