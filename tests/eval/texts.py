"""Texts of up to 150,000 characters that every machine with Python has.

Nothing is downloaded: prose is the language reference that Python's own `help()` shows, code is the
source of the standard library, mixed is that library's documentation of its classes and functions.
The same Python version gives the same text.

What methods are calibrated on (calibration_prose, calibration_code) comes from other modules, so
that nothing is judged on a text that it has seen.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import random
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

_MODULES = ("argparse", "ast", "asyncio.base_events", "collections", "configparser", "csv",
            "dataclasses", "datetime", "decimal", "difflib", "email.message", "enum", "fractions",
            "ftplib", "heapq", "http.client", "inspect", "ipaddress", "json.decoder",
            "logging", "mailbox", "os", "pathlib", "pickle", "random", "shutil", "statistics",
            "string", "subprocess", "tarfile", "tempfile", "textwrap", "threading", "typing",
            "unittest.case", "urllib.parse", "uuid", "zipfile")

TREASURES = ("amber", "basalt", "cobalt", "copper", "coral", "emerald", "garnet", "granite",
             "indigo", "ivory", "jade", "marble", "obsidian", "opal", "pearl", "quartz", "ruby",
             "sapphire", "silver", "topaz")
_TREASURES_ASKED = 8


@functools.cache
def prose_paragraphs() -> tuple[str, ...]:
    """Running text; code samples and tables are left out."""
    from pydoc_data import topics

    paragraphs = (paragraph for name in sorted(topics.topics)
                  for paragraph in topics.topics[name].split("\n\n"))
    return _running_text(paragraphs)


@functools.cache
def calibration_paragraphs() -> tuple[str, ...]:
    """Running text of another kind: what documentation strings of other modules say."""
    paragraphs: list[str] = []
    for path in _other_modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                paragraphs += (ast.get_docstring(node) or "").split("\n\n")
    return _running_text(paragraph for paragraph in paragraphs if "\n " not in paragraph)


def _running_text(paragraphs: Iterable[str]) -> tuple[str, ...]:
    """Those that are sentences, each once, without line ends."""
    found = {}
    for paragraph in paragraphs:
        is_text = re.match(r"[A-Z]", paragraph) and paragraph.rstrip().endswith((".", ":", ")"))
        if is_text and len(paragraph) > 30:
            found[" ".join(paragraph.split())] = None
    return tuple(found)


def _other_modules() -> list[Path]:
    """Sources of the standard library that no other text shows."""
    shown = {name.split(".")[0] for name in _MODULES}
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return [path for path in paths if path.stem not in shown and not path.stem.startswith("_")]


def prose(character_count: int) -> str:
    """Paragraphs of running text."""
    return "\n\n".join(prose_paragraphs())[:character_count]


def code(character_count: int) -> str:
    """Source files of the standard library, one after the other."""
    sources = []
    for name in _MODULES:
        module = importlib.import_module(name)
        sources.append(f"# {name}\n{inspect.getsource(module)}")
    return "\n\n".join(sources)[:character_count]


def calibration_prose(character_count: int) -> str:
    """Paragraphs of running text that prose does not have."""
    return "\n\n".join(calibration_paragraphs())[:character_count]


def calibration_code(character_count: int) -> str:
    """Source files that code does not have."""
    sources = (f"# {path.stem}\n{path.read_text(encoding='utf-8')}" for path in _other_modules())
    return "\n\n".join(sources)[:character_count]


def mixed(character_count: int) -> str:
    """Entries of a reference manual: names, sentences, lists, and examples of code."""
    entries: dict[str, None] = {}
    for module_name in _MODULES:
        if module_name == "typing":  # Warns of what it holds when it is looked at.
            continue
        module = importlib.import_module(module_name)
        for name, member in _documented(module, module_name):
            entries[f"{module_name}.{name}\n\n{inspect.getdoc(member)}"] = None
            if inspect.isclass(member):
                for method_name, method in _documented(member, module_name):
                    text = f"{module_name}.{name}.{method_name}\n\n{inspect.getdoc(method)}"
                    entries[text] = None
    return "\n\n\n".join(entries)[:character_count]


def _documented(owner: object, module_name: str) -> Iterator[tuple[str, object]]:
    """Public classes and functions that a module or class of this module defines and describes."""
    for name, member in sorted(vars(owner).items()):
        is_own = getattr(member, "__module__", None) == module_name
        if not name.startswith("_") and is_own and callable(member) and member.__doc__:
            yield name, member


def needles(character_count: int) -> str:
    """Prose with numbers to remember spread over it, asked for (and answered) at its end."""
    generator = random.Random(character_count)
    facts = {name: generator.randrange(10_000, 100_000) for name in TREASURES}
    asked = generator.sample(TREASURES, _TREASURES_ASKED)
    questions = "".join(f" The number of the {name} box is {facts[name]}." for name in asked)
    questions = "\n\nWhich numbers do the boxes have?" + questions
    paragraphs = prose(character_count - len(questions) - 50 * len(facts)).split("\n\n")
    places = sorted(generator.sample(range(1, len(paragraphs)), len(facts)), reverse=True)
    for place, (name, number) in zip(places, facts.items(), strict=True):
        paragraphs.insert(place, f"Remember: the number of the {name} box is {number}.")
    return "\n\n".join(paragraphs) + questions


TEXTS: dict[str, Callable[[int], str]] = {
    "prose": prose,
    "code": code,
    "mixed": mixed,
    "needles": needles,
    "calibration_prose": calibration_prose,
    "calibration_code": calibration_code,
}
