"""Fields in space, of textures and shapes: a multi-resolution hash grid followed by a small MLP.

Mueller, Evans, Schied, Keller: "Instant Neural Graphics Primitives with a Multiresolution Hash Encoding", SIGGRAPH
2022, section 3. The plain torch path runs on any device and is what the fused paths (numba on a CPU, tiny-cuda-nn on
CUDA) are measured against.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

BACKENDS = ("auto", "torch", "numba", "tcnn")

# Factors of the spatial hash (eq. 4). That of x is 1, so that neighbours along x stay neighbours in memory.
PRIME_Y = 2654435761
PRIME_Z = 805459861


@dataclasses.dataclass(frozen=True)
class FieldConfig:
    """Size of a field.

    Attributes:
        n_levels: resolutions of the grid, L.
        n_features_per_level: features per lattice node and level, F.
        log2_hashmap_size: a level holds at most 2**log2_hashmap_size nodes; a finer lattice is hashed into that many.
        base_resolution: lattice nodes per axis at the coarsest level.
        max_resolution: lattice nodes per axis at the finest level; those between grow geometrically.
        bound: the field lives in [-bound, bound]^3; points outside read the nearest point of its surface.
        hidden_width, hidden_layers, bias: the MLP between the L*F grid features and the output, ReLU after each hidden
            layer.
        n_output: features returned per point, C.
        gain: what the grid features are multiplied by before the MLP. Adam moves a node by about its learning rate per step whatever
            the gradient, so this sets how fast a pattern can grow against the mean colour, which the MLP's bias carries.
        backend: "auto" (the fastest that is present), "torch", "numba" (CPU) or "tcnn" (CUDA).
    """

    n_levels: int = 16
    n_features_per_level: int = 2
    log2_hashmap_size: int = 19
    base_resolution: int = 16
    max_resolution: int = 4096
    bound: float = 1.0
    hidden_width: int = 32
    hidden_layers: int = 1
    bias: bool = True
    n_output: int = 3
    gain: float = 1.0
    backend: str = "auto"


FIELD_PRESETS: dict[str, FieldConfig] = {
    # The PGC authors' texture field: 3.64 M parameters.
    "reference": FieldConfig(n_levels=16, n_features_per_level=4, log2_hashmap_size=16, hidden_layers=1, bias=True),
    # Fantasia3D's (and nvdiffrec's) texture field: 12.6 M parameters.
    "fantasia3d": FieldConfig(n_levels=16, n_features_per_level=2, log2_hashmap_size=19, hidden_layers=2, bias=False),
    # For 128-pixel views on one CPU core: the finest cell is about half a pixel, each level's table fits in the cache. The gain is
    # for runs of a few hundred steps, in which without it the mean colour is learnt and the pattern is not.
    "pocket": FieldConfig(n_levels=8, n_features_per_level=2, log2_hashmap_size=16, base_resolution=8, max_resolution=256, gain=10.0),
}


def field_config(preset: str = "reference", **overrides) -> FieldConfig:
    """The preset of that name with some entries replaced.

    Raises:
        ValueError: for an unknown preset or entry, naming the nearest known one.
    """
    if preset not in FIELD_PRESETS:
        raise ValueError(f"field preset: found {preset!r}, wanted one of {', '.join(FIELD_PRESETS)}{_nearest(preset, FIELD_PRESETS)}")
    known = [field.name for field in dataclasses.fields(FieldConfig)]
    for key in overrides:
        if key not in known:
            raise ValueError(f"field config: unknown key {key!r}, wanted one of {', '.join(known)}{_nearest(key, known)}")
    return dataclasses.replace(FIELD_PRESETS[preset], **overrides)


def _nearest(name: str, known) -> str:
    match = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""


class HashGridEncoding(nn.Module):
    """Multi-resolution hash grid: trilinear interpolation of learnt features on L lattices of growing resolution.

    Level l has N_l = ceil(N_min * b^l) nodes per axis, b = (N_max / N_min)^(1 / (L - 1)) (eq. 2 and 3), the outermost
    ones on the faces of the cube. A lattice that fits the table is stored densely, a finer one through the spatial hash
    of eq. 4. `table` is (sum of nodes, F), level after level. With tiny-cuda-nn the table is that library's own, and a
    checkpoint of the one does not load into the other.

    Raises:
        ValueError: for an argument out of range or a backend that is unknown or absent, naming it.
    """

    def __init__(
        self,
        n_levels: int = 16,
        n_features_per_level: int = 2,
        log2_hashmap_size: int = 19,
        base_resolution: int = 16,
        max_resolution: int = 4096,
        bound: float = 1.0,
        backend: str = "auto",
    ):
        super().__init__()
        _require(backend in BACKENDS, "backend", backend, f"one of {', '.join(BACKENDS)}")
        _require(n_levels >= 1, "n_levels", n_levels, "at least 1")
        _require(n_features_per_level >= 1, "n_features_per_level", n_features_per_level, "at least 1")
        _require(3 <= log2_hashmap_size <= 28, "log2_hashmap_size", log2_hashmap_size, "3 to 28")
        _require(base_resolution >= 2, "base_resolution", base_resolution, "at least 2")
        _require(
            max_resolution >= base_resolution,
            "max_resolution",
            max_resolution,
            f"at least base_resolution ({base_resolution})",
        )
        _require(bound > 0, "bound", bound, "a positive number")
        self.n_levels = n_levels
        self.n_features_per_level = n_features_per_level
        self.n_output = n_levels * n_features_per_level
        self.bound = float(bound)
        self.backend = backend

        self.per_level_scale = (max_resolution / base_resolution) ** (1 / max(n_levels - 1, 1))
        # The small number keeps 16 * b^15 = 4096.0000001 from becoming 4097.
        resolutions = [math.ceil(base_resolution * self.per_level_scale**level - 1e-6) for level in range(n_levels)]
        hashmap_size = 2**log2_hashmap_size
        sizes = [min(resolution**3, hashmap_size) for resolution in resolutions]
        offsets = [0, *itertools.accumulate(sizes)]
        self.register_buffer("resolutions", torch.tensor(resolutions), persistent=False)
        self.register_buffer("offsets", torch.tensor(offsets), persistent=False)
        self._levels = list(zip(resolutions, offsets[:-1], sizes))

        self.tcnn = None
        if backend == "tcnn" or (backend == "auto" and torch.cuda.is_available() and _tcnn_present()):
            self.tcnn = self._make_tcnn(log2_hashmap_size, base_resolution)
        else:
            self.table = nn.Parameter(torch.empty(offsets[-1], n_features_per_level).uniform_(-1e-4, 1e-4))

    def forward(self, points: Tensor) -> Tensor:
        """Features of points, differentiable in the table and in the points; in either twice with the torch path only.

        Args:
            points: (N, 3) in [-bound, bound]; points outside are clamped to it, NaN counts as the lower bound.
        Returns:
            (N, L*F) in the table's dtype, level after level.
        """
        if self.tcnn is not None:
            if points.shape[0] == 0:
                return points.new_zeros(0, self.n_output)
            return self.tcnn(self._to_unit(points)).to(torch.float32)
        points = points.to(self.table.dtype)
        if self.backend == "torch" or not points.is_cpu:
            return self.forward_torch(points)
        return _FusedHashGrid.apply(points, self.table, self.resolutions, self.offsets, self.bound)

    def forward_torch(self, points: Tensor) -> Tensor:
        """The plain twin of the fused paths: same arguments and result, any device, differentiable any number of times."""
        unit = self._to_unit(points.to(self.table.dtype))
        return torch.cat([self._level(unit, *level) for level in self._levels], dim=-1)

    def _to_unit(self, points: Tensor) -> Tensor:
        return (points * (0.5 / self.bound) + 0.5).nan_to_num(nan=0.0).clamp(0.0, 1.0)

    def _level(self, unit: Tensor, resolution: int, offset: int, size: int) -> Tensor:
        scaled = unit * (resolution - 1)
        cell = scaled.detach().floor().clamp(max=resolution - 2)
        fraction = scaled - cell
        x0, y0, z0 = cell.long().unbind(-1)
        weights = 1 - fraction, fraction
        features = 0.0
        for i, j, k in itertools.product((0, 1), repeat=3):
            weight = weights[i][:, 0:1] * weights[j][:, 1:2] * weights[k][:, 2:3]
            x, y, z = x0 + i, y0 + j, z0 + k
            if size == resolution**3:
                index = x + resolution * (y + resolution * z)
            else:
                index = (x ^ (y * PRIME_Y) ^ (z * PRIME_Z)) % size
            features = features + weight * self.table[index + offset]
        return features

    def _make_tcnn(self, log2_hashmap_size: int, base_resolution: int) -> nn.Module:
        try:
            import tinycudann
        except (ImportError, OSError) as error:  # it raises OSError where no CUDA device is found
            raise ValueError(f"field backend: found 'tcnn', but tinycudann cannot be imported ({error}); wanted torch or numba") from error
        return tinycudann.Encoding(
            3,
            {
                "otype": "HashGrid",
                "n_levels": self.n_levels,
                "n_features_per_level": self.n_features_per_level,
                "log2_hashmap_size": log2_hashmap_size,
                "base_resolution": base_resolution,
                "per_level_scale": self.per_level_scale,
            },
            dtype=torch.float32,
        )

    def extra_repr(self) -> str:
        nodes = f"{self._levels[0][0]} -> {self._levels[-1][0]} nodes"
        return f"{self.n_levels} levels x {self.n_features_per_level} features, {nodes}, backend={self.backend}"


class HashGridField(nn.Module):
    """Hash grid followed by an MLP: points -> raw features, to be read by a material, or as a signed distance and a deformation."""

    def __init__(self, config: FieldConfig | None = None):
        super().__init__()
        config = config or FIELD_PRESETS["reference"]
        _require(config.hidden_layers >= 0, "hidden_layers", config.hidden_layers, "at least 0")
        _require(config.hidden_width >= 1, "hidden_width", config.hidden_width, "at least 1")
        _require(config.n_output >= 1, "n_output", config.n_output, "at least 1")
        _require(config.gain > 0, "gain", config.gain, "a positive number")
        self.config = config
        self.encoding = HashGridEncoding(
            config.n_levels,
            config.n_features_per_level,
            config.log2_hashmap_size,
            config.base_resolution,
            config.max_resolution,
            config.bound,
            config.backend,
        )
        widths = [self.encoding.n_output, *[config.hidden_width] * config.hidden_layers, config.n_output]
        layers: list[nn.Module] = []
        for wide, narrow in itertools.pairwise(widths):
            layers += [nn.Linear(wide, narrow, bias=config.bias), nn.ReLU()]
        self.mlp = nn.Sequential(*layers[:-1])

    @classmethod
    def from_preset(cls, preset: str = "reference", **overrides) -> HashGridField:
        """A field sized by `field_config(preset, **overrides)`."""
        return cls(field_config(preset, **overrides))

    def forward(self, points: Tensor) -> Tensor:
        """Raw features, unbounded, float32 (or the field's dtype).

        Args:
            points: (N, 3) in [-bound, bound], N may be 0; see HashGridEncoding.forward for points outside.
        Returns:
            (N, C)
        """
        return self.mlp(self.encoding(points) * self.config.gain)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by part, {"encoding": [...], "mlp": [...]}: the grid usually learns ten times as fast as the MLP."""
        return {"encoding": list(self.encoding.parameters()), "mlp": list(self.mlp.parameters())}


@torch.no_grad()
def evaluate_in_chunks(
    function: Callable[[Tensor], Tensor],
    points: Tensor,
    *,
    chunk: int = 2**16,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """function(points) a few rows at a time, without gradients.

    Args:
        function: (n, 3) -> (n, C)
        points: (N, 3)
        chunk: rows per call; memory grows with it.
        progress: called as progress(rows done, N) after each chunk.
    Returns:
        (N, C); for N = 0 whatever function returns for (0, 3).
    """
    if chunk < 1:
        raise ValueError(f"chunk: found {chunk}, wanted at least 1")
    if points.shape[0] == 0:
        return function(points)
    result = None
    for start in range(0, points.shape[0], chunk):
        part = function(points[start : start + chunk])
        if result is None:
            result = part.new_empty(points.shape[0], *part.shape[1:])
        result[start : start + chunk] = part
        if progress is not None:
            progress(min(start + chunk, points.shape[0]), points.shape[0])
    return result


def _require(condition: bool, key: str, found, wanted: str) -> None:
    if not condition:
        raise ValueError(f"field {key}: found {found!r}, wanted {wanted}")


def _tcnn_present() -> bool:
    return importlib.util.find_spec("tinycudann") is not None


class _FusedHashGrid(torch.autograd.Function):
    """All levels of the grid in one compiled loop, the gradients of table and points in one each. CPU."""

    @staticmethod
    def forward(ctx, points, table, resolutions, offsets, bound):
        points_, table_ = points.detach().contiguous(), table.detach().contiguous()
        ctx.save_for_backward(points_, table, resolutions, offsets)
        ctx.bound = bound
        features = table_.shape[1]
        output = table_.new_empty(points.shape[0], resolutions.shape[0] * features)
        if points.shape[0]:
            from .field_kernels import hash_grid_kernels  # compiled code: not wanted where only the torch path is

            forward, _, _ = hash_grid_kernels(features)
            forward(points_.numpy(), table_.numpy(), resolutions.numpy(), offsets.numpy(), 0.5 / bound, output.numpy())
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        points, table, resolutions, offsets = ctx.saved_tensors
        to_points, to_table, *_ = ctx.needs_input_grad
        grad_points = torch.zeros_like(points) if to_points else None
        grad_table = torch.zeros(table.shape, dtype=table.dtype) if to_table else None
        if points.shape[0]:
            from .field_kernels import hash_grid_kernels

            _, backward, backward_points = hash_grid_kernels(table.shape[1])
            grad = grad_output.contiguous().numpy()
            grid = resolutions.numpy(), offsets.numpy(), 0.5 / ctx.bound
            if to_table:
                backward(points.numpy(), grad, *grid, grad_table.numpy())
            if to_points:
                backward_points(points.numpy(), table.detach().contiguous().numpy(), grad, *grid, grad_points.numpy())
        return grad_points, grad_table, None, None, None
