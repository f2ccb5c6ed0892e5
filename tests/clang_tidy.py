#!/usr/bin/env python3
"""Runs clang-tidy on our sources as the release build compiles them, as many at once as there are
cores. A clean file is not checked again until something it depends on changes: itself, a header of
ours that it includes, however deep, a proto file, .clang-tidy, or its compile command. What was
clean is remembered in the user's cache folder, as ccache does it."""

import concurrent.futures
import hashlib
import json
import os
import pathlib
import re
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "release"
CLANG_TIDY = ROOT / "build" / "venv" / "bin" / "clang-tidy"
CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
CLEAN = CACHE / "kvservice" / "tidy"
KEPT_DAYS = 60
SOURCE_FOLDERS = {"attention", "selector", "kvservice", "client", "wire", "tests"}
INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


def our_sources():
    """Path relative to the root -> its compile command."""
    found = {}
    for entry in json.loads((BUILD / "compile_commands.json").read_text(encoding="utf-8")):
        path = pathlib.Path(entry["file"])
        # What nvcc compiles has a language and flags of its own.
        if path.is_relative_to(ROOT) and path.suffix != ".cu":
            relative = path.relative_to(ROOT)
            if relative.parts[0] in SOURCE_FOLDERS:
                found[str(relative)] = entry["command"].replace(str(ROOT), "")
    return found


def included_files(source):
    """The source and all headers of ours it reaches."""
    reached, pending = set(), [source]
    while pending:
        path = pending.pop()
        if path in reached or not (ROOT / path).is_file():
            continue
        reached.add(path)
        pending += INCLUDE.findall((ROOT / path).read_text(encoding="utf-8"))
    return sorted(reached)


def fingerprint(source, command, common):
    digest = hashlib.sha256(common)
    digest.update(command.encode())
    for path in included_files(source):
        digest.update(path.encode())
        digest.update((ROOT / path).read_bytes())
    return digest.hexdigest()


def common_inputs():
    version = subprocess.run([CLANG_TIDY, "--version"], capture_output=True, check=True).stdout
    protos = b"".join(path.read_bytes() for path in sorted((ROOT / "proto").rglob("*.proto")))
    return version + (ROOT / ".clang-tidy").read_bytes() + protos


def check(source):
    """Returns the messages; an empty string means clean."""
    done = subprocess.run([CLANG_TIDY, "--quiet", "-p", str(BUILD), source], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=False)
    if done.returncode == 0:
        return ""
    return done.stdout or done.stderr


def forget_old():
    for stamp in CLEAN.iterdir():
        if time.time() - stamp.stat().st_mtime > KEPT_DAYS * 86400:
            stamp.unlink(missing_ok=True)


def main():
    CLEAN.mkdir(parents=True, exist_ok=True)
    forget_old()
    common = common_inputs()
    sources = our_sources()
    chosen = [source for source in sources
              if not sys.argv[1:] or any(source.startswith(prefix) for prefix in sys.argv[1:])]
    stamps = {source: CLEAN / fingerprint(source, sources[source], common) for source in chosen}
    stale = [source for source in chosen if not stamps[source].exists()]
    bad = []
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for source, messages in zip(stale, pool.map(check, stale)):
            if messages:
                bad.append(messages.strip())
            else:
                stamps[source].touch()
                print(f"{source}: clean", flush=True)
    # Last, where they are seen.
    print("\n".join(bad))
    print(f"{len(chosen)} sources, {len(stale)} checked now, {len(bad)} with messages")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
