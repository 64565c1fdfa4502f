"""Matrices put together by kind: against the same by hand."""

from __future__ import annotations

from statistics import median
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import loftq_cli
from loftq_cli.reporting import summary
from tests.support import manifests


def layer(name: str, final: float, **others: Any) -> dict[str, Any]:
    return {
        "name": f"{name}.weight",
        "shape": [4, 8],
        "bits": 2,
        "rank": 3,
        "relative_residual": final,
        "relative_residual_quantized": final * 2,
        **others,
    }


def test_a_kind_has_the_median_the_range_and_a_figure_for_each_block():
    layers = [
        layer("layers.3.q", 0.5, bits=4),
        layer("layers.1.q", 0.1),
        layer("layers.5.experts.0.up", 0.2),
        layer("layers.5.experts.1.up", 0.6, shape=[2, 2]),
        layer("layers.5.experts.2.up", 0.3),
        layer("head", 0.9),
    ]
    q, up, head = summary.kinds(layers)
    assert (q.name, q.count, q.bits, q.shapes) == ("q", 2, (2, 4), ((4, 8),))
    assert (q.final.median, q.final.least, q.final.most) == (0.3, 0.1, 0.5)
    assert (q.quantized.median, q.quantized.most) == (0.6, 1.0)
    assert q.depth == (0.1, None, 0.5, None, None)
    assert (up.name, up.shapes, up.depth) == ("experts.up", ((2, 2), (4, 8)), (None,) * 4 + (0.3,))
    assert (head.name, head.depth, head.weighted_final) == ("head", (), None)
    assert summary.first_block(layers) == 1
    assert summary.bounds([q, up, head]) == (0.1, 0.5)
    assert [each["name"] for each in summary.worst(layers, 2)] == [
        "head.weight",
        "layers.5.experts.1.up.weight",
    ]


def test_weighted_residuals_are_relative_to_the_outputs():
    weighted = {"kind": "full", "weight": 10.0, "quantized": 4.0, "final": 1.0, "steps": []}
    layers = [layer("layers.0.q", 0.5, weighted=weighted), layer("layers.1.q", 0.5, weighted=None)]
    (q,) = summary.kinds(layers)
    assert (q.weighted_final.median, q.weighted_quantized.median) == (0.1, 0.4)
    zero = {**weighted, "weight": 0.0, "final": 0.0}
    assert summary.weighted_figure(layer("q", 0.0, weighted=zero), "final") == 0


def test_the_kinds_of_a_large_model_are_its_manifest_s(tmp_path):
    output = manifests.write(tmp_path / "out", manifests.large(layers=6, experts=3))
    report = loftq_cli.error_report(output)
    found = {kind.name: kind for kind in summary.kinds(report["layers"])}
    assert list(found) == [
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("experts.gate_proj", "experts.up_proj", "experts.down_proj"),
    ]
    down = [each for each in report["layers"] if "down_proj" in each["name"]]
    assert found["experts.down_proj"].count == len(down) == 18
    for block, value in enumerate(found["experts.down_proj"].depth):
        own = [e["relative_residual"] for e in down if f"layers.{block}." in e["name"]]
        assert value == median(own)
    assert {kind: spread.final.median for kind, spread in found.items()} == {
        kind.name: kind.final.median for kind in summary.kinds(loftq_cli.inspect(output)["layers"])
    }


figures = st.floats(0, 1)


@given(st.lists(st.none() | figures, max_size=40), figures, figures, st.integers(1, 9))
def test_a_strip_is_monotone_and_has_a_place_for_everything(depth, one, other, each):
    between = min(one, other), max(one, other)
    for marks in (summary.MARKS, summary.PLAIN_MARKS):
        strip = summary.strip(tuple(depth), between, marks, each)
        assert len(strip) == -(-len(depth) // each)
        shown = [
            (max(known), marks.index(mark))
            for start, mark in zip(range(0, len(depth), each), strip, strict=True)
            if (known := [value for value in depth[start : start + each] if value is not None])
        ]
        assert [mark for mark in strip if mark == " "] == [" "] * (len(strip) - len(shown))
        places = [place for _, place in sorted(shown)]
        assert places == sorted(places)


def test_a_strip_of_eighths():
    assert summary.strip((0.0, 0.13, 0.5, None, 1.0), (0.0, 1.0)) == "▁▂▅ █"
    assert summary.strip((0.0, 1.0, 0.4), (0.0, 1.0), summary.PLAIN_MARKS, 2) == "@="
    assert summary.strip((0.3, 0.3), (0.3, 0.3)) == "▁▁"


def test_marks_are_as_many_and_plain_ones_are_ascii():
    assert len(summary.MARKS) == len(summary.PLAIN_MARKS) == 8
    assert summary.PLAIN_MARKS.isascii()
    with pytest.raises(UnicodeEncodeError):
        summary.MARKS.encode("ascii")
