import re

import numpy as np
import pytest
import torch
from PIL import Image

from threestudio_pgc.diffusion.reference_image import load_reference_depth, load_reference_image, load_reference_normal


def save(path, array, **options):
    Image.fromarray(np.asarray(array)).save(path, **options)
    return path


def cutout(height=60, width=100, box=(10, 30, 40, 50), color=(255, 0, 0), hidden=(0, 0, 0)):
    """An opaque rectangle, rows box[0]:box[2] and columns box[1]:box[3], on transparent pixels of the colour `hidden`."""
    array = np.zeros((height, width, 4), np.uint8)
    array[..., :3] = hidden
    array[box[0] : box[2], box[1] : box[3]] = (*color, 255)
    return array


@pytest.fixture
def picture(tmp_path):
    return save(tmp_path / "cup.png", cutout())


# ------------------------------------------------------------------------------------------------------------------ nothing


def refused(path, message, **options):
    with pytest.raises(ValueError, match=f"data.image_path: .*{message}") as caught:
        load_reference_image(path, size=32, **options)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_refused(tmp_path):
    refused(tmp_path / "none.png", "no file .*, wanted a picture with a transparent background")


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n"])
def test_a_file_that_is_no_picture_is_refused(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    refused(tmp_path / "a.png", "cannot be read as a picture")


def test_a_file_cut_short_is_refused(tmp_path, picture):
    (tmp_path / "short.png").write_bytes(picture.read_bytes()[:80])
    refused(tmp_path / "short.png", "cannot be read as a picture")


def test_a_picture_without_alpha_is_refused(tmp_path):
    refused(save(tmp_path / "a.jpg", np.zeros((40, 40, 3), np.uint8)), "no transparency, found mode RGB; wanted .*; remove the background")


def test_an_opaque_picture_is_refused(tmp_path):
    refused(save(tmp_path / "a.png", np.full((40, 40, 4), 255, np.uint8)), "opaque everywhere.*remove the background")


def test_a_transparent_picture_is_refused(tmp_path):
    refused(save(tmp_path / "a.png", np.zeros((40, 40, 4), np.uint8)), "transparent everywhere")


def test_a_tiny_object_is_refused(tmp_path):
    refused(save(tmp_path / "a.png", cutout(box=(10, 10, 20, 25))), "is 15 x 10 pixels, wanted at least 16")
    load_reference_image(save(tmp_path / "b.png", cutout(box=(10, 10, 20, 26))), size=32)


@pytest.mark.parametrize("border", [-0.1, 0.5])
def test_a_border_that_leaves_nothing_is_refused(picture, border):
    with pytest.raises(ValueError, match=f"data.border: found {border}, wanted a share of the frame in \\[0, 0.4\\]"):
        load_reference_image(picture, size=32, border=border)


# -------------------------------------------------------------------------------------------------------------------- frame


def test_the_longer_side_fills_the_frame_up_to_the_border(picture):
    """30 rows and 20 columns at border 0.2: 30 / 0.6 = 50 pixels a side, so at size 50 no pixel is resampled."""
    rgb, mask, frame = load_reference_image(picture, size=50)
    assert rgb.shape == (50, 50, 3) and mask.shape == (50, 50, 1) and rgb.dtype == mask.dtype == torch.float32
    expected = torch.zeros(50, 50)
    expected[10:40, 15:35] = 1
    assert torch.equal(mask[..., 0], expected)
    assert torch.equal(rgb, torch.stack([torch.ones(50, 50), 1 - expected, 1 - expected], dim=-1))
    assert (frame.top, frame.left, frame.side) == (0, 15, 50)


@pytest.mark.parametrize("border, side", [(0.0, 48), (0.25, 24)])
def test_the_border_is_free_on_both_sides(tmp_path, border, side):
    path = save(tmp_path / "a.png", cutout(box=(10, 20, 34, 80)))  # 24 rows, 60 columns
    mask = load_reference_image(path, size=48, border=border).mask[..., 0]
    columns = (mask > 0.5).any(dim=0).nonzero().squeeze(-1)
    assert len(columns) == side and int(columns[0]) == (48 - side) // 2
    assert int((mask > 0.5).any(dim=1).sum()) == pytest.approx(side * 24 / 60, abs=1.01)


def test_an_object_at_the_pictures_edge_is_centred_too(tmp_path):
    path = save(tmp_path / "a.png", cutout(box=(0, 80, 30, 100)))
    centred = load_reference_image(save(tmp_path / "b.png", cutout()), size=50)
    found = load_reference_image(path, size=50)
    assert torch.equal(found.mask, centred.mask) and torch.equal(found.rgb, centred.rgb)


def test_a_faint_haze_does_not_move_the_frame(tmp_path, picture):
    array = cutout()
    array[0, 99, 3] = 10  # alpha 0.04
    hazy = load_reference_image(save(tmp_path / "a.png", array), size=50)
    assert hazy.frame[1:] == load_reference_image(picture, size=50).frame[1:]


@pytest.mark.parametrize("size", [17, 128])
@pytest.mark.parametrize("hidden", [(0, 0, 0), (0, 255, 0)])
def test_hidden_colours_leave_no_fringe(tmp_path, size, hidden):
    """A red object on white: red everywhere, green and blue are the white's share, whatever the transparent pixels hold."""
    rgb, mask, _ = load_reference_image(save(tmp_path / "a.png", cutout(hidden=hidden)), size=size)
    assert 0 < mask.unique().numel() and ((mask > 0) & (mask < 1)).any()
    torch.testing.assert_close(rgb, torch.cat([torch.ones_like(mask), 1 - mask, 1 - mask], dim=-1), rtol=0, atol=1e-6)
    assert rgb.min() >= 0 and rgb.max() <= 1


def test_half_opaque_pixels_show_half_the_white(tmp_path):
    array = cutout(color=(0, 0, 0))
    array[10:40, 30:50, 3] = 128
    rgb, mask, _ = load_reference_image(save(tmp_path / "a.png", array), size=50)
    assert mask[25, 25].item() == pytest.approx(128 / 255) and rgb[25, 25].tolist() == pytest.approx([127 / 255] * 3, abs=1e-6)


def test_other_kinds_of_transparency_are_read(tmp_path, picture):
    expected = load_reference_image(picture, size=32)
    with Image.open(picture) as rgba:
        rgba.save(tmp_path / "a.webp", lossless=True)
        palette = rgba.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE)
        clear = palette.getpixel((0, 0))
        palette.save(tmp_path / "palette.png", transparency=clear)
    for name in ("a.webp", "palette.png"):
        found = load_reference_image(tmp_path / name, size=32)
        torch.testing.assert_close(found.mask, expected.mask)
        torch.testing.assert_close(found.rgb, expected.rgb, rtol=0, atol=0.02)


