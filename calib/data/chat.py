"""Rows of data sets -> text: a column of text, or a conversation as the model's own chat template writes it.

Two layouts of conversations are in use: ``messages`` of ``role`` and ``content`` (OpenAI, Hugging Face), and
``conversations`` of ``from`` and ``value`` (ShareGPT). Both go through the tokenizer's template: a chat model is then
calibrated on what it reads in service, its special tokens included.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from calib.checkpoint.json import quoted
from calib.errors import DataError, UsageError, unknown_name

__all__ = ["TEMPLATE_CHOICES", "RowReader", "check_template_choice", "require_characters"]

TEMPLATE_CHOICES = ("auto", "always", "never")
_TEXT = "text"
_CHATS = ("messages", "conversations")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}
_MOST_KEYS = 12
"""Keys of a row that a message shows."""


def check_template_choice(choice: object, option: str) -> None:
    """Refuse what is none of `TEMPLATE_CHOICES`; ``option`` is what the user calls it.

    Raises:
        UsageError: names the option and the choices.
    """
    if choice not in TEMPLATE_CHOICES:
        raise unknown_name(f"choice for {option}", str(choice), TEMPLATE_CHOICES)


@dataclasses.dataclass(frozen=True)
class RowReader:
    """How rows become text.

    Args:
        template: ``auto`` writes conversations by the chat template and takes texts as they are, ``always`` refuses
            rows that are no conversations, ``never`` joins the contents of a conversation's messages by empty lines.
        tokenizer: called for the tokenizer with the template when a conversation is met; ``None`` where there is no
            model.
    """

    template: str = "auto"
    tokenizer: Callable[[], Any] | None = None

    def text(self, row: Any, where: str, column: str | None = None, hint: str = "") -> tuple[str, bool]:
        """The text of a row, and whether a chat template wrote it.

        Args:
            row: a text, or a mapping of columns.
            where: file and line, for messages.
            column: the column to read; ``None`` takes ``text``, else ``messages`` or ``conversations``.
            hint: what else to do where there is no text, for the message.

        Raises:
            DataError: neither a text nor a conversation, half of a surrogate pair, a template that is missing or fails.
            UsageError: ``always``, and the row is no conversation.
        """
        name, value = self._value(row, where, column, hint)
        if isinstance(value, str):
            if self.template == "always":
                raise UsageError(
                    f"{where} is a text, and --calib-template always takes rows of messages only; "
                    "leave it at auto for texts."
                )
            return require_characters(value, where, name), False
        messages = _messages(value, where, name)
        if self.template == "never":
            return require_characters("\n\n".join(str(m["content"]) for m in messages), where, name), False
        for message in messages:  # before the template: some of them cut and strip
            require_characters(str(message["content"]), where, name)
        return require_characters(self._written(messages, where), where, name), True

    def _value(self, row: Any, where: str, column: str | None, hint: str) -> tuple[str, Any]:
        if isinstance(row, str) and column is None:
            return _TEXT, row
        if not isinstance(row, Mapping):
            raise DataError(f"{where} is neither an object of columns nor a text: {quoted(row)}. {_ADVICE}{hint}")
        order = (*_CHATS, _TEXT) if self.template == "always" else (_TEXT, *_CHATS)
        for name in order if column is None else (column,):
            value = row.get(name)
            if isinstance(value, str) or (isinstance(value, list | tuple) and len(value) > 0):
                return name, value
        keys = ", ".join(map(quoted, list(row)[:_MOST_KEYS])) + (" ..." if len(row) > _MOST_KEYS else "")
        lacking = _TEXT if column is None else column
        raise DataError(f"{where} has no text field {lacking!r}; its fields: {keys or 'none'}. {_ADVICE}{hint}")

    def _written(self, messages: list[dict[str, Any]], where: str) -> str:
        tokenizer = None if self.tokenizer is None else self.tokenizer()
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                f"{where} is a conversation, but this model's tokenizer has no chat template to write it with. Take an "
                "instruction-tuned model, give rows with a 'text', or (to calibrate) --calib-template never, which "
                "joins the contents of the messages as plain text."
            )
        assert tokenizer is not None  # for the type checker: None has no chat_template
        try:
            return str(tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception as error:  # templates raise what they like
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise DataError(
                f"{where}: the model's chat template refuses this conversation ({reason}). Mend its roles, or leave "
                "the row out."
            ) from error


_ADVICE = "Give each row a string 'text', or 'messages' of role and content"


def require_characters(text: str, where: str, field: str) -> str:
    """``text``, if it can be written as UTF-8; JSON can hold halves of surrogate pairs, which no tokenizer reads.

    Raises:
        DataError: names the half, its place and what to do.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: the field {field!r} has half of a surrogate pair (\\u{ord(text[error.start]):04x}) at character "
            f"{error.start}, which is no character: an emoji was cut there. Remove it, write \\ufffd in its place, or "
            "leave the row out."
        ) from error
    return text


def _messages(value: Any, where: str, name: str) -> list[dict[str, Any]]:
    """Messages of ``role`` and ``content`` from either layout."""
    found = []
    for number, message in enumerate(value):
        if not isinstance(message, Mapping):
            raise DataError(f"{where}: {name}[{number}] is not a message but {quoted(message)}. {_ADVICE}.")
        role, content = message.get("role"), message.get("content")
        if role is None and isinstance(message.get("from"), str):
            role, content = _SHAREGPT_ROLES.get(message["from"], message["from"]), message.get("value")
        if content is None and message.get("tool_calls"):
            content = ""  # what the assistant says is the call, which the template writes
        content = _plain(content)
        if not isinstance(role, str) or content is None:
            raise DataError(
                f"{where}: {name}[{number}] has no role and text content (nor from and value); its fields: "
                f"{', '.join(map(quoted, message)) or 'none'}. {_ADVICE}."
            )
        rest = {key: part for key, part in message.items() if key not in ("from", "value") and part is not None}
        found.append(rest | {"role": role, "content": content})
    return found


def _plain(content: Any) -> str | None:
    """The text of a message, whose content may be a list of parts; ``None`` if a part is no text (an image, say)."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list | tuple) and content else [None]
    texts = [part.get("text") if isinstance(part, Mapping) else None for part in parts]
    return "".join(map(str, texts)) if all(isinstance(text, str) for text in texts) else None
