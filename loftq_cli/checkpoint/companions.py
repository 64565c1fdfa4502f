"""Which files travel with a checkpoint's weights into the output.

An allowlist: configuration, tokenizer, processors and their templates, licences, and of a pipeline
of sentence-transformers its list of modules and their folders (pipeline.py). Never code, which a
loader might run, and never other weights of the model, which would shadow the converted ones. The
names are those that transformers gives such files, and what families with a tokenizer of their own
call theirs.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from loftq_cli.checkpoint.lfs import refuse_pointer
from loftq_cli.checkpoint.pipeline import MODULES, is_of_module, module_folders
from loftq_cli.checkpoint.strays import leads_nowhere
from loftq_cli.machine.durable import explained, write_file

_VOCABULARIES = (
    "tokenizer.json",
    "*vocab*.json",
    "*vocab*.txt",
    "*vocab*.bpe",
    "*.model",
    "tokenizer.model.v*",
    "*.spm",
    "*.tiktoken",
    "*.tokenizer",
    "bpe.codes",
    "dict.txt",
    "encoder.json",
    "*tekken*.json",
)
_INPUTS = (
    *_VOCABULARIES,
    "tokenizer*.json",
    "*merges*.txt",
    "normalizer.json",
    "emoji.json",
    "byte_maps.json",
    "word_shape.json",
    "word_pronunciation.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "*processor_config.json",
    "audio_tokenizer_config.json",
    "chat_template*.json",
    "*.jinja",
    "generation_config.json",
)
_SENTENCES = (MODULES, "config_sentence_transformers.json", "sentence_*_config.json")
_LICENCES = (
    "*licen[cs]e*",
    "*notice*",
    "*policy*",
    "*agreement*",
    "copying*",
    "copyright*",
    "*terms*",
)
_TEXT = ("", ".txt", ".md", ".rst", ".pdf")  # not `LICENSE_model.py`, which an auto_map could name
_TEMPLATES = "additional_chat_templates"


def is_companion(name: str, folders: Collection[str] = ()) -> bool:
    """Whether a file of this name, relative to the directory of the weights and with slashes, is
    copied; ``folders`` are those of the modules of a pipeline."""
    path = PurePosixPath(name)
    folder = name.rpartition("/")[0]
    if folder:
        in_templates = folder == _TEMPLATES and path.suffix == ".jinja"
        return in_templates or (folder in folders and is_of_module(path.name))
    if path.suffix in _TEXT and _matches(name.lower(), _LICENCES):
        return True
    return name == "config.json" or is_input(name) or _matches(name, _SENTENCES)


def is_input(name: str) -> bool:
    """Whether this is the name of a tokenizer's or processor's file, or of what goes with them."""
    return "/" not in name and _matches(name, _INPUTS)


def is_vocabulary(name: str) -> bool:
    """Whether this is the name of a file that holds the tokens of a tokenizer."""
    return _matches(name, _VOCABULARIES)


def is_of_tokenizer(name: str) -> bool:
    """Whether this is a companion that a tokenizer or a processor may have written."""
    return name.startswith(f"{_TEMPLATES}/") or (
        is_input(name) and name != "generation_config.json"
    )


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def companions(source: Path) -> list[str]:
    """The files of ``source`` that are copied as they are, by relative name: not config.json. Links
    with nothing at their end are among them, for ``open_source`` to refuse.

    Raises EnvironmentFailure, and CorruptFileError if modules.json is broken or names what lies
    elsewhere.
    """
    folders = module_folders(source)
    places = (_TEMPLATES, *folders)
    with explained(source):
        found = [
            name
            for name in _files(source, ["", *places])
            if name != "config.json" and is_companion(name, folders)
        ]
        return sorted({*found, *(place for place in places if leads_nowhere(source / place))})


def copy_companions(source: Path, target: Path) -> None:
    """Copy the companions in ``source`` to ``target``. Raises as :func:`companions` does."""
    copy_files({name: source / name for name in companions(source)}, target)


def copy_files(files: Mapping[str, Path], target: Path) -> None:
    """Copy ``files`` to their names relative to ``target``. Raises EnvironmentFailure, and
    CorruptFileError for a pointer of git-lfs."""
    for name, path in files.items():
        refuse_pointer(path)
        with explained(path):
            content = path.read_bytes()
            (target / name).parent.mkdir(parents=True, exist_ok=True)
        write_file(target / name, content)


def companion_bytes(source: Path) -> int:
    """What the companions in ``source`` take. Raises as :func:`companions` does."""
    with explained(source):
        return sum(os.stat(source / name).st_size for name in companions(source))


def present(source: Path) -> list[str]:
    """What lies in ``source``: files, and folders with a slash behind their name, but for those
    that companions come from, of which the files are named."""
    with explained(source):
        opened = {name.rpartition("/")[0] for name in companions(source)}
        tops = [name + ("/" if os.path.isdir(source / name) else "") for name in os.listdir(source)]
        closed = [name for name in tops if not name.endswith("/") or name[:-1] not in opened]
        return sorted({*closed, *_files(source, opened - {""})})


def left_behind(names: Iterable[str], taken: Collection[str]) -> tuple[str, ...]:
    """Of all files of a model, by relative name, those that are not ``taken``: nothing that begins
    with a dot, and folders of which nothing is taken as such, with a slash behind their name."""
    opened = {"", *(name.rpartition("/")[0] for name in taken)}
    left = set()
    for name in names:
        if name not in taken and not name.startswith("."):
            is_open = name.rpartition("/")[0] in opened
            left.add(name if is_open else name.partition("/")[0] + "/")
    return tuple(sorted(left))


def _files(source: Path, folders: Iterable[str]) -> Iterator[str]:
    """The files in these folders of ``source``, if they are there, and links with nothing at
    their end. Raises OSError."""
    for folder in folders:
        place = os.path.join(source, folder)
        if os.path.isdir(place):
            for name in os.listdir(place):
                path = os.path.join(place, name)
                if os.path.isfile(path) or leads_nowhere(path):
                    yield f"{folder}/{name}" if folder else name
