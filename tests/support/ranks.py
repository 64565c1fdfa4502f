"""Two processes that train conversions together: the gradients of a step with DDP and with FSDP2,
over gloo. Run as ``python ranks.py WORK DIRECTORY...``; what each finds is written to WORK."""

from __future__ import annotations

import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import peft  # noqa: F401
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM  # noqa: F401

import loftq_cli

RANKS = 2
TOKENS = torch.randint(3, 90, (4, 12), generator=torch.Generator().manual_seed(0))


def gradients(model: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of one step of language modelling, for every parameter that is trained, put together."""
    model(tokens, labels=tokens).loss.backward()
    return {
        name.removeprefix("module."): whole(parameter.grad)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def whole(tensor: Any) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def data_parallel(directory: str) -> Any:
    return DistributedDataParallel(loftq_cli.load(directory))


def sharded(directory: str) -> Any:
    model = loftq_cli.load(directory)
    for block in model.get_base_model().model.layers:
        fully_shard(block)
    fully_shard(model)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return model


WAYS = {"ddp": data_parallel, "fsdp": sharded}


def run(rank: int, work: str, directories: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{work}/store",  # a file, so that nobody has to choose a port
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=120),
    )
    for number, directory in enumerate(directories):
        for way, prepare in WAYS.items():
            model = prepare(directory)
            found = {
                "gradients": gradients(model, TOKENS.chunk(RANKS)[rank]),
                "state": {
                    name.removeprefix("module."): whole(tensor)
                    for name, tensor in model.state_dict().items()
                },
            }
            torch.save(found, Path(work) / f"{number}-{way}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    # Forked, because the imports take longer than everything else.
    start_processes(run, (sys.argv[1], sys.argv[2:]), RANKS, start_method="fork")