def test_a_camera_held_upright_is_believed(tmp_path, picture):
    """An EXIF orientation turns the picture as every viewer shows it."""
    with Image.open(picture) as upright:
        exif = upright.getexif()
        exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
        upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png", exif=exif)
    assert torch.equal(load_reference_image(tmp_path / "a.png", size=50).rgb, load_reference_image(picture, size=50).rgb)


# --------------------------------------------------------------------------------------------------------- depth and normals


@pytest.fixture
def frame(picture):
    return load_reference_image(picture, size=50).frame


def ramp():
    """(60, 100) a depth that grows to the right and is something else where the picture is transparent."""
    depth = np.full((60, 100), 99.0, np.float32)
    depth[10:40, 30:50] = np.linspace(1, 2, 20, dtype=np.float32)
    return depth


@pytest.mark.parametrize("size", [50, 25])
def test_depth_is_placed_as_the_picture_is_and_does_not_mix_with_the_background(tmp_path, frame, picture, size):
    np.save(tmp_path / "depth.npy", ramp())
    depth = load_reference_depth(tmp_path / "depth.npy", frame, size=size)
    mask = load_reference_image(picture, size=size).mask > 0
    assert depth.shape == (size, size, 1) and depth.dtype == torch.float32
    assert not depth[~mask].any() and depth[mask].min() >= 1 and depth[mask].max() <= 2
    if size == 50:
        torch.testing.assert_close(depth[25, 15:35, 0], torch.linspace(1, 2, 20))


