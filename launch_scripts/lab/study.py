"""Textures along several routes, at several thresholds or by several objectives, over prompt-mesh pairs and seeds, judged: `texture`,
`thresholds` and `objectives`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from threestudio_pgc.export.pictures import save_png

from . import drawing
from .drawing import GridRow
from .intervals import Interval, difference, grouped, interval
from .judge import held_out_accuracy, load_judge, look_of_prompt
from .page import Section
from .report import (
    GRADIENT_NOTE,
    check_linear,
    column_label,
    default_folder,
    finish,
    for_reading,
    gradient_rows,
    linear_map_for,
    negative_of,
    objective_of,
    slug,
    unit_prefix,
    write_table,
)
from .routes import ROUTES, Objective, Route
from .runs import Unit, run_units
from .teacher import Model, encode_prompts, latent_channels
from .texture import SECONDS_PER_STEP, Pair, eval_masks, read_views, texture_work

JUDGE_WANTED = 0.95
JUDGE_NOTE = (
    "Fidelity is the probability that an independent classifier of renders, which the optimisation never saw, gives to the prompt's look, "
    "averaged over eight views. 95 % intervals: bootstrap over pairs, then seeds. Differences are run against run, of the same pair and "
    'seed, with the same cameras, noise and timesteps: "minus sds" subtracts score distillation sampling along the same route, "minus raw" '
    'the raw VAE gradient and "minus control" view-rms, all under the same outliers, "minus clean" the same rule without outliers. Two '
    "controls: view-rms scales each view's gradient to one RMS and clips nothing; injected outliers multiply 0.1 % of the pixels, of the "
    "latent or of the image gradient, by 1000."
)
TIME_NOTE = (
    "Seconds per step: the median of a run's steps, of the runs the median, rendering included; time / sds is the mean ratio to sds on the "
    "same pair, seed and route. Workers share the cores, so compare within one table only."
)


# Columns of differences, and what is subtracted.
DIFFERENCES = {
    "minus sds": "score distillation sampling along the same route",
    "minus raw": "the raw gradient under the same outliers",
    "minus control": "the view-RMS control under the same outliers",
    "minus clean": "the same rule without outliers",
}


@dataclass(frozen=True)
class Variant:
    """One way of distilling. title: in tables, before the outliers. label: over its column."""

    title: str
    label: str
    route: Route
    objective: Objective

    @property
    def name(self) -> str:
        """In tables."""
        return self.title + ("" if self.objective.inject == "none" else f" + {self.objective.inject} outliers")


Key = tuple[Variant, Pair, int]  # and the seed


def texture_command(args: argparse.Namespace, routes: Sequence[Route], model: Model, pairs: Sequence[Pair]) -> Path:
    """Distil the texture of each pair along each route, without and with outliers put in."""
    check_linear(args, routes, latent_channels(model))
    objective = objective_of(args, model, args.objective)
    variants = [
        Variant(route.name, column_label(route), route, replace(objective, inject=inject))
        for inject in args.inject
        for route in routes
        if inject == "none" or route.pullback == "vae"
    ]
    return run_study(args, model, pairs, variants, "texture", "Gradient routes, texture")


def thresholds_command(args: argparse.Namespace, model: Model, pairs: Sequence[Pair]) -> Path:
    """Figure 7: a rule at each threshold, beside no clip and the view-RMS control."""
    latent_channels(model)
    objective = objective_of(args, model, args.objective)
    variants = []
    for inject in args.inject:
        spoilt = replace(objective, inject=inject)
        variants += [Variant(name, column_label(ROUTES[name]), ROUTES[name], spoilt) for name in ("vae", "view-rms")]
        variants += [Variant(f"c={c:g}", f"c={c:g}", ROUTES[args.route], replace(spoilt, threshold=c)) for c in args.thresholds]
    return run_study(args, model, pairs, variants, "thresholds", "Threshold ablation (Figure 7)", curve=threshold_curve)


def objectives_command(
    args: argparse.Namespace, names: Sequence[str], routes: Sequence[Route], model: Model, pairs: Sequence[Pair]
) -> Path:
    """Distil the texture of each pair by each objective along each route."""
    check_linear(args, routes, latent_channels(model))
    variants = [
        Variant(f"{name}, {route.name}", name, route, replace(objective_of(args, model, name), inject=inject))
        for inject in args.inject
        for route in routes
        for name in names
        if inject == "none" or route.pullback == "vae"
    ]
    return run_study(args, model, pairs, variants, "objectives", "Distillation objectives", by_route=True)


@dataclass(frozen=True)
class Panel:
    """Variants that are drawn together. name: of its files. where: ends its captions."""

    name: str
    where: str
    variants: list[Variant]


def panels(variants: Sequence[Variant], by_route: bool) -> list[Panel]:
    """Variants under the same outliers, and with `by_route` along the same route."""
    found: dict[str, Panel] = {}
    for variant in variants:
        inject, route = variant.objective.inject, variant.route
        name = f"{route.name}-{inject}" if by_route else inject
        where = (f", {route.label}" if by_route else "") + ("" if inject == "none" else f", outliers put in at the {inject}")
        found.setdefault(name, Panel(name, where, [])).variants.append(variant)
    return list(found.values())


def run_study(
    args: argparse.Namespace,
    model: Model,
    pairs: Sequence[Pair],
    variants: Sequence[Variant],
    command: str,
    title: str,
    *,
    curve: Callable[[Sequence[Variant], dict[str, dict[str, Any]]], np.ndarray] | None = None,
    by_route: bool = False,
) -> Path:
    """Run every variant on every pair with every seed, judge, draw, and write the page.

    by_route: variants are objectives along routes, drawn route by route; else columns of one picture.
    """
    name = slug(pairs[0].prompt) if len(pairs) == 1 else f"{len(pairs)}-pairs"
    folder = default_folder(args, command, name)
    runs = args.runs or folder
    negatives = {variant.objective.method: negative_of(args, model, variant.objective.method) for variant in variants}
    accuracy = judge_or_not([pair.prompt for pair in pairs])
    units = texture_units(args, model, pairs, variants, negatives, runs)
    found = dict(zip(units, run_units(list(units.values()), texture_work, runs, workers=args.workers, label=command)))
    if accuracy is not None:
        judge_runs(units, found, runs)
    table = judged_rows(variants, found)
    by_name = {row["variant"]: row for row in table}

    sections = []
    for panel in panels(variants, by_route):
        here, where = panel.variants, panel.where
        labels = [variant.label for variant in here]
        shown = pairs[0]
        places = [runs / units[variant, shown, args.seed].name for variant in here]
        caption = f"{shown.prompt}, {shown.mesh}, seed {args.seed}{where}"
        rows = [] if by_route else view_rows(places)
        grid = drawing.image_grid([*rows, *gradient_rows(places)], labels, title=caption)
        images = [(save_png(folder / f"{command}-{panel.name}.png", grid), caption)]
        if by_route:
            images.insert(0, (save_png(folder / f"views-{panel.name}.png", view_columns(here, places, caption)), caption))
        if len(pairs) > 1:
            overall = overview(here, pairs, units, runs, args.seed)
            images.append((save_png(folder / f"pairs-{panel.name}.png", overall), f"Every pair{where}"))
        if curve is not None:
            images.append((save_png(folder / f"curve-{panel.name}.png", curve(here, by_name)), f"By threshold{where}"))
        sections.append(Section(title + where, "" if sections else GRADIENT_NOTE, images))
    images = []
    if "fidelity" in table[0]:
        forest = [(row["variant"], *row["fidelity"]) for row in table]
        figure = drawing.interval_figure(forest, title="Fidelity", xlabel="judge's probability of the prompt's look")
        images.append((save_png(folder / "fidelity.png", figure), "Mean and 95 % interval, wide because pairs differ."))
    for column, against in DIFFERENCES.items():
        forest = [(row["variant"], *row[column]) for row in table if column in row]
        if forest:
            figure = drawing.interval_figure(forest, title=f"Against {against}", xlabel="difference of fidelity", reference=0.0)
            caption = f"Run against run of {against}, the same pair and seed. Hollow: the interval contains 0."
            images.append((save_png(folder / f"{slug(column)}.png", figure), caption))
    notes = [*([JUDGE_NOTE] if images else []), *([TIME_NOTE] if SECONDS_PER_STEP in table[0] else [])]
    sections.append(Section("Judged" if images else "Means over the runs", "\n\n".join(notes), images, for_reading(table)))
    sections.append(judge_section(accuracy))
    settings = {
        **model.as_settings(),
        "pairs": "; ".join(f"{pair.prompt} ({pair.mesh})" for pair in pairs),
        "seeds": list(range(args.seed, args.seed + args.seeds)),
        "steps": args.steps,
        "views per step": args.views,
        "lr": args.lr,
        **({"negative prompt": negatives} if any(negatives.values()) else {}),
        **shared_settings(variants),
    }
    write_table(folder / "table.json", table, settings=settings, judge=accuracy)
    return finish(folder, f"{title}: {name}", settings, sections)


def shared_settings(variants: Sequence[Variant]) -> dict[str, Any]:
    """What the objectives of all variants agree on, and the guidance of each where they are several methods."""
    all_settings = [variant.objective.as_settings() for variant in variants]
    agreed = {key: value for key, value in all_settings[0].items() if all(one.get(key) == value for one in all_settings)}
    scales = {variant.objective.method: variant.objective for variant in variants}
    if len(scales) > 1:
        told = [f"{name} {'none' if one.guidance_scale is None else f'{one.guidance_scale:g} ({one.cfg})'}" for name, one in scales.items()]
        agreed["guidance_scale"] = ", ".join(told)
        agreed.pop("cfg", None)
    return {key: value for key, value in agreed.items() if key != "inject"}


def texture_units(
    args: argparse.Namespace,
    model: Model,
    pairs: Sequence[Pair],
    variants: Sequence[Variant],
    negatives: Mapping[str, str],
    folder: Path,
) -> dict[Key, Unit]:
    """The runs of a study; seeds outermost, so that a study cut short has every variant of the seeds it did.

    Units are named by what they do, so that studies share runs where they share a folder for them. negatives: by method.
    """
    encode_prompts(model, [pair.prompt for pair in pairs], list(negatives.values()))
    linear = linear_map_for(args, model, [variant.route for variant in variants], folder)
    units = {}
    for seed in range(args.seed, args.seed + args.seeds):
        for pair in pairs:
            for variant in variants:
                route, objective = variant.route, variant.objective
                settings = {
                    "model": model.as_settings(),
                    "route": route.name,
                    "prompt": pair.prompt,
                    "mesh": pair.mesh,
                    "negative": negatives[objective.method],
                    "steps": args.steps,
                    "views": args.views,
                    "lr": args.lr,
                    "preset": args.preset,
                    "seed": seed,
                    "linear_map": linear if route.pullback == "linear" else None,
                    "objective": objective.as_settings(),
                }
                tail = "" if objective.inject == "none" else f"-{objective.inject}"
                place = f"runs/{slug(pair.prompt)}/{unit_prefix(objective)}{route.name}-c{objective.threshold:g}{tail}-seed{seed}"
                units[variant, pair, seed] = Unit(place, settings, args.steps)
    return units


# --------------------------------------------------------------------------------------------------------------------- judge


def judge_or_not(prompts: Sequence[str]) -> dict[str, Any] | None:
    """The judge's accuracy on pictures it never saw, measured now; None, with a reason said, where it is not used."""
    if not any(look_of_prompt(prompt) for prompt in prompts):
        print(f"judge: not used; it knows no look in {prompts[0]!r}")
        return None
    try:
        accuracy = held_out_accuracy(load_judge())
    except ValueError as error:
        print(f"judge: not used; {error}")
        return None
    right = f"{accuracy['pattern']:.1%} of patterns and {accuracy['colors']:.1%} of colours right"
    print(f"judge: {right} on {accuracy['count']} held-out renders")
    if min(accuracy["pattern"], accuracy["colors"]) < JUDGE_WANTED:
        print(f"judge: not used; wanted at least {JUDGE_WANTED:.0%} of both")
        return None
    return accuracy


