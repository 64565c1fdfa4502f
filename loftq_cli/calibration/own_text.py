"""Text that a model writes itself, for who has none: sampled at temperature 1.

Half of it begins with the token that texts begin with, half with the turn of a user in the model's
chat format, if it has one: what the model then goes on with is what it takes for a question, and
its answer.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from loftq_cli.calibration.calibrate import dtype_to_run
from loftq_cli.calibration.measure import class_to_run
from loftq_cli.calibration.pretrained import fits, load_model, load_tokenizer, quiet
from loftq_cli.checkpoint.source import Source
from loftq_cli.errors import EnvironmentFailure, UnsupportedInputError
from loftq_cli.families.lengths import limits
from loftq_cli.machine.durable import write_file
from loftq_cli.machine.observer import Observer
from loftq_cli.machine.packages import required
from loftq_cli.machine.resources import memory_explained
from loftq_cli.planning.choices import choose_device
from loftq_cli.statistics.file import compact_json
from loftq_cli.statistics.save import contents_sha256

OWN = "self"
PASSAGES = 128
LENGTH = 512
"""Tokens a passage."""
_TOGETHER = 32
_REVISION = 1
"""Raised when the same model would write another text."""
_GIVE = "give a text file"
_MARK = "\N{OBJECT REPLACEMENT CHARACTER}"


def beside(output: Path, source: Source) -> Path:
    """Where the text that ``source`` writes lies, beside what is made of it: a model with other
    values has another place."""
    told = compact_json([contents_sha256(source), PASSAGES, LENGTH, _REVISION])
    digest = hashlib.sha256(told.encode()).hexdigest()
    return output.with_name(f"{output.name}.self-{digest[:12]}.txt")


def write(source: Source, path: Path, device: str, observer: Observer) -> None:
    """Have the model in ``source`` write the text file ``path``.

    Raises UnsupportedInputError for a model that does not write, EnvironmentFailure if it does not
    fit in memory or a package is missing, InputError for a model or tokenizer that cannot be used.
    """
    transformers = required("transformers", "train", "writing text")
    chosen = choose_device(device)
    loaded_as = class_to_run(source.directory, source.config.content)
    if not loaded_as.can_generate() or source.config.content.get("is_encoder_decoder"):
        raise UnsupportedInputError(
            f"{source.directory}: {loaded_as.__name__} does not write text", hint=_GIVE
        )
    tokenizer = load_tokenizer(source.directory)
    dtype = dtype_to_run(source.tensors, chosen)
    nbytes = sum(tensor.elements for tensor in source.tensors) * dtype.itemsize
    if not fits(nbytes, chosen):
        raise EnvironmentFailure(
            f"{source.directory}: writing text takes the whole model in the memory of {chosen}, "
            f"{nbytes / 1e9:.1f} GB",
            hint=_GIVE,
        )
    with memory_explained("writing text", hint=_GIVE, device=chosen), quiet(transformers):
        model: Any = load_model(
            source.directory,
            loaded_as,
            dtype=dtype,
            nbytes=nbytes,
            device=chosen,
            offload_folder=path.parent,
        )
        passages = sampled(model, beginnings(tokenizer, model), chosen, observer)
    write_file(path, "\n".join(map(tokenizer.decode, passages)).encode())


def beginnings(tokenizer: Any, model: Any) -> list[list[int]]:
    """The tokens that passages begin with, one kind after the other."""
    first = [
        token
        for token in (
            tokenizer.bos_token_id,
            getattr(model.config, "bos_token_id", None),
            tokenizer.eos_token_id,
        )
        if isinstance(token, int)
    ]
    found = [first[:1] or [0]]
    if getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": _MARK}]
        before, mark, _ = tokenizer.apply_chat_template(turn, tokenize=False).partition(_MARK)
        if mark:
            found.append(tokenizer(before, add_special_tokens=False)["input_ids"])
    return found


@torch.no_grad()
def sampled(
    model: Any, starts: list[list[int]], device: torch.device, observer: Observer
) -> list[list[int]]:
    """PASSAGES of LENGTH tokens, in equal parts from each of ``starts``."""
    model.generation_config.eos_token_id = None  # what comes behind an end is a text as well
    length = min([LENGTH, *limits(model.config.to_dict())])
    found: list[list[int]] = []
    observer.begin(PASSAGES, "writing text", " passages")
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            for number, start in enumerate(starts):
                wanted = PASSAGES * (number + 1) // len(starts)
                while len(found) < wanted:
                    count = min(_TOGETHER, wanted - len(found))
                    ids = torch.tensor([start] * count, device=device)
                    written = model.generate(
                        ids,
                        attention_mask=torch.ones_like(ids),
                        do_sample=True,
                        temperature=1.0,
                        top_k=0,
                        top_p=1.0,
                        max_length=length,
                        use_cache=True,
                        pad_token_id=0,
                    )
                    found += written.tolist()
                    observer.advance(count)
    finally:
        observer.end()
    return found
