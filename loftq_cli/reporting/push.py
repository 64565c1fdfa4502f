"""``loftq push``: a finished conversion to a repository on the hub."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.output import MANIFEST, Output, open_output
from loftq_cli.checkpoint.small_file import read_json
from loftq_cli.errors import UsageError
from loftq_cli.layouts import adapter
from loftq_cli.loading.intact import verified
from loftq_cli.machine.durable import explained, file_sha256, pretty_json
from loftq_cli.reporting.card import body, metadata
from loftq_cli.reporting.page.picture import PICTURE, picture

_CARD = "README.md"


def push(
    directory: Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Verify the conversion in ``directory`` and send its files, and no others, with a model card;
    what ``--json`` prints. Of an adapter for a backbone that exists the adapter alone is sent,
    whether or not that lies beside it. Nothing is written to ``directory``.

    Raises UsageError for a malformed id, InputError and VerificationError if the conversion is
    not finished or was altered, OutputConflictError if the repository holds something else, and
    EnvironmentFailure (no token, access, network).
    """
    # Imported here: the other reports need no hub client.
    from loftq_cli.checkpoint.hub.listing import looks_like_hub_id
    from loftq_cli.checkpoint.hub.upload import front_matter, push_folder

    if not looks_like_hub_id(repo_id):
        raise UsageError(f"{repo_id!r} is not a hub id", hint="a hub id is NAME or OWNER/NAME")
    output = open_output(directory)
    verified(output)
    fields = metadata(output)
    if fields["base_model"] is None:
        what = output.manifest["backbone" if output.is_adapted else "source"]["id"]
        say(f"{what} is no hub id: the card names no base model")
    with explained(directory), tempfile.TemporaryDirectory(prefix="loftq-push-") as folder:
        names = _stage(output, Path(folder), repo_id, revision)
        told = adapter_alone(output) if output.is_adapted else output
        drawn = picture(output)
        if drawn is None:
            say('the card has no picture: pip install "loftq-cli[report]"')
        else:
            (Path(folder) / PICTURE).write_text(drawn, "utf-8")
        pictures = [] if drawn is None else [PICTURE]
        card = front_matter(fields) + body(told, repo_id, *pictures)
        (Path(folder) / _CARD).write_text(card, "utf-8")
        pushed = push_folder(
            Path(folder),
            {*names, *pictures, _CARD},
            repo_id,
            marker=MANIFEST,
            private=private,
            revision=revision,
            message=f"Upload a LoftQ conversion, fingerprint {output.fingerprint[:12]}",
            say=say,
        )
    size = sum(entry["size"] for entry in told.manifest["outputs"])
    return {**asdict(pushed), "files": len(names) + len(pictures) + 1, "bytes": size}


def adapter_alone(output: Output) -> Output:
    """An adapted ``output`` as a repository has it: the adapter, without its backbone."""
    folder = output.adapter_folder
    manifest = {
        **output.manifest,
        "recipe": {**output.manifest["recipe"], "backbone": "named"},
        "outputs": [
            {**entry, "name": entry["name"].removeprefix(folder)}
            for entry in output.manifest["outputs"]
            if entry["name"].startswith(folder)
        ],
    }
    return Output(output.directory, manifest)


def _stage(output: Output, folder: Path, repo_id: str, revision: str | None) -> list[str]:
    """What belongs to the conversion: what else came to lie in its directory, such as checkpoints
    of a training, stays at home. Links, but for the configs of adapters, which say where the
    backbone will be, and the manifest, which has their hashes."""
    entries = []
    sent = adapter_alone(output) if output.is_adapted else output
    for entry in sent.manifest["outputs"]:
        file = folder / entry["name"]
        held = output.directory / entry["name"]
        if output.is_adapted:
            held = output.directory / output.adapter_folder / entry["name"]
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.name == adapter.CONFIG and not output.is_adapted:
            config = read_json(held).content
            told = {**config, "base_model_name_or_path": repo_id, "revision": revision}
            file.write_bytes(pretty_json(told))
            entry = {**entry, "size": file.stat().st_size, "sha256": file_sha256(file)}
        else:
            file.symlink_to(held.absolute())
        entries.append(entry)
    manifest = {**sent.manifest, "outputs": entries}
    (folder / MANIFEST).write_bytes(pretty_json(manifest))
    return [*(entry["name"] for entry in entries), MANIFEST]
