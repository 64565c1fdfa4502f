"""What transformers makes of a checkpoint's tensors, and what happens where it cannot say."""

from __future__ import annotations

import json
import sys
from typing import Any

import peft
import pytest
import torch
import transformers

import loftq_cli
from loftq_cli.checkpoint.request import Request
from loftq_cli.conversion.prepare import prepare
from loftq_cli.errors import UsageError
from loftq_cli.families import anatomy as module
from loftq_cli.families import skeleton
from loftq_cli.families.anatomy import PLAIN, anatomy
from loftq_cli.loading.warned import DetachedAdapter
from loftq_cli.machine.observer import Observer
from loftq_cli.settings.options import Options
from tests.whole.interop.architectures import FAMILIES, IMAGES, make
from tests.whole.interop.published import CASES, save
from tests.whole.zoo import small

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 32,
    "pad_token_id": 0,
}

TINY_MAMBA = {
    "vocab_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_heads": 4,
    "head_dim": 16,
    "state_size": 8,
    "n_groups": 1,
    "time_step_limit": (0.0, float("inf")),
}


def described(
    model: transformers.PreTrainedModel,
) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """(config.json, shapes of tensors) of a model."""
    config = json.loads(model.config.to_json_string(use_diff=False))
    config["architectures"] = [type(model).__name__]
    return config, {name: tuple(t.shape) for name, t in model.state_dict().items()}


@pytest.mark.parametrize(("kind", "name", "stack", "modules"), PLAIN)
def test_nothing_is_to_be_said_of_what_is_not_looked_up(
    kind, name, stack, modules, monkeypatch
) -> None:
    config = transformers.AutoConfig.for_model(kind, **SMALL)
    with torch.device("meta"):
        given = described(getattr(transformers, name)(config))
    with monkeypatch.context() as patched:
        patched.setattr(module, "skeleton", lambda config: pytest.fail("looked up"))
        skipped = anatomy(*given)
    monkeypatch.setattr(module, "PLAIN", ())
    looked_up = anatomy(*given)
    assert looked_up.unknown is None
    assert looked_up.names == skipped.names == {}
    assert not [tensor for tensor in looked_up.reasons if tensor.startswith(f"{stack}.")]


def test_other_names_on_disk_than_those_of_a_plain_class_are_looked_up() -> None:
    config = transformers.AutoConfig.for_model("llama", **SMALL)
    with torch.device("meta"):
        stated, shapes = described(transformers.LlamaForCausalLM(config))
    bare = {name.removeprefix("model."): shape for name, shape in shapes.items()}
    found = anatomy(stated, bare)
    assert found.names["layers.1.mlp.up_proj.weight"] == "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("kind", "name", "config", "extra", "reason"),
    [
        ("llama", "LlamaForCausalLM", {"num_hidden_layers": 1}, "", "does not load it"),
        ("llama", "LlamaForCausalLM", {}, "model.layers.0.mlp.extra.weight", "does not load it"),
        ("bert", "BertModel", {}, "encoder.layer.0.output.adapters.0.weight", "does not load it"),
    ],
)
def test_what_a_plain_class_does_not_have_is_looked_up(kind, name, config, extra, reason) -> None:
    with torch.device("meta"):
        model = getattr(transformers, name)(transformers.AutoConfig.for_model(kind, **SMALL))
    stated, shapes = described(model)
    found = anatomy({**stated, **config}, {**shapes, **({extra: (32, 32)} if extra else {})})
    concerned = extra or "model.layers.1.mlp.up_proj.weight"
    assert found.reasons[concerned] == f"{name} {reason}"
    assert "model.layers.0.mlp.up_proj.weight" not in found.reasons


def test_norms_under_their_old_names_are_looked_up() -> None:
    with torch.device("meta"):
        stated, shapes = described(
            transformers.BertModel(transformers.AutoConfig.for_model("bert", **SMALL))
        )
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): shape
        for name, shape in shapes.items()
    }
    names = anatomy(stated, old).names
    assert names["embeddings.LayerNorm.gamma"] == "embeddings.LayerNorm.weight"


def test_a_config_is_read_as_transformers_writes_it(tmp_path) -> None:
    """It spells infinity in a way of its own."""
    config = transformers.AutoConfig.for_model("mamba2", **TINY_MAMBA)
    config.architectures = ["Mamba2ForCausalLM"]
    config.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert "__float__" in text
    with torch.device("meta"):
        shapes = described(transformers.Mamba2ForCausalLM(config))[1]
    assert anatomy(json.loads(text), shapes).unknown is None


@pytest.fixture
def without_transformers(monkeypatch):
    """A machine that converts without transformers."""

    def hide() -> None:
        skeleton._built.cache_clear()
        monkeypatch.setitem(sys.modules, "transformers", None)

    yield hide
    skeleton._built.cache_clear()


