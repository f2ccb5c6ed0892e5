"""The model's own tokenizer and chat template, built from the metadata of its GGUF file."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

DEFAULT_SYSTEM_PROMPT = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"

_CONTROL_TOKEN = 3  # GGUF's token type for tokens that text never contains
_TURN_START = "<|im_start|>"
_TURN_END = "<|im_end|>"


class ChatTokenizer:
    """Text to token ids and back. Not safe to share between threads."""

    def __init__(self, metadata: dict[str, Any]) -> None:
        """Takes GGUF metadata; ValueError if its tokenizer is of another kind."""
        kind = (metadata["tokenizer.ggml.model"], metadata.get("tokenizer.ggml.pre"))
        if kind != ("gpt2", "smollm"):
            raise ValueError(f"tokenizer {kind} is not supported, expected ('gpt2', 'smollm')")
        if _TURN_START not in metadata["tokenizer.chat_template"]:
            raise ValueError("the chat template is not of the ChatML form")
        tokens = metadata["tokenizer.ggml.tokens"]
        self.end_of_turn_id = int(metadata["tokenizer.ggml.eos_token_id"])
        self._tokenizer = _build(tokens, metadata)
        self._end_text_id = tokens.index("<|endoftext|>")

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""
        return frozenset({self.end_of_turn_id, self._end_text_id})

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text in which special tokens are recognised."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, special tokens left out; a cut character becomes U+FFFD."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def encode_chat(self, user: str, system: str = DEFAULT_SYSTEM_PROMPT) -> list[int]:
        """Token ids of one user turn in chat form, up to where the assistant begins to speak.

        Special tokens written out in `user` stay plain text: a document must not be able to end its
        own turn.
        """
        turns = f"{_TURN_START}system\n{system}{_TURN_END}\n{_TURN_START}user\n"
        close = f"{_TURN_END}\n{_TURN_START}assistant\n"
        return self.encode(turns) + self._encode_verbatim(user) + self.encode(close)

    def _encode_verbatim(self, text: str) -> list[int]:
        self._tokenizer.encode_special_tokens = True
        try:
            return self.encode(text)
        finally:
            self._tokenizer.encode_special_tokens = False


class TextStream:
    """Turns a growing token list into text pieces that never cut a character in two."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = ""

    def push(self, token_id: int) -> str:
        """Adds a token and returns the text that became certain with it, possibly empty."""
        self._ids.append(token_id)
        text = self._tokenizer.decode(self._ids)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        piece, self._shown = text[len(self._shown) :], text
        return piece


def _build(tokens: list[str], metadata: dict[str, Any]) -> Tokenizer:
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = metadata["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    return tokenizer
