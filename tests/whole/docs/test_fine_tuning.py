"""docs/fine-tuning.md: every piece of Python runs, and the commands do what it says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from click.testing import CliRunner
from peft import PeftModel

import loftq_cli
from loftq_cli.cli.commands import main
from tests.support import models

ROOT = Path(__file__).parents[3]
DOCUMENT = (ROOT / "docs" / "fine-tuning.md").read_text("utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", DOCUMENT, flags=re.DOTALL)
COMMANDS = re.findall(r"^ {4}loftq (.*)$", DOCUMENT, flags=re.MULTILINE)
WORDS = ("the", "cat", "dog", "sat", "ran", "on", "to", "a", "mat", "house")

pytestmark = [
    # The name that every transformers 5 knows.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning"),
]


def save_tokenizer(directory: Path) -> None:
    """A tokenizer that knows ten words."""
    vocabulary = {word: number for number, word in enumerate(("<pad>", "<eos>", "<unk>", *WORDS))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "<unk>"))
    tokenizer.add_special_tokens(["<pad>", "<eos>", "<unk>"])
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>", pad_token="<pad>"
    ).save_pretrained(directory)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A directory with what the document takes for granted: out/, encoder/ and train.txt."""
    directory = tmp_path_factory.mktemp("fine-tuning")
    settings: dict[str, Any] = {"bits": 2, "rank": 4, "iters": 1, "threads": 1, "layout": "loftq"}
    for model, output in ((models.llama(), "out"), (models.bert(), "encoder")):
        source = models.save(model, directory / f"{output}-source")
        save_tokenizer(source)
        loftq_cli.convert(source, output=directory / output, **settings)
    lines = [f"the {a} sat on {b}" for a in ("cat", "dog") for b in ("a mat", "the house", "a dog")]
    (directory / "train.txt").write_text("\n\n".join(lines * 4), "utf-8")
    return directory


@pytest.fixture(scope="module")
def ran(workplace) -> list[dict[str, object]]:
    """The names that each piece of Python leaves behind."""
    torch.manual_seed(0)
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace)
        for block in BLOCKS:
            names: dict[str, object] = {}
            exec(compile(block, "fine-tuning.md", "exec"), names)
            results.append(names)
    return results


def trained_parameters(model) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_every_piece_runs(ran):
    assert len(ran) == 6
    assert all(isinstance(names["model"], PeftModel) for names in ran)


def test_both_ways_of_loading_give_the_same_model(ran):
    first, second = ran[0]["model"], ran[1]["model"]
    assert trained_parameters(first) == trained_parameters(second)
    state = second.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in first.state_dict().items())


def test_the_script_learns(ran):
    start, trained = ran[0]["model"].eval(), ran[4]["model"].eval()
    before, after = start.state_dict(), trained.state_dict()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if "lora_" in name}
    rows = [torch.tensor([row["input_ids"]]) for row in ran[3]["rows"]]
    with torch.no_grad():
        losses = [
            sum(model(row, labels=row).loss for row in rows) / len(rows)
            for model in (start, trained)
        ]
    assert losses[1] < losses[0]


def test_merging_gives_the_trained_model(ran, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    assert COMMANDS
    for command in COMMANDS:
        result = CliRunner().invoke(main, shlex.split(command))
        assert result.exit_code == 0, result.output
    merged = transformers.AutoModelForCausalLM.from_pretrained("merged")
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        expected = ran[4]["model"].eval()(tokens).logits
        torch.testing.assert_close(merged(tokens).logits, expected, rtol=1e-4, atol=1e-4)
