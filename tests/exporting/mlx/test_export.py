"""``export --layout mlx``: what is written, read without our own readers, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loftq_cli
from loftq_cli.errors import InputError, LayoutError, LoftqError, UsageError
from loftq_cli.exporting.mlx.export import file_names
from tests.exporting.mlx.test_layout import by_the_book
from tests.exporting.test_export import products, trained
from tests.support import checkpoints
from tests.support.contents import stored
from tests.support.exported import decoded

SETTINGS: dict[str, Any] = {
    "bits": 4,
    "method": "uniform-symmetric",
    "layout": "compressed",
    "rank": 4,
    "iters": 2,
    "threads": 1,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = checkpoints.llama(hidden=64, intermediate=128, layers=2, dtype=torch.bfloat16)
    return checkpoints.write(tmp_path_factory.mktemp("source") / "model", tensors, cuts=(6,))


def converted(source: Path, place: Path, **settings: Any) -> Path:
    loftq_cli.convert(source, place / "out", **{**SETTINGS, **settings})
    return place / "out"


def pairs(folder: Path) -> dict[str, torch.Tensor]:
    """scale lora_b^T lora_a^T by module, as mlx-lm computes it."""
    held = load_file(folder / "adapters.safetensors")
    lora = json.loads((folder / "adapter_config.json").read_text())["lora_parameters"]
    modules = {name.rpartition(".")[0] for name in held}
    found = {}
    for module in modules:
        lora_a, lora_b = held[f"{module}.lora_a"], held[f"{module}.lora_b"]
        assert lora_a.shape[1] == lora_b.shape[0] == lora["rank"]
        assert lora_a.dtype == lora_b.dtype == torch.float32
        found[module] = lora["scale"] * (lora_a @ lora_b).T
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 2},
        {"bits": 3, "block_size": 32},
        {"bits": 8},
        {"bits": 2, "layout": "loftq", "scale_dtype": "bfloat16", "bits_map": "*.q_proj.*=8"},
    ],
)
def test_the_values_are_those_of_q_and_all_else_is_as_it_was(source, tmp_path, settings) -> None:
    out = converted(source, tmp_path, **settings)
    result = loftq_cli.export(out, tmp_path / "mlx", layout="mlx")
    assert (result["layout"], result["matrices"], result["rounded"]) == ("mlx", 14, None)
    held, config = stored(tmp_path / "mlx"), json.loads((tmp_path / "mlx/config.json").read_text())
    said = config.pop("quantization")
    assert config == checkpoints.LLAMA
    for name, expected in decoded(out).items():
        module = name.removesuffix(".weight")
        if f"{module}.scales" not in held:
            assert torch.equal(held.pop(name), expected)
            continue
        parts = [held.pop(f"{module}.{part}") for part in ("weight", "scales", "biases")]
        own = said.get(module, said)
        assert parts[1].dtype == torch.bfloat16
        assert parts[1].shape == (len(expected), expected.shape[1] // own["group_size"])
        assert torch.equal(by_the_book(own["bits"], *parts), expected.double()), name
    assert held == {}
    index = json.loads((tmp_path / "mlx/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {
        path.name for path in (tmp_path / "mlx").glob("model*.safetensors")
    }


def test_the_adapter_is_the_start_or_the_trained_one_in_one_rank(source, tmp_path) -> None:
    out = converted(source, tmp_path, rank=48, rank_map="*.k_proj.*=3", lora_alpha=24.0)
    adapter = trained(out, tmp_path / "trained")
    loftq_cli.export(out, tmp_path / "one", layout="mlx")
    loftq_cli.export(out, tmp_path / "two", layout="mlx", adapter=adapter)
    for place, origin in (("one", out / "loftq_init"), ("two", adapter)):
        ours, theirs = pairs(tmp_path / place / "adapters"), products(origin)
        assert ours.keys() == theirs.keys()
        for module, product in theirs.items():
            torch.testing.assert_close(ours[module], product.float(), rtol=1e-2, atol=1e-3)
            exact = load_file(origin / "adapter_model.safetensors")
            prefix = f"base_model.model.{module}.lora_"
            double = exact[f"{prefix}B.weight"].double() @ exact[f"{prefix}A.weight"].double()
            scaling = 24.0 / exact[f"{prefix}A.weight"].shape[0]
            torch.testing.assert_close(ours[module].double(), scaling * double)
    config = json.loads((tmp_path / "one/adapters/adapter_config.json").read_text())
    assert config["fine_tune_type"] == "lora"
    assert config["num_layers"] == -1
    assert config["lora_parameters"]["keys"] == sorted([*checkpoints.ATTENTION, *checkpoints.MLP])


def test_layers_that_differ_are_named_in_full(source, tmp_path) -> None:
    out = converted(source, tmp_path, exclude=("model.layers.1.mlp.*",))
    loftq_cli.export(out, tmp_path / "mlx", layout="mlx")
    config = json.loads((tmp_path / "mlx/adapters/adapter_config.json").read_text())
    expected = [f"model.layers.0.{name}" for name in (*checkpoints.ATTENTION, *checkpoints.MLP)]
    expected += [f"model.layers.1.{name}" for name in checkpoints.ATTENTION]
    assert config["lora_parameters"]["keys"] == sorted(expected)


def test_what_does_not_fit_is_refused_or_rounded_and_measured(source, tmp_path) -> None:
    out = converted(source, tmp_path, method="uniform")
    with pytest.raises(LayoutError, match=r"cannot hold model\.layers\.\S+ exactly: BF16") as found:
        loftq_cli.export(out, tmp_path / "mlx", layout="mlx")
    assert "--rounded" in (found.value.hint or "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    result = loftq_cli.export(out, tmp_path / "mlx", layout="mlx", rounded=True)
    held, values = stored(tmp_path / "mlx"), decoded(out)
    off = weight = 0.0
    originals = {
        n: t.double()
        for n, t in stored(source).items()
        if n in checkpoints.matrices(stored(source))
    }
    for name, original in originals.items():
        module = name.removesuffix(".weight")
        parts = (held[f"{module}.{part}"] for part in ("weight", "scales", "biases"))
        off += float((by_the_book(4, *parts) - values[name].double()).square().sum())
        weight += float(original.square().sum())
    told = result["rounded"]
    assert told["off"] == pytest.approx((off / weight) ** 0.5, rel=1e-3)
    assert 0 < told["off"] < 0.1 * told["residual"]
    assert told["residual"] == loftq_cli.inspect(out)["totals"]["relative_residual"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "nf", "layout": "loftq"}, "MLX holds uniform codes, not nf"),
        ({"block_size": 256, "layout": "loftq"}, "groups of 32, 64 or 128, not 256"),
        ({"layout": "dense"}, "layout dense holds values, no codes"),
    ],
)
def test_what_mlx_cannot_hold_is_listed(source, tmp_path, settings, said) -> None:
    out = converted(source, tmp_path, **settings)
    with pytest.raises(LayoutError, match=said):
        loftq_cli.export(out, tmp_path / "mlx", layout="mlx")
    assert not (tmp_path / "mlx").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"layout": "mlx", "strict": True}, "--strict is for --layout gguf"),
        ({"layout": "mlx", "skeleton": "x.gguf"}, "--skeleton is for --layout gguf"),
        ({"layout": "mlx", "pad_ranks": True}, "--pad-ranks is not for --layout mlx"),
        ({"layout": "loftq", "rounded": True}, "--rounded is for --layout mlx"),
        ({"layout": "gguf", "skeleton": "x", "rounded": True}, "--rounded is for --layout mlx"),
    ],
)
def test_what_does_not_go_together_is_refused(source, tmp_path, settings, said) -> None:
    out = converted(source, tmp_path, layout="loftq", iters=0)
    with pytest.raises(UsageError, match=said):
        loftq_cli.export(out, tmp_path / "mlx", **settings)


def test_files_of_another_name_get_one_that_mlx_lm_looks_for() -> None:
    assert file_names(["model.safetensors"]) == ["model.safetensors"]
    assert file_names(["a.safetensors", "b.safetensors"]) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


def test_an_earlier_export_is_replaced_only_if_that_is_asked(source, tmp_path) -> None:
    out = converted(source, tmp_path)
    loftq_cli.export(out, tmp_path / "mlx", layout="mlx")
    before = checkpoints.files(tmp_path / "mlx")
    with pytest.raises(LoftqError, match="holds an export to MLX"):
        loftq_cli.export(out, tmp_path / "mlx", layout="mlx")
    loftq_cli.export(out, tmp_path / "mlx", layout="mlx", overwrite=True)
    assert checkpoints.files(tmp_path / "mlx") == before
    with pytest.raises(LoftqError, match="quantized already"):
        loftq_cli.convert(tmp_path / "mlx", tmp_path / "again", **SETTINGS)


def test_an_adapter_with_more_than_pairs_is_refused(source, tmp_path) -> None:
    out = converted(source, tmp_path)
    adapter = trained(out, tmp_path / "trained", modules_to_save=["lm_head"])
    file = adapter / "adapter_model.safetensors"
    head = {"base_model.model.lm_head.weight": torch.zeros(24, 64, dtype=torch.bfloat16)}
    save_file({**load_file(file), **head}, file)
    with pytest.raises(InputError, match=r"holds lm_head\.weight in full, and mlx-lm reads pairs"):
        loftq_cli.export(out, tmp_path / "mlx", layout="mlx", adapter=adapter)
