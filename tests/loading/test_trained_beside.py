"""Trained adapters: load() attaches the one that it is asked for, and says where others lie, in the
directory of the conversion as well."""

from __future__ import annotations

import os
import shutil
import warnings

import peft
import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import loftq_cli
from loftq_cli.cli.commands import main
from loftq_cli.errors import (
    InputError,
    SourceNotFoundError,
    UnsupportedInputError,
    UsageError,
    VerificationError,
)
from loftq_cli.loading.trained_beside import TrainedBeside
from loftq_cli.machine.observer import Observer
from loftq_cli.merging.merge import merge
from tests.support import models

# peft asks transformers under a name that transformers is giving up.
CAUSAL = transformers.AutoModelForCausalLM
CLASSIFIER = transformers.AutoModelForSequenceClassification
TOKENS = torch.arange(12).view(2, 6) + 3
every_layout = pytest.mark.parametrize("layout", ["loftq", "bnb", "dense"])


def bits(layout: str) -> dict[str, int]:
    return {"bits": 4} if layout == "bnb" else {}


def changed(model):
    """``model``, with what can be trained at other values."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def logits(model):
    """In training mode: in evaluation bitsandbytes multiplies in bfloat16 where it can."""
    with torch.no_grad():
        return model.train()(TOKENS)[0]


class Remarks(Observer):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture
def left(converted, tmp_path):
    """``left(layout)``: a conversion that training wrote into, and the trained model."""

    def make(layout: str, place: str = "."):
        directory = shutil.copytree(
            converted("llama", layout=layout, **bits(layout)), tmp_path / "o"
        )
        model = changed(loftq_cli.load(directory))
        model.save_pretrained(directory / place)
        return directory, model

    return make


@every_layout
def test_an_adapter_beside_the_backbone_is_loaded_only_if_it_is_asked_for(
    left, converted, layout
) -> None:
    directory, trained = left(layout)
    start = logits(loftq_cli.load(converted("llama", layout=layout, **bits(layout))))
    with pytest.warns(TrainedBeside, match=r"the start in loftq_init is loaded; load\("):
        assert torch.equal(logits(loftq_cli.load(directory)), start)
    with warnings.catch_warnings():
        warnings.simplefilter("error", TrainedBeside)
        found = loftq_cli.load(directory, adapter=directory)
    assert torch.equal(logits(found), logits(trained))
    assert all(p.requires_grad for name, p in found.named_parameters() if "lora_" in name)


def test_transformers_attaches_it_by_itself_in_the_plain_way(left) -> None:
    directory, trained = left("loftq")
    with pytest.warns(TrainedBeside, match="transformers attaches by itself"):
        model = CAUSAL.from_pretrained(directory)
    assert torch.equal(logits(model), logits(trained))


def test_merge_takes_it_only_if_it_is_asked_for_and_says_that_it_is_there(left, tmp_path) -> None:
    directory, trained = left("loftq")
    remarks = Remarks()
    merge(directory, tmp_path / "start", observer=remarks)
    assert any("--adapter" in line and "trained adapter" in line for line in remarks.lines)
    merge(directory, tmp_path / "trained", adapter=directory, observer=Observer())
    merged = CAUSAL.from_pretrained(tmp_path / "trained")
    assert torch.allclose(logits(merged), logits(trained), rtol=0, atol=1e-5)
    merged = CAUSAL.from_pretrained(tmp_path / "start")
    assert not torch.allclose(logits(merged), logits(trained), rtol=0, atol=1e-2)


def test_an_adapter_in_the_place_of_the_start(left, tmp_path) -> None:
    directory, trained = left("loftq", "loftq_init")
    with pytest.raises(
        VerificationError, match=r"not the adapter that .* converted with"
    ) as caught:
        loftq_cli.load(directory)
    assert f"adapter='{directory / 'loftq_init'}'" in caught.value.hint
    found = loftq_cli.load(directory, adapter=directory / "loftq_init")
    assert torch.equal(logits(found), logits(trained))
    with pytest.raises(VerificationError, match="not the adapter that") as caught:
        merge(directory, tmp_path / "merged", observer=Observer())
    assert f"--adapter {directory / 'loftq_init'}" in caught.value.hint
    merge(directory, tmp_path / "merged", adapter=directory / "loftq_init", observer=Observer())
    merged = CAUSAL.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(merged), logits(trained), rtol=0, atol=1e-5)
    # Converting again would delete the trained adapter.
    result = CliRunner().invoke(main, ["inspect", "--verify", str(directory)])
    assert result.exit_code == 3
    assert "move it elsewhere first" in result.output


def test_adapters_in_folders_of_the_conversion_are_named_the_newest_of_them(left, tmp_path) -> None:
    directory, trained = left("loftq", "checkpoint-5")
    trained.save_pretrained(directory / "mine")
    (directory / "runs").mkdir()
    os.utime(directory / "mine/adapter_config.json", (0, 0))
    newest = directory / "checkpoint-5"
    with pytest.warns(TrainedBeside, match=rf"load\(.*adapter='{newest}'\) takes the trained one"):
        loftq_cli.load(directory)
    remarks = Remarks()
    merge(directory, tmp_path / "start", observer=remarks)
    assert any(f"--adapter {newest} takes the trained one" in line for line in remarks.lines)
    assert loftq_cli.inspect(directory)["trained_adapter"] == str(newest)
    assert torch.equal(logits(loftq_cli.load(directory, adapter=newest)), logits(trained))
    # A fault of another file does not advise to convert over them either.
    (directory / "generation_config.json").write_text("{}")
    with pytest.raises(VerificationError, match=f"{newest} holds another adapter"):
        loftq_cli.inspect(directory, verify=True)


def test_inspect_says_where_a_trained_adapter_lies(left, converted) -> None:
    assert "trained_adapter" not in loftq_cli.inspect(converted("llama"))
    directory, _ = left("dense")
    assert loftq_cli.inspect(directory)["trained_adapter"] == str(directory)
    shown = CliRunner().invoke(main, ["inspect", str(directory)]).output
    assert "trained adapter" in shown
    (directory / "adapter_config.json").unlink()
    changed(loftq_cli.load(directory)).save_pretrained(directory / "loftq_init")
    place = str(directory / "loftq_init")
    assert loftq_cli.inspect(directory)["trained_adapter"] == place


@pytest.mark.parametrize("layout", ["loftq", "dense"])
def test_a_trained_head_and_more_tokens_come_along(converted, layout, tmp_path) -> None:
    directory = converted("bert", layout=layout)
    model = loftq_cli.load(directory, CLASSIFIER, num_labels=3)
    changed(model).save_pretrained(tmp_path / "head")
    again = loftq_cli.load(directory, CLASSIFIER, adapter=tmp_path / "head", num_labels=3)
    with torch.no_grad():
        assert torch.equal(again.eval()(TOKENS).logits, model.eval()(TOKENS).logits)
    assert again.active_peft_config.modules_to_save == ["classifier"]
    directory = converted("llama", layout=layout)
    model = loftq_cli.load(directory)
    model.get_base_model().resize_token_embeddings(100)
    changed(model).save_pretrained(tmp_path / "more", save_embedding_layers=True)
    again = loftq_cli.load(directory, adapter=tmp_path / "more", trainable=False)
    assert torch.equal(logits(again), logits(model))
    assert not any(parameter.requires_grad for parameter in again.parameters())


def test_a_load_of_another_class_than_was_trained(converted, tmp_path) -> None:
    directory = converted("bert")
    bare = changed(loftq_cli.load(directory)).eval()
    bare.save_pretrained(tmp_path / "bare")
    task = loftq_cli.load(directory, CLASSIFIER, adapter=tmp_path / "bare").eval()
    with torch.no_grad():
        hidden = task(TOKENS, output_hidden_states=True).hidden_states[-1]
        assert torch.equal(hidden, bare(TOKENS).last_hidden_state)


def test_adapters_that_do_not_belong_to_the_backbone(converted, tmp_path) -> None:
    directory, other = converted("llama"), converted("llama", iters=2)
    with pytest.raises(SourceNotFoundError, match=r"no adapter_config\.json"):
        loftq_cli.load(directory, adapter=tmp_path)
    loftq_cli.load(other).save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="another conversion than"):
        loftq_cli.load(directory, adapter=tmp_path / "other")
    with pytest.raises(InputError, match=r"the start of .*, another conversion than"):
        loftq_cli.load(directory, adapter=other / "loftq_init")
    loftq_cli.load(directory, adapter=directory / "loftq_init")
    loftq_cli.load(directory).save_pretrained(tmp_path / "mine")
    file = tmp_path / "mine/adapter_model.safetensors"
    tensors = load_file(file)
    extra = {"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.zeros(4, 64)}
    save_file({**tensors, **extra}, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"LlamaForCausalLM has no place for .*layers\.9"):
        loftq_cli.load(directory, adapter=tmp_path / "mine")


@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")
def test_an_adapter_that_lacks_tensors_is_not_filled_up(converted, tmp_path) -> None:
    loftq_cli.load(converted("llama")).save_pretrained(tmp_path / "mine")
    file = tmp_path / "mine/adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("lora_B.weight"))
    del tensors[name]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(InputError, match=f"it lacks {name}"):
        loftq_cli.load(converted("llama"), adapter=tmp_path / "mine")


def test_an_adapter_that_is_a_pickle_is_named_as_one(converted, tmp_path) -> None:
    loftq_cli.load(converted("llama")).save_pretrained(tmp_path / "mine")
    file = tmp_path / "mine/adapter_model.safetensors"
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(UnsupportedInputError, match="only pickled weights"):
        loftq_cli.load(converted("llama"), adapter=tmp_path / "mine")


def test_trained_tokens_beyond_the_embedding_are_refused_with_what_to_do(
    converted, tmp_path
) -> None:
    base = CAUSAL.from_pretrained(converted("llama"))
    base.resize_token_embeddings(100)
    settings = {"target_modules": ["q_proj"], "trainable_token_indices": [3, 98]}
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, **settings))
    model.save_pretrained(tmp_path / "mine", save_embedding_layers=False)
    with pytest.raises(InputError, match=r"token 98 of .*embed_tokens', which has 96") as caught:
        loftq_cli.load(converted("llama"), adapter=tmp_path / "mine")
    assert "save_embedding_layers=True" in caught.value.hint


def test_a_class_that_has_no_input_embedding_of_its_own(tmp_path) -> None:
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 4, "hidden_size": 64}
    text = {**sizes, "vocab_size": 96, "intermediate_size": 128, "project_dim": 64}
    image = {**sizes, "image_size": 16, "patch_size": 8, "intermediate_size": 128}
    config = transformers.AltCLIPConfig(text_config=text, vision_config=image)
    source = models.save(transformers.AltCLIPModel(config), tmp_path / "source")
    loftq_cli.convert(source, tmp_path / "out", bits=2, rank=4, iters=1, threads=1, layout="loftq")
    trained = changed(loftq_cli.load(tmp_path / "out"))
    trained.save_pretrained(tmp_path / "mine", save_embedding_layers=False)
    again = loftq_cli.load(tmp_path / "out", adapter=tmp_path / "mine")
    state = trained.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())


def test_an_embedding_that_is_packed_says_that_it_cannot_be_resized_or_trained(converted) -> None:
    directory = converted("llama", embeddings=True)
    for model in (loftq_cli.load(directory), CAUSAL.from_pretrained(directory)):
        with pytest.raises(UsageError, match="cannot be resized"):
            model.resize_token_embeddings(100)
    for setting in ({"modules_to_save": ["embed_tokens"]}, {"trainable_token_indices": [3]}):
        config = peft.LoraConfig(target_modules=["q_proj"], **setting)
        with pytest.raises(UsageError, match=f"cannot be trained itself .{next(iter(setting))}"):
            peft.get_peft_model(CAUSAL.from_pretrained(directory), config)
