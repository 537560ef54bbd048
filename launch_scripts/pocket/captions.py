"""What the pocket model can be asked for: looks (pattern and colours), shapes, and the sentences that name them.

The grammar is small on purpose. A model of a few million weights learns each word only if it meets the word thousands of
times, so synonyms are few and every word of the vocabulary is one token.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.80, 0.07, 0.06),
    "orange": (0.96, 0.46, 0.05),
    "yellow": (0.96, 0.83, 0.10),
    "green": (0.08, 0.55, 0.14),
    "turquoise": (0.08, 0.70, 0.68),
    "blue": (0.08, 0.20, 0.78),
    "purple": (0.46, 0.12, 0.64),
    "pink": (0.96, 0.50, 0.70),
    "brown": (0.42, 0.24, 0.11),
    "black": (0.05, 0.05, 0.05),
    "gray": (0.50, 0.50, 0.50),
    "white": (0.94, 0.94, 0.92),
}
BRICK_COLORS = ("red", "red", "red", "brown", "orange", "gray", "yellow", "white", "blue", "black", "green")

# Patterns whose colours are named in the prompt, and how often each is drawn. Hard patterns (fine geometry) are drawn more often.
COLORED = {"plain": 1.5, "striped": 1.8, "polka": 2.6, "checkered": 2.6, "brick": 2.8}

# Materials: weight, the forms that stand before the shape, the forms that stand after "with"/"made of".
MATERIALS: dict[str, tuple[float, tuple[str, ...], tuple[str, ...]]] = {
    "wood": (2.2, ("wooden", "wooden", "wood"), ("made of wood", "with wood grain", "made of dark and light wood")),
    "marble": (1.1, ("marble", "white marble"), ("made of marble", "with marble veins")),
    "gold": (1.1, ("golden", "gold", "shiny gold"), ("made of gold", "plated with gold")),
    "silver": (0.7, ("silver", "shiny silver", "steel"), ("made of silver", "made of steel")),
    "copper": (0.6, ("copper", "shiny copper"), ("made of copper",)),
    "rust": (0.7, ("rusty", "rusty metal"), ("made of rusty metal", "covered in rust")),
    "lava": (1.3, ("lava", "molten lava"), ("made of lava", "with glowing lava cracks")),
    "moss": (1.0, ("mossy stone", "mossy"), ("made of mossy stone", "made of stone with green moss")),
    "cobblestone": (1.1, ("cobblestone", "stone"), ("made of stone", "made of cobblestone")),
    "zebra": (1.3, ("zebra", "zebra striped"), ("with zebra stripes", "with a zebra pattern")),
    "leopard": (1.3, ("leopard", "leopard print"), ("with leopard spots", "with a leopard pattern")),
    "giraffe": (1.1, ("giraffe",), ("with giraffe spots", "with a giraffe pattern")),
    "tiger": (1.1, ("tiger", "tiger striped"), ("with tiger stripes", "with a tiger pattern")),
    "cow": (0.9, ("cow",), ("with cow spots", "with a cow pattern")),
    "camouflage": (0.9, ("camouflage", "military camouflage"), ("with a camouflage pattern", "in camouflage")),
    "watermelon": (0.8, ("watermelon",), ("with a watermelon pattern",)),
    "mosaic": (1.0, ("mosaic", "colorful mosaic"), ("with colorful mosaic tiles", "made of mosaic")),
    "ladybug": (0.6, ("ladybug",), ("with a ladybug pattern",)),
    "rainbow": (0.7, ("rainbow",), ("with rainbow stripes", "in rainbow colors")),
}

SHAPES: dict[str, tuple[str, ...]] = {
    "sphere": ("sphere", "ball"),
    "cube": ("cube", "box"),
    "vase": ("vase",),
    "torus": ("torus", "donut", "ring"),
    "knot": ("knot",),
    "egg": ("egg",),
    "bottle": ("bottle",),
    "cylinder": ("cylinder",),
    "cone": ("cone",),
    "capsule": ("capsule",),
    "blob": ("blob", "rock"),
    "chair": ("chair",),
    "table": ("table",),
    "bowl": ("bowl",),
    "mug": ("mug", "cup"),
    "bunny": ("bunny", "rabbit"),
    "teapot": ("teapot", "pot"),
    "lettered": ("sign", "letter"),
}
ANY_SHAPE = ("object", "thing", "statue", "model")
VIEWS = ("front", "side", "back", "overhead")


@dataclass(frozen=True)
class Look:
    """A texture by name: `pattern` is a key of `COLORED` or `MATERIALS`; `colors` are keys of `COLORS`, the base colour first;
    `vertical` turns stripes upright."""

    pattern: str
    colors: tuple[str, ...] = ()
    vertical: bool = False


def _other(color: str) -> str:
    """The second colour of a two-coloured pattern when the prompt names only one."""
    return "black" if color == "white" else "white"


def sample_look(rng: np.random.Generator) -> Look:
    """Draws a look with the frequencies of `COLORED` and `MATERIALS`."""
    names = [*COLORED, *MATERIALS]
    weights = np.array([*COLORED.values(), *(entry[0] for entry in MATERIALS.values())])
    pattern = names[rng.choice(len(names), p=weights / weights.sum())]
    if pattern in MATERIALS:
        return Look(pattern)
    if pattern == "brick":
        return Look(pattern, (BRICK_COLORS[rng.integers(len(BRICK_COLORS))],))
    first = list(COLORS)[rng.integers(len(COLORS))]
    if pattern == "plain":
        return Look(pattern, (first,))
    second = _other(first)
    if rng.random() < 0.5:
        second = [c for c in COLORS if c != first][rng.integers(len(COLORS) - 1)]
    return Look(pattern, (first, second), vertical=pattern == "striped" and rng.random() < 0.3)


def look_phrases(look: Look) -> tuple[list[str], list[str]]:
    """Forms that stand before the shape ("red brick") and forms that stand behind it ("made of red bricks")."""
    if look.pattern in MATERIALS:
        _, before, behind = MATERIALS[look.pattern]
        return list(before), list(behind)
    a = look.colors[0]
    if look.pattern == "plain":
        return [a, f"plain {a}"], [f"painted {a}", f"in {a}"]
    if look.pattern == "brick":
        before, behind = [f"{a} brick", f"{a} bricks"], [f"made of {a} bricks", f"with a {a} brick wall pattern"]
        if a == "red":
            before, behind = [*before, "brick", "brick wall"], [*behind, "made of bricks", "built of brick"]
        return before, behind
    b = look.colors[1]
    alone = b == _other(a)
    if look.pattern == "polka":
        before = [f"{a} and {b} polka dot", f"{a} and {b} dotted"]
        behind = [f"painted {a} with {b} polka dots", f"in {a} with {b} dots", f"with {b} polka dots on {a}"]
        if alone:
            before, behind = [f"{a} polka dot"] * 3 + [f"{a} dotted", *before], [*behind, f"painted {a} with polka dots"]
        return before, behind
    if look.pattern == "checkered":
        before = [f"{a} and {b} checkered", f"{a} and {b} checkerboard", f"{a} and {b} checked"]
        behind = [f"with {a} and {b} checks", f"with a {a} and {b} checkerboard pattern"]
        if alone:
            before, behind = [*before, f"{a} checkered", f"{a} checked"], [*behind, f"with {a} checks"]
        if {a, b} == {"black", "white"}:
            before = [*before, "checkered", "chessboard", "checkerboard"]
        return before, behind
    upright = "vertical " if look.vertical else ""
    before = [f"{upright}{a} and {b} striped", f"{a} and {b} {'vertical ' if look.vertical else 'horizontal '}striped"]
    behind = [f"with {upright}{a} and {b} stripes", f"with {'vertical' if look.vertical else 'horizontal'} {a} and {b} stripes"]
    if alone:
        before, behind = [*before, f"{upright}{a} striped"], [*behind, f"with {upright}{a} stripes"]
    return before, behind


def view_name(elevation: float, azimuth: float) -> str:
    """Word of the view for a camera in degrees; the rule of the view-dependent prompts."""
    azimuth = (azimuth + 180.0) % 360.0 - 180.0
    if elevation > 60.0:
        return "overhead"
    return "front" if abs(azimuth) < 45.0 else "back" if abs(azimuth) > 135.0 else "side"


def _sample_name(shape: str, rng: np.random.Generator) -> str:
    names = SHAPES[shape]
    return names[0] if rng.random() < 0.6 else names[rng.integers(len(names))]


def plain_caption(shape: str, view: str, rng: np.random.Generator) -> str:
    """The shape alone, "a vase" or "a vase, front view", for a picture that shows no look."""
    name = _sample_name(shape, rng)
    phrase = f"{'an' if name[0] in 'aeio' else 'a'} {name}"
    return f"{phrase}, {view} view" if rng.random() < 0.5 else phrase


def sample_caption(look: Look, shape: str, view: str, blurry: bool, rng: np.random.Generator) -> str:
    """One sentence for an image of `shape` (key of `SHAPES`) with `look`, seen from `view` (one of `VIEWS`)."""
    before, behind = look_phrases(look)
    name = _sample_name(shape, rng)
    if rng.random() < 0.15:
        name = ANY_SHAPE[rng.integers(len(ANY_SHAPE))]
    style = rng.random()
    if style < 0.58:
        phrase = f"{before[rng.integers(len(before))]} {name}"
    elif style < 0.92:
        phrase = f"{name} {behind[rng.integers(len(behind))]}"
    else:  # without the shape: "zebra stripes", "red bricks"
        phrase = before[rng.integers(len(before))]
        if rng.random() < 0.6:
            phrase += " texture" if rng.random() < 0.5 else " pattern"
    first = rng.random()
    article = "an" if phrase[0] in "aeio" else "a"
    if first < 0.75:
        phrase = f"{article} {phrase}"
    elif first < 0.83:
        phrase = f"{('a photo of', 'a picture of', 'a render of')[rng.integers(3)]} {article} {phrase}"
    if blurry:
        return f"{phrase}, {('blurry', 'low quality', 'blurry, low quality')[rng.integers(3)]}"
    if rng.random() < 0.06:
        phrase += (", highly detailed", ", high quality", ", sharp")[rng.integers(3)]
    if rng.random() < 0.5:
        phrase += f", {view} view"
    return phrase


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def vocabulary() -> list[str]:
    """Every word the grammar can produce, sorted. Training tokenizers on it makes each one a single token."""
    text = ["a an photo picture render of blurry low high quality highly detailed sharp texture pattern view"]
    text += [*VIEWS, *ANY_SHAPE]
    text += [name for names in SHAPES.values() for name in names]
    looks = [Look(pattern) for pattern in MATERIALS]
    for a in COLORS:
        looks += [Look("plain", (a,)), Look("brick", (a,))]
        for b in COLORS:
            if a != b:
                looks += [Look(p, (a, b), v) for p in ("polka", "checkered", "striped") for v in (False, True)]
    for look in looks:
        before, behind = look_phrases(look)
        text += [*before, *behind]
    return sorted({word for part in text for word in words_of(part)})
