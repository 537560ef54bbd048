"""What is seen where the object is not."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..host import BaseBackground, register
from ..scene.backgrounds import BACKGROUNDS, SolidBackground
from .randomness import step_generator


@register("pgc-background")
class Background(BaseBackground):
    """Config:
    kind: "solid"; "random", a flat colour per view and step in training, `color` in evaluation; "image".
    color: [r, g, b] in [0, 1].
    image: path of the picture, for kind "image".
    """

    @dataclass
    class Config(BaseBackground.Config):
        kind: str = "random"
        color: Any = field(default_factory=lambda: [1.0, 1.0, 1.0])
        image: Any = None

    cfg: Config

    def configure(self) -> None:
        kind = self.cfg.kind
        if kind not in BACKGROUNDS:
            raise ValueError(f"system.background.kind: found {kind!r}, wanted one of {', '.join(BACKGROUNDS)}")
        if (kind == "image") != (self.cfg.image is not None):
            raise ValueError(
                f"system.background.image: found {self.cfg.image!r} with kind {kind!r}; wanted a path with kind 'image', else null"
            )
        self._solid = SolidBackground(tuple(self.cfg.color))
        self._training = {"solid": lambda: self._solid, "image": lambda: BACKGROUNDS["image"](self.cfg.image)}.get(
            kind, BACKGROUNDS[kind]
        )()
        self._step = 0

    def update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        self._step = global_step

    def forward(self, dirs: Tensor) -> Tensor:
        """(B, H, W, 3) viewing directions, read for their shape only -> (B, H, W, 3) in [0, 1]."""
        random = self.cfg.kind == "random"
        kind = self._solid if random and not self.training else self._training
        generator = step_generator("background", self._step) if random else None
        return kind(*dirs.shape[:3], generator=generator, device=dirs.device)
