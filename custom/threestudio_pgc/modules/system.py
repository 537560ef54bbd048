"""Fantasia3D's pipeline with a high-resolution prior: so far its texture stage, on a fixed mesh (paper, section 5.1)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..export.pictures import contact_sheet, heat_map, save_png
from ..export.textured_mesh import export_textured_mesh
from ..host import BaseLift3DSystem, find, info, register, warn
from ..scene.reference import LOSSES, reference_losses
from .guidance import BUFFERS

# Numbers of the guidance that the progress bar shows.
_BAR = {"share_clipped": "clipped"}


@register("pgc-fantasia3d-system")
class Fantasia3DSystem(BaseLift3DSystem):
    """Config:
    stage: "texture": the mesh is fixed, its texture field is optimised.
    contact_sheet_views: how many views of the final turntable go on the contact sheet.
    prompt_processor_type: may be left out for a guidance that takes no prompt.
    loss: lambda_<name> for every loss_<name> of the guidance. Where the data has a reference view also lambda_reference_rgb, _mask,
        _depth, _normal, see `scene.reference.reference_losses`; one that is not given is 0.
    """

    @dataclass
    class Config(BaseLift3DSystem.Config):
        stage: str = "texture"
        contact_sheet_views: int = 8
        prompt_processor_type: str = ""

    cfg: Config

    def configure(self) -> None:
        if self.cfg.stage != "texture":
            raise ValueError(f"system.stage: found {self.cfg.stage!r}, wanted 'texture'")
        if not self.cfg.prompt_processor_type and getattr(find(self.cfg.guidance_type), "needs_prompt", False):
            raise ValueError(f"system.prompt_processor_type: found nothing, wanted 'pgc-prompt-processor' for {self.cfg.guidance_type}")
        super().configure()
        self._check_reference_weights()

    def on_fit_start(self) -> None:
        super().on_fit_start()
        # Built and dropped: a mistake in the export's settings should not wait for the end of the training.
        find(self.cfg.exporter_type)(self.cfg.exporter, geometry=self.geometry, material=self.material, background=self.background)
        self._prompts = []
        if self.cfg.prompt_processor_type:
            self._prompts = [find(self.cfg.prompt_processor_type)(self.cfg.prompt_processor)()]
        self.guidance = find(self.cfg.guidance_type)(self.cfg.guidance)
        if self._guidance_state:
            self.guidance.load_run_state(self._guidance_state)

    # Lightning restores a checkpoint before on_fit_start, and evaluation restores one without a guidance: its state is kept here meanwhile.
    _guidance_state: dict[str, Any] | None = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        state = getattr(getattr(self, "guidance", None), "run_state", dict)()
        if state:
            checkpoint["pgc_guidance"] = state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._guidance_state = checkpoint.get("pgc_guidance")

    def _check_reference_weights(self) -> None:
        """A loss that cannot move anything is a mistake in the configuration."""
        if self.geometry.triangle_mesh().vertices.requires_grad:
            return
        for name in LOSSES:
            key = f"lambda_reference_{name}"
            if name != "rgb" and self.cfg.loss.get(key):
                raise ValueError(f"system.loss.{key}: found {self.cfg.loss[key]}, wanted 0: {self.cfg.geometry_type} has a fixed shape")

    def _reference_losses(self, reference: dict[str, Any]) -> dict[str, torch.Tensor]:
        weights = {name: self.C(self.cfg.loss.get(f"lambda_reference_{name}", 0.0)) for name in LOSSES}
        if not any(weights.values()):
            return {}
        losses = reference_losses(self(reference), reference, weights)
        return {f"loss_reference_{name}": value for name, value in losses.items()}

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        return self.renderer(**batch)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any] | None:
        batch = dict(batch)
        reference = batch.pop("reference", None)
        out = self(batch)
        buffers = {name: out[name] for name in BUFFERS}
        guided = self.guidance(out["comp_rgb"], *self._prompts, **batch, rgb_as_latents=False, **buffers)
        if reference is not None:
            guided |= self._reference_losses(reference)
        loss = 0.0
        for name, value in guided.items():
            if name.startswith("loss_"):
                loss = loss + value * self.C(self.cfg.loss[name.replace("loss_", "lambda_")])
            number = float(value.detach() if isinstance(value, torch.Tensor) else value)
            self.log(f"train/{name}", number)
            if name in _BAR:
                self.log(_BAR[name], number, prog_bar=True, logger=False)
        if guided.get("all_nonfinite"):
            warn(f"step {self.true_global_step}: every pixel's gradient was non-finite; the step is skipped")
            # Lightning cannot skip a step on one of several processes; there the loss is kept, and its gradient is zero.
            if self.trainer.world_size == 1:
                return None
        return {"loss": loss}

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        out = self(batch)
        for row, index in enumerate(batch["index"].tolist()):
            self.save_image_grid(
                f"it{self.true_global_step}-{index}.png",
                [
                    {"type": "rgb", "img": out["comp_rgb"][row], "kwargs": {"data_format": "HWC"}},
                    {"type": "rgb", "img": out["comp_normal"][row], "kwargs": {"data_format": "HWC", "data_range": (0, 1)}},
                    {"type": "grayscale", "img": out["opacity"][row, :, :, 0], "kwargs": {"cmap": None, "data_range": (0, 1)}},
                ],
                name="validation_step",
                step=self.true_global_step,
            )

    def on_validation_epoch_end(self) -> None:
        norms = getattr(getattr(self, "guidance", None), "last_norms", lambda: None)()
        if norms is not None:
            save_png(Path(self.get_save_path(f"it{self.true_global_step}-gradient.png")), contact_sheet(list(heat_map(norms)), len(norms)))
        controls = getattr(getattr(self, "guidance", None), "last_controls", list)()
        if controls:
            pictures = [picture for control in controls for picture in control.float().cpu().numpy()]
            save_png(Path(self.get_save_path(f"it{self.true_global_step}-control.png")), contact_sheet(pictures, len(controls[0])))

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        out = self(batch)
        for row, index in enumerate(batch["index"].tolist()):
            self.save_image_grid(
                f"it{self.true_global_step}-test/{index}.png",
                [{"type": "rgb", "img": out["comp_rgb"][row], "kwargs": {"data_format": "HWC"}}],
                name="test_step",
                step=self.true_global_step,
            )
        self._sheet = getattr(self, "_sheet", {})
        views = max(1, self.cfg.contact_sheet_views)
        count = len(self.trainer.test_dataloaders.dataset)
        kept = {round(view * count / views) for view in range(views)}
        self._sheet.update({i: out["comp_rgb"][row].cpu() for row, i in enumerate(batch["index"].tolist()) if i in kept})

    def on_test_epoch_end(self) -> None:
        name = f"it{self.true_global_step}-test"
        self.save_img_sequence(name, name, r"(\d+)\.png", save_format="mp4", fps=30, name="test", step=self.true_global_step)
        pictures = [self._sheet[index].clamp(0, 1).numpy() for index in sorted(self._sheet)]
        sheet = Path(self.get_save_path(f"{name}-sheet.png"))
        save_png(sheet, contact_sheet(pictures, columns=min(len(pictures), 4)))
        self._sheet = {}
        info(f"Turntable: {self.get_save_path(name + '.mp4')}")
        info(f"Contact sheet: {sheet}")

    @torch.no_grad()
    def save_textured_mesh(self, filename: str, mesh: Any, color: Any, formats: tuple[str, ...], resolution: int, **kwargs) -> list[str]:
        """What "textured_mesh" means to an exporter: `filename` without suffix, relative to the run's save folder."""
        target = Path(self.get_save_path(filename))
        paths = export_textured_mesh(mesh, color, target.parent, target.name, formats=formats, resolution=resolution)
        for kind, path in paths.items():
            info(f"{kind.upper()}: {path}")
        return [str(path) for path in paths.values()]
