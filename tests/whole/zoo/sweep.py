"""``python -m tests.whole.zoo.sweep [WORDS …]``: every class that ``small`` can build, converted at
2 bits and rank 4 in layout loftq, loaded in both ways, compared with its merged checkpoint, and
trained a step. A line each, and counts; ends with 1 if one is wrong. All of them: writes
docs/results/zoo.json, and the tables of docs/models.md.

WORDS are parts of model types; none: all. ``--fifth N``: those of which the hash of the name leaves
N of 5.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import math
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

import loftq_cli
from loftq_cli.errors import LoftqError
from loftq_cli.families.blocks import is_in_block
from tests.whole.zoo import page, results, small
from tests.whole.zoo.inputs import inputs
from tests.whole.zoo.results import Found, Results, Verdict

QUICK: dict[str, Any] = {"bits": 2, "rank": 4, "iters": 1, "threads": 1, "layout": "loftq"}
TOLERANCE = 1e-3
SECONDS = 120


def classes(words: list[str], fifth: int | None) -> Iterator[tuple[str, str, str]]:
    """(mapping, model type, class) of what is asked for."""
    for mapping, names in small.MAPPINGS.items():
        for kind, listed in names.items():
            name = listed if isinstance(listed, str) else listed[0]
            number = int(hashlib.sha256(f"{mapping} {kind}".encode()).hexdigest(), 16) % 5
            wanted = not words or any(word in kind for word in words)
            if wanted and (fifth is None or number == fifth):
                yield mapping, kind, name


def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(**inputs(model)).logits
    return found.float()


def judged(mapping: str, kind: str, name: str, work: Path) -> Verdict:
    """Convert one class and look at it from all sides."""
    try:
        model = small.build(kind, name)
        with torch.no_grad():
            logits(model)
        model.save_pretrained(work / "source")
        transformers.AutoConfig.from_pretrained(work / "source")
    except Exception as error:
        return Verdict("unbuilt", _line(error))
    del model
    try:
        manifest = loftq_cli.convert(work / "source", work / "out", **QUICK)
    except LoftqError as error:
        return Verdict("refused", error.message[:300])
    share = _share(manifest)
    found = getattr(transformers, name)
    loftq_cli.merge(work / "out", work / "merged")
    with torch.no_grad():
        merged = logits(found.from_pretrained(work / "merged", dtype="float32").eval())
    ways = {}
    for way, load in (("load", _by_load), ("plain", _by_hand)):
        try:
            loaded = load(work / "out", found)
            with torch.no_grad():
                ways[way] = float((logits(loaded.eval()) - merged).abs().max() / merged.abs().max())
        except LoftqError as error:
            return Verdict(f"refused by {way}", error.message[:300])
        except Exception as error:
            traceback.print_exc(limit=-5)
            return Verdict(f"crash in {way}", _line(error))
        if lost := _drawn(loaded):
            return Verdict(f"lost in {way}", f"{len(lost)} adapters, {lost[0]} among them")
        if not ways[way] < TOLERANCE:
            return Verdict(f"wrong in {way}", f"{ways[way]:.1e}")
    return _trained(loaded, share)


def _drawn(loaded: Any) -> list[str]:
    """The adapters that PEFT drew instead of loading them: their B is zero. It takes those that
    read images too, which text says nothing of."""
    return [
        name
        for name, parameter in loaded.named_parameters()
        if ".lora_B." in name and not bool(parameter.any())
    ]


def _share(manifest: dict[str, Any]) -> int:
    """How much of the weights in blocks is quantized, in percent. Tables are left out: they are not
    as small as the blocks."""
    quantized = sum(math.prod(each["shape"]) for each in manifest["matrices"])
    kept = [each for each in manifest["passed_through"] if is_in_block(each["name"])]
    return round(100 * quantized / (quantized + sum(math.prod(each["shape"]) for each in kept)))


def _trained(loaded: Any, share: int) -> Verdict:
    """After a step of training: whether what has an adapter, and takes part, got gradients."""
    part: list[Any] = []
    for module in loaded.modules():
        if hasattr(module, "lora_A"):
            module.register_forward_hook(lambda module, *_: part.append(module))
    loaded.train()
    found = logits(loaded)
    if not part:
        return Verdict("right", "nothing that is quantized takes part in text", share)
    if not found.requires_grad:  # reversible layers: their input has to
        loaded.enable_input_require_grads()
        found = logits(loaded)
    found.square().mean().backward()
    gradients = [p.grad for module in part for p in module.parameters() if p.requires_grad]
    if not any(gradient is not None and bool(gradient.any()) for gradient in gradients):
        return Verdict("no gradient")
    return Verdict("right", "", share)


def _by_load(output: Path, found: Any) -> Any:
    return loftq_cli.load(output, dtype="float32")


def _by_hand(output: Path, found: Any) -> Any:
    import peft

    backbone = found.from_pretrained(output, dtype="float32")
    return peft.PeftModel.from_pretrained(
        backbone, output, subfolder="loftq_init", is_trainable=True
    )


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:300]


def _too_long(*_: object) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--fifth", type=int)
    given = parser.parse_args()
    signal.signal(signal.SIGALRM, _too_long)
    found = []
    for mapping, kind, name in classes(given.words, given.fifth):
        verdict = _watched(mapping, kind, name)
        found.append(Found(mapping, kind, name, verdict))
        share = "" if verdict.share is None else f"{verdict.share} % quantized "
        told = f"{share}{verdict.detail}"
        print(f"ZOO {mapping:10} {kind:32} {verdict.kind:16} {told}", flush=True)
    if not given.words and given.fifth is None:
        results.write(Results(_about(), found))
        page.PAGE.write_text(page.rewritten(page.PAGE.read_text("utf-8"), results.read()), "utf-8")
    for mapping in small.MAPPINGS:
        counter = Counter(each.verdict.kind for each in found if each.mapping == mapping)
        told = ", ".join(f"{count} {kind}" for kind, count in counter.most_common())
        print(f"ZOO {mapping}: {told}", flush=True)
    return int(bool({each.verdict.kind for each in found} - {"right", "refused", "unbuilt"}))


def _watched(mapping: str, kind: str, name: str) -> Verdict:
    """:func:`judged`, whatever happens and however long it takes."""
    with tempfile.TemporaryDirectory(prefix="zoo-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        signal.alarm(SECONDS)
        try:
            return judged(mapping, kind, name, Path(folder))
        except Exception as error:
            traceback.print_exc(limit=4)
            return Verdict("crash", _line(error))
        finally:
            signal.alarm(0)


def _about() -> dict[str, str]:
    packages = {name: version(name) for name in ("transformers", "peft")}
    return {"date": datetime.date.today().isoformat(), **packages}


if __name__ == "__main__":
    sys.exit(main())
