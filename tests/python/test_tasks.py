"""What the closed-loop study lets models read: lengths, and answers that are where they are said to
be. Tokens are those of the demo's model.
"""

import re
import sys
from pathlib import Path

import pytest

from kvservice_demo.gguf_model import find_installed_model, read_metadata
from kvservice_demo.tokenizer import ChatTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "eval"))

import texts  # noqa: E402
from tasks import FORCED_TOKENS, Coder, encode_parts, make_tasks  # noqa: E402


@pytest.fixture(scope="module")
def tokenizer():
    return ChatTokenizer(read_metadata(find_installed_model()))


@pytest.fixture(scope="module")
def coder(tokenizer):
    return Coder("smollm2", tokenizer.encode, start=[1])


@pytest.mark.parametrize("name", ["prose", "code", "mixed", "calibration_prose",
                                  "calibration_code"])
def test_natural_texts_have_exactly_the_tokens_asked_for(coder, tokenizer, name):
    (task,) = make_tasks(coder, name, 2048)
    assert (task.name, task.tokens) == (f"smollm2-2048-{name}", 2048)
    assert len(task.prompt) == 2048 - FORCED_TOKENS
    assert len(task.forced) == FORCED_TOKENS
    assert task.prompt[0] == 1
    read = tokenizer.decode(task.prompt[1:] + task.forced)
    assert texts.TEXTS[name](20_000).startswith(read.rstrip("\N{REPLACEMENT CHARACTER}"))


def test_mixed_is_neither_prose_nor_code():
    text = texts.mixed(60_000)
    paragraphs = set(texts.prose_paragraphs())
    assert not paragraphs.intersection(" ".join(part.split()) for part in text.split("\n\n"))
    assert ">>> " in text and "\n    - " in text


def test_calibration_shows_nothing_that_is_judged():
    judged = set(texts.prose_paragraphs())
    assert not judged.intersection(texts.calibration_paragraphs())
    lines = {line for line in texts.code(10**7).split("\n") if line.startswith("# ")}
    headings = re.findall(r"(?m)^# [a-z]\w*$", texts.calibration_code(10**7))
    assert len(headings) > 50
    assert not lines.intersection(headings)


@pytest.mark.parametrize("name,tokens", [("needles", 2048), ("needles", 8192),
                                         ("calibration_needles", 4096)])
def test_needles_are_in_the_prompt_where_the_answers_say(coder, tokenizer, name, tokens):
    (task,) = make_tasks(coder, name, tokens)
    assert len(task.prompt) + len(task.forced) == tokens
    assert len(task.forced) >= 256
    assert len({answer["name"] for answer in task.answers}) == 16
    text = tokenizer.decode(task.prompt)
    for answer in task.answers:
        digits = task.forced[answer["begin"] : answer["end"]]
        number = tokenizer.decode(digits)
        assert re.fullmatch(r"[1-9]\d{4}", number)
        assert len(digits) == 5
        assert text.count(f"\n\nThe secret code is {answer['name']} {number}.") == 1
        assert task.prompt[answer["fact"] : answer["fact"] + 5] == digits
        question = tokenizer.decode(task.forced[: answer["begin"]])
        assert question.endswith(f" The secret code is {answer['name']} ")
    depths = sorted(answer["fact"] / len(task.prompt) for answer in task.answers)
    assert depths[0] < 0.2 and depths[-1] > 0.8
    assert max(b - a for a, b in zip(depths, depths[1:], strict=False)) < 0.25


@pytest.mark.parametrize("name", ["arithmetic", "questions"])
def test_greedy_tasks_fit_and_differ(coder, name):
    tasks = make_tasks(coder, name, 2048)
    assert len(tasks) == 6
    assert len({tuple(task.prompt) for task in tasks}) == 6
    for index, task in enumerate(tasks):
        assert task.name == f"smollm2-2048-{name}-{index}"
        assert not task.forced and not task.answers
        assert 2048 - 40 < len(task.prompt) + task.greedy_tokens <= 2048
        assert len(task.expected) <= task.greedy_tokens
        assert task == make_tasks(coder, name, 2048)[index]


def test_arithmetic_is_right_and_the_problem_is_new(coder, tokenizer):
    for task in make_tasks(coder, "arithmetic", 2048):
        *shown, asked = tokenizer.decode(task.prompt).split("\n")[1:]
        assert len(shown) > 100
        for line in [*shown, asked + tokenizer.decode(task.expected)]:
            left, sign, right, result = re.fullmatch(r"(\d+) ([+-]) (\d+) = (\d+)\n?",
                                                     line).groups()
            assert int(result) == int(left) + int(right) * (1 if sign == "+" else -1)
        assert not any(line.startswith(asked) for line in shown)


def test_questions_are_answered_in_the_prompt(coder, tokenizer):
    for task in make_tasks(coder, "questions", 4096):
        text = tokenizer.decode(task.prompt)
        thing = re.search(r"Who owns the ([\w ]+)\?\nAnswer:$", text).group(1)
        (owner,) = re.findall(rf"\n{thing}: (.*)\n", text)
        assert text.count("?\nAnswer:") == 5
        assert tokenizer.decode(task.expected) == f" {thing}: {owner}\n"


def test_a_token_across_two_parts_is_refused(coder):
    ids, ends = encode_parts(coder, ["The code is ", "12", "."])
    assert ends == [len(ids) - 3, len(ids) - 1, len(ids)]
    with pytest.raises(ValueError, match="a token spans"):
        encode_parts(coder, ["The co", "de is 12."])
