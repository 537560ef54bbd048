"""The judge of textures: prompts read, crops made, pictures of unseen meshes recognised, and everything else refused."""

import numpy as np
import pytest
import torch

from launch_scripts.lab import judge as lab
from launch_scripts.pocket import renders
from launch_scripts.pocket.captions import SHAPES, VIEWS, Look, sample_caption
from launch_scripts.pocket.textures import paint


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def judge():
    return lab.load_judge()


@pytest.fixture(scope="module")
def show():
    """show(look): pictures (8, 128, 128, 3) of the bunny and their masks."""
    bunny = [shape for shape in renders.bundled_shapes() if shape.name == "bunny"]
    backend = renders.make_rasterizer("cpu")

    def of(look):
        painters = [lambda surface: paint(look, surface, lab.HELD_OUT_SEEDS[0] + 77)] * 8
        parts = list(lab.pictures(bunny, painters, np.random.default_rng((3, 1)), backend, share=1))
        return torch.stack([image for image, _ in parts]), torch.stack([mask for _, mask in parts])

    return of


def test_empty_mask_is_a_grey_crop(judge):
    crop = lab.crop_to_object(torch.rand(2, 32, 40, 3), torch.zeros(2, 32, 40, dtype=torch.bool))
    assert crop.shape == (2, 4, 64, 64) and (crop[:, :3] == 0.5).all() and (crop[:, 3] == 0).all()
    verdict = judge.judge(torch.rand(2, 32, 40, 3), torch.zeros(2, 32, 40, dtype=torch.bool), Look("zebra"))
    assert verdict.fidelity.shape == (2,) and torch.isfinite(verdict.fidelity).all()


@pytest.mark.parametrize(
    "prompt, look",
    [
        ("a zebra bunny", Look("zebra")),
        ("a red brick bunny", Look("brick", ("red",))),
        ("a vase made of bricks", Look("brick", ("red",))),
        ("a purple and white polka dot bunny", Look("polka", ("purple", "white"))),
        ("a vase painted red with yellow polka dots", Look("polka", ("red", "yellow"))),
        ("a golden teapot", Look("gold")),
        ("A Shiny Gold teapot, front view", Look("gold")),
        ("a mossy stone vase", Look("moss")),
        ("a stone vase", Look("cobblestone")),
        ("a blue and white checkered vase", Look("checkered", ("blue", "white"))),
        ("a chessboard cube", Look("checkered", ("black", "white"))),
        ("a red and white striped knot", Look("striped", ("red", "white"))),
        ("a red and white vertical striped knot", Look("striped", ("red", "white"), True)),
        ("a knot with vertical red and white stripes", Look("striped", ("red", "white"), True)),
        ("a zebra striped mug", Look("zebra")),
        ("a wooden teapot", Look("wood")),
        ("a lava teapot", Look("lava")),
        ("a giraffe vase", Look("giraffe")),
        ("a leopard knot", Look("leopard")),
        ("a rainbow knot", Look("rainbow")),
        ("a blue mug", Look("plain", ("blue",))),
        ("a teapot", None),
        ("a redwood goldfish", None),
        ("", None),
    ],
)
def test_look_of_prompt(prompt, look):
    assert lab.look_of_prompt(prompt) == look


def test_look_of_every_caption_of_the_grammar():
    rng, looks = np.random.default_rng(4), lab.all_looks()
    for look in looks:
        caption = sample_caption(look, list(SHAPES)[rng.integers(len(SHAPES))], VIEWS[rng.integers(4)], False, rng)
        assert lab.canonical(lab.look_of_prompt(caption)) == lab.canonical(look), caption


def test_crop_is_square_about_the_object():
    images, masks = torch.zeros(1, 50, 90, 3), torch.zeros(1, 50, 90, dtype=torch.bool)
    masks[0, 20:40, 50:90] = True  # up to the picture's edge
    crop = lab.crop_to_object(images, masks)[0]
    rows, columns = (crop[3] > 0.5).any(1).nonzero()[:, 0], (crop[3] > 0.5).any(0).nonzero()[:, 0]
    assert len(columns) == pytest.approx(64 / 1.1, abs=1.5) and len(rows) == pytest.approx(32 / 1.1, abs=1.5)
    assert abs(int(rows[0] + rows[-1]) - 63) <= 1 and abs(int(columns[0] + columns[-1]) - 63) <= 1
    assert (crop[:3, crop[3] == 1] == 0).all() and (crop[:3, crop[3] == 0] == 0.5).all()


