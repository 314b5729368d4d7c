"""The report folder: a fresh one, never an old one unasked; and what is needed to go on with it."""

import dataclasses
import io
import json
import os
import pathlib
import re
import shutil
from typing import Any

import numpy as np

from curvax.cli._errors import UsageError
from curvax.cli._options import BUNDLED, Options
from curvax.cli._text import printable, quoted

RUN = "run.json"
CHECKPOINT = "checkpoint"
_FORMAT = "curvax tune 1"
# All that a report folder may hold; --overwrite removes these and nothing else.
_FILES = re.compile(
    r"(run|result|hyperparameters)\.json|(hyperparameters|best)\.npz|report\.html|[a-z_]+\.png"
)


def create(options: Options, digest: str) -> pathlib.Path:
    """Make the folder of a new run and write down how to repeat it.

    Args:
        options: The options.
        digest: Fingerprint of the data.

    Returns:
        The folder.

    Raises:
        UsageError: If it exists already, or cannot be made.
    """
    try:
        folder = (
            _fresh(options) if options.out is None else _named(pathlib.Path(options.out), options.overwrite)
        )
        data = options.data if options.data in BUNDLED else os.path.abspath(options.data)
        kept = dataclasses.replace(options, data=data, quiet=False, json=False)
        write_json(folder / RUN, {"format": _FORMAT, "options": kept.as_json(), "digest": digest})
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"the report folder cannot be made: {printable(reason)}") from None
    return folder


def _fresh(options: Options) -> pathlib.Path:
    """`reports/<name>`, `reports/<name>-2`, … : the first that does not exist."""
    stem = pathlib.Path(options.data).name.split(".")[0]
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-") or "report"
    for number in range(1, 10_000):
        folder = pathlib.Path("reports") / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise UsageError(f"there are too many reports on {quoted(name)} in reports/: name a folder with --out")


def _named(folder: pathlib.Path, overwrite: bool) -> pathlib.Path:
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out {quoted(folder)} is a file: name a folder")
    entries = list(folder.iterdir()) if folder.is_dir() else []
    if entries and not (folder / RUN).is_file():
        raise UsageError(
            f"--out {quoted(folder)} is not empty and holds no report of curvax: name another folder"
        )
    if entries and not overwrite:
        raise UsageError(f"--out {quoted(folder)} is not empty: name another folder, or add --overwrite")
    for entry in entries:
        if entry.name == CHECKPOINT and entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif _FILES.fullmatch(entry.name):
            entry.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def reopen(directory: str) -> tuple[pathlib.Path, Options, str]:
    """The folder of a run to be gone on with, its options, and the fingerprint of its data.

    Args:
        directory: As given to `--resume`.

    Returns:
        Folder, options, digest.

    Raises:
        UsageError: If there is no such run.
    """
    folder = pathlib.Path(directory)
    try:
        content = json.loads((folder / RUN).read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise UsageError(
                f"--resume {quoted(directory)}: its run.json is not one of this version of curvax"
            )
        options, digest = Options.from_json(content["options"]), str(content["digest"])
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"--resume {quoted(directory)}: there is no run of curvax tune in it") from None
    except OSError as error:
        raise UsageError(f"--resume {quoted(directory)}: {printable(error.strerror)}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UsageError(f"--resume {quoted(directory)}: its run.json cannot be read") from None
    return folder, options, digest


def write_json(path: pathlib.Path, content: Any) -> None:
    """Write plain values; the file is replaced at once, never left half written."""
    text = json.dumps(content, indent=1, ensure_ascii=True, allow_nan=False)
    write_bytes(path, (text + "\n").encode("ascii"))


def write_npz(path: pathlib.Path, arrays: dict[str, Any]) -> None:
    """Write arrays of numbers or text; objects, which only pickle could store, are refused.

    Args:
        path: File name.
        arrays: Name to array.
    """
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    write_bytes(path, buffer.getvalue())


def write_bytes(path: pathlib.Path, content: bytes) -> None:
    """Write a file that appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_bytes(content)
    os.replace(temporary, path)