@pytest.mark.parametrize("layout", ["loftq", "dense"])
def test_without_transformers_load_finds_the_names_and_the_plain_way_says_that_it_cannot(
    layout, tmp_path, without_transformers, monkeypatch
) -> None:
    source = make(*FAMILIES["ViT"][:3], tmp_path / "source")
    settings: dict[str, Any] = {"bits": 2, "rank": 4, "iters": 1, "layout": layout, "threads": 1}
    without_transformers()
    plan, _ = prepare(
        Request(str(source)), tmp_path / "out", Options(**settings), observer=Observer()
    )
    loftq_cli.convert(source, output=tmp_path / "out", **settings)
    monkeypatch.undo()
    assert any("names alone, for transformers is not installed" in line for line in plan.remarks)
    model = loftq_cli.load(tmp_path / "out")
    assert all(
        parameter.any() for name, parameter in model.named_parameters() if ".lora_B." in name
    )
    if layout == "loftq":
        with pytest.warns(DetachedAdapter, match=r"cannot attach.*use loftq_cli\.load"):
            transformers.AutoModel.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("name", ["GLM-4 with experts and a further block", "Granite with experts"])
def test_without_transformers_config_json_tells_further_blocks_and_routers(
    name, tmp_path, without_transformers
) -> None:
    source = save(CASES[name], tmp_path / "source")
    without_transformers()
    plan, _ = prepare(
        Request(str(source)),
        tmp_path / "out",
        Options(layout="loftq", threads=1),
        observer=Observer(),
    )
    kept = {tensor.name: reason for tensor, reason in plan.selection.kept}
    for end, reason in CASES[name].reasons.items():
        assert {kept.get(tensor) for tensor in kept if tensor.endswith(end)} == {reason}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architectures": ["NoSuchModel"], "model_type": "none_such"}, "no class for NoSuchModel"),
        ({"hidden_size": "wide"}, "cannot build it"),
        ({"num_hidden_layers": 10**12}, "counts more layers than a model has"),
    ],
)
def test_a_config_that_describes_no_model_is_no_obstacle(change, said) -> None:
    config = transformers.AutoConfig.for_model("vit", **SMALL)
    with torch.device("meta"):
        stated, shapes = described(transformers.ViTModel(config))
    found = anatomy({**stated, **change}, shapes)
    assert said in str(found.unknown)
    assert not found.names


def test_what_no_model_can_load_is_not_converted_on_request_either(tmp_path) -> None:
    source = save(CASES["WavLM"], tmp_path / "source")
    with pytest.raises(UsageError, match=r"q_proj\.weight cannot be quantized: the model's code"):
        loftq_cli.convert(source, output=tmp_path / "out", include=("*q_proj*",), threads=1)


def test_what_transformers_says_is_part_of_the_recipe(tmp_path) -> None:
    """Another version may say something else: unfinished work is then another conversion's."""
    settings: dict[str, Any] = {"rank": 4, "iters": 1, "threads": 1, "layout": "loftq"}
    renamed = make(*FAMILIES["ViT"][:3], tmp_path / "vit")
    plain = make(*FAMILIES["Llama"][:3], tmp_path / "llama")
    manifest = loftq_cli.convert(renamed, output=tmp_path / "a", **settings)
    assert len(manifest["recipe"]["structure"]) == 64
    assert "structure" not in loftq_cli.convert(plain, output=tmp_path / "b", **settings)["recipe"]
    again = loftq_cli.convert(
        renamed, output=tmp_path / "c", recipe=tmp_path / "a" / "loftq_manifest.json"
    )
    assert again["recipe"] == manifest["recipe"]


def test_an_adapter_that_is_saved_has_the_names_of_the_one_that_it_began_as(tmp_path) -> None:
    source = make(*FAMILIES["ViT"][:3], tmp_path / "source")
    loftq_cli.convert(source, output=tmp_path / "out", rank=4, iters=1, threads=1, layout="loftq")
    model = loftq_cli.load(tmp_path / "out")
    model.save_pretrained(tmp_path / "trained")
    backbone = transformers.AutoModel.from_pretrained(tmp_path / "out")
    again = peft.PeftModel.from_pretrained(backbone, tmp_path / "trained").eval()
    found, wanted = (m(pixel_values=IMAGES).last_hidden_state for m in (again, model.eval()))
    assert torch.equal(found, wanted)


def test_a_checkpoint_with_other_names_than_its_class_is_refused(tmp_path) -> None:
    """transformers would draw the blocks at random, and say so in a report."""
    model = transformers.GPTNeoXForCausalLM(transformers.AutoConfig.for_model("gpt_neox", **SMALL))
    config, shapes = described(model)
    other = {name.replace("layers.1.", "stages.1."): shape for name, shape in shapes.items()}
    found = anatomy(config, other)
    assert found.refusal is not None
    assert "does not find gpt_neox.layers.1.attention.query_key_value.weight" in found.refusal
    assert "no place for gpt_neox.stages.1." in found.refusal
    assert anatomy(config, shapes).refusal is None
    further = {**shapes, "gpt_neox.stages.1.attention.dense.weight": (32, 32)}
    assert anatomy(config, further).refusal is None  # nothing is lacking
    lacking = {name: shape for name, shape in shapes.items() if "layers.1." not in name}
    assert anatomy(config, lacking).refusal is None  # perhaps the class takes them from elsewhere


def test_a_table_whose_name_does_not_say_so_is_no_linear_layer() -> None:
    model = small.build("granite_speech", "GraniteSpeechForConditionalGeneration")
    config, shapes = described(model)
    table = next(name for name in shapes if name.endswith("layers.0.attn.rel_pos_emb.weight"))
    assert anatomy(config, shapes).reasons[table] == (
        "in memory a part of Embedding, which is no linear layer"
    )
