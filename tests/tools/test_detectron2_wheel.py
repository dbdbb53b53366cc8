"""The wheel of detectron2 that is made of an sdist, offline, from a small one."""

import base64
import csv
import hashlib
import io
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import detectron2_wheel
import pytest
from detectron2_wheel import Edit, WheelError

SDIST_FILES = {
    "LICENSE": "the licence\n",
    "setup.py": "not part of the wheel\n",
    "detectron2/__init__.py": '__version__ = "0.5"\n',
    "detectron2/old.py": "import numpy as np\nx = np.bool\ny = np.bool\n",
    "detectron2/model_zoo/configs/a.yaml": "A: 1\n",
    "projects/PointRend/point_rend/__init__.py": "from detectron2 import old\n",
    "projects/PointRend/train.py": "not part of the wheel\n",
}
EDITS = (Edit("detectron2/old.py", "np.bool", "bool", "gone"),)


@pytest.fixture
def sdist(tmp_path: Path) -> Path:
    path = tmp_path / "detectron2_cdo-0.5.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, text in SDIST_FILES.items():
            member = tarfile.TarInfo(f"detectron2_cdo-0.5/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    return path


@pytest.fixture
def wheel(sdist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(detectron2_wheel, "SDIST_SHA256", hashlib.sha256(sdist.read_bytes()).hexdigest())
    monkeypatch.setattr(detectron2_wheel, "EDITS", EDITS)
    return detectron2_wheel.repackage(sdist, tmp_path)


def read_wheel(path: Path) -> dict[str, str]:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        return {name: archive.read(name).decode() for name in archive.namelist()}


def test_wheel_holds_the_edited_package_and_projects_alone(wheel: Path) -> None:
    files = {name: text for name, text in read_wheel(wheel).items() if ".dist-info/" not in name}
    assert files.pop("detectron2/_C.py") == detectron2_wheel.STUB_TEXT
    assert files == {
        "detectron2/__init__.py": SDIST_FILES["detectron2/__init__.py"],
        "detectron2/old.py": "import numpy as np\nx = bool\ny = bool\n",
        "detectron2/model_zoo/configs/a.yaml": "A: 1\n",
        "detectron2/projects/point_rend/__init__.py": "from detectron2 import old\n",
    }


def test_record_lists_every_file_with_its_hash_and_size(wheel: Path) -> None:
    files = read_wheel(wheel)
    record_name = next(name for name in files if name.endswith(".dist-info/RECORD"))
    rows = {name: (digest, size) for name, digest, size in csv.reader(files[record_name].splitlines())}
    assert rows.pop(record_name) == ("", "")
    del files[record_name]
    assert rows.keys() == files.keys()
    for name, (digest, size) in rows.items():
        content = files[name].encode()
        expected = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
        assert (digest, int(size)) == (f"sha256={expected}", len(content))


def test_pip_installs_the_wheel_as_detectron2(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    options = ["--no-index", "--no-deps", "--quiet", "--target", str(target)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(wheel)], check=True)
    code = (
        "import detectron2.old, detectron2.projects.point_rend, importlib.metadata as m; print(m.version('detectron2'))"
    )
    # -I with an explicit path: the detectron2 of the test environment must not be the one that is found.
    found = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys, types; sys.path.insert(0, {str(target)!r}); "
         f"sys.modules['numpy'] = types.ModuleType('numpy'); {code}"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert found.stdout.strip() == detectron2_wheel.WHEEL_VERSION


def test_requirements_hold_no_url_and_no_torch(wheel: Path) -> None:
    metadata = next(text for name, text in read_wheel(wheel).items() if name.endswith("METADATA"))
    requirements = [line.split(": ")[1] for line in metadata.splitlines() if line.startswith("Requires-Dist")]
    assert "yacs>=0.1.6" in requirements
    assert not [line for line in requirements if "@" in line or line.startswith("torch")]


def test_version_changes_with_the_edits() -> None:
    assert detectron2_wheel.WHEEL_VERSION.startswith("0.5+index.")
    other = detectron2_wheel.table_digest((*detectron2_wheel.EDITS, *EDITS))
    assert other != detectron2_wheel.table_digest(detectron2_wheel.EDITS)
    assert detectron2_wheel.WHEEL_VERSION.endswith(detectron2_wheel.table_digest(detectron2_wheel.EDITS))


def test_edit_applies_to_every_file_of_its_glob() -> None:
    files = {"a/x.py": b"old old", "a/y.py": b"old", "b/x.py": b"old"}
    edited = detectron2_wheel.apply_edits(files, [Edit("a/*.py", "old", "new", "why")])
    assert edited == {"a/x.py": b"new new", "a/y.py": b"new", "b/x.py": b"old"}


def test_edit_without_its_text_names_file_and_reason() -> None:
    with pytest.raises(WheelError, match=r"a/y\.py \(why\): its text 'old' is missing"):
        detectron2_wheel.apply_edits({"a/x.py": b"old", "a/y.py": b"new"}, [Edit("a/*.py", "old", "new", "why")])


def test_edit_whose_file_is_missing_is_an_error() -> None:
    with pytest.raises(WheelError, match=r"b/\*\.py \(why\): the sdist has no such file"):
        detectron2_wheel.apply_edits({"a/x.py": b"old"}, [Edit("b/*.py", "old", "new", "why")])


def test_stub_imports_and_fails_clearly_when_an_operator_is_called() -> None:
    stub: dict[str, object] = {"__name__": "detectron2._C"}
    exec(detectron2_wheel.STUB_TEXT, stub)
    operator = stub["__getattr__"]("nms_rotated")
    with pytest.raises(NotImplementedError, match=r"_C\.nms_rotated is not built"):
        operator(1, 2)
    with pytest.raises(AttributeError):
        stub["__getattr__"]("__file__")
