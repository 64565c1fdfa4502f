"""Backbones that were rescaled before they were quantized: what they are compared with, and what is
refused. The strongest test: with pairs of full rank the model computes what the original does."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import loftq_cli
from loftq_cli.checkpoint.output import open_output
from loftq_cli.checkpoint.request import Request
from loftq_cli.conversion.prepare import Backbone, prepare
from loftq_cli.conversion.run import run
from loftq_cli.errors import InputError, UnsupportedInputError, VerificationError
from loftq_cli.layouts.rescaled import FILE, Rescaling
from loftq_cli.settings.options import Options
from tests.support import awq, checkpoints, given, models
from tests.support.bench import Recorder
from tests.support.quantizing import gaussian

BLOCK = "model.layers.0"
V, OUT = f"{BLOCK}.self_attn.v_proj", f"{BLOCK}.self_attn.o_proj"
UP, DOWN = f"{BLOCK}.mlp.up_proj", f"{BLOCK}.mlp.down_proj"
FIRST = f"{BLOCK}.input_layernorm"
FULL: dict[str, Any] = {"rank": 512, "threads": 1}

SIZES: dict[str, Any] = {
    "vocab_size": models.VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
}
QKV = [f"self_attn.{each}_proj" for each in "qkv"]
GEMMA2: awq.Fronts = {
    "model.layers.*.input_layernorm": QKV,
    "model.layers.*.pre_feedforward_layernorm": ["mlp.gate_proj", "mlp.up_proj"],
    "model.layers.*.mlp.up_proj": ["mlp.down_proj"],
}
PHI3: awq.Fronts = {
    "model.layers.*.input_layernorm": ["self_attn.qkv_proj"],
    "model.layers.*.post_attention_layernorm": ["mlp.gate_up_proj"],
    "model.layers.*.mlp.gate_up_proj": ["mlp.down_proj"],
}
OPT: awq.Fronts = {  # with a ReLU between fc1 and fc2
    "model.decoder.layers.*.self_attn_layer_norm": QKV,
    "model.decoder.layers.*.final_layer_norm": ["fc1"],
    "model.decoder.layers.*.self_attn.v_proj": ["self_attn.out_proj"],
    "model.decoder.layers.*.fc1": ["fc2"],
}


def model_of(name: str, **settings: Any) -> Any:
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **settings})
    return models._randomised(getattr(transformers, f"{name}ForCausalLM"), config)


MADE: dict[str, tuple[Callable[[], Any], awq.Fronts, float]] = {
    "llama": (lambda: models.llama(num_key_value_heads=4), awq.WHOLE, 0),
    "fewer heads of keys and values": (models.llama, awq.GATED, 0),
    "qwen2, with biases of q, k and v": (
        lambda: model_of("Qwen2", intermediate_size=128, num_key_value_heads=4),
        awq.WHOLE,
        0,
    ),
    "gemma2, norms of 1 + w and two behind": (
        lambda: model_of("Gemma2", intermediate_size=128, num_key_value_heads=2, head_dim=16),
        GEMMA2,
        1,
    ),
    "phi3, fused": (
        lambda: model_of("Phi3", intermediate_size=128, num_key_value_heads=4, pad_token_id=0),
        PHI3,
        0,
    ),
    "opt, layer norms and biases": (
        lambda: model_of("OPT", ffn_dim=128, word_embed_proj_dim=64, init_std=0.1),
        OPT,
        0,
    ),
}


@pytest.mark.parametrize("spread", [0.05, 0.7])
@pytest.mark.parametrize("name", MADE)
def test_with_full_rank_it_is_the_original(name: str, spread: float, tmp_path: Path) -> None:
    make, fronts, offset = MADE[name]
    model = make()
    source = models.save(model, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    made = awq.rescaled(tensors, fronts, offset=offset, spread=spread)
    backbone, held = awq.checkpoint(source, tmp_path / "theirs", made, torch.float32)
    manifest = loftq_cli.adapt(backbone, tmp_path / "out", source=source, **FULL)
    assert manifest["totals"]["relative_residual_quantized"] < 0.12  # as plain rounding leaves
    records = {each["module"]: each for each in manifest["matrices"]}
    divided = {each for front in fronts for each in records if _matches(front, each)}
    assert {each for each, r in records.items() if "rows" in r.get("rescaled", {})} == divided
    ids = torch.randint(4, 90, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.double()(ids).logits
        model.load_state_dict(held, strict=False)
        without = model(ids).logits
        model.load_state_dict(awq.whole(tmp_path / "out", held), strict=False)
        found = model(ids).logits
    assert (found - expected).norm() < 5e-6 * expected.norm()
    assert (without - expected).norm() > 0.01 * expected.norm()


def _matches(front: str, module: str) -> bool:
    start, _, end = front.partition("*")
    return module.startswith(start) and module.endswith(end)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = models.llama(hidden=128, intermediate=256, num_key_value_heads=4, num_hidden_layers=1)
    return models.save(model, tmp_path_factory.mktemp("rescaled") / "source")


@pytest.fixture(scope="module")
def tensors(source: Path) -> awq.Tensors:
    return load_file(source / "model.safetensors")


@pytest.fixture(scope="module")
def made(tensors: awq.Tensors) -> awq.Tensors:
    return awq.rescaled(tensors, awq.WHOLE)


@pytest.fixture
def adapted(source: Path, made: awq.Tensors, tmp_path: Path) -> Path:
    backbone, _ = awq.checkpoint(source, tmp_path / "theirs", made)
    loftq_cli.adapt(
        backbone, tmp_path / "out", source=source, with_backbone=True, rank=4, threads=1
    )
    return tmp_path / "out"


def test_the_scales_are_those_that_were_drawn(
    adapted: Path, made: awq.Tensors, tensors: awq.Tensors
) -> None:
    """A norm's as it is stored, to its last bit; a pair's as near as 4 bits tell."""
    rescaling = Rescaling.of(open_output(adapted))
    held = load_file(adapted / "model.safetensors")[f"{FIRST}.weight"].double()
    stated = tensors[f"{FIRST}.weight"].double() / held
    assert torch.equal(rescaling.vectors[FIRST], stated.float())
    for front, behind in ((V, OUT), (UP, DOWN)):
        name = f"{behind}.weight"
        drawn = (made[name] / tensors[name].double()).median(0).values
        off = (rescaling.vectors[front].double() / drawn).log().abs()
        assert off.median() < 0.01
        assert off.max() < 0.1
        assert rescaling.record(f"{front}.weight")["rescaled"]["rows"] == front
        assert rescaling.record(name) == {"rescaled": {"columns": front}}


def test_residuals_are_of_the_original_as_it_was_rescaled(
    adapted: Path, source: Path, made: awq.Tensors
) -> None:
    records = {each["name"]: each for each in open_output(adapted).manifest["matrices"]}
    for name in (f"{V}.weight", f"{DOWN}.weight"):
        _, meant = awq.rounded(made[name])
        share = records[name]["frobenius"]["quantized"] / records[name]["frobenius"]["weight"]
        assert share == pytest.approx(float((made[name] - meant).norm() / made[name].norm()), 0.05)
    stated = loftq_cli.error_report(adapted)
    again = loftq_cli.error_report(adapted, source)
    assert again["totals"] == pytest.approx(stated["totals"])


@pytest.mark.parametrize("full", [False, True])
def test_statistics_are_divided_as_the_inputs_are(
    full: bool, source: Path, made: awq.Tensors, tmp_path: Path
) -> None:
    """Measured on the original: the norm of the outputs' error, on the very inputs."""
    backbone, held = awq.checkpoint(source, tmp_path / "theirs", made)
    inputs = gaussian(400, 128, seed=3) * torch.linspace(0.1, 5, 128)
    moments = loftq_cli.Moments(128, full=full)
    moments.add(inputs)
    q, norm = (
        f"{BLOCK}.self_attn.q_proj",
        load_file(backbone / "model.safetensors")[f"{FIRST}.weight"],
    )
    loftq_cli.save_statistics(tmp_path / "stats", {f"{q}.weight": moments}, model=source)
    settings: dict[str, Any] = {"rank": 4, "threads": 1, "stats": tmp_path / "stats"}
    manifest = loftq_cli.adapt(backbone, tmp_path / "out", source=source, **settings)
    (record,) = (each for each in manifest["matrices"] if each["module"] == q)
    original = load_file(source / "model.safetensors")
    s = original[f"{FIRST}.weight"].double() / norm.double()
    for key, now in (("quantized", held), ("final", awq.whole(tmp_path / "out", held))):
        error = original[f"{q}.weight"].double() - now[f"{q}.weight"] / s
        outputs = inputs.double() @ error.T
        if full:
            expected = outputs.norm() / math.sqrt(400)
        else:
            expected = (error * inputs.double().square().mean(0).sqrt()).norm()
        assert record["weighted"][key] == pytest.approx(float(expected), rel=2e-3)
    assert record["weighted"]["final"] < record["weighted"]["quantized"]


