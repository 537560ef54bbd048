"""Export of a textured mesh in the user's own frame: GLB and OBJ with baked maps."""

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ..export.fragments import check_min_share, remove_fragments
from ..export.maps import PRESETS
from ..export.pictures import PICTURE_SUFFIXES
from ..export.simplify import simplify
from ..export.textured_mesh import FORMATS
from ..host import Exporter, ExporterOutput, info, register
from .geometry import surface_to_export

# What a material calls its maps -> what the export room calls them. The first name is the host's.
_MAPS = {"albedo": "base_color", "shading_normal": "normal", **{name: name for name in ("occlusion", "roughness", "metallic")}}


@register("pgc-mesh-exporter")
class MeshExporter(Exporter):
    """Config:
    formats: any of "glb" and "obj".
    preset: how maps are packed into the pictures beside the mesh, and which way their normals' green points: "gltf", "unreal",
        "unity-hdrp", "blender". A GLB has glTF's packing whatever this is.
    texture_size: side of the pictures in texels.
    texture_samples: points averaged per texel, a square number.
    image_format, quality: "png", "webp" or "jpeg"; quality of the latter two, 1 to 100.
    unlit: viewers show the base colour as it is, without light (KHR_materials_unlit).
    min_fragment: leave out loose pieces of the surface whose area is below this share, in [0, 1), of the largest piece's.
    simplify: at most so many faces; null keeps all. Simplified meshes lose the user's texture coordinates.
    unwrap_seconds: what an unwrap may take before a faster one, with more seams, takes its place.
    save_name: file name without suffix.
    save_video: make the turntable and the contact sheet too.
    """

    @dataclass
    class Config(Exporter.Config):
        formats: Any = field(default_factory=lambda: ["glb", "obj"])
        preset: str = "gltf"
        texture_size: int = 2048
        texture_samples: int = 4
        image_format: str = "png"
        quality: int = 90
        unlit: bool = False
        min_fragment: float = 0.0
        simplify: Any = None
        unwrap_seconds: float = 300.0
        save_name: str = "model"
        save_video: bool = True

    cfg: Config

    def configure(self, geometry: Any, material: Any, background: Any) -> None:
        super().configure(geometry, material, background)
        cfg = self.cfg
        unknown = set(cfg.formats) - set(FORMATS)
        if unknown:
            raise ValueError(f"system.exporter.formats: found {sorted(unknown)}, wanted any of {list(FORMATS)}")
        for key, known in (("preset", PRESETS), ("image_format", PICTURE_SUFFIXES)):
            if cfg[key] not in known:
                raise ValueError(f"system.exporter.{key}: found {cfg[key]!r}, wanted one of {', '.join(known)}")
        for key, low, high in (("texture_size", 64, 8192), ("quality", 1, 100), ("unwrap_seconds", 1, float("inf"))):
            if not low <= cfg[key] <= high:
                raise ValueError(f"system.exporter.{key}: found {cfg[key]}, wanted {low} to {high}")
        if cfg.texture_samples not in (1, 4, 9, 16):
            raise ValueError(f"system.exporter.texture_samples: found {cfg.texture_samples}, wanted 1, 4, 9 or 16")
        if cfg.simplify is not None and (not isinstance(cfg.simplify, int) or cfg.simplify < 4):
            raise ValueError(f"system.exporter.simplify: found {cfg.simplify}, wanted null or at least 4 faces")
        check_min_share(cfg.min_fragment, "system.exporter.min_fragment")

    def __call__(self) -> list[ExporterOutput]:
        """One output, saved by the system's `save_textured_mesh`: baking and writing are one job, in the export room."""
        cfg = self.cfg
        options = {
            "formats": tuple(cfg.formats),
            "preset": cfg.preset,
            "resolution": cfg.texture_size,
            "samples": cfg.texture_samples,
            "image_format": cfg.image_format,
            "quality": cfg.quality,
            "unlit": cfg.unlit,
            "unwrap_seconds": cfg.unwrap_seconds,
        }
        params = {"mesh": self._mesh(), "maps": self._maps, "options": options}
        return [ExporterOutput(save_name=cfg.save_name, save_type="textured_mesh", params=params)]

    def _mesh(self) -> Any:
        """The surface as a plain mesh without a gradient, without small fragments, and simplified if that is wished."""
        mesh = surface_to_export(self.geometry)
        mesh, removed = remove_fragments(replace(mesh, vertices=mesh.vertices.detach()), self.cfg.min_fragment)
        if removed:
            info(f"Export: {removed} loose part(s) left out, each below {self.cfg.min_fragment:g} of the largest one's surface")
        if self.cfg.simplify is not None and len(mesh.faces) > self.cfg.simplify:
            before = len(mesh.faces)
            mesh = simplify(mesh, self.cfg.simplify)
            info(f"Export: {before} faces simplified to {len(mesh.faces)}")
        return mesh

    def _maps(self, points: Tensor, normals: Tensor) -> dict[str, Tensor]:
        """(N, 3) points and normals in the normalised frame -> what `export_textured_mesh` bakes."""
        found = self.material.export(**self.geometry.export(points), shading_normal=normals)
        return {_MAPS[name]: values for name, values in found.items() if name in _MAPS}
