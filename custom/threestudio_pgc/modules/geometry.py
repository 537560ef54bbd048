"""A fixed mesh with a texture field on its surface."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..host import BaseExplicitGeometry, BaseGeometry, Mesh, get_seed, info, register, warn
from ..scene.fields import HashGridField, field_config
from ..scene.initial import fit_texture
from ..scene.mesh import Similarity, TriangleMesh, load_mesh, normalize
from ..scene.mesh_colors import SurfaceColors, surface_colors

# What a checkpoint keeps of a mesh that came from no file: tensors of TriangleMesh, and the fields of its `frame`.
_STORED = ("vertices", "faces", "uvs", "uv_faces")
_FRAME = ("rotation", "scale", "offset")


class TexturedSurface(BaseExplicitGeometry):
    """What the geometries of this package have in common: a `triangle_mesh()`, and a texture field on it.

    A subclass sets `texture`, None for none, and `_colors`, what the texture may start from.
    """

    texture: HashGridField | None
    _colors: SurfaceColors | None = None

    def triangle_mesh(self) -> TriangleMesh:
        raise NotImplementedError

    def isosurface(self) -> Mesh:
        """The surface as the host's type, for the host's own renderers and exporters."""
        mesh = self.triangle_mesh()
        return Mesh(v_pos=mesh.vertices, t_pos_idx=mesh.faces)

    def initialize_texture(self, to_color: Callable[[Tensor], Tensor]) -> None:
        """With `texture_init`: fit the texture to the mesh's own colours; `to_color` is the material's way from features to RGB."""
        if self._colors is not None:
            error = fit_texture(self.texture, to_color, self._colors, seed=get_seed())
            info(f"Texture: starting from the mesh's own colours, RMS error {error:.3f}")

    def forward(self, points: Tensor, output_normal: bool = False) -> dict[str, Tensor]:
        """(*N, 3) points on the surface -> {"features": (*N, F)}; zeros, which are grey, where there is no texture.

        Normals come from the mesh; `output_normal` is the host's signature.
        """
        if output_normal:
            raise NotImplementedError(f"{type(self).__name__} takes normals from the mesh, not from the field")
        if self.texture is None:
            return {"features": points.new_zeros(*points.shape[:-1], 3)}
        return {"features": self.texture(points.reshape(-1, 3)).view(*points.shape[:-1], -1)}

    @torch.no_grad()
    def export(self, points: Tensor, **kwargs) -> dict[str, Tensor]:
        return self(points)


@register("pgc-textured-mesh")
class TexturedMesh(TexturedSurface):
    """The paper's texture stage: the mesh stays, a multi-resolution hash grid and an MLP give each surface point its features.

    The mesh comes from a file, or from an earlier stage by `system.geometry_convert_from`. Checkpoints hold the latter, so that neither the
    earlier stage nor the conversion is needed any more; a file is read again.

    Config:
        mesh: path of any mesh trimesh reads, or `builtin:NAME` (bunny, teapot, vase, knot, lettered). Not read where an earlier stage's is
            taken over; may be null then.
        up: axis that points up in the file, "y" or "z"; null takes the format's own (y for glTF, z otherwise).
        extent: the mesh is centred and scaled into [-extent, extent]^3, never mirrored; export undoes it.
        max_faces: refuse larger meshes.
        texture: size of the field: `preset` ("reference", "fantasia3d", "pocket") and any field of `FieldConfig` to override.
        texture_init: start from the colours of the file: vertex colours, or the picture through the file's texture coordinates.
    """

    @dataclass
    class Config(BaseExplicitGeometry.Config):
        mesh: str | None = "builtin:bunny"
        up: Any = None
        extent: float = 0.8
        max_faces: int = 1_000_000
        texture: dict = field(default_factory=lambda: {"preset": "reference"})
        texture_init: bool = False

    cfg: Config

    def configure(self, mesh: TriangleMesh | None = None) -> None:
        """`mesh`: one in the normalised frame, taken in place of the file."""
        super().configure()
        self._mesh, self._taken_over = mesh, mesh is not None
        if self._mesh is None and self.cfg.mesh is not None:
            self._mesh = normalize(load_mesh(self.cfg.mesh, max_faces=self.cfg.max_faces, up=self.cfg.up), self.cfg.extent)
        self.texture = HashGridField(field_config(**dict(self.cfg.texture)))
        if self.cfg.texture_init:
            self._colors = None if self._mesh is None else surface_colors(self._mesh)
            if self._colors is None:
                raise ValueError(f"system.geometry.texture_init: found true, wanted false: {self.cfg.mesh} has no colours of its own")
        if self._mesh is not None:
            name = "of the earlier stage" if self._taken_over else self.cfg.mesh
            info(f"Mesh {name}: {len(self._mesh.vertices)} vertices, {len(self._mesh.faces)} faces")

    @staticmethod
    def create_from(other: BaseGeometry, cfg: Any = None, copy_net: bool = False, **kwargs) -> "TexturedMesh":
        """The surface of another geometry where it stands, in the frame the other one exports it in. What `geometry_convert_from` calls.

        Args:
            copy_net: start from the other's texture as well, where its field is of the same size; else warn.

        Raises:
            ValueError: the other has no surface, or not a finite one.
        """
        mesh = _copied_surface(other)
        if len(mesh.faces) == 0:
            raise ValueError(f"the {type(other).__name__} to convert has no faces, wanted at least one triangle")
        bad = int((~mesh.vertices.isfinite()).any(-1).sum())
        if bad:
            raise ValueError(f"the {type(other).__name__} to convert has {bad} vertices that are not finite, wanted none")
        geometry = TexturedMesh(cfg, mesh)
        if copy_net:
            texture = getattr(other, "texture", None)
            if isinstance(texture, HashGridField) and _sizes(texture) == _sizes(geometry.texture):
                geometry.texture.load_state_dict(texture.state_dict())
            else:
                warn(
                    f"system.geometry_convert_inherit_texture: the {type(other).__name__} has no texture field of the size that "
                    f"system.geometry.texture asks for; the texture starts anew"
                )
        return geometry

    def initialize_shape(self) -> None:
        """Nothing to fit; refuses a shape that is missing."""
        self.triangle_mesh()

    def triangle_mesh(self) -> TriangleMesh:
        """The normalised mesh, on the field's device. Raises ValueError if there is none."""
        if self._mesh is None:
            raise ValueError(
                "system.geometry.mesh: found null, wanted a mesh file or builtin:NAME; it may be null only where "
                "system.geometry_convert_from or a checkpoint brings the mesh"
            )
        device = next(self.texture.parameters()).device
        if self._mesh.vertices.device != device:
            self._mesh = self._mesh.to(device)
        return self._mesh

    # Not buffers: Lightning's half precisions would round them, and a mesh from a file would fill every checkpoint.
    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._taken_over:
            for name in _STORED:
                tensor = getattr(self._mesh, name)
                if tensor is not None:
                    destination[f"{prefix}mesh.{name}"] = tensor
            for name in _FRAME:
                destination[f"{prefix}mesh.{name}"] = torch.as_tensor(getattr(self._mesh.frame, name), dtype=torch.float64)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args) -> None:
        stored = {name: state_dict.pop(f"{prefix}mesh.{name}", None) for name in _STORED}
        if stored["vertices"] is not None:
            rotation, scale, offset = (state_dict.pop(f"{prefix}mesh.{name}").cpu().numpy() for name in _FRAME)
            self._mesh, self._taken_over = TriangleMesh(**stored, frame=Similarity(rotation, float(scale), offset)), True
            info(f"Mesh of the checkpoint: {len(self._mesh.vertices)} vertices, {len(self._mesh.faces)} faces")
        elif self._mesh is None:
            _, _, missing_keys, *_ = args
            missing_keys.append(f"{prefix}mesh.vertices")
        super()._load_from_state_dict(state_dict, prefix, *args)


