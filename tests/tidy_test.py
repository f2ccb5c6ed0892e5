"""Every rule of tidy.py is shown to fail on a tiny tree that breaks it, and to pass on one that
does not: a check that cannot fail checks nothing."""

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import tidy  # noqa: E402


def guarded(path, body=""):
    guard = "KVSERVICE_" + path.upper().replace("/", "_").replace(".", "_") + "_"
    return f"// What it is.\n\n#ifndef {guard}\n#define {guard}\n{body}\n#endif  // {guard}\n"


def messages(tmp_path, files, cmake=None):
    """What tidy says about a tree of these files. Unless told otherwise CMake lists all of them and
    a test includes every header."""
    if cmake is None:
        cmake = "\n".join(files) + "\ntests/includes_all_test.cc"
        headers = [path for path in files if path.endswith(".h")]
        files = dict(files, **{"tests/includes_all_test.cc":
                               "".join(f'#include "{path}"\n' for path in headers)})
    for path, text in dict(files, **{"CMakeLists.txt": cmake}).items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text, encoding="utf-8")
    return [f"{path}:{line}: {message}" for path, line, message in tidy.findings(tmp_path)]


def body_of(lines):
    return "int F() {\n" + "  G();\n" * (lines - 2) + "}\n"


# ---- Includes ------------------------------------------------------------------------------------

FORBIDDEN = [
    ("attention/a.cc", '"selector/b.h"'),
    ("attention/a.cc", '"kvservice/engine.h"'),
    ("attention/a.cc", '"attention/cpu/b.h"'),
    ("attention/cpu/a.cc", '"attention/reference/b.h"'),
    ("attention/reference/a.cc", '"attention/cpu/b.h"'),
    ("selector/a.cc", '"kvservice/cache/b.h"'),
    ("selector/a.cc", '"attention/cpu/b.h"'),
    ("kvservice/cache/a.cc", '"selector/b.h"'),
    ("kvservice/cache/a.cc", '"kvservice/engine.h"'),
    ("kvservice/clock.cc", '"kvservice/engine.h"'),
    ("kvservice/engine.cc", '"kvservice/server/b.h"'),
    ("kvservice/engine.cc", '"kvservice/v1/types.pb.h"'),
    ("kvservice/engine.cc", "<grpcpp/grpcpp.h>"),
    ("kvservice/server/a.cc", '"kvservice/cache/b.h"'),
    ("kvservice/server/a.cc", '"client/b.h"'),
    ("client/a.cc", '"attention/plan.h"'),
    ("client/a.cc", '"kvservice/engine.h"'),
    ("client/kvctl/a.cc", '"kvservice/engine.h"'),
    ("attention/a.cc", "<hwy/highway.h>"),
    ("attention/a.cc", '"hwy/highway.h"'),
    ("attention/cpu/a.cc", "<cuda_runtime.h>"),
    ("kvservice/cache/pool.cc", "<rocksdb/db.h>"),
    ("kvservice/engine.cc", "<prometheus/counter.h>"),
    ("kvservice/engine.cc", "<spdlog/spdlog.h>"),
    ("kvservice/engine.cc", "<CLI/CLI.hpp>"),
    ("tests/attention/a_test.cc", "<CLI/CLI.hpp>"),
    ("attention/a.cc", "<gtest/gtest.h>"),
    ("attention/a.cc", '"plan.h"'),
    ("selector/unknown/a.cc", "<vector>"),
]

ALLOWED = [
    ("attention/a.cc", '"attention/plan.h"'),
    ("attention/a.cc", '"absl/status/status.h"'),
    ("attention/device.cc", '"attention/cpu/b.h"'),
    ("attention/cpu/a.cc", '"attention/plan.h"'),
    ("attention/cpu/a.cc", '"hwy/highway.h"'),
    ("attention/cuda/a.cu", "<cuda_runtime.h>"),
    ("selector/a.cc", '"attention/plan.h"'),
    ("kvservice/cache/a.cc", '"kvservice/clock.h"'),
    ("kvservice/cache/rocksdb_tier.cc", "<rocksdb/db.h>"),
    ("kvservice/engine.cc", '"kvservice/cache/b.h"'),
    ("kvservice/server/a.cc", '"kvservice/engine.h"'),
    ("kvservice/server/a.cc", '"kvservice/v1/types.pb.h"'),
    ("kvservice/server/a.cc", '"google/rpc/status.pb.h"'),
    ("kvservice/server/a.cc", "<grpcpp/grpcpp.h>"),
    ("client/a.cc", '"attention/partial.h"'),
    ("client/kvctl/a.cc", '"client/client.h"'),
    ("tests/kvservice/a_test.cc", '"kvservice/cache/b.h"'),
    ("tests/bench/a.cc", "<CLI/CLI.hpp>"),
    ("selector/a.cc", "<vector>"),
]


