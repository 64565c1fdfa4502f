"""Text to windows of tokens."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import transformers

from loftq_cli.calibration import windows
from loftq_cli.calibration.windows import cut
from loftq_cli.errors import InputError, UsageError
from tests.support.models import CHARACTERS, FIRST_CHARACTER, save_tokenizer

TEXT = "".join(random.Random(0).choices(CHARACTERS[:60], k=180))  # no two windows are alike


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> transformers.PreTrainedTokenizerBase:
    directory: Path = save_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return transformers.AutoTokenizer.from_pretrained(directory)


def ids(text: str) -> list[int]:
    return [FIRST_CHARACTER + CHARACTERS.index(character) for character in text]


def test_windows_follow_one_another_with_special_tokens_around_each(tokenizer):
    found = cut(tokenizer, [TEXT[:100], TEXT[100:]], length=12, samples=None, seed=0)
    assert found.dtype == torch.int64
    assert found.shape == (18, 12)
    for number, window in enumerate(found.tolist()):
        assert window == [1, *ids(TEXT[10 * number : 10 * number + 10]), 2]


def test_samples_are_drawn_with_the_seed_and_kept_in_order(tokenizer):
    every = cut(tokenizer, [TEXT], length=7, samples=None, seed=0).tolist()
    drawn = [cut(tokenizer, [TEXT], length=7, samples=5, seed=seed).tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    for sample in drawn:
        places = [every.index(window) for window in sample]
        assert len(places) == 5
        assert places == sorted(set(places))


def test_no_more_than_128_are_taken_unasked(tokenizer):
    assert len(cut(tokenizer, [TEXT * 4], length=5, samples=None, seed=0)) == 128
    assert len(cut(tokenizer, [TEXT * 4], length=5, samples=200, seed=0)) == 200


def test_a_tokenizer_without_special_tokens(tokenizer, monkeypatch):
    monkeypatch.setattr(windows, "_special_tokens", lambda tokenizer: ([], []))
    found = cut(tokenizer, [TEXT], length=10, samples=None, seed=0)
    assert found.tolist() == [ids(TEXT[start : start + 10]) for start in range(0, 180, 10)]


def test_long_texts_are_tokenized_in_pieces_that_end_with_lines(tokenizer, monkeypatch):
    monkeypatch.setattr(windows, "_PIECE", 16)
    text = "one line of text\nand another\n" + "x" * 100 + "\nend"
    pieces = list(windows._pieces(text))
    assert "".join(pieces) == text
    assert pieces[0] == "one line of text\n"
    assert max(map(len, pieces)) <= 32
    found = cut(tokenizer, [text], length=12, samples=None, seed=0)
    assert found[:, 1:-1].flatten().tolist() == ids(text)[:130]


def test_too_little_text_says_how_much_there_is(tokenizer):
    with pytest.raises(InputError, match="190 tokens are needed, and it has 180"):
        cut(tokenizer, [TEXT], length=12, samples=19, seed=0)
    with pytest.raises(InputError, match="10 tokens are needed, and it has 5"):
        cut(tokenizer, ["short"], length=12, samples=None, seed=0)


def test_a_window_has_room_for_text(tokenizer):
    with pytest.raises(UsageError, match="--length 2: the special tokens alone are 2"):
        cut(tokenizer, [TEXT], length=2, samples=None, seed=0)
