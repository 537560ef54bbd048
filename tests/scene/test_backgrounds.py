import numpy as np
import pytest
import torch
from PIL import Image

from threestudio_pgc.scene.backgrounds import BACKGROUNDS, ImageBackground, RandomBackground, SolidBackground


@pytest.fixture
def picture(tmp_path):
    """8x4 picture: left half red, right half blue, top row white."""
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, :4, 0] = 255
    pixels[:, 4:, 2] = 255
    pixels[0] = 255
    path = tmp_path / "a picture.png"
    Image.fromarray(pixels).save(path)
    return path


def test_no_views_and_every_name(picture):
    for name, background in BACKGROUNDS.items():
        made = background(picture) if name == "image" else background()
        assert made(0, 5, 7).shape == (0, 5, 7, 3)
        assert made(2, 5, 7).shape == (2, 5, 7, 3)


def test_solid_is_the_color_everywhere():
    image = SolidBackground((0.1, 0.2, 0.3))(2, 3, 4)
    assert torch.equal(image, torch.tensor([0.1, 0.2, 0.3]).repeat(2, 3, 4, 1))


@pytest.mark.parametrize("color", [(0, 0), (0, 0, 2), (0, -1, 0), (float("nan"), 0, 0)])
def test_a_bad_color_is_refused(color):
    with pytest.raises(ValueError, match="background color: found"):
        SolidBackground(color)


def test_random_is_flat_in_each_view_differs_between_views_and_follows_the_generator():
    image = RandomBackground()(3, 4, 5, generator=torch.Generator().manual_seed(3))
    assert torch.equal(image, image[:, :1, :1].expand_as(image))
    assert (image[0] != image[1]).any() and (image[1] != image[2]).any()
    assert torch.equal(image, RandomBackground()(3, 4, 5, generator=torch.Generator().manual_seed(3)))
    assert not torch.equal(image, RandomBackground()(3, 4, 5, generator=torch.Generator().manual_seed(4)))


def test_random_draws_from_the_whole_range():
    colors = RandomBackground()(2000, 1, 1, generator=torch.Generator().manual_seed(0))
    assert 0 <= colors.min() < 0.01 and 0.99 < colors.max() <= 1
    assert abs(colors.mean() - 0.5) < 0.02


def test_image_is_kept_at_its_own_size_the_right_way_round(picture):
    image = ImageBackground(picture)(2, 4, 8)
    torch.testing.assert_close(image[0, 0], torch.ones(8, 3))
    torch.testing.assert_close(image[1, 2, 0], torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(image[1, 2, 7], torch.tensor([0.0, 0.0, 1.0]))


def test_image_is_resized(picture):
    image = ImageBackground(picture)(1, 16, 16)
    torch.testing.assert_close(image[0, 15, 0], torch.tensor([1.0, 0.0, 0.0]))
    assert image.min() >= 0 and image.max() <= 1


def test_a_missing_or_unreadable_image_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere.png"):
        ImageBackground(tmp_path / "nowhere.png")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    with pytest.raises(ValueError, match="broken.png cannot be read"):
        ImageBackground(broken)
    broken.write_bytes(b"")
    with pytest.raises(ValueError, match="broken.png cannot be read"):
        ImageBackground(broken)
