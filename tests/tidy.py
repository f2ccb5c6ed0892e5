#!/usr/bin/env python3
"""The house rules that a machine can check, as a test: who may include whom, sizes, names, sources
that the build has forgotten. Prints one `file:line: message` per finding and fails if there is one.

The include table below is the one picture of the architecture; CMakeLists.txt and the design text
follow it. A rule that must bend for a file bends here, with its reason next to it.
"""

import ast
import pathlib
import re
import sys

# ---- The architecture ----------------------------------------------------------------------------

# Longest matching prefix wins. A name ending in "/" is a folder without its sub-folders, one ending
# in "/**" is with them, others are single files.
MAY_INCLUDE = {
    # What a client and a server on one host share besides messages.
    "wire/": ["wire/"],
    "attention/": ["attention/"],
    # The one place that knows which devices exist.
    "attention/device.cc": ["attention/", "attention/reference/", "attention/cpu/",
                            "attention/cuda/"],
    "attention/reference/": ["attention/", "attention/reference/"],
    "attention/cpu/": ["attention/", "attention/cpu/"],
    # What a plan means is decided by the host's code, whoever reads the rows.
    "attention/cuda/": ["attention/", "attention/cpu/", "attention/cuda/"],
    "selector/": ["selector/", "attention/"],
    "selector/baselines/": ["selector/", "selector/baselines/", "attention/"],
    "kvservice/cache/": ["kvservice/cache/", "attention/", "kvservice/clock.h",
                         "kvservice/random.h", "kvservice/error.h"],
    "kvservice/": ["kvservice/", "kvservice/cache/", "selector/", "attention/"],
    # The seams are leaves: the cache may use them because they use nothing.
    "kvservice/clock.h": [],
    "kvservice/clock.cc": ["kvservice/clock.h"],
    "kvservice/random.h": [],
    "kvservice/random.cc": ["kvservice/random.h"],
    "kvservice/error.h": [],
    "kvservice/error.cc": ["kvservice/error.h"],
    "kvservice/server/": ["kvservice/server/", "kvservice/", "selector/", "attention/", "wire/",
                          "PROTO"],
    "client/": ["client/", "wire/", "PROTO", "attention/partial.h", "attention/log_mass.h",
                "attention/certificate.h"],
    "client/kvctl/": ["client/", "client/kvctl/", "PROTO"],
    # The client library without a network in between, for tests and embedding.
    "client/in_process.cc": ["client/", "PROTO", "kvservice/", "attention/"],
    "tests/**": ["attention/**", "selector/**", "kvservice/**", "client/**", "wire/", "tests/**",
                 "PROTO"],
}

# Outside library: pattern of its headers, and who may include them.
OUTSIDE = {
    "gRPC or protobuf": (r"^(grpc|grpcpp|grpc\+\+|google/protobuf)/",
                         ["kvservice/server/", "client/**", "tests/**"]),
    "Highway": (r"^hwy/", ["attention/cpu/", "tests/attention/**", "tests/adversary/",
                            "tests/eval/"]),
    "CUDA": (r"^(cuda|cublas|cub/|cooperative_groups|thrust/)",
             ["attention/cuda/", "tests/attention/**", "tests/bench/"]),
    "RocksDB": (r"^rocksdb/", ["kvservice/cache/rocksdb_tier.cc", "tests/stress/"]),
    "xxHash": (r"^xxhash\.h", ["kvservice/cache/checksum.cc"]),
    "OpenSSL": (r"^openssl/", ["kvservice/server/", "tests/server/"]),
    "prometheus": (r"^prometheus/",
                   ["kvservice/server/figures.cc", "kvservice/server/metrics_text.cc",
                    "kvservice/server/status_page.cc", "kvservice/server/web_pages.cc",
                    "tests/server/"]),
    "civetweb": (r"^civetweb\.h", ["kvservice/server/web_server.cc"]),
    "BLAS": (r"^cblas\.h", ["tests/eval/"]),
    "spdlog": (r"^spdlog/", ["kvservice/server/", "client/**"]),
    "CLI11": (r"^CLI/", ["kvservice/server/", "client/**", "tests/bench/", "tests/eval/",
                         "tests/adversary/", "tests/stress/"]),
    "JSON": (r"^nlohmann/", ["kvservice/server/", "client/**", "tests/**"]),
    "the test libraries": (r"^(gtest|gmock|benchmark)/", ["tests/**"]),
    "abseil": (r"^absl/", ["attention/**", "selector/**", "kvservice/**", "client/**", "wire/",
                        "tests/**"]),
}

