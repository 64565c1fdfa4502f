"""What was trained on the models that people download is merged under the names of their files: the
merged model computes what the PeftModel computes, whichever class was trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import loftq_cli
from loftq_cli.machine.observer import Observer
from loftq_cli.merging.merge import merge
from tests.support.contents import stored
from tests.whole.interop.architectures import QUICK, model_class, outputs
from tests.whole.interop.published import CASES, save

pytestmark = [
    # Adapters of one's own leave quantized layers without theirs.
    pytest.mark.filterwarnings("ignore::loftq_cli.loading.warned.DetachedAdapter"),
    pytest.mark.filterwarnings("ignore::loftq_cli.loading.warned.UnsavedEmbeddings"),
]

PACKED = ("Qwen2-VL", "Llava", "ViT with a head")
SETTINGS = {**QUICK, "rank": 4, "layout": "dense"}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``converted(name, **settings)``: shared, not to be written to; the source is beside it."""
    made: dict[str, Path] = {}

    def get(name: str, **settings: Any) -> Path:
        settings = {**SETTINGS, **settings}
        key = f"{name} {settings}"
        if key not in made:
            directory = tmp_path_factory.mktemp("published")
            loftq_cli.convert(
                save(CASES[name], directory / "source"),
                output=directory / "out",
                **settings,
            )
            made[key] = directory / "out"
        return made[key]

    return get


