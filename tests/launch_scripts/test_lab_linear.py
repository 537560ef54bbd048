"""The ridge fit between image and latent on a prior whose VAE is known, and its bad input."""

import pytest
import torch
from PIL import Image

from launch_scripts.lab.linear import fit_linear_maps, picture_files, psnr, r_squared, require_pictures, save_linear_maps
from launch_scripts.lab.renders import textured_renders
from launch_scripts.lab.teacher import ArgumentError
from threestudio_pgc.pixelgrad.linear_map import LinearMap, load_linear_map, shrink


class AffinePrior:
    """A prior whose VAE is an affine map with an affine inverse; only what the fit asks for."""

    latent_channels, latent_size, device = 5, 8, torch.device("cpu")

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.map = LinearMap(torch.randn(5, 3, generator=generator), torch.randn(5, generator=generator))

    def encode(self, image):
        return self.map(shrink(image, 8))

    def decode(self, latents):
        inverse = torch.linalg.pinv(self.map.weight)
        pixels = torch.einsum("ck,bkhw->bchw", inverse, latents - self.map.bias.view(1, -1, 1, 1))
        return torch.nn.functional.interpolate(pixels, scale_factor=4).movedim(1, -1)


def test_too_few_pictures_are_refused():
    for count, channels in ((0, None), (3, None), (5, 8), (8, 8)):
        with pytest.raises(ArgumentError, match=f"--images: found {count} pictures, wanted at least"):
            require_pictures(count, channels)
    require_pictures(9, 8)


def test_a_known_map_is_recovered_both_ways():
    prior, images = AffinePrior(), torch.rand(40, 32, 32, 3, generator=torch.Generator().manual_seed(1))
    ticks = []
    fit = fit_linear_maps(images, prior, ridge=1e-9, tick=ticks.append)
    torch.testing.assert_close(fit.encoder.weight, prior.map.weight, atol=1e-5, rtol=0)
    torch.testing.assert_close(fit.encoder.bias, prior.map.bias, atol=1e-5, rtol=0)
    assert min(fit.r2_encoder) > 1 - 1e-6 and min(fit.r2_decoder) > 1 - 1e-4 and fit.psnr_decoder > 50
    assert (fit.fitted_on, fit.measured_on) == (32, 8) and sum(ticks) == 40


def test_the_fit_is_measured_on_pictures_it_did_not_see():
    prior, images = AffinePrior(), torch.rand(20, 32, 32, 3)
    other = images.clone()
    other[4::5] = torch.rand(4, 32, 32, 3)
    one, two = fit_linear_maps(images, prior), fit_linear_maps(other, prior)
    assert torch.equal(one.encoder.weight, two.encoder.weight) and one.psnr_decoder != two.psnr_decoder


def test_measures():
    assert psnr(torch.zeros(4), torch.full((4,), 0.1)) == pytest.approx(20.0, abs=1e-4)
    wanted = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    assert r_squared(wanted, wanted) == [1.0, 0.0] and r_squared(torch.full((2, 2), 0.5), wanted)[0] == pytest.approx(0.0)


def test_saved_as_the_guidance_reads_it(tmp_path):
    fit = fit_linear_maps(torch.rand(20, 32, 32, 3), AffinePrior())
    found = load_linear_map(save_linear_maps(tmp_path / "map.safetensors", fit, "a prior"))
    assert torch.equal(found.weight, fit.encoder.weight)


def test_pictures_of_a_folder(tmp_path):
    with pytest.raises(ArgumentError, match="--images: no folder"):
        picture_files(tmp_path / "nowhere")
    (tmp_path / "b").mkdir()
    for name in ("z.png", "b/a.JPG"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    assert [path.name for path in picture_files(tmp_path)] == ["a.JPG", "z.png"]


def test_renders_are_a_function_of_the_seed_and_fill_the_range():
    one, two = textured_renders(3, 48, seed=1), textured_renders(3, 48, seed=1)
    assert one.shape == (3, 48, 48, 3) and torch.equal(one, two) and not torch.equal(one, textured_renders(3, 48, seed=2))
    assert one.min() >= 0 and one.max() <= 1 and one.std() > 0.05