GENERATED = re.compile(r"^(kvservice/v\d+|google/rpc)/\w+(\.grpc)?\.pb\.h$")

# ---- Sizes and words -----------------------------------------------------------------------------

FILE_LINES_MAX = 800
FUNCTION_LINES_MAX = 70
KERNEL_LINES_MAX = 120
KERNEL_FOLDERS = ("attention/cpu/", "attention/cuda/")
LINE_COLUMNS_MAX = 100
# Made from measurements or by a program, one row or line per result; nobody edits them.
MAY_BE_LONG = {"docs/quality.json", "docs/quality.md", "docs/quality_tables.md", "docs/api.md",
               "tests/client/golden/json.txt", "tests/RELIABILITY.json"}

SOURCE_FOLDERS = ["attention", "selector", "kvservice", "client", "wire", "tests", "proto",
                  "deploy", "docs", ".ci"]
CODE_SUFFIXES = (".h", ".cc", ".cu")
TEXT_SUFFIXES = CODE_SUFFIXES + (".py", ".proto", ".sh", ".md", ".txt", ".json", ".yml", ".yaml",
                                 ".toml", "")
PICTURE_SUFFIXES = (".svg", ".png")
COLUMN_SUFFIXES = CODE_SUFFIXES + (".py", ".proto", ".sh")

BANNED_WORD = re.compile(r"\b(TODO|FIXME|HACK|XXX)\b")
BANNED_TYPE = re.compile(r"\b(?:class|struct|enum|union|using)\s+(?:class\s+)?"
                         r"(\w*(?:Manager|Helper|Util)s?)\b")
MACHINE_PATH = re.compile(r"(?<![\w.:/}$)])/(?:home|root|work|Users|mnt)/\w")
SLEEP = re.compile(r"\b(?:sleep_for|sleep_until|usleep|nanosleep)\s*\(|\b(?:time|asyncio)\.sleep\b")
THROW = re.compile(r"\bthrow\b")
THROW_FREE = ("attention/", "selector/", "kvservice/", "wire/")
DISABLED_TEST = re.compile(r"\bDISABLED_\w+|\bpytest\.mark\.skip\b|\bunittest\.skip\b")

# This file and its test spell out what they forbid.
SPEAKS_OF_RULES = {"tests/tidy.py", "tests/tidy_test.py"}

# file -> why it may sleep.
MAY_SLEEP = {}


# ---- Reading code --------------------------------------------------------------------------------

TOKEN = re.compile(
    r'//[^\n]*|/\*.*?\*/'
    r'|R"(?P<tag>[^(\s]*)\(.*?\)(?P=tag)"'
    r'|"(?:\\.|[^"\\\n])*"'
    r"|(?<![0-9A-Za-z_])'(?:\\.|[^'\\\n])+'",
    re.DOTALL)


def blank_out(text):
    """The C++ text without comments and without the insides of literals; lines keep their place."""
    def replace(match):
        token = match.group(0)
        lines = "\n" * token.count("\n")
        return lines if token.startswith("/") else '""' + lines
    return TOKEN.sub(replace, text)


def without_directives(code):
    """Blanks preprocessor lines, with their continuations."""
    return re.sub(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", lambda m: "\n" * m.group(0).count("\n"), code,
                  flags=re.MULTILINE)


SCOPE_HEAD = re.compile(r"^\s*(?:template\s*<.*>\s*)?(?:inline\s+)?"
                        r"(?:namespace|class|struct|union|enum|extern)\b", re.DOTALL)
INITIALIZED_MEMBER = re.compile(r"\)[^;]*[^:]:[^:].*[\w>]\s*$", re.DOTALL)
QUALIFIER = re.compile(r"\b(?:const|noexcept|override|final|mutable|try)\s*$")


def opens_function(head):
    return "(" in head and not SCOPE_HEAD.match(head)


def opens_value(head):
    """True for a brace inside a declaration: a default argument or `: member_{1}`."""
    if head.count("(") > head.count(")"):
        return True
    return (opens_function(head) and INITIALIZED_MEMBER.search(head) is not None
            and not QUALIFIER.search(head))


