"""What is said of a source before it is converted, and in the plan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loftq_cli.checkpoint.request import Request
from loftq_cli.conversion.prepare import prepare
from loftq_cli.planning import remarks
from loftq_cli.planning.describe import describe
from loftq_cli.settings.options import Options
from tests.support import checkpoints
from tests.support.bench import Recorder
from tests.support.checkpoints import LLAMA

LOCAL = {"AutoModelForCausalLM": "modeling_x.XForCausalLM", "AutoConfig": "configuration_x.XConfig"}
COPY = "copy it to the output, if you trust it, and load with trust_remote_code=True"


def remarked(tmp_path: Path, config: object = LLAMA, **files: object) -> list[str]:
    """The remarks on a checkpoint with these files beside it; ``__`` stands for a dot."""
    directory = checkpoints.write(tmp_path / "m", checkpoints.llama(), dict(config))  # type: ignore[call-overload]
    for name, content in files.items():
        path = directory / name.replace("__", ".")
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    options = Options(threads=1)
    plan, path = prepare(Request(str(directory)), tmp_path / "out", options, observer=Recorder())
    assert describe(plan, path)["left_behind"] == list(plan.source.left_behind)
    found = remarks.source_remarks(plan)
    assert set(found) <= set(plan.remarks)
    return found


def test_a_checkpoint_with_nothing_else_in_it_needs_no_remark(tmp_path):
    assert remarked(tmp_path, tokenizer__json={}, LICENSE="a licence") == []


def test_what_stays_behind_is_one_line_by_kind(tmp_path):
    many = {f"note{number}__txt": "" for number in range(6)}
    (line,) = remarked(
        tmp_path, README__md="", modeling_x__py="", pytorch_model__bin="", tf_model__h5="", **many
    )
    assert line == (
        "not copied: other weights (pytorch_model.bin, tf_model.h5), code (modeling_x.py), "
        "README.md, note0.txt, note1.txt, note2.txt and 3 more"
    )


def test_the_plan_lists_all_of_it(tmp_path):
    remarked(tmp_path, README__md="")
    options = Options(threads=1)
    plan = describe(
        *prepare(Request(str(tmp_path / "m")), tmp_path / "out", options, observer=Recorder())
    )
    assert plan["left_behind"] == ["README.md"]


def test_code_that_transformers_can_do_without(tmp_path):
    (line,) = remarked(tmp_path, {**LLAMA, "auto_map": LOCAL})
    assert line == (
        "config.json names code that is not copied (configuration_x.py, modeling_x.py): "
        "transformers has a LlamaForCausalLM of its own, load without trust_remote_code"
    )


def test_code_that_the_output_needs(tmp_path):
    config = {"architectures": ["XForCausalLM"], "auto_map": LOCAL}
    by_names, line = remarked(tmp_path, config)
    assert by_names.endswith("names alone, for transformers has no class for XForCausalLM")
    assert line.endswith(f"transformers has no XForCausalLM, so {COPY}")


def test_without_transformers_nobody_knows(tmp_path, monkeypatch):
    monkeypatch.setattr(remarks, "find_spec", lambda name: None)
    (line,) = remarked(tmp_path, {**LLAMA, "auto_map": LOCAL})
    assert line.endswith(f"if transformers has no LlamaForCausalLM of its own, {COPY}")


def test_code_of_another_repository_is_found_there(tmp_path):
    assert remarked(tmp_path, {**LLAMA, "auto_map": {"AutoModel": "org/x--modeling_x.X"}}) == []


def test_code_of_a_tokenizer_or_processor(tmp_path):
    auto_map = {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}
    lines = remarked(
        tmp_path,
        tokenizer_config__json={"auto_map": auto_map},
        processor_config__json={"auto_map": {"AutoProcessor": "processing_x.XProcessor"}},
        preprocessor_config__json="not JSON",
    )
    assert lines == [
        f"processor_config.json names code that is not copied (processing_x.py): {COPY}",
        f"tokenizer_config.json names code that is not copied (tokenization_x.py): {COPY}",
    ]


@pytest.mark.parametrize("auto_map", [None, [], "x.Y", {"AutoModel": 3}, {"AutoModel": [[]]}])
def test_an_auto_map_that_makes_no_sense_names_nothing(tmp_path, auto_map):
    assert remarked(tmp_path, {**LLAMA, "auto_map": auto_map}) == []


def test_what_a_pipeline_will_lack(tmp_path):
    folder = tmp_path / "m" / "2_Dense"
    folder.mkdir(parents=True)
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "config.json").write_text("{}")
    entries = [
        {"path": "", "type": "custom_st.Transformer"},
        {"path": "2_Dense", "type": "a.sentence_transformers.Dense"},
    ]
    lines = remarked(tmp_path, modules__json=entries)
    assert lines[0] == "not copied: other weights (2_Dense/pytorch_model.bin)"
    assert lines[1].startswith("sentence-transformers needs 2_Dense/pytorch_model.bin, which is")
    assert lines[2].startswith("modules.json names code that is not copied (custom_st.Transformer)")
    (folder / "model.safetensors").write_bytes(b"the same")
    assert not [line for line in remarked(tmp_path) if "needs" in line]
