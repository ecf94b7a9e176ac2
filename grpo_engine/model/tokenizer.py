"""Text to tokens and back: the embedded study's own tokenizer, or a Hugging Face folder."""

from __future__ import annotations

import array
import functools
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from grpo_engine.records import jsonl
from grpo_engine.system import files
from grpo_engine.types import Problem

if TYPE_CHECKING:
    import transformers

# what `train_bpe` gives its tokenizers; the names and the pattern are Qwen2's
END_OF_TEXT, TURN_START, TURN_END = SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class Tokenizer(Protocol):
    """What rollout, evaluation and scoring ask of a tokenizer."""

    folder: Path | None  # with its files; None: it has none
    eos_id: int  # ends a text; always one of stop_ids
    stop_ids: tuple[int, ...]  # an answer ends with any of these
    vocab_size: int  # ids are in [0, vocab_size); the model may have more rows

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, none added before or after."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens, special tokens left out."""
        ...

    def encode_prompt(self, text: str, chat: bool) -> list[int]:
        """Tokens that a model is given to answer: the plain text, or with chat a user's turn for instruct models."""
        ...


class PromptTokens:
    """Prompts in tokens. Each is tokenised once, however often it is asked for.

    Example:
        encode = PromptTokens(tokenizer, chat=True)
        encode(problem)  # array("i", [...])
    """

    def __init__(self, tokenizer: Tokenizer, *, chat: bool) -> None:
        """chat: give each prompt as a user's turn, for instruct models."""
        self._tokenizer, self._chat = tokenizer, chat
        self._known: dict[str, array.array[int]] = {}  # four bytes a token, where a list takes 36

    def __call__(self, problem: Problem) -> array.array[int]:
        """The tokens that a model is given to answer this problem."""
        tokens = self._known.get(problem.prompt)
        if tokens is None:
            tokens = array.array("i", self._tokenizer.encode_prompt(problem.prompt, self._chat))
            self._known[problem.prompt] = tokens
        return tokens


