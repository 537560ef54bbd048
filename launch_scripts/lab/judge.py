"""An independent judge of textures: a small classifier, trained on renders alone, says which pattern and colours a picture shows.

It shares neither weights nor architecture nor renders with the bundled diffusion model, whose textures it is to score, and has
never seen the bundled meshes. `launch_scripts/train_judge.py` trains it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from launch_scripts.pocket import renders
from launch_scripts.pocket.captions import COLORED, COLORS, MATERIALS, Look, look_phrases, words_of
from launch_scripts.pocket.shapes import Shape
from launch_scripts.pocket.textures import Surface, paint

DEFAULT = Path(__file__).resolve().parent / "judge" / "judge.safetensors"
SIZE = 64
MARGIN = 0.04  # of the object's longer side, on each side of the crop
GREY = 0.5
PATTERNS = (*COLORED, *MATERIALS, "none")
COLOR_NAMES = (*COLORS, "n/a")
UNORDERED = ("striped", "checkered")  # which colour comes first is a matter of phase: a picture does not show it
HELD_OUT_MESHES = ("bunny", "knot", "teapot", "vase")
TRAINING_SEEDS, HELD_OUT_SEEDS = (1_000, 100_000), (100_000, 1_000_000)  # of textures; the diffusion model's are 0 to 7
HELD_OUT_STREAM = 920_417  # of cameras and looks


def all_looks() -> list[Look]:
    """Every look the grammar can name."""
    looks = [Look(pattern) for pattern in MATERIALS]
    for a in COLORS:
        looks += [Look("plain", (a,)), Look("brick", (a,))]
        for b in COLORS:
            if a != b:
                looks += [Look("polka", (a, b)), Look("checkered", (a, b)), Look("striped", (a, b)), Look("striped", (a, b), True)]
    return looks


@lru_cache
def _phrases() -> dict[str, Look]:
    out: dict[str, Look] = {}
    for look in all_looks():
        for phrase in [part for parts in look_phrases(look) for part in parts]:
            out.setdefault(" ".join(words_of(phrase)), look)  # "checkered" alone is black and white, in either order
    return out


def look_of_prompt(prompt: str) -> Look | None:
    """The look `prompt` names in the grammar of `captions`: of all phrases in it, on word boundaries, the longest, of these the first."""
    text = f" {' '.join(words_of(prompt))} "
    found = [(-len(phrase), text.find(f" {phrase} "), phrase) for phrase in _phrases() if f" {phrase} " in text]
    return _phrases()[min(found)[2]] if found else None


def canonical(look: Look) -> Look:
    """The look as a picture can show it: unordered colours in the order of `COLORS`, and black dots on red are a ladybug."""
    if look.pattern in UNORDERED:
        return replace(look, colors=tuple(sorted(look.colors, key=COLOR_NAMES.index)))
    return Look("ladybug") if look == Look("polka", ("red", "black")) else look


def targets(look: Look | None) -> tuple[int, int, int]:
    """Classes of the three heads for a look, or for a picture that shows none."""
    look = canonical(look) if look else Look("none")
    first, second = (*look.colors, "n/a", "n/a")[:2]
    return PATTERNS.index(look.pattern), COLOR_NAMES.index(first), COLOR_NAMES.index(second)


def crop_to_object(images: Tensor, masks: Tensor, size: int = SIZE) -> Tensor:
    """Square crops about the objects, on grey: images (N, H, W, 3) in [0, 1], masks (N, H, W) bool -> (N, 4, size, size), RGB and mask.

    Pixels outside the mask have no influence. An empty mask gives grey.
    """
    out = images.new_full((len(images), 4, size, size), GREY)
    out[:, 3] = 0.0
    for k, (image, mask) in enumerate(zip(images, masks)):
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        if not len(rows):
            continue
        box = [(int(index[0]), int(index[-1]) + 1) for index in (rows, columns)]
        longest = max(stop - start for start, stop in box)
        side = longest + 2 * max(1, round(MARGIN * longest))
        part = torch.cat([torch.where(mask[..., None], image, GREY), mask[..., None].to(image)], -1)
        part = part[box[0][0] : box[0][1], box[1][0] : box[1][1]].permute(2, 0, 1)
        square = out.new_full((4, side, side), GREY)
        square[3] = 0.0
        top, left = (side - part.shape[1]) // 2, (side - part.shape[2]) // 2
        square[:, top : top + part.shape[1], left : left + part.shape[2]] = part
        out[k] = F.interpolate(square[None], (size, size), mode="bilinear", antialias=True, align_corners=False)[0]
    return out


class _Block(nn.Module):
    """Two 3x3 convolutions with batch norm and a way around them, to half the size."""

    def __init__(self, before: int, after: int):
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, 2, 1, bias=False)
        self.second = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.around = nn.Conv2d(before, after, 1, 2, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(after) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norms[0](self.first(x)))
        return F.relu(self.norms[1](self.second(y)) + self.around(x))


@dataclass
class Judgement:
    """One entry a view, (N,): `fidelity` probability of the asked-for pattern; `recognised` whether it is the likeliest;
    `colors_right` whether each colour the look names is the likeliest of its head (for materials, which name none: `recognised`)."""

    fidelity: Tensor
    recognised: Tensor
    colors_right: Tensor


class Judge(nn.Module):
    """Crops (N, 4, 64, 64) -> logits of pattern (N, 25), first colour (N, 13) and second colour (N, 13); half a million weights."""

    patterns, colors = PATTERNS, COLOR_NAMES

    def __init__(self, widths: tuple[int, ...] = (24, 48, 96, 128)):
        super().__init__()
        self.metadata: dict = {}
        self.stem = nn.Sequential(nn.Conv2d(4, widths[0], 5, 2, 2, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU())
        self.blocks = nn.ModuleList(_Block(a, b) for a, b in zip(widths, widths[1:]))
        # Colours are named pixel by pixel and counted where two learnt maps point, such as base and dots: a net that has to carry them
        # through its features confuses pairs of colours it met rarely.
        self.register_buffer("table", torch.tensor([*COLORS.values()]), persistent=False)
        self.maps = nn.ModuleList(nn.Conv2d(width, 2, 1) for width in widths[-3:-1])
        width = 2 * widths[-1] + 4 * len(COLORS)
        self.norm, self.mix = nn.BatchNorm1d(width), nn.Linear(width, 128)
        self.heads = nn.ModuleList([nn.Linear(width, len(PATTERNS)), *(nn.Linear(128, len(COLOR_NAMES)) for _ in range(2))])

    def forward(self, crops: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = [self.stem((crops - 0.5) * 4)]
        for block in self.blocks:
            features.append(block(features[-1]))
        fine, coarse, last = features[-3:]
        some, size = crops[:, :, ::2, ::2], fine.shape[-2:]
        names = torch.softmax((some[:, None, :3] - self.table[..., None, None]).square().sum(2) / -0.02, 1) * some[:, 3:]
        names, cover = (F.adaptive_avg_pool2d(part, size).flatten(2) for part in (names, some[:, 3:]))
        maps = torch.sigmoid(self.maps[0](fine) + F.interpolate(self.maps[1](coarse), size, mode="bilinear")).flatten(2)
        maps = torch.cat([torch.ones_like(maps[:, :1]), maps], 1)
        shares = torch.einsum("nms,ncs->nmc", maps, names) / ((maps * cover).sum(-1, keepdim=True) + 1e-2)
        shares = torch.cat([shares.flatten(1), (shares[:, 0] + 1e-4).sqrt()], 1)
        x = self.norm(torch.cat([last.mean((2, 3)), last.amax((2, 3)), shares], 1))
        mixed = F.relu(self.mix(x))
        return self.heads[0](x), self.heads[1](mixed), self.heads[2](mixed)

    @torch.no_grad()
    def probabilities(self, crops: Tensor, batch: int = 256) -> tuple[Tensor, Tensor, Tensor]:
        """Softmax of the three heads, in eval mode."""
        training = self.training
        self.eval()
        weight = self.stem[0].weight
        parts = [self(part.to(weight)) for part in crops.split(batch)]
        self.train(training)
        return tuple(torch.cat(head).softmax(-1) for head in zip(*parts))

    @torch.no_grad()
    def judge(self, images: Tensor, masks: Tensor, look: Look) -> Judgement:
        """Do these pictures (N, H, W, 3) in [0, 1] with masks (N, H, W) bool show `look`? N >= 1."""
        asked = targets(look)
        heads = self.probabilities(crop_to_object(images.detach(), masks))
        recognised = heads[0].argmax(-1) == asked[0]
        named = [head.argmax(-1) == want for head, want in zip(heads[1:], asked[1:]) if COLOR_NAMES[want] != "n/a"]
        return Judgement(heads[0][:, asked[0]], recognised, torch.stack(named).all(0) if named else recognised.clone())


def save_judge(judge: Judge, path: Path, **metadata) -> None:
    """Writes the weights as fp16 with the class lists and `metadata` (such as the held-out accuracy) in the file's header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: value.half() if value.is_floating_point() else value for name, value in judge.state_dict().items()}
    header = {"patterns": PATTERNS, "colors": COLOR_NAMES, **metadata}
    save_file(weights, path, metadata={key: json.dumps(value) for key, value in header.items()})


