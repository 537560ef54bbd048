"""A toy experiment through the real launcher: `python toy_run.py --config toy.yaml --train ...`.

The system fits a grid of colours to a target under noise drawn from all global generators, with cameras from a prefetched,
endless data set, so that everything that could differ after a resume would show in its parameters.
"""

import os
import random
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "custom"))

import numpy as np
import pytorch_lightning as pl
import torch

from threestudio_pgc import host
from threestudio_pgc.standalone.launcher import main


def load_parts() -> None:
    """Register the toy parts (a function, so that tests can import this file freely)."""

    @dataclass
    class Options:
        scale: float = 1.0
        depth: int = 2

    @dataclass
    class DataConfig:
        size: int = 4

    class Views(torch.utils.data.IterableDataset):
        def __init__(self, size: int, first: int = 0, count: int | None = None) -> None:
            self.size, self.first, self.count = size, first, count

        def __iter__(self):
            index = self.first
            while self.count is None or index < self.count:
                generator = host.step_generator(host.get_seed(), index, host.get_rank(), "cameras")
                yield {"index": index, "weights": torch.rand(self.size, generator=generator)}
                index += 1

    @host.register("toy-data")
    class ToyData(pl.LightningDataModule):
        Config = DataConfig

        def __init__(self, cfg) -> None:
            super().__init__()
            self.cfg = host.parse_structured(self.Config, cfg)

        def _loader(self, **kwargs):
            return torch.utils.data.DataLoader(Views(self.cfg.size, **kwargs), batch_size=None)

        def train_dataloader(self):
            return self._loader(first=self.trainer.fit_loop.total_batch_idx + 1)

        def val_dataloader(self):
            return self._loader(count=1)

        test_dataloader = predict_dataloader = lambda self: self._loader(count=3)

    @host.register("toy-geometry")
    class ToyGeometry(host.BaseExplicitGeometry):
        @dataclass
        class Config(host.BaseExplicitGeometry.Config):
            size: int = 4
            options: Options = field(default_factory=Options)

        def configure(self) -> None:
            super().configure()
            self.colours = torch.nn.Parameter(torch.randn(self.cfg.size))
            self.steps_seen = []

        def update_step(self, epoch, global_step, on_load_weights=False):
            self.steps_seen.append(global_step)

    for kind, base in (("material", host.BaseMaterial), ("background", host.BaseBackground), ("renderer", host.Rasterizer)):
        host.register(f"toy-{kind}")(type(f"Toy{kind.title()}", (base,), {}))

    @host.register("toy-guidance")
    class ToyGuidance(host.BaseObject):
        @dataclass
        class Config(host.BaseObject.Config):
            strength: float = 0.1
            seconds: float = 0.0

    @host.register("toy-prompts")
    class ToyPrompts(host.BaseObject):
        @dataclass
        class Config(host.BaseObject.Config):
            prompt: str = "???"

    @host.register("toy-exporter")
    class ToyExporter(host.Exporter):
        def __call__(self):
            colours = self.geometry.colours.detach()
            return [host.ExporterOutput("colours.json", "json", {"payload": {"colours": colours}})]

    @host.register("toy-system")
    class ToySystem(host.BaseLift3DSystem):
        def on_fit_start(self) -> None:
            super().on_fit_start()
            self.guidance = host.find(self.cfg.guidance_type)(self.cfg.guidance)
            torch.randn(7)  # loading a model draws numbers too

        def training_step(self, batch, batch_idx):
            if self.guidance.cfg.seconds:
                time.sleep(self.guidance.cfg.seconds)  # gives a test the time to press Ctrl-C
            if os.environ.get("TOY_KILL_AT") == str(self.true_global_step):
                os.kill(os.getpid(), signal.SIGKILL)
            noise = torch.randn_like(self.geometry.colours) + random.random() + float(np.random.rand())  # noqa: NPY002
            loss = (batch["weights"] * (self.geometry.colours - 0.5 + self.guidance.cfg.strength * noise) ** 2).sum()
            self.log("train/loss", loss)
            self.log("train/clipped", 0.25, prog_bar=True)
            return {"loss": loss * self.C(self.cfg.loss.lambda_sds)}

        def validation_step(self, batch, batch_idx):
            torch.rand(3)
            picture = self.geometry.colours.detach().sigmoid().view(1, -1, 1).expand(4, -1, 3)
            imgs = [{"type": "rgb", "img": picture, "kwargs": {"data_format": "HWC"}}]
            self.save_image_grid(f"it{self.true_global_step}-val.png", imgs, align=32, name="validation", step=self.true_global_step)

        def test_step(self, batch, batch_idx):
            picture = np.full((32, 33, 3), 80 * batch["index"], dtype=np.uint8)
            self.save_image(f"it{self.true_global_step}-test/{batch['index']}.png", picture)

        def on_test_epoch_end(self):
            folder = f"it{self.true_global_step}-test"
            self.save_img_sequence(folder, folder, r"(\d+)\.png", fps=3)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(load_parts=load_parts))
