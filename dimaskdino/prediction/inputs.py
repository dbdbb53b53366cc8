"""From what a command line names to the images and videos to predict."""

import glob
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TextIO

from PIL import Image

from dimaskdino.errors import UserError

VIDEO_SUFFIXES = frozenset((".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv"))


@dataclass(frozen=True)
class Source:
    """One image, video, or camera."""

    path: str  # of the file, or the number of a camera
    kind: Literal["image", "video", "camera"]  # what it is
    name: str  # of its outputs, without suffix: the file's path below the folder that all inputs share
    number: int  # place among all inputs, from 0


def find_sources(
    given: Sequence[str], stdin: TextIO, *, camera: int | None = None, output: Path | None = None
) -> list[Source]:
    """List what is to be predicted, in an order that every process of a job finds.

    ``given`` holds files, folders (searched with their subfolders), globs, ``-`` for a list of these on stdin, one a
    line, and ``@FILE`` for a list in a file. The ``output`` of the job is no input where it lies below a given folder.

    Raises:
        UserError: a folder or glob that holds no image or video, a list that cannot be read, or nothing is given.
        OSError: a folder that cannot be read.
    """
    written = ("pictures", "masks") if output and (output / "settings.json").exists() else ()
    own = tuple(os.path.join(os.path.abspath(output or ""), folder, "") for folder in written)
    found = [path for each in _expand_lists(given, stdin) for path in _find_files(each, own)]
    paths = list({os.path.abspath(path): path for path in found}.values())
    cameras = [] if camera is None else [f"camera_{camera}"]
    names = _output_names(paths, cameras)
    sources = [
        Source(path, "video" if Path(path).suffix.lower() in VIDEO_SUFFIXES else "image", name, number)
        for number, (path, name) in enumerate(zip(paths, names, strict=True))
    ]
    sources += [Source(str(camera), "camera", name, len(sources)) for name in cameras]
    if not sources:
        raise UserError("There is nothing to predict: name images, videos, folders, globs, or a camera.")
    return sources


def _expand_lists(given: Iterable[str], stdin: TextIO) -> Iterator[str]:
    for each in given:
        listed = each.startswith("@") and not os.path.exists(each)
        if each != "-" and not listed:
            yield each
            continue
        try:
            text = Path(each[1:]).read_text(encoding="utf-8-sig") if listed else stdin.read()
        except (OSError, UnicodeDecodeError) as error:
            name = each[1:] or "on stdin"
            raise UserError(f"The list {name} cannot be read ({error}); it holds one path a line.") from error
        yield from filter(None, text.split("\n"))


def _find_files(given: str, own: tuple[str, ...]) -> list[str]:
    """The files of a folder or glob; anything else is a file, which may turn out not to be there.

    What the job itself has written, below the folders ``own``, counts only if a folder in there is given.
    """
    if os.path.isdir(given):
        found = [path for path in _walk(given) if _is_known(path)]
    elif not os.path.exists(given) and glob.has_magic(given):
        found = [path for path in glob.glob(given, recursive=True) if os.path.isfile(path)]
    else:
        return [given]
    if not os.path.join(os.path.abspath(given), "").startswith(own):
        found = [path for path in found if not os.path.abspath(path).startswith(own)]
    if not found:
        raise UserError(f"{given} holds no image or video; check the path.")
    return sorted(found)


def _walk(folder: str) -> Iterator[str]:
    """The files of a folder and its subfolders, once each where links lead in a circle; hidden ones are left out."""

    def stop(error: OSError) -> None:
        raise error

    seen = set()
    for parent, folders, files in os.walk(folder, onerror=stop, followlinks=True):
        real = os.path.realpath(parent)
        folders[:] = sorted(each for each in folders if not each.startswith(".") and real not in seen)
        yield from (os.path.join(parent, each) for each in files if not each.startswith(".") and real not in seen)
        seen.add(real)


def _is_known(path: str) -> bool:
    suffix = os.path.splitext(path)[1].lower()
    return (suffix in VIDEO_SUFFIXES or suffix in Image.registered_extensions()) and os.path.isfile(path)


def _output_names(paths: Sequence[str], taken: Sequence[str]) -> list[str]:
    """A name for the outputs of each file: its path below the shared folder, with its suffix where names are equal.

    Files on different drives share no folder, so each drive becomes one.
    """
    split = [Path(os.path.abspath(path)).parts for path in paths]
    full = [(re.sub(r"\W+", "_", drive).strip("_"), *parts) for drive, *parts in split]
    shared = len(os.path.commonprefix([parts[:-1] for parts in full]))
    below = ["/".join(parts[shared:]) for parts in full]
    stems = [os.path.splitext(path)[0] for path in below]
    count = Counter(stems) + Counter({*taken, *(path for path, stem in zip(below, stems, strict=True) if path != stem)})
    return [stem if count[stem] == 1 else path for stem, path in zip(stems, below, strict=True)]
