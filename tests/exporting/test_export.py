"""Codes that move are those that a conversion to the other layout chooses, and mean the same."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loftq_cli
from loftq_cli.errors import (
    EnvironmentFailure,
    InputError,
    LayoutError,
    OutputConflictError,
    UsageError,
    VerificationError,
)
from loftq_cli.exporting import export as exporting
from loftq_cli.exporting.export import export
from loftq_cli.exporting.plan import Moved
from loftq_cli.exporting.work import Wanted
from loftq_cli.machine.observer import Observer
from tests.support import checkpoints, makers
from tests.support.contents import stored
from tests.support.exported import SETTINGS, decoded


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = checkpoints.llama(hidden=64, intermediate=32)
    return checkpoints.write(tmp_path_factory.mktemp("source") / "model", tensors, cuts=(5,))


def converted(source: Path, place: Path, layout: str, **settings: Any) -> Path:
    output = place / layout
    loftq_cli.convert(source, output, layout=layout, **{**SETTINGS, **settings})
    return output


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("method", ["uniform", "uniform-symmetric"])
@pytest.mark.parametrize(
    ("held", "wanted"),
    [("gptq", "compressed"), ("compressed", "gptq"), ("gptq", "awq"), ("awq", "compressed")],
)
def test_an_export_is_what_a_conversion_to_that_layout_is(source, tmp_path, held, wanted, method):
    first, direct = (converted(source, tmp_path, each, method=method) for each in (held, wanted))
    loftq_cli.export(first, tmp_path / "moved", layout=wanted)
    assert equal(stored(tmp_path / "moved"), stored(direct))
    moved = tmp_path / "moved"
    configs = [json.loads((place / "config.json").read_text()) for place in (moved, direct)]
    assert configs[0] == configs[1]
    weights = "loftq_init/adapter_model.safetensors"
    assert equal(load_file(moved / weights), load_file(direct / weights))


@pytest.mark.parametrize(
    ("wanted", "bits"),
    [*itertools.product(["gptq", "loftq", "dense"], [2, 3, 4, 8]), ("awq", 4)],
)
def test_values_stay_what_they_are_and_back_again(source, tmp_path, wanted, bits):
    first = converted(source, tmp_path, "compressed", bits=bits)
    loftq_cli.export(first, tmp_path / "moved", layout=wanted)
    assert equal(decoded(tmp_path / "moved"), decoded(first))
    if wanted != "dense":
        loftq_cli.export(tmp_path / "moved", tmp_path / "back", layout="compressed")
        assert equal(stored(tmp_path / "back"), stored(first))


def test_nf_moves_between_bnb_and_loftq(tmp_path):
    source = checkpoints.write(tmp_path / "model", checkpoints.llama(hidden=64, intermediate=128))
    first = converted(source, tmp_path, "loftq", method="nf", block_size=64)
    loftq_cli.export(first, tmp_path / "bnb-moved", layout="bnb")
    direct = converted(source, tmp_path, "bnb", method="nf", block_size=64)
    assert equal(stored(tmp_path / "bnb-moved"), stored(direct))
    loftq_cli.export(direct, tmp_path / "back", layout="loftq")
    assert equal(stored(tmp_path / "back"), stored(first))


def test_the_result_is_a_whole_conversion(source, tmp_path):
    first = converted(source, tmp_path, "gptq")
    moved = tmp_path / "moved"
    result = loftq_cli.export(first, moved, layout="compressed")
    assert (result["from"], result["layout"], result["matrices"]) == (["gptq"], "compressed", 7)
    seen = loftq_cli.inspect(moved, verify=True)
    assert {layer["layout"] for layer in seen["layers"]} == {"compressed"}
    before, after = (loftq_cli.error_report(d, source) for d in (first, moved))
    assert before["totals"] == after["totals"]
    for directory, to in ((first, "merged"), (moved, "merged-too")):
        loftq_cli.merge(directory, tmp_path / to)
    assert equal(stored(tmp_path / "merged"), stored(tmp_path / "merged-too"))
    config = json.loads((moved / "loftq_init/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(moved)


def trained(directory: Path, place: Path, **config: Any) -> Path:
    """What training could have saved: other values in the same tensors."""
    shutil.copytree(directory / "loftq_init", place)
    held = load_file(place / "adapter_model.safetensors")
    save_file({name: t + 0.01 for name, t in held.items()}, place / "adapter_model.safetensors")
    written = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps({**written, **config}))
    return place


def products(folder: Path) -> dict[str, torch.Tensor]:
    """scaling * B A by module, as PEFT defines it."""
    held = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    found = {}
    for name, first in held.items():
        if ".lora_A." in name:
            module = name.removeprefix("base_model.model.").partition(".lora_A.")[0]
            key = module.replace(".", r"\.")
            rank = config["rank_pattern"].get(key, config["r"])
            alpha = config["alpha_pattern"].get(key, config["lora_alpha"])
            assert first.shape[0] == rank
            found[module] = held[name.replace("lora_A", "lora_B")] @ first * (alpha / rank)
    return found


@pytest.mark.parametrize("pad", [False, True])
def test_a_trained_adapter_comes_along(source, tmp_path, pad):
    first = converted(source, tmp_path, "gptq", rank=48)  # more than some matrices have
    adapter = trained(first, tmp_path / "trained")
    moved = tmp_path / "moved"
    loftq_cli.export(
        first, moved, layout="compressed", adapter=adapter, pad_ranks=pad, base_model="me/served"
    )
    start = "loftq_init"
    for folder, origin in ((moved / "adapter", adapter), (moved / start, first / start)):
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "me/served"
        assert bool(config["rank_pattern"]) is not pad
        ours, theirs = products(folder), products(origin)
        assert ours.keys() == theirs.keys()
        for module, product in theirs.items():
            torch.testing.assert_close(ours[module], product, rtol=1e-6, atol=1e-7)
        if pad:
            ranks = {
                t.shape[0]
                for n, t in load_file(folder / "adapter_model.safetensors").items()
                if "lora_A" in n
            }
            assert ranks == {48}
    loftq_cli.inspect(moved, verify=True)
    loftq_cli.error_report(moved, source)


@pytest.mark.parametrize("most", [47, 48])
def test_a_rank_that_servers_have_no_room_for_is_said(source, tmp_path, monkeypatch, most):
    monkeypatch.setattr(exporting, "MOST_SERVED", most)
    first = converted(source, tmp_path, "loftq", rank=48)

    class Notes(Observer):
        said: tuple[str, ...] = ()

        def note(self, line: str) -> None:
            self.said += (line,)

    for layout in ("loftq", "dense"):  # no servers'
        export(first, tmp_path / f"to-{layout}", Wanted(layout), observer=Notes())
        assert Notes.said == ()
    first = converted(source, tmp_path, "gptq", rank=48)
    notes = Notes()
    export(first, tmp_path / "moved", Wanted("compressed"), observer=notes)
    told = ("the adapter has rank 48, and vLLM serves 47 at most",)
    assert notes.said == (told if most == 47 else ())


def test_what_would_be_rounded_is_refused_and_nothing_is_left(source, tmp_path):
    first = converted(source, tmp_path, "loftq")  # scales in float32
    with pytest.raises(LayoutError, match=r"cannot hold model\.layers\.0\..*it would be rounded"):
        loftq_cli.export(first, tmp_path / "moved", layout="gptq")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loftq"]


@pytest.mark.parametrize(
    ("layout", "settings", "wanted", "words"),
    [
        ("dense", {}, "loftq", "layout dense holds values, no codes"),
        ("loftq", {"method": "nf"}, "gptq", "gptq holds uniform codes, not nf; .*not nf"),
        ("loftq", {"method": "trellis", "bits": 2}, "gptq", "gptq .* codes, not trellis; "),
        ("loftq", {"method": "trellis", "bits": 2}, "compressed", "not trellis"),
        ("loftq", {"method": "trellis", "bits": 2}, "mlx", "trellis"),
        ("gptq", {"bits": 3}, "awq", "awq holds 4-bit uniform codes, not 3-bit uniform; "),
        ("loftq", {"block_size": 256}, "compressed", "groups of 32, 64 or 128"),
        ("compressed", {"bits_map": "*.mlp.*=2"}, "gptq", "matrices of several widths"),
        ("loftq", {"bits_map": "*.q_proj.*=2"}, "compressed", "parts that servers fuse"),
    ],
)
def test_what_a_layout_cannot_hold_is_listed(source, tmp_path, layout, settings, wanted, words):
    first = converted(source, tmp_path, layout, **settings)
    with pytest.raises(LayoutError, match=words):
        loftq_cli.export(first, tmp_path / "moved", layout=wanted)
    assert sorted(path.name for path in tmp_path.iterdir()) == [layout]


def test_an_adapter_of_something_else_is_refused(source, tmp_path):
    first = converted(source, tmp_path, "gptq")
    other = checkpoints.write(tmp_path / "other", checkpoints.llama(hidden=96, intermediate=160))
    loftq_cli.convert(other, tmp_path / "its", layout="loftq", **SETTINGS)
    adapter = trained(tmp_path / "its", tmp_path / "trained")
    with pytest.raises(InputError, match=r"the pair of 'model\.layers\.0\.[^']*' is for"):
        loftq_cli.export(first, tmp_path / "moved", layout="loftq", adapter=adapter)
    named = trained(first, tmp_path / "named", base_model_name_or_path=str(tmp_path / "its"))
    with pytest.raises(InputError, match=r"trained on .*its, another conversion"):
        loftq_cli.export(first, tmp_path / "moved", layout="loftq", adapter=named)


def test_an_adapter_that_was_trained_on_the_original_conversion_fits_its_export(source, tmp_path):
    first = converted(source, tmp_path, "gptq")
    adapter = trained(first, tmp_path / "trained", base_model_name_or_path=str(first))
    loftq_cli.export(first, tmp_path / "moved", layout="compressed")
    loftq_cli.merge(tmp_path / "moved", tmp_path / "one", adapter=adapter)
    loftq_cli.merge(first, tmp_path / "other", adapter=adapter)
    assert equal(stored(tmp_path / "one"), stored(tmp_path / "other"))


def test_ranks_that_are_scaled_apart_cannot_be_padded(source, tmp_path):
    first = converted(source, tmp_path, "gptq", rank=48, lora_alpha=8.0)
    with pytest.raises(UsageError, match=r"--pad-ranks: .*scaled by \d factors"):
        loftq_cli.export(first, tmp_path / "moved", layout="loftq", pad_ranks=True)


def test_places_that_are_taken(source, tmp_path):
    first = converted(source, tmp_path, "gptq")
    with pytest.raises(UsageError, match="--output"):
        loftq_cli.export(first, first, layout="loftq")
    with pytest.raises(UsageError, match="--output"):
        loftq_cli.export(first, first / "inside", layout="loftq")
    loftq_cli.export(first, tmp_path / "moved", layout="loftq")
    before = checkpoints.files(tmp_path / "moved")
    loftq_cli.export(first, tmp_path / "moved", layout="loftq")  # finished already
    assert checkpoints.files(tmp_path / "moved") == before
    with pytest.raises(OutputConflictError, match="holds a conversion"):
        loftq_cli.export(first, tmp_path / "moved", layout="compressed")
    loftq_cli.export(first, tmp_path / "moved", layout="compressed", overwrite=True)
    assert loftq_cli.inspect(tmp_path / "moved")["layers"][0]["layout"] == "compressed"


def test_a_damaged_conversion_is_not_exported(source, tmp_path):
    first = converted(source, tmp_path, "gptq")
    file = next(first.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(VerificationError, match="the contents were altered"):
        loftq_cli.export(first, tmp_path / "moved", layout="loftq")


class Stopping(Observer):
    """Ends the work before the tensor that comes as number ``at``; counts them."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.seen = at, list[str]()

    def working_on(self, tensor: str) -> None:
        if len(self.seen) == self.at:
            raise EnvironmentFailure("the disk is full")
        self.seen.append(tensor)


