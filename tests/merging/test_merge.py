"""Merging a conversion with its own adapter: PEFT's merge, bitsandbytes' decoder and plain ones
agree, and what comes out is an ordinary checkpoint."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from bitsandbytes import functional
from safetensors.torch import load_file, save_file

import loftq_cli
from loftq_cli.machine.observer import Observer
from loftq_cli.merging import merge as merging
from loftq_cli.merging.merge import merge
from loftq_cli.merging.value import merged_value
from tests.support import checkpoints, models
from tests.support import plain_layouts as plain
from tests.support.contents import FAST, manifest, product, stored

CLASSES = {
    "llama": "LlamaForCausalLM",
    "bert": "BertModel",
    "bart": "BartForConditionalGeneration",
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bnb": ("llama", {"bits": 4, "layout": "bnb"}),
    "bnb-bert-alpha": ("bert", {"bits": 4, "layout": "bnb", "lora_alpha": 16.0}),
    "gptq": ("llama", {"bits": 3, "layout": "gptq", "block_size": 32}),
    "gptq-2-clamped": ("llama", {"bits": 2, "layout": "gptq", "rank": 48}),
    "gptq-bert": ("bert", {"bits": 8, "layout": "gptq"}),
    "loftq": ("llama", {"bits": 2, "layout": "loftq", "method": "nf"}),
    "loftq-bfloat16": ("bert", {"bits": 2, "method": "uniform", "scale_dtype": "bfloat16"}),
    "loftq-int8": ("llama", {"bits": 2, "method": "nf", "scale_dtype": "int8"}),
    "loftq-bart": ("bart", {"bits": 3, "method": "uniform", "lora_alpha": 2.0, "rank": 48}),
    "loftq-tensor": ("bert", {"bits": 3, "method": "uniform-tensor"}),
    "dense": ("llama", {"bits": 2, "layout": "dense"}),
    "dense-alpha": ("bert", {"bits": 3, "layout": "dense", "lora_alpha": 5.0}),
    "dense-clamped": ("bart", {"bits": 2, "layout": "dense", "rank": 80}),
}
every_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint of a kind of model, in one file, with a tokenizer's file beside it."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = models.save(getattr(models, kind)(), tmp_path_factory.mktemp(kind))
            (made[kind] / "tokenizer.json").write_text('{"kept": 1}')
        return made[kind]

    return make


def merged(output: Path, target: Path, **options: Any) -> dict[str, torch.Tensor]:
    """The tensors of a merge of ``output``."""
    merge(output, target, observer=Observer(), **options)
    return stored(target)


def backbone(output: Path, record: dict[str, Any]) -> torch.Tensor:
    """Q of one matrix, float64, by decoders that are not ours."""
    tensors, name, module = stored(output), record["name"], record["module"]
    if record["layout"] == "bnb":
        state = {key: value for key, value in tensors.items() if key.startswith(f"{name}.")}
        quantized = functional.QuantState.from_dict(state, device=torch.device("cpu"))
        quantized.dtype = torch.float32
        return functional.dequantize_4bit(tensors[name], quantized).double()
    if record["layout"] == "gptq":
        return torch.tensor(plain.gptq(tensors, module, record["bits"])).double()
    if record["layout"] == "loftq":
        entry = json.loads((output / "config.json").read_text())["quantization_config"]["modules"]
        shape = tuple(record["shape"])
        return torch.tensor(plain.loftq(tensors, name, shape, entry[module])).double()
    return tensors[name].double()


def scaling(output: Path, record: dict[str, Any]) -> float:
    alpha = manifest(output)["recipe"]["lora_alpha"]
    return 1.0 if alpha is None else alpha / record["rank"]


@every_case
def test_a_matrix_becomes_what_was_quantized_plus_the_product(
    case: str, source: Callable[[str], Path], tmp_path: Path
) -> None:
    kind, settings = CASES[case]
    output = tmp_path / "out"
    loftq_cli.convert(source(kind), output, **{**FAST, **settings})
    before, after = stored(source(kind)), merged(output, tmp_path / "merged")
    assert {name: tensor.shape for name, tensor in after.items()} == {
        name: tensor.shape for name, tensor in before.items()
    }
    matrices = {record["name"]: record for record in manifest(output)["matrices"]}
    for name, tensor in after.items():
        assert tensor.dtype == torch.float32
        if name not in matrices:
            assert torch.equal(tensor, before[name])
            continue
        record = matrices[name]
        expected = backbone(output, record) + product(output, name, scaling(output, record))
        assert torch.allclose(tensor.double(), expected, rtol=1e-6, atol=1e-7)


@every_case
def test_the_result_is_an_ordinary_checkpoint(
    case: str, source: Callable[[str], Path], tmp_path: Path
) -> None:
    kind, settings = CASES[case]
    loftq_cli.convert(source(kind), tmp_path / "out", **{**FAST, **settings})
    tensors = merged(tmp_path / "out", tmp_path / "merged")
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {
        path.name for path in source(kind).iterdir()
    } | {"loftq_merge.json"}
    assert (tmp_path / "merged/tokenizer.json").read_text() == '{"kept": 1}'
    assert (tmp_path / "merged/config.json").read_text().strip() == (
        source(kind) / "config.json"
    ).read_text().strip()
    model, info = getattr(transformers, CLASSES[kind]).from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not any(info.values())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in tensors.items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("dense")])
def test_a_dense_backbone_becomes_what_peft_makes_of_it_bit_for_bit(
    case: str, dtype: str, tmp_path: Path
) -> None:
    kind, settings = CASES[case]
    model_class = getattr(transformers, CLASSES[kind])
    model = models.save(getattr(models, kind)(), tmp_path / "model", getattr(torch, dtype))
    loftq_cli.convert(model, tmp_path / "out", **{**FAST, **settings})
    base = model_class.from_pretrained(tmp_path / "out")
    wrapped = peft.PeftModel.from_pretrained(base, tmp_path / "out", subfolder="loftq_init")
    expected = wrapped.merge_and_unload().state_dict()
    ours = merged(tmp_path / "out", tmp_path / "merged")
    assert {tensor.dtype for tensor in ours.values()} == {getattr(torch, dtype)}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.items())
    loaded = model_class.from_pretrained(tmp_path / "merged").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A conversion to layout loftq of a handmade Llama in three shards."""
    tensors = checkpoints.llama(dtype=torch.bfloat16)
    config = {**checkpoints.LLAMA, "torch_dtype": "bfloat16", "text_config": {"dtype": "bfloat16"}}
    model = checkpoints.write(tmp_path / "model", tensors, config, cuts=(3, 7))
    loftq_cli.convert(model, tmp_path / "out", bits=2, layout="loftq", **FAST)
    return tmp_path / "out"