class HFTokenizer:
    """A tokenizer folder in Hugging Face's format, read without a network.

    tokenizer.json alone decides how text becomes tokens. (transformers 5 rebuilds a Qwen2 tokenizer's pre-tokenizer
    from its own code, whatever the file says.) transformers is imported for the chat template only.

    An answer stops at the tokenizer's eos_token and at the eos_token_id of generation_config.json, or, where that is
    absent, of config.json. Special tokens that are written out in a text are read as such, as everywhere in
    Hugging Face's libraries. Ids that a model's padded vocabulary has beyond the tokenizer's decode to nothing.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Reads the folder.

        Args:
            folder: with tokenizer.json and tokenizer_config.json; config.json and generation_config.json are looked
                at when they are there.

        Raises:
            FileNotFoundError: no such folder, or no tokenizer.json in it.
            ValueError: a file that cannot be read, no token to stop at, an unknown or bad one, or more tokens than
                config.json's vocab_size; the message names the file.
        """
        from tokenizers import Tokenizer as Fast

        self.folder = Path(folder)
        path = self.folder / "tokenizer.json"
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder}: no such folder (tokenizers are read from local folders)")
        if not path.is_file():
            raise FileNotFoundError(f"{self.folder}: no tokenizer there (tokenizer.json is missing)")
        try:
            self._fast = Fast.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{path}: not a tokenizer ({error})") from None
        # a file that was saved by a training script may carry its limits, and would cut prompts silently
        self._fast.no_truncation()
        self._fast.no_padding()
        self.vocab_size: int = max(self._fast.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        _check_rows(self.folder, self.vocab_size)
        self.stop_ids: tuple[int, ...] = self._find_stops()
        self.eos_id: int = self.stop_ids[0]

    def _find_stops(self) -> tuple[int, ...]:
        stops: list[int] = []
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            token = _read(self.folder / name).get("eos_token")
            token = token.get("content") if isinstance(token, dict) else token
            if token is not None and not isinstance(token, str):
                raise ValueError(f"{self.folder / name}: eos_token must be a token's text, got {token!r}")
            if token is not None:
                found = self._fast.token_to_id(token)
                if found is None:
                    raise ValueError(f"{self.folder / name}: eos_token must be in tokenizer.json, got {token!r}")
                stops.append(found)
        for name in ("generation_config.json", "config.json"):
            ids = _read(self.folder / name).get("eos_token_id")
            if ids is None:
                continue
            for i in ids if isinstance(ids, list) else [ids]:
                if not isinstance(i, int) or isinstance(i, bool) or i < 0:
                    raise ValueError(f"{self.folder / name}: eos_token_id must be an id, or a list of ids, got {ids!r}")
                stops.append(i)
            break
        if not stops:
            raise ValueError(f"{self.folder / 'tokenizer_config.json'}: eos_token must name a token, got none")
        return tuple(dict.fromkeys(stops))  # each once, the tokenizer's own first

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, none added before or after.

        Args:
            text: any; "" gives [].

        Returns:
            Ids in [0, vocab_size).

        Raises:
            TypeError: not a str.
        """
        return self._fast.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some tokens, special tokens left out.

        Args:
            ids: each >= 0. Bytes that are no UTF-8 decode to U+FFFD.

        Returns:
            A text.
        """
        return self._fast.decode(list(ids), skip_special_tokens=True)

    def encode_prompt(self, text: str, chat: bool) -> list[int]:
        """What a model is given to answer a problem.

        Args:
            text: the problem's prompt.
            chat: as a user's turn of the folder's chat template, followed by the head of the assistant's turn,
                instead of the plain text, which has what tokenizer.json puts around a text: Llama 3's begin of text,
                nothing in Qwen's.

        Returns:
            Ids.

        Raises:
            ValueError: chat, and the folder has no chat template, or one that fails.
        """
        if not chat:
            return self._fast.encode(text, add_special_tokens=True).ids
        if self.templates.chat_template is None:
            raise ValueError(f"{self.folder}: no chat template there, as a base model's tokenizer; wanted one for chat")
        turn = [{"role": "user", "content": text}]
        try:
            rendered = self.templates.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program, and may raise anything
            raise ValueError(f"{self.folder}: the chat template failed: {error}") from error
        return self.encode(rendered)

    @functools.cached_property
    def templates(self) -> transformers.PreTrainedTokenizerBase:
        """The folder's tokenizer as transformers reads it, for its chat templates alone."""
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(str(self.folder), local_files_only=True)
        except Exception as error:  # of many kinds, few of which name the folder
            raise ValueError(f"{self.folder}: transformers cannot read the tokenizer: {error}") from error


def train_bpe(texts: Iterable[str], *, vocab_size: int, folder: str | os.PathLike[str]) -> HFTokenizer:
    """Trains a byte-level BPE tokenizer and saves it in Hugging Face's format.

    Qwen2's in all but the merges: NFC, its split into words with single digits, ChatML as the chat template. For
    models that come without a tokenizer: any text can be encoded, and is decoded to its NFC form. The same texts
    give the same files, on any number of threads. Sennrich et al. 2016, https://arxiv.org/abs/1508.07909.

    Args:
        texts: to learn merges from.
        vocab_size: tokens wanted, the 256 bytes and 3 special ones included; few texts may give fewer.
        folder: where tokenizer.json, tokenizer_config.json and generation_config.json are put; made when absent.

    Returns:
        The tokenizer, read back from the folder.

    Raises:
        ValueError: vocab_size below 259, or above the vocab_size of a config.json that is in the folder.
        OSError: it cannot be written.
    """
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Fast

    least = 256 + len(SPECIAL_TOKENS)
    if vocab_size < least:
        raise ValueError(f"train_bpe: vocab_size must be >= {least} (bytes and special tokens), got {vocab_size}")
    folder = Path(folder)
    _check_rows(folder, vocab_size)
    fast = Fast(models.BPE())
    fast.normalizer = normalizers.NFC()
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    fast.train_from_iterator(texts, trainer)

    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "additional_special_tokens": [TURN_START, TURN_END],
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    stops = {"eos_token_id": [fast.token_to_id(END_OF_TEXT), fast.token_to_id(TURN_END)]}
    for name, content in (
        ("tokenizer_config.json", json.dumps(settings, indent=1)),
        ("generation_config.json", json.dumps(stops, indent=1)),
        ("tokenizer.json", fast.to_str(pretty=True)),  # last: without it the folder holds no tokenizer
    ):
        files.write_bytes_atomic(folder / name, (content + "\n").encode())
    return HFTokenizer(folder)


def _read(path: Path) -> dict[str, Any]:
    return jsonl.read_object(path) if path.is_file() else {}


def _check_rows(folder: Path, tokens: int) -> None:
    rows = _read(folder / "config.json").get("vocab_size", tokens)
    if not isinstance(rows, int) or isinstance(rows, bool):
        raise ValueError(f"{folder / 'config.json'}: vocab_size must be an integer, got {rows!r}")
    if rows < tokens:
        raise ValueError(f"{folder}: the model of config.json has vocab_size={rows}, too few rows for {tokens} tokens")
