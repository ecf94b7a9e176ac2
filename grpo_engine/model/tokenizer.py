"""Text to tokens and back: the embedded study's own tokenizer, or a Hugging Face folder."""

from __future__ import annotations

import array
import functools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from grpo_engine.records import jsonl
from grpo_engine.system import files
from grpo_engine.types import Message, Problem

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

    eos_id: int  # ends a text; always one of stop_ids
    stop_ids: tuple[int, ...]  # an answer ends with any of these
    vocab_size: int  # ids are in [0, vocab_size); the model may have more rows

    @property
    def folder(self) -> Path | None:
        """With its files; None: it has none."""
        ...

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, none added before or after."""
        ...

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of tokens, with special tokens or without."""
        ...

    def encode_prompt(self, text: str, chat: bool) -> list[int]:
        """Tokens that a model is given to answer: the plain text, or with chat a user's turn for instruct models."""
        ...

    def encode_chat(self, messages: Sequence[Message], **arguments: Any) -> list[int]:
        """Tokens of messages in the chat template, which gets the arguments, up to where the model goes on."""
        ...


class PromptTokens:
    """Prompts in tokens. Each is tokenised once, however often it is asked for.

    Example:
        encode = PromptTokens(tokenizer, chat=True)
        encode(problem)  # array("i", [...])
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        chat: bool,
        system_prompt: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        prompt_template: str | None = None,
    ) -> None:
        """What stands around a problem's prompt.

        Args:
            tokenizer: of the model.
            chat: give the messages of a problem, or its prompt as a user's turn, through the chat template. Else the text
                is given as it is: of several messages their contents with an empty line between.
            system_prompt: a first message, in place of the problem's own system message if it has one.
            chat_template_kwargs: further arguments of the chat template; with chat alone.
            prompt_template: text whose "{prompt}" is replaced by the prompt; without chat alone.
        """
        self._tokenizer, self._chat = tokenizer, chat
        self._system_prompt, self._prompt_template = system_prompt, prompt_template
        self._arguments = dict(chat_template_kwargs or {})
        # by what is encoded; four bytes a token, where a list takes 36
        self._known: dict[str | tuple[Message, ...], array.array[int]] = {}

    def __call__(self, problem: Problem) -> array.array[int]:
        """The tokens that a model is given to answer this problem."""
        key = problem.messages or problem.prompt
        tokens = self._known.get(key)
        if tokens is None:
            tokens = self._known[key] = array.array("i", self._encode(problem))
        return tokens

    def show(self, problem: Problem, *, most: int | None = None) -> str:
        """What a model is given to answer this problem, for a person to read.

        Args:
            problem: any.
            most: tokens that are listed, the first and the last; None: all.

        Returns:
            The text with its special tokens, and below it each token's id and text.
        """
        ids = list(self(problem))
        listed = [f"{i} {self._tokenizer.decode([i], special=True)!r}" for i in ids]
        if most is not None and len(ids) > most:
            listed[most // 2 : len(ids) - most // 2] = [f"({len(ids) - most // 2 * 2} more)"]
        text = self._tokenizer.decode(ids, special=True)
        return f"first prompt ({problem.uid}), {len(ids)} tokens:\n{text}\ntokens: {', '.join(listed)}"

    def _encode(self, problem: Problem) -> list[int]:
        messages = problem.messages or (Message("user", problem.prompt),)
        if self._system_prompt is not None:
            messages = (Message("system", self._system_prompt), *(m for m in messages if m.role != "system"))
        if not self._chat:
            text = problem.prompt
            if self._system_prompt is not None:
                text = "\n\n".join(m.content for m in messages if m.content)
            if self._prompt_template is not None:
                text = self._prompt_template.replace("{prompt}", text)
            return self._tokenizer.encode_prompt(text, False)
        if [m.role for m in messages] == ["user"] and not self._arguments:
            return self._tokenizer.encode_prompt(messages[0].content, True)
        return self._tokenizer.encode_chat(messages, **self._arguments)


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

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of some tokens.

        Args:
            ids: each >= 0. Bytes that are no UTF-8 decode to U+FFFD.
            special: write special tokens out instead of leaving them out.

        Returns:
            A text.
        """
        return self._fast.decode(list(ids), skip_special_tokens=not special)

    def encode_prompt(self, text: str, chat: bool) -> list[int]:
        """What a model is given to answer a problem.

        Args:
            text: the problem's prompt.
            chat: as a user's turn of the folder's chat template, followed by the head of the assistant's turn,
                instead of the plain text. That has before it what tokenizer.json puts there, Llama 3's begin of text and
                nothing in Qwen's, unless the text begins with it. A token that ends texts is not put behind it.

        Returns:
            Ids.

        Raises:
            ValueError: chat, and the folder has no chat template, or one that fails.
        """
        if chat:
            return self.encode_chat([Message("user", text)])
        ids, (before, after) = self.encode(text), self._around
        return [*before * (ids[: len(before)] != before), *ids, *after]

    @functools.cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        """The tokens that tokenizer.json puts before a text and, but for those that end texts, behind it."""
        bare, whole = self.encode("a"), self._fast.encode("a", add_special_tokens=True).ids
        first = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
        return whole[:first], [i for i in whole[first + len(bare) :] if i not in self.stop_ids]

    def encode_chat(self, messages: Sequence[Message], **arguments: Any) -> list[int]:
        """What a model is given to go on with a chat.

        Args:
            messages: at least one. The head of the assistant's turn follows them; if the last is the assistant's, it is
                left open to be gone on with.
            **arguments: of the chat template, as enable_thinking of Qwen3's.

        Returns:
            Ids.

        Raises:
            ValueError: no chat template, one that fails, or one that does not read an argument.
        """
        if self.templates.chat_template is None:
            raise ValueError(f"{self.folder}: no chat template there, as a base model's tokenizer; wanted one for chat")
        template, goes_on = self.templates.get_chat_template(), messages[-1].role == "assistant"
        for name in arguments:
            if not re.search(rf"\b{re.escape(name)}\b", template):
                raise ValueError(f"{self.folder}: the chat template reads no {name!r}; got it as an argument for it")
        try:
            rendered = self.templates.apply_chat_template(
                [m._asdict() for m in messages], tokenize=False, add_generation_prompt=not goes_on,
                continue_final_message=goes_on, **arguments,
            )  # fmt: skip
        except Exception as error:  # a template is a program, and may raise anything
            roles = ", ".join(m.role for m in messages)
            raise ValueError(f"{self.folder}: the chat template failed: {error} (roles: {roles})") from error
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
