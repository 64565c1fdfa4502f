"""Whether the files of an output are those that its manifest lists, as far as a load can tell.

Sizes of all weights, and the contents of the adapter: an adapter of another conversion has the same
names and shapes, and makes up for other errors. ``loftq inspect --verify`` hashes everything.
"""

from __future__ import annotations

from loftq_cli.checkpoint.durable import file_sha256
from loftq_cli.checkpoint.output import Output
from loftq_cli.errors import VerificationError
from loftq_cli.layouts import adapter

_ADAPTER = f"{adapter.DIRECTORY}/{adapter.WEIGHTS}"


def check_files(output: Output) -> None:
    """Raises VerificationError, naming the file, where a weight file is missing or of another
    size, or where the adapter is another one."""
    for entry in output.manifest["outputs"]:
        if not entry["name"].endswith(".safetensors"):
            continue
        file = output.directory / entry["name"]
        try:
            size = file.stat().st_size
            same = entry["name"] != _ADAPTER or file_sha256(file) == entry["sha256"]
        except OSError as error:
            raise VerificationError(f"{file}: {error.strerror or error}") from error
        if size != entry["size"]:
            raise VerificationError(f"{file}: {size} bytes, the manifest says {entry['size']}")
        if not same:
            raise VerificationError(
                f"{file}: not the adapter that this backbone was converted with",
                hint="put back the loftq_init of this conversion, or convert again; "
                "a trained adapter is loaded with peft.PeftModel.from_pretrained",
            )
