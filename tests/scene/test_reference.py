import pytest
import torch
import torch.nn.functional as F

from threestudio_pgc.scene.reference import LOSSES, reference_losses

SIZE = 6
BUFFERS = {"rgb": "comp_rgb", "mask": "opacity", "depth": "depth", "normal": "view_normal"}


def random(*shape, seed):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def case():
    """(rendered, reference) of two views; the rendered object covers columns 1 to 4, the reference's 2 to 5."""
    shape = (2, SIZE, SIZE)
    rendered = {
        "comp_rgb": random(*shape, 3, seed=0),
        "opacity": torch.zeros(*shape, 1, dtype=torch.float64),
        "depth": 2 + random(*shape, 1, seed=1),
        "view_normal": F.normalize(random(*shape, 3, seed=2) - 0.5, dim=-1),
    }
    rendered["opacity"][:, :, 1:5] = 0.9
    reference = {
        "rgb": random(*shape, 3, seed=3),
        "mask": torch.zeros(*shape, 1, dtype=torch.float64),
        "depth": random(*shape, 1, seed=4),
        "normal": F.normalize(random(*shape, 3, seed=5) - 0.5, dim=-1),
    }
    reference["mask"][:, :, 2:] = 0.8
    return rendered, reference


def loss(name, rendered, reference):
    return reference_losses(rendered, reference, {name: 1.0})[name]


def test_nothing_is_computed_where_nothing_is_wanted(case):
    assert reference_losses(*case, {}) == {}
    assert reference_losses({}, {}, dict.fromkeys(LOSSES, 0.0)) == {}


@pytest.mark.parametrize("name", LOSSES)
def test_only_what_is_wanted_is_computed_and_weights_are_left_to_the_caller(case, name):
    losses = reference_losses(*case, {name: 1.0})
    assert list(losses) == [name] and losses[name].shape == ()
    assert torch.equal(losses[name], reference_losses(*case, {name: 7.0, **dict.fromkeys(set(LOSSES) - {name}, 0)})[name])


@pytest.mark.parametrize("name", ["depth", "normal"])
@pytest.mark.parametrize("opacity, mask", [(0.0, 1.0), (1.0, 0.0)])
def test_an_object_that_is_not_in_the_picture_has_no_depth_and_no_normals_to_compare(case, name, opacity, mask):
    rendered, reference = case
    buffer = rendered[BUFFERS[name]].requires_grad_()
    rendered["opacity"], reference["mask"] = rendered["opacity"] * 0 + opacity, reference["mask"] * 0 + mask
    value = loss(name, rendered, reference)
    assert value.item() == 0
    assert not torch.autograd.grad(value, buffer)[0].any()


def test_rgb_is_the_mean_over_all_pixels_of_the_squares_where_both_are(case):
    rendered, reference = case
    total = 0.0
    for index in torch.cartesian_prod(*map(torch.arange, (2, SIZE, SIZE, 3))).tolist():
        b, y, x, c = index
        weight = reference["mask"][b, y, x, 0].item() * rendered["opacity"][b, y, x, 0].item()
        total += weight * (rendered["comp_rgb"][b, y, x, c] - reference["rgb"][b, y, x, c]).item() ** 2
    assert loss("rgb", *case).item() == pytest.approx(total / (2 * SIZE * SIZE * 3))


def test_mask_is_the_mean_square_of_the_silhouettes_difference(case):
    """Columns 2 to 4 differ by 0.1, column 1 by 0.9, column 5 by 0.8, column 0 by nothing."""
    assert loss("mask", *case).item() == pytest.approx((3 * 0.01 + 0.81 + 0.64) / 6)


def test_depth_is_one_minus_the_correlation_where_both_are(case):
    rendered, reference = case
    expected = []
    for view in range(2):
        pair = torch.stack([rendered["depth"][view, :, 2:5].flatten(), reference["depth"][view, :, 2:5].flatten()])
        expected.append(1 - torch.corrcoef(pair)[0, 1])
    torch.testing.assert_close(loss("depth", *case), torch.stack(expected).mean(), rtol=1e-10, atol=0)


def test_depth_is_blind_to_scale_and_shift_but_not_to_its_sign(case):
    rendered, reference = case
    reference["depth"] = 0.3 * rendered["depth"] - 0.4
    assert loss("depth", rendered, reference).item() == pytest.approx(0, abs=1e-12)
    reference["depth"] = -reference["depth"]
    assert loss("depth", rendered, reference).item() == pytest.approx(2)


@pytest.mark.parametrize("flat", ["rendered", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_flat_depth_counts_as_nothing_and_leaves_the_other_view_alone(case, flat, dtype):
    rendered, reference = ({key: value.to(dtype) for key, value in part.items()} for part in case)
    alone = loss("depth", {k: v[1:] for k, v in rendered.items()}, {k: v[1:] for k, v in reference.items()})
    {"rendered": rendered, "reference": reference}[flat]["depth"][0] = 1.1
    depth = rendered["depth"].requires_grad_()
    value = loss("depth", rendered, reference)
    torch.testing.assert_close(value, alone / 2)
    gradient = torch.autograd.grad(value, depth)[0]
    assert gradient.isfinite().all() and not gradient[0].any() and gradient[1].any()


def test_normal_is_one_minus_the_cosine_where_both_are(case):
    rendered, reference = case
    cosine = (rendered["view_normal"] * reference["normal"]).sum(dim=-1)[:, :, 2:5]
    torch.testing.assert_close(loss("normal", *case), (1 - cosine).mean(), rtol=1e-10, atol=0)
    reference["normal"] = rendered["view_normal"]
    assert loss("normal", rendered, reference).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_right_and_reach_only_what_is_compared(case, name):
    rendered, reference = case
    buffer = rendered[BUFFERS[name]].requires_grad_()

    def of(values):
        return loss(name, {**rendered, BUFFERS[name]: values}, reference)

    assert torch.autograd.gradcheck(of, buffer)
    reached = torch.autograd.grad(of(buffer), buffer)[0].abs().amax(dim=(0, 1, 3)) > 0
    columns = {"rgb": range(2, 5), "mask": range(1, 6), "depth": range(2, 5), "normal": range(2, 5)}[name]
    assert reached.nonzero().squeeze(-1).tolist() == list(columns)


@pytest.mark.parametrize("name", LOSSES)
def test_a_wanted_loss_without_its_reference_is_refused(case, name):
    rendered, reference = case
    del reference[name]
    with pytest.raises(ValueError, match=f"reference loss {name}: its weight is 2.0, but the reference view has no '{name}'"):
        reference_losses(rendered, reference, {name: 2.0})


def test_other_misuse_is_refused(case):
    rendered, reference = case
    with pytest.raises(ValueError, match="found 'colour', wanted one of rgb, mask, depth, normal"):
        reference_losses(rendered, reference, {"colour": 1.0})
    with pytest.raises(ValueError, match="reference loss rgb: found the weight -1.0, wanted at least 0"):
        reference_losses(rendered, reference, {"rgb": -1.0})
    reference["rgb"] = reference["rgb"][:, :3]
    with pytest.raises(ValueError, match="found a reference 'rgb' of \\(B, H, W\\) \\(2, 3, 6\\), wanted \\(2, 6, 6\\) as rendered"):
        reference_losses(rendered, reference, {"rgb": 1.0})
