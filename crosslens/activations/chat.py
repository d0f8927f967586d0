"""Conversations as token ids, by the tokenizer's own chat template, and whose every token is.

1. The template renders the conversation as one text, which is tokenised as transformers does it.
2. What one message contributes is found by rendering the conversation again with another content in its place: what
   stays the same before and behind are the template's own words, and the rest is the content as the template writes it.
   A token belongs to the message whose content it overlaps; the template's own tokens belong to none.
3. Templates that mark what the assistant generates (`{% generation %}`) are taken at their word for the role
   `assistant`, which usually adds the token that ends its turn.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from crosslens.errors import UserError, first_line, shortened

COLUMNS = ("messages", "conversations")
"""Columns of conversations, which are read where a table has no column `text`."""
_NAMES = {"human": "user", "gpt": "assistant"}  # of ShareGPT's `from`
_FILLERS = ("\ue000", "\ue001")
"""Characters for private use, which stand for another content: one that the conversation lacks."""
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

Message = dict[str, str]


def read_messages(item: Any) -> list[Message] | None:
    """The messages of a conversation, as role and content; None if the item is no conversation.

    A conversation is a list of {"role", "content"} or {"from", "value"}, or these lists in one dictionary.
    """
    if isinstance(item, Mapping) and item and all(isinstance(value, Sequence) for value in item.values()):
        item = [dict(zip(item, row, strict=False)) for row in zip(*item.values(), strict=False)]
    if isinstance(item, np.ndarray) and item.dtype == object:  # of a parquet file
        item = item.tolist()
    if not isinstance(item, Sequence) or not item or not all(isinstance(message, Mapping) for message in item):
        return None
    found: list[Message] = []
    for message in item:
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise UserError(
                f"has the message {shortened(repr(dict(message)))}: give every message a role and a content, "
                "which is a text"
            )
        found.append({"role": _NAMES.get(role, role), "content": content})
    return found


def check_template(tokenizer: Any) -> None:
    """Refuse a tokenizer without a chat template.

    Raises:
        UserError: it has none.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "the models' tokenizer has no chat template, which conversations need: give texts, or a tokenizer with one "
            "(tokenizer.chat_template, saved with save_pretrained)"
        )


def encode(messages: list[Message], tokenizer: Any, *, whose: bool) -> tuple[list[int], list[str | None]]:
    """Token ids of a conversation, and the role of every token, or None where the template's own words are.

    Args:
        messages: role and content of each.
        tokenizer: of transformers, with a chat template.
        whose: whether roles are asked for; otherwise they are all None.

    Raises:
        UserError: the template refuses the conversation, or roles are asked of a slow tokenizer.
    """
    text = _render(messages, tokenizer)
    if not whose:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids, [None] * len(ids)
    if not tokenizer.is_fast:
        raise UserError("roles need a fast tokenizer, which says where its tokens are in the text: leave them out")
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    roles: list[str | None] = [None] * len(found["input_ids"])
    marked = bool(_GENERATION.search(str(tokenizer.chat_template)))
    for i, message in enumerate(messages):
        if marked and message["role"] == "assistant":
            continue
        start, end = _span(messages, i, text, tokenizer)
        for place, (first, last) in enumerate(found["offset_mapping"]):
            if first < end and last > start:
                roles[place] = message["role"]
    if marked:
        options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        for place, written in enumerate(tokenizer.apply_chat_template(messages, **options)["assistant_masks"]):
            roles[place] = "assistant" if written else roles[place]
    return found["input_ids"], roles


def _render(messages: Sequence[Message], tokenizer: Any) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # a template may raise anything
        raise UserError(f"is refused by the tokenizer's chat template: {first_line(error)}") from error


def _span(messages: list[Message], i: int, text: str, tokenizer: Any) -> tuple[int, int]:
    """Where the content of a message begins and ends in the text of its conversation."""
    filler = next((each for each in _FILLERS if each not in text), None)
    if filler is None:
        raise UserError(f"has the characters {' and '.join(map(repr, _FILLERS))}, which stand for other contents here")
    other = _render([*messages[:i], {**messages[i], "content": filler}, *messages[i + 1 :]], tokenizer)
    start = len(os.path.commonprefix([text, other]))
    behind = len(os.path.commonprefix([text[start:][::-1], other[start:][::-1]]))
    return start, len(text) - behind


def chosen(roles: Sequence[str | None], keep: Sequence[str] | None, drop: Sequence[str] | None) -> Bool[Tensor, " n"]:
    """Which tokens are of the roles to keep, and of none to leave out."""
    wanted = [(keep is None or role in keep) and role not in (drop or ()) for role in roles]
    return torch.tensor(wanted, dtype=torch.bool)