def changed(made: awq.Tensors, name: str, factor: Any) -> awq.Tensors:
    return {**made, name: made[name] * factor}


def spread(count: int) -> torch.Tensor:
    return (gaussian(count, seed=5).double() * 0.5).exp()


REFUSED: dict[str, tuple[Callable[[awq.Tensors], awq.Tensors], str]] = {
    "one value of a norm": (
        lambda made: changed(made, f"{FIRST}.weight", torch.eye(128)[7] + 1),
        r"the columns of model.layers.0.self_attn.\w_proj.weight do not make up for "
        rf"{FIRST}.weight, which is not the source's \(off number 7 by ",
    ),
    "a sign of a norm": (
        lambda made: changed(made, f"{FIRST}.weight", 1 - 2 * torch.eye(128)[7]),
        f"{FIRST}.weight is not the source's times positive scales",
    ),
    "a whole norm": (
        lambda made: changed(made, f"{FIRST}.weight", 1.5),
        r"columns of .*o_proj.weight were scaled \(by ",  # v_proj's rows are not theirs
    ),
    "columns of one of a norm's three": (
        lambda made: changed(made, f"{BLOCK}.self_attn.k_proj.weight", spread(128)),
        f"columns of {BLOCK}.self_attn.k_proj.weight do not make up for {FIRST}.weight",
    ),
    "columns without rows in front": (
        lambda made: changed(
            changed(made, f"{OUT}.weight", spread(128)), f"{OUT}.weight", spread(128)
        ),
        f"columns of {OUT}.weight were scaled .* no norm and no matrix in front of them",
    ),
    "rows without columns behind": (
        lambda made: changed(made, f"{BLOCK}.self_attn.q_proj.weight", spread(128)[:, None]),
        f"rows of {BLOCK}.self_attn.q_proj.weight were scaled .* no matrix behind them",
    ),
    "the last norm, which the head reads": (
        lambda made: changed(made, "model.norm.weight", spread(128)),
        "columns of lm_head.weight do not make up for model.norm.weight",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_nothing_explains_is_refused(
    what: str, source: Path, made: awq.Tensors, tensors: awq.Tensors, tmp_path: Path
) -> None:
    change, words = REFUSED[what]
    if what == "columns without rows in front":
        made = awq.rescaled(tensors, awq.GATED)
    backbone, _ = awq.checkpoint(source, tmp_path / "theirs", change(made))
    with pytest.raises(InputError, match=words) as caught:
        loftq_cli.adapt(backbone, tmp_path / "out", source=source, **FULL)
    assert "was made from another model, or rescaled in a way that is not known" in str(
        caught.value
    )
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_bias_that_was_not_divided(tmp_path: Path) -> None:
    model = model_of("Qwen2", intermediate_size=128, num_key_value_heads=4)
    source = models.save(model, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    made = awq.rescaled(tensors, awq.WHOLE)
    made[f"{V}.bias"] = tensors[f"{V}.bias"].double() * spread(64)
    backbone, _ = awq.checkpoint(source, tmp_path / "theirs", made)
    with pytest.raises(InputError, match=f"{V}.bias is not the source's, and not scaled as"):
        loftq_cli.adapt(backbone, tmp_path / "out", source=source, **FULL)


def test_norms_of_another_form_than_the_model_has(tmp_path: Path) -> None:
    """Divided as if they were multiplied with as they are: the backbone is broken itself."""
    source = models.save(MADE["gemma2, norms of 1 + w and two behind"][0](), tmp_path / "source")
    made = awq.rescaled(load_file(source / "model.safetensors"), GEMMA2, offset=0)
    backbone, _ = awq.checkpoint(source, tmp_path / "theirs", made)
    with pytest.raises(InputError, match="do not make up for"):
        loftq_cli.adapt(backbone, tmp_path / "out", source=source, **FULL)


def test_a_norm_that_something_else_reads(tmp_path: Path) -> None:
    source = models.save(MADE["gemma2, norms of 1 + w and two behind"][0](), tmp_path / "source")
    made = awq.rescaled(load_file(source / "model.safetensors"), GEMMA2, offset=1)
    made[f"{BLOCK}.post_attention_layernorm.weight"] *= spread(64)
    backbone, _ = awq.checkpoint(source, tmp_path / "theirs", made)
    words = f"{BLOCK}.post_attention_layernorm.weight is not the source's, and {BLOCK} reads"
    with pytest.raises(InputError, match=words):
        loftq_cli.adapt(backbone, tmp_path / "out", source=source, **FULL)


def test_a_model_that_cannot_be_followed(source: Path, made: awq.Tensors, tmp_path: Path) -> None:
    config = {"architectures": ["NobodysModel"], "model_type": "nobodys"}
    theirs = checkpoints.write(tmp_path / "source", load_file(source / "model.safetensors"), config)
    backbone, _ = awq.checkpoint(theirs, tmp_path / "theirs", made)
    with pytest.raises(UnsupportedInputError, match="what reads it is not known: transformers has"):
        loftq_cli.adapt(backbone, tmp_path / "out", source=theirs, **FULL)


def test_a_norm_that_is_zero_says_nothing_and_stands_in_nobody_s_way(tmp_path: Path) -> None:
    model = models.llama(hidden=128, num_hidden_layers=1)
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[3] = 0
    source = models.save(model, tmp_path / "source")
    made = awq.rescaled(load_file(source / "model.safetensors"), awq.GATED)
    backbone, _ = awq.checkpoint(source, tmp_path / "theirs", made)
    loftq_cli.adapt(backbone, tmp_path / "out", source=source, rank=4, threads=1)
    found = Rescaling.of(open_output(tmp_path / "out")).vectors[FIRST][3]
    q = f"{BLOCK}.self_attn.q_proj.weight"
    drawn = made[q][0, 3] / load_file(source / "model.safetensors")[q][0, 3]
    assert found == pytest.approx(float(drawn), rel=0.1)


def test_what_was_not_rescaled_has_no_vectors(source: Path, tmp_path: Path) -> None:
    backbone = given.quantized(source, tmp_path / "theirs", "awq", block_size=32)
    manifest = loftq_cli.adapt(backbone, tmp_path / "out", source=source, **FULL)
    assert not any("rescaled" in record for record in manifest["matrices"])
    assert not (tmp_path / "out" / FILE).exists()


def test_unfinished_work_is_gone_on_with(source: Path, made: awq.Tensors, tmp_path: Path) -> None:
    """To the same bytes, those of the vectors among them."""
    backbone, _ = awq.checkpoint(source, tmp_path / "theirs", made)

    class Stopped(Recorder):
        def working_on(self, tensor: str) -> None:
            self.seen = [*getattr(self, "seen", []), tensor]
            if self.seen.count(UP + ".weight") == 2:  # after the search for scales
                raise KeyboardInterrupt

    for name, observers in (("whole", [Recorder()]), ("out", [Stopped(), Recorder()])):
        for observer in observers:
            asked = Backbone(Request(str(backbone)), kept=True)
            settings = Options(rank=4, threads=1)
            request = Request(str(source))
            plan, path = prepare(
                request, tmp_path / name, settings, backbone=asked, observer=observer
            )
            with contextlib.suppress(KeyboardInterrupt):
                run(plan, path, overwrite=False, observer=observer)
    ours, theirs = (checkpoints.comparable(tmp_path / name) for name in ("out", "whole"))
    assert ours == theirs
    assert f"loftq_init/{FILE}" in ours


def test_vectors_that_are_missing_or_of_something_else(adapted: Path) -> None:
    output, path = open_output(adapted), adapted / "loftq_init" / FILE
    vectors = load_file(path)
    save_file({**vectors, FIRST: vectors[FIRST][1:].contiguous()}, path)
    with pytest.raises(VerificationError, match=f"no vector '{FIRST}' for"):
        Rescaling.of(output)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(VerificationError, match=FILE):
        Rescaling.of(output)
    path.unlink()
    with pytest.raises(VerificationError, match=FILE):
        Rescaling.of(output)


def test_activations_that_were_divided(tmp_path: Path) -> None:
    """As AWQ does where a GELU is between two layers: its scales are in the checkpoint, but
    whoever merges or decodes it would lose them."""
    source = models.save(model_of("GPTNeoX", intermediate_size=128), tmp_path / "source")
    start = "gpt_neox.layers"
    fronts: awq.Fronts = {
        f"{start}.*.input_layernorm": ["attention.query_key_value"],
        f"{start}.*.post_attention_layernorm": ["mlp.dense_h_to_4h"],
    }
    made = awq.rescaled(load_file(source / "model.safetensors"), fronts)
    made[f"{start}.0.mlp.dense_4h_to_h.weight"] *= spread(128)
    made[f"{start}.0.mlp.act.scales"] = spread(128)
    backbone, _ = awq.checkpoint(source, tmp_path / "theirs", made)
    words = f"columns of {start}.0.mlp.dense_4h_to_h.weight were scaled"
    with pytest.raises(InputError, match=words):
        loftq_cli.adapt(backbone, tmp_path / "out", source=source, **FULL)


@pytest.mark.parametrize("form", ["int8", "values"])
def test_eight_bits_and_no_codes(
    form: str, source: Path, made: awq.Tensors, tmp_path: Path
) -> None:
    """As SmoothQuant leaves them, and before anything was rounded."""
    narrow = {name: tensor.float() for name, tensor in made.items()}
    if form == "int8":
        backbone = given.of(source, tmp_path / "theirs", *given.int8(narrow))
    else:
        halves = {name: tensor.half() for name, tensor in narrow.items()}
        backbone = given.of(source, tmp_path / "theirs", halves, None)
    manifest = loftq_cli.adapt(backbone, tmp_path / "out", source=source, rank=4, threads=1)
    assert len([each for each in manifest["matrices"] if "rescaled" in each]) == 7
    assert manifest["totals"]["relative_residual_quantized"] < 0.02