def skip_braces(code, start):
    """Position after the brace that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[{}]").finditer(code, start):
        depth += 1 if match.group(0) == "{" else -1
        if depth == 0:
            return match.end()
    return len(code)


def cc_functions(text):
    """Yields (first line, number of lines, heading) of every outermost function definition."""
    code = without_directives(blank_out(text))
    head_start = position = 0
    mark = re.compile(r"[{};]|\b(?:public|private|protected)\s*:")
    head = ""
    while match := mark.search(code, position):
        head += code[position:match.start()]
        position = match.end()
        if match.group(0) == ";" and head.count("(") > head.count(")"):
            continue
        if match.group(0) == "{" and opens_value(head):
            position = skip_braces(code, match.start())
            head += "{}"
            continue
        if match.group(0) == "{" and opens_function(head):
            position = skip_braces(code, match.start())
            first = head_start + len(code[head_start:]) - len(code[head_start:].lstrip())
            first_line = code.count("\n", 0, first) + 1
            yield first_line, code.count("\n", 0, position) + 2 - first_line, " ".join(head.split())
        head, head_start = "", position


def python_functions(text):
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.lineno, node.end_lineno - node.lineno + 1, node.name


# ---- Rules: each yields (line, message) for one file ---------------------------------------------


def matches(path, pattern):
    if pattern.endswith("/**"):
        return path.startswith(pattern[:-2])
    if pattern.endswith("/"):
        return path.startswith(pattern) and "/" not in path[len(pattern):]
    return path == pattern


def allowed_includes(path):
    """The row of the table for this file; None when it has none."""
    rows = [pattern for pattern in MAY_INCLUDE if matches(path, pattern)]
    return MAY_INCLUDE[max(rows, key=len)] if rows else None


def check_includes(path, text):
    allowed = allowed_includes(path)
    if allowed is None:
        yield 1, "this folder has no row in the include table of tests/tidy.py"
        return
    for number, line in enumerate(text.split("\n"), 1):
        match = re.match(r'\s*#\s*include\s*(["<])([^">]+)[">]', line)
        if match:
            message = include_message(path, match.group(1), match.group(2), allowed)
            if message:
                yield number, message


def include_message(path, bracket, target, allowed):
    for name, (pattern, places) in OUTSIDE.items():
        if re.match(pattern, target):
            if any(matches(path, place) for place in places):
                return None
            return f"{target}: {name} may be included only from {', '.join(places)}"
    if GENERATED.match(target):
        return None if "PROTO" in allowed else f"{target}: generated code may not be included here"
    if bracket == "<":
        return None
    if target.split("/")[0] not in SOURCE_FOLDERS:
        return f"{target}: name our headers from the root of the repository, others in <>"
    if any(matches(target, place) for place in allowed):
        return None
    return f"{target}: {path.rsplit('/', 1)[0]} may not include it"


def check_guard(path, text):
    if path.endswith("-inl.h"):
        return  # Highway includes these once per target; their guards toggle.
    guard = "KVSERVICE_" + re.sub(r"[^A-Z0-9]", "_", path.upper()) + "_"
    lines = [line for line in blank_out(text).split("\n") if line.strip()]
    if lines[:2] != [f"#ifndef {guard}", f"#define {guard}"]:
        yield 1, f"expected the header guard {guard} before everything else"


def check_sizes(path, text):
    lines = text.rstrip("\n").count("\n") + 1
    if lines > FILE_LINES_MAX and path not in MAY_BE_LONG:
        yield 1, f"{lines} lines; a file has at most {FILE_LINES_MAX}"
    if path.endswith(COLUMN_SUFFIXES):
        for number, line in enumerate(text.split("\n"), 1):
            if len(line) > LINE_COLUMNS_MAX:
                yield number, f"{len(line)} columns; a line has at most {LINE_COLUMNS_MAX}"
    limit = KERNEL_LINES_MAX if path.startswith(KERNEL_FOLDERS) else FUNCTION_LINES_MAX
    functions = []
    if path.endswith(CODE_SUFFIXES):
        functions = cc_functions(text)
    elif path.endswith(".py"):
        functions = python_functions(text)
    for line, length, heading in functions:
        if length > limit:
            yield line, f"{heading[:60]}: {length} lines; a function here has at most {limit}"


def check_words(path, text):
    if path in SPEAKS_OF_RULES:
        return
    for number, line in enumerate(text.split("\n"), 1):
        for pattern, reason in [
                (BANNED_WORD, "finish it or write down why not, without this word"),
                (MACHINE_PATH, "a path of one machine")]:
            if match := pattern.search(line):
                yield number, f"{match.group(0)}: {reason}"
    if re.search(r"(^|[_/.])(util|helper|manager)s?([_.]|$)", path):
        yield 1, "file name: say what it is, not that it helps, manages or is useful"


def check_code_words(path, text):
    code = blank_out(text) if path.endswith(CODE_SUFFIXES) else text
    if path in SPEAKS_OF_RULES:
        return
    for number, line in enumerate(code.split("\n"), 1):
        if match := BANNED_TYPE.search(line):
            yield number, f"{match.group(1)}: say what the type is, not that it helps or manages"
        if path.startswith(THROW_FREE) and path.endswith(CODE_SUFFIXES) and THROW.search(line):
            yield number, "throw: nothing throws here; return absl::Status"
        if path.startswith("tests/"):
            if match := DISABLED_TEST.search(line):
                yield number, f"{match.group(0)}: a test runs or does not exist"
            if path not in MAY_SLEEP and (match := SLEEP.search(line)):
                yield number, f"{match.group(0)}: tests do not sleep; inject a clock"


def check_file(path, text):
    yield from check_sizes(path, text)
    yield from check_words(path, text)
    if path.endswith(CODE_SUFFIXES):
        yield from check_includes(path, text)
    if path.endswith(".h"):
        yield from check_guard(path, text)
    if path.endswith(CODE_SUFFIXES + (".py",)):
        yield from check_code_words(path, text)


# ---- Rules about the tree ------------------------------------------------------------------------


def check_known_to_cmake(files, cmake_text):
    """Every source and proto file is built: a test that CMake does not know never fails."""
    listed = set(re.sub(r"#[^\n]*", "", cmake_text).replace("(", " ").replace(")", " ").split())
    for path in files:
        if path.endswith((".cc", ".cu", ".proto")) and path not in listed:
            yield path, 1, "CMakeLists.txt does not list it, so it is never built"


def check_headers_used(files):
    """A header nobody includes is dead, or its source file forgot to check itself against it."""
    included = set()
    for path, text in files.items():
        if path.endswith(CODE_SUFFIXES):
            included.update(re.findall(r'^\s*#\s*(?:include|define HWY_TARGET_INCLUDE)\s+"([^"]+)"',
                                       text, re.MULTILINE))
    for path in files:
        if path.endswith(".h") and path not in included:
            yield path, 1, "no file includes this header"


def read_tree(root):
    """Path from the root -> text, of every text file of ours."""
    files = {}
    candidates = [path for folder in SOURCE_FOLDERS for path in (root / folder).rglob("*")]
    candidates += [path for path in root.iterdir() if path.is_file()]
    for path in sorted(candidates):
        relative = path.relative_to(root)
        if not path.is_file() or path.is_symlink() or path.suffix not in TEXT_SUFFIXES:
            continue
        if "__pycache__" in relative.parts or relative.name in ("LICENSE", ".git"):
            continue
        files[str(relative)] = path.read_text(encoding="utf-8")
    return files


def check_kinds(root):
    """Downloads and build products are not for the repository: it holds text and pictures."""
    for path in sorted(root.iterdir()):
        if path.is_file() and path.suffix not in TEXT_SUFFIXES + PICTURE_SUFFIXES:
            yield path.name, 1, "no source, text or picture: not for the repository"


def findings(root):
    files = read_tree(root)
    yield from check_kinds(root)
    for path, text in files.items():
        if path.startswith(tuple(folder + "/" for folder in SOURCE_FOLDERS)):
            for line, message in check_file(path, text):
                yield path, line, message
        else:
            for line, message in check_words(path, text):
                yield path, line, message
    yield from check_known_to_cmake(files, files.get("CMakeLists.txt", ""))
    yield from check_headers_used(files)


def main():
    root = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else __file__).resolve()
    root = root if root.is_dir() else root.parent.parent
    found = sorted(findings(root))
    for path, line, message in found:
        print(f"{path}:{line}: {message}")
    print(f"{len(read_tree(root))} files, {len(found)} messages")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
