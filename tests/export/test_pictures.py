import io
import os

import numpy as np
import pytest
import torch
from PIL import Image

from threestudio_pgc.export.files import ExportError
from threestudio_pgc.export.pictures import contact_sheet, encode_picture, encode_png, heat_map, save_png, to_uint8, write_video


def flat(color, height=8, width=6):
    return torch.tensor(color).expand(height, width, 3)


def test_nothing_to_show(tmp_path):
    with pytest.raises(ValueError, match="no images"):
        contact_sheet([])
    with pytest.raises(ValueError, match="film.mp4: found no frames"):
        write_video(tmp_path / "film.mp4", [])
    assert heat_map(torch.zeros(0, 4)).shape == (0, 4, 3)
    assert os.listdir(tmp_path) == []


def test_to_uint8_rounds_clamps_and_repeats_grey():
    assert to_uint8(torch.tensor([[[0.0, 0.5, 1.0], [-1.0, 2.0, float("nan")]]])).tolist() == [[[0, 128, 255], [0, 255, 0]]]
    assert to_uint8(np.array([[7]], np.uint8)).tolist() == [[[7, 7, 7]]]
    for shape in ((2, 2, 4), (1, 2, 2, 3), (3,)):
        with pytest.raises(ValueError, match="wanted .H, W, 3."):
            to_uint8(np.zeros(shape))


def test_png_holds_the_pixels(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    path = save_png(tmp_path / "a.png", image)
    assert np.array_equal(np.asarray(Image.open(path)), image)
    assert path.read_bytes() == encode_png(image)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_pictures_have_the_format_that_was_asked_for(image_format, channels):
    pixels = np.full((5, 7, channels), 100, np.uint8)
    if (image_format, channels) == ("jpeg", 4):
        with pytest.raises(ValueError, match="found 'jpeg' for a picture of 4 channels"):
            encode_picture(pixels, image_format)
        return
    picture = Image.open(io.BytesIO(encode_picture(pixels, image_format)))
    assert picture.format == image_format.upper() and picture.size == (7, 5)
    assert np.abs(np.asarray(picture).astype(int) - 100).max() <= 2


def test_quality_trades_size_for_precision():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for image_format in ("jpeg", "webp"):
        assert len(encode_picture(pixels, image_format, 20)) < len(encode_picture(pixels, image_format, 95))


def test_formats_that_cannot_hold_a_picture_say_so():
    with pytest.raises(ValueError, match="image_format: found 'tga', wanted one of png, jpeg, webp"):
        encode_picture(np.zeros((1, 1, 3), np.uint8), "tga")
    with pytest.raises(ValueError, match="found 'webp' for 16384 x 1 pixels, wanted at most 16383"):
        encode_picture(np.zeros((1, 16384, 3), np.uint8), "webp")


def test_contact_sheet_goes_row_by_row():
    colors = [[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]]
    sheet = contact_sheet([flat(color) for color in colors], 2, gap=3)
    assert sheet.shape == (8 + 3 + 8, 6 + 3 + 6, 3) and sheet.dtype == np.uint8
    assert (sheet[:8, :6] == [255, 0, 0]).all()
    assert (sheet[:8, 9:] == [0, 255, 0]).all()
    assert (sheet[11:, :6] == [0, 0, 255]).all()
    assert (sheet[8:11] == 255).all() and (sheet[11:, 6:] == 255).all()


def test_contact_sheet_labels_are_drawn_under_the_images():
    images = [flat([0.0, 0, 0], 10, 60)] * 2
    plain, labelled = contact_sheet(images, 2), contact_sheet(images, 2, ["one", "a label much too long for its image"])
    assert labelled.shape[0] == plain.shape[0] + 14
    assert np.array_equal(labelled[:10], plain[:10])
    assert (labelled[10:, :60] < 128).any() and (labelled[10:, 64:] < 128).any()
    assert (labelled[10:, 60:64] == 255).all()


def test_contact_sheet_refuses_a_mixture():
    with pytest.raises(ValueError, match="sizes"):
        contact_sheet([flat([0.0] * 3), flat([0.0] * 3, 9)])
    with pytest.raises(ValueError, match="1 labels for 2 images"):
        contact_sheet([flat([0.0] * 3)] * 2, labels=["one"])


def test_video_shows_the_frames_in_order(tmp_path):
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    colors = [[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0], [1.0, 1.0, 1.0]]
    path = write_video(tmp_path / "film.mp4", [flat(color, 33, 47) for color in colors], fps=10)
    assert path == tmp_path / "film.mp4" and os.listdir(tmp_path) == ["film.mp4"]
    reader = imageio_ffmpeg.read_frames(str(path))
    information = next(reader)
    assert information["source_size"] == (48, 34)  # padded to even sides
    assert information["fps"] == 10 and information["codec"] == "h264"
    frames = [np.frombuffer(frame, np.uint8).reshape(34, 48, 3) for frame in reader]
    means = [frame.reshape(-1, 3).mean(axis=0) / 255 for frame in frames]
    np.testing.assert_allclose(means, colors, atol=0.1)


def test_without_ffmpeg_a_gif_is_written_and_said_so(tmp_path, monkeypatch):
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")

    def absent():
        raise RuntimeError("No ffmpeg exe could be found.")

    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", absent)
    with pytest.warns(UserWarning, match="film.gif"):
        path = write_video(tmp_path / "film.mp4", [flat([1.0, 0, 0]), flat([0.0, 0, 1.0])])
    assert os.listdir(tmp_path) == ["film.gif"]
    film = Image.open(path)
    assert film.n_frames == 2
    film.seek(1)
    assert film.convert("RGB").getpixel((0, 0)) == (0, 0, 255)


def test_a_film_cut_short_keeps_the_old_one(tmp_path, limit_file_size):
    pytest.importorskip("imageio_ffmpeg")
    path = tmp_path / "film.mp4"
    path.write_bytes(b"old")
    frames = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    message = "film.mp4: cannot be written .ffmpeg.*; the file that was there is unchanged"
    with limit_file_size(1000), pytest.raises(ExportError, match=message):
        write_video(path, list(frames))
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["film.mp4"]


def test_video_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match="file/film.mp4: cannot be written"):
        write_video(tmp_path / "file" / "film.mp4", [flat([0.0] * 3, 32, 32)])
    with pytest.raises(ValueError, match="film.mp4: found frames of sizes"):
        write_video(tmp_path / "film.mp4", [flat([0.0] * 3), flat([0.0] * 3, 9)])


