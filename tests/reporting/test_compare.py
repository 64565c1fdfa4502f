"""Conversions of one model beside each other."""

from __future__ import annotations

import json
import pickle
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import loftq_cli
from loftq_cli.checkpoint.locate import Place
from loftq_cli.checkpoint.output import open_output
from loftq_cli.errors import CorruptFileError, InputError, UsageError
from loftq_cli.reporting import evaluations
from loftq_cli.reporting.compare import labels
from tests.reporting.test_page import data_of
from tests.support import manifests

FOUND: dict[str, Any] = {
    "directory": "out",
    "source": "model",
    "adapter": None,
    "device": "cpu",
    "texts": ["ab" * 32],
    "samples": 4,
    "length": 16,
    "seed": 0,
    "tokens": 60,
    "perplexity": 21.5,
    "source_perplexity": 20.25,
    "kl": 0.125,
    "top1": 0.75,
    "cosine": None,
    "relative_error": None,
    "seconds": 1.0,
}


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """Conversions of one model to 2 and 4 bits."""
    first, second = (
        manifests.write(tmp_path / name, manifests.large(layers=3, bits=bits, rank=rank))
        for name, bits, rank in (("a/small", 2, 64), ("b/large", 4, 16))
    )
    return first, second


def changed(directory: Path, **parts: Any) -> Path:
    manifest = json.loads((directory / "loftq_manifest.json").read_text())
    for name, part in parts.items():
        manifest[name] = {**manifest[name], **part} if isinstance(part, dict) else part
    return manifests.write(directory, manifest)


def test_figures_settings_and_kinds_are_those_of_each(two):
    found = loftq_cli.compare(*two)
    reports = [loftq_cli.error_report(each) for each in two]
    assert found["settings"] == {"bits": [2, 4], "rank": [64, 16]}
    assert found["matrices_in_common"] == 21
    for each, report, directory in zip(found["conversions"], reports, two, strict=True):
        totals, inspected = report["totals"], loftq_cli.inspect(directory)
        assert each["relative_residual"] == pytest.approx(totals["relative_residual"])
        assert each["weighted_residual"] == pytest.approx(totals["weighted_residual"])
        assert each["adapter_bytes"] == inspected["totals"]["adapter_bytes"]
        assert each["fingerprint"] == inspected["fingerprint"]
    assert [each["label"] for each in found["conversions"]] == ["small", "large"]
    down = found["kinds"][-1]
    own = sorted(x["relative_residual"] for x in reports[1]["layers"] if "down_proj" in x["name"])
    assert down["kind"] == "down_proj"
    assert down["conversions"][1]["final"] == {"median": own[1], "least": own[0], "most": own[2]}
    assert json.loads(json.dumps(found)) == found


def test_residuals_are_compared_over_the_matrices_that_all_have(two):
    first, second = two
    manifest = json.loads((second / "loftq_manifest.json").read_text())
    changed(second, matrices=[m for m in manifest["matrices"] if "v_proj" not in m["name"]])
    found = loftq_cli.compare(first, second)
    assert found["matrices_in_common"] == 18
    alone = [x for x in loftq_cli.error_report(first)["layers"] if "v_proj" not in x["name"]]
    expected = sum(x["final"] ** 2 for x in alone) / sum(x["weight"] ** 2 for x in alone)
    assert found["conversions"][0]["relative_residual"] == pytest.approx(expected**0.5)
    (kind,) = [kind for kind in found["kinds"] if kind["kind"] == "v_proj"]
    assert kind["conversions"][1] is None


def test_conversions_of_different_models_are_refused_with_what_differs(two):
    first, second = two
    other = {"name": "model.safetensors", "size": 7, "sha256": "cd" * 32}
    changed(second, source={"id": "other/model", "files": [other]})
    with pytest.raises(InputError) as caught:
        loftq_cli.compare(first, second)
    said = str(caught.value)
    for part in ("small and large", "Llama-2-70b-hf and other/model", "model.safetensors"):
        assert part in said
    assert "abababababababab" in said
    assert "cdcdcdcdcdcdcdcd" in said


def test_a_config_in_other_words_is_no_other_model(two):
    first, second = two
    source = json.loads((second / "loftq_manifest.json").read_text())["source"]
    config = {"name": "config.json", "size": 7, "sha256": "cd" * 32}
    changed(second, source={"files": [config, *source["files"]]})
    assert len(loftq_cli.compare(first, second)["conversions"]) == 2


def test_one_alone_is_refused(two):
    with pytest.raises(UsageError, match="two or more"):
        loftq_cli.compare(two[0])


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (("a/x", "a/y"), ["x", "y"]),
        (("a/out", "b/out/"), ["a/out", "b/out"]),
        (("out", "b/out"), ["out", "b/out"]),
        (("out", "out"), ["out (1)", "out (2)"]),
    ],
)
def test_labels_are_as_short_as_tells_them_apart(paths, expected):
    assert labels([Place(Path(path)) for path in paths]) == expected


