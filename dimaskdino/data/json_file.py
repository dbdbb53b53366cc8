"""Reading JSON files of any size and in any Unicode encoding, with errors that name the file."""

import codecs
import contextlib
import gc
import json
import mmap
import os
import shutil
from collections.abc import Iterator
from typing import Any

import msgspec

from dimaskdino.errors import DatasetError

Json = dict[str, Any]

BLOCK = 2**20  # bytes of a file that are copied at once


@contextlib.contextmanager
def without_collecting() -> Iterator[None]:
    """Pause Python's search for cycles: among millions of objects without any, it takes longer than the work."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@without_collecting()
def read_json(path: str | os.PathLike[str], form: Any = Any) -> Any:
    """Read a JSON file in UTF-8, UTF-16 or UTF-32, as the type ``form`` of msgspec where it has that form.

    Raises:
        DatasetError: if it cannot be read, is not valid JSON, or is nested too deep.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise DatasetError(f"Annotation file {path} is not a regular file; give the path of a JSON file.")
    try:
        return _decoded(_in_utf8(_contents(path)), form)
    except RecursionError:
        raise DatasetError(f"Annotation file {path} is nested too deep to be a COCO file; export it again.") from None
    except OSError as error:
        raise DatasetError(f"Annotation file {path} cannot be read ({error.strerror}); check the path.") from error
    except ValueError as error:
        raise _not_valid(path, error) from error


def _not_valid(path: str | os.PathLike[str], error: ValueError) -> DatasetError:
    return DatasetError(f"Annotation file {path} is not valid JSON ({error}); export it again.")


def _contents(path: str | os.PathLike[str]) -> Any:
    """The bytes of a file as it is now; on Linux in pages of the system, which this process cannot keep."""
    with open(path, "rb") as file:
        try:
            copy = os.fdopen(os.memfd_create("dimaskdino"), "w+b")
            with copy:
                shutil.copyfileobj(file, copy, BLOCK)
                copy.flush()
                return mmap.mmap(copy.fileno(), 0, access=mmap.ACCESS_READ)
        except (AttributeError, OSError, ValueError):  # another system, a limit, an empty file
            file.seek(0)
            return file.read()


def _in_utf8(content: Any) -> Any:
    encoding = json.detect_encoding(content[:4])
    if not encoding.startswith("utf-8"):
        return str(content, encoding).encode()
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, len(content), BLOCK):  # msgspec does not look at text that it leaves out
        decoder.decode(content[start : start + BLOCK])
    decoder.decode(b"", final=True)
    return content if encoding == "utf-8" else memoryview(content)[len(codecs.BOM_UTF8) :]


def _decoded(content: Any, form: Any = Any) -> Any:
    """What JSON in UTF-8 holds; Python's own reader says what is wrong with it, or allows it (NaN)."""
    try:
        return msgspec.json.decode(content, type=form)
    except (ValueError, RecursionError):
        return json.loads(str(content, "utf-8"))


def decode_json(text: bytes | msgspec.Raw, path: str) -> Any:
    """What a part of the file at ``path`` holds."""
    try:
        return _decoded(text)
    except ValueError as error:
        raise _not_valid(path, error) from error