def changed(model: Any) -> Any:
    """``model``, with what can be trained at other values."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.03)
    return model


def check(
    trained: Any, output: Path, tmp_path: Path, taken: dict[str, torch.Tensor], as_class: Any
) -> dict[str, Any]:
    """Save ``trained``, merge, load, compare; what merge says."""
    changed(trained).eval()
    trained.save_pretrained(tmp_path / "trained")
    merged = tmp_path / "merged"
    result = merge(output, merged, adapter=tmp_path / "trained", observer=Observer())
    # What transformers does not load is copied as well.
    plain, info = as_class.from_pretrained(merged, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    with torch.no_grad():
        wanted, found = outputs(trained, taken), outputs(plain.eval(), taken)
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert {*stored(merged)} == {*stored(output.parent / "source"), *result["added"]}
    return result


@pytest.mark.parametrize(
    ("name", "layout"), [*((name, "dense") for name in CASES), *((n, "loftq") for n in PACKED)]
)
def test_the_conversion_s_own_adapter_after_training(
    name: str, layout: str, converted: Callable[..., Path], tmp_path: Path
) -> None:
    output = converted(name, layout=layout)
    result = check(
        loftq_cli.load(output), output, tmp_path, CASES[name].inputs, model_class(output)
    )
    assert result["without_adapter"] == result["replaced"] == result["added"] == []


RENAMED = [
    *("Qwen2-VL", "Llava", "Gemma 3", "Mistral 3", "PaliGemma", "ViT with a head"),
    *("CLIP, the vision model", "GPT-2 without a prefix"),
]


@pytest.mark.parametrize("name", RENAMED)
def test_a_manifest_that_does_not_say_the_names_in_memory(
    name: str, converted: Callable[..., Path], tmp_path: Path
) -> None:
    """As one from a machine without transformers."""
    output = converted(name)
    trained = loftq_cli.load(output)
    file = output / "loftq_manifest.json"
    text = file.read_text()
    manifest = json.loads(text)
    entries = [*manifest["matrices"], *manifest["passed_through"]]
    assert [entry for entry in entries if entry.pop("in_memory", None)]
    file.write_text(json.dumps(manifest))
    try:
        check(trained, output, tmp_path, CASES[name].inputs, model_class(output))
    finally:
        file.write_text(text)


@pytest.mark.parametrize("name", RENAMED)
def test_modules_that_were_trained_in_full_with_all_biases(
    name: str, converted: Callable[..., Path], tmp_path: Path
) -> None:
    output = converted(name)
    base = model_class(output).from_pretrained(output)
    records = json.loads((output / "loftq_manifest.json").read_text())["matrices"]
    norms = [module for module, _ in base.named_modules() if "norm" in module.rpartition(".")[2]]
    config = peft.LoraConfig(
        r=4,
        bias="all",
        target_modules=[record.get("in_memory", record["module"]) for record in records][::2],
        fan_in_fan_out=any("kind" in record for record in records),
        modules_to_save=norms[:1],
    )
    trained = peft.get_peft_model(base, config)
    result = check(trained, output, tmp_path, CASES[name].inputs, model_class(output))
    assert result["replaced"]


@pytest.mark.parametrize(
    ("name", "trained_class", "part"),
    [
        ("Qwen2-VL", "Qwen2VLModel", "model"),
        ("Llava", "LlavaModel", "model"),
        ("Gemma 3", "Gemma3Model", "model"),
        ("Mistral 3", "Mistral3Model", "model"),
        ("ViT with a head", "ViTModel", "vit"),
        ("GPT-2 without a prefix", "GPT2Model", "transformer"),
    ],
)
def test_the_bare_model_was_trained(
    name: str, trained_class: str, part: str, converted: Callable[..., Path], tmp_path: Path
) -> None:
    output, taken = converted(name), CASES[name].inputs
    trained = changed(loftq_cli.load(output, getattr(transformers, trained_class)))
    trained.eval().save_pretrained(tmp_path / "trained")
    merge(output, tmp_path / "merged", adapter=tmp_path / "trained", observer=Observer())
    plain = model_class(output).from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        wanted, found = trained(**taken)[0], getattr(plain, part)(**taken)[0]
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_the_text_model_of_one_that_sees_was_trained_alone(
    converted: Callable[..., Path], tmp_path: Path
) -> None:
    name = "Gemma 3"
    output = converted(name)
    whole = transformers.Gemma3ForConditionalGeneration.from_pretrained(output)
    text = transformers.Gemma3ForCausalLM(whole.config.text_config)
    text.model, text.lm_head = whole.model.language_model, whole.lm_head
    trained = changed(
        peft.get_peft_model(text, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    )
    trained.save_pretrained(tmp_path / "trained")
    result = merge(output, tmp_path / "merged", adapter=tmp_path / "trained", observer=Observer())
    assert any("vision" in tensor for tensor in result["without_adapter"])
    plain = transformers.Gemma3ForConditionalGeneration.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        wanted, found = (m.eval()(**CASES[name].inputs).logits for m in (trained, plain))
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_a_head_on_images_that_the_backbone_lacks(tmp_path: Path) -> None:
    source = save(CASES["ViT with a head"], tmp_path / "source")
    transformers.ViTModel.from_pretrained(source).save_pretrained(tmp_path / "bare")
    output = tmp_path / "out"
    loftq_cli.convert(tmp_path / "bare", output=output, **SETTINGS)
    as_class = transformers.ViTForImageClassification
    trained = changed(loftq_cli.load(output, as_class, num_labels=3)).eval()
    trained.save_pretrained(tmp_path / "trained")
    result = merge(output, tmp_path / "merged", adapter=tmp_path / "trained", observer=Observer())
    assert "classifier.weight" in result["added"]
    plain = as_class.from_pretrained(tmp_path / "merged").eval()
    taken = CASES["ViT with a head"].inputs
    with torch.no_grad():
        wanted, found = trained(**taken).logits, plain(**taken).logits
    assert wanted.shape == (2, 3)
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("name", ["Qwen2-VL", "Llava", "Gemma 3", "Mistral 3"])
def test_more_tokens_for_a_model_that_sees(
    name: str, converted: Callable[..., Path], tmp_path: Path
) -> None:
    output = converted(name)
    trained = loftq_cli.load(output)
    trained.get_base_model().resize_token_embeddings(100)
    changed(trained).eval().save_pretrained(tmp_path / "trained", save_embedding_layers=True)
    merge(output, tmp_path / "merged", adapter=tmp_path / "trained", observer=Observer())
    plain, info = model_class(output).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        wanted, found = (outputs(m.eval(), CASES[name].inputs) for m in (trained, plain))
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
