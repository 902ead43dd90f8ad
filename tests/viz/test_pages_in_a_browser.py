"""The pages in a real headless Chromium: what a person does, and what must be seen then."""

import base64
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from objslot.data.segmentation import VideoSegmentation
from objslot.data.sequences import ArraySequence
from objslot.evaluation import evaluate_dataset
from objslot.viz.evaluation_report import EvaluationReport
from objslot.viz.overlay import overlay_colors
from objslot.viz.report import VideoReport
from objslot.viz.video import VideoWriter

_spec = importlib.util.spec_from_file_location("browser", Path(__file__).with_name("browser.py"))
driver = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(driver)

pytestmark = pytest.mark.skipif(
    not (driver.CHROMIUM and driver.DRIVER),
    reason="needs chromium and chromedriver (Debian: chromium chromium-driver)",
)

LEFT, RIGHT, HOME, END = "\ue012", "\ue014", "\ue011", "\ue010"
SIZE = (48, 64)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of twelve frames, each of one grey: object 1 at the left, object 2 at the right, two slots."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    report = VideoReport("twelve greys", 12, SIZE, 10)
    index = np.zeros(SIZE, np.uint8)
    index[8:40, 4:28], index[8:40, 36:60], index[44:] = 1, 2, 3
    semantic = np.full((6, 8), 2, np.uint8)
    semantic[0, 0] = 1
    for t in range(12):
        attention = np.zeros((3, 2, 6, 8), np.uint8)
        attention[:, 0] = 255
        report.add(
            t, np.full((*SIZE, 3), 20 * t, np.uint8), {"objects": index, "semantic": semantic}, attention
        )
    report.write(
        path,
        [
            {"id": 1, "score": 0.9, "foreground": True},
            {"id": 2, "score": 0.1, "foreground": True},
            {"id": 3, "score": 0.0, "foreground": False},
        ],
    )
    return path


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with driver.browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def opened(chromium, page):
    chromium.errors()
    chromium.open(page)
    chromium.settle()
    yield chromium
    assert chromium.errors() == []


def pixel(browser, x, y, canvas="#picture"):
    script = """const [selector, x, y] = arguments, c = document.querySelector(selector);
        return Array.from(c.getContext("2d").getImageData(x, y, 1, 1).data.slice(0, 3))"""
    browser.settle()
    return np.array(browser.run(script, canvas, x, y))


def blended(gray, identity):
    return (gray + overlay_colors()[identity].astype(int)) / 2


def near(found, expected):
    return np.abs(found - expected).max() <= 4


def test_scrubbing_changes_the_frame(opened):
    assert near(pixel(opened, 1, 1), 0)
    opened.run(
        """const s = document.getElementById("seek"); s.value = 7; s.dispatchEvent(new Event("input"))"""
    )
    assert near(pixel(opened, 1, 1), 140)
    assert "frame 7 of 12" in opened.run("return document.getElementById('place').textContent")


def test_the_timeline_takes_the_pointer(opened):
    opened.run("""const t = document.getElementById("timeline"), box = t.getBoundingClientRect();
        t.dispatchEvent(new PointerEvent("pointerdown", {clientX: box.right - 1, buttons: 1}))""")
    assert near(pixel(opened, 1, 1), 220)


def test_the_keyboard_steps_plays_and_toggles(opened):
    for key in (RIGHT, RIGHT, RIGHT, LEFT):
        opened.press(key)
    assert near(pixel(opened, 1, 1), 40)
    opened.press(END)
    assert near(pixel(opened, 1, 1), 220)
    opened.press(HOME)
    assert near(pixel(opened, 1, 1), 0)
    opened.press("2")
    assert near(pixel(opened, 39, 11), 0) and near(pixel(opened, 7, 11), blended(0, 1))
    opened.press("0")
    assert near(pixel(opened, 39, 11), blended(0, 2)) and near(pixel(opened, 3, 46), blended(0, 3))
    opened.press(" ")
    assert opened.run("return document.getElementById('play').textContent") == "Pause"
    opened.press(" ")
    assert opened.run("return document.getElementById('play').textContent") == "Play"


def test_toggling_hides_an_object(opened):
    assert near(pixel(opened, 7, 11), blended(0, 1)) and near(pixel(opened, 39, 11), blended(0, 2))
    opened.click("#object-1")
    assert near(pixel(opened, 7, 11), 0) and near(pixel(opened, 39, 11), blended(0, 2))
    opened.click("#object-1")
    assert near(pixel(opened, 7, 11), blended(0, 1))


def test_objects_carry_their_numbers(opened):
    script = """const c = document.getElementById("picture"), x = arguments[0];
        const data = c.getContext("2d").getImageData(x, 16, 16, 16).data;
        return data.filter((value, k) => k % 4 === 0 && value > 240).length"""
    opened.settle()
    assert opened.run(script, 8) > 0 and opened.run(script, 40) > 0
    opened.click("#object-1")
    assert opened.run(script, 8) == 0 and opened.run(script, 40) > 0


def test_only_the_foreground_is_shown_at_first(opened):
    assert near(pixel(opened, 3, 46), 0)
    opened.click("#object-3")
    assert near(pixel(opened, 3, 46), blended(0, 3))