@pytest.mark.parametrize("path,target", FORBIDDEN)
def test_a_forbidden_include_is_found(tmp_path, path, target):
    found = messages(tmp_path, {path: f"#include {target}\n"})
    assert len(found) == 1 and found[0].startswith(f"{path}:1: ")


@pytest.mark.parametrize("path,target", ALLOWED)
def test_an_allowed_include_is_silent(tmp_path, path, target):
    assert messages(tmp_path, {path: f"#include {target}\n"}) == []


# ---- Sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path,limit", [
    ("selector/a.cc", 70), ("attention/a.cc", 70), ("attention/cpu/a.cc", 120),
    ("attention/cuda/a.cu", 120)])
def test_function_length(tmp_path, path, limit):
    assert messages(tmp_path, {path: body_of(limit)}) == []
    found = messages(tmp_path, {path: "\n" + body_of(limit + 1)})
    assert found == [f"{path}:2: int F(): {limit + 1} lines; a function here has at most {limit}"]


def test_python_function_length(tmp_path):
    text = "def f():\n" + "    g()\n" * 70
    found = messages(tmp_path, {"client/python/a.py": text})
    assert found == ["client/python/a.py:1: f: 71 lines; a function here has at most 70"]


def test_file_length(tmp_path):
    assert messages(tmp_path, {"selector/a.cc": "int a;\n" * 800}) == []
    found = messages(tmp_path, {"selector/a.cc": "int a;\n" * 801})
    assert found == ["selector/a.cc:1: 801 lines; a file has at most 800"]
    assert not messages(tmp_path, {"selector/a.cc": "int a;\n", "docs/quality.md": "a\n" * 801})


@pytest.mark.parametrize("path", ["selector/a.cc", "client/python/a.py", "proto/a.proto"])
def test_line_width(tmp_path, path):
    assert messages(tmp_path, {path: "#" + "x" * 99 + "\n"}) == []
    found = messages(tmp_path, {path: "\n#" + "x" * 100 + "\n"})
    assert found == [f"{path}:2: 101 columns; a line has at most 100"]


