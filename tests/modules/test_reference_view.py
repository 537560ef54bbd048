"""A reference view in training: the picture's side of the object comes to look like the picture, and the losses say so."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "zero123-pgc.yaml"


def picture(path, alpha=True):
    """A green square, on nothing or on black."""
    from PIL import Image

    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[12:52, 12:52] = (30, 180, 60, 255)
    Image.fromarray(rgba if alpha else rgba[..., :3]).save(path)
    return path


@pytest.fixture
def launch(tiny_models, tmp_path):
    def run(*overrides, image=None):
        import threestudio_pgc.modules  # noqa: F401  registers the parts once
        from threestudio_pgc.standalone.launcher import main

        image = picture(tmp_path / "square.png") if image is None else image
        return main(
            [
                *(
                    "--config",
                    str(CONFIG),
                    "--train",
                    "--gpu",
                    "none",
                    f"exp_root_dir={tmp_path}",
                    "use_timestamp=false",
                    "name=n",
                    "tag=t",
                ),
                *(f"data.image_path={image}", f"system.guidance.pretrained_model_name_or_path={tiny_models['zero123'][0]}"),
                *("data.height=32", "data.width=32", "data.batch_size=1", "data.eval_height=32", "data.eval_width=32"),
                *("data.n_test_views=1", "system.geometry.texture.preset=pocket", "trainer.log_every_n_steps=1"),
                *overrides,
            ]
        )

    return run


def test_the_reference_view_comes_to_look_like_its_picture(launch, tmp_path):
    assert launch("system.loss.lambda_sds=0.0", "trainer.max_steps=40", "trainer.val_check_interval=40") == 0
    (log,) = (tmp_path / "n" / "t").rglob("metrics.csv")
    losses = [float(row["train/loss_reference_rgb"]) for row in csv.DictReader(log.open()) if row.get("train/loss_reference_rgb")]
    assert len(losses) == 40 and losses[-1] < 0.3 * losses[0]


def test_a_reference_weight_of_zero_renders_no_reference(launch, tmp_path, monkeypatch):
    from threestudio_pgc.modules.system import Fantasia3DSystem

    forward, views = Fantasia3DSystem.forward, []
    seen = lambda self, batch, **kwargs: views.append(len(batch["c2w"])) or forward(self, batch, **kwargs)  # noqa: E731
    monkeypatch.setattr(Fantasia3DSystem, "forward", seen)
    small = ("trainer.max_steps=1", "trainer.val_check_interval=1")
    assert launch("system.loss.lambda_reference_rgb=0.0", *small) == 0
    without = len(views)
    assert launch(*small) == 0
    assert len(views) - without == without + 1


@pytest.mark.parametrize("name", ["mask", "depth", "normal"])
def test_a_loss_that_could_move_nothing_is_refused(launch, tmp_path, capsys, name):
    assert launch(f"system.loss.lambda_reference_{name}=1.0", "trainer.max_steps=1") != 0
    assert f"system.loss.lambda_reference_{name}: found 1.0, wanted 0: pgc-textured-mesh has a fixed shape" in capsys.readouterr().err


def test_on_a_shape_that_can_move_every_reference_loss_reaches_it():
    """What the renderer gives is differentiable in the vertices; the system's check asks for no more."""
    from threestudio_pgc.scene.cameras import look_at_cameras
    from threestudio_pgc.scene.gbuffer import render_gbuffer
    from threestudio_pgc.scene.mesh import load_mesh, normalize
    from threestudio_pgc.scene.raster import make_rasterizer
    from threestudio_pgc.scene.reference import reference_losses

    mesh = normalize(load_mesh("builtin:vase"))
    mesh.vertices.requires_grad_()
    buffers = render_gbuffer(mesh, look_at_cameras(0.0, 0.0, 2.9, 0.857), 32, 32, make_rasterizer("cpu", torch.device("cpu")))
    rendered = {"opacity": buffers.opacity, "depth": buffers.depth, "view_normal": buffers.view_normal}
    ramp = torch.linspace(0, 1, 32).view(1, 1, 32, 1).expand(1, 32, 32, 1)
    facing = torch.tensor([0.0, 0.0, 1.0]).expand(1, 32, 32, 3)
    reference = {"mask": (buffers.opacity > 0).float().detach(), "depth": ramp, "normal": facing}
    for name in ("depth", "normal"):
        (loss,) = reference_losses(rendered, reference, {name: 1.0}).values()
        (gradient,) = torch.autograd.grad(loss, mesh.vertices, retain_graph=True)
        assert torch.isfinite(gradient).all() and gradient.abs().max() > 0, name


def test_a_picture_without_alpha_is_refused_before_anything_is_loaded(launch, tmp_path, capsys):
    assert launch("trainer.max_steps=1", image=picture(tmp_path / "flat.png", alpha=False)) != 0
    told = capsys.readouterr().err
    assert "data.image_path" in told and "flat.png" in told and "transparent background" in told
