#!/usr/bin/env python3
"""Builds what judges the bounds with every supported compiler and way of rounding, and runs it.

The proofs assume IEEE arithmetic and nothing about which operations a compiler fuses: g++ and
clang++, -O3, without FMA and with every product fused that can be. Each build then attacks the
devices on every instruction set of the machine (SSE4, AVX2, AVX-512). The last line is
"N passed, N failed".
"""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
TESTS = {
    "adversary_test": "*FindsNothing*:JudgeTest*",
    "device_soundness_test": "*DeviceSoundness*",
}
COMPILERS = {"g++": ["g++"], "clang++": ["clang++", "clang++-14"]}
CONTRACTIONS = {"unfused": ("off", ""), "fused": ("fast", " -mfma")}


def find(names):
    return next((path for path in map(shutil.which, names) if path), None)


def run(command, environment=None):
    done = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, env=environment, check=False)
    return done.returncode, done.stdout


def judge(name, compiler, contraction, flags, arguments):
    """Empty when all is well, else the end of what was said."""
    folder = ROOT / "build" / "compilers" / name
    steps = [["cmake", "-S", ".", "-B", folder, "-G", "Ninja", "--log-level=WARNING",
              "-DCMAKE_BUILD_TYPE=Release", f"-DCMAKE_CXX_COMPILER={compiler}",
              f"-DCMAKE_CXX_FLAGS_RELEASE=-O3 -g1 -DNDEBUG{flags}",
              "-DKVSERVICE_CUDA=OFF", f"-DKVSERVICE_FP_CONTRACT={contraction}"],
             ["cmake", "--build", folder, "-j", str(arguments.jobs), "--target", *TESTS]]
    for step in steps:
        status, output = run(step)
        if status != 0:
            return output[-3000:]
    environment = dict(os.environ, KVSERVICE_ADVERSARY_CERTIFICATES=str(arguments.certificates))
    for test, cases in TESTS.items():
        status, output = run([folder / "tests" / test, f"--gtest_filter={cases}"], environment)
        if status != 0:
            return output[-3000:]
    return ""


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--only", help="comma-separated names, such as clang++-fused")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at a time")
    parser.add_argument("--certificates", type=int, default=50_000,
                        help="head-certificates to judge per device and instruction set")
    arguments = parser.parse_args()
    passed = failed = 0
    for compiler_name, names in COMPILERS.items():
        for kind, (contraction, flags) in CONTRACTIONS.items():
            name = f"{compiler_name}-{kind}"
            if arguments.only and name not in arguments.only.split(","):
                continue
            began = time.monotonic()
            compiler = find(names)
            message = (judge(name, compiler, contraction, flags, arguments) if compiler else
                       f"not found: {' or '.join(names)} (package clang)")
            passed += not message
            failed += bool(message)
            if message:
                print(message)
            print(f"{name}: {'FAILED' if message else 'ok'}, {time.monotonic() - began:.0f} s",
                  flush=True)
    print(f"{passed} passed, {failed} failed")
    return 0 if failed == 0 and passed > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
