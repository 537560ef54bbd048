"""Export of a textured mesh in the user's own frame: GLB and OBJ with a baked albedo."""

from dataclasses import dataclass, field, replace
from typing import Any

from ..export.fragments import check_min_share, remove_fragments
from ..host import Exporter, ExporterOutput, info, register


@register("pgc-mesh-exporter")
class MeshExporter(Exporter):
    """Config:
    formats: any of "glb" and "obj".
    texture_size: side of the albedo picture in pixels.
    min_fragment: leave out loose pieces of the surface whose area is below this share, in [0, 1), of the largest piece's.
    save_name: file name without suffix.
    """

    @dataclass
    class Config(Exporter.Config):
        formats: Any = field(default_factory=lambda: ["glb", "obj"])
        texture_size: int = 2048
        min_fragment: float = 0.0
        save_name: str = "model"

    cfg: Config

    def configure(self, geometry: Any, material: Any, background: Any) -> None:
        super().configure(geometry, material, background)
        unknown = set(self.cfg.formats) - {"glb", "obj"}
        if unknown:
            raise ValueError(f"system.exporter.formats: found {sorted(unknown)}, wanted any of ['glb', 'obj']")
        if not 64 <= self.cfg.texture_size <= 8192:
            raise ValueError(f"system.exporter.texture_size: found {self.cfg.texture_size}, wanted 64 to 8192")
        check_min_share(self.cfg.min_fragment, "system.exporter.min_fragment")

    def __call__(self) -> list[ExporterOutput]:
        """One output, saved by the system's `save_textured_mesh`: baking and writing are one job, in the export room."""
        return [
            ExporterOutput(
                save_name=self.cfg.save_name,
                save_type="textured_mesh",
                params={
                    "mesh": self._mesh(),
                    "color": self._albedo,
                    "formats": tuple(self.cfg.formats),
                    "resolution": self.cfg.texture_size,
                },
            )
        ]

    def _mesh(self) -> Any:
        """The surface as a plain mesh without a gradient, and without small fragments."""
        mesh = getattr(self.geometry, "export_mesh", self.geometry.triangle_mesh)()
        mesh, removed = remove_fragments(replace(mesh, vertices=mesh.vertices.detach()), self.cfg.min_fragment)
        if removed:
            info(f"Export: {removed} loose part(s) left out, each below {self.cfg.min_fragment:g} of the largest one's surface")
        return mesh

    def _albedo(self, points):
        """(N, 3) points in the normalised frame -> (N, 3) display RGB in [0, 1]."""
        return self.material.export(**self.geometry.export(points))["albedo"]
