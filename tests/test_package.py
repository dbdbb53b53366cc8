"""What importing the package does to the process, and what describes it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import dimaskdino


@pytest.mark.parametrize(("given", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_waiting_threads_sleep_by_default(given: str | None, expected: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    environment |= {} if given is None else {"OMP_WAIT_POLICY": given}
    # Torch reads the setting when it is loaded, so it must not come first.
    program = "import sys; sys.modules['dimaskdino.modeling'] = sys; import dimaskdino, os; "
    program += "assert 'torch' not in sys.modules; print(os.environ['OMP_WAIT_POLICY'])"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected


def test_the_citation_has_the_version_of_the_package() -> None:
    citation = yaml.safe_load((Path(__file__).parents[1] / "CITATION.cff").read_text())
    assert citation["version"] == dimaskdino.__version__
    assert {each["year"] for each in [citation["preferred-citation"], *citation["references"]]} == {2023, 2024}
