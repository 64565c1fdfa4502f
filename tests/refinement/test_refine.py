"""A refined conversion: nearer to its original, of the same form, and what any consumer loads."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loftq_cli
from loftq_cli.errors import (
    OutputConflictError,
)
from loftq_cli.machine.observer import Observer
from loftq_cli.refinement import block as training
from loftq_cli.refinement import cost, room, run
from loftq_cli.refinement.refine import refine as refining
from loftq_cli.refinement.settings import Refining
from tests.support import makers
from tests.support.calibrated import LENGTH
from tests.support.contents import stored
from tests.support.refined import ASKED, LAYOUTS, SETTINGS, refine


def divergence(place: Path, name: str, kind: str = "llama") -> float:
    """How far the outputs of what was merged, an ordinary checkpoint, are from the original's."""
    shutil.rmtree(place / "merged", ignore_errors=True)
    loftq_cli.merge(place / name, place / "merged")
    found = loftq_cli.evaluate(
        place / "merged", text=place / "text.txt", source=place / kind, length=LENGTH, device="cpu"
    )
    return float(found["kl"] if kind == "llama" else found["relative_error"])


def shapes(directory: Path) -> dict[str, tuple[torch.dtype, torch.Size]]:
    files = [directory / "model.safetensors", directory / "loftq_init/adapter_model.safetensors"]
    return {
        name: (tensor.dtype, tensor.shape)
        for file in files
        for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_nearer_and_of_the_same_form(place: Path, layout: str) -> None:
    before, after = f"{layout}-before", f"{layout}-after"
    loftq_cli.convert(place / "llama", place / before, **{**SETTINGS, **LAYOUTS[layout]})
    result = refine(place, before, after)
    assert divergence(place, after) < 0.75 * divergence(place, before)
    assert shapes(place / after) == shapes(place / before)
    configs = [json.loads((place / name / "config.json").read_text()) for name in (before, after)]
    assert configs[0] == configs[1]
    for name, told in zip(("model.layers.0", "model.layers.1"), result["blocks"], strict=True):
        assert told["name"] == name
        assert 0 < told["kept"] <= told["steps"] == 20
        assert told["held_after"] < told["held_before"]
        assert told["after"] < told["before"]
    # Residuals are those of what was written, which the original's weights are told to be off by.
    report = loftq_cli.error_report(place / after, place / "llama")
    earlier = loftq_cli.error_report(place / before)
    assert report["totals"]["relative_residual"] > earlier["totals"]["relative_residual"]
    held = loftq_cli.inspect(place / after, verify=True)
    assert held["refined"]["tokens"] == result["tokens"] == 20 * LENGTH
    old, new = (stored(place / name) for name in (before, after))
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    if layout == "dense":
        assert changed == set()
    else:
        codes = any(name.endswith(("weight", "qweight", "packed")) for name in changed)
        assert codes == (layout != "trellis")
        assert any("scale" in name or "absmax" in name for name in changed)
    assert not any("zero" in name or "norm" in name or "map" in name for name in changed)


@pytest.mark.parametrize("kind", ["bert", "bart"])
def test_encoders_and_encoder_decoders(place: Path, kind: str) -> None:
    refine(place, f"{kind}-out", f"{kind}-blocks", kind)
    refine(place, f"{kind}-out", f"{kind}-whole", kind, epochs=0, end_to_end=16)
    start = divergence(place, f"{kind}-out", kind)
    assert divergence(place, f"{kind}-blocks", kind) < 0.8 * start
    assert divergence(place, f"{kind}-whole", kind) < 0.9 * start


def test_end_to_end_after_the_blocks(place: Path) -> None:
    blocks = refine(place, "llama-out", "both-blocks")
    both = refine(place, "llama-out", "both", end_to_end=24)
    assert both["blocks"] == blocks["blocks"]
    told = both["end_to_end"]
    assert told["held_after"] < told["held_before"]
    assert told["steps"] == 24
    start, first, second = (
        divergence(place, name) for name in ("llama-out", "both-blocks", "both")
    )
    assert second < first < start
    assert loftq_cli.inspect(place / "both", verify=True)["refined"]["end_to_end"] == told


@pytest.mark.parametrize("layout", ["loftq", "gptq", "int8"])
def test_end_to_end_codes_stay(place: Path, layout: str) -> None:
    before, after = f"{layout}-begun", f"{layout}-ended"
    loftq_cli.convert(place / "llama", place / before, **{**SETTINGS, **LAYOUTS[layout]})
    told = refine(place, before, after, epochs=0, end_to_end=16)["end_to_end"]
    assert told["held_after"] < told["held_before"]
    old, new = (stored(place / name) for name in (before, after))
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed
    assert all("scale" in name or "absmax" in name for name in changed)


def test_activations_beyond_the_limit_go_to_the_disk_and_nothing_changes(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refine(place, "llama-out", "in-memory")
    monkeypatch.setattr(run, "_SHARE", 0.0)
    refine(place, "llama-out", "on-disk")
    assert contents(place / "in-memory") == contents(place / "on-disk")


def contents(directory: Path) -> dict[str, bytes]:
    """Every file; of the manifest all but what tells of the machine and the time."""
    found = {}
    for path in directory.rglob("*"):
        if path.name == "loftq_manifest.json":
            manifest = json.loads(path.read_text())
            del manifest["environment"]
            found[path.name] = json.dumps(manifest).encode()
        elif path.is_file():
            found[path.relative_to(directory).as_posix()] = path.read_bytes()
    return found


class Interrupted(Exception):
    pass


class Stopping(Observer):
    """Ends the work after so many windows."""

    def __init__(self, windows: int) -> None:
        self._left = windows
        self.notes: list[str] = []

    def advance(self, amount: int) -> None:
        self._left -= amount
        if self._left < 0:
            raise Interrupted

    def note(self, text: str) -> None:
        self.notes.append(text)


def resumable(place: Path, to: str, observer: Observer, **options: Any) -> dict[str, Any]:
    wanted = Refining(**{**ASKED, "end_to_end": 8, **options})
    return refining(
        place / "llama-out",
        place / to,
        str(place / "llama"),
        [place / "text.txt"],
        wanted,
        observer=observer,
    )


def test_what_was_interrupted_goes_on_behind_the_last_block_with_the_same_bytes(
    place: Path,
) -> None:
    resumable(place, "undisturbed", Observer())
    for windows in (45, 130, 175, 190):  # in the first block, the second, end to end
        with pytest.raises(Interrupted):
            resumable(place, "resumed", Stopping(windows))
        assert not (place / "resumed").exists()
    stages = place / ".resumed.loftq-refine/stages"
    assert sorted(path.name for path in stages.iterdir()) == [
        "model.layers.0.safetensors",
        "model.layers.1.safetensors",
    ]
    trained: list[Any] = []
    first = training.train
    observer = Stopping(10**6)
    with pytest.MonkeyPatch.context() as patch:
        from loftq_cli.refinement import blocks

        def watched(*given: Any) -> training.Outcome:
            trained.append(given)
            return first(*given)

        patch.setattr(blocks, "train", watched)
        resumable(place, "resumed", observer)
    assert trained == []
    assert any("resuming" in note for note in observer.notes)
    assert contents(place / "resumed") == contents(place / "undisturbed")
    assert not list(place.glob(".resumed*"))
    again = Stopping(0)
    resumable(place, "resumed", again)
    assert any("finished already" in note for note in again.notes)


KILLED = """
import os, signal, sys
from pathlib import Path
from loftq_cli.machine.observer import Observer
from loftq_cli.refinement.refine import refine
from loftq_cli.refinement.settings import Refining

class Killing(Observer):
    left = 110
    def advance(self, amount):
        self.left -= amount
        if self.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

start, output, source, text = map(Path, sys.argv[1:5])
wanted = Refining(length=20, samples=20, epochs=4, device="cpu")
refine(start, output, str(source), [text], wanted, observer=Killing())
"""


def test_a_process_that_is_killed_is_gone_on_with(place: Path) -> None:
    refine(place, "llama-out", "not-killed")
    places = [place / name for name in ("llama-out", "killed", "llama", "text.txt")]
    command = [sys.executable, "-W", "ignore", "-c", KILLED, *map(str, places)]
    threads = str(torch.get_num_threads())
    environment = {**os.environ, "OMP_NUM_THREADS": threads}
    killed = subprocess.run(command, env=environment, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert not (place / "killed").exists()
    stages = place / ".killed.loftq-refine/stages"
    assert [path.name for path in stages.iterdir()] == ["model.layers.0.safetensors"]
    refine(place, "llama-out", "killed")
    assert contents(place / "killed") == contents(place / "not-killed")
    assert not list(place.glob(".killed*"))


def test_a_damaged_block_is_done_again_and_other_work_is_refused(place: Path) -> None:
    with pytest.raises(Interrupted):
        resumable(place, "damaged", Stopping(85))
    for file in (place / ".damaged.loftq-refine/stages").iterdir():
        makers.flip_bit(file)
    with pytest.raises(OutputConflictError, match=r"unfinished refinement .*seed"):
        resumable(place, "damaged", Observer(), seed=3)
    resumable(place, "damaged", Observer())
    resumable(place, "undamaged", Observer())
    assert contents(place / "damaged") == contents(place / "undamaged")
    with pytest.raises(OutputConflictError, match="holds a conversion"):
        resumable(place, "damaged", Observer(), seed=3)


def test_a_loss_that_is_not_finite_leaves_the_block(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from loftq_cli.refinement import blocks

    monkeypatch.setattr(blocks, "token_loss", lambda found, wanted: found.sum() * torch.nan)
    with caplog.at_level("INFO", "loftq"):
        result = refine(place, "llama-out", "nan")
    assert [told["finite"] for told in result["blocks"]] == [False, False]
    assert [told["held_before"] for told in result["blocks"]] == [None, None]
    assert "model.layers.1: a loss was not finite; it stays as it was" in caplog.text
    old, new = stored(place / "llama-out"), stored(place / "nan")
    assert all(torch.equal(old[name], new[name]) for name in old)
    loftq_cli.inspect(place / "nan", verify=True)


def test_a_trained_adapter_is_gone_on_with(place: Path, tmp_path: Path) -> None:
    trained = tmp_path / "trained"
    shutil.copytree(place / "llama-out/loftq_init", trained)
    file = trained / "adapter_model.safetensors"
    held = {name: tensor + 0.02 for name, tensor in load_file(file).items()}
    save_file(held, file)
    config = json.loads((trained / "adapter_config.json").read_text())
    config |= {"lora_alpha": 2 * config["lora_alpha"]}
    (trained / "adapter_config.json").write_text(json.dumps(config))
    result = refine(place, "llama-out", "from-trained", adapter=trained)
    other = refine(place, "llama-out", "from-start")
    pairs = zip(result["blocks"], other["blocks"], strict=True)
    assert all(one["held_before"] > two["held_before"] for one, two in pairs)
    report = loftq_cli.inspect(place / "from-trained")["refined"]
    assert report["adapter"] is not None
    assert shapes(place / "from-trained") == shapes(place / "from-start")
    # Nothing is trained at rates this small: what is written is the trained adapter's product.
    with pytest.MonkeyPatch.context() as patch:
        from loftq_cli.refinement import blocks

        patch.setattr(blocks, "token_loss", lambda found, wanted: found.sum() * torch.nan)
        refine(place, "llama-out", "as-trained", adapter=trained)
    loaded = loftq_cli.load(place / "as-trained").eval()
    expected = loftq_cli.load(place / "llama-out", adapter=trained).eval()
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, expected(ids).logits)


def test_what_is_refined_is_exported_and_refined_again(place: Path) -> None:
    first = {**SETTINGS, "layout": "gptq"}
    loftq_cli.convert(place / "llama", place / "gptq-out", **first)
    loftq_cli.export(place / "gptq-out", place / "moved", layout="compressed")
    refine(place, "moved", "moved-refined")
    loftq_cli.export(place / "moved-refined", place / "moved-back", layout="gptq")
    before, after = (loftq_cli.error_report(place / n) for n in ("moved-refined", "moved-back"))
    assert before["totals"] == after["totals"]
    result = refine(place, "moved-back", "twice")
    assert result["layout"] == "gptq"
    told = loftq_cli.inspect(place / "twice")["refined"]
    assert told["fingerprint"] == loftq_cli.inspect(place / "moved-refined")["fingerprint"]


def test_what_is_left_open_is_what_there_is_memory_for(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def settled(**options: Any) -> tuple[Any, Any]:
        wanted = Refining(**{**ASKED, "epochs": None, **options})
        found = refining(
            place / "llama-out",
            place / "open",
            str(place / "llama"),
            [place / "text.txt"],
            wanted,
            dry_run=True,
            observer=Observer(),
        )
        return found["epochs"], found["steps"]

    assert settled() == (1, 48)
    assert settled(epochs=0) == (0, 48)
    assert settled(end_to_end=0) == (1, 0)
    assert settled(epochs=3) == (3, 0)
    assert settled(end_to_end=5) == (0, 5)
    assert settled(epochs=3, end_to_end=5) == (3, 5)
    with pytest.raises(Interrupted):
        resumable(place, "open", Stopping(10), epochs=0)
    monkeypatch.setattr(room, "_SHARE", 0.0)
    assert settled() == (0, 8)  # as it was begun
    shutil.rmtree(place / ".open.loftq-refine")
    assert settled() == (1, 0)
    assert settled(end_to_end=5) == (0, 5)


def test_blocks_that_keep_nothing_give_the_same(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {"epochs": 0, "end_to_end": 3}
    refine(place, "llama-out", "keeps", **asked)
    monkeypatch.setattr(cost, "_OF_INPUT", 1 << 50)
    refine(place, "llama-out", "keeps-nothing", **asked)
    assert contents(place / "keeps") == contents(place / "keeps-nothing")