def load_judge(path: Path | str = DEFAULT) -> Judge:
    """The judge in `path`, fp32 and in eval mode; `metadata` is what was saved with it. ValueError if the file is not such a judge."""
    try:
        with safe_open(path, "pt") as file:
            metadata = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
            weights = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: no readable judge ({error}); launch_scripts/train_judge.py makes one") from error
    for key, want in (("patterns", PATTERNS), ("colors", COLOR_NAMES)):
        if metadata.get(key) != list(want):
            raise ValueError(f"{path}: a judge of other {key}, {metadata.get(key)}; launch_scripts/train_judge.py makes one anew")
    judge = Judge()
    try:
        judge.load_state_dict({name: value.float() if value.is_floating_point() else value for name, value in weights.items()})
    except RuntimeError as error:
        raise ValueError(f"{path}: weights of another judge ({error}); launch_scripts/train_judge.py makes one anew") from error
    judge.metadata = metadata
    return judge.eval()


def draw_look(pattern: str, rng: np.random.Generator) -> Look:
    """A look of `pattern` with uniform colours; three in ten stripes are vertical."""
    first, second = rng.permutation(list(COLORS))[:2].tolist()
    count = {"plain": 1, "brick": 1}.get(pattern, 2) if pattern in COLORED else 0
    return Look(pattern, (first, second)[:count], pattern == "striped" and rng.random() < 0.3)


