import pytest
import torch

from threestudio_pgc.diffusion.control import (
    CONTROL_KINDS,
    FAR_END,
    NORMAL_CONVENTIONS,
    control_kind_of,
    depth_control,
    known_normal_convention,
    make_control,
    normal_control,
)

CONVENTIONS = list(NORMAL_CONVENTIONS)
EVERY_CONVENTION = pytest.mark.parametrize("convention", CONVENTIONS)
FACING, RIGHT, UP = (0.0, 0.0, 1.0), (0.6, 0.0, 0.8), (0.0, 0.6, 0.8)


def scene(distances):
    """One view per entry: a 4x4 picture whose inner 2x2 pixels are the object at these four distances."""
    depth = torch.zeros(len(distances), 4, 4, 1)
    for view, values in enumerate(distances):
        depth[view, 1:3, 1:3, 0] = torch.tensor(values).view(2, 2)
    return depth, (depth > 0).float()


def test_an_empty_view_is_all_background():
    control = depth_control(torch.zeros(1, 4, 4, 1), torch.zeros(1, 4, 4, 1))
    assert control.shape == (1, 4, 4, 3)
    assert not control.any()


def test_near_is_bright_and_the_background_darkest():
    depth, opacity = scene([[1.5, 2.0, 2.5, 3.5]])
    control = depth_control(depth, opacity)
    torch.testing.assert_close(control[0, 1:3, 1:3, 0].flatten(), torch.tensor([1.0, 0.8, 0.6, FAR_END]))
    assert not control[opacity.expand(-1, -1, -1, 3) == 0].any()
    assert torch.equal(control[..., :1].expand_as(control), control)


def test_a_flat_object_is_near():
    control = depth_control(*scene([[2.0, 2.0, 2.0, 2.0]]))
    assert torch.equal(control[0, 1:3, 1:3], torch.ones(2, 2, 3))
    assert control.sum() == 12


def test_views_do_not_change_each_other():
    views = [[1.0, 2.0, 2.5, 3.0], [0.1, 50.0, 9.0, 7.0]]
    together = depth_control(*scene(views))
    for index, view in enumerate(views):
        assert torch.equal(together[index], depth_control(*scene([view]))[0])


def test_what_lies_outside_the_object_is_not_read():
    depth, opacity = scene([[1.0, 2.0, 2.5, 3.0]])
    expected = depth_control(depth, opacity)
    for rubbish in (1000.0, 1e-3, float("nan"), float("inf")):
        assert torch.equal(depth_control(torch.where(opacity > 0, depth, torch.tensor(rubbish)), opacity), expected)


def test_a_partly_covered_pixel_without_depth_is_background():
    depth, opacity = scene([[1.0, 2.0, 2.5, 3.0]])
    expected = depth_control(depth, opacity)
    opacity[0, 0, 1] = 0.75  # the smooth edge of the mask, whose centre the rasteriser missed
    opacity[0, 3, 1] = 0.25
    assert torch.equal(depth_control(depth, opacity), expected)


def test_no_graph_is_kept():
    depth, opacity = scene([[1.0, 2.0, 2.5, 3.0]])
    assert not depth_control(depth.requires_grad_(), opacity.requires_grad_()).requires_grad


def facing(*normals):
    """One view per normal: a 4x4 picture whose inner 2x2 pixels have it."""
    view_normal = torch.zeros(len(normals), 4, 4, 3, dtype=torch.float64)
    for view, normal in enumerate(normals):
        view_normal[view, 1:3, 1:3] = torch.tensor(normal, dtype=torch.float64)
    return view_normal, (view_normal.norm(dim=-1, keepdim=True) > 0).double()


def color_of(normal, convention):
    control = normal_control(*facing(normal), convention)
    assert (control[0, 1:3, 1:3] == control[0, 1, 1]).all()
    return control[0, 1, 1].tolist()


@EVERY_CONVENTION
def test_an_empty_view_has_the_background_colour(convention):
    control = normal_control(*facing((0.0, 0.0, 0.0)), convention)
    background = torch.tensor(NORMAL_CONVENTIONS[convention].background, dtype=torch.float64)
    assert control.shape == (1, 4, 4, 3) and torch.equal(control, background.expand(1, 4, 4, 3))


