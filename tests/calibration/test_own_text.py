"""Text that a model writes itself: samples of what it predicts, and beginnings of both kinds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from click.testing import CliRunner

import loftq_cli
from loftq_cli.calibration import own_text
from loftq_cli.checkpoint.source import open_source
from loftq_cli.cli.commands import main
from loftq_cli.errors import EnvironmentFailure, UnsupportedInputError
from loftq_cli.machine.observer import Observer
from tests.support import checkpoints, models
from tests.support.hub_server import HubServer

CHAT = "{% for m in messages %}({{ m['role'] }}){{ m['content'] }}{% endfor %}"
WORDS = ("--bits", "4", "--rank", "2", "--layout", "loftq", "--calibrate-text", "self", "-q")


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose predictions differ much from token to token, and little is asked of it."""
    monkeypatch.setattr(own_text, "PASSAGES", 40)
    monkeypatch.setattr(own_text, "LENGTH", 33)
    monkeypatch.chdir(tmp_path)
    llama = models.llama()
    llama.lm_head.weight.data *= 12
    model = models.save_tokenizer(models.save(llama, tmp_path / "model"))
    characters = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    characters.decoder = tokenizers.decoders.Fuse()
    characters.save(str(model / "tokenizer.json"))
    return model


def written(model: Path, path: Path) -> str:
    own_text.write(open_source(model), path, "cpu", Observer())
    return path.read_text()


def test_it_is_sampled_from_what_the_model_predicts(model: Path) -> None:
    predicting: Any = transformers.AutoModelForCausalLM.from_pretrained(model)
    starts = [[1], [1, 5, 6]]
    written = own_text.sampled(predicting, starts, torch.device("cpu"), Observer())
    passages = [torch.tensor(ids) for ids in written]
    assert [len(ids) for ids in passages] == [33] * 40
    assert [ids[:3].tolist() for ids in passages].count([1, 5, 6]) >= 20
    assert {int(ids[0]) for ids in passages} == {1}
    # At temperature 1, and only there, surprise is on average what the model expects of itself.
    differences = []
    for ids in passages[:20]:
        with torch.no_grad():
            likelihoods = predicting(ids[None]).logits[0, :-1].log_softmax(-1)
        surprise = -likelihoods.gather(1, ids[1:, None])[:, 0]
        expected = -(likelihoods.exp() * likelihoods).sum(-1)
        differences += (surprise - expected).tolist()
    found = torch.tensor(differences)
    assert expected.mean() < 2.5
    assert found.mean().abs() < 4 * found.std() / len(found) ** 0.5


def test_half_of_it_begins_with_a_users_turn(model: Path, tmp_path: Path) -> None:
    plain = written(model, tmp_path / "plain.txt")
    assert "(user)" not in plain
    assert written(model, tmp_path / "again.txt") == plain
    (model / "chat_template.jinja").write_text(CHAT)
    text = written(model, tmp_path / "chat.txt")
    assert text.count("(user)") == 20
    assert text.startswith("<s>")


def test_convert_measures_and_keeps_it(model: Path, tmp_path: Path) -> None:
    words = ["convert", "model", "-o", "out", *WORDS]
    dry = CliRunner().invoke(main, [*words[:-1], "--dry-run"])
    assert "the model writes its text first" in dry.stderr
    assert not list(tmp_path.glob("out*"))
    assert CliRunner().invoke(main, words).exit_code == 0
    (text,) = tmp_path.glob("out.self-*.txt")
    before = text.stat().st_mtime_ns
    again = CliRunner().invoke(main, [*words[:-1]])
    assert "nothing to do" in again.stderr
    assert text.stat().st_mtime_ns == before
    manifest = loftq_cli.convert(
        "model", "two", bits=4, rank=2, layout="loftq", calibrate_text="self"
    )
    first = json.loads((tmp_path / "out/loftq_manifest.json").read_text())
    assert manifest["outputs"] == first["outputs"]
    # Another model writes another text.
    llama = models.llama()
    models.save(llama, model)
    assert own_text.beside(tmp_path / "out", open_source(model)) != text


def test_a_model_on_the_hub_is_brought_before_it_writes(
    model: Path, tmp_path: Path, server: HubServer
) -> None:
    server.publish("org/model", checkpoints.files(model))
    manifests = [
        loftq_cli.convert(
            name, place, bits=4, rank=2, layout="loftq", threads=1, calibrate_text="self"
        )
        for name, place in (("org/model", "online"), (model, "local"))
    ]
    online, local = (path.read_text() for path in sorted(tmp_path.glob("*.self-*.txt")))
    assert online == local
    assert manifests[0]["outputs"] == manifests[1]["outputs"]


def test_what_does_not_write_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("bert", "bart"):
        models.save_tokenizer(models.save(getattr(models, kind)(), tmp_path / kind))
        with pytest.raises(UnsupportedInputError, match="does not write text"):
            written(tmp_path / kind, tmp_path / "a.txt")
    monkeypatch.setattr("loftq_cli.calibration.pretrained._WHOLE", 0.0)
    with pytest.raises(EnvironmentFailure, match="the whole model in the memory of cpu"):
        written(model, tmp_path / "a.txt")
    assert not list(tmp_path.glob("*.txt"))