def surface_of(geometry: Any) -> TriangleMesh:
    """The surface that is rendered: of a geometry of this package, or of any of the host's with an `isosurface`. Raises ValueError for one
    without either."""
    if hasattr(geometry, "triangle_mesh"):
        return geometry.triangle_mesh()
    if not hasattr(geometry, "isosurface"):
        raise ValueError(
            f"system.geometry_type: found {type(geometry).__name__}, wanted one with a surface: a triangle_mesh or an isosurface"
        )
    mesh = geometry.isosurface()
    return TriangleMesh(mesh.v_pos, mesh.t_pos_idx.long())


def surface_to_export(geometry: Any) -> TriangleMesh:
    """The surface that goes into a file, in the frame and with the texture coordinates that it came with."""
    return geometry.export_mesh() if hasattr(geometry, "export_mesh") else surface_of(geometry)


@torch.no_grad()
def _copied_surface(other: Any) -> TriangleMesh:
    # Copies: the earlier geometry may keep what it gave, and goes away.
    mesh = surface_to_export(other)
    parts = {name: getattr(mesh, name) for name in _STORED if getattr(mesh, name) is not None}
    return TriangleMesh(**{name: part.detach().clone() for name, part in parts.items()}, frame=mesh.frame)


def _sizes(field: HashGridField) -> tuple:
    """What two fields must share for the weights of one to give the same features in the other."""
    return replace(field.config, backend=""), {name: value.shape for name, value in field.state_dict().items()}