@EVERY_CONVENTION
def test_a_batch_of_no_views_is_no_picture(convention):
    assert normal_control(torch.zeros(0, 4, 4, 3), torch.zeros(0, 4, 4, 1), convention).shape == (0, 4, 4, 3)


@EVERY_CONVENTION
def test_a_surface_that_faces_the_viewer_is_bluish(convention):
    assert color_of(FACING, convention) == [0.5, 0.5, 1.0]


@pytest.mark.parametrize("convention,red", [("opengl", 0.8), ("normalbae", 0.2), ("midas", 0.2)])
def test_red_tells_right_from_left(convention, red):
    assert color_of(RIGHT, convention) == pytest.approx([red, 0.5, 0.9])
    assert color_of((-0.6, 0.0, 0.8), convention) == pytest.approx([1 - red, 0.5, 0.9])


@EVERY_CONVENTION
def test_green_is_up(convention):
    assert color_of(UP, convention) == pytest.approx([0.5, 0.8, 0.9])
    assert color_of((0.0, -0.6, 0.8), convention) == pytest.approx([0.5, 0.2, 0.9])


@EVERY_CONVENTION
def test_midas_colours_are_the_slopes_of_nearness(convention):
    """The formula the net was trained with, on a height field whose true normal is (-dz/dx, -dz/dy, 1); a unit slope scale."""
    column, row = torch.meshgrid(torch.arange(5.0), torch.arange(5.0), indexing="xy")
    nearness = 0.3 * column + 0.7 * row  # nearer towards the right and, rows growing downwards, towards the bottom
    by_column, by_row = (nearness[1:-1, 2:] - nearness[1:-1, :-2]) / 2, (nearness[2:, 1:-1] - nearness[:-2, 1:-1]) / 2
    trained = torch.nn.functional.normalize(torch.stack([by_column, by_row, torch.ones(3, 3)], dim=-1), dim=-1)
    true = torch.tensor([-0.3, 0.7, 1.0]).expand(1, 3, 3, 3)  # y is up, so dz/dy = -dz/drow
    agrees = torch.allclose(normal_control(true, torch.ones(1, 3, 3, 1), convention), 0.5 + 0.5 * trained, atol=1e-6)
    assert agrees == (convention in ("midas", "normalbae"))


@EVERY_CONVENTION
def test_normals_are_made_unit(convention):
    for length in (1e-6, 0.3, 40.0):
        assert color_of([length * value for value in RIGHT], convention) == pytest.approx(color_of(RIGHT, convention))


@EVERY_CONVENTION
def test_a_silhouette_pixel_is_one_thing_or_the_other(convention):
    view_normal, opacity = facing(RIGHT)
    expected = normal_control(view_normal, opacity, convention)
    opacity[0, 1, 1], opacity[0, 0, 0] = 0.51, 0.49
    assert torch.equal(normal_control(view_normal, opacity, convention), expected)
    opacity[0, 1, 1] = 0.5
    assert torch.equal(normal_control(view_normal, opacity, convention)[0, 1, 1], expected[0, 0, 0])


@EVERY_CONVENTION
def test_a_normal_outside_of_the_object_is_not_read(convention):
    view_normal, opacity = facing(UP)
    expected = normal_control(view_normal, opacity, convention)
    for rubbish in (1000.0, float("nan"), float("inf")):
        spoilt = torch.where(opacity > 0, view_normal, torch.tensor(rubbish, dtype=torch.float64))
        assert torch.equal(normal_control(spoilt, opacity, convention), expected)


@EVERY_CONVENTION
@pytest.mark.parametrize("normal", [(0.0, 0.0, 0.0), (float("nan"), 0.0, 1.0), (float("inf"), 0.0, 1.0)])
def test_a_pixel_without_a_direction_is_background(convention, normal):
    view_normal, opacity = facing(FACING)
    view_normal[0, 1, 1] = torch.tensor(normal, dtype=torch.float64)
    background = torch.tensor(NORMAL_CONVENTIONS[convention].background, dtype=torch.float64)
    assert torch.equal(normal_control(view_normal, opacity, convention)[0, 1, 1], background)


def test_normal_controls_of_views_do_not_change_each_other():
    together = normal_control(*facing(RIGHT, (0.0, 0.0, 0.0), UP), "normalbae")
    for view, normal in enumerate((RIGHT, (0.0, 0.0, 0.0), UP)):
        assert torch.equal(together[view], normal_control(*facing(normal), "normalbae")[0])


