"""Light from infinitely far away: an equirectangular picture of radiance, and its means over the lobes of rough surfaces.

World z is up. As in Blender, the picture's centre is the direction +x and azimuth, atan2(y, x), grows to its left; its top row is +z.
Karis: "Real Shading in Unreal Engine 4", SIGGRAPH 2013 course, gives the first half of the split sum, computed here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROUGHNESS_LEVELS = (0.0, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0)  # the first is the picture itself; linear interpolation between
RESOLUTIONS = (2, 256)
DEFAULT_RESOLUTION = 128
DEFAULT_TRAINABLE_RESOLUTION = 16
DARKEST = 1e-4  # radiance at which a trainable light starts where its picture is black, since its logarithm is what is learnt
NEAR_POLE = 1e-6  # distance from the axis, in units of the direction's length, below which all directions are the pole


def uv_of(directions: Tensor) -> tuple[Tensor, Tensor]:
    """Place in the picture of directions (..., 3): u (...) from the left, v (...) from the top, both in [0, 1].

    u = 1/2 - atan2(y, x) / 2 pi, v = atan2(sqrt(x^2 + y^2), z) / pi. The directions need not be of unit length. Gradients are finite
    everywhere; u is 1/2 at the poles.
    """
    x, y, z = directions.unbind(-1)
    squared = x * x + y * y
    at_pole = squared < NEAR_POLE**2
    # the inner `where`s keep the unused branch from dividing by zero, which would make the gradient NaN
    azimuth = torch.atan2(torch.where(at_pole, torch.zeros_like(y), y), torch.where(at_pole, torch.ones_like(x), x))
    polar = torch.atan2(squared.clamp(min=NEAR_POLE**2).sqrt(), z)
    return 0.5 - azimuth / (2 * math.pi), polar / math.pi


def direction_of(u: Tensor, v: Tensor) -> Tensor:
    """Unit direction (..., 3) of a place in the picture; the inverse of `uv_of`."""
    azimuth, polar = (0.5 - u) * (2 * math.pi), v * math.pi
    around = polar.sin()
    return torch.stack([around * azimuth.cos(), around * azimuth.sin(), polar.cos()], dim=-1)


def texel_directions(height: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Unit directions (H, 2H, 3) of the centres of a picture's texels, and the solid angles (H, 2H, 1) of the texels in steradian."""
    u = (torch.arange(2 * height, dtype=dtype) + 0.5) / (2 * height)
    v = (torch.arange(height, dtype=dtype) + 0.5) / height
    edges = (torch.arange(height + 1, dtype=dtype) * (math.pi / height)).cos()
    solid_angles = (edges[:-1] - edges[1:]) * (math.pi / height)  # a texel is pi / H wide
    return direction_of(*torch.broadcast_tensors(u, v[:, None])), solid_angles[:, None, None].expand(height, 2 * height, 1)


def cosine_weight(cosine: Tensor) -> Tensor:
    """Weight of light from `cosine` off the normal in the irradiance, unnormalised."""
    return cosine.clamp(min=0)


def ggx_weight(cosine: Tensor, alpha: float) -> Tensor:
    """Weight of light from `cosine` off the lobe's axis r, for n = v = r: D(h) n.l, unnormalised.

    The lobe sampled by D(h) n.h / (4 v.h) has the density D(h) / 4 there, and Karis weights its samples by n.l.
    """
    half_squared = (1 + cosine) / 2  # (n.h)^2: h is halfway between n and l
    return cosine.clamp(min=0) / (half_squared * (alpha**2 - 1) + 1) ** 2


