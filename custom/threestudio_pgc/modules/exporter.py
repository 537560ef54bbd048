"""Export of a textured mesh in the user's own frame: GLB and OBJ with a baked albedo."""

from dataclasses import dataclass, field
from typing import Any

from ..host import Exporter, ExporterOutput, register


@register("pgc-mesh-exporter")
class MeshExporter(Exporter):
    """Config:
    formats: any of "glb" and "obj".
    texture_size: side of the albedo picture in pixels.
    save_name: file name without suffix.
    """

    @dataclass
    class Config(Exporter.Config):
        formats: Any = field(default_factory=lambda: ["glb", "obj"])
        texture_size: int = 2048
        save_name: str = "model"

    cfg: Config

    def configure(self, geometry: Any, material: Any, background: Any) -> None:
        super().configure(geometry, material, background)
        unknown = set(self.cfg.formats) - {"glb", "obj"}
        if unknown:
            raise ValueError(f"system.exporter.formats: found {sorted(unknown)}, wanted any of ['glb', 'obj']")
        if not 64 <= self.cfg.texture_size <= 8192:
            raise ValueError(f"system.exporter.texture_size: found {self.cfg.texture_size}, wanted 64 to 8192")

    def __call__(self) -> list[ExporterOutput]:
        """One output, saved by the system's `save_textured_mesh`: baking and writing are one job, in the export room."""
        return [
            ExporterOutput(
                save_name=self.cfg.save_name,
                save_type="textured_mesh",
                params={
                    "mesh": self.geometry.triangle_mesh(),
                    "color": self._albedo,
                    "formats": tuple(self.cfg.formats),
                    "resolution": self.cfg.texture_size,
                },
            )
        ]

    def _albedo(self, points):
        """(N, 3) points in the normalised frame -> (N, 3) display RGB in [0, 1]."""
        return self.material.export(**self.geometry.export(points))["albedo"]
