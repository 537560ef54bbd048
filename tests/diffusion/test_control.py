import torch

from threestudio_pgc.diffusion.control import FAR_END, depth_control


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
