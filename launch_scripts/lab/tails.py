"""How pixel gradients are distributed: the histogram the paper's noise assumption (section 4.4.1) calls for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from threestudio_pgc.diffusion.distillation import distill
from threestudio_pgc.pixelgrad import RULES, isolated_outliers, kurtosis, nonfinite_pixels, pixel_norm, pullback
from threestudio_pgc.scene.cameras import sample_cameras
from threestudio_pgc.scene.mesh import load_mesh, normalize
from threestudio_pgc.standalone.seeding import step_generator

from .judge import look_of_prompt
from .renders import shape_of, textured_render
from .routes import ROUTES, Objective
from .runs import Interrupted, Monitor
from .teacher import Model, Prompts, load_prior

# What is measured: the gradient at the latents, what the encoder makes of it, what it makes of white noise of the same size (its own
# share in the tail), and what each rule leaves.
RAW, LATENT, NOISE = "raw", "latent", "noise"
AFTER = [route.name for route in ROUTES.values() if route.pullback == "vae" and route.rule != "none" and not route.adaptive]


def tail_numbers(norms: Tensor, maps: Tensor | None = None) -> dict[str, float]:
    """p50, p99, p99.9 and maximum of norms (N,) (zeros left out), their kurtosis, and max / p50; with `maps` (B, H, W), the share of
    isolated outliers among all pixels."""
    norms = norms[norms > 0]
    if not len(norms):
        return {"p50": 0.0, "p99": 0.0, "p99.9": 0.0, "max": 0.0, "kurtosis": 0.0, "max/p50": 0.0, "isolated": 0.0}
    p50, p99, p999, largest = np.quantile(norms.double().numpy(), [0.5, 0.99, 0.999, 1.0]).tolist()
    found = {"p50": p50, "p99": p99, "p99.9": p999, "max": largest, "kurtosis": kurtosis(norms), "max/p50": largest / p50}
    found["isolated"] = 0.0 if maps is None else float(isolated_outliers(maps).float().mean())
    return found


def tails_work(settings: dict[str, Any], folder: Path, monitor: Monitor) -> dict[str, Any]:
    """The unit of `gradient_lab.py tails`: one prior at one timestep. Writes norms.npz, the norms of each kind, float32.

    Every view is a render of the mesh over a flat background: textured by formula with the prompt's look where that is known, else mid
    grey.
    """
    model = Model(**settings["model"])
    prior, objective = load_prior(model), Objective.from_settings(settings["objective"])
    method = objective.start(prior)
    prompts = Prompts(model, settings["prompt"], settings["negative"])
    timestep, seed, size = settings["timestep"], settings["seed"], prior.image_size
    mesh, look = normalize(load_mesh(settings["mesh"])), look_of_prompt(settings["prompt"])
    shape = shape_of(mesh)
    maps: dict[str, list[Tensor]] = {}
    object_masks, nonfinite = [], 0
    for view in range(settings["views"]):
        if monitor.stopped():
            raise Interrupted
        # The same views at every timestep, so that timesteps alone differ.
        cameras = sample_cameras(1, generator=step_generator(seed, view, stream="cameras"), stratified_azimuth=False)
        background = torch.rand(3, generator=step_generator(seed, view, stream="background"))
        picture, mask = textured_render(mesh, shape, look, cameras, size, seed % 8, background)
        image = picture[None].to(model.device)
        object_masks.append(mask)
        latent_shape = (1, prior.latent_channels, prior.latent_size, prior.latent_size)
        noise = torch.randn(latent_shape, generator=step_generator(seed, view, stream=f"noise-{timestep}")).to(model.device)
        step = distill(
            image,
            prior,
            prompts.by_view(cameras.elevation_deg, cameras.azimuth_deg, model.device, separate_negative=method.separate_negative),
            rule=RULES["none"],
            threshold=objective.threshold,
            timesteps=torch.tensor([timestep], device=model.device),
            noise=noise,
            camera=cameras.c2w.to(model.device),
            generator=step_generator(seed, view, stream="method"),
            **objective.step_options(method),
        )
        gradient, raw = step.latent_gradient, step.raw
        white = torch.randn(latent_shape, generator=step_generator(seed, view, stream="white")).to(model.device)
        white = white * gradient.square().mean().sqrt()
        nonfinite += int(nonfinite_pixels(raw).sum())
        maps.setdefault(LATENT, []).append(pixel_norm(gradient, dim=1).cpu())
        maps.setdefault(RAW, []).append(pixel_norm(raw).cpu())
        maps.setdefault(NOISE, []).append(pixel_norm(pullback(white, image, prior.encode)).cpu())
        for name in AFTER:
            route = ROUTES[name]
            ruled = RULES[route.rule](raw, objective.threshold, norm=route.norm)
            maps.setdefault(name, []).append(pixel_norm(ruled).cpu())
        monitor.tick(1)
    method.close()
    joined = {kind: torch.cat(parts) for kind, parts in maps.items()}
    mask = torch.stack(object_masks)
    np.savez_compressed(folder / "norms.npz", **{kind: values.numpy() for kind, values in joined.items()})
    found: dict[str, Any] = {"nonfinite": nonfinite}
    for kind, values in joined.items():
        found[kind] = tail_numbers(values.flatten(), values)
        if kind in (RAW, NOISE):
            found[f"{kind}, object"] = tail_numbers(values[mask], None)
    return found
