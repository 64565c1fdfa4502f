"""What others wrote, changed at random: only errors of ours come out. `make fuzz` goes further."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.whole.hostile.targets import TARGETS

FINDINGS = sorted(Path(__file__).with_name("findings").iterdir())
EXAMPLES = 600  # of each target
WORDS = [b'"', b"{", b"}", b"[", b"]", b",", b":", b"0", b"-1", b"null", b"{}", b"\n", b"\xff"]
WORDS += [b"\\ud800", b"1e999", b"9" * 40, b"../", b'"shape"', b'"F4"', b'"shard"', b'"t0"']

edits = st.lists(
    st.tuples(
        st.floats(0, 1, exclude_max=True), st.integers(0, 20), st.sampled_from(WORDS) | st.binary()
    ),
    max_size=4,
)


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=EXAMPLES)
@given(data=st.data(), edits=edits)
def test_only_errors_of_ours_escape(name, data, edits, tmp_path_factory):
    run, seeds = TARGETS[name]
    content = data.draw(st.sampled_from(seeds) | st.binary(max_size=64))
    for where, length, piece in edits:
        start = int(where * (len(content) + 1))
        content = content[:start] + piece + content[start + length :]
    directory = tmp_path_factory.getbasetemp() / name
    directory.mkdir(exist_ok=True)
    run(directory, content)


@pytest.mark.parametrize("path", FINDINGS, ids=[path.name for path in FINDINGS])
def test_what_was_found_once_stays_mended(path, tmp_path):
    run, _ = TARGETS[path.name.partition("-")[0]]
    run(tmp_path, path.read_bytes())