def test_heat_map_grows_lighter_evenly():
    image = heat_map(torch.linspace(0, 1, 101), high=1.0)
    lightness = (image**2.2) @ torch.tensor([0.2126, 0.7152, 0.0722])
    lightness = lightness ** (1 / 3)  # about as the eye sees it
    steps = lightness.diff()
    assert (steps > 0).all() and steps.max() < 3 * steps.mean()


@pytest.mark.parametrize("log", [False, True])
def test_heat_map_ends_mask_and_bad_values(log):
    ends = heat_map(torch.tensor([0.0, 1.0]), high=1.0, log=log)
    values = torch.tensor([[0.0, 1.0, 50.0], [float("nan"), float("inf"), 0.5]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    image = heat_map(values, mask, high=1.0, log=log)
    assert torch.equal(image[0, 0], ends[0]) and torch.equal(image[0, 1], ends[1]) and torch.equal(image[0, 2], ends[1])
    assert torch.equal(image[1, :2], torch.tensor([[1.0, 0.0, 1.0]]).expand(2, 3))
    assert torch.equal(image[1, 2], torch.ones(3))


def test_heat_map_of_equal_or_no_values_is_finite():
    for values in (torch.zeros(2, 2), torch.full((2, 2), float("nan"))):
        for log in (False, True):
            assert heat_map(values, log=log).isfinite().all()
    assert heat_map(torch.ones(2, 2), torch.zeros(2, 2)).eq(1).all()


def test_heat_map_by_default_reaches_the_largest_but_a_few():
    values = torch.arange(10_000.0).view(100, 100)
    values[0, 0] = 1e30  # one outlier must not make the rest dark
    image = heat_map(values)
    assert torch.equal(image[99, 99], image[0, 0])
    assert image[50, 0].mean() > image[1, 0].mean()
