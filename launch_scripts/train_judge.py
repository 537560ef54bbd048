"""Trains the judge of `launch_scripts/lab/judge.py` on renders of shapes made by formula.

    python launch_scripts/train_judge.py                                     # data and training, about 10 minutes of one core
    python launch_scripts/train_judge.py --pictures 500 --minutes 0.2 --output /tmp/judge.safetensors   # to see that it runs

Ends with the accuracy on the bundled meshes, which the training never shows.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial.transform import Rotation
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from launch_scripts.lab import judge as lab  # noqa: E402
from launch_scripts.pocket import renders  # noqa: E402
from launch_scripts.pocket.captions import COLORS, Look  # noqa: E402
from launch_scripts.pocket.shapes import Shape, shapes  # noqa: E402
from launch_scripts.pocket.textures import Surface, fbm, paint  # noqa: E402

STREAM = 510_771  # of cameras, looks and augmentation; the diffusion model's data are of stream 0
NONE_SHARE = 0.06
BATCH = 64
LEARNING_RATE = 2e-3
# Looks that, mixed half and half with another, still show that other, only paler.
PALE = ("plain", "marble", "gold", "silver", "copper")
REPORT_SECONDS = 20.0


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--minutes", type=float, default=6.5, help="of training, after the data are made")
    parser.add_argument("--pictures", type=int, default=20000)
    parser.add_argument("--output", type=Path, default=lab.DEFAULT)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    if args.minutes <= 0:
        parser.error("--minutes: want more than 0")
    if args.pictures < BATCH:
        parser.error(f"--pictures: want at least {BATCH}")
    return args


def training_pool(rng: np.random.Generator) -> list[Shape]:
    """The formula shapes as they are, the lathe shapes with patterns projected as on any other mesh, and all leant and stretched."""
    originals = shapes()
    pool = [*originals, *(replace(shape, lathe=False) for shape in originals if shape.lathe)]
    for shape in originals:
        turn = Rotation.from_euler("zxy", [rng.uniform(0, 2 * np.pi), *rng.uniform(-0.6, 0.6, 2)]).as_matrix()
        pool.append(replace(shape, vertices=(shape.vertices * rng.uniform(0.75, 1.3, 3)) @ turn.T, lathe=False))
    return pool


def no_look(surface: Surface, rng: np.random.Generator) -> np.ndarray:
    """Albedo (N, 3) in [0, 1] that shows no look of the grammar: two looks mixed, blotches of random colours, or coloured noise."""
    p, seed = surface.position, int(rng.integers(*lab.TRAINING_SEEDS))
    kind = rng.random()
    if kind < 0.3:
        patterns = rng.permutation([name for name in lab.PATTERNS[:-1] if name not in PALE])[:2].tolist()
        a, b = (paint(lab.draw_look(name, rng), surface, seed) for name in patterns)
        weight = rng.uniform(0.4, 0.6)
        return a * weight + b * (1 - weight)
    if kind < 0.7:  # two colours at least far apart, of which one at least is neither black nor white
        count = int(rng.integers(2, 6))
        while True:
            colors = rng.random((count, 3))
            if np.ptp(colors, 0).max() > 0.5 and np.ptp(colors, 1).max() > 0.4:
                break
        frequency, sharp = math.exp(rng.uniform(math.log(1.2), math.log(6))), math.exp(rng.uniform(math.log(3), math.log(40)))
        fields = np.stack([fbm(p, frequency, 3, seed + 40 * k) for k in range(count)], -1) * sharp
        weights = np.exp(fields - fields.max(-1, keepdims=True))
        return weights / weights.sum(-1, keepdims=True) @ colors
    frequency = math.exp(rng.uniform(math.log(1.5), math.log(30)))
    noise = np.stack([fbm(p, frequency, int(rng.integers(1, 4)), seed + 40 * k) for k in range(3)], -1)
    return np.clip(rng.uniform(0.3, 0.7, 3) + rng.uniform(0.5, 1.2) * noise, 0, 1)


def pixel_noise(crop: Tensor, rng: np.random.Generator) -> None:
    """Overwrites the object in a crop (4, S, S) with noise of 1, 2 or 4 pixels a grain, coloured or grey."""
    size, grain = crop.shape[-1], 2 ** int(rng.integers(3))
    noise = rng.normal(size=(3 if rng.random() < 0.7 else 1, size // grain, size // grain)).repeat(grain, 1).repeat(grain, 2)
    noise = torch.from_numpy(rng.uniform(0.35, 0.65) + rng.uniform(0.15, 0.4) * noise).to(crop).clamp(0, 1)
    crop[:3] = lab.GREY + (noise - lab.GREY) * crop[3]


def make_data(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Crops (count, 4, 64, 64) uint8 and their classes (count, 3): all patterns equally often, `NONE_SHARE` of none."""
    rng, names = np.random.default_rng((STREAM, seed)), lab.PATTERNS[:-1]
    looks: list[Look | None] = [
        None if rng.random() < NONE_SHARE else lab.draw_look(names[int(rng.integers(len(names)))], rng) for _ in range(count)
    ]
    textures = rng.integers(*lab.TRAINING_SEEDS, count).tolist()

    def painter(look, texture):
        return lambda surface: paint(look, surface, texture) if look else no_look(surface, rng)

    painters = [painter(look, texture) for look, texture in zip(looks, textures)]
    crops = torch.empty((count, 4, lab.SIZE, lab.SIZE), dtype=torch.uint8)
    start = shown = time.time()
    for k, (image, mask) in enumerate(lab.pictures(training_pool(rng), painters, rng, renders.make_rasterizer("cpu"))):
        crop = lab.crop_to_object(image[None], mask[None])[0]
        if looks[k] is None and rng.random() < 0.25:
            pixel_noise(crop, rng)
        crops[k] = (crop * 255).round().to(torch.uint8)
        if time.time() - shown > REPORT_SECONDS:
            shown = time.time()
            print(f"data: {k + 1}/{count} pictures, {(shown - start) / (k + 1) * (count - k - 1):.0f} s left", flush=True)
    return crops, torch.tensor([lab.targets(look) for look in looks])


