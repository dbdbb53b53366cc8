import io
from pathlib import Path

import pytest

from dimaskdino.errors import UserError
from dimaskdino.prediction.inputs import find_sources

NOTHING = io.StringIO()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.JPG", "a.png", "a.jpg", "deep/c.png", "deep/d.mp4", "notes.txt"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).touch()
    return tmp_path / "in"


def names(*given: object, stdin: str = "", **options) -> list[str]:
    return [source.name for source in find_sources([str(each) for each in given], io.StringIO(stdin), **options)]


def test_a_folder_is_searched_to_its_depth_in_one_order(folder) -> None:
    sources = find_sources([str(folder)], NOTHING)
    assert [(source.name, source.kind) for source in sources] == [
        ("a.jpg", "image"),
        ("a.png", "image"),
        ("b", "image"),
        ("deep/c", "image"),
        ("deep/d", "video"),
    ]
    assert [source.number for source in sources] == list(range(5))


def test_globs_and_lists_name_files(folder) -> None:
    assert names(folder / "*.png") == ["a"]
    assert names(folder / "**" / "*.png") == ["a", "deep/c"]
    assert names("-", stdin=f"{folder / 'b.JPG'}\n\n{folder / 'deep' / 'c.png'}\n") == ["b", "deep/c"]
    (folder / "list").write_text(f"{folder / 'b.JPG'}\n{folder / 'b.JPG'}\n")
    assert names(f"@{folder / 'list'}") == ["b"]


def test_a_file_named_like_a_glob_is_that_file(folder) -> None:
    (folder / "[a].png").touch()
    assert names(folder / "[a].png") == ["[a]"]


def test_missing_file_is_left_to_the_job(folder) -> None:
    assert names(folder / "absent.png") == ["absent"]


def test_a_camera_comes_last(folder) -> None:
    *_, camera = find_sources([str(folder / "a.png")], NOTHING, camera=2)
    assert (camera.path, camera.kind, camera.name, camera.number) == ("2", "camera", "camera_2", 1)


def test_nothing_to_predict_is_an_error(folder, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    for given, named in (
        (tmp_path / "*.png", r"\*\.png"),
        (f"@{tmp_path / 'absent'}", f" {tmp_path / 'absent'} "),
        (tmp_path / "empty",) * 2,
    ):
        with pytest.raises(UserError, match=str(named)):
            names(given)
    with pytest.raises(UserError, match="name images"):
        names()
