import logging

import numpy as np
import pytest

SMALL_SHAPE = ("system.geometry.resolution=16", "system.geometry.shape_init_steps=60", "system.geometry.shape.max_resolution=16")


@pytest.fixture(autouse=True)
def messages_are_seen(monkeypatch):
    """caplog sees the package's messages, whatever a launcher that ran before in this process has set up."""
    logger = logging.getLogger("threestudio_pgc")
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(logger, "level", logging.INFO)


@pytest.fixture(scope="session")
def disc(tmp_path_factory):
    """A picture of a red disc on a transparent background."""
    from PIL import Image

    y, x = np.mgrid[:64, :64] - 31.5
    inside = (x**2 + y**2 < 24**2)[..., None]
    path = tmp_path_factory.mktemp("picture") / "disc.png"
    Image.fromarray((inside * np.array([200, 40, 40, 255])).astype(np.uint8), "RGBA").save(path)
    return path


@pytest.fixture(scope="session")
def launch(tiny_sdxl, tiny_controlnet):
    """launch(mode, folder, *overrides, config=...) -> exit code: a shipped pocket config through the launcher, with tiny models."""
    from pathlib import Path

    from threestudio_pgc.standalone.launcher import main

    def run(mode, folder, *overrides, config="fantasia3d-pocket-pgc"):
        import threestudio_pgc.modules  # noqa: F401  registers the parts once

        path = Path(__file__).resolve().parents[2] / "configs" / f"{config}.yaml"
        moving = "joint" in config or "geometry" in config
        return main(
            [
                *("--config", str(path), f"--{mode}", "--gpu", "none"),
                *(f"exp_root_dir={folder}", "use_timestamp=false", "tag=t", "name=n"),
                f"system.guidance.pretrained_model_name_or_path={tiny_sdxl}",
                *(("system.normal_guidance.unet_name_or_path=null", *SMALL_SHAPE) if moving else ()),
                *(() if moving else (f"system.guidance.controlnet_name_or_path={tiny_controlnet}",)),
                f"system.prompt_processor.cache_dir={folder}/prompts",
                "system.prompt_processor.prompt=a zebra vase",
                *("data.height=32", "data.width=32", "data.batch_size=2", "data.eval_height=32", "data.eval_width=32"),
                *("data.n_test_views=4", "trainer.max_steps=4", "trainer.val_check_interval=2", "checkpoint.every_n_train_steps=2"),
                *("trainer.log_every_n_steps=1", "system.exporter.texture_size=128"),
                *overrides,
            ]
        )

    return run