def test_shards_keep_their_names_and_tensors(sharded: Path, tmp_path: Path) -> None:
    merged(sharded, tmp_path / "merged")
    before = json.loads((tmp_path / "model/model.safetensors.index.json").read_text())
    after = json.loads((tmp_path / "merged/model.safetensors.index.json").read_text())
    assert after["weight_map"] == before["weight_map"]
    tensors = stored(tmp_path / "merged")
    assert after["metadata"] == {"total_size": sum(t.nbytes for t in tensors.values())}
    for file in (tmp_path / "merged").glob("*.safetensors"):
        assert set(load_file(file)) == {
            name for name, home in after["weight_map"].items() if home == file.name
        }


def test_the_dtype_is_the_sources_unless_asked_for(sharded: Path, tmp_path: Path) -> None:
    exact = merged(sharded, tmp_path / "float32", dtype="float32")
    matrices = {record["name"] for record in manifest(sharded)["matrices"]}
    for name in (None, "float32", "float16", "bfloat16"):
        directory = tmp_path / str(name)
        tensors = exact if name == "float32" else merged(sharded, directory, dtype=name)
        wanted = getattr(torch, name or "bfloat16")
        for key, tensor in tensors.items():
            assert tensor.dtype == (wanted if key in matrices else torch.bfloat16)
            if key in matrices:  # rounded once
                assert torch.equal(tensor, exact[key].to(wanted))
        config = json.loads((directory / "config.json").read_text())
        expected = name or "bfloat16"
        assert (config["torch_dtype"], config["text_config"]["dtype"]) == (expected, expected)
        assert "dtype" not in config
        assert "quantization_config" not in config


def test_a_config_without_a_dtype_gets_one(tmp_path: Path) -> None:
    model = checkpoints.write(tmp_path / "model", checkpoints.bert(), checkpoints.BERT)
    loftq_cli.convert(model, tmp_path / "out", **FAST)
    merged(tmp_path / "out", tmp_path / "merged", dtype="float16")
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert config == {**checkpoints.BERT, "dtype": "float16"}


def test_one_matrix_is_in_memory_at_a_time(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    compute = merged_value

    def watched(*arguments: Any) -> torch.Tensor:
        assert not any(reference() is not None for reference in alive)
        value = compute(*arguments)
        alive.append(weakref.ref(value))
        return value

    monkeypatch.setattr(merging, "merged_value", watched)
    merged(sharded, tmp_path / "merged")
    assert len(alive) == len(manifest(sharded)["matrices"])


def test_progress_is_in_bytes_of_the_result(sharded: Path, tmp_path: Path) -> None:
    class Counter(Observer):
        total = done = 0

        def begin(self, total: int, *_: str) -> None:
            self.total = total

        def advance(self, nbytes: int) -> None:
            self.done += nbytes

    counter = Counter()
    result = merge(sharded, tmp_path / "merged", observer=counter)
    assert counter.done == counter.total == result["bytes"] > 0


def test_an_adapter_is_a_directory_or_its_file_and_may_lie_elsewhere(
    sharded: Path, tmp_path: Path
) -> None:
    expected = merged(sharded, tmp_path / "merged")
    adapter = Path(shutil.move(sharded / "loftq_init", tmp_path / "elsewhere"))
    for number, path in enumerate((adapter, adapter / "adapter_model.safetensors")):
        tensors = merged(sharded, tmp_path / str(number), adapter=path)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())


def test_matrices_without_a_pair_are_what_was_quantized(sharded: Path, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(sharded / "loftq_init", tmp_path / "adapter"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["target_modules"] = ["q_proj"]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    weights = adapter / "adapter_model.safetensors"
    pairs = {name: value for name, value in load_file(weights).items() if ".q_proj." in name}
    save_file(pairs, weights)
    result = merge(sharded, tmp_path / "merged", adapter=adapter, observer=Observer())
    records = {record["name"]: record for record in manifest(sharded)["matrices"]}
    assert set(result["without_adapter"]) == {name for name in records if ".q_proj." not in name}
    tensors = stored(tmp_path / "merged")
    for name in result["without_adapter"]:
        assert torch.equal(tensors[name], backbone(sharded, records[name]).bfloat16())
