import json
import os

import imageio.v2 as imageio
import numpy as np
import pytest
import torch

from threestudio_pgc.standalone.checkpoint import AtomicCheckpointIO, read_checkpoint
from threestudio_pgc.standalone.config import ConfigError
from threestudio_pgc.standalone.saving import SaverMixin, SavingError, atomic_write, grayscale_image, rgb_image, temporary_path


@pytest.fixture
def saver(tmp_path):
    saver = SaverMixin()
    saver.set_save_dir(tmp_path / "save")
    return saver


def full_disk(path):
    """From now on writing to `path` meets a full disk: what is written is collected in a device that has no room."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary_path(path).symlink_to("/dev/full")


needs_dev_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")


def test_without_a_folder():
    with pytest.raises(ValueError, match="set_save_dir"):
        SaverMixin().get_save_path("a.png")


def test_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    with atomic_write(path) as file:
        file.write(b"one")
    with pytest.raises(ZeroDivisionError), atomic_write(path) as file:
        file.write(b"two")
        1 / 0  # noqa: B018
    assert path.read_bytes() == b"one" and os.listdir(path.parent) == ["a.txt"]


@needs_dev_full
def test_full_disk_names_the_file_and_keeps_the_old_one(tmp_path):
    path = tmp_path / "a.txt"
    full_disk(path)
    with pytest.raises(SavingError, match="could not save .*a.txt: no space left on the disk; no file of that name was there before"):
        with atomic_write(path) as file:
            file.write(b"text")
    path.write_bytes(b"old")
    full_disk(path)
    with pytest.raises(SavingError, match="the file from before is kept: .*a.txt"), atomic_write(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.txt"]


@needs_dev_full
def test_full_disk_while_saving_a_checkpoint(tmp_path):
    path, store = tmp_path / "last.ckpt", AtomicCheckpointIO()
    store.save_checkpoint({"state_dict": {"a": torch.ones(2)}}, path)
    full_disk(path)
    with pytest.raises(SavingError, match="last.ckpt: no space left"):
        store.save_checkpoint({"state_dict": {"a": torch.zeros(100_000)}}, path)
    assert torch.equal(store.load_checkpoint(path)["state_dict"]["a"], torch.ones(2))


def test_unwritable_folder_is_a_saving_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SavingError, match="could not save"), atomic_write(tmp_path / "file" / "a.txt"):
        pass


def test_bad_checkpoints(tmp_path):
    path = tmp_path / "a.ckpt"
    with pytest.raises(ConfigError, match="no such checkpoint"):
        read_checkpoint(path)
    path.write_bytes(b"")
    with pytest.raises(ConfigError, match="not a readable checkpoint"):
        read_checkpoint(path)
    torch.save({"state_dict": {}, "trap": SaverMixin()}, path)  # an object: reading it could run code
    with pytest.raises(ConfigError, match="not a readable checkpoint"):
        read_checkpoint(path)
    torch.save({"weights": 1}, path)
    with pytest.raises(ConfigError, match="no 'state_dict'"):
        read_checkpoint(path)


def test_rgb_formats_and_values():
    image = torch.tensor([[[0.0, 0.5, 2.0]], [[-1.0, float("nan"), 1.0]]])  # (2,1,3)
    expected = [[[0, 128, 255]], [[0, 0, 255]]]
    assert rgb_image(image, "HWC").tolist() == expected
    assert rgb_image(image.permute(2, 0, 1)).tolist() == expected
    assert rgb_image(torch.zeros(1, 2, 2), data_range=(-1, 1)).tolist() == [[[128] * 3] * 2] * 2
    for wrong in (torch.zeros(2, 2), torch.zeros(4, 2, 2)):
        with pytest.raises(ValueError, match="rgb image"):
            rgb_image(wrong)


def test_grayscale_range_and_colours():
    assert grayscale_image([[1.0, 3.0]], cmap=None).tolist() == [[[0] * 3, [255] * 3]]
    assert grayscale_image([[0.0, 0.5, 1.0]], (0, 1)).tolist() == [[[0, 0, 128], [128, 255, 128], [128, 0, 0]]]
    assert grayscale_image(np.full((1, 2), 7.0), cmap=None).tolist() == [[[0] * 3] * 2]  # flat
    assert grayscale_image([[float("nan"), float("inf")]], cmap=None).shape == (1, 2, 3)
    with pytest.raises(ValueError, match="'jet'"):
        grayscale_image([[0.0]], cmap="magma")


def test_grid_layout(saver):
    red = {"type": "rgb", "img": torch.tensor([1.0, 0, 0]).expand(4, 6, 3), "kwargs": {"data_format": "HWC"}}
    gray = {"type": "grayscale", "img": torch.ones(8, 8), "kwargs": {"cmap": None, "data_range": (0, 1)}}
    image = imageio.imread(saver.save_image_grid("it0.png", [red, gray]))
    assert image.shape == (4, 12, 3) and image[0, 0].tolist() == [255, 0, 0] and image[0, 11].tolist() == [255] * 3
    image = imageio.imread(saver.save_image_grid("it1.png", [[red, gray], [gray]], align=(5, 7)))
    assert image.shape == (10, 14, 3) and image[9, 13].tolist() == [0] * 3
    assert np.ptp(imageio.imread(saver.save_image_grid("it4.png", [gray], align=40, texts=["a red", "cat"]))) == 255
    assert imageio.imread(saver.save_image_grid("it2.png", [red, gray], align="max")).shape == (8, 16, 3)
    with pytest.raises(ValueError, match="at least one image"):
        saver.save_image_grid("it3.png", [])
    with pytest.raises(ValueError, match="'uv'"):
        saver.save_image_grid("it3.png", [{"type": "uv", "img": None}])
    with pytest.raises(ValueError, match="align"):
        saver.save_image_grid("it3.png", [red], align="middle")
    with pytest.raises(ValueError, match="it3.bmp"):
        saver.save_image_grid("it3.bmp", [red])


def test_data_json_and_files(saver, tmp_path):
    array = np.arange(3.0)
    assert np.load(saver.save_data("a", torch.arange(3.0))).tolist() == [0, 1, 2]
    assert np.load(saver.save_data("b", {"x": array}))["x"].tolist() == [0, 1, 2]
    path = saver.save_json("c.json", {"t": torch.ones(2), 3: [array, np.float32(0.5)], "n": None})
    assert json.load(open(path)) == {"t": [1, 1], "3": [[0, 1, 2], 0.5], "n": None}
    (tmp_path / "source").write_bytes(b"x")
    assert open(saver.save_file("deep/d.bin", tmp_path / "source"), "rb").read() == b"x"
    assert torch.load(saver.save_state_dict("e.pth", {"w": torch.ones(1)}))["w"].item() == 1


def test_mesh_comes_back(saver):
    import trimesh

    box = trimesh.creation.box()
    again = trimesh.load(saver.save_mesh("box.obj", torch.tensor(box.vertices), torch.tensor(box.faces)), process=False)
    assert np.allclose(again.vertices, box.vertices) and np.array_equal(again.faces, box.faces)


@pytest.mark.parametrize("save_format", ["mp4", "gif"])
def test_sequence_is_sorted_by_number(saver, save_format):
    for index in (10, 9, 2):
        saver.save_image(f"views/{index}.png", np.full((17, 16, 3), 20 * index, dtype=np.uint8))
    saver.save_image("views/other.png", np.zeros((4, 4, 3), dtype=np.uint8))
    path = saver.save_img_sequence("turn", "views", r"(\d+)\.png", save_format=save_format, fps=10)
    frames = imageio.mimread(path)
    assert path.endswith(f"turn.{save_format}") and [round(float(frame.mean()) / 20) for frame in frames] == [2, 9, 10]


def test_sequence_without_pictures(saver):
    with pytest.raises(ValueError, match="no picture"):
        saver.save_img_sequence("turn", "views", r"(\d+)\.png")
    with pytest.raises(ValueError, match="'mp4' or 'gif'"):
        saver.save_img_sequence("turn", "views", r"(\d+)\.png", save_format="avi")
