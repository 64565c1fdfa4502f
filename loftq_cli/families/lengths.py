"""How long a text a model takes, as its config.json tells."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

_LIMITS = (
    *("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length"),
    *("max_encoder_position_embeddings", "max_decoder_position_embeddings"),
    "max_target_positions",
)
_NO_LIMIT = 1_000_000  # tokenizers without a limit have one far above
_OF_TEXT = re.compile(r"text|llm|language|thinker|^encoder$|^decoder$")


def limits(config: Mapping[str, Any]) -> Iterator[int]:
    """The longest texts that a config.json, and its parts that are of text, tell of, in tokens."""
    for limit in map(config.get, _LIMITS):
        if isinstance(limit, int) and is_limit(limit):
            yield limit
    for name, part in config.items():
        if isinstance(part, Mapping) and _OF_TEXT.search(name):
            yield from limits(part)


def is_limit(length: int) -> bool:
    """Whether this is not what is written if there is no limit."""
    return 0 < length < _NO_LIMIT