def recolor(crops: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Fresh colours for float crops (N, 4, S, S) of classes (N, 3), so that few renders of a pattern stand for all its pairs of colours.

    Two-coloured patterns are linear in their colours and get another pair; pictures of no look have their channels shuffled and,
    one time in two, inverted; all others stay.
    """
    crops, classes = crops.clone(), classes.clone()
    table = torch.tensor([*COLORS.values()])
    pairs = torch.tensor([lab.PATTERNS.index(name) for name in ("polka", *lab.UNORDERED)])
    for k in torch.isin(classes[:, 0], pairs).nonzero()[:, 0].tolist():
        (a, b), mask = table[classes[k, 1:]], crops[k, 3]
        step = (b - a)[:, None, None]
        share = ((crops[k, :3] - lab.GREY * (1 - mask) - a[:, None, None] * mask) * step).sum(0) / step.square().sum()
        names = [lab.COLOR_NAMES[index] for index in torch.randperm(len(table))[:2].tolist()]
        classes[k] = torch.tensor(lab.targets(Look(lab.PATTERNS[classes[k, 0]], tuple(names))))
        a, b = (torch.tensor(COLORS[name])[:, None, None] for name in names)
        crops[k, :3] = lab.GREY * (1 - mask) + a * mask + (b - a) * share
    for k in (classes[:, 0] == lab.PATTERNS.index("none")).nonzero()[:, 0].tolist():
        crops[k, :3] = crops[k, :3][torch.randperm(3)]
        if torch.rand(()) < 0.5:
            crops[k, :3] = 1 - crops[k, :3]  # the grey behind stays
    return crops, classes


def _uniform(n: int, low: float, high: float) -> Tensor:
    return torch.empty(n, 1, 1, 1).uniform_(low, high)


def augment(crops: Tensor) -> Tensor:
    """Crops (N, 4, S, S) float as distillation might have made them: duller or harder, drifting in colour, blurred, noisy.

    One in six is left as it is, and none changes so far that another colour's name would fit.
    """
    n, size = len(crops), crops.shape[-1]
    crops = torch.where(torch.rand(n, 1, 1, 1) < 0.5, crops.flip(-1), crops)
    clean, mask = crops[:, :3], crops[:, 3:]
    x = clean
    # Blur, of the object alone: the background does not bleed in.
    sigma = torch.where(torch.rand(n, 1, 1, 1) < 0.5, _uniform(n, 0.4, 1.3), torch.tensor(0.05))
    taps = torch.exp(-0.5 * (torch.arange(-3, 4).view(1, 1, 1, -1) / sigma) ** 2)
    kernel = (taps / taps.sum(-1, keepdim=True)).repeat_interleave(4, 0)  # (4 n, 1, 1, 7)
    both = torch.cat([(x - lab.GREY) * mask, mask], 1).view(1, 4 * n, size, size)
    both = F.conv2d(F.conv2d(both, kernel, padding=(0, 3), groups=4 * n), kernel.mT, padding=(3, 0), groups=4 * n).view(n, 4, size, size)
    x = lab.GREY + both[:, :3] / both[:, 3:].clamp(min=1e-3)
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * _uniform(n, 0.75, 1.15)
    x = (x - lab.GREY) * _uniform(n, 0.75, 1.15) + lab.GREY
    x = x.clamp(0, 1) ** torch.exp(_uniform(n, -0.25, 0.25))
    x = x * _uniform(n, 0.88, 1.1) + _uniform(n, -0.05, 0.05)
    drift = torch.randn(n, 3, 3, 3) * _uniform(n, 0, 0.05) + torch.randn(n, 1, 3, 3) * _uniform(n, 0, 0.08)
    x = x + F.interpolate(drift, (size, size), mode="bicubic", align_corners=True)
    fine, coarse = torch.randn(n, 3, size, size), F.interpolate(torch.randn(n, 3, size // 2, size // 2), scale_factor=2.0)
    x = x + torch.where(torch.rand(n, 1, 1, 1) < 0.5, fine, coarse) * _uniform(n, 0, 0.05)
    x = torch.where(torch.rand(n, 1, 1, 1) < 0.5, x.clamp(0, 1), x.clamp(0.05, 0.95))
    x = lab.GREY + (x - lab.GREY) * mask
    return torch.cat([torch.where(torch.rand(n, 1, 1, 1) < 1 / 6, clean, x), mask], 1)


def loss_of(logits: tuple[Tensor, Tensor, Tensor], classes: Tensor) -> Tensor:
    parts = [F.cross_entropy(head, classes[:, k]) for k, head in enumerate(logits)]
    return sum(parts)


def train(judge: lab.Judge, crops: Tensor, classes: Tensor, minutes: float, seed: int) -> None:
    """AdamW for `minutes`, the rate on a cosine to 0 after a short rise."""
    torch.manual_seed(seed + STREAM)
    decayed = [weight for weight in judge.parameters() if weight.ndim > 1]
    rest = [weight for weight in judge.parameters() if weight.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.02}, {"params": rest, "weight_decay": 0.0}])
    judge.train().to(memory_format=torch.channels_last)  # half as fast again on a CPU
    start = shown = time.time()
    step, seen, losses, order = 0, 0, [], torch.empty(0, dtype=torch.long)
    while (part := (time.time() - start) / (60 * minutes)) < 1:
        if len(order) < BATCH:
            order = torch.randperm(len(crops))
        index, order = order[:BATCH], order[BATCH:]
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * part))
        batch, wanted = recolor(crops[index].float() / 255, classes[index])
        logits = judge(augment(batch).contiguous(memory_format=torch.channels_last))
        loss = loss_of(logits, wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step, seen = step + 1, seen + BATCH
        losses.append((loss.item(), (logits[0].argmax(-1) == wanted[:, 0]).float().mean().item()))
        if time.time() - shown > REPORT_SECONDS:
            shown = time.time()
            (mean, right), left = np.mean(losses, 0), 60 * minutes - (shown - start)
            print(f"train: step {step}, {seen} pictures, loss {mean:.3f}, pattern {right:.3f}, {left:.0f} s left", flush=True)
            losses = []
    judge.eval()


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    crops, classes = make_data(args.pictures, args.seed)
    judge = lab.Judge()
    train(judge, crops, classes, args.minutes, args.seed)
    lab.save_judge(judge.to(memory_format=torch.contiguous_format), args.output)
    judge = lab.load_judge(args.output)  # measured as it is shipped, in half precision
    accuracy = lab.held_out_accuracy(judge, 960)
    lab.save_judge(judge, args.output, held_out=accuracy, pictures=args.pictures, minutes=args.minutes, seed=args.seed)
    print(f"held out: pattern {accuracy['pattern']:.3f}, colours {accuracy['colors']:.3f} of {accuracy['count']} pictures")
    print("weakest:", ", ".join(f"{name} {share:.2f}" for name, share in sorted(accuracy["per_pattern"].items(), key=lambda e: e[1])[:5]))
    print("mistaken:", ", ".join(f"{name} {count}" for name, count in sorted(accuracy["mistaken"].items(), key=lambda e: -e[1])[:8]))
    print(f"wrote {args.output} ({args.output.stat().st_size / 1e6:.2f} MB)")


if __name__ == "__main__":
    main()