def test_maps_and_attention_are_drawn(opened):
    opened.click("[data-layer=semantic]")
    assert near(pixel(opened, 1, 1), blended(0, 1)) and near(pixel(opened, 30, 20), blended(0, 2))
    opened.press("m")
    assert near(pixel(opened, 7, 11), 0)
    opened.press(END)
    attended = "#iterations figure:nth-child(3) canvas"
    assert pixel(opened, 30, 20, attended).max() < 60, "the slot in the middle is chosen at first"
    opened.run(
        """const s = document.getElementById("slot"); s.value = 0; s.dispatchEvent(new Event("input"))"""
    )
    assert near(pixel(opened, 30, 20, attended), 220)
    opened.run(
        """const s = document.getElementById("slot"); s.value = 1; s.dispatchEvent(new Event("input"))"""
    )
    assert pixel(opened, 30, 20, attended).max() < 60
    opened.run("""const p = document.getElementById("picture"), box = p.getBoundingClientRect();
        p.dispatchEvent(new MouseEvent("click", {clientX: box.left + 2, clientY: box.top + 2}))""")
    assert near(pixel(opened, 30, 20, attended), 220)
    assert "Slot 1 of 2" in opened.run("return document.querySelector('label[for=slot]').textContent")


def test_the_background_is_listed_apart_and_folded_away(opened):
    listed = "return [...document.querySelectorAll(arguments[0])].map(l => l.textContent)"
    assert opened.run(listed, "#objects label") == ["Object 10.90", "Object 20.10"]
    assert opened.run(listed, "#background label") == ["Background 30.00"]
    shown = "return document.querySelector('#background input').checkVisibility()"
    assert not opened.run(shown)
    opened.click("#ground summary")
    assert opened.run(shown)
    opened.click("#object-3")
    assert not near(pixel(opened, 30, 46), pixel(opened, 2, 2).mean())
    opened.click("#object-3")
    opened.click("#ground summary")


def test_a_phone_shows_the_page_without_sideways_scrolling(page, tmp_path):
    with driver.browser(tmp_path / "profile", width=500, height=900, dark=True) as phone:
        phone.open(page)
        phone.settle()
        width, room, paper = phone.run(
            "return [document.documentElement.scrollWidth, innerWidth, "
            "getComputedStyle(document.body).backgroundColor]"
        )
        assert width <= room
        assert paper == "rgb(22, 22, 24)", "the dark scheme must be followed"
        assert phone.errors() == []


def test_the_overlay_video_plays(chromium, tmp_path):
    with VideoWriter(tmp_path / "overlay.mp4", fps=10) as writer:
        for t in range(10):
            writer.write(np.full((45, 61, 3), 20 * t, np.uint8))
    # Pixels of another file may not be read.
    video = base64.b64encode((tmp_path / "overlay.mp4").read_bytes()).decode()
    page = tmp_path / "page.html"
    page.write_text(f"<canvas></canvas><video muted src='data:video/mp4;base64,{video}'></video>")
    chromium.errors()
    chromium.open(page)
    # Seeks into the middle of frame 7 and plays from there to the end.
    found = chromium.wait("""const done = arguments[0], v = document.querySelector("video");
        const pen = document.querySelector("canvas").getContext("2d");
        v.onerror = () => done(v.error.message);
        const look = tries => {
          pen.drawImage(v, 0, 0);
          const [grey] = pen.getImageData(20, 20, 1, 1).data;
          if (Math.abs(grey - 140) > 4 && tries) return setTimeout(look, 20, tries - 1);
          v.onended = () => done([v.videoWidth, v.videoHeight, v.duration, grey]);
          v.play();
        };
        v.onloadeddata = () => { v.onseeked = () => look(100); v.currentTime = 0.75; };
        v.load()""")
    assert found[:2] == [62, 46] and abs(found[2] - 1) < 1e-3
    assert abs(found[3] - 140) <= 4
    assert chromium.errors() == []


class Greys:
    name, n_frames, size, fps = "greys", 6, SIZE, 10.0

    def frames(self, start=0):
        yield from (np.full((*SIZE, 3), 40 * t, np.uint8) for t in range(start, 6))


def test_the_evaluation_pages(chromium, tmp_path):
    annotation = np.zeros((6, *SIZE), np.uint8)
    annotation[:, 10:40, 10:40] = 1
    found = annotation.copy()
    found[2, :, 20:] = 0
    sequence = ArraySequence("a <b> sequence", annotation, Greys(), merge_objects=True)
    segmentation = VideoSegmentation(sequence.name, found, foreground=(1,))
    report = EvaluationReport(tmp_path)
    results = evaluate_dataset(
        lambda _: segmentation,
        [sequence],
        dataset="folder",
        progress=lambda judged, result: report.add(judged, segmentation, result),
    )
    report.write(results)

    chromium.errors()
    chromium.open(tmp_path / "report.html")
    assert "a <b> sequence" in chromium.run("return document.body.innerText")
    captions = chromium.run("return [...document.querySelectorAll('figcaption')].map(f => f.textContent)")
    assert captions[0].startswith("best: frame\xa00, J\xa0100.0") and captions[1].startswith(
        "worst: frame\xa02, J\xa033.3"
    )
    assert len(chromium.run("return document.querySelector('polyline').getAttribute('points')").split()) == 6
    cells = chromium.run("return [...document.querySelectorAll('#tables tbody tr')].map(r => r.innerText.split('\\t'))")
    assert [row[0].split(",")[0] for row in cells] == ["A", "this run", "B", "this run", "C", "this run", "this run"]
    assert "what the method itself calls foreground" in cells[0][0]
    assert len(cells[1]) == 8 and len(cells[6]) == 5
    shown = chromium.run("return document.querySelector('article details').innerText")
    assert "Objects, recall and decay" in shown
    chromium.click("article summary")
    assert "object 1" in chromium.run("return document.querySelector('article details').innerText")
    chromium.click("article a")
    chromium.settle()
    assert chromium.run("return document.getElementById('title').textContent") == "a <b> sequence"
    chromium.click("#marks button:nth-child(2)")
    assert near(pixel(chromium, 60, 4), 80)
    assert "A J: 33.3" in chromium.run("return document.getElementById('legend').textContent")
    assert chromium.errors() == []
