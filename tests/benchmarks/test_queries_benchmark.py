"""The benchmark of queries measures a model with as many as it is asked for."""

import pytest

from benchmarks import queries


@pytest.mark.parametrize("train", [True, False])
def test_a_run_is_measured_with_this_many_queries(train: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queries, "SIZE", 64)
    found = queries.measure(20, train=train)
    assert found["seconds"] > 0
    assert found["MiB"] >= 0
    cfg = queries.configured(20)
    assert cfg.MODEL.MaskDINO.NUM_OBJECT_QUERIES == cfg.TEST.DETECTIONS_PER_IMAGE == 20
