#!/usr/bin/env python3
"""Writes what the closed-loop study lets models read and answer, as token ids.

    build/venv/bin/python tests/eval/tasks.py --all

writes build/eval/<model>-<tokens>-<text>.tokens.json for every model, length and text of the study;
--model, --tokens and --text choose one of each. A file is a list of tasks:

    name           "<model>-<tokens>-<text>", with "-<index>" if the file has several
    model, text, tokens
    prompt         ids that are prefilled
    forced         ids fed in turn after it; logits after feeding forced[i] predict forced[i + 1],
                   those after the prompt predict forced[0]
    greedy_tokens  tokens to decode greedily after the prompt (then `forced` is empty)
    answers        parts of `forced`: {"begin", "end", "kind": "needle" | "digits", "name", "fact"}.
                   A needle is found if each forced[begin:end] is the likeliest token under teacher
                   forcing; "fact" is the index in `prompt` of the number to be remembered.
    expected       ids of the right answer to a greedy task, to see what the dense model can do; the
                   dense model's own answer is what others are compared with

prompt + forced are exactly <tokens> ids for texts; prompt + greedy_tokens at most that for tasks.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import re
import sys
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "client/python"), str(ROOT / "build/python"),
                str(ROOT / "build/eval_packages")]

from gemma import load_gemma  # noqa: E402
from texts import TEXTS, TREASURES, calibration_paragraphs, prose_paragraphs  # noqa: E402

from kvservice_demo.gguf_model import find_installed_model, read_metadata  # noqa: E402
from kvservice_demo.tokenizer import ChatTokenizer  # noqa: E402

FORCED_TOKENS = 512
NEEDLES_ASKED = 16
GREEDY_TASKS = 6
# No text here has more characters per token.
_CHARACTERS_PER_TOKEN_MAX = 8
_NATURAL = ("prose", "code", "mixed", "calibration_prose", "calibration_code")
# Words to remember numbers by, and what is between the facts.
_NEEDLES = {
    "needles": (TREASURES, prose_paragraphs),
    "calibration_needles": (
        ("badger", "beaver", "camel", "cheetah", "dolphin", "eagle", "falcon", "giraffe", "hamster",
         "jaguar", "leopard", "monkey", "otter", "panther", "penguin", "rabbit", "salmon",
         "spider", "turtle", "walrus"),
        calibration_paragraphs),
}
_GREEDY = ("arithmetic", "questions")
_CALIBRATION = ("calibration_prose", "calibration_code", "calibration_needles")
_STUDY = (
    ("smollm2", (2048, 4096, 8192), ("prose", "code", "mixed", "needles")),
    ("smollm2", (2048, 4096), _GREEDY),
    ("smollm2", (4096,), _CALIBRATION),
    ("gemma3", (16384, 32000), ("prose", "needles")),
    ("gemma3", (16384,), _CALIBRATION),
)
# So many facts fit into the shortest list; questions are about those.
_THINGS_ASKED = 100
_FIRST_NAMES = ("Ada", "Bruno", "Clara", "David", "Emma", "Felix", "Grace", "Hugo", "Iris", "Jonas",
                "Karin", "Leo", "Maria", "Noah", "Olga", "Peter", "Rosa", "Simon", "Tina", "Victor")
_LAST_NAMES = ("Adams", "Baker", "Carter", "Dixon", "Evans", "Foster", "Green", "Harris", "Irwin",
               "Jones", "Keller", "Lopez", "Miller", "Nolan", "Owens", "Parker", "Quinn", "Reed",
               "Stone", "Turner")
_CITIES = ("Athens", "Berlin", "Cairo", "Dublin", "Geneva", "Havana", "Lisbon", "London", "Madrid",
           "Milan", "Moscow", "Oslo", "Paris", "Prague", "Rome", "Sydney", "Tokyo", "Vienna")


@dataclass(frozen=True)
class Coder:
    """A model's tokenizer: `encode` gives ids without the `start` that every prompt begins with."""

    model: str
    encode: Callable[[str], list[int]]
    start: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Task:
    """One entry of a file; its fields are described at the top."""

    name: str
    model: str
    text: str
    tokens: int
    prompt: list[int]
    forced: list[int] = field(default_factory=list)
    greedy_tokens: int = 0
    answers: list[dict[str, object]] = field(default_factory=list)
    expected: list[int] = field(default_factory=list)


