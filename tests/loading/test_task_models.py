"""A checkpoint of the bare model in a task model, and the other way round: the adapter follows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import loftq_cli
from loftq_cli.errors import InputError, UnsupportedInputError
from loftq_cli.families.names import key_mapping, places

# peft asks transformers under a name that transformers is giving up.
CLASSIFIER = transformers.AutoModelForSequenceClassification
ROOT = Path(__file__).parents[2]
SMALL = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "vocab_size": 8,
}
TOKENS = torch.arange(12).view(2, 6) + 3


def stored_adapter(directory, renamed=lambda name: name):
    """The adapter's tensors by module and letter, the modules renamed."""
    tensors = load_file(directory / "loftq_init" / "adapter_model.safetensors")
    return {renamed(key.removeprefix("base_model.model.")): t for key, t in tensors.items()}


def loaded_adapter(model):
    state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    return {key.removeprefix("base_model.model."): tensor for key, tensor in state.items()}


def assert_same(actual, expected) -> None:
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("layout", ["loftq", "bnb", "dense"])
def test_a_bare_checkpoint_in_a_task_model_keeps_its_adapter(converted, layout) -> None:
    directory = converted("bert", layout=layout, **{"bits": 4} if layout == "bnb" else {})
    model = loftq_cli.load(directory, auto_class=CLASSIFIER)
    assert type(model.get_base_model()) is transformers.BertForSequenceClassification
    adapter = {name: t for name, t in loaded_adapter(model).items() if ".lora_" in name}
    assert_same(adapter, stored_adapter(directory, lambda name: f"bert.{name}"))


@pytest.mark.parametrize("layout", ["loftq", "dense"])
def test_a_task_checkpoint_in_the_bare_model_keeps_its_adapter(converted, layout) -> None:
    # A rank above the small side of some matrices is clamped there: patterns are renamed too.
    directory = converted("classifier", layout=layout, rank=80)
    model = loftq_cli.load(directory, auto_class=transformers.AutoModel)
    assert type(model.get_base_model()) is transformers.BertModel
    expected = stored_adapter(directory, lambda name: name.removeprefix("bert."))
    assert_same(loaded_adapter(model), expected)
    task = loftq_cli.load(directory)
    hidden = model(TOKENS).last_hidden_state
    reference = task(TOKENS, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(hidden, reference)


def test_both_classes_compute_the_same_hidden_states(converted) -> None:
    directory = converted("bert")
    bare = loftq_cli.load(directory)(TOKENS).last_hidden_state
    task = loftq_cli.load(directory, auto_class=CLASSIFIER)(TOKENS, output_hidden_states=True)
    assert torch.equal(task.hidden_states[-1], bare)


GPTQ = """
import sys, loftq_cli, transformers
from loftq_cli.errors import InputError, UnsupportedInputError
for trainable in (True, False):
    try:
        loftq_cli.load(sys.argv[1], getattr(transformers, sys.argv[2]), trainable)
    except InputError as error:
        assert "does not find" in str(error) and "layout loftq" in str(error), error
    else:
        raise AssertionError
"""


@pytest.mark.gptq
@pytest.mark.parametrize(
    ("kind", "auto_class"),
    [("bert", "AutoModelForSequenceClassification"), ("classifier", "AutoModel")],
)
def test_layout_gptq_says_that_it_is_for_one_class(converted, kind, auto_class) -> None:
    """In a process of its own: gptqmodel changes settings of torch and of the garbage collector."""
    directory = converted(kind, layout="gptq", method="uniform")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", GPTQ, directory, auto_class]
    subprocess.run(command, env=environment, check=True)


def test_an_adapter_for_a_head_that_the_class_lacks_is_an_error(converted) -> None:
    directory = converted("classifier", layout="dense", include=("classifier.weight",))
    with pytest.raises(InputError, match=r"no place for .*classifier\.lora_A\.weight"):
        loftq_cli.load(directory, auto_class=transformers.AutoModel)


@pytest.mark.parametrize("layout", ["loftq", "dense"])
def test_a_head_that_is_tied_to_an_adapted_embedding_is_an_error(converted, layout) -> None:
    """It would compute with Q alone."""
    directory = converted("bert", layout=layout, embeddings=True)
    tied = r"cls\.predictions\.decoder to bert\.embeddings\.word_embeddings.*without --embeddings"
    with pytest.raises(InputError, match=tied):
        loftq_cli.load(directory, auto_class=transformers.AutoModelForMaskedLM)
    # Without such a head it is loaded, and so is a head of its own.
    assert isinstance(loftq_cli.load(directory, auto_class=CLASSIFIER), peft.PeftModel)
    untied = loftq_cli.load(
        directory, auto_class=transformers.AutoModelForMaskedLM, tie_word_embeddings=False
    )
    assert "cls.predictions.decoder" in str(untied.active_peft_config.modules_to_save)


def test_a_tied_head_in_the_plain_way(converted) -> None:
    with pytest.raises(UnsupportedInputError, match="which the checkpoint holds quantized"):
        transformers.AutoModelForMaskedLM.from_pretrained(converted("bert", embeddings=True))


def test_a_new_head_is_trained_and_saved_with_the_adapter(converted, tmp_path) -> None:
    directory = converted("bert")
    model = loftq_cli.load(directory, auto_class=CLASSIFIER, num_labels=2)
    heads = {name for name, p in model.named_parameters() if p.requires_grad and "lora" not in name}
    assert {name.rpartition("classifier.")[2] for name in heads} == {
        "modules_to_save.default.weight",
        "modules_to_save.default.bias",
    }
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(TOKENS, labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "trained")
    again = CLASSIFIER.from_pretrained(directory, num_labels=2)
    again = peft.PeftModel.from_pretrained(again, tmp_path / "trained")
    assert_same(loaded_adapter(again), loaded_adapter(model))
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model.eval()(TOKENS).logits)


