"""Fantasia3D's pipeline with a high-resolution prior: a shape from normals, a texture on a fixed mesh, or both at once (paper, 5.2)."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from ..export.pictures import contact_sheet, heat_map, save_png
from ..export.textured_mesh import export_textured_mesh
from ..host import BaseLift3DSystem, find, get_rank, info, load_module_weights, register, warn
from ..scene.marching_tetrahedra import SurfaceError
from ..scene.reference import LOSSES, reference_losses
from .guidance import BUFFERS
from .material import REGULARIZERS as MATERIAL_REGULARIZERS
from .randomness import step_generator
from .tetrahedral_shape import REGULARIZERS

# Numbers of the guidance that the progress bar shows.
_BAR = {"share_clipped": "clipped"}
# The system's guidances, and where a checkpoint keeps the state of each.
_GUIDANCES = {"guidance": "pgc_guidance", "normal_guidance": "pgc_normal_guidance"}
STAGES = ("texture", "geometry", "joint")
# How far from a point the maps are compared with its own, standard deviation; the authors' 0.01 of a cube of half width 1.
_NEARBY = 0.01


@register("pgc-fantasia3d-system")
class Fantasia3DSystem(BaseLift3DSystem):
    """Config:
    stage: "texture": the picture is distilled, into a texture on a fixed mesh or into a texture and the shape under it.
        "geometry": the picture of the shape's normals is, which a prior takes for a shaded object (Fantasia3D's first stage).
        "joint": both in one step, one after the other (the paper's second setting).
    latent_steps: of the geometry stage, the first so many steps with normals and mask, shrunk to the latents' size, in place of latents.
        For priors of four latent channels.
    normal_guidance: what of `guidance` is different for the normals of the geometry and joint stages, such as the guidance scale.
    export_after_training: write the files of `--export` when the last step is done.
    contact_sheet_views: how many views of the final turntable go on the contact sheet.
    prompt_processor_type: may be left out for a guidance that takes no prompt.
    loss: lambda_<name> for every loss_<name> of the guidance; lambda_normal_<name> for those of the normals in the joint stage, where a
        lambda_normal_sds of 0 leaves that guidance out. For a shape that moves lambda_normal_consistency, _laplacian, _eikonal and
        _sdf_entropy, see `scene.regularizers`. Where the data has a reference view lambda_reference_rgb, _mask, _depth and _normal, see
        `scene.reference.reference_losses`. For a material with maps lambda_base_color_smoothness and _material_smoothness, and for a light
        that is trained lambda_white_light. One of the latter three kinds that is not given is 0. Each is a number or a schedule.
    """

    @dataclass
    class Config(BaseLift3DSystem.Config):
        stage: str = "texture"
        latent_steps: int = 0
        normal_guidance: dict = field(default_factory=dict)
        export_after_training: bool = False
        contact_sheet_views: int = 8
        prompt_processor_type: str = ""

    cfg: Config

    def configure(self) -> None:
        stage = self.cfg.stage
        if stage not in STAGES:
            raise ValueError(f"system.stage: found {stage!r}, wanted one of {', '.join(STAGES)}")
        if self.cfg.latent_steps and stage != "geometry":
            raise ValueError(
                f"system.latent_steps: found {self.cfg.latent_steps}, wanted 0: it is the geometry stage's, not the {stage} stage's"
            )
        if self.cfg.normal_guidance and stage == "texture":
            raise ValueError("system.normal_guidance: found settings, wanted none: the texture stage distils no normals")
        if not self.cfg.prompt_processor_type and getattr(find(self.cfg.guidance_type), "needs_prompt", False):
            raise ValueError(f"system.prompt_processor_type: found nothing, wanted 'pgc-prompt-processor' for {self.cfg.guidance_type}")
        super().configure()
        if stage != "texture" and not self._shape_moves():
            raise ValueError(f"system.stage: found {stage!r}, wanted 'texture': {self.cfg.geometry_type} has a fixed shape")
        self._check_weights()
        self._check_material()
        if self._starts_anew() and hasattr(self.geometry, "read_initial_shape"):
            self.geometry.read_initial_shape()  # a mesh that cannot be read is found before anything is begun

    def _starts_anew(self) -> bool:
        """Whether no checkpoint gives the fields their values."""
        return not (self.resumed or self.cfg.weights or self.geometry.cfg.weights)

    def _check_material(self) -> None:
        texture, wanted = getattr(self.geometry, "texture", None), getattr(self.material, "n_features", None)
        found = getattr(getattr(texture, "config", None), "n_output", wanted)
        if wanted is not None and found != wanted:  # threestudio's own materials do not say
            raise ValueError(
                f"system.geometry.texture.n_output: found {found}, wanted {wanted}, the features that {self.cfg.material_type} reads"
            )
        for key in (f"lambda_{name}" for name in MATERIAL_REGULARIZERS):
            if self.cfg.loss.get(key) and not hasattr(self.material, "regularizer"):
                raise ValueError(f"system.loss.{key}: found {self.cfg.loss[key]}, wanted 0: {self.cfg.material_type} has no such maps")
        if self.cfg.loss.get("lambda_white_light") and not self.material.cfg.trainable_light:
            raise ValueError("system.loss.lambda_white_light: found a weight, wanted 0, or system.material.trainable_light=true")

    def _shape_moves(self) -> bool:
        return getattr(self.geometry, "shape_moves", False)

    def _check_weights(self) -> None:
        """A loss that cannot move anything, or has nothing to look at, is a mistake in the configuration."""
        if self.cfg.stage == "joint" and "lambda_normal_sds" not in self.cfg.loss:
            raise ValueError("system.loss.lambda_normal_sds: found nothing, wanted the weight of the normals, 0 for none")
        if self.cfg.stage == "geometry" and self.cfg.loss.get("lambda_reference_rgb"):
            raise ValueError(
                f"system.loss.lambda_reference_rgb: found {self.cfg.loss.lambda_reference_rgb}, wanted 0: the geometry stage has no colours"
            )
        if self._shape_moves():
            return
        for key in (*(f"lambda_{name}" for name in REGULARIZERS), *(f"lambda_reference_{name}" for name in LOSSES if name != "rgb")):
            if self.cfg.loss.get(key):
                raise ValueError(f"system.loss.{key}: found {self.cfg.loss[key]}, wanted 0: {self.cfg.geometry_type} has a fixed shape")

    def on_fit_start(self) -> None:
        super().on_fit_start()
        # Built and dropped: a mistake in the export's settings should not wait for the end of the training.
        self._make_exporter()
        if not self._shape_moves() and hasattr(self.geometry, "triangle_mesh"):
            self.geometry.triangle_mesh()  # a mesh that no file and no earlier stage brings is missed here
        self._prompts = []
        if self.cfg.prompt_processor_type:
            self._prompts = [find(self.cfg.prompt_processor_type)(self.cfg.prompt_processor)()]
        of_normals = {**self.cfg.guidance, **self.cfg.normal_guidance}
        self.guidance = find(self.cfg.guidance_type)(of_normals if self.cfg.stage == "geometry" else self.cfg.guidance)
        self.normal_guidance = None
        if self.cfg.stage == "joint" and self.cfg.loss.get("lambda_normal_sds") != 0:
            # The networks are the first one's as far as the settings that choose them are equal.
            self.normal_guidance = find(self.cfg.guidance_type)(of_normals, sharing=self.guidance, stream="normal-")
        for name in _GUIDANCES:
            if self._guidance_states.get(name):
                getattr(self, name).load_run_state(self._guidance_states[name])
        self._check_latent_steps()
        if self._starts_anew():
            self._initialize()

    def _initialize(self) -> None:
        """The fields' first values, where no checkpoint gives them."""
        if hasattr(self.geometry, "initialize_texture"):
            self.geometry.initialize_texture(lambda features: self.material.export(features=features)["albedo"])
        if not self.cfg.geometry_convert_from:
            self.geometry.initialize_shape()

    def _check_latent_steps(self) -> None:
        channels = getattr(self.guidance, "latent_shape", (0, 0, 4))[-1]
        if self.cfg.latent_steps and channels != 4:
            raise ValueError(
                f"system.latent_steps: found {self.cfg.latent_steps}, wanted 0: normals and mask are four channels, "
                f"this prior's latents have {channels}"
            )

    # Lightning restores a checkpoint before on_fit_start, and evaluation restores one without a guidance: its state is kept here meanwhile.
    _guidance_states: dict[str, dict[str, Any]] = {}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        for name, key in _GUIDANCES.items():
            state = getattr(getattr(self, name, None), "run_state", dict)()
            if state:
                checkpoint[key] = state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._guidance_states = {name: checkpoint[key] for name, key in _GUIDANCES.items() if key in checkpoint}

    def _reference_losses(self, reference: dict[str, Any]) -> dict[str, torch.Tensor]:
        weights = {name: self.C(self.cfg.loss.get(f"lambda_reference_{name}", 0.0)) for name in LOSSES}
        if not any(weights.values()):
            return {}
        losses = reference_losses(self(reference), reference, weights)
        return {f"loss_reference_{name}": value for name, value in losses.items()}

    def forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        colors, normals = self.cfg.stage != "geometry", self.cfg.stage != "texture"
        return self.renderer(**batch, render_rgb=colors, render_normal=normals, **kwargs)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any] | None:
        batch = dict(batch)
        reference = batch.pop("reference", None)
        try:
            out = self(batch)
        except SurfaceError as error:
            raise SurfaceError(f"step {self.true_global_step}: {error}. {self._last_good_checkpoint()}") from error
        buffers = {name: out[name] for name in BUFFERS if name in out}  # threestudio's own renderer gives less
        if self.cfg.stage == "geometry":
            guided = self._distil_normals(self.guidance, out, batch, buffers)
        else:
            guided = self.guidance(out["comp_rgb"], *self._prompts, **batch, rgb_as_latents=False, **buffers)
        if self.normal_guidance is not None:
            # The first guidance has done its backward pass through the encoder by now: only one of the two is in memory at a time.
            of_normals = self._distil_normals(self.normal_guidance, out, batch, buffers)
            guided |= {_normal_name(name): value for name, value in of_normals.items()}
        guided |= self._regularizers(out["mesh"]) | self._material_regularizers(out)
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
        if guided.get("all_nonfinite") and guided.get("normal_all_nonfinite", True):
            warn(f"step {self.true_global_step}: every pixel's gradient was non-finite; the step is skipped")
            # Lightning cannot skip a step on one of several processes; there the loss is kept, and its gradient is zero.
            if self.trainer.world_size == 1:
                return None
        return {"loss": loss}

    def _distil_normals(self, guidance: Any, out: dict[str, Any], batch: dict[str, Any], buffers: dict[str, Any]) -> dict[str, Any]:
        if self.true_global_step >= self.cfg.latent_steps:
            return guidance(out["normal_image"], *self._prompts, **batch, rgb_as_latents=False, **buffers)
        # Fantasia3D: (normal, mask) are four channels, as a latent has, and of much the same range.
        image = torch.cat([out["normal_image"] * 2 - 1, out["opacity"]], dim=-1)
        if hasattr(guidance, "latent_shape"):  # the host's guidances resize it themselves
            size = guidance.latent_shape[:2]
            image = F.interpolate(image.movedim(-1, 1), size, mode="bilinear", align_corners=False, antialias=True).movedim(1, -1)
        return guidance(image, *self._prompts, **batch, rgb_as_latents=True, **buffers)

    def _regularizers(self, mesh: Any) -> dict[str, torch.Tensor]:
        wanted = [name for name in REGULARIZERS if self.C(self.cfg.loss.get(f"lambda_{name}", 0.0))]
        return {f"loss_{name}": self.geometry.regularizer(name, mesh) for name in wanted}

    def _material_regularizers(self, out: dict[str, Any]) -> dict[str, torch.Tensor]:
        wanted = [name for name in MATERIAL_REGULARIZERS if self.C(self.cfg.loss.get(f"lambda_{name}", 0.0))]
        if not wanted or "features" not in out:
            return {}
        nearby = out["features"]
        if wanted != ["white_light"]:
            positions = out["positions"].detach()
            generator = step_generator("nearby", self.true_global_step, positions.device)
            offsets = _NEARBY * torch.randn(positions.shape, generator=generator, device=positions.device)
            nearby = self.geometry(positions + offsets)["features"]
        return {f"loss_{name}": self.material.regularizer(name, out["features"], nearby) for name in wanted}

    def _last_good_checkpoint(self) -> str:
        """A sentence naming the newest checkpoint whose shape has a surface."""
        callback = self.trainer.checkpoint_callback
        folder = Path(callback.dirpath) if callback is not None and callback.dirpath else None
        files = sorted(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime, reverse=True) if folder is not None else []
        for path in files:
            self.geometry.load_state_dict(load_module_weights(str(path), module_name="geometry", map_location="cpu")[0])
            try:
                self.geometry.export_mesh()
            except SurfaceError:
                continue
            return f"The last good checkpoint is {path}: start from it with system.weights={path} and a smaller learning rate of the shape"
        return "No checkpoint with a surface was saved before"

    def _make_exporter(self) -> Any:
        parts = {"geometry": self.geometry, "material": self.material, "background": self.background}
        return find(self.cfg.exporter_type)(self.cfg.exporter, **parts)

    def on_fit_end(self) -> None:
        if self.cfg.export_after_training and get_rank() == 0:
            for output in self._make_exporter()():
                getattr(self, f"save_{output.save_type}")(f"it{self.true_global_step}-export/{output.save_name}", **output.params)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        # Of a material that has more than a colour, its maps are shown too.
        out = self(batch, render_maps=getattr(self.material, "requires_normal", False))
        self._keep_for_sheet(out, batch)
        for row, index in enumerate(batch["index"].tolist()):
            pictures = self._pictures(out, row) + [picture[row] for picture in out.get("maps", {}).values()]
            self.save_image_grid(
                f"it{self.true_global_step}-{index}.png",
                [
                    *({"type": "rgb", "img": picture, "kwargs": {"data_format": "HWC"}} for picture in pictures),
                    {"type": "rgb", "img": out["comp_normal"][row], "kwargs": {"data_format": "HWC", "data_range": (0, 1)}},
                    {"type": "grayscale", "img": out["opacity"][row, :, :, 0], "kwargs": {"cmap": None, "data_range": (0, 1)}},
                ],
                name="validation_step",
                step=self.true_global_step,
            )

    def _pictures(self, out: dict[str, Any], row: int) -> list[torch.Tensor]:
        """What a stage shows of a view, (H, W, 3) each: the colours, and of a shape that moves the normals, without colours also clay."""
        if self.cfg.stage == "texture":
            return [out["comp_rgb"][row]]
        if self.cfg.stage == "joint":
            return [out["comp_rgb"][row], out["normal_image"][row]]
        opacity = out["opacity"][row]
        clay = 1 - opacity + opacity * (0.15 + 0.75 * out["view_normal"][row, :, :, 2:].clamp(min=0))
        return [out["normal_image"][row], clay.expand(-1, -1, 3)]

    def on_validation_epoch_end(self) -> None:
        step = self.true_global_step
        if len(self._sheet) > 1:  # with data.n_val_views of 1 the one picture is all there is
            self.save_img_sequence(f"it{step}-val", ".", rf"^it{step}-(\d+)\.png$", save_format="mp4", fps=30, name="val", step=step)
            self._save_sheet(f"it{step}-val")
        self._sheet = {}
        for name, prefix in zip(_GUIDANCES, ("", "normal-")):
            guidance, stem = getattr(self, name, None), f"it{self.true_global_step}-{prefix}"
            norms = getattr(guidance, "last_norms", lambda: None)()
            if norms is not None:
                save_png(Path(self.get_save_path(f"{stem}gradient.png")), contact_sheet(list(heat_map(norms)), len(norms)))
            controls = getattr(guidance, "last_controls", list)()
            if controls:
                pictures = [picture for control in controls for picture in control.float().cpu().numpy()]
                save_png(Path(self.get_save_path(f"{stem}control.png")), contact_sheet(pictures, len(controls[0])))

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        out = self(batch)
        for row, index in enumerate(batch["index"].tolist()):
            self.save_image_grid(
                f"it{self.true_global_step}-test/{index}.png",
                [{"type": "rgb", "img": picture, "kwargs": {"data_format": "HWC"}} for picture in self._pictures(out, row)],
                name="test_step",
                step=self.true_global_step,
            )
        self._keep_for_sheet(out, batch)

    def on_test_epoch_end(self) -> None:
        name = f"it{self.true_global_step}-test"
        self.save_img_sequence(name, name, r"(\d+)\.png", save_format="mp4", fps=30, name="test", step=self.true_global_step)
        sheet = self._save_sheet(name)
        self._sheet = {}
        info(f"Turntable: {self.get_save_path(name + '.mp4')}")
        info(f"Contact sheet: {sheet}")

    _sheet: dict[int, torch.Tensor] = {}

    def _keep_for_sheet(self, out: dict[str, Any], batch: dict[str, Any]) -> None:
        """Keep those of the batch's views that belong on the contact sheet, spread evenly over the turntable."""
        views, trainer = max(1, self.cfg.contact_sheet_views), self.trainer
        loader = (
            trainer.test_dataloaders if trainer.testing else trainer.predict_dataloaders if trainer.predicting else trainer.val_dataloaders
        )
        kept = {round(view * len(loader.dataset) / views) for view in range(views)}
        seen = {i: torch.cat(self._pictures(out, row), dim=1).cpu() for row, i in enumerate(batch["index"].tolist()) if i in kept}
        self._sheet = {**self._sheet, **seen}

    def _save_sheet(self, name: str) -> Path:
        pictures = [self._sheet[index].clamp(0, 1).numpy() for index in sorted(self._sheet)]
        return save_png(Path(self.get_save_path(f"{name}-sheet.png")), contact_sheet(pictures, columns=min(len(pictures), 4)))

    @torch.no_grad()
    def save_textured_mesh(self, filename: str, mesh: Any, maps: Any, options: dict[str, Any], **kwargs) -> list[str]:
        """What "textured_mesh" means to an exporter: `filename` without suffix, relative to the run's save folder."""
        target = Path(self.get_save_path(filename))
        with tqdm(total=1000, desc="Export", bar_format="{desc}{percentage:3.0f}% |{bar}| {elapsed}<{remaining}", leave=False) as bar:

            def report(stage: str, share: float) -> None:
                bar.set_description(f"Export, {stage}", refresh=False)
                bar.update(int(1000 * share) - bar.n)

            paths = export_textured_mesh(mesh, maps, target.parent, target.name, progress=report, **options)
        for kind, path in paths.items():
            info(f"{kind.upper()}: {path}")
        return [str(path) for path in paths.values()]


def _normal_name(name: str) -> str:
    """The name that a number of the normals' guidance has among all: loss_sds is loss_normal_sds, others begin with normal_."""
    return name.replace("loss_", "loss_normal_", 1) if name.startswith("loss_") else f"normal_{name}"
