"""What PEFT does to packed layers: it works as on dense ones, or says what to do instead."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers
from torch import nn

import loftq_cli
from loftq_cli.errors import UsageError
from loftq_cli.loading.linear import PackedLinear
from loftq_cli.loading.warned import DetachedAdapter, UnsavedEmbeddings
from tests.whole.interop.architectures import FAMILIES, make

# peft asks transformers under a name that transformers is giving up.
TOKENS = torch.arange(12).view(2, 6) + 3
SECOND = {"r": 4, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": "gaussian"}


@pytest.fixture
def model(converted):
    """The llama with its adapter, in evaluation mode."""
    return loftq_cli.load(converted("llama")).eval()


@pytest.fixture
def backbone(converted):
    return transformers.AutoModelForCausalLM.from_pretrained(converted("llama"))


def codes(model):
    return {n: m.weight.clone() for n, m in model.named_modules() if isinstance(m, PackedLinear)}


def dense_twin(model):
    """``model`` with an ordinary nn.Linear in the place of every packed layer."""
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if isinstance(module, PackedLinear):
            linear = nn.Linear(module.in_features, module.out_features, bias=False)
            linear.weight = nn.Parameter(module.dequantize(), requires_grad=False)
            twin.set_submodule(name, linear)
    return twin


def randomise(model, adapter) -> None:
    """B is 0 at first: an adapter that does nothing hides what is done to it."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f"lora_B.{adapter}" in name:
                parameter.normal_(std=0.1)


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("method", ["merge_and_unload", "merge_adapter"])
def test_merging_names_the_command_that_can(model, method, safe_merge) -> None:
    before, logits = codes(model), model(TOKENS).logits
    with pytest.raises(UsageError, match=r"packed.*loftq merge"):
        getattr(model, method)(safe_merge=safe_merge)
    assert all(torch.equal(weight, before[name]) for name, weight in codes(model).items())
    assert torch.equal(model(TOKENS).logits, logits)


@pytest.mark.parametrize(
    "config",
    [
        peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        peft.VeraConfig(target_modules=["q_proj"]),
        peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10),
        peft.OFTConfig(target_modules=["q_proj"], oft_block_size=8),
    ],
    ids=lambda config: config.peft_type.value,
)
@pytest.mark.filterwarnings("ignore")
def test_merging_is_refused_to_other_methods_too(backbone, config) -> None:
    model = peft.get_peft_model(backbone, config)
    with pytest.raises(UsageError, match="loftq merge"):
        model.merge_and_unload()


def test_merging_is_refused_after_a_copy(model) -> None:
    with pytest.raises(UsageError, match="loftq merge"):
        copy.deepcopy(model).merge_and_unload()


def test_dense_layers_merge_as_ever(model) -> None:
    twin = dense_twin(model)
    expected = model(TOKENS).logits
    plain = peft.get_peft_model(twin.unload(), peft.LoraConfig(**SECOND))
    randomise(plain, "default")
    logits = plain(TOKENS).logits
    torch.testing.assert_close(plain.merge_and_unload()(TOKENS).logits, logits)
    assert not torch.equal(logits, expected)


@pytest.mark.filterwarnings("ignore::loftq_cli.loading.warned.DetachedAdapter")
def test_unloading_gives_the_backbone_back(converted, backbone) -> None:
    model = loftq_cli.load(converted("llama"))
    assert torch.equal(model.unload()(TOKENS).logits, backbone(TOKENS).logits)


@pytest.mark.filterwarnings("ignore::loftq_cli.loading.warned.DetachedAdapter")
def test_switching_the_adapter_off_leaves_the_backbone(model, backbone) -> None:
    with model.disable_adapter():
        off = model(TOKENS).logits
    assert torch.equal(off, backbone(TOKENS).logits)
    assert not torch.equal(model(TOKENS).logits, off)


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_a_second_adapter_computes_as_on_dense_layers(model, use_dora) -> None:
    model.add_adapter("second", peft.LoraConfig(**SECOND, use_dora=use_dora))
    model.set_adapter("second")
    randomise(model, "second")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".second" in name for name in trained)
    twin = dense_twin(model)
    model(TOKENS).logits.square().sum().backward()
    twin(TOKENS).logits.square().sum().backward()
    torch.testing.assert_close(model(TOKENS).logits, twin(TOKENS).logits)
    gradients = {name: p.grad for name, p in twin.named_parameters()}
    for name, parameter in model.named_parameters():
        if name in trained:
            assert parameter.grad.any()
            torch.testing.assert_close(parameter.grad, gradients[name])


@pytest.mark.parametrize("combination", ["linear", "cat", "svd"])
def test_adapters_are_combined_as_on_dense_layers(model, combination) -> None:
    model.add_adapter("second", peft.LoraConfig(**SECOND))
    randomise(model, "second")
    logits = []
    for variant in (model, dense_twin(model)):
        variant.add_weighted_adapter(
            ["default", "second"], [0.5, 0.25], "both", combination_type=combination
        )
        variant.set_adapter("both")
        logits.append(variant(TOKENS).logits)
    torch.testing.assert_close(logits[0], logits[1])


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora", "orthogonal", "loftq"])
def test_an_adapter_drawn_from_the_weight_is_refused(model, start) -> None:
    extra = {"loftq_config": peft.LoftQConfig(loftq_bits=4)} if start == "loftq" else {}
    config = peft.LoraConfig(**{**SECOND, "init_lora_weights": start}, **extra)
    with pytest.raises(UsageError, match=f"init_lora_weights='{start}'.*packed"):
        model.add_adapter("second", config)


def test_the_backbone_alone_says_once_that_it_lacks_its_adapter(converted) -> None:
    backbone = transformers.AutoModelForCausalLM.from_pretrained(converted("llama"))
    with pytest.warns(DetachedAdapter, match=r"subfolder=\"loftq_init\".*loftq_cli\.load"):
        backbone(TOKENS)
    backbone(TOKENS)  # a second warning would be an error


def test_an_adapter_around_a_few_layers_says_that_the_others_lack_theirs(converted) -> None:
    backbone = transformers.AutoModelForCausalLM.from_pretrained(converted("llama"))
    few = peft.get_peft_model(backbone, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.warns(DetachedAdapter):
        few(TOKENS)


@pytest.mark.parametrize("load", ["load", "plain"])
def test_whoever_attaches_the_adapter_hears_nothing(converted, load) -> None:
    directory = converted("llama")
    if load == "load":
        model = loftq_cli.load(directory)
    else:
        backbone = transformers.AutoModelForCausalLM.from_pretrained(directory)
        model = peft.PeftModel.from_pretrained(backbone, directory, subfolder="loftq_init")
    model(TOKENS)
    with model.disable_adapter():  # asked for
        model(TOKENS)


@pytest.mark.parametrize("layout", ["loftq", "dense"])
def test_a_resize_that_peft_does_not_notice_is_said(layout, tmp_path) -> None:
    source = make(*FAMILIES["Llava"][:3], tmp_path / "source")
    settings = {"bits": 2, "rank": 4, "iters": 1, "threads": 1, "layout": layout}
    loftq_cli.convert(source, output=tmp_path / "out", **settings)
    model = copy.deepcopy(loftq_cli.load(tmp_path / "out"))
    with pytest.warns(UnsavedEmbeddings, match="save_embedding_layers=True"):
        model.get_base_model().resize_token_embeddings(100)
    assert model.get_input_embeddings().num_embeddings == 100
