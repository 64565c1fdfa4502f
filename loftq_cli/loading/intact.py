"""Whether the files of an output are those that its manifest lists, as far as a load can tell.

Sizes of all weights, and the contents of the adapter: an adapter of another conversion has the same
names and shapes, and makes up for other errors. ``loftq inspect --verify`` hashes everything.
"""

from __future__ import annotations

from loftq_cli.checkpoint.lfs import refuse_pointers
from loftq_cli.checkpoint.names import ADAPTER_FOLDER
from loftq_cli.checkpoint.output import Output, verify
from loftq_cli.errors import VerificationError
from loftq_cli.layouts import adapter
from loftq_cli.loading.trained_beside import start_is_replaced, start_of, trained_beside
from loftq_cli.machine.durable import readable


def check_files(output: Output, *, start: bool = True) -> None:
    """Raises VerificationError, naming the file, if a weight file is missing or of another size,
    or, unless ``start`` is not to be used, if the adapter is another one; CorruptFileError if files
    to be used are pointers of git-lfs."""
    names = [entry["name"] for entry in output.manifest["outputs"]]
    refuse_pointers(
        output.directory,
        (name for name in names if start or not name.startswith(f"{ADAPTER_FOLDER}/")),
    )
    for entry in output.manifest["outputs"]:
        if not entry["name"].endswith(".safetensors") or entry["name"] == start_of(output):
            continue
        file = output.directory / entry["name"]
        try:
            with readable(file):
                size = file.stat().st_size
        except OSError as error:
            raise VerificationError(f"{file}: {error.strerror or error}") from error
        if size != entry["size"]:
            raise VerificationError(f"{file}: {size} bytes, the manifest says {entry['size']}")
    if start:
        taken = f"loaded with adapter={str(output.directory / adapter.DIRECTORY)!r}"
        check_start(output, taken)


def verified(output: Output) -> int:
    """What ``checkpoint.output.verify`` returns and raises, without the advice to convert over an
    adapter that training left in the directory."""
    try:
        return verify(output)
    except VerificationError as error:
        left = trained_beside(output)
        if left is None:
            raise
        raise VerificationError(
            error.message,
            hint=f"{left} holds another adapter than the conversion made, perhaps a trained one, "
            "and --overwrite would delete it: move it elsewhere first",
        ) from error


def check_start(output: Output, taken: str) -> None:
    """Raises VerificationError if ``loftq_init`` does not hold the adapter that the conversion
    made; ``taken``: how to take one that training put there."""
    name = start_of(output)
    file = output.directory / name
    try:
        with readable(file):
            replaced, size = start_is_replaced(output), file.stat().st_size
    except OSError as error:
        raise VerificationError(f"{file}: {error.strerror or error}") from error
    if replaced:
        stated = {entry["name"]: entry["size"] for entry in output.manifest["outputs"]}.get(name)
        sizes = "" if size == stated else f"{size} bytes, the manifest says {stated}: "
        raise VerificationError(
            f"{file}: {sizes}not the adapter that this backbone was converted with",
            hint=f"an adapter that training saved here is {taken}; move it elsewhere before you "
            f"put back the {adapter.DIRECTORY} of this conversion, or convert again",
        )
