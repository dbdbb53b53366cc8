"""The page: what it computes, its functions over HTTP, and, by `make browser-check`, the page in a browser."""

import json
import shutil
from pathlib import Path
from typing import Any

import browse
import numpy as np
import pytest
from PIL import Image

from dimaskdino import Predictor
from dimaskdino.errors import UserError
from tests.test_predictor import make_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def browser(tmp_path: Path) -> browse.Browser:
    run = make_run(tmp_path / "run")
    return browse.Browser({name: Predictor(run, device="cpu", layers=["all"], score=0.0) for name in ("a", "b")})


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def test_the_threshold_and_the_layer_choose_what_is_shown(browser, pixels) -> None:
    everything = browser.look(pixels, "a", browse.LAST, "objects", 0.0)
    scores = everything.instances.scores
    middle = float(scores.median())
    chosen = browser.look(pixels, "a", browse.LAST, "objects", middle)
    assert 0 < len(chosen.instances) == int((scores >= middle).sum()) < len(everything.instances)
    assert [name for _, name in browser.layers] == [browse.LAST, "interm", "initial", "layer.0", "layer.1", "layer.2"]
    first = browser.look(pixels, "a", "layer.0", "objects", 0.0).instances.scores
    last = browser.look(pixels, "a", "layer.2", "objects", 0.0).instances.scores
    assert np.array_equal(last, scores)
    assert not np.array_equal(first, scores)


def test_an_image_goes_through_the_model_once(browser, pixels, monkeypatch) -> None:
    calls = []
    model = browser.predictors["a"].model
    model.register_forward_hook(lambda *_: calls.append(1))
    for score in (0.0, 0.5, 0.9):
        browser.look(pixels, "a", browse.LAST, "objects", score)
    assert len(calls) == 1
    browser.look(pixels[:32], "a", browse.LAST, "objects", 0.0)
    assert len(calls) == 2


def test_what_a_run_does_not_give_is_said(browser, pixels) -> None:
    with pytest.raises(UserError, match="panoptic"):
        browser.look(pixels, "a", browse.LAST, "panoptic", 0.0)
    with pytest.raises(UserError, match=r"^a has no second selection, but .*decoder layer 0"):
        browser.look(pixels, "a", "selection.2", "objects", 0.0)


def test_demo_model_is_the_default_and_a_taken_port_is_named(monkeypatch, tmp_path) -> None:
    class Page:
        def launch(self, **_: object) -> None:
            raise OSError("Cannot find empty port")

    def build_page(browser: browse.Browser, score: float) -> Page:
        assert [each.classes.things[3] for each in browser.predictors.values()] == ["star"]
        return Page()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(browse, "build_page", build_page)
    monkeypatch.setattr("sys.argv", ["browse.py", "--device", "cpu", "--port", "7861"])
    with pytest.raises(UserError, match="--port 7861"):
        browse.main()


@pytest.fixture
def page(browser):
    """The address of the page, served to this machine."""
    pytest.importorskip("gradio", reason="the page needs gradio: pip install dimaskdino[browse]")
    page = browse.build_page(browser, 0.0)
    _, address, _ = page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    yield address
    page.close()


def test_the_page_compares_two_runs_over_http(page, pixels, tmp_path) -> None:
    from gradio_client import Client, handle_file

    Image.fromarray(pixels).save(tmp_path / "in.png")
    image = handle_file(str(tmp_path / "in.png"))
    client = Client(page, verbose=False, download_files=str(tmp_path / "files"))
    left, right, files = client.predict(image, "a", browse.NO_RUN, browse.LAST, "objects", 0.0, api_name="/look")
    assert Image.open(left["value"]).width == 512  # enlarged, so that labels can be read
    assert not right["visible"]
    assert [Path(file).name for file in files] == ["a.png", "a.json"]
    objects = json.loads(Path(files[1]).read_text())["objects"]
    assert len(objects) == 6
    left, right, files = client.predict(image, "a", "b", "layer.0", "objects", 0.0, api_name="/look")
    assert [Path(file).name for file in files] == ["a.png", "a.json", "b.png", "b.json"]
    assert (left["label"], right["label"], right["visible"]) == ("a", "b", True)


@pytest.mark.slow
@pytest.mark.browser
def test_the_page_works_in_a_browser(page, pixels, tmp_path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="the check needs Playwright: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("the check needs Chromium, of the system's packages")
    Image.fromarray(pixels).save(tmp_path / "in.png")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = chromium.new_page(viewport={"width": 1400, "height": 900})
        tab.set_default_timeout(60_000)
        tab.goto(page)
        tab.set_input_files("input[type=file]", tmp_path / "in.png")
        download_of_a, download_of_b = (tab.locator(f"a[download='{name}.json']") for name in "ab")
        download_of_a.wait_for()
        tab.get_by_label("compare with").click()
        tab.get_by_role("option", name="b", exact=True).click()
        download_of_b.wait_for()
        shown = [str(each.get_attribute("src")) for each in tab.locator("img[src*='.png']").all()]
        assert [Path(each).name for each in shown] == ["in.png", "a.png", "b.png"]
        assert _objects_behind(tab, download_of_a) == 6
        earlier = download_of_a.get_attribute("href")
        tab.get_by_role("slider").press("End")
        tab.wait_for_function("href => document.querySelector('a[download=\"a.json\"]').href != href", arg=earlier)
        assert _objects_behind(tab, download_of_a) == 0
        chromium.close()


def _objects_behind(tab: Any, link: Any) -> int:
    """How many objects the file has that a link downloads."""
    with tab.expect_download() as download:
        link.click()
    return len(json.loads(Path(download.value.path()).read_text(encoding="utf-8"))["objects"])
