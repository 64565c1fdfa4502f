"""Text to windows of tokens, each as long as the other, so that nothing is padded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from loftq_cli.errors import InputError, UsageError

_PIECE = 1 << 16  # characters tokenized at once; some tokenizers slow down on longer texts
MOST_SAMPLES = 128  # unless asked otherwise


def cut(
    tokenizer: Any,
    texts: Sequence[str],
    *,
    length: int,
    samples: int | None,
    seed: int,
    most: int = MOST_SAMPLES,
) -> torch.Tensor:
    """``samples`` windows of ``length`` tokens, int64 (samples, length), in the order of the text.

    The texts are tokenized one behind the other and cut into windows that do not overlap, each
    with the special tokens that the model puts around a text. Which of them are taken is drawn
    with ``seed``; without ``samples``, all of them are, up to ``most``. Raises InputError if there
    are too few, UsageError for a length that has no room for text.
    """
    before, behind = _special_tokens(tokenizer)
    room = length - len(before) - len(behind)
    if room < 1:
        raise UsageError(f"--length {length}: the special tokens alone are {length - room}")
    ids: list[int] = []
    for text in texts:
        pieces = list(_pieces(text))
        found = tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"]
        ids += [token for piece in found for token in piece]
    count, least = len(ids) // room, samples or 1
    if count < least:
        raise InputError(
            f"the text is too short: {least * room} tokens are needed, and it has {len(ids)}",
            hint="give more text, or lower --samples or --length, which `loftq calibrate`, "
            "`refine` and `evaluate` take",
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    chosen = order[: samples or most].sort().values
    text_tokens = torch.tensor(ids[: count * room]).view(count, room)[chosen]
    around = [torch.tensor(part, dtype=torch.int64) for part in (before, behind)]
    first, last = (part.expand(len(chosen), -1) for part in around)
    return torch.cat([first, text_tokens, last], dim=1)


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and behind a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        stop = start + len(bare)
        if whole[start:stop] == bare:
            return whole[:start], whole[stop:]
    return [], []


def _pieces(text: str) -> Iterator[str]:
    """The text in parts of about _PIECE characters that end with a line, where lines end."""
    start = 0
    while start < len(text):
        stop = text.find("\n", start + _PIECE) + 1 or len(text)
        if stop - start > 2 * _PIECE:
            stop = start + 2 * _PIECE
        yield text[start:stop]
        start = stop
