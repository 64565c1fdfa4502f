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
    header_of,
    read_gguf,
)
from tests.benchmarks.language.model import FILE, PACKAGE, prepare
from tests.benchmarks.packaged import fetch, rated_texts
from tests.exporting.gguf.test_blocks import HELD, drawn
from tests.whole.llama_cpp import small
from tests.whole.llama_cpp.binding import Ggml, Llama
from tests.whole.llama_cpp.files import written
from tests.whole.llama_cpp.server import answered

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
        rows = drawn(kind, bits, 64, 0)
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


def experts(folder: Path, place: Path, tokenizer: Path) -> bool:
    """Whether a mixture of experts, whose stacked tensors are in codes, with pairs for each expert,
    does in llama.cpp what it does in transformers."""
    made = small.made(place, tokenizer, experts=True)
    texts = [[5, 17, 23, 42, 7, 99, 301], [3, 64, 8]]
    found = llama_logits(folder, made.served / "model.gguf", made.served / "adapter.gguf", texts)
    model = loftq_cli.load(made.output, dtype=torch.float32).eval()
    off = 0.0
    for theirs, tokens in zip(found, texts, strict=True):
        with torch.no_grad():
            wanted = model(torch.tensor([tokens])).logits[0]
        off = max(off, float((theirs - wanted).norm() / wanted.norm()))
    good = off < 0.05
    print(f"4 experts, 2 at a time: logits off by {off:.2%}{'' if good else ': WRONG'}", flush=True)
    return good


def served(place: Path, tokenizer: Path, binary: Path) -> bool:
    """Whether llama-server, with the adapter, finds tokens as likely as transformers does."""
    made = small.made(place, tokenizer, experts=False)
    prompt = [5, 17, 23, 42, 7, 99, 301]
    model = loftq_cli.load(made.output, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = model(torch.tensor([prompt])).logits[0, -1].log_softmax(dim=0)
    off = []
    for lora in (True, False):
        found = answered(binary, made.served, prompt, lora=lora)
        differences = [value - float(wanted[token]) for token, value in found.items()]
        off.append(max(map(abs, differences)))
    good = off[0] < 0.3 * off[1]
    print(
        f"llama-server --lora: log probabilities off by {off[0]:.3f}, without by {off[1]:.3f}"
        f"{'' if good else ': WRONG'}",
        flush=True,
    )
    return good


def main(folder: Path, binary: Path) -> int:
    fine = decoders(folder)
    with tempfile.TemporaryDirectory(prefix="llama-check-") as scratch:
        place = Path(scratch)
        prepare(place / "source")
        (place / "package").mkdir()
        with zipfile.ZipFile(fetch(PACKAGE, place / "package")) as package:
            file = Path(package.extract(FILE, place))
        fine &= experts(folder, place, file) and served(place, file, binary)
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
    parser.add_argument("server", type=Path, nargs="?")
    parser.add_argument("--logits", nargs=5)
    asked = parser.parse_args()
    if asked.logits:
        tell_logits(*asked.logits)
    else:
        sys.exit(main(asked.folder, asked.server))
