"""The examples of the documentation, for tests that run them."""

import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def example(page: str, module: str) -> str:
    """The text of a module that a page of the documentation shows.

    Args:
        page: path in the repository.
        module: whose file the first line of the example names.
    """
    return re.search(rf"```python\n# {module}\.py\n(.*?)```", (REPOSITORY / page).read_text(), re.DOTALL)[1]
