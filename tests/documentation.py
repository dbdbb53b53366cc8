"""The examples of the documentation, and copies of the repository, for tests that run them."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def command(page: str, text: str) -> list[str]:
    """The arguments of the shown command that holds ``text``, after the program's name.

    Args:
        page: path in the repository.
        text: as above; one command of the page has it.
    """
    blocks = re.findall(r"```bash\n(.*?)```", (REPOSITORY / page).read_text(), re.DOTALL)
    (block,) = [each for each in blocks if text in each]
    return shlex.split(block.replace("\\\n", " "), comments=True)[2:]


def example(page: str, module: str) -> str:
    """The text of a module that a page of the documentation shows.

    Args:
        page: path in the repository.
        module: whose file the first line of the example names.
    """
    return re.search(rf"```python\n# {module}\.py\n(.*?)```", (REPOSITORY / page).read_text(), re.DOTALL)[1]


def copy_repository(folder: Path) -> None:
    """Copy what git tracks, as it is now, into a new folder."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=REPOSITORY, check=True, capture_output=True, text=True
    ).stdout
    for name in listed.split("\0"):
        if (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, folder / name)
