"""Cameras: right-handed, not mirrored, where the conventions say, within their ranges."""

import math

import pytest
import torch

from threestudio_pgc.scene.cameras import CameraRanges, fovy_from_focal, look_at_cameras, orbit_cameras, sample_cameras


def pixel(cameras, point: list[float]) -> torch.Tensor:
    """(B, 2): x to the right and y down, both from -1 to 1, of a world point."""
    clip = cameras.clip(torch.tensor([point]))[:, 0]
    return clip[:, :2] / clip[:, 3:]


def test_no_cameras():
    for cameras in (orbit_cameras(0), sample_cameras(0)):
        assert len(cameras) == 0 and cameras.mvp.shape == (0, 4, 4) and cameras.positions.shape == (0, 3)
        assert cameras.clip(torch.zeros(5, 3)).shape == (0, 5, 4)


@pytest.mark.parametrize("distance, fovy", [(0.0, 1.0), (-1.0, 1.0), (2.0, 0.0), (2.0, 3.2), (float("nan"), 1.0)])
def test_impossible_cameras_are_refused(distance, fovy):
    with pytest.raises(ValueError, match="want distance > 0 and 0 < fovy < pi"):
        look_at_cameras(0, 0, distance, fovy)


def test_camera_to_world_is_a_rotation_of_determinant_one():
    cameras = sample_cameras(64, CameraRanges(elevation_deg=(-90, 90)), torch.Generator().manual_seed(0))
    rotation = cameras.c2w[:, :3, :3].double()
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(64, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(rotation @ rotation.transpose(1, 2), torch.eye(3).double().expand(64, 3, 3), rtol=0, atol=1e-6)
    assert torch.equal(cameras.c2w[:, :3, 3], cameras.positions)
    assert (torch.linalg.det(cameras.proj.double()) > 0).all()  # flips y and z: two reflections


@pytest.mark.parametrize(
    "elevation, azimuth, expected",
    [(0, 0, [2, 0, 0]), (0, 90, [0, 2, 0]), (0, 180, [-2, 0, 0]), (0, -90, [0, -2, 0]), (90, 0, [0, 0, 2]), (-90, 0, [0, 0, -2])],
)
def test_positions(elevation, azimuth, expected):
    camera = look_at_cameras(elevation, azimuth, 2.0, 1.0)
    torch.testing.assert_close(camera.positions[0], torch.tensor(expected, dtype=torch.float32), rtol=0, atol=1e-6)
    # it looks at the origin
    torch.testing.assert_close(-camera.c2w[0, :3, 2] * 2, -camera.positions[0], rtol=0, atol=1e-6)
    assert pixel(camera, [0, 0, 0]).abs().max() < 1e-6


def test_front_view_is_not_mirrored():
    """From +x: +y is to the right, +z is up (row 0 is y/w = -1, the top), and what is nearer is larger and has a smaller z/w."""
    camera = look_at_cameras(0, 0, 2.0, 1.0)
    assert pixel(camera, [0, 0.5, 0])[0, 0] > 0.1 and pixel(camera, [0, 0.5, 0])[0, 1].abs() < 1e-6
    assert pixel(camera, [0, 0, 0.5])[0, 1] < -0.1 and pixel(camera, [0, 0, 0.5])[0, 0].abs() < 1e-6
    assert pixel(camera, [0.5, 0.5, 0])[0, 0] > pixel(camera, [-0.5, 0.5, 0])[0, 0]
    near, far = camera.clip(torch.tensor([[0.5, 0, 0], [-0.5, 0, 0]]))[0]
    assert near[3] == pytest.approx(1.5) and far[3] == pytest.approx(2.5)
    assert -1 < near[2] / near[3] < far[2] / far[3] < 1


def test_view_from_above_keeps_the_azimuth_as_its_bottom():
    camera = look_at_cameras(90, 0, 2.0, 1.0)
    assert pixel(camera, [0.5, 0, 0])[0, 1] > 0.1 and pixel(camera, [0, 0.5, 0])[0, 0] > 0.1


def test_clip_is_projection_of_view():
    cameras = sample_cameras(5, generator=torch.Generator().manual_seed(1))
    points = torch.rand(7, 3, dtype=torch.float64) - 0.5
    view = torch.linalg.inv(cameras.c2w.double()) @ torch.cat([points, torch.ones(7, 1)], dim=1).T
    torch.testing.assert_close(cameras.clip(points), (cameras.proj.double() @ view).transpose(1, 2), rtol=0, atol=1e-5)
    assert cameras.clip(points).dtype == torch.float64


def test_focal_is_in_image_heights():
    assert fovy_from_focal(0.5) == pytest.approx(math.pi / 2)
    torch.testing.assert_close(fovy_from_focal(torch.tensor([0.5, 1.0])), torch.tensor([math.pi / 2, 2 * math.atan(0.5)]))
    # an object of height 1 at distance f fills the picture
    camera = look_at_cameras(0, 0, 1.35, fovy_from_focal(1.35))
    assert pixel(camera, [0, 0, 0.5])[0, 1] == pytest.approx(-1) and pixel(camera, [0, 0, -0.5])[0, 1] == pytest.approx(1)
    wide = look_at_cameras(0, 0, 1.35, fovy_from_focal(1.35), aspect=2.0)
    assert pixel(wide, [0, 1.0, 0])[0, 0] == pytest.approx(1)


def test_samples_lie_in_the_papers_ranges_and_fill_them():
    ranges = CameraRanges()
    cameras = sample_cameras(2000, ranges, torch.Generator().manual_seed(2))
    drawn = {
        "focal": 0.5 / torch.tan(cameras.fovy / 2),
        "distance": cameras.positions.norm(dim=-1),
        "elevation_deg": torch.rad2deg(torch.asin(cameras.positions[:, 2] / cameras.distance)),
        "azimuth_deg": cameras.azimuth_deg,
    }
    for name, values in drawn.items():
        low, high = getattr(ranges, name)
        slack = 1e-4 * (high - low)
        assert low - slack <= values.min() < low + 0.01 * (high - low), name
        assert high + slack >= values.max() > high - 0.01 * (high - low), name
        assert values.mean() == pytest.approx((low + high) / 2, abs=0.03 * (high - low)), name
    assert (ranges.focal, ranges.distance, ranges.elevation_deg, ranges.azimuth_deg) == ((0.7, 1.35), (2, 2.5), (-10, 45), (0, 360))


def test_every_view_draws_for_itself_and_views_are_spread():
    for seed in range(20):
        cameras = sample_cameras(4, generator=torch.Generator().manual_seed(seed))
        assert all(len(set(values.tolist())) == 4 for values in (cameras.fovy, cameras.distance, cameras.elevation_deg))
        assert (cameras.azimuth_deg // 90).tolist() == [0, 1, 2, 3]
    free = [sample_cameras(4, generator=torch.Generator().manual_seed(s), stratified_azimuth=False) for s in range(20)]
    assert any(sorted((cameras.azimuth_deg // 90).tolist()) != [0, 1, 2, 3] for cameras in free)


def test_same_seed_same_cameras():
    first, second = (sample_cameras(3, generator=torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first.mvp, second.mvp)
    assert not torch.equal(first.mvp, sample_cameras(3, generator=torch.Generator().manual_seed(5)).mvp)


def test_orbit_starts_in_front_and_goes_round_once():
    cameras = orbit_cameras(8, elevation_deg=30, distance=2.0, focal=1.0)
    assert cameras.azimuth_deg.tolist() == [45.0 * i for i in range(8)]
    assert (cameras.positions[:, 2] - 1.0).abs().max() < 1e-6
    assert cameras.fovy.tolist() == pytest.approx([fovy_from_focal(1.0)] * 8)


def test_subsets_stay_batched():
    cameras = orbit_cameras(5)
    assert len(cameras[1:3]) == 2 and torch.equal(cameras[1:3].mvp, cameras.mvp[1:3])
    for index in (0, 4, -1):
        assert len(cameras[index]) == 1 and torch.equal(cameras[index].c2w[0], cameras.c2w[index])
    assert torch.equal(cameras[torch.tensor([4, 0])].azimuth_deg, cameras.azimuth_deg[[4, 0]])
    assert [float(camera.azimuth_deg) for camera in cameras] == cameras.azimuth_deg.tolist()
