"""``make serve-check``, second half: vLLM serves what case.py converted, with each adapter, and has
to generate the same tokens. Runs in an environment of its own, which knows nothing of loftq."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def main(place: Path) -> int:
    import vllm
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    wrong = 0
    for file in sorted(place.glob("uniform*.json")):
        expected: dict[str, Any] = json.loads(file.read_text())
        count = len(expected["tokens"][0][0])
        sampling = SamplingParams(
            temperature=0, max_tokens=count, ignore_eos=True, detokenize=False
        )
        prompts = [{"prompt_token_ids": prompt} for prompt in expected["prompts"]]
        for model, adapters in zip(expected["models"], expected["adapters"], strict=True):
            llm = LLM(
                model,
                skip_tokenizer_init=True,
                enable_lora=True,
                max_lora_rank=expected["rank"],
                max_model_len=128,
                enforce_eager=True,
                dtype="bfloat16",
            )
            for number, path in enumerate(adapters, 1):
                adapter = LoRARequest(f"adapter{number}", number, path)
                outputs = llm.generate(prompts, sampling, lora_request=adapter, use_tqdm=False)
                found = [list(output.outputs[0].token_ids) for output in outputs]
                wanted = expected["tokens"][number - 1]
                same = sum(one == other for one, other in zip(found, wanted, strict=True))
                wrong += len(prompts) - same
                names = f"{Path(model).name}, {Path(path).name}"
                print(
                    f"vLLM {vllm.__version__}, {names}: {same} of {len(prompts)} prompts have the "
                    f"same {count} tokens",
                    flush=True,
                )
            del llm
    return 1 if wrong else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("place", type=Path)
    sys.exit(main(parser.parse_args().place))
