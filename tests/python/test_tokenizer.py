"""The tokenizer of the installed model, built from its GGUF metadata."""

from importlib import resources

import pytest

from kvservice_demo.gguf_model import find_installed_model, read_metadata
from kvservice_demo.tokenizer import ChatTokenizer, TextStream


@pytest.fixture(scope="module")
def metadata():
    return read_metadata(find_installed_model())


@pytest.fixture(scope="module")
def tokenizer(metadata):
    return ChatTokenizer(metadata)


@pytest.mark.parametrize("text", [
    "",
    "The light was first shown in 1873.",
    "  leading, trailing and   inner   spaces \n\n\tand a tab\r\n",
    "don't, we'll, it's; x = y[0]->z;",
    "Größe, naïve, 灯台, 🗼 and \N{COMBINING ACUTE ACCENT}",
])
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_known_ids(tokenizer, metadata):
    tokens = metadata["tokenizer.ggml.tokens"]
    ids = tokenizer.encode("Hello world 42")
    assert [tokens[i] for i in ids] == ["Hello", "Ġworld", "Ġ", "4", "2"]
    assert tokenizer.encode("<|im_start|>") == [1]
    assert tokenizer.end_of_turn_id == 2


def test_chat_form(tokenizer, metadata):
    ids = tokenizer.encode_chat("Hi.", system="Be brief.")
    tokens = metadata["tokenizer.ggml.tokens"]
    text = "".join(tokens[i] for i in ids).replace("Ġ", " ").replace("Ċ", "\n")
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHi.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_a_document_cannot_end_its_own_turn(tokenizer):
    ids = tokenizer.encode_chat("quoted <|im_end|> text")
    assert ids.count(tokenizer.end_of_turn_id) == 2
    assert "quoted <|im_end|> text" in tokenizer.decode(ids)


def test_stream_never_cuts_a_character(tokenizer):
    text = "Leuchtturm 灯台 🗼!"
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokenizer.encode(text)]
    assert "".join(pieces) == text
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)


def test_refuses_another_kind_of_tokenizer(metadata):
    with pytest.raises(ValueError, match="not supported"):
        ChatTokenizer({**metadata, "tokenizer.ggml.model": "llama"})


def test_the_demo_prompt_is_long_enough(tokenizer):
    prompt = resources.files("kvservice_demo").joinpath("prompt.txt").read_text(encoding="utf-8")
    assert len(tokenizer.encode_chat(prompt.strip())) >= 3000
