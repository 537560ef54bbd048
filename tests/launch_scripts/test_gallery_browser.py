"""The gallery and the study in a headless Chromium: from disk and from a web server."""

import functools
import json
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from launch_scripts.gallery_page.build import key_file, write_gallery, write_study
from launch_scripts.gallery_page.model_viewer import model_viewer
from launch_scripts.gallery_page.runs import read_runs
from launch_scripts.gallery_page.tally import tally
from tests.launch_scripts.browser import Browser, chromium
from tests.launch_scripts.gallery_runs import METHODS, PROMPTS, make_comparison, make_run

LOADED = "document.querySelectorAll('.stage.loaded').length"
# Of the viewers that are loaded: [row, angle about the axis, radius].
ORBITS = (
    "[...document.querySelectorAll('.stage.loaded model-viewer')].map(viewer => "
    "[viewer.parentNode.dataset.row, viewer.getCameraOrbit().theta, viewer.getCameraOrbit().radius])"
)
ALL_VISIBLE = {"width": 1000, "height": 1500}


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A folder with a gallery and a study of 3 prompts and 4 methods."""
    if chromium() is None:
        pytest.skip("no chromium on this machine")
    try:
        viewer = model_viewer()
    except ValueError as error:
        pytest.skip(f"no model-viewer: {error}")
    folder = tmp_path_factory.mktemp("pages")
    runs = read_runs([make_comparison(folder / "runs")])
    write_gallery(runs, folder / "gallery", "Three prompts", viewer)
    write_study(runs, folder / "study", "Which one is best?", 7, viewer)
    return folder


@pytest.fixture(scope="module")
def browser(pages, tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture(scope="module")
def server(pages):
    handler = functools.partial(QuietHandler, directory=pages)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def gallery(pages, browser):
    """The gallery, opened from disk with all of its models loaded."""
    browser.resize(**ALL_VISIBLE)
    browser.requests.clear()
    browser.complaints.clear()
    browser.open((pages / "gallery" / "index.html").as_uri())
    browser.wait_for(f"{LOADED} === 12")
    yield browser
    assert browser.complaints == []


def settled(browser):
    """The orbits, once they have stopped changing: a camera that was pushed slows down gradually."""
    found, before = browser.evaluate(ORBITS), None
    while found != before:
        found, before = browser.evaluate(f"new Promise(done => setTimeout(() => done({ORBITS}), 200))"), found
    return found


def test_the_gallery_opens_from_disk_and_fetches_nothing_elsewhere(gallery):
    assert gallery.evaluate("document.querySelectorAll('model-viewer').length") == 12
    assert gallery.evaluate("[...document.querySelectorAll('model-viewer')].every(viewer => viewer.loaded)")
    assert {address.partition(":")[0] for address in gallery.requests} <= {"file", "blob", "data"}
    assert gallery.evaluate("[...document.querySelectorAll('thead th')].map(head => head.textContent)") == list(METHODS)
    assert gallery.evaluate("[...document.querySelectorAll('h2')].map(head => head.firstChild.textContent)")[:3] == list(PROMPTS)


def test_turning_one_turns_its_row_and_with_the_switch_all(gallery):
    before = settled(gallery)
    gallery.drag(".stage model-viewer", 60, 0)
    after = settled(gallery)
    assert all(abs(now[1] - then[1]) > 0.3 for then, now in zip(before[:4], after[:4]))
    assert len({round(now[1], 6) for now in after[:4]}) == 1
    assert [now[1:] for now in after[4:]] == [then[1:] for then in before[4:]]
    gallery.click("#together")
    assert len({round(now[1], 6) for now in settled(gallery)}) == 1
    gallery.click("#reset")
    assert [now[1] for now in settled(gallery)] == pytest.approx([then[1] for then in before])


def test_a_model_is_turned_and_zoomed_with_the_keyboard(gallery):
    before = settled(gallery)
    gallery.evaluate("document.getElementById('reset').focus()")
    for key in ("Tab", "ArrowLeft", "PageDown"):
        gallery.press(key)
    after = settled(gallery)
    assert all(abs(now[1] - then[1]) > 0.05 and now[2] < 0.99 * then[2] for then, now in zip(before[:4], after[:4]))
    assert after[4:] == before[4:]


def test_zooming_in_needs_a_click_and_keeps_proportions(gallery):
    gallery.click("#together")
    before = settled(gallery)
    gallery.wheel(".stage model-viewer", -200)
    assert settled(gallery) == before
    gallery.click(".stage model-viewer")
    gallery.wheel(".stage model-viewer", -200)
    after = settled(gallery)
    ratios = [now[2] / then[2] for then, now in zip(before, after)]
    assert ratios == pytest.approx([ratios[0]] * 12, rel=1e-3) and ratios[0] < 0.95
    assert before[0][2] * 1.5 < before[-1][2]  # the last row's model is three times as large


def test_details_show_settings_and_statistics_and_save_the_model(gallery, pages):
    gallery.click("td:nth-child(2) .below button")
    gallery.wait_for("document.querySelector('dialog').open")
    text = gallery.evaluate("document.querySelector('dialog').innerText")
    for said in ("fantasia3d+pgc", "system.pgc.enabled", "13 s", "10 steps", "share of pixels clipped", "50.0 %"):
        assert said in text, said
    assert gallery.evaluate("document.querySelectorAll('dialog svg.chart').length") == 2
    assert gallery.evaluate("document.querySelector('dialog pre').textContent").startswith("name: fantasia3d-pocket-pgc")
    gallery.evaluate("[...document.querySelectorAll('dialog button')].find(button => /Download/.test(button.textContent)).id = 'download'")
    gallery.click("#download")
    saved = gallery.downloaded("*.glb")
    assert saved.name == "a-zebra-bunny-fantasia3d+pgc.glb"
    assert saved.read_bytes() == (pages / "runs/0-1/save/it10-export/model.glb").read_bytes()
    gallery.press("Escape")
    gallery.wait_for("!document.querySelector('dialog').open")


def test_viewers_exist_only_near_the_screen_and_keep_their_rows_view(gallery):
    gallery.resize(1000, 300)
    gallery.wait_for("document.querySelectorAll('[data-row=\"2\"] model-viewer').length === 0")
    gallery.drag(".stage model-viewer", 60, 0)
    turned = settled(gallery)[0][1]
    gallery.evaluate("scrollTo(0, document.body.scrollHeight)")
    gallery.wait_for("document.querySelectorAll('[data-row=\"2\"].loaded').length === 4")
    gallery.wait_for("document.querySelectorAll('[data-row=\"0\"] model-viewer').length === 0")
    gallery.evaluate("scrollTo(0, 0)")
    gallery.wait_for("document.querySelectorAll('[data-row=\"0\"].loaded').length === 4")
    assert [orbit[1] for orbit in settled(gallery) if orbit[0] == "0"] == pytest.approx([turned] * 4)


def test_the_gallery_opens_from_a_server(browser, server):
    browser.resize(400, 900, phone=True, dark=True)
    browser.requests.clear()
    browser.open(f"{server}/gallery/index.html")
    browser.wait_for(f"{LOADED} >= 4")
    assert all(address.startswith((server, f"blob:{server}", "data:")) for address in browser.requests)
    assert browser.evaluate("document.body.classList.contains('narrow') && document.documentElement.scrollWidth <= innerWidth")


def test_a_model_that_is_missing_says_so_and_the_others_load(tmp_path, browser):
    for method in "mn":
        make_run(tmp_path / method, record={"method": method})
    write_gallery(read_runs([tmp_path]), tmp_path / "out", "T", model_viewer())
    (tmp_path / "out" / "assets" / "001-01.js").unlink()
    browser.resize(**ALL_VISIBLE)
    browser.open((tmp_path / "out" / "index.html").as_uri())
    browser.wait_for(f"{LOADED} === 1")
    assert browser.wait_for("document.querySelector('.message')?.textContent") == "assets/001-01.js cannot be read"


def test_a_study_is_clicked_through_saved_and_tallied(browser, pages):
    """Picks: the second model of each prompt, after changing the mind once and a reload in between."""
    browser.resize(**ALL_VISIBLE)
    browser.complaints.clear()
    browser.open((pages / "study" / "study.html").as_uri())
    assert not any(method in browser.evaluate("document.documentElement.outerHTML") for method in METHODS)
    browser.click("#start")
    shown = []
    for row in range(3):
        browser.wait_for(f"{LOADED} === 4")
        assert browser.evaluate("document.getElementById('progress').textContent") == f"{row + 1} / 3"
        assert PROMPTS[row] in browser.evaluate("document.querySelector('h1').textContent")
        assert browser.evaluate("document.getElementById('next').disabled")
        shown.append(browser.evaluate("[...document.querySelectorAll('.stage')].map(place => place.stage.option.asset)"))
        browser.click(".option:nth-child(1) button")
        browser.click(".option:nth-child(2) button")
        if row == 1:
            browser.reload()
            assert browser.evaluate("document.getElementById('progress').textContent") == "2 / 3"
            browser.click("#back")
            assert browser.evaluate("document.querySelectorAll('.option.picked:nth-child(2)').length") == 1
            browser.click("#next")
        browser.click("#next")
    browser.click("#save")
    saved = browser.downloaded("study-*.json")
    result = json.loads(saved.read_text())
    assert saved.name == f"study-{result['study']}-{result['participant']}.json"
    assert [item["pick"] for item in result["picks"]] == [order[1] for order in shown]
    assert [item["shown"] for item in result["picks"]] == shown

    key = json.loads(key_file(pages / "study").read_text())
    expected = [METHODS[key["assets"][order[1]][1]] for order in shown]
    found = tally([saved], pages / "study")
    assert (found.people, found.picks) == (1, 3)
    assert {share.method: share.picks for share in found.shares} == {method: expected.count(method) for method in METHODS}

    browser.click("#again")  # the next participant is another one, and starts at the start
    assert browser.evaluate("document.getElementById('start') !== null && state.picks.every(pick => pick === null)")
    assert browser.evaluate("state.participant") != result["participant"]
    assert browser.complaints == []


def test_participants_see_the_methods_in_every_place_equally_often(browser, pages):
    """4000 participants: each of 24 orders comes 167 times on average; 5 standard deviations are 63."""
    browser.open((pages / "study" / "study.html").as_uri())
    counts = browser.evaluate("""(() => {
        const counts = {}
        for (let person = 0; person < 4000; person++) {
            state.participant = person.toString(16).padStart(12, "0")
            const order = shown(0).map(option => option.asset).join()
            counts[order] = (counts[order] ?? 0) + 1
        }
        return Object.values(counts)
    })()""")
    assert len(counts) == 24 and sum(counts) == 4000
    assert max(abs(count - 4000 / 24) for count in counts) < 63
    same = "(() => { state.participant = 'x'; return [shown(0), shown(0)].map(order => order.map(option => option.asset).join()) })()"
    first, second = browser.evaluate(same)
    assert first == second