def _lobe_spectra(height: int) -> Iterator[Tensor]:
    """Per lobe, the rough ones' and then the cosine's, its weights as (frequency H+1, row around H, row from H) float64.

    A lobe's weights depend on the two rows and on the difference of the columns alone, so the mean over it is a convolution along the
    rows, a product of Fourier transforms; that of the weights is real, since they are even. Weights carry the solid angle and sum to
    one, so that a uniform light stays uniform.
    """
    lobes = [functools.partial(ggx_weight, alpha=roughness**2) for roughness in ROUGHNESS_LEVELS[1:]]
    polar = (torch.arange(height, dtype=torch.float64) + 0.5) * (math.pi / height)
    solid_angles = texel_directions(height, torch.float64)[1][:, 0, 0]
    columns = torch.arange(height + 1, dtype=torch.float64)  # apart; those from H to 2H mirror these
    angles = columns * (math.pi / height)
    transform = 2 * (angles[:, None] * columns).cos()  # (frequency, columns apart), a cosine transform of the mirrored weights
    transform[:, [0, -1]] /= 2
    around = polar[: (height + 1) // 2, None]  # the upper half: the lower one is its mirror image
    cosine = (around.cos() * polar.cos() + around.sin() * polar.sin() * angles.cos()[:, None, None]).clamp(-1, 1)
    for lobe in (*lobes, cosine_weight):
        weights = lobe(cosine) * solid_angles
        spectrum = (transform @ weights.flatten(1)).view(weights.shape)
        spectrum /= spectrum[0].sum(dim=-1)[:, None]  # frequency 0 is the sum along a row
        yield torch.cat([spectrum, spectrum[:, : height // 2].flip(1, 2)], dim=1)


def _convolve(picture: Tensor, spectrum: Tensor) -> Tensor:
    """Means (..., H, W, 3) of a picture (H, W, 3) over lobes given by their spectra (..., W/2+1, H, H), around each texel's direction."""
    frequencies = torch.fft.rfft(picture, dim=1).permute(1, 0, 2)
    mean = torch.complex(spectrum @ frequencies.real, spectrum @ frequencies.imag)
    return torch.fft.irfft(mean.transpose(-3, -2), n=picture.shape[1], dim=-2).clamp(min=0)  # rounding leaves about -1e-7


def _with_poles(pictures: Tensor) -> Tensor:
    """(..., H, W, C) -> (..., H+2, W, C): at each pole a row of its neighbours' mean, so that the pole has a single colour."""
    poles = [row.mean(dim=-2, keepdim=True).expand_as(row) for row in (pictures[..., :1, :, :], pictures[..., -1:, :, :])]
    return torch.cat([poles[0], pictures, poles[1]], dim=-3)


class EnvironmentLight(nn.Module):
    """What lights the scene from all around. All results are linear radiance, differentiable in the arguments and in a trainable light.

    The means over a rough surface's lobe are computed exactly, over all texels, for ROUGHNESS_LEVELS and interpolated between: once for
    a fixed light, in every call for a trainable one. `intensity` and `rotation_deg` may be changed at any time.

    Args:
        radiance: (H, 2H, 3) linear, >= 0, row 0 = +z; see `hdr.read_hdr`.
        intensity: multiplies the radiance.
        rotation_deg: turns the light about +z, counter-clockwise seen from above: a lamp at azimuth a then stands at a + rotation_deg.
        trainable: the logarithm of the radiance becomes the parameter `log_radiance` (H, 2H, 3).
        resolution: rows to which a higher picture is averaged; default: 128, for a trainable light 16. The set-up takes 0.3 s at 128
            and 4 s at 256.

    Raises:
        ValueError: an argument of another shape or range, naming it.
    """

    def __init__(
        self,
        radiance: Tensor,
        *,
        intensity: float = 1.0,
        rotation_deg: float = 0.0,
        trainable: bool = False,
        resolution: int | None = None,
    ):
        super().__init__()
        shape = tuple(radiance.shape)
        _require(len(shape) == 3 and shape[2] == 3 and shape[1] == 2 * shape[0] and shape[0] >= 2, "radiance", shape, "(H, 2H, 3), H >= 2")
        n_bad = int((~(radiance.isfinite() & (radiance >= 0))).sum())
        _require(n_bad == 0, "radiance", f"{n_bad} values that are NaN, infinite or negative", "finite values of at least 0")
        _require(math.isfinite(intensity) and intensity >= 0, "intensity", intensity, "a number of at least 0")
        _require(math.isfinite(rotation_deg), "rotation_deg", rotation_deg, "a number")
        if resolution is None:
            resolution = DEFAULT_TRAINABLE_RESOLUTION if trainable else DEFAULT_RESOLUTION
        low, high = RESOLUTIONS
        _require(low <= resolution <= high, "resolution", resolution, f"{low} to {high}")
        self.intensity = float(intensity)
        self.rotation_deg = float(rotation_deg)
        self.trainable = trainable

        # float64: in float32 a transform spreads a millionth of the sun over a dark room
        picture = radiance.detach().cpu().double()
        if picture.shape[0] > resolution:
            picture = F.interpolate(picture.permute(2, 0, 1)[None], (resolution, 2 * resolution), mode="area")[0].permute(1, 2, 0)
        height = picture.shape[0]
        if trainable:
            self.log_radiance = nn.Parameter(picture.clamp(min=DARKEST).log().float())
            self.register_buffer("spectra", torch.stack(list(_lobe_spectra(height))).float(), persistent=False)
        else:
            means = [_convolve(picture, spectrum) for spectrum in _lobe_spectra(height)]
            self.register_buffer("fixed_levels", _with_poles(torch.stack([picture, *means])).float(), persistent=False)
        solid_angles = texel_directions(height, torch.float64)[1]
        self.register_buffer("texel_shares", (solid_angles / (4 * math.pi)).float(), persistent=False)
        self.register_buffer("roughness_nodes", torch.tensor(ROUGHNESS_LEVELS), persistent=False)
        self.to(radiance.device)

    def levels(self) -> Tensor:
        """(L+1, H+2, 2H, 3): the picture's means over the lobe of each of ROUGHNESS_LEVELS, then over the cosine; poles above and below."""
        if not self.trainable:
            return self.fixed_levels
        with torch.autocast(self.log_radiance.device.type, enabled=False):
            picture = self.log_radiance.exp()
            return _with_poles(torch.cat([picture[None], _convolve(picture, self.spectra)]))

    def diffuse(self, normals: Tensor) -> Tensor:
        """Irradiance / pi (N, 3), the cosine-weighted mean of the radiance around unit normals (N, 3)."""
        return self._look_up(self.levels()[-1:], normals)

    def specular(self, directions: Tensor, roughness: Tensor) -> Tensor:
        """Mean radiance (N, 3) over the GGX lobe, alpha = roughness^2, that a surface turned to `directions` reflects its viewer, n = v.

        Args:
            directions: (N, 3) unit, that of the mirrored view.
            roughness: (N, 1), clamped to [0, 1]; at 0 it is `radiance`.
        """
        levels, nodes = self.levels(), self.roughness_nodes
        roughness = roughness[:, 0].to(nodes.dtype).nan_to_num(nan=1.0).clamp(0, 1)
        level = (torch.searchsorted(nodes, roughness.detach().contiguous(), right=True) - 1).clamp(max=len(nodes) - 2)
        share = ((roughness - nodes[level]) / (nodes[level + 1] - nodes[level]))[:, None]
        return self._look_up(levels, directions, level, share)

    def radiance(self, directions: Tensor) -> Tensor:
        """What is seen (N, 3) in unit directions (N, 3): the picture, bilinear, of a single colour at each pole."""
        picture = _with_poles(self.log_radiance.exp()[None]) if self.trainable else self.fixed_levels[:1]
        return self._look_up(picture, directions)

    def color_deviation(self) -> Tensor:
        """Mean over all directions and channels of |radiance - its mean over the channels|: zero for a white light.

        The white-light regulariser of nvdiffrec (Munkberg et al.: "Extracting Triangular 3D Models, Materials, and Lighting From Images",
        CVPR 2022).
        """
        picture = self.log_radiance.exp() if self.trainable else self.fixed_levels[0, 1:-1]
        deviation = (picture - picture.mean(dim=-1, keepdim=True)).abs().mean(dim=-1, keepdim=True)
        return self.intensity * (deviation * self.texel_shares).sum()

    def _look_up(self, levels: Tensor, directions: Tensor, level: Tensor | None = None, share: Tensor | None = None) -> Tensor:
        """Bilinear values (N, 3) of levels (L, H+2, 2H, 3) in directions (N, 3).

        From the first level; with `level` (N,) and `share` (N, 1), from that one and, by this share, from the one that follows.
        """
        _, n_rows, width, _ = levels.shape
        height = n_rows - 2
        u, v = uv_of(directions.to(levels.dtype).nan_to_num())
        column = (u + self.rotation_deg / 360) * width - 0.5
        row = v * height + 0.5  # row 1 is the picture's first, centred at v = 1 / 2H
        # the poles' rows stand at v = 0 and 1, half a texel off their neighbours: stretched to a whole one
        row = torch.where(row < 1, 2 * row - 1, torch.where(row > height, 2 * row - height, row)).clamp(0, height + 1)
        left = column.detach().floor()
        upper = row.detach().floor().clamp(max=height)
        right_share, lower_share = (column - left)[:, None], (row - upper)[:, None]
        first = left.long() % width
        second = (first + 1) % width
        table = levels.reshape(-1, 3)

        def bilinear(start: Tensor) -> Tensor:
            above = _between(table[start + first], table[start + second], right_share)
            below = _between(table[start + width + first], table[start + width + second], right_share)
            return _between(above, below, lower_share)

        start = upper.long() * width
        if level is None:
            return bilinear(start) * self.intensity
        start = start + level * (n_rows * width)
        return _between(bilinear(start), bilinear(start + n_rows * width), share) * self.intensity

    def extra_repr(self) -> str:
        height = self.texel_shares.shape[0]
        trainable = ", trainable" if self.trainable else ""
        return f"{height} x {2 * height}, intensity={self.intensity}, rotation_deg={self.rotation_deg}{trainable}"


def _between(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    return first + (second - first) * share  # exact where both are equal


def _require(condition: bool, key: str, found, wanted: str) -> None:
    if not condition:
        raise ValueError(f"light {key}: found {found}, wanted {wanted}")
