"""A quick part of ``make stress``."""

import pytest

from tests.stress.__main__ import LostError, Stress
from tests.stress.jobs import same


@pytest.fixture(scope="module")
def stress(tmp_path_factory: pytest.TempPathFactory) -> Stress:
    return Stress(tmp_path_factory.mktemp("stress"), seed=5)


@pytest.mark.parametrize("scenario", ["kill", "signal", "damage", "full_disk", "bad_data"])
def test_run_survives(scenario: str, stress: Stress) -> None:
    getattr(stress, scenario)()


def test_run_that_differs_is_lost(stress: Stress) -> None:
    left, _ = stress.reference(1)
    assert same(left, left)
    with pytest.raises(LostError, match="model, optimizer, .*differ"), stress.run() as cfg:
        cfg.SOLVER.BASE_LR = 0.02