def make_tasks(coder: Coder, text: str, tokens: int) -> list[Task]:
    """The tasks of one file. ValueError if the text is too short for so many tokens."""
    name = f"{coder.model}-{tokens}-{text}"
    if text in _NATURAL:
        return [_natural(coder, text, tokens, name)]
    if text in _NEEDLES:
        return [_needles(coder, text, tokens, name)]
    make = {"arithmetic": _arithmetic, "questions": _questions}[text]
    return [make(coder, tokens, f"{name}-{index}") for index in range(GREEDY_TASKS)]


def _natural(coder: Coder, text: str, tokens: int, name: str) -> Task:
    ids = coder.start + coder.encode(TEXTS[text](tokens * _CHARACTERS_PER_TOKEN_MAX))
    if len(ids) < tokens:
        raise ValueError(f"{name}: the text has {len(ids)} tokens only")
    split = tokens - FORCED_TOKENS
    return Task(name, coder.model, text, tokens, ids[:split], ids[split:tokens])


# ---- Needles -------------------------------------------------------------------------------------


def encode_parts(coder: Coder, parts: Sequence[str]) -> tuple[list[int], list[int]]:
    """Ids of the joined parts, and where each part ends in them.

    ValueError if a token spans two parts.
    """
    ids = coder.encode("".join(parts))
    ends = []
    for count in range(1, len(parts) + 1):
        head = coder.encode("".join(parts[:count]))
        if ids[: len(head)] != head:
            raise ValueError(f"a token spans the end of {parts[count - 1]!r}")
        ends.append(len(head))
    return ids, ends


def _needles(coder: Coder, text: str, tokens: int, name: str) -> Task:
    """Prose with numbers to remember at even depths, asked for in another order.

    Words and number are neighbours because small models find nothing else: of the longer sentences
    in texts.needles the 135M model repeats one in five.
    """
    words, read_paragraphs = _NEEDLES[text]
    generator = random.Random(f"{text} {tokens}")
    numbers = {word: str(generator.randrange(10_000, 100_000)) for word in words}
    facts = [encode_parts(coder, [f"\n\nThe secret code is {word} ", number, "."])
             for word, number in numbers.items()]
    fact_tokens = sum(len(ids) for ids, _ in facts)
    body_tokens = tokens - FORCED_TOKENS - len(coder.start) - fact_tokens
    paragraphs = [coder.encode("\n\n" + paragraph) for paragraph in read_paragraphs()]
    body, rest = _split(paragraphs, body_tokens)
    prompt = list(coder.start)
    fact_at, read, next_fact = {}, 0, 0
    for paragraph in [*body, []]:
        while next_fact < len(facts) and read >= body_tokens * (next_fact + 0.5) / len(facts):
            ids, ends = facts[next_fact]
            fact_at[words[next_fact]] = len(prompt) + ends[0]
            prompt += ids
            next_fact += 1
        prompt += paragraph
        read += len(paragraph)
    parts = ["\n\nWhat are the codes?"]
    asked = generator.sample(words, NEEDLES_ASKED)
    for word in asked:
        parts += [f" The secret code is {word} ", numbers[word], "."]
    forced, ends = encode_parts(coder, parts)
    answers = [{"begin": ends[3 * i + 1], "end": ends[3 * i + 2], "kind": "needle", "name": word,
                "fact": fact_at[word]} for i, word in enumerate(asked)]
    forced += [token for paragraph in rest for token in paragraph]
    if len(forced) < FORCED_TOKENS:
        raise ValueError(f"{name}: the prose is too short")
    return Task(name, coder.model, text, tokens, prompt, forced[:FORCED_TOKENS], answers=answers)


def _split(paragraphs: list[list[int]], tokens: int) -> tuple[list[list[int]], list[list[int]]]:
    """The first paragraphs, of exactly `tokens` ids, and the rest; the very first one is cut."""
    count = total = 0
    while total < tokens:
        if count == len(paragraphs):
            raise ValueError(f"the prose has {total} tokens only, {tokens} wanted")
        total += len(paragraphs[count])
        count += 1
    excess = total - tokens
    body = paragraphs[:count]
    while excess >= len(body[0]):
        excess -= len(body.pop(0))
    return [body[0][excess:], *body[1:]], paragraphs[count:]


# ---- Tasks that the dense model answers first ----------------------------------------------------