def pictures(
    pool: list[Shape], painters: list[Callable[[Surface], np.ndarray]], rng: np.random.Generator, backend, share: int = 4
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each painter (surface -> albedo (N, 3)) a bare picture (128, 128, 3) and its mask (128, 128), meshes of `pool` equally often.

    `share` painters share a camera, four cameras a mesh.
    """
    for start in range(0, len(painters), 4 * share):
        group = painters[start : start + 4 * share]
        shape = pool[int(rng.integers(len(pool)))]
        mesh = renders.TriangleMesh(torch.as_tensor(shape.vertices, dtype=torch.float32), torch.as_tensor(shape.faces))
        cameras = [renders.sample_camera(rng) for _ in range(0, len(group), share)]
        views = renders.render_views(mesh, cameras, backend)
        for k, painter in enumerate(group):
            view = views[k // share]
            surface = Surface(view.position, view.normal * np.sign(view.facing + 0.3)[:, None], shape.samples, shape.radius)
            image = np.zeros((*view.mask.shape, 3), np.float32)
            image[view.mask] = painter(surface)
            cover = renders.shrink(view.mask.astype(np.float32))
            image = renders.shrink(image) / np.maximum(cover, 1e-6)[..., None]
            yield torch.from_numpy(image), torch.from_numpy(cover >= 0.5)


def held_out_accuracy(judge: Judge, views: int = 384, seed: int = 0) -> dict:
    """Accuracy on `views` clean pictures of the bundled meshes, with textures and cameras of which training saw none.

    Patterns take turns. "pattern": share recognised; "colors": share with all named colours right, of looks that name any;
    "count": pictures; "per_pattern": share recognised of each; "mistaken": the errors, "asked for > taken for" -> count.
    """
    rng = np.random.default_rng((HELD_OUT_STREAM, seed))
    pool = [shape for shape in renders.bundled_shapes() if shape.name in HELD_OUT_MESHES]
    names = PATTERNS[:-1]
    looks = [draw_look(names[k % len(names)], rng) for k in range(views)]
    textures = rng.integers(*HELD_OUT_SEEDS, len(looks)).tolist()
    painters = [lambda surface, look=look, texture=texture: paint(look, surface, texture) for look, texture in zip(looks, textures)]
    crops = torch.cat([crop_to_object(a[None], b[None]) for a, b in pictures(pool, painters, rng, renders.make_rasterizer("cpu"))])
    said = torch.stack([head.argmax(-1) for head in judge.probabilities(crops)], 1)
    right = said == torch.tensor([targets(look) for look in looks])
    pattern, colors = right[:, 0], right[:, 1:].all(1)
    per, mistaken = {name: [] for name in names}, {}
    for look, good, taken in zip(looks, pattern.tolist(), said[:, 0].tolist()):
        per[look.pattern].append(good)
        if not good:
            key = f"{look.pattern} > {PATTERNS[taken]}"
            mistaken[key] = mistaken.get(key, 0) + 1
    named = torch.tensor([bool(canonical(look).colors) for look in looks])
    return {
        "pattern": pattern.float().mean().item(),
        "colors": colors[named].float().mean().item(),
        "count": len(looks),
        "per_pattern": {name: float(np.mean(values)) for name, values in per.items() if values},
        "mistaken": mistaken,
    }