def test_evaluations_of_the_same_windows_stand_beside_each_other(two):
    first, second = two
    evaluations.save(first, {**FOUND, "perplexity": 99.0})
    evaluations.save(first, FOUND)  # takes the place of the one before
    evaluations.save(first, {**FOUND, "adapter": "trained", "perplexity": 3.0})
    evaluations.save(second, {**FOUND, "perplexity": 20.5})
    evaluations.save(second, {**FOUND, "length": 32})
    same, other = loftq_cli.compare(first, second)["evaluations"]
    assert [each["perplexity"] for each in same["conversions"]] == [21.5, 20.5]
    assert other["conversions"][0] is None
    assert other["conversions"][1]["perplexity"] == 21.5
    assert (same["length"], other["length"]) == (16, 32)


def test_an_evaluation_of_what_was_there_before_is_left_out(two):
    evaluations.save(two[0], FOUND)
    changed(two[0], fingerprint="cd" * 32)
    assert evaluations.saved(open_output(two[0])) == []


@pytest.mark.parametrize("figure", [float("nan"), float("inf")])
def test_figures_that_are_not_finite_are_not_kept(figure, two):
    with pytest.raises(InputError, match="not finite, and is not kept"):
        evaluations.save(two[0], {**FOUND, "kl": figure})
    assert not (two[0] / evaluations.FILE).exists()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"format_version": 2, "evaluations": []}',
        '{"format_version": 1, "evaluations": [1]}',
        json.dumps(
            {"format_version": 1, "evaluations": [{**FOUND, "fingerprint": "x", "kl": "a"}]}
        ),
        json.dumps({"format_version": 1, "evaluations": [{"fingerprint": "x"}]}),
    ],
)
def test_damaged_evaluations_are_named(content, two):
    (two[0] / evaluations.FILE).write_text(content)
    with pytest.raises(CorruptFileError, match=evaluations.FILE):
        loftq_cli.compare(*two)
    with pytest.raises(CorruptFileError):
        evaluations.save(two[0], FOUND)


def test_a_page_overlays_them(two, tmp_path, monkeypatch):
    library = pytest.importorskip("vl_convert", reason='pip install "loftq-cli[report]"')
    monkeypatch.setattr(library, "javascript_bundle", lambda *words: "")
    evaluations.save(two[0], FOUND)
    found = loftq_cli.compare(*two, html=tmp_path / "compared.html")
    page = (tmp_path / "compared.html").read_text()
    plots = data_of(page)["plots"]
    assert {"kinds", "depth", "steps", "spread", "room", "evaluation0"} == plots.keys()
    for name in plots.keys() - {"evaluation0"}:
        values = plots[name]["data"]["values"]
        assert {value["conversion"] for value in values} == {"small", "large"}
    shown = {(v["kind"], v["conversion"]): v["median"] for v in plots["kinds"]["data"]["values"]}
    for kind in found["kinds"]:
        for label, each in zip(("small", "large"), kind["conversions"], strict=True):
            expected = each["final"]["median"]
            assert shown[kind["kind"], label] == pytest.approx(expected, rel=1e-5)
    bars = plots["evaluation0"]["data"]["values"]
    assert bars == [
        {"conversion": "the original", "value": 20.25},
        {"conversion": "small", "value": 21.5},
    ]


class Text(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_data(self, data: str) -> None:
        self.found.append(data)


def test_a_notebook_shows_small_tables_and_programs_get_dictionaries(two):
    shown: dict[str, Any] = {
        "inspect": loftq_cli.inspect(two[0]),
        "error_report": loftq_cli.error_report(two[0]),
        "compare": loftq_cli.compare(*two),
    }
    for report in shown.values():
        html = report._repr_html_()
        assert len(html) < 10_000
        assert "<script" not in html
        assert json.loads(json.dumps(report)) == report == dict(report)
        assert pickle.loads(pickle.dumps(report))._repr_html_() == html
    totals = shown["error_report"]["totals"]
    cells = Text(shown["error_report"]._repr_html_()).found
    assert f"{totals['relative_residual']:.4f}" in cells
    assert shown["error_report"]["worst"][0] in cells
    assert {"q_proj", "down_proj", "8192x28672"} <= set(cells)
    assert {"small", "large"} <= set(Text(shown["compare"]._repr_html_()).found)


def test_a_notebook_of_a_thousand_matrices_is_as_small(tmp_path):
    output = manifests.write(tmp_path / "out", manifests.large(experts=5))
    reports: list[Any] = [loftq_cli.inspect(output), loftq_cli.error_report(output)]
    for report in reports:
        assert len(report._repr_html_()) < 15_000