def test_a_head_that_is_in_the_checkpoint_stays_frozen(converted) -> None:
    model = loftq_cli.load(converted("classifier"))
    assert model.active_peft_config.modules_to_save is None
    assert not model.get_base_model().classifier.weight.requires_grad


def test_a_head_of_another_size_is_new(converted) -> None:
    model = loftq_cli.load(converted("classifier"), num_labels=5, ignore_mismatched_sizes=True)
    assert model.active_peft_config.modules_to_save == ["classifier"]
    assert model(TOKENS).logits.shape == (2, 5)


def test_nothing_is_trained_where_that_is_not_asked_for(converted) -> None:
    model = loftq_cli.load(converted("bert"), auto_class=CLASSIFIER, trainable=False)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_plain_way_carries_the_adapter_of_layout_loftq(converted, tmp_path) -> None:
    directory = converted("bert")
    model = CLASSIFIER.from_pretrained(directory)
    model = peft.PeftModel.from_pretrained(
        model, directory, subfolder="loftq_init", is_trainable=True
    )
    expected = stored_adapter(directory, lambda name: f"bert.{name}")
    assert_same(loaded_adapter(model), expected)
    # What this model saves has its own names already.
    model.save_pretrained(tmp_path / "trained")
    again = peft.PeftModel.from_pretrained(
        CLASSIFIER.from_pretrained(directory), tmp_path / "trained"
    )
    assert_same(loaded_adapter(again), expected)


def test_the_plain_way_warns_where_the_adapter_of_another_layout_is_lost(converted) -> None:
    directory = converted("bert", layout="dense")
    model = CLASSIFIER.from_pretrained(directory)
    with pytest.warns(UserWarning, match=r"Found missing adapter keys.*bert\.encoder"):
        peft.PeftModel.from_pretrained(model, directory, subfolder="loftq_init", is_trainable=True)


@pytest.mark.parametrize(
    "name", ["encoder.layer.0.output.dense", "bert.encoder.layer.0.output.dense"]
)
@pytest.mark.parametrize("kind", ["BertModel", "BertForSequenceClassification"])
def test_a_module_is_found_under_its_name_in_the_model(name, kind) -> None:
    model = getattr(transformers, kind)(transformers.BertConfig(**SMALL))
    prefix = "" if kind == "BertModel" else "bert."
    assert places(model, [name, "gone"]) == {name: f"{prefix}encoder.layer.0.output.dense"}


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_names_that_are_the_model_s_own_stay_under_the_mapping(prefix) -> None:
    own = f"{prefix}encoder.layer.0"
    for stored in ("encoder.layer.0", "bert.encoder.layer.0"):
        mapping = key_mapping({stored: own}, "bert")
        for name in (own, stored):
            for pattern, replacement in mapping.items():
                renamed, count = re.subn(pattern, replacement, f"{name}.")
                if count:
                    break
            assert (renamed if mapping else f"{name}.") == f"{own}."
