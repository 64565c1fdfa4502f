"""Pages: one file that fetches nothing, with the manifest's figures in it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import loftq_cli
from loftq_cli.errors import EnvironmentFailure, OutputConflictError, UsageError
from loftq_cli.reporting import spectra, summary
from loftq_cli.reporting.page.document import COLUMNS
from tests.support import manifests
from tests.whole.pages.case import MOST_BYTES

vl_convert = pytest.importorskip("vl_convert", reason='pip install "loftq-cli[report]"')
BUNDLE = "window.vegaEmbed = () => {};" + " " * 900_000


@pytest.fixture(autouse=True)
def _bundle(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's bundle takes seconds to make; one of its size is as good here."""
    monkeypatch.setattr(vl_convert, "javascript_bundle", lambda *words: BUNDLE)


class Parts(HTMLParser):
    """What a page consists of."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = dict(attrs)
        self.links += [given[name] for name in ("src", "href", "action") if name in given]
        self.ids |= {given["id"]} if "id" in given else set()


def data_of(page: str) -> dict[str, Any]:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)
    return json.loads(text)


def page_of(output: Path, folder: Path | None = None, **options: Any) -> str:
    file = (folder or output.parent) / "pages" / "report.html"
    loftq_cli.error_report(output, html=file, **options)
    return file.read_text("utf-8")


@pytest.mark.parametrize("experts", [0, 5])
def test_a_page_of_70b_has_the_manifest_s_figures_and_is_small(tmp_path, experts):
    manifest = manifests.large(experts=experts)
    page = page_of(manifests.write(tmp_path / "out", manifest))
    assert len(page.encode()) < MOST_BYTES
    data = data_of(page)
    assert tuple(data["columns"]) == COLUMNS
    rows = {row[0]: dict(zip(COLUMNS, row, strict=True)) for row in data["rows"]}
    assert rows.keys() == {record["name"] for record in manifest["matrices"]}
    for record in manifest["matrices"]:
        row, norms, outputs = rows[record["name"]], record["frobenius"], record["weighted"]
        assert [row["rows"], row["columns"]] == record["shape"]
        assert (row["bits"], row["rank"]) == (record["bits"], record["rank"])
        assert row["final"] == pytest.approx(norms["final"] / norms["weight"], rel=1e-5)
        assert row["quantized"] == pytest.approx(norms["quantized"] / norms["weight"], rel=1e-5)
        assert row["weighted_final"] == pytest.approx(outputs["final"] / outputs["weight"], 1e-5)
        assert f"layers.{row['block']}." in record["name"]
    assert {"heat", "steps", "spread", "weighted", "room"} == data["plots"].keys()


def test_it_fetches_nothing_and_is_marked_up_for_who_does_not_see_it(tmp_path):
    page = page_of(manifests.write(tmp_path / "out", manifests.large(layers=4)))
    parts = Parts(page)
    assert parts.links == []
    assert "default-src 'none'" in page
    assert (parts.tags.count("h1"), parts.tags.count("main")) == (1, 1)
    assert parts.tags.count("table") == parts.tags.count("caption") == 2
    assert page.count('role="img" aria-label="') == len(data_of(page)["plots"])
    assert {f"plot-{name}" for name in data_of(page)["plots"]} <= parts.ids
    assert '<html lang="en">' in page


def test_steps_are_those_of_all_matrices_of_a_kind(tmp_path):
    manifest = manifests.large(layers=3)
    values = data_of(page_of(manifests.write(tmp_path / "out", manifest)))["plots"]["steps"]["data"]
    found = {(v["kind"], v["of"], v["step"]): v["value"] for v in values["values"]}
    for kind, belongs in (("q_proj", "q_proj"), ("all", "")):
        for of, key in (("of the weights", "frobenius"), ("of the outputs", "weighted")):
            norms = [r[key] for r in manifest["matrices"] if belongs in r["name"]]
            weight = torch.tensor([each["weight"] for each in norms]).double().norm()
            for step in range(6):
                column = [each["steps"][step - 1] if step else each["quantized"] for each in norms]
                expected = float(torch.tensor(column).double().norm() / weight)
                assert found[kind, of, step] == pytest.approx(expected, rel=1e-5)


def test_bytes_by_part_are_those_of_the_totals(converted, tmp_path):
    output = converted("loftq")
    data = data_of(page_of(output, tmp_path))["plots"]["room"]["data"]["values"]
    totals = loftq_cli.inspect(output)["totals"]
    taken = sum(value["bytes"] for value in data)
    assert taken == totals["backbone_bytes"] + totals["adapter_bytes"]
    adapter = sum(value["bytes"] for value in data if value["what"] == "adapter")
    assert adapter == totals["adapter_bytes"]


def test_singular_values_of_the_worst_are_those_of_an_svd(converted, source, tmp_path):
    output, model = converted("loftq-affine"), source("loftq-affine")
    report = loftq_cli.error_report(output, model)
    plot = data_of(page_of(output, tmp_path, source=str(model)))["plots"]["spectra"]
    worst = summary.worst(report["layers"], spectra.MATRICES)
    assert plot["facet"]["sort"] == [layer["name"].removesuffix(".weight") for layer in worst]
    for layer in worst:
        for which, key in (("without the adapter", "quantized"), ("with the adapter", "final")):
            curve = {
                v["n"]: v["value"]
                for v in plot["data"]["values"]
                if f"{v['name']}.weight" == layer["name"] and v["which"] == which
            }
            assert set(curve) == set(range(1, min(layer["shape"]) + 1))  # of 64
            norm = sum(value**2 for value in curve.values()) ** 0.5
            assert norm == pytest.approx(layer[key] / layer["weight"], rel=1e-3)


def test_the_gram_matrix_has_the_singular_values():
    residual = torch.randn(40, 90, generator=torch.Generator().manual_seed(0))
    expected = torch.linalg.svdvals(residual.double())
    for turned in (residual, residual.T):
        assert torch.allclose(spectra.singular_values(turned), expected, rtol=1e-9)


def test_what_is_not_there_is_told(tmp_path):
    manifest = manifests.large(layers=2, weighted=False)
    for record in manifest["matrices"]:
        record["frobenius"]["steps"] = []
    page = page_of(manifests.write(tmp_path / "out", manifest))
    assert data_of(page)["plots"].keys() == {"heat", "spread", "room"}
    for said in ("tells of no steps", "no activation statistics", "--source MODEL --html FILE"):
        assert said in page


def test_losses_of_a_refinement_by_block(tmp_path):
    manifest = manifests.large(layers=2)
    manifest["refined"] = manifests.refined(2)
    plot = data_of(page_of(manifests.write(tmp_path / "out", manifest)))["plots"]["refined"]
    losses = {(v["name"], v["when"]): v["loss"] for v in plot["data"]["values"]}
    for block in manifest["refined"]["blocks"]:
        assert losses[block["name"], "before"] == block["held_before"]
        assert losses[block["name"], "after"] == block["held_after"]


def test_a_hostile_name_stays_text(tmp_path):
    manifest = manifests.large(layers=2)
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\x1b[2J"
    for record in manifest["matrices"]:
        record["name"] = record["name"].replace("q_proj", f"q{evil}")
    manifest["source"]["id"] = f"x/{evil}"
    page = page_of(manifests.write(tmp_path / "out", manifest))
    assert "<script>alert" not in page
    assert "<img" not in page
    assert Parts(page).tags.count("script") == 3
    assert any(evil in row[0] for row in data_of(page)["rows"])


def test_only_an_earlier_page_is_replaced(tmp_path):
    output = manifests.write(tmp_path / "out", manifests.large(layers=1))
    file = tmp_path / "new" / "report.html"
    loftq_cli.error_report(output, html=file)
    loftq_cli.error_report(output, html=file)
    assert list(file.parent.iterdir()) == [file]
    file.write_text("mine")
    with pytest.raises(OutputConflictError, match="something else"):
        loftq_cli.error_report(output, html=file)
    assert file.read_text() == "mine"
    with pytest.raises(UsageError, match="a directory"):
        loftq_cli.error_report(output, html=tmp_path)


def test_without_the_extra_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "vl_convert", None)
    output = manifests.write(tmp_path / "out", manifests.large(layers=1))
    with pytest.raises(EnvironmentFailure, match=r"loftq-cli\[report\]"):
        loftq_cli.error_report(output, html=tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
    assert loftq_cli.error_report(output)["layers"]
