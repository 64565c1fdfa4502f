"""llama-server, asked once over HTTP."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from tests.support.places import free_port


def answered(binary: Path, served: Path, prompt: list[int], *, lora: bool) -> dict[int, float]:
    """The likeliest next tokens, and the logarithms of how likely they are, after ``prompt``, that
    ``binary`` gives of model.gguf in ``served``, with adapter.gguf if ``lora``."""
    port = free_port()
    line = f"--port {port} -c 512 -t 1 --no-warmup -m".split()
    words = [str(binary), *line, str(served / "model.gguf")]
    words += ["--lora", str(served / "adapter.gguf")] if lora else []
    body = {"prompt": prompt, "n_predict": 1, "temperature": 0, "n_probs": 20}
    with (served.parent / "server.txt").open("wb") as log:
        process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT)
        try:
            found = asked(f"http://127.0.0.1:{port}/completion", body)
        finally:
            process.terminate()
            process.wait()
    (first,) = found["completion_probabilities"]
    return {each["id"]: each["logprob"] for each in first["top_logprobs"]}


def asked(address: str, body: dict[str, object]) -> dict[str, Any]:
    """The answer, once the server is there and has its model."""
    for _ in range(240):
        request = urllib.request.Request(
            address, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request) as answer:
                return dict(json.loads(answer.read()))
        except urllib.error.URLError as error:
            if getattr(error, "code", 503) != 503:  # else it is loading, or not there yet
                raise
        time.sleep(0.5)
    raise AssertionError("llama-server does not answer")
