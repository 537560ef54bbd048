"""The laboratory's report page."""

import base64
import io
import os
import re

import numpy as np
import pytest
from PIL import Image

from launch_scripts.lab.page import Section, write_page
from tests.launch_scripts.browser import chromium, loaded_images
from threestudio_pgc.export.pictures import save_png

NASTY = "<script>alert(1)</script>&\"'"


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    sizes = [(5, 7), (64, 64), (300, 1200)]
    return [save_png(tmp_path / f"{k}.png", rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for k, size in enumerate(sizes)]


def page_of(tmp_path, **parts):
    given = {"title": "t", "command": "c", "settings": {}, "sections": []} | parts
    return write_page(tmp_path / "page.html", **given).read_text(encoding="utf-8")


def cells(page, tag):
    return re.findall(rf"<{tag}([^>]*)>([^<]*)</{tag}>", page.split("<h2>")[1])


def test_nothing_to_tell(tmp_path):
    page = page_of(tmp_path, title="", command="")
    assert page.startswith("<!DOCTYPE html>") and "<img" not in page and "<pre" not in page and "<details" not in page
    page = page_of(tmp_path, sections=[Section("", table=[]), Section("", table=[{}])])
    assert page.count("no rows") == 2 and "<table" not in page
    assert Section("a").images is not Section("b").images


def test_every_image_is_in_the_page_to_the_pixel(tmp_path, pictures):
    sections = [Section("one", images=[(pictures[0], "first")]), Section("two", images=[(file, "") for file in pictures[1:]])]
    page = page_of(tmp_path, sections=sections)
    sources = re.findall(r'<img[^>]* src="data:image/png;base64,([^"]*)"', page)
    assert len(sources) == page.count("<img") == 3
    for source, file in zip(sources, pictures):
        inside = Image.open(io.BytesIO(base64.b64decode(source, validate=True)))
        assert np.array_equal(np.asarray(inside), np.asarray(Image.open(file)))


def test_images_have_caption_alt_and_size(tmp_path, pictures):
    page = page_of(tmp_path, sections=[Section("one", images=[(pictures[0], "a tiny one"), (pictures[2], "")])])
    tiny, wide = re.findall(r"<figure>.*?</figure>", page)
    assert 'alt="a tiny one"' in tiny and tiny.index("<img") < tiny.index("<figcaption>a tiny one</figcaption>")
    assert 'class="small" width="315" height="225"' in tiny  # 45 times 7 x 5
    assert 'alt="2"' in wide and "<figcaption" not in wide and 'width="1200" height="300"' in wide and "small" not in wide


def test_all_text_is_escaped(tmp_path, pictures):
    section = Section(NASTY, NASTY, [(pictures[0], NASTY)], [{NASTY: NASTY}])
    page = page_of(tmp_path, title=NASTY, command=NASTY, settings={NASTY: [NASTY]}, sections=[section] * 3)
    assert "<script" not in page and NASTY not in page
    # title twice, command, setting twice; title, text, caption, alt, column and cell of each section, and its line in the contents
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;&amp;&quot;&#x27;") == 5 + 3 * 7


def test_nothing_is_fetched(tmp_path, pictures):
    page = page_of(tmp_path, sections=[Section(str(k), images=[(file, "")]) for k, file in enumerate(pictures)])
    assert "http" not in page and "//" not in re.sub(r"base64,[^\"]*", "", page) and "@import" not in page and "url(" not in page
    assert all(target.startswith(("data:image/png;", "#s")) for target in re.findall(r'(?:src|href)="([^"]*)"', page))


def test_a_missing_image_is_named_and_nothing_written(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    for name, message in (("missing.png", "found no such image"), ("text.png", "wanted a PNG")):
        with pytest.raises(ValueError, match=f"{name}: .*{message}"):
            page_of(tmp_path, sections=[Section("one", images=[(tmp_path / name, "")])])
    assert os.listdir(tmp_path) == ["text.png"]


def test_table_numbers_are_short_and_right_aligned(tmp_path):
    rows = [
        {"route": "vae", "cosine": 0.123456789, "pixels": 16384, "good": True},
        {"route": "linear", "cosine": np.float32(1.5e-7), "pixels": np.int64(3), "good": np.bool_(False)},
        {"route": "none", "cosine": float("nan"), "seconds": 12345.678},
    ]
    page = page_of(tmp_path, sections=[Section("numbers", table=rows)])
    right = ' class="number"'
    assert [text for _, text in cells(page, "td")] == [
        *["vae", "0.1235", "16384", "yes", ""],
        *["linear", "1.5e-7", "3", "no", ""],
        *["none", "nan", "", "", "12346"],
    ]
    assert [attributes == right for attributes, _ in cells(page, "td")[:5]] == [False, True, True, False, True]
    assert [text for _, text in re.findall(r"<th([^>]*)>([^<]*)</th>", page)] == ["route", "cosine", "pixels", "good", "seconds"]
    assert "position: sticky" in page


def test_settings_and_odd_text_are_legible(tmp_path):
    settings = {"rule": {"threshold": 0.1}, "timesteps": [20, 100], "lr": 1e-5, "nothing": None, "zebra": "\u6591\u99ac \udcff"}
    page = page_of(tmp_path, settings=settings)
    for text in ("threshold=0.1", "20, 100", "1e-5", "\u6591\u99ac ?"):
        assert f"<td>{text}</td>" in page


@pytest.mark.skipif(chromium() is None, reason="no chromium on this machine")
def test_a_browser_shows_every_image(tmp_path, pictures):
    sections = [Section("one", "text", [(file, "caption") for file in pictures]), Section("two", NASTY, [(pictures[0], NASTY)])]
    path = write_page(tmp_path / "page.html", "title", "command", {"a": 1}, sections)
    before = path.read_bytes()
    assert loaded_images(path) == 4
    assert path.read_bytes() == before
    path.write_text('<!DOCTYPE html><body><img src="missing.png"></body>')
    assert loaded_images(path) == 0  # the count would tell