# Each text has exactly one function, of the length given, whatever surrounds it.
FUNCTIONS = {
    "free": ("int x = 3;\nint F() {\n  return 1;\n}\n", 3),
    "two-line heading": ("int F(int a,\n      int b) {\n}\n", 3),
    "in a namespace": ("namespace a {\nnamespace {\nvoid F() {\n}\n}\n}\n", 2),
    "member": ("class A final : public B {\n public:\n  int F() const override {\n  }\n};\n", 2),
    "after an initialised member": ("struct A {\n  int a{0};\n  int b = 2;\n  A() {\n  }\n};\n", 2),
    "constructor list": ("A::A(int a) : a_{a}, b_(2) {\n  G();\n}\n", 3),
    "default argument": ("void F(S s = {}) {\n}\n", 2),
    "template": ("template <class T>\nvoid F(T t) {\n}\n", 3),
    "nested braces": ("void F() {\n  if (a) {\n    b = [] { return 1; }();\n  }\n}\n", 5),
    "macro": ("TEST(A, B) {\n  G();\n}\n", 3),
    "braces in literals": ("void F() {\n  a = \"}\"; b = '}'; c = R\"(})\";  // }\n}\n", 3),
    "digit separators": ("void F() {\n  a = 1'000; b = 2'000'000;\n}\n", 3),
    "preprocessor": ("#define X(a) do { \\\n  (a); \\\nvoid F() {\n}\n", None),
    "class with macro": ("class alignas(64) A {\n  int a;\n  void F() {\n  }\n};\n", 2),
    "enum": ("enum class E : int { kA = (1) };\nvoid F() {\n}\n", 2),
    "table": ("constexpr int kA[] = {1, 2};\nvoid F() {\n}\n", 2),
    "operator": ("bool operator==(const A& a, const A& b) {\n  return 1;\n}\n", 3),
    "trailing return": ("auto F() -> std::vector<int> {\n}\n", 2),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_measured(name):
    text, expected = FUNCTIONS[name]
    lengths = [length for _, length, _ in tidy.cc_functions(text)]
    assert lengths == ([] if expected is None else [expected])


# ---- Names and words -----------------------------------------------------------------------------


def test_header_guard(tmp_path):
    path = "attention/cpu/scan.h"
    assert messages(tmp_path, {path: guarded(path)}) == []
    found = messages(tmp_path, {path: guarded("attention/scan.h")})
    assert found == [f"{path}:1: expected the header guard KVSERVICE_ATTENTION_CPU_SCAN_H_ "
                     "before everything else"]
    assert len(messages(tmp_path, {path: "#pragma once\n"})) == 1
    assert len(messages(tmp_path, {path: "int a;\n" + guarded(path)})) == 1


@pytest.mark.parametrize("path,line", [
    ("selector/a.cc", "// TODO: later"),
    ("docs/a.md", "FIXME"),
    ("client/python/a.py", "# HACK"),
    ("deploy/a.sh", "# XXX"),
    ("docs/a.md", "see /home/someone/x"),
    ("tests/a_test.cc", '// "/' 'root/x"'),
    ("deploy/a.sh", "cd /" "work/main"),
    ("selector/a.cc", "class ListManager {"),
    ("selector/a.cc", "struct ScanHelper;"),
    ("selector/a.cc", "enum class ScanUtils {"),
    ("client/python/a.py", "class TensorUtil: pass"),
    ("attention/a.cc", "  throw 1;"),
    ("selector/a.cc", "  throw 1;"),
    ("kvservice/server/a.cc", "  throw 1;"),
    ("tests/a_test.cc", "TEST(A, DISABLED_B);"),
    ("tests/python/test_a.py", "pytestmark = pytest.mark.skip"),
    ("tests/a_test.cc", "std::this_thread::sleep_for(a);"),
    ("tests/a_test.cc", "usleep(3);"),
    ("tests/python/test_a.py", "time.sleep(1)"),
])
def test_a_banned_word_is_found(tmp_path, path, line):
    found = messages(tmp_path, {path: f"\n{line}\n"})
    assert len(found) == 1 and found[0].startswith(f"{path}:2: ")


@pytest.mark.parametrize("path,line", [
    ("selector/a.cc", "// A manager may throw a TODOIST."),
    ("selector/a.cc", 'const char* a = "throw";'),
    ("client/a.cc", "int utility;"),
    ("docs/a.md", "https://example.com/home/x and ${HOME}/work/x"),
    ("client/python/a.py", "time.sleep(1)"),
    ("tests/a_test.cc", "// sleep_for(1) would be wrong here"),
])
def test_an_innocent_word_is_silent(tmp_path, path, line):
    assert messages(tmp_path, {path: f"\n{line}\n"}) == []


@pytest.mark.parametrize("path", ["selector/list_util.cc", "tests/helpers.cc", "client/util.cc"])
def test_file_names(tmp_path, path):
    assert len(messages(tmp_path, {path: "int a;\n"})) == 1


def test_who_may_sleep_is_listed_with_a_reason(tmp_path, monkeypatch):
    files = {"tests/a_test.cc": "usleep(3);\n"}
    assert len(messages(tmp_path, files)) == 1
    monkeypatch.setitem(tidy.MAY_SLEEP, "tests/a_test.cc", "a reason")
    assert messages(tmp_path, files) == []


# ---- The tree ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["selector/a.cc", "attention/cuda/a.cu", "proto/a.proto"])
def test_sources_are_known_to_cmake(tmp_path, path):
    assert messages(tmp_path, {path: "\n"}, cmake=f"kv_library(a {path})\n") == []
    for forgetting in ["", f"# {path}\n", f"other/{path}\n", f"{path}.in\n"]:
        found = messages(tmp_path, {path: "\n"}, cmake=forgetting)
        assert found == [f"{path}:1: CMakeLists.txt does not list it, so it is never built"]


def test_downloads_are_not_for_the_repository(tmp_path):
    assert messages(tmp_path, {"notes.md": "\n", "a.svg": "<svg/>\n"}) == []
    found = messages(tmp_path, {"tool-1.0-py3-none-any.whl": "PK\n"})
    assert found == ["tool-1.0-py3-none-any.whl:1: no source, text or picture: "
                     "not for the repository"]


def test_headers_are_used(tmp_path):
    path = "selector/a.h"
    found = messages(tmp_path, {path: guarded(path)}, cmake="")
    assert found == [f"{path}:1: no file includes this header"]


def test_exit_status_and_format(tmp_path, monkeypatch, capsys):
    messages(tmp_path, {"selector/a.cc": "int a;\n"})
    monkeypatch.setattr(sys, "argv", ["tidy.py", str(tmp_path)])
    assert tidy.main() == 0
    messages(tmp_path, {"selector/a.cc": "// FIXME\n"})
    assert tidy.main() == 1
    assert "selector/a.cc:1: FIXME" in capsys.readouterr().out