def test_background_has_no_influence(judge, show):
    images, masks = show(Look("zebra"))
    for behind in (torch.rand_like(images), torch.full_like(images, float("nan"))):
        other = torch.where(masks[..., None], images, behind)
        assert torch.equal(lab.crop_to_object(images, masks), lab.crop_to_object(other, masks))
        assert torch.equal(judge.judge(images, masks, Look("zebra")).fidelity, judge.judge(other, masks, Look("zebra")).fidelity)
    assert not torch.equal(lab.crop_to_object(images, masks), lab.crop_to_object(1 - images, masks))


def test_small_enough(judge):
    assert sum(weight.numel() for weight in judge.parameters()) <= 600_000
    assert lab.DEFAULT.stat().st_size < 3e6


def test_shipped_judge_recognises_looks_on_meshes_it_never_saw(judge):
    accuracy = lab.held_out_accuracy(judge, views=960, seed=11)
    assert accuracy["count"] == 960 and set(accuracy["per_pattern"]) == set(lab.PATTERNS[:-1])
    assert accuracy["pattern"] >= 0.95, accuracy
    assert accuracy["colors"] >= 0.95, accuracy
    assert min(accuracy["per_pattern"].values()) >= 0.7, accuracy


def test_judge_of_random_weights_is_no_judge():
    torch.manual_seed(0)
    assert lab.held_out_accuracy(lab.Judge(), views=96)["pattern"] < 0.2


@pytest.mark.parametrize(
    "shown, asked",
    [
        (Look("zebra"), Look("tiger")),
        (Look("gold"), Look("plain", ("yellow",))),
        (Look("brick", ("red",)), Look("mosaic")),
        (Look("polka", ("blue", "white")), Look("checkered", ("blue", "white"))),
    ],
)
def test_another_look_scores_low(judge, show, shown, asked):
    images, masks = show(shown)
    right, wrong = judge.judge(images, masks, shown), judge.judge(images, masks, asked)
    assert right.recognised.float().mean() >= 0.75 and right.colors_right.float().mean() >= 0.75
    assert right.fidelity.mean() > 0.75 and wrong.fidelity.mean() < 0.1
    assert not right.fidelity.requires_grad and right.fidelity.shape == right.recognised.shape == right.colors_right.shape == (8,)


def test_right_pattern_in_wrong_colors(judge, show):
    images, masks = show(Look("striped", ("red", "yellow")))
    pairs = (("yellow", "red"), ("red", "blue"), ("green", "yellow"))
    asked = {colors: judge.judge(images, masks, Look("striped", colors)) for colors in pairs}
    assert asked["yellow", "red"].colors_right.float().mean() >= 0.75  # the order of stripes is not seen
    for colors in pairs[1:]:
        assert asked[colors].recognised.float().mean() >= 0.75 and not asked[colors].colors_right.any()


def test_pixel_noise_scores_low(judge, show):
    images, masks = show(Look("zebra"))
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(5))
    for pattern in lab.PATTERNS[:-1]:
        look = lab.draw_look(pattern, np.random.default_rng(2))
        assert judge.judge(noise, masks, look).fidelity.mean() < 0.2, pattern


def test_judging_leaves_the_mode_alone(judge, show):
    images, masks = show(Look("zebra"))
    before = judge.judge(images, masks, Look("zebra")).fidelity
    judge.train()
    assert torch.equal(judge.judge(images, masks, Look("zebra")).fidelity, before) and judge.training
    judge.eval()


def test_loading_errors_name_the_file(tmp_path, judge, monkeypatch):
    missing, damaged, other, alien = (tmp_path / f"{name}.safetensors" for name in ("missing", "damaged", "other", "alien"))
    damaged.write_bytes(lab.DEFAULT.read_bytes()[:1000])
    lab.save_judge(lab.Judge((8, 8, 8)), alien)
    with monkeypatch.context() as patch:
        patch.setattr(lab, "PATTERNS", (*lab.PATTERNS[:-2], "tartan", "none"))
        lab.save_judge(judge, other)
    for path, words in ((missing, "no readable judge"), (damaged, "no readable judge"), (other, "other patterns"), (alien, "weights")):
        with pytest.raises(ValueError, match=words) as error:
            lab.load_judge(path)
        assert str(path) in str(error.value)


def test_save_and_load(tmp_path, judge):
    lab.save_judge(judge, tmp_path / "copy.safetensors", note="as it was")
    copy = lab.load_judge(tmp_path / "copy.safetensors")
    assert copy.metadata["note"] == "as it was" and not copy.training
    for name, value in judge.state_dict().items():
        assert torch.equal(copy.state_dict()[name], value), name