def _fill(coder: Coder, tokens: int, head: str, line: Callable[[], str], tail: str) -> list[int]:
    """Ids of `head`, as many `line()`s as fit, and `tail`: at most `tokens`."""
    ids, end = coder.start + coder.encode(head), coder.encode(tail)
    while True:
        added = coder.encode(line())
        if len(ids) + len(added) + len(end) > tokens:
            return ids + end
        ids += added


def _arithmetic(coder: Coder, tokens: int, name: str) -> Task:
    """Many worked sums and differences of small numbers, then one that was not among them."""
    greedy_tokens = 12
    generator = random.Random(name)

    def problem() -> tuple[str, str]:
        first, second = generator.randrange(1, 10), generator.randrange(1, 10)
        if generator.random() < 0.5:
            return f"{first} + {second} =", f" {first + second}\n"
        first, second = max(first, second), min(first, second)
        return f"{first} - {second} =", f" {first - second}\n"

    asked, answer = problem()

    def line() -> str:
        shown = problem()
        return "".join(shown) if shown[0] != asked else line()

    prompt = _fill(coder, tokens - greedy_tokens, "Sums and differences:\n", line, asked)
    return Task(name, coder.model, "arithmetic", tokens, prompt, greedy_tokens=greedy_tokens,
                expected=coder.encode(answer))


def _questions(coder: Coder, tokens: int, name: str) -> Task:
    """A list of things and their owners, four questions with their answers and one without."""
    greedy_tokens = 16
    generator = random.Random(name)
    things = _things()
    people = [f"{first} {last}" for first in _FIRST_NAMES for last in _LAST_NAMES]
    generator.shuffle(things)
    owners = {thing: f"{thing}: {generator.choice(people)}, {generator.choice(_CITIES)}\n"
              for thing in things}
    listed = iter(things)
    *shown, asked = generator.sample(things[:_THINGS_ASKED], 5)
    tail = "".join(f"\nQuestion: Who owns the {thing}?\nAnswer: {owners[thing]}" for thing in shown)
    tail += f"\nQuestion: Who owns the {asked}?\nAnswer:"
    prompt = _fill(coder, tokens - greedy_tokens, "Things and their owners:\n",
                   lambda: owners[next(listed)], tail)
    return Task(name, coder.model, "questions", tokens, prompt, greedy_tokens=greedy_tokens,
                expected=coder.encode(f" {owners[asked]}"))


def _things() -> list[str]:
    """Things that Unicode has a picture of, named in one word or two: many, and all different."""
    names = (unicodedata.name(chr(code), "") for code in range(0x1F300, 0x1F700))
    return sorted({name.lower() for name in names
                   if re.fullmatch(r"[A-Z]{3,9}( [A-Z]{3,9})?", name)})


# ---- Program -------------------------------------------------------------------------------------


def make_coder(model: str) -> Coder:
    """The tokenizer of a model of the study."""
    if model == "smollm2":
        return Coder(model, ChatTokenizer(read_metadata(find_installed_model())).encode)
    gemma = load_gemma(ROOT / "build/eval_packages/gemma.gguf")
    start = gemma.encode("")
    return Coder(model, lambda text: gemma.encode(text)[len(start) :], start)


def write_tasks(coder: Coder, text: str, tokens: int, folder: Path) -> Path:
    """Makes one file."""
    path = folder / f"{coder.model}-{tokens}-{text}.tokens.json"
    tasks = [dataclasses.asdict(task) for task in make_tasks(coder, text, tokens)]
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tasks, separators=(",", ":")) + "\n", encoding="utf-8")
    return path


def main() -> int:
    """The program; returns its exit status."""
    parser = argparse.ArgumentParser(prog="tasks.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", choices=("smollm2", "gemma3"), default="smollm2")
    parser.add_argument("--text", choices=(*_NATURAL, *_NEEDLES, *_GREEDY), default="prose")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--all", action="store_true", help="every file of the study")
    parser.add_argument("--out", type=Path, default=ROOT / "build/eval", help="folder")
    options = parser.parse_args()
    chosen = _STUDY if options.all else ((options.model, (options.tokens,), (options.text,)),)
    coders = {model: make_coder(model) for model in dict.fromkeys(row[0] for row in chosen)}
    for model, lengths, names in chosen:
        for tokens in lengths:
            for text in names:
                print(write_tasks(coders[model], text, tokens, options.out), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
