"""The judge's training, a few steps long: it runs as documented, and its data and augmentation are what they say."""

import numpy as np
import pytest
import torch

from launch_scripts import train_judge
from launch_scripts.lab import judge as lab


@pytest.fixture(scope="module")
def data():
    return train_judge.make_data(64, seed=5)


def test_data_are_a_function_of_the_seed(data):
    crops, classes = data
    assert crops.shape == (64, 4, 64, 64) and crops.dtype == torch.uint8 and classes.shape == (64, 3)
    again = train_judge.make_data(64, seed=5)
    assert torch.equal(crops, again[0]) and torch.equal(classes, again[1])
    assert len(set(classes[:, 0].tolist())) > 12, "many patterns"


def test_training_shows_none_of_the_meshes_it_is_measured_on():
    names = {shape.name for shape in train_judge.training_pool(np.random.default_rng(0))}
    assert names.isdisjoint({"bunny", "teapot", "lettered"})  # the pool's vases and knots are formulas of its own
    assert lab.TRAINING_SEEDS[1] <= lab.HELD_OUT_SEEDS[0] and lab.TRAINING_SEEDS[0] > 7


def test_new_colours_come_with_their_classes(data):
    """A recoloured picture must show the colours its new classes name: checked on the picture, not on the code."""
    crops, classes = data
    torch.manual_seed(0)
    recolored, renamed = train_judge.recolor(crops.float() / 255, classes)
    pairs = torch.isin(classes[:, 0], torch.tensor([lab.PATTERNS.index(name) for name in ("polka", *lab.UNORDERED)]))
    assert pairs.any() and torch.equal(renamed[:, 0][~pairs], classes[:, 0][~pairs])
    table = torch.tensor([*train_judge.COLORS.values()])
    for k in pairs.nonzero()[:, 0].tolist():
        if renamed[k, 0] != classes[k, 0]:
            continue  # red with black dots has become a ladybug
        named = table[renamed[k, 1:]]
        pixels = recolored[k, :3, recolored[k, 3] == 1].T
        # Every pixel of the object lies on the line between the two named colours.
        step = named[1] - named[0]
        share = ((pixels - named[0]) @ step) / step.square().sum()
        assert (pixels - named[0] - share[:, None] * step).abs().max() < 0.02


def test_augmentation_keeps_the_object_where_it_is(data):
    crops = data[0].float() / 255
    torch.manual_seed(0)
    spoilt = train_judge.augment(crops)
    assert spoilt.shape == crops.shape and torch.isfinite(spoilt).all() and spoilt.min() >= 0 and spoilt.max() <= 1
    outside = spoilt[:, 3:] == 0
    assert torch.allclose(spoilt[:, :3][outside.expand(-1, 3, -1, -1)], torch.tensor(lab.GREY), atol=3e-3)  # crops are 8 bits deep


def test_the_documented_command_leaves_a_judge(tmp_path, capsys):
    path = tmp_path / "judge.safetensors"
    train_judge.main(["--pictures", "64", "--minutes", "0.02", "--output", str(path)])
    judge = lab.load_judge(path)
    assert 0 <= judge.metadata["held_out"]["pattern"] < 0.5, "a second of training makes no judge"
    assert f"wrote {path}" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "told"), [(["--minutes", "0"], "--minutes"), (["--pictures", "8"], "--pictures")])
def test_bad_arguments_are_named(arguments, told, capsys):
    with pytest.raises(SystemExit):
        train_judge.main(arguments)
    assert told in capsys.readouterr().err
