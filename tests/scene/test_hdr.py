"""Pictures of radiance: every coding of a Radiance file against bytes written by hand, OpenEXR, and what is refused."""

import numpy as np
import pytest
import torch

from threestudio_pgc.scene.hdr import LightError, builtin_light_names, encode_hdr, read_hdr

HEADER = b"#?RADIANCE\n# made by hand\nFORMAT=32-bit_rle_rgbe\nEXPOSURE=2.0\n\n"
RED, GREY = bytes([128, 0, 0, 129]), bytes([64, 64, 64, 130])  # 128 / 256 * 2, and 64 / 256 * 4


def picture(height=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(height, 2 * height, 3, generator=generator) * 10.0 ** torch.randint(
        -4, 5, (height, 2 * height, 1), generator=generator
    )


def write(folder, content, name="light.hdr"):
    path = folder / name
    path.write_bytes(content)
    return path


def write_exr(path, channels):
    import OpenEXR

    header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
    OpenEXR.File(header, {name: np.ascontiguousarray(plane) for name, plane in channels.items()}).write(str(path))
    return path


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "no RADIANCE header"),
        (b"\x89PNG\r\n", "no RADIANCE header"),
        (b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n", "cut short within the header"),
        (HEADER, "found size ''"),
        (HEADER.replace(b"rgbe", b"xyze") + b"-Y 2 +X 4\n", "found FORMAT=32-bit_rle_xyze, wanted 32-bit_rle_rgbe"),
        (HEADER + b"+Y 2 +X 4\n", r"found orientation \+Y \+X, wanted -Y \+X"),
        (HEADER + b"+X 4 -Y 2\n", r"found orientation \+X -Y, wanted -Y \+X"),
        (HEADER + b"-Y two +X 4\n", "found size '-Y two"),
        (HEADER + b"-Y 0 +X 0\n", "0 x 0 pixels"),
        (HEADER + b"-Y 1 +X 2\n", "1 x 2 pixels"),
        (HEADER + b"-Y 4 +X 4\n", "4 x 4 pixels .*twice as wide as high"),
        (HEADER + b"-Y 99999 +X 199998\n", "99999 x 199998 pixels .*8192 x 16384"),
        (HEADER + b"-Y 2 +X 4\n", "cut short after 0 of 2 rows"),
        (HEADER + b"-Y 2 +X 4\n" + 7 * RED, "cut short after 1 of 2 rows"),
        (HEADER + b"-Y 2 +X 4\n" + bytes([1, 1, 1, 1]), "corrupt after 0 of 2 rows"),  # a run of no pixel
        (HEADER + b"-Y 2 +X 4\n" + 4 * RED + RED + bytes([1, 1, 1, 4]), "corrupt after 1 of 2 rows"),  # a run past the end of the row
        (HEADER + b"-Y 4 +X 8\n" + bytes([2, 2, 0, 9]), "corrupt after 0 of 4 rows"),  # a row of another width
        (HEADER + b"-Y 4 +X 8\n" + bytes([2, 2, 0, 8, 0]) + bytes(40), "corrupt after 0 of 4 rows"),  # a code of no pixels
        (HEADER + b"-Y 4 +X 8\n" + bytes([2, 2, 0, 8, 128 + 9]) + bytes(40), "corrupt after 0 of 4 rows"),
    ],
)
def test_a_file_that_is_no_such_picture_is_refused_by_name(tmp_path, content, message):
    path = write(tmp_path, content)
    with pytest.raises(LightError, match=message) as error:
        read_hdr(path)
    assert str(path) in str(error.value) and "wanted" in str(error.value)


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(LightError, match="none.hdr: no such file"):
        read_hdr(tmp_path / "none.hdr")
    with pytest.raises(LightError, match="found a folder"):
        read_hdr(tmp_path)
    with pytest.raises(LightError, match="found suffix '.png', wanted .hdr, .pic or .exr"):
        read_hdr(write(tmp_path, b"", "light.png"))
    with pytest.raises(LightError, match="builtin:moon: no such bundled light; there are sky, studio"):
        read_hdr("builtin:moon")


def test_flat_pixels(tmp_path):
    image = read_hdr(write(tmp_path, HEADER + b"-Y 2 +X 4\n" + 4 * RED + 3 * GREY + bytes([255, 0, 128, 0])))
    assert image.dtype == torch.float32 and image.shape == (2, 4, 3)
    assert torch.equal(image[0], torch.tensor([1.0, 0.0, 0.0]).expand(4, 3)), "the exposure is not applied"
    assert torch.equal(image[1, :3], torch.ones(3, 3))
    assert torch.equal(image[1, 3], torch.zeros(3)), "exponent 0 is black, whatever the mantissas"


def test_old_runs(tmp_path):
    first = RED + bytes([1, 1, 1, 3])
    image = read_hdr(write(tmp_path, HEADER + b"-Y 2 +X 4\n" + first + GREY + RED + bytes([1, 1, 1, 2]), "light.PIC"))
    assert torch.equal(image[..., 1], torch.tensor([[0.0, 0, 0, 0], [1, 0, 0, 0]]))
    assert torch.equal(image[..., 0], torch.ones(2, 4))


