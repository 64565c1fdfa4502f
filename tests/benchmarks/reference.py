"""PEFT 0.10.0's loftq_init, the last release whose 2-bit path runs on a CPU.

Its one file is fetched from the package index into a temporary directory and imported from there;
it is not part of this repository.
"""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from types import ModuleType

import torch

_FILE = "peft/utils/loftq_utils.py"


@functools.cache
def _module() -> ModuleType:
    with tempfile.TemporaryDirectory() as scratch:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "peft==0.10.0"]
        subprocess.run([*pip, "-d", scratch], check=True, stderr=subprocess.DEVNULL)
        wheel = next(Path(scratch).glob("peft-*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(_FILE, scratch)
        spec = importlib.util.spec_from_file_location("peft_0_10_loftq", Path(scratch) / _FILE)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    # Its bitsandbytes path needs CUDA; without it 4 bits run as 2 bits do.
    module.is_bnb_4bit_available = lambda: False  # type: ignore[attr-defined]
    return module


def loftq_init(weight: torch.Tensor, bits: int, rank: int, iters: int) -> float:
    """Run PEFT's initialisation; the relative residual it ends at."""
    module = _module()
    quantized, lora_A, lora_B = module.loftq_init(
        weight, num_bits=bits, reduced_rank=rank, num_iter=iters
    )
    residual = weight.double() - quantized.double() - lora_B.double() @ lora_A.double()
    return float(residual.norm() / weight.double().norm())
