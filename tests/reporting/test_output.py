"""Opening and verifying an output: what is damaged is named."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import loftq_cli
from loftq_cli.checkpoint.output import open_output, verify
from loftq_cli.errors import InputError, LoftqError, SourceNotFoundError, VerificationError
from tests.reporting.test_manifest import mutate
from tests.support.makers import PROPERTY, flip_bit, shorten

MANIFEST = "loftq_manifest.json"


def failure(directory: Path, kind: type[LoftqError], *, check: bool = False) -> str:
    with pytest.raises(LoftqError) as caught:
        loftq_cli.inspect(directory, verify=check)
    assert type(caught.value) is kind
    assert caught.value.exit_code == 3
    assert caught.value.hint
    assert str(caught.value).isprintable()
    return caught.value.message


def change(directory: Path, **fields: Any) -> None:
    """Replace fields of the manifest; None removes one."""
    manifest = json.loads((directory / MANIFEST).read_text()) | fields
    manifest = {name: value for name, value in manifest.items() if value is not None}
    (directory / MANIFEST).write_text(json.dumps(manifest))


def test_a_good_output(output):
    opened = open_output(output)
    assert opened.manifest == json.loads((output / MANIFEST).read_text())
    assert opened.fingerprint == opened.manifest["fingerprint"]
    assert verify(opened) == len(opened.manifest["outputs"]) == 4
    assert loftq_cli.inspect(output, verify=True)["verified_files"] == 4


def test_what_is_no_output(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file"):
        assert f"no {MANIFEST}, this is not the output" in failure(path, SourceNotFoundError)
    for path in (tmp_path / "none", Path("x" * 5000), Path("a\0b")):
        assert "no such directory" in failure(path, SourceNotFoundError)


def test_an_unfinished_conversion_is_called_that(tmp_path, monkeypatch):
    (tmp_path / ".out.loftq-partial").mkdir()
    assert "the conversion is not finished" in failure(tmp_path / "out", SourceNotFoundError)
    monkeypatch.chdir(tmp_path)
    assert "the conversion is not finished" in failure(Path("out"), SourceNotFoundError)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b'{"format_version": 1, "format_version": 1}', "occurs twice"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[]", "no format_version"),
        (b"null", "no format_version"),
        (b"{}", "no format_version"),
        (b'{"format_version": "1"}', "no format_version"),
        (b'{"format_version": true}', "no format_version"),
        (b'{"format_version": 1.0}', "no format_version"),
        (b'{"format_version": 0}', "no format_version"),
        (b'{"format_version": 1}', "the manifest is damaged: tool: missing"),
    ],
)
def test_a_damaged_manifest(output, content, message):
    (output / MANIFEST).write_bytes(content)
    found = failure(output, VerificationError)
    assert str(output / MANIFEST) in found
    assert message in found


def test_a_manifest_cut_anywhere_is_damaged(output):
    content = (output / MANIFEST).read_bytes()
    for length in range(0, len(content) - 2, 97):
        (output / MANIFEST).write_bytes(content[:length])
        failure(output, VerificationError)


def test_a_newer_format_asks_for_a_newer_loftq(output):
    change(output, format_version=2, something_new={})
    assert "format version 2, this loftq reads up to 1" in failure(output, InputError)


def test_an_enormous_manifest_is_not_read(output):
    os.truncate(output / MANIFEST, (256 << 20) + 1)
    assert "larger than 256 MiB" in failure(output, VerificationError)


def test_every_missing_field_is_named_up_to_a_few(output):
    change(output, tool=None, source=None, fingerprint=None)
    message = failure(output, VerificationError)
    assert all(f"{name}: missing" in message for name in ("tool", "source", "fingerprint"))
    (output / MANIFEST).write_text(json.dumps({"format_version": 1, **dict.fromkeys("abcdefgh")}))
    assert failure(output, VerificationError).count(";") == 4


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a//b", "..", "", "a\0", "\ud800"])
def test_outputs_lie_in_the_output(output, name):
    change(output, outputs=[{"name": name, "size": 0, "sha256": "0" * 64}])
    assert "is not a file in the output" in failure(output, VerificationError)


FILES = [
    "config.json",
    "model.safetensors",
    "loftq_init/adapter_config.json",
    "loftq_init/adapter_model.safetensors",
]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (flip_bit, "the contents were altered"),
        (lambda path: flip_bit(path, 0), "the contents were altered"),
        (shorten, "the manifest says"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\n"), "the manifest says"),
        (Path.unlink, "No such file or directory"),
        (lambda path: (path.unlink(), path.mkdir()), ""),
    ],
    ids=["last bit", "first bit", "shorter", "longer", "missing", "directory"],
)
def test_verify_names_the_file_that_was_damaged(output, name, damage, fault):
    damage(output / name)
    message = failure(output, VerificationError, check=True)
    assert f"{name}: " in message
    assert fault in message
    assert not any(other in message for other in FILES if other != name and other not in name)


def test_verify_names_every_damaged_file(output):
    for name in FILES:
        flip_bit(output / name)
    message = failure(output, VerificationError, check=True)
    assert message.count("the contents were altered") == len(FILES)


@settings(PROPERTY, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_of_altered_manifests_only_our_errors_escape(output, converted, data):
    """Whatever a manifest says, inspect and error-report answer or refuse, and do not crash."""
    manifest = json.loads((converted("bnb") / MANIFEST).read_text())
    (output / MANIFEST).write_text(json.dumps(mutate(data, manifest)))
    for read in (loftq_cli.inspect, loftq_cli.error_report):
        with contextlib.suppress(VerificationError):
            json.dumps(read(output), allow_nan=False)
