"""The tokenizer of the embedded models: one token a word."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from grpo_engine.micro.facts import ASSISTANT, EOS, PAD, SPECIAL, USER, VOCABULARY
from grpo_engine.system import files
from grpo_engine.types import Message

CHAT_TEMPLATE = (  # what `MicroTokenizer.encode_prompt` makes of a user's turn
    "{% for message in messages %}"
    f"{{% if message['role'] == 'user' %}}{{{{ '{USER} ' + message['content'] }}}}"
    f"{{% else %}}{{{{ ' {ASSISTANT} ' + message['content'] + ' {EOS} ' }}}}{{% endif %}}{{% endfor %}}"
    f"{{% if add_generation_prompt %}}{{{{ ' {ASSISTANT}' }}}}{{% endif %}}"
)


class MicroTokenizer:
    """One token a word; words are separated by single spaces.

    Example: encode("7 +8 =") gives three ids, and decode of them gives the text back. Special tokens are never
    decoded: decode of an answer with its stop token is the answer's text.
    """

    name = "micro"
    folder = None

    def __init__(self) -> None:
        self._ids = {word: i for i, word in enumerate(VOCABULARY)}
        self.eos_id = self._ids[EOS]
        self.stop_ids: tuple[int, ...] = (self.eos_id,)
        self.vocab_size = len(VOCABULARY)

    def encode(self, text: str) -> list[int]:
        """The ids of a text's words.

        Args:
            text: words of `VOCABULARY`, separated by spaces; "" gives [].

        Returns:
            One id a word.

        Raises:
            ValueError: a word outside the vocabulary, named.
        """
        try:
            return [self._ids[word] for word in text.split()]
        except KeyError as e:
            raise ValueError(f"MicroTokenizer.encode: {e.args[0]!r} in {text!r} is no word of the micro tasks") from None

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """The words of some ids.

        Args:
            ids: each in [0, vocab_size).
            special: write special tokens out instead of leaving them out.

        Returns:
            The words joined by single spaces.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        words = []
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"MicroTokenizer.decode: ids must be in [0, {self.vocab_size}), got {i}")
            if special or i >= len(SPECIAL):
                words.append(VOCABULARY[i])
        return " ".join(words)

    def encode_prompt(self, text: str, chat: bool) -> list[int]:
        """What a model is given to answer a problem.

        Args:
            text: the problem's prompt.
            chat: as a user's turn, for instruct models, instead of the bare text.

        Returns:
            Ids; with `chat` two special tokens more.

        Raises:
            ValueError: as for `encode`.
        """
        ids = self.encode(text)
        return [self._ids[USER], *ids, self._ids[ASSISTANT]] if chat else ids

    def encode_chat(self, messages: Sequence[Message], **arguments: object) -> list[int]:
        """A user's only message, as `encode_prompt` of a chat.

        Raises:
            ValueError: other messages, or arguments: the embedded models have seen neither.
        """
        roles = [m.role for m in messages]
        if roles != ["user"] or arguments:
            raise ValueError(f"MicroTokenizer.encode_chat: wanted a user's only message, got {roles} and {arguments}")
        return self.encode_prompt(messages[0].content, True)


def save_tokenizer(folder: str | os.PathLike[str]) -> None:
    """Saves the tokenizer in Hugging Face's format, so that a model's folder can be loaded elsewhere.

    `MicroTokenizer` and these files give every text of the micro tasks the same ids. They differ for a word outside the
    vocabulary: `MicroTokenizer` names it, and the `tokenizers` library fails for want of an unknown token. Load them with
    `HFTokenizer` or transformers' `PreTrainedTokenizerFast`. transformers 5's `AutoTokenizer` ignores them: for every
    folder whose model_type is qwen2 it builds Qwen2's own splitting of text.

    Args:
        folder: where tokenizer.json and tokenizer_config.json are put.

    Raises:
        OSError: it cannot be written.
    """
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    # without an unknown token, so that the vocabulary is the model's and a wrong word is an error
    fast = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "pad_token": PAD,
        "additional_special_tokens": [USER, ASSISTANT],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    for name, text in (
        ("tokenizer_config.json", json.dumps(settings, indent=1)),
        ("tokenizer.json", fast.to_str(pretty=True)),  # last: without it the folder holds no tokenizer
    ):
        files.write_bytes_atomic(Path(folder) / name, (text + "\n").encode())
