import io

import numpy as np
import pytest
from PIL import Image

from threestudio_pgc.export.maps import CONTENTS, MTL_KEYWORDS, PRESETS, exists, pack
from threestudio_pgc.export.pictures import encode_picture

SHAPE = (2, 3)
MAPS = {
    "base_color": np.full((*SHAPE, 3), [0.2, 0.4, 0.6], np.float32),
    "occlusion": np.full((*SHAPE, 1), 0.8, np.float32),
    "roughness": np.full((*SHAPE, 1), 0.4, np.float32),
    "metallic": np.full((*SHAPE, 1), 0.6, np.float32),
    "normal": np.full((*SHAPE, 3), [0.6, -0.2, 1.0], np.float32),
}


def test_a_map_the_asset_lacks_makes_no_picture():
    assert [content for content in CONTENTS if exists(content, ["base_color"])] == ["base_color"]
    assert [content for content in CONTENTS if exists(content, ["base_color", "roughness"])] == ["base_color", "roughness", "orm", "mask"]


@pytest.mark.parametrize(
    "content, color",
    [
        ("base_color", [51, 102, 153]),
        ("orm", [204, 102, 153]),
        ("mask", [153, 204, 255, 153]),  # smoothness 0.6
        ("roughness", [102]),
        ("normal", [204, 102, 255]),
        ("normal_directx", [204, 153, 255]),
    ],
)
def test_channels_lie_where_the_programs_look(content, color):
    picture = pack(MAPS, content)
    assert picture.shape == (*SHAPE, len(color)) and picture.dtype == np.uint8
    assert (picture == color).all()


def test_channels_without_a_map_are_neutral():
    """Unoccluded, rough, no metal."""
    only = {"base_color": MAPS["base_color"], "metallic": MAPS["metallic"]}
    assert pack(only, "orm")[0, 0].tolist() == [255, 255, 153]
    assert pack({"base_color": MAPS["base_color"], "occlusion": MAPS["occlusion"]}, "mask")[0, 0].tolist() == [0, 204, 255, 0]


def test_rows_packed_in_parts_and_values_out_of_range():
    tall = np.linspace(-0.5, 1.5, 700, dtype=np.float32)[:, None, None]
    picture = pack({"base_color": tall.repeat(3, -1), "roughness": tall}, "roughness")
    np.testing.assert_array_equal(picture[:, 0, 0], np.floor(tall[:, 0, 0].clip(0, 1) * 255 + 0.5))


def test_every_preset_names_known_pictures_once():
    for pictures in PRESETS.values():
        assert set(pictures.values()) <= set(CONTENTS) and len(set(pictures.values())) == len(pictures)
    assert set(MTL_KEYWORDS) <= set(CONTENTS)


@pytest.mark.parametrize("image_format", ["jpeg", "webp"])
def test_lossy_formats_stay_close(image_format):
    rows = np.linspace(0, 1, 64, dtype=np.float32)[:, None].repeat(64, 1)[..., None]
    pixels = pack({"base_color": rows.repeat(3, -1), "occlusion": rows, "roughness": 1 - rows, "metallic": rows * 0.5}, "orm")
    seen = np.asarray(Image.open(io.BytesIO(encode_picture(pixels, image_format))).convert("RGB"))
    assert np.abs(seen.astype(int) - pixels).mean() < 4
