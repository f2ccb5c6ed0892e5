"""The programs as they were linked: what makes a slip of memory end the process."""

import re
import subprocess

import pytest

from kvservice_demo.server import find_program

PROGRAMS = ["kvservice", "kvctl"]


def readelf(program, *flags):
    command = ["readelf", "--wide", *flags, str(find_program().parent / program)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("program", PROGRAMS)
def test_is_loaded_anywhere_and_bound_at_start(program):
    assert re.search(r"Type:\s+DYN \(Position-Independent", readelf(program, "--file-header"))
    dynamic = readelf(program, "--dynamic")
    assert re.search(r"FLAGS_1\).*\bNOW\b", dynamic)
    assert "TEXTREL" not in dynamic
    # Nor does it look for libraries in folders of its own.
    assert not re.search(r"\((RPATH|RUNPATH)\)", dynamic)


@pytest.mark.parametrize("program", PROGRAMS)
def test_no_memory_is_written_and_executed(program):
    headers = readelf(program, "--program-headers")
    assert re.search(r"GNU_RELRO", headers)
    stack = re.search(r"GNU_STACK\s+(?:0x\w+\s+){5}(\S+)", headers)
    assert stack and "E" not in stack.group(1)
    for flags in re.findall(r"LOAD\s+(?:0x\w+\s+){5}([RWE ]{3})", headers):
        assert not ("W" in flags and "E" in flags), headers


@pytest.mark.parametrize("program", PROGRAMS)
def test_stacks_and_copies_are_checked(program):
    symbols = readelf(program, "--dyn-syms")
    assert re.search(r"\b__stack_chk_fail\b", symbols)
    assert re.search(r"\b__\w+_chk\b", symbols.replace("__stack_chk_fail", ""))
    # That of std::vector, which takes an index that is out of range for what it is.
    assert "__glibcxx_assert_fail" in symbols