def test_an_old_run_goes_on_256_times_as_long(tmp_path):
    rows = RED + bytes([1, 1, 1, 3]) + bytes([1, 1, 1, 2]) + 4 * GREY  # 1 + 3 + 2 * 256 + 4 pixels
    image = read_hdr(write(tmp_path, HEADER + b"-Y 260 +X 520\n" + 260 * rows))
    assert torch.equal(image[..., 1], torch.cat([torch.zeros(516), torch.ones(4)]).expand(260, 520))


def test_new_runs(tmp_path):
    row = bytes([2, 2, 0, 8, 128 + 8, 128, 3, 0, 64, 128, 128 + 5, 255, 128 + 8, 0, 128 + 6, 129, 2, 130, 0])
    image = read_hdr(write(tmp_path, HEADER + b"-Y 4 +X 8\n" + 4 * row))
    assert torch.equal(image[2, :, 0], torch.tensor([1.0, 1, 1, 1, 1, 1, 2, 0]))
    assert torch.equal(image[3, :3, 1], torch.tensor([0, 0.5, 1]))
    assert not image[..., 2].any()


@pytest.mark.parametrize("height", [2, 3, 8, 160])
def test_a_picture_comes_back(tmp_path, height):
    image = picture(height)
    image[0] = 0
    image[1, 1:] = image[1, 1:2]  # runs, at 160 rows longer than a code can say
    back = read_hdr(write(tmp_path, encode_hdr(image)))
    assert ((back - image).abs() <= image.amax(dim=-1, keepdim=True) / 256 * 1.0001).all()
    assert encode_hdr(back) == encode_hdr(image)


def test_runs_make_a_file_small():
    assert len(encode_hdr(torch.ones(64, 128, 3))) < 64 * (4 + 4 * 4) + 100


def test_extremes_are_kept(tmp_path):
    image = torch.tensor([1e-37, 1e-20, 255.9, 1.6e38]).repeat(2, 1)[..., None].expand(2, 4, 3)
    torch.testing.assert_close(read_hdr(write(tmp_path, encode_hdr(image))), image.contiguous(), rtol=1 / 255, atol=0)


@pytest.mark.parametrize("n_bytes", [100, 1000, -1])
def test_a_cut_short_file_says_how_many_rows_there_were(tmp_path, n_bytes):
    with pytest.raises(LightError, match=r"cut short after \d+ of 32 rows"):
        read_hdr(write(tmp_path, encode_hdr(picture(32))[:n_bytes]))


@pytest.mark.parametrize("image", [torch.zeros(0, 0, 3), torch.ones(4, 8), torch.ones(4, 8, 4), torch.full((4, 8, 3), -1.0)])
def test_what_is_no_picture_is_not_encoded(image):
    with pytest.raises(LightError, match="image: found"):
        encode_hdr(image)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_what_the_format_cannot_hold_is_not_encoded(value):
    with pytest.raises(LightError, match="image: found"):
        encode_hdr(torch.full((4, 8, 3), value))


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_open_exr(tmp_path, kind):
    image = picture(4).numpy().astype(kind)
    planes = {name: image[..., index] for index, name in enumerate("RGB")} | {"A": np.ones((4, 8), kind)}
    assert torch.equal(read_hdr(write_exr(tmp_path / "light.exr", planes)), torch.from_numpy(image.astype(np.float32)))


def test_open_exr_of_one_channel_is_grey(tmp_path):
    grey = picture(4)[..., 0]
    assert torch.equal(read_hdr(write_exr(tmp_path / "light.exr", {"Y": grey.numpy()})), grey[..., None].expand(4, 8, 3))


@pytest.mark.parametrize(
    "channels, message",
    [
        ({"R": np.ones((4, 8), np.float32)}, "found channels R, wanted R, G and B, or Y alone"),
        ({name: np.ones((4, 8), np.float32) for name in ("Y", "RY", "BY")}, "found channels BY, RY, Y"),
        ({"Y": np.ones((4, 8), np.uint32)}, "found Y uint32"),
        ({"Y": np.ones((8, 8), np.float32)}, "8 x 8 pixels"),
        ({"Y": np.full((4, 8), np.nan, np.float32)}, "32 pixels that are NaN or infinite and 0 that are negative"),
        ({"Y": np.linspace(-1, 6, 8, dtype=np.float32).repeat(4).reshape(8, 4).T}, "0 pixels that are NaN or infinite and 4 that are neg"),
    ],
)
def test_an_open_exr_picture_of_another_kind_is_refused(tmp_path, channels, message):
    with pytest.raises(LightError, match=message):
        read_hdr(write_exr(tmp_path / "light.exr", channels))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_cut_short_open_exr_file_is_refused(tmp_path, share):
    path = write_exr(tmp_path / "light.exr", {"Y": picture(64)[..., 0].numpy()})
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(LightError, match="light.exr: (cut short or corrupt|found no OpenEXR header)"):
        read_hdr(path)


@pytest.mark.parametrize("name", ["studio", "sky"])
def test_bundled_lights(name):
    assert name in builtin_light_names()
    image = read_hdr(f"builtin:{name}")
    assert image.shape == (64, 128, 3) and image.max() > 1
