"""What a user does with an output, run in a process of its own: load, attach, compute, train.

    python consumer.py jobs.json

Only the libraries that read the output are imported; ours only where a job asks for it. Each job
``{"name", "directory", "model_class", "dtype", "results", "import_loftq"}`` leaves
``results/name.json`` and ``results/name.safetensors`` behind.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import json
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch

STEPS = 3


def batch(config: Any) -> dict[str, torch.Tensor]:
    """Two sequences of eleven tokens, the second padded where the model masks."""
    tokens = (torch.arange(22).view(2, 11) * 7 + 3) % min(config.vocab_size, 90) + 3
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    inputs["attention_mask"][1, 8:] = 0
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens[:, :5].contiguous()
    return inputs


def outputs(model: torch.nn.Module, config: Any) -> torch.Tensor:
    """Everything the model returns, float32, of the tokens that are not padding."""
    inputs: dict[str, Any] = batch(config)
    if not config.is_encoder_decoder:
        inputs["use_cache"] = False
    returned = model(**inputs).to_tuple()
    mask = inputs["attention_mask"].bool()
    parts = []
    for tensor in (item for item in returned if isinstance(item, torch.Tensor)):
        whole = tensor.shape[:2] == mask.shape
        parts.append((tensor[mask] if whole else tensor).float().flatten())
    return torch.cat(parts)


def dequantized(module: Any) -> torch.Tensor | None:
    """The weight (out, in), float32, as the library decodes it; None where this is no layer."""
    if type(module).__name__ == "Linear4bit":
        from bitsandbytes import functional

        state = copy.copy(module.weight.quant_state)
        state.dtype = torch.float32
        return functional.dequantize_4bit(module.weight.data, state)
    if hasattr(module, "awq_weight_dequantize"):
        return module.awq_weight_dequantize("cpu", torch.float32).T
    if hasattr(module, "dequantize_weight"):
        return module.dequantize_weight().T.float()
    if hasattr(module, "weight_scales"):
        return module.dequantize()
    return module.weight.float() if type(module) is torch.nn.Linear else None


def digests(model: torch.nn.Module) -> dict[str, str]:
    """sha256 of every tensor of the state dict."""
    return {
        name: hashlib.sha256(_bytes(tensor)).hexdigest()
        for name, tensor in model.state_dict().items()
        if isinstance(tensor, torch.Tensor)
    }


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def train(model: torch.nn.Module, config: Any) -> dict[str, Any]:
    """Three AdamW steps towards a random target: losses, and which tensors they changed."""
    with torch.no_grad():
        start = outputs(model, config)
    generator = torch.Generator().manual_seed(1)
    target = start + start.std() * torch.randn(start.shape, generator=generator)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-4)
    before = digests(model)
    losses = []
    for step in range(STEPS + 1):
        loss = (outputs(model, config) - target).square().mean()
        losses.append(loss.item())
        if step < STEPS:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    after = digests(model)
    changed = [name for name, digest in after.items() if before[name] != digest]
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {"losses": losses, "changed": sorted(changed), "trainable": sorted(names)}


def consume(job: dict[str, Any]) -> None:
    """Do one job; see the module's docstring."""
    import peft
    import transformers
    from safetensors.torch import load_file, save_file

    directory = Path(job["directory"])
    model_class = getattr(transformers, job["model_class"])
    config = transformers.AutoConfig.from_pretrained(directory)
    for key, value in config.to_dict().items():
        if "dropout" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    model, info = model_class.from_pretrained(
        directory, config=config, dtype=job["dtype"], output_loading_info=True
    )
    layers = {
        name: (module, weight)
        for name, module in model.named_modules()
        if (weight := dequantized(module)) is not None
    }
    result: dict[str, Any] = {
        "info": {key: sorted(map(str, value)) for key, value in info.items()},
        "layers": {
            name: type(module).__module__.split(".")[0] for name, (module, _) in layers.items()
        },
        "held": {
            name: sum(t.nbytes for t in (*module.parameters(), *module.buffers()))
            - (0 if getattr(module, "bias", None) is None else module.bias.nbytes)
            for name, (module, _) in layers.items()
        },
    }
    tensors = {
        f"weight/{name}": weight.contiguous().clone() for name, (_, weight) in layers.items()
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapted = peft.PeftModel.from_pretrained(
            model, directory, subfolder="loftq_init", is_trainable=True
        )
    result["warnings"] = [str(w.message) for w in caught if "adapter" in str(w.message)]
    stored = load_file(directory / "loftq_init" / "adapter_model.safetensors")
    loaded = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    result["adapter_missing"] = sorted(stored.keys() - loaded.keys())
    result["adapter_unexpected"] = sorted(loaded.keys() - stored.keys())
    result["adapter_differs"] = [
        name
        for name in stored.keys() & loaded.keys()
        if not torch.equal(stored[name].float(), loaded[name].float())
    ]
    # In training mode all along: in evaluation, bitsandbytes repacks weights for CPUs that multiply
    # in bfloat16, and rounds with them. That path comes last.
    adapted.train()
    with torch.no_grad():
        tensors["output"] = outputs(adapted, config)
    result |= train(adapted, config)
    with torch.no_grad():
        tensors["trained"] = outputs(adapted, config)
        tensors["evaluated"] = outputs(adapted.eval(), config)
    result["imported_loftq"] = "loftq_cli" in sys.modules
    save_file(tensors, Path(job["results"]) / f"{job['name']}.safetensors")
    (Path(job["results"]) / f"{job['name']}.json").write_text(json.dumps(result))


def main() -> None:
    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        if job["import_loftq"]:
            importlib.import_module("loftq_cli")
        try:
            consume(job)
        except Exception:
            error = json.dumps({"error": traceback.format_exc()})
            (Path(job["results"]) / f"{job['name']}.json").write_text(error)


if __name__ == "__main__":
    main()