def test_no_graph_of_the_normals_is_kept():
    view_normal, opacity = facing(RIGHT)
    assert not normal_control(view_normal.requires_grad_(), opacity.requires_grad_(), "opengl").requires_grad


def test_an_unknown_convention_is_refused_by_name():
    with pytest.raises(ValueError, match="normal_convention: found 'directx', wanted one of opengl, normalbae, midas"):
        normal_control(*facing(FACING), "directx")


def test_every_convention_says_what_it_is_and_where_that_is_known_from():
    assert "right" in NORMAL_CONVENTIONS["opengl"].facts
    for name in ("normalbae", "midas"):
        assert "faces left" in NORMAL_CONVENTIONS[name].facts and "https://" in NORMAL_CONVENTIONS[name].facts


def buffers():
    view_normal, opacity = facing(RIGHT, UP)
    return {"depth": opacity * torch.linspace(1, 2, 16).view(1, 4, 4, 1), "opacity": opacity, "view_normal": view_normal}


def test_one_door_leads_to_every_kind():
    given = buffers()
    assert torch.equal(make_control("depth", given), depth_control(given["depth"], given["opacity"]))
    for name in CONVENTIONS:
        wanted = normal_control(given["view_normal"], given["opacity"], name)
        assert torch.equal(make_control("normal", given, normal_convention=name), wanted)


@pytest.mark.parametrize("kind", ["", "canny", "Depth"])
def test_an_unknown_kind_is_refused_by_name(kind):
    with pytest.raises(ValueError, match=f"control kind: found '{kind}', wanted one of depth, normal"):
        make_control(kind, buffers())


@pytest.mark.parametrize("kind,name", [(kind, name) for kind, names in CONTROL_KINDS.items() for name in names])
def test_a_missing_buffer_is_refused_by_name(kind, name):
    rest = {key: value for key, value in buffers().items() if key != name}
    for given in (rest, rest | {name: None}):
        with pytest.raises(ValueError, match=f"control kind '{kind}': found the buffers {', '.join(rest)}, wanted {name} too"):
            make_control(kind, given)
    with pytest.raises(ValueError, match=f"control kind '{kind}': found the buffers none, wanted"):
        make_control(kind, {})


@pytest.mark.parametrize("kind", CONTROL_KINDS)
def test_a_kind_needs_no_more_than_its_buffers(kind):
    given = buffers()
    needed = {name: given[name] for name in CONTROL_KINDS[kind]}
    assert torch.equal(make_control(kind, needed), make_control(kind, given))


@pytest.mark.parametrize(
    "controlnet,convention",
    [
        ("lllyasviel/control_v11p_sd15_normalbae", "normalbae"),
        ("models/control_v11p_sd15_normalbae/", "normalbae"),
        ("thibaud/controlnet-sd21-normalbae-diffusers", "normalbae"),
        ("lllyasviel/sd-controlnet-normal", "midas"),
        ("fusing/stable-diffusion-v1-5-controlnet-normal", "midas"),
        ("models/sd-controlnet-normal", "midas"),
        ("someone/sdxl-controlnet-normal", "opengl"),
        ("lllyasviel/sd-controlnet-normal/my-own", "opengl"),
        ("", "opengl"),
    ],
)
def test_published_normal_nets_are_known_by_name(controlnet, convention):
    assert known_normal_convention(controlnet) == convention


@pytest.mark.parametrize(
    "controlnet,kind",
    [
        ("lllyasviel/control_v11f1p_sd15_depth", "depth"),
        ("diffusers/controlnet-depth-sdxl-1.0", "depth"),
        ("builtin:pocket-controlnet-depth", "depth"),
        ("models/Depth/", "depth"),
        ("lllyasviel/control_v11p_sd15_normalbae", "normal"),
        ("fusing/stable-diffusion-v1-5-controlnet-normal", "normal"),
        ("lllyasviel/sd-controlnet-canny", None),
        ("depth/my-net", None),
        ("someone/depth-and-normal", None),
        ("", None),
    ],
)
def test_a_kind_is_guessed_where_the_name_speaks_of_one(controlnet, kind):
    assert control_kind_of(controlnet) == kind
