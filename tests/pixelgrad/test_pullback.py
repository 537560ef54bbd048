"""The split backward pass against plain end-to-end autograd, on a real (tiny, random) diffusers VAE in float64."""

import pytest
import torch
from diffusers import AutoencoderKL

from threestudio_pgc.pixelgrad import pullback, surrogate_loss, views_at_a_time
from threestudio_pgc.pixelgrad.linear_map import (
    PAPER_DECODER,
    PAPER_ENCODER,
    fit_affine,
)


@pytest.fixture(scope="module")
def encode():
    torch.manual_seed(0)
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
    )
    vae = vae.double().eval().requires_grad_(False)
    return lambda image: vae.encode(image.movedim(-1, 1) * 2 - 1).latent_dist.mode()


def make(batch, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(batch, 16, 16, 3, generator=generator, dtype=dtype)
    return image, torch.randn(batch, 4, 8, 8, generator=generator, dtype=dtype)


def test_no_views_give_no_gradient(encode):
    image, gradient = make(0)
    assert pullback(gradient, image, encode).shape == (0, 16, 16, 3)


def test_equals_full_autograd(encode):
    image, gradient = make(3)
    leaf = image.clone().requires_grad_(True)
    (encode(leaf) * gradient).sum().backward()
    torch.testing.assert_close(pullback(gradient, image, encode), leaf.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("views", [1, 2, 3, "auto"])
def test_micro_batches_equal_the_full_batch(encode, views):
    image, gradient = make(5)
    full = pullback(gradient, image, encode, views_per_pullback=5)
    torch.testing.assert_close(pullback(gradient, image, encode, views_per_pullback=views), full, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_half_precision_encoder_neither_underflows_nor_overflows(encode, scale):
    image, gradient = make(2)
    exact = pullback(gradient * scale, image, encode)

    def half(views):  # what a half-precision VAE does to the gradient that enters and leaves it
        return encode(views.half().double()).half()

    rough = pullback(gradient * scale, image.float(), half)
    assert (rough.double() - exact).norm() < 5e-3 * exact.norm()


def test_views_of_very_different_scale_keep_their_own_precision(encode):
    image, gradient = make(2)
    gradient[0] *= 1e-9
    rough = pullback(gradient, image.float(), lambda views: encode(views.double()).half())
    exact = pullback(gradient, image, encode)
    for mine, want in zip(rough.double(), exact):
        assert (mine - want).norm() < 5e-3 * want.norm()


def test_a_nonfinite_latent_entry_does_not_spread(encode):
    image, gradient = make(2)
    clean = gradient.clone()
    clean[0, 1, 2, 3] = 0
    gradient[0, 1, 2, 3] = float("nan")
    assert torch.equal(pullback(gradient, image, encode), pullback(clean, image, encode))


def test_the_images_own_graph_is_left_alone(encode):
    image, gradient = make(1)
    parameter = torch.zeros((), dtype=torch.float64, requires_grad=True)
    pullback(gradient, image + parameter, encode)
    assert parameter.grad is None


def test_auto_takes_one_sdxl_view_or_many_small_ones():
    assert views_at_a_time("auto", torch.empty(4, 1024, 1024, 3, device="meta")) == 1
    assert views_at_a_time("auto", torch.empty(4, 2048, 2048, 3, device="meta")) == 1
    assert views_at_a_time("auto", torch.empty(4, 128, 128, 3, device="meta")) == 64


@pytest.mark.parametrize("views", [0, -1, 1.5, True, "all"])
def test_a_wrong_number_of_views_is_refused(encode, views):
    image, gradient = make(1)
    with pytest.raises(ValueError, match="pgc.views_per_pullback"):
        pullback(gradient, image, encode, views_per_pullback=views)


def test_a_latent_gradient_of_another_shape_is_refused(encode):
    image, gradient = make(1)
    with pytest.raises(ValueError, match="latents of shape"):
        pullback(gradient[..., :4], image, encode)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_surrogate_gradient_is_exactly_the_one_given(dtype):
    image = torch.rand(2, 4, 4, 3).to(dtype).requires_grad_(True)
    gradient = torch.randn(2, 4, 4, 3) * 1e-3
    surrogate_loss(image, gradient).backward()
    assert torch.equal(image.grad, gradient.to(dtype))


def test_surrogate_value_is_half_the_squared_gradient_and_never_infinite():
    image = torch.rand(1, 2, 2, 3, requires_grad=True)
    gradient = torch.randn(1, 2, 2, 3)
    torch.testing.assert_close(surrogate_loss(image, gradient), 0.5 * gradient.square().sum())
    assert torch.isfinite(surrogate_loss(image, gradient * 1e30))


def test_surrogate_refuses_shapes_that_would_broadcast():
    with pytest.raises(ValueError, match="wanted equal shapes"):
        surrogate_loss(torch.rand(2, 4, 4, 3, requires_grad=True), torch.rand(1, 4, 4, 3))


def test_linear_pullback_is_the_transpose_of_the_linear_map():
    image, gradient = make(2)
    encode = lambda views: PAPER_ENCODER.encode(views, 8)  # noqa: E731
    step = torch.randn_like(image)
    forward = encode(image + step) - encode(image)
    torch.testing.assert_close((forward * gradient).sum(), (step * pullback(gradient, image, encode)).sum())


def test_the_papers_maps_are_inverse_for_mid_grey():
    grey = torch.full((1, 4, 4, 3), 0.5)
    latent = PAPER_ENCODER.encode(grey, 4)[0, :, 0, 0]
    torch.testing.assert_close(PAPER_DECODER.weight @ latent + PAPER_DECODER.bias, torch.full((3,), 0.5), atol=0.035, rtol=0)


def test_ridge_fit_recovers_a_known_affine_map():
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(4, 3, generator=generator), torch.randn(4, generator=generator)
    inputs = torch.rand(500, 3, generator=generator)
    fitted_weight, fitted_bias = fit_affine(inputs, inputs @ weight.T + bias, ridge=1e-9)
    torch.testing.assert_close(fitted_weight, weight, atol=1e-5, rtol=0)
    torch.testing.assert_close(fitted_bias, bias, atol=1e-5, rtol=0)


def test_ridge_fit_refuses_fewer_samples_than_unknowns():
    with pytest.raises(ValueError, match="found 3 samples, wanted at least 4"):
        fit_affine(torch.rand(3, 3), torch.rand(3, 4))