def run(first: Path, output: Path, observer: Observer, **wanted: Any) -> dict[str, Any]:
    settings = Wanted(**{"layout": "compressed", **wanted})
    return export(first, output, settings, observer=observer)


def test_what_is_interrupted_is_gone_on_with_to_the_same_bytes(source, tmp_path, monkeypatch):
    first, target = converted(source, tmp_path, "gptq"), tmp_path / "moved"
    run(first, target, Observer())
    expected = checkpoints.files(target)
    shutil.rmtree(target)
    encoded, encode = list[str](), Moved.encoded

    def counted(item: Moved, *given: Any) -> Any:
        encoded.append(item.matrix.name)
        return encode(item, *given)

    monkeypatch.setattr(Moved, "encoded", counted)
    for at in (9, 4, 10):
        with pytest.raises(EnvironmentFailure):
            run(first, target, Stopping(at))
        assert sorted(path.name for path in tmp_path.iterdir()) == [".moved.loftq-export", "gptq"]
    run(first, target, Observer())
    assert checkpoints.files(target) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gptq", "moved"]
    assert len(encoded) == len(set(encoded)) == 7


def test_unfinished_work_is_not_mixed_with_other_work(source, tmp_path):
    first, target = converted(source, tmp_path, "gptq"), tmp_path / "moved"
    with pytest.raises(EnvironmentFailure):
        run(first, target, Stopping(9))
    with pytest.raises(OutputConflictError, match=r"unfinished export .*layout 'compressed' there"):
        run(first, target, Observer(), layout="awq")
    loftq_cli.export(first, target, layout="awq", overwrite=True)
    assert equal(decoded(target), decoded(first))


def test_damage_to_what_was_written_is_written_again(source, tmp_path):
    first, target = converted(source, tmp_path, "gptq"), tmp_path / "moved"
    with pytest.raises(EnvironmentFailure):
        run(first, target, Stopping(9))
    for file in (tmp_path / ".moved.loftq-export/output").glob("*.safetensors"):
        makers.flip_bit(file)
    run(first, target, Observer())
    assert equal(decoded(target), decoded(first))