def test_nan_outside_the_object_is_ignored_and_on_it_refused(tmp_path, frame):
    depth = ramp()
    depth[0, 0] = np.nan
    np.save(tmp_path / "depth.npy", depth)
    assert load_reference_depth(tmp_path / "depth.npy", frame, size=50).isfinite().all()
    depth[20, 40] = np.inf
    np.save(tmp_path / "depth.npy", depth)
    with pytest.raises(ValueError, match="data.depth_path: .*depth.npy holds values on the object that are not finite"):
        load_reference_depth(tmp_path / "depth.npy", frame, size=50)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_depth_from_greyscale_pictures(tmp_path, frame, dtype):
    path = save(tmp_path / "depth.png", np.full((60, 100), np.iinfo(dtype).max // 5, dtype))
    depth = load_reference_depth(path, frame, size=50)
    assert depth[25, 25].item() == pytest.approx(0.2)


def test_normals_from_a_picture_and_from_an_array_are_the_same(tmp_path, frame):
    encoded = np.zeros((60, 100, 3), np.uint8)
    encoded[..., 0], encoded[..., 1], encoded[..., 2] = 204, 127, 229  # about (0.6, 0, 0.8)
    from_picture = load_reference_normal(save(tmp_path / "normal.png", encoded), frame, size=25)
    np.save(tmp_path / "normal.npy", np.broadcast_to(np.array([0.6, 0.0, 0.8]) * 3, (60, 100, 3)))
    from_array = load_reference_normal(tmp_path / "normal.npy", frame, size=25)
    torch.testing.assert_close(from_picture, from_array, rtol=0, atol=0.01)
    length = from_array.norm(dim=-1)
    torch.testing.assert_close(length, (length > 0.5).float())
    assert from_array[12, 12].tolist() == pytest.approx([0.6, 0, 0.8]) and not from_array[0, 0].any()


@pytest.mark.parametrize(
    "content, message",
    [
        (np.zeros((60, 99), np.float32), "holds float32 of shape \\(60, 99, 1\\), wanted numbers \\(60, 100, 1\\)"),
        (np.zeros((60, 100, 3), np.float32), "shape \\(60, 100, 3\\), wanted numbers \\(60, 100, 1\\)"),
        (np.zeros((60, 100), "U1"), "holds <U1"),
        (np.full((60, 100), None), "cannot be read as an array"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, frame, content, message):
    np.save(tmp_path / "depth.npy", content)
    with pytest.raises(ValueError, match=f"data.depth_path: {re.escape(str(tmp_path))}.*{message}"):
        load_reference_depth(tmp_path / "depth.npy", frame, size=50)


def test_pictures_of_the_wrong_kind_are_refused(tmp_path, frame):
    color, grey = save(tmp_path / "rgb.png", np.zeros((60, 100, 3), np.uint8)), save(tmp_path / "l.png", np.zeros((60, 100), np.uint8))
    with pytest.raises(ValueError, match="data.depth_path: .*rgb.png is a picture of mode RGB, wanted a greyscale picture or a .npy"):
        load_reference_depth(color, frame, size=50)
    with pytest.raises(ValueError, match="data.normal_path: .*l.png is a picture of mode L, wanted an RGB picture"):
        load_reference_normal(grey, frame, size=50)
    with pytest.raises(ValueError, match="data.depth_path: no file .*none.npy"):
        load_reference_depth(tmp_path / "none.npy", frame, size=50)