def judge_runs(units: dict[Key, Unit], found: dict[Key, dict[str, Any]], folder: Path) -> None:
    """Add the judge's verdict on a run's eight views to what was found of it, where the prompt names a look."""
    judge, masks = load_judge(), {}
    for key, unit in units.items():
        pair = key[1]
        look = look_of_prompt(pair.prompt)
        if look is None:
            continue
        images = read_views(folder / unit.name)
        if pair.mesh not in masks:
            masks[pair.mesh] = eval_masks(pair.mesh, images.shape[1])
        verdict = judge.judge(images, masks[pair.mesh], look)
        for name in ("fidelity", "recognised", "colors_right"):
            found[key][name] = float(getattr(verdict, name).float().mean())


def judge_section(accuracy: dict[str, Any] | None) -> Section:
    if accuracy is None:
        return Section("Judge", "Not used: see the output of the command.")
    text = (
        f"On {accuracy['count']} clean renders of meshes it was not trained on, made for this page, the judge names "
        f"{accuracy['pattern']:.1%} of the patterns and {accuracy['colors']:.1%} of the colours."
    )
    return Section("Judge", text)


def judged_rows(variants: Sequence[Variant], found: dict[Key, dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per variant: fidelity, how it differs from what it is compared with, what share was right, and what the gradient was like."""

    def values(variant: Variant, name: str) -> dict[tuple[Pair, int], float]:
        runs = {(pair, seed): record for (one, pair, seed), record in found.items() if one == variant}
        return {key: record[name] for key, record in runs.items() if name in record}

    def reference(variant: Variant, title: str) -> Variant | None:
        """What `variant` is compared with, where it is part of the study."""
        here = variant.objective
        wanted, c = {
            "minus sds": ((variant.route.name, here.inject, "sds"), here.threshold),
            "minus raw": (("vae", here.inject, here.method), None),
            "minus control": (("view-rms", here.inject, here.method), None),
            "minus clean": ((variant.route.name, "none", here.method), here.threshold),
        }[title]
        same = [one for one in variants if (one.route.name, one.objective.inject, one.objective.method) == wanted and one != variant]
        return next((one for one in same if c in (None, one.objective.threshold)), None)

    rows = []
    for variant in variants:
        means = list(values(variant, "mean").values())
        row: dict[str, Any] = {"variant": variant.name, "runs": len(means)}
        fidelity = values(variant, "fidelity")
        if fidelity:
            row["fidelity"] = interval(grouped(fidelity))
            for title in DIFFERENCES:
                other = reference(variant, title)
                if other is not None:
                    row[title] = difference(fidelity, values(other, "fidelity"))
            row["recognised"] = interval(grouped(values(variant, "recognised")))
            row["colours right"] = interval(grouped(values(variant, "colors_right")))
        for title, name in (
            ("share above c", "share_clipped"),
            ("c", "threshold"),
            ("p50", "norm_p50"),
            ("max", "norm_max"),
            ("isolated outliers", "isolated"),
        ):
            row[title] = float(np.mean([mean[name] for mean in means]))
        seconds = values(variant, SECONDS_PER_STEP)
        if seconds and len({one.objective.method for one in variants}) > 1:
            row[SECONDS_PER_STEP] = float(np.median(list(seconds.values())))
            sds = variant if variant.objective.method == "sds" else reference(variant, "minus sds")
            base = {} if sds is None else values(sds, SECONDS_PER_STEP)
            ratios = [seconds[key] / base[key] for key in seconds.keys() & base.keys()]
            if ratios:
                row["time / sds"] = float(np.mean(ratios))
        rows.append(row)
    return rows


# ------------------------------------------------------------------------------------------------------------------ pictures


def view_columns(variants: Sequence[Variant], places: Sequence[Path], title: str) -> np.ndarray:
    """Four sides of each run's object, a run a row."""
    rows = [GridRow(variant.label, "rgb", list(read_views(place)[::2].numpy())) for variant, place in zip(variants, places)]
    return drawing.image_grid(rows, [f"azimuth {90 * side}°" for side in range(4)], title=title, row_height=128)


def view_rows(places: Sequence[Path]) -> list[GridRow]:
    """Four sides of each run's object."""
    seen = [read_views(place).numpy() for place in places]
    return [GridRow(f"azimuth {90 * side}°", "rgb", [views[2 * side] for views in seen]) for side in range(4)]


def overview(variants: Sequence[Variant], pairs: Sequence[Pair], units: dict[Key, Unit], folder: Path, seed: int) -> np.ndarray:
    """Every pair (rows) by every variant (columns), from one side."""
    side = {"builtin:bunny": 2}  # of the eight views; the bunny's best is its flank
    rows = []
    for pair in pairs:
        pictures = [read_views(folder / units[variant, pair, seed].name)[side.get(pair.mesh, 0)].numpy() for variant in variants]
        rows.append(GridRow(pair.prompt, "rgb", pictures))
    return drawing.image_grid(rows, [variant.label for variant in variants], row_height=128)


def threshold_curve(variants: Sequence[Variant], rows: dict[str, dict[str, Any]]) -> np.ndarray:
    """Share of pixels above the threshold, and fidelity with its interval, against the threshold."""
    steps = [variant for variant in variants if variant.label.startswith("c=")]
    found = [rows[variant.name] for variant in steps]
    series: dict[str, tuple] = {"share of pixels above c": ([row["share above c"] for row in found], None, None)}
    if "fidelity" in found[0]:
        columns: Sequence[Interval] = [row["fidelity"] for row in found]
        series["fidelity"] = tuple(list(values) for values in zip(*columns))
    return drawing.curve_figure(
        [variant.objective.threshold for variant in steps],
        series,
        title=f"{steps[0].route.label} by threshold",
        xlabel="threshold c",
        ylabel="share, probability",
        y_range=(0, 1),
    )
