"""What calibration costs beside its own products: the blocks' forward, and x^T x of each input.

Llama, random, of SmolLM2-135M's shapes (30 blocks, 576 x 1536) and of 270M parameters (16 blocks,
1024 x 3072); full moments of 16 windows of 512 random tokens, written to a file, with the two
windows that the order of blocks is found out with. The products: each block called on each window,
one after the other, and the sum of x^T x in float32 of every distinct input, nothing checked and
nothing kept. One run after one that does not count.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from loftq_cli.calibration.measure import Calibration
from loftq_cli.statistics.writer import StatisticsWriter
from tests.benchmarks.tools import table

_SHAPES = {"135M": (576, 1536, 30, 9, 3), "270M": (1024, 3072, 16, 16, 8)}
_WINDOWS, _LENGTH, _ROUNDS = 16, 512, 1
# Layers that share an input; the first of each is watched.
_INPUTS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
_SHARING = ("self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj")


def main() -> None:
    threads = torch.get_num_threads()
    windows = torch.randint(0, 49152, (_WINDOWS, _LENGTH))
    rows = []
    for name in _SHAPES:
        measured, products = _least(_model(name), windows)
        ratio = f"{measured / products:.2f} x"
        rows.append([name, str(threads), f"{measured:.1f} s", f"{products:.1f} s", ratio])
    table(("model", "threads", "calibration", "its products", "ratio"), rows)


def _model(name: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    width, inner, blocks, heads, groups = _SHAPES[name]
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def _least(model: Any, windows: torch.Tensor) -> tuple[float, float]:
    """Seconds of calibration and of its products."""
    least = [float("inf")] * 2
    for turn in range(_ROUNDS + 1):  # the first is not counted
        for number, work in enumerate((_calibrate, _products)):
            started = time.perf_counter()
            work(model, windows)
            if turn:
                least[number] = min(least[number], time.perf_counter() - started)
    return least[0], least[1]


@torch.no_grad()
def _calibrate(model: Any, windows: torch.Tensor) -> None:
    names = [
        f"model.layers.{block}.{layer}"
        for block in range(len(model.model.layers))
        for layer in (*_INPUTS, *_SHARING)
    ]
    layers = {f"{name}.weight": name for name in names}
    widths = {weight: model.get_submodule(name).in_features for weight, name in layers.items()}

    def call(ids: torch.Tensor) -> object:
        return model(input_ids=ids, use_cache=False)

    given = Calibration(model, call, windows, layers, {}, widths, Path("random"), model.device)
    with (
        tempfile.TemporaryDirectory() as directory,
        StatisticsWriter(Path(directory) / "stats.safetensors", layers) as writer,
    ):
        for found, moments in given.measure(full=True, begin=_ignore, advance=_ignore):
            writer.add(found, moments.value(), moments.tokens)
        writer.publish()


@torch.no_grad()
def _products(model: Any, windows: torch.Tensor) -> None:
    sums: dict[str, torch.Tensor] = {}

    def add(name: str, x: torch.Tensor) -> None:
        flat = x.flatten(0, -2)
        product = flat.T @ flat
        sums[name] = sums[name].add_(product) if name in sums else product

    states = [model.model.embed_tokens(window[None]) for window in windows]
    places = torch.arange(windows.shape[1])[None]
    turned = model.model.rotary_emb(states[0], places)
    for block in model.model.layers:
        sums.clear()
        handles = [
            block.get_submodule(name).register_forward_pre_hook(
                lambda _, args, name=name: add(name, args[0])
            )
            for name in _INPUTS
        ]
        states = [block(state, position_embeddings=turned) for state in states]
        for handle in handles:
            handle.remove()


def _ignore(_: object) -> None:
    """Nobody watches."""
