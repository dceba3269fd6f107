"""Conversations and prompts: how they are written out as text, and which of their tokens are learnt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .reading import ConfigError

#: A message of a conversation: `role`, `content`, and what else the chat template reads.
Message = Mapping[str, Any]

#: Characters `[start, end)` of a text.
Span = tuple[int, int]

NOT_LEARNT = -100  # the label of tokens that have no loss, as models of transformers read it
ASSISTANT = "assistant"


def checked_messages(key: str, value: Any, expected: str) -> tuple[Message, ...]:
    """The messages of a row's column; columns that a format fills with nulls are left out.

    Raises:
        ConfigError: they are no list of messages, each with a role and a content that are strings.
    """
    if isinstance(value, Mapping):  # how datasets gives a column of lists of structs
        value = [dict(zip(value, of_one, strict=False)) for of_one in zip(*value.values(), strict=False)]
    if not isinstance(value, (list, tuple)) or not value:
        raise ConfigError.of(key, value, expected)
    for message in value:
        if not isinstance(message, Mapping) or not all(
            isinstance(message.get(name), str) for name in ("role", "content")
        ):
            raise ConfigError.of(key, message, f"{expected}, both of them strings")
    return tuple({name: part for name, part in message.items() if part is not None} for message in value)


def written(
    key: str, messages: Sequence[Message], tokenizer: Any, place: str, *, spans: bool = True
) -> tuple[str, list[Span]]:
    """A conversation as the tokenizer's chat template writes it, and the spans that the assistant would write.

    A span begins where the template asks for the assistant's message, and ends with the mark that closes it. Without
    `spans` there are none.

    Raises:
        ConfigError: the template refuses the messages, or writes the beginning of a conversation otherwise when more
            follows, so that no span can be told.
    """

    def of(count: int, asked: bool = False) -> str:
        try:
            return str(
                tokenizer.apply_chat_template(
                    list(map(dict, messages[:count])), tokenize=False, add_generation_prompt=asked
                )
            )
        except Exception as error:  # templates raise what they like, Jinja's errors among them
            raise ConfigError(
                f"{key}: got the messages of {place}, expected some that the tokenizer's chat template takes ({error})"
            ) from error

    whole, found = of(len(messages)), []
    for number, message in enumerate(messages):
        if not spans or message["role"] != ASSISTANT:
            continue
        before, after = of(number, asked=True), of(number + 1).rstrip()
        if not whole.startswith(before) or not whole.startswith(after) or len(after) <= len(before):
            raise ConfigError(
                f"{key}: got a chat template that writes the message {number} of {place} otherwise in a longer "
                "conversation, so that what the assistant would write cannot be told; expected learn: all, or texts "
                "that are written out, in the columns prompt and text"
            )
        found.append((len(before), len(after)))
    return whole, found


def labels(ids: Sequence[int], offsets: Sequence[Sequence[int]], spans: Sequence[Span]) -> list[int]:
    """The tokens that have a character in some span, and NOT_LEARNT for the others.

    Tokens without characters, such as an end token, are as the token before them.

    Args:
        ids: tokens.
        offsets: of each, the characters `[start, end)` of the text.
        spans: the characters that are learnt.
    """
    return list(_labels(ids, offsets, spans))


def _labels(ids: Sequence[int], offsets: Sequence[Sequence[int]], spans: Sequence[Span]) -> Iterator[int]:
    is_learnt = False
    for token, (start, end) in zip(ids, offsets, strict=True):
        if end > start:
            is_learnt = any(start < last and end > first for first, last in spans)
        yield token if is_learnt else NOT_LEARNT


def check_template(key: str, messages: str | None, tokenizer: Any) -> None:
    """Raises ConfigError where a source has conversations, and the tokenizer no chat template."""
    if messages is not None and not getattr(tokenizer, "chat_template", None):
        raise ConfigError.of(f"{key}.messages", messages, "null, because the tokenizer has no chat template")


def check_offsets(key: str, prompt: str | None, messages: str | None, has_offsets: bool) -> None:
    """Raises ConfigError where some tokens are not learnt, and the tokenizer does not say where tokens stand."""
    for name, column in (("prompt", prompt), ("messages", messages)):
        if column is not None and not has_offsets:
            raise ConfigError.of(
                f"{key}.{name}", column, "null, or learn: all, because the tokenizer has no offsets"
            )
