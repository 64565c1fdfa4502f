"""Statistics taken behind converted blocks against those of the original model: does it pay?

MiniLM, 2 bits, rank 16, full moments of movie reviews. "converted": every block is measured with
the blocks in front of it as they were converted. "corrected": in addition W is replaced by the
matrix that makes the best of those inputs, ``W E[x y^T] (E[y y^T] + ridge)^-1`` for inputs x of the
original and y behind converted blocks, before it is decomposed. Sentence embeddings of other
reviews are compared with the original's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from loftq_cli.numerics.alternation import decompose
from loftq_cli.numerics.decomposition import Procedure
from loftq_cli.numerics.lowrank import fastest_products
from loftq_cli.numerics.quantizers.methods import make_quantizer
from loftq_cli.numerics.weighting import make_weighting
from tests.benchmarks import hidden
from tests.benchmarks.packaged import rated_texts
from tests.benchmarks.tools import minilm, table

_LAYERS = (
    *("attention.self.query", "attention.self.key", "attention.self.value"),
    *("attention.output.dense", "intermediate.dense", "output.dense"),
)
_CALIBRATION, _EVALUATION = slice(0, 320), slice(1000, 1128)
_RIDGES = (0.01, 0.1)  # of the mean square of an input

Inputs = dict[str, torch.Tensor]


def main() -> None:
    from transformers import AutoModel, AutoTokenizer

    texts = [text for _, _, text in rated_texts("movieReviewSnippets")]
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    original = AutoModel.from_pretrained(minilm()).eval()
    calibration = hidden.batches(tokenizer, texts[_CALIBRATION])
    evaluation = hidden.batches(tokenizer, texts[_EVALUATION])
    wanted = hidden.embeddings(original, evaluation)
    kinds: list[tuple[str, float | None]] = [("original", None), ("converted", None)]
    kinds += [("corrected", ridge) for ridge in _RIDGES]
    rows = []
    for method in ("nf", "uniform"):
        for kind, ridge in kinds:
            model = _converted(original, calibration, method, kind, ridge)
            found = hidden.embeddings(model, evaluation)
            cosine = torch.cosine_similarity(found, wanted).mean()
            error = (found - wanted).norm() / wanted.norm()
            name = kind if ridge is None else f"{kind}, ridge {ridge}"
            rows.append([method, name, f"{cosine:.4f}", f"{error:.4f}"])
    tokens = sum(int(batch["attention_mask"].sum()) for batch in calibration)
    print(f"{tokens} tokens of calibration\n")
    table(("method", "statistics of", "cosine", "error of the embeddings"), rows)


def _converted(
    original: Any, batches: list[Any], method: str, kind: str, ridge: float | None
) -> Any:
    """A copy of ``original`` with every linear layer of its blocks replaced by Q + B A."""
    model = copy.deepcopy(original)
    for number, block in enumerate(model.encoder.layer):
        true = _inputs(original, number, batches)
        seen = true if kind == "original" else _inputs(model, number, batches)
        for layer in _LAYERS:
            linear = block.get_submodule(layer)
            x, y = true[layer], seen[layer]
            weight, moments = linear.weight.data, y.T @ y / len(y)
            if ridge is not None:
                damped = moments + ridge * moments.diagonal().mean() * torch.eye(len(moments))
                weight = torch.linalg.solve(damped, (y.T @ x / len(y)) @ weight.T).T.contiguous()
            products = fastest_products(weight.device)
            settings = Procedure(
                rank=16,
                iters=5,
                momentum=True,
                feedback=True,
                products=products,
                name=f"{number}.{layer}",
            )
            d = decompose(
                weight,
                make_quantizer(method, 2, 64, "mse", native=True),
                settings,
                make_weighting(moments, products),
            )
            linear.weight.data = d.backbone() + d.lora_B @ d.lora_A
    return model


@torch.inference_mode()
def _inputs(model: Any, number: int, batches: list[Any]) -> Inputs:
    """The inputs of the layers of a block, float32 (tokens, in), padding left out."""
    seen: dict[str, list[torch.Tensor]] = {layer: [] for layer in _LAYERS}
    for batch in batches:
        mask = batch["attention_mask"].bool()
        with _watched(model.encoder.layer[number], seen, mask):
            model(**batch)
    return {layer: torch.cat(parts) for layer, parts in seen.items()}


@contextmanager
def _watched(block: Any, seen: dict[str, list[torch.Tensor]], mask: torch.Tensor) -> Iterator[None]:
    handles = []
    for layer in _LAYERS:

        def see(_: Any, args: Any, layer: str = layer) -> None:
            seen[layer].append(args[0][mask].clone())

        handles.append(block.get_submodule(layer).register_forward_pre_hook(see))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
