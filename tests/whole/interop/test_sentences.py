"""A pipeline of sentence-transformers is one after a conversion, a merge, and on the hub."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import loftq_cli
from loftq_cli.machine.observer import Observer
from loftq_cli.merging.merge import merge
from tests.support import models
from tests.support.contents import FAST, manifest

TEXTS = ["A mill stood still.", "Nobody knew why, or cared."]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real MiniLM with a dense layer behind its pooling, and a file that is no one's."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense

    directory = tmp_path_factory.mktemp("sentences") / "pipeline"
    original = tmp_path_factory.mktemp("minilm") / "model"
    shutil.copytree(models.minilm(), original)
    model = SentenceTransformer(str(original), device="cpu")
    torch.manual_seed(0)
    model.append(Dense(384, 32))
    model.save(str(directory), create_model_card=False)
    (directory / "README.md").write_text("a card")
    return directory


def embedded(directory: Path) -> torch.Tensor:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(directory), device="cpu")
    found = model.encode(TEXTS, convert_to_tensor=True)
    assert isinstance(found, torch.Tensor)
    return found.float()


def test_the_outputs_compute_what_the_pipeline_computes(pipeline: Path, tmp_path: Path) -> None:
    expected = embedded(pipeline)
    assert expected.shape == (2, 32)
    output = tmp_path / "out"
    loftq_cli.convert(pipeline, output, layout="dense", bits=8, **FAST)
    names = {entry["name"] for entry in manifest(output)["outputs"]}
    copied = {"modules.json", "1_Pooling/config.json", "sentence_bert_config.json"}
    dense = {path.relative_to(pipeline).as_posix() for path in pipeline.glob("*Dense/*")}
    assert len(dense) == 2
    assert copied | dense | {"config_sentence_transformers.json"} <= names
    assert "README.md" not in names
    assert loftq_cli.inspect(output, verify=True)["verified_files"] == len(names)
    assert loftq_cli.error_report(output, pipeline)["recomputed"]
    merge(output, tmp_path / "merged", observer=Observer())
    for directory in (output, tmp_path / "merged"):
        found = embedded(directory)
        assert torch.nn.functional.cosine_similarity(found, expected).min() > 0.99
