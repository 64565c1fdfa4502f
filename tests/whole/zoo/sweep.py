"""``python -m tests.whole.zoo.sweep [WORDS …]``: every class that ``small`` can build, converted at
2 bits and rank 4 in layout loftq, loaded in both ways, compared with its merged checkpoint, and
trained a step. A line each, and a table of counts; ends with 1 if one is wrong.

WORDS are parts of model types; none: all. ``--fifth N``: those of which the hash of the name leaves
N of 5.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import loftq_cli
from loftq_cli.errors import LoftqError
from tests.whole.zoo import small

QUICK: dict[str, Any] = {"bits": 2, "rank": 4, "iters": 1, "threads": 1, "layout": "loftq"}
TOKENS = (torch.arange(22).view(2, 11) * 7 + 3) % 90 + 10
TOLERANCE = 1e-3
SECONDS = 120


@dataclass(frozen=True)
class Verdict:
    """What became of a class: ``kind`` "right", "refused" before anything was computed, "unbuilt",
    or what is wrong."""

    kind: str
    detail: str = ""


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
    """Of two sequences of eleven tokens."""
    inputs: dict[str, Any] = {"input_ids": TOKENS}
    if "use_cache" in inspect.signature(model.forward).parameters or hasattr(model, "peft_config"):
        inputs["use_cache"] = False
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = TOKENS[:, :5]
    found: torch.Tensor = model(**inputs).logits
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
        return Verdict("refused", error.message[:150])
    share = sum(m["shape"][0] * m["shape"][1] for m in manifest["matrices"])
    share = round(100 * share / manifest["totals"]["parameters"])
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
            return Verdict(f"refused by {way}", error.message[:150])
        except Exception as error:
            return Verdict(f"crash in {way}", _line(error))
        if not ways[way] < TOLERANCE:
            return Verdict(f"wrong in {way}", f"{ways[way]:.1e}")
    loaded.train()
    logits(loaded).square().mean().backward()
    trained = [p for p in loaded.parameters() if p.requires_grad and p.grad is not None]
    if not any(bool(p.grad.any()) for p in trained if p.grad is not None):
        return Verdict("no gradient")
    return Verdict("right", f"{share} % quantized")


def _by_load(output: Path, found: Any) -> Any:
    return loftq_cli.load(output, dtype="float32")


def _by_hand(output: Path, found: Any) -> Any:
    import peft

    backbone = found.from_pretrained(output, dtype="float32")
    return peft.PeftModel.from_pretrained(
        backbone, output, subfolder="loftq_init", is_trainable=True
    )


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:150]


def _too_long(*_: object) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--fifth", type=int)
    given = parser.parse_args()
    signal.signal(signal.SIGALRM, _too_long)
    counts: dict[str, Counter[str]] = {}
    for mapping, kind, name in classes(given.words, given.fifth):
        with tempfile.TemporaryDirectory(prefix="zoo-") as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            signal.alarm(SECONDS)
            try:
                verdict = judged(mapping, kind, name, Path(folder))
            except Exception as error:
                traceback.print_exc(limit=4)
                verdict = Verdict("crash", _line(error))
            finally:
                signal.alarm(0)
        counts.setdefault(mapping, Counter())[verdict.kind] += 1
        print(f"ZOO {mapping:10} {kind:32} {verdict.kind:16} {verdict.detail}", flush=True)
    for mapping, counter in counts.items():
        told = ", ".join(f"{count} {kind}" for kind, count in counter.most_common())
        print(f"ZOO {mapping}: {told}", flush=True)
    fine = {"right", "refused", "unbuilt"}
    return int(any(set(counter) - fine for counter in counts.values()))


if __name__ == "__main__":
    sys.exit(main())
