"""Which files travel with the weights, from a directory and from the hub, and which stay behind."""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from loftq_cli.checkpoint.companions import companions, copy_companions, is_companion
from loftq_cli.checkpoint.locate import locate
from loftq_cli.checkpoint.request import Request
from loftq_cli.checkpoint.source import Source
from loftq_cli.errors import CorruptFileError, SourceNotFoundError
from loftq_cli.layouts import adapter
from tests.support import checkpoints
from tests.support.hub_fixtures import cache, server
from tests.support.makers import POINTER

__all__ = ["cache", "server"]

POOLING = {
    "idx": 1,
    "name": "1",
    "path": "1_Pooling",
    "type": "sentence_transformers.models.Pooling",
}
DENSE = {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
NORMALIZE = {
    "idx": 3,
    "name": "3",
    "path": "3_Normalize",
    "type": "sentence_transformers.Normalize",
}
ROOT = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
PIPELINE = [ROOT, POOLING, DENSE, NORMALIZE]

COPIED = {
    "additional_chat_templates/rag.jinja": b"{{ messages }}",
    "chat_template.jinja": b"{{ messages }}",
    "LICENSE": b"a licence",
    "Notice.txt": b"a notice",
    "USE_POLICY.md": b"a policy",
    "gemma_terms_of_use.md": b"terms",
    "qwen.tiktoken": b"YQ== 0",
    "source.spm": b"a model",
    "target.spm": b"a model",
    "tekken.json": b"{}",
    "tokenizer.model.v3": b"a model",
    "video_preprocessor_config.json": b"{}",
    "config_sentence_transformers.json": b"{}",
    "sentence_bert_config.json": b"{}",
    "modules.json": json.dumps(PIPELINE).encode(),
    "1_Pooling/config.json": b"{}",
    "2_Dense/config.json": b"{}",
    "2_Dense/model.safetensors": b"small weights",
}
LEFT = {
    "README.md": b"a card",
    "modeling_x.py": b"raise SystemExit",
    "pytorch_model.bin": b"a pickle",
    "trainer_state.json": b"{}",
    "1_Pooling/pooling.py": b"raise SystemExit",
    "2_Dense/pytorch_model.bin": b"a pickle",
    "onnx/model.onnx": b"a graph",
    "onnx/config.json": b"{}",
    "additional_chat_templates/notes.txt": b"notes",
}
SEEN_LEFT = tuple(sorted({name for name in LEFT if not name.startswith("onnx")} | {"onnx/"}))
HIDDEN = {".gitattributes": b"", ".cache/huggingface/x.json": b"{}"}


def model(directory: Path, files: dict[str, bytes]) -> Path:
    """A good checkpoint with these files beside it."""
    checkpoints.write(directory, checkpoints.llama())
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return directory


def opened(model: str | Path, **options: Any) -> Source:
    return locate(Request(str(model), **options), lambda line: None)


def failure(model: str | Path) -> CorruptFileError:
    with pytest.raises(CorruptFileError) as caught:
        opened(model)
    assert str(caught.value).isprintable()
    return caught.value


def names_in(tree: ast.AST) -> Iterator[str]:
    """The names of files in every VOCAB_FILES_NAMES of a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            targets = {target.id for target in node.targets if isinstance(target, ast.Name)}
            if "VOCAB_FILES_NAMES" in targets:
                for value in node.value.values:
                    if isinstance(value, ast.Constant) and isinstance(value.value, str):
                        yield value.value


def test_the_files_of_all_tokenizers_and_processors_of_transformers_are_copied():
    root = Path(transformers.__file__).parent
    found = {
        name
        for path in root.rglob("*token*.py")
        for name in names_in(ast.parse(path.read_text("utf-8")))
    }
    assert len(found) > 20
    utils = transformers.utils
    processors = {
        utils.FEATURE_EXTRACTOR_NAME,
        utils.IMAGE_PROCESSOR_NAME,
        utils.VIDEO_PROCESSOR_NAME,
        utils.AUDIO_TOKENIZER_NAME,
        utils.PROCESSOR_NAME,
        utils.GENERATION_CONFIG_NAME,
        utils.CHAT_TEMPLATE_FILE,
        utils.LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE,
        f"{utils.CHAT_TEMPLATE_DIR}/rag.jinja",
    }
    assert [name for name in sorted(found | processors) if not is_companion(name)] == []


@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "tokenizer.model", "LICENSE", "LICENSE.txt", "LICENCE-MODEL.pdf"),
        *("NOTICE", "USE_POLICY.md", "tokenizer.4.0.0.json", "ice_text.model", "vocab.bpe"),
        *("encoder.json", "bpe.codes", "dict.txt", "sentence_xlm-roberta_config.json"),
    ],
)
def test_companions(name):
    assert is_companion(name)


@pytest.mark.parametrize(
    "name",
    [
        *("LICENSE_model.py", "LICENSE.safetensors", "LICENSE/notes.txt", "onnx/config.json"),
        *("../config.json", "modeling.py", "model.safetensors", "adapter_config.json", ""),
        *("pytorch_model.bin", "model.safetensors.index.json", "vocab.py", "tokenizer.bin"),
        *("loftq_manifest.json", "additional_chat_templates/x.py", "README.md", "train.gin"),
        *("additional_chat_templates/a/x.jinja", "1_Pooling/config.json"),
    ],
)
def test_what_is_no_companion(name):
    assert not is_companion(name)


def test_what_is_copied_and_what_stays_behind(tmp_path):
    directory = model(tmp_path / "m", COPIED | LEFT | HIDDEN)
    assert companions(directory) == sorted(COPIED)
    copy_companions(directory, tmp_path / "out")
    assert checkpoints.files(tmp_path / "out") == dict(sorted(COPIED.items()))
    assert opened(directory).left_behind == SEEN_LEFT


def test_the_hub_s_files_are_the_same_ones(server, tmp_path):
    directory = model(tmp_path / "m", COPIED | LEFT | HIDDEN)
    server.publish("org/model", checkpoints.files(directory))
    source = opened("org/model")
    assert companions(source.directory) == sorted(COPIED)
    assert source.left_behind == SEEN_LEFT
    assert set(server.downloads()) <= {"config.json", *COPIED}
    for shard in source.shards:
        source.supply.ensure(shard.name)
    assert companions(opened("org/model", offline=True).directory) == sorted(COPIED)


def test_weights_of_another_format_stay_behind(tmp_path):
    directory = model(tmp_path / "m", {})
    save_file({"a": torch.zeros(1)}, directory / "model-00001-of-00002.safetensors")
    assert opened(directory).left_behind == ("model-00001-of-00002.safetensors",)


HOSTILE = ["../outside", "/etc", "a/../../b", "a//b", "..", "a\0b", "a\\b", "\ud800", "loftq_init"]


@pytest.mark.parametrize("path", [*HOSTILE, "model.safetensors"])
def test_a_module_lies_in_a_folder_below_the_directory(tmp_path, server, path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "config.json").write_text("{}")
    files = {"modules.json": json.dumps([ROOT, {**POOLING, "path": path}]).encode()}
    directory = model(tmp_path / "m", files)
    assert "not a folder that a module can have" in failure(directory).message
    server.publish("org/model", checkpoints.files(directory))
    assert "modules.json" in failure("org/model").message


def test_the_name_that_a_module_may_not_have_is_the_adapter_s():
    assert adapter.DIRECTORY in HOSTILE


@pytest.mark.parametrize("content", [b"{}", b"[1]", b'[{"path": 3}]'])
def test_a_modules_json_of_something_else_is_a_file_like_others(tmp_path, content):
    assert companions(model(tmp_path / "m", {"modules.json": content})) == ["modules.json"]


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 100_000])
def test_a_modules_json_that_is_no_json_is_an_error(tmp_path, content):
    error = failure(model(tmp_path / "m", {"modules.json": content}))
    assert "modules.json: not valid JSON" in error.message


@pytest.mark.parametrize(("entries", "others"), [(4, " and the 3 other modules"), (1, "")])
def test_a_pipeline_whose_model_lies_in_a_folder_says_which(tmp_path, server, entries, others):
    listed = [{**ROOT, "path": "0_Transformer"}, *PIPELINE[1:]][:entries]
    directory = tmp_path / "m"
    model(directory / "0_Transformer", {})
    (directory / "modules.json").write_text(json.dumps(listed))
    server.publish("org/model", checkpoints.files(directory))
    folder = directory / "0_Transformer"
    there = "download it (hf download org/model --local-dir DIR) and give DIR/0_Transformer"
    for place, give in ((str(directory), f"give {folder}"), ("org/model", there)):
        with pytest.raises(SourceNotFoundError) as caught:
            opened(place)
        assert caught.value.message.endswith("and its model lies in 0_Transformer")
        assert caught.value.hint.startswith(f"{give}; ")
        assert caught.value.hint.endswith(f"without modules.json{others}")
    assert opened(folder)


def test_a_module_may_lack_its_folder(tmp_path):
    files = {"modules.json": json.dumps(PIPELINE).encode()}
    assert companions(model(tmp_path / "m", files)) == ["modules.json"]


@pytest.mark.parametrize("linked", ["1_Pooling", "1_Pooling/config.json", "tokenizer.json"])
def test_what_is_copied_may_not_lead_out_of_the_directory(tmp_path, linked):
    directory = model(tmp_path / "m", COPIED | {"tokenizer.json": b"{}"})
    outside = tmp_path / "elsewhere"
    (directory / linked).rename(outside)
    (directory / linked).symlink_to(outside)
    assert "a link out of the directory, to " in failure(directory).message


@pytest.mark.parametrize("name", ["2_Dense/model.safetensors", "tokenizer.json"])
def test_what_is_copied_is_limited_in_size(tmp_path, name):
    directory = model(tmp_path / "m", COPIED)
    with (directory / name).open("w") as file:
        os.truncate(file.fileno(), 256_000_001)
    assert f"{name}: larger than 256 MB" in failure(directory).message


def test_what_is_copied_is_limited_in_number(tmp_path, server):
    many = {f"additional_chat_templates/{i}.jinja": b"" for i in range(1001)}
    directory = model(tmp_path / "m", many)
    assert "1001 files beside the weights to copy" in failure(directory).message
    server.publish("org/model", checkpoints.files(directory))
    assert "1001 files beside the weights to copy" in failure("org/model").message
    assert set(server.downloads()) == {"config.json"}


# Links


def test_links_that_all_lead_to_one_directory_name_it(tmp_path):
    real = model(tmp_path / "real", {"tokenizer.json": b"{}", "1_Pooling/config.json": b"{}"})
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in real.iterdir():
        (linked / path.name).symlink_to(path)
    error = failure(linked)
    assert error.hint.startswith(f"give {real}, where all of them lead; or ")
    assert f"cp -rL {linked} COPY" in error.hint
    assert opened(real)


def test_links_to_several_places_are_to_be_copied(tmp_path):
    directory = model(tmp_path / "m", {})
    for number, name in enumerate(("model.safetensors", "config.json")):
        place = tmp_path / str(number)
        place.mkdir()
        (directory / name).rename(place / name)
        (directory / name).symlink_to(place / name)
    assert f"cp -rL {directory} COPY" in failure(directory).hint
    assert "where all of them lead" not in failure(directory).hint


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "config.json",
        "tokenizer.json",
        "modules.json",
        "1_Pooling",
        "1_Pooling/config.json",
    ],
)
def test_a_link_to_nothing_is_named_with_its_target(tmp_path, name):
    directory = model(tmp_path / "m", COPIED)
    if name.startswith(("model", "pytorch")):
        (directory / "model.safetensors").unlink()
    if (directory / name).exists():
        (directory / name).rename(tmp_path / "moved")
    (directory / name).symlink_to("../gone")
    error = failure(directory)
    assert error.message == f"{directory}: {name}: a link to nothing, ../gone"
    assert "put back" in error.hint


def test_a_shard_that_is_a_link_to_nothing_is_named_once(tmp_path):
    directory = checkpoints.write(tmp_path / "m", checkpoints.llama(), cuts=(5,))
    shard = directory / "model-00002-of-00002.safetensors"
    shard.unlink()
    shard.symlink_to("gone")
    assert failure(directory).message == f"{directory}: {shard.name}: a link to nothing, gone"


def test_a_link_to_nothing_that_nobody_reads_is_no_fault(tmp_path):
    directory = model(tmp_path / "m", {})
    for name in ("pytorch_model.bin", "README.md"):
        (directory / name).symlink_to("gone")
    assert opened(directory)


# Pointers of git-lfs


@pytest.mark.parametrize(
    "names",
    [
        ["model.safetensors"],
        ["config.json"],
        ["tokenizer.json"],
        ["modules.json"],
        ["2_Dense/model.safetensors"],
        ["model.safetensors", "tokenizer.json"],
    ],
)
def test_pointers_of_git_lfs_are_named_and_what_to_do(tmp_path, names):
    directory = model(tmp_path / "m", COPIED | dict.fromkeys(names, POINTER))
    error = failure(directory)
    assert "of git-lfs, not the contents" in error.message
    assert names[0] in error.message
    assert "git lfs pull" in error.hint
    assert "hf download" in error.hint


@pytest.mark.parametrize(
    "name", ["model.safetensors.index.json", "model-00002-of-00002.safetensors"]
)
def test_so_are_those_of_an_index_and_its_shards(tmp_path, name):
    directory = checkpoints.write(tmp_path / "m", checkpoints.llama(), cuts=(5,))
    (directory / name).write_bytes(POINTER)
    error = failure(directory)
    assert f"{name} is a pointer of git-lfs" in error.message


def test_pickled_weights_that_are_pointers_are_no_pickles_yet(tmp_path):
    directory = model(tmp_path / "m", {"pytorch_model.bin": POINTER})
    assert opened(directory)  # nobody reads them
    (directory / "model.safetensors").unlink()
    assert "pytorch_model.bin is a pointer of git-lfs" in failure(directory).message


def test_many_pointers_are_counted(tmp_path):
    directory = checkpoints.write(tmp_path / "m", checkpoints.llama(), cuts=(2, 4, 6, 8))
    for path in directory.glob("*.safetensors"):
        path.write_bytes(POINTER)
    assert "and 2 more are pointers of git-lfs" in failure(directory).message


def test_a_text_that_only_begins_like_a_pointer_is_none(tmp_path):
    directory = model(tmp_path / "m", {"LICENSE": POINTER + b"x" * 1024, "NOTICE": b"version"})
    assert opened(directory)
