"""Zero123 as a frozen latent prior: a U-Net that sees one picture of an object and is told where the camera has moved since.

Liu et al. 2023, "Zero-1-to-3: Zero-shot One Image to 3D Object"; Zero123-XL and Stable Zero123 are the same network trained on. The
picture reaches the U-Net twice: its latents beside z_t, and its CLIP embedding, joined with the camera's move, as the only token of the
cross-attention. The image encoder is loaded, used once and freed (`encode_reference`).
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .model_files import MODEL_KEY, PIPELINE_INDEX, Part, check_family, find_model, load_module, stored_variant
from .precision import freeze, resolve_dtype, without_autocast
from .prior import Conditioning, PriorError
from .unet_prior import UNetPrior

# Public repositories that load as they are: safetensors, and every part in the folder.
READY = ("ashawkey/zero123-xl-diffusers", "ashawkey/stable-zero123-diffusers", "bennyguo/zero123-xl-diffusers")
IMAGE_ENCODER = Part("image_encoder", "config.json", "model")
# The camera's linear layer, as the two published layouts save it, and its name among the weights. Its sizes are read from the weights:
# the second layout's config.json has none.
PROJECTIONS = {
    Part("clip_camera_projection", "config.json", "diffusion_pytorch_model"): "proj",
    Part("cc_projection", "config.json", "diffusion_pytorch_model"): "projection",
}
POSE_NUMBERS = 4
POSES = ("zero123", "stable-zero123")
# World units per unit of the model, which was trained on objects in a unit cube, seen from 1.5 to 2.2 units at a field of view of 49.1
# degrees. An object that fills [-0.8, 0.8]^3 is 1.6 wide.
DISTANCE_UNIT = 1.6
FIELD_OF_VIEW_DEG = 49.1
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class ReferenceEmbedding(NamedTuple):
    """What CLIP sees in the reference picture, and the layer that joins it with the camera's move. float32 on the CPU."""

    embedding: Tensor  # (1, 1, E)
    weight: Tensor  # (D, E + 4)
    bias: Tensor  # (D,)


class Reference(NamedTuple):
    """The reference picture as `Zero123Prior.conditioning` takes it, on the prior's device, in its arithmetic's precision."""

    embedding: Tensor  # (1, 1, E)
    weight: Tensor  # (D, E + 4)
    bias: Tensor  # (D,)
    latents: Tensor  # (1, C, h, w), not scaled


def model_name(path_or_id: str | Path) -> str:
    """The last part of a folder's name or hub id."""
    return Path(str(path_or_id)).name


def resolve_pose(pose: str, path_or_id: str | Path) -> str:
    """`auto` is "stable-zero123" where the folder's or the id's own name has "stable" in it, else "zero123"; the rest is itself.

    Nothing inside the folders tells the two apart. Raises PriorError for any other name.
    """
    if pose == "auto":
        return POSES["stable" in model_name(path_or_id).lower()]
    if pose not in POSES:
        raise PriorError(f"pose: found {pose!r}, wanted one of auto, {', '.join(POSES)}")
    return pose


def relative_pose(
    elevation_deg: Tensor,
    azimuth_deg: Tensor,
    distance: Tensor,
    *,
    reference_elevation_deg: float,
    reference_azimuth_deg: float,
    reference_distance: float,
    pose: str,
    distance_unit: float = DISTANCE_UNIT,
) -> Tensor:
    """How the camera moved from the reference view to each of B views, (B, 4) float64.

    elevation_deg, azimuth_deg (B,) degrees; distance (B,) and the reference's in world units, of which one of the model's has
    `distance_unit`. With the polar angle theta = 90 degrees - elevation and differences "view minus reference":
        zero123         (d theta, sin d azimuth, cos d azimuth, d distance / distance_unit)
        stable-zero123  (d theta, sin d azimuth, cos d azimuth, theta of the reference)
    angles in radians.

    Raises PriorError for another pose, ValueError where distance_unit is not positive.
    """
    if pose not in POSES:
        raise PriorError(f"pose: found {pose!r}, wanted one of {', '.join(POSES)}")
    if not distance_unit > 0:
        raise ValueError(f"distance_unit: found {distance_unit}, wanted more than 0 world units")
    elevation_deg, azimuth_deg, distance = (values.double() for values in (elevation_deg, azimuth_deg, distance))
    polar = torch.deg2rad(reference_elevation_deg - elevation_deg)
    azimuth = torch.deg2rad(azimuth_deg - reference_azimuth_deg)
    if pose == "zero123":
        last = (distance - reference_distance) / distance_unit
    else:
        last = torch.deg2rad(torch.full_like(polar, 90 - reference_elevation_deg))
    return torch.stack([polar, azimuth.sin(), azimuth.cos(), last], dim=-1)


# ------------------------------------------------------------------------------------------------------- the reference picture


@torch.no_grad()
def encode_reference(
    pretrained_model_name_or_path: str | Path,
    image: Tensor,
    *,
    device: torch.device | str = "cpu",
    dtype: str | torch.dtype = "auto",
) -> ReferenceEmbedding:
    """Encode the reference picture with the model's CLIP image encoder, which is freed again, and read the camera's linear layer.

    image  (H, H, 3) in [0, 1], the object on white
    dtype  of the encoder: "auto" (fp16 on CUDA, fp32 on CPU) | "fp32" | "fp16" | "bf16"

    Raises PriorError where the model cannot be had, ValueError where the image has another shape.
    """
    from transformers import CLIPVisionModelWithProjection

    _check_image(image)
    device = torch.device(device)
    dtype = resolve_dtype(dtype, device)
    with _pointing_to_ready_models():
        root, projection = _find_with_projection(pretrained_model_name_or_path, [IMAGE_ENCODER], half=dtype != torch.float32)
        check_family(root, Zero123Prior.FAMILY, Zero123Prior.WHAT)
    weight, bias = _load_projection(root, projection)

    encoder = freeze(load_module(CLIPVisionModelWithProjection, root, IMAGE_ENCODER, MODEL_KEY, dtype)).to(device)
    pixels = clip_pixels(image, encoder.config.image_size).to(device, dtype)
    with without_autocast(device):
        embedding = encoder(pixel_values=pixels).image_embeds[:, None].float().cpu()
    del encoder
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
    if weight.shape[1] != embedding.shape[-1] + POSE_NUMBERS:
        raise PriorError(
            f"{MODEL_KEY}: {projection.subfolder} in {root} takes {weight.shape[1]} numbers, wanted {embedding.shape[-1]} of the image "
            f"encoder and {POSE_NUMBERS} of the camera"
        )
    return ReferenceEmbedding(embedding, weight, bias)


def clip_pixels(image: Tensor, size: int) -> Tensor:
    """(H, H, 3) in [0, 1] -> (1, 3, size, size) as CLIP takes it: resized bicubically, then mean and standard deviation removed."""
    pixels = image.float().permute(2, 0, 1)[None]
    if pixels.shape[-1] != size:
        pixels = F.interpolate(pixels, (size, size), mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(values, device=image.device).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (pixels - mean) / std


def _check_image(image: Tensor) -> None:
    if image.ndim != 3 or image.shape[-1] != 3 or image.shape[0] != image.shape[1]:
        raise ValueError(f"image: found shape {tuple(image.shape)}, wanted (H, H, 3)")


def _find_with_projection(path_or_id: str | Path, parts: Sequence[Part], half: bool) -> tuple[Path, Part]:
    """The model's folder, and which of `PROJECTIONS` it holds. A hub repository is asked for one after the other."""
    root = find_model(path_or_id, MODEL_KEY, parts, half=half)
    for part in [part for part in PROJECTIONS if (root / part.subfolder).is_dir()] or PROJECTIONS:
        try:
            return find_model(path_or_id, MODEL_KEY, [*parts, part], half=half), part
        except PriorError as error:
            failure = error
    wanted = " or ".join(part.subfolder for part in PROJECTIONS)
    raise PriorError(f"{failure}. Wanted the camera's linear layer in {wanted}") from failure


def _load_projection(root: Path, part: Part) -> tuple[Tensor, Tensor]:
    """Weight (D, E + 4) and bias (D,), float32."""
    from safetensors.torch import load_file

    folder, name = root / part.subfolder, PROJECTIONS[part]
    variant = stored_variant(folder, part, half=False)
    path = folder / f"{part.stem}{'' if variant is None else f'.{variant}'}.safetensors"
    try:
        tensors = load_file(path)
    except Exception as error:  # safetensors raises its own for a damaged file
        raise PriorError(f"{MODEL_KEY}: the weights in {path} cannot be loaded: {error}") from error
    try:
        return tensors[f"{name}.weight"].float(), tensors[f"{name}.bias"].float()
    except KeyError:
        raise PriorError(f"{MODEL_KEY}: {path} holds {', '.join(sorted(tensors))}, wanted {name}.weight and {name}.bias") from None


@contextlib.contextmanager
def _pointing_to_ready_models() -> Iterator[None]:
    """Most published copies are pickled or one file: say where others are."""
    try:
        yield
    except PriorError as error:
        if not any(sign in str(error) for sign in (".bin", ".ckpt", PIPELINE_INDEX)):
            raise
        raise PriorError(
            f"{error}. These load as they are: {', '.join(READY)}; launch_scripts/convert_zero123.py converts a .ckpt of tensors"
        ) from error


# ------------------------------------------------------------------------------------------------------------------ the prior


class Zero123Prior(UNetPrior):
    """The `LatentPrior` of Zero123, Zero123-XL and Stable Zero123.

    Its conditioning comes from a picture instead of a prompt:

        embedding = encode_reference(path_or_id, image)
        reference = prior.reference(embedding, image)
        conditioning = prior.conditioning(reference, elevation_deg, azimuth_deg, distance, ...)

    Attributes beside those of `UNetPrior`: name (of the folder or id it came from; tells `pose="auto"` which convention it knows).
    """

    FAMILY, WHAT = "zero123", "Zero123Pipeline"
    NO_CONTROLNETS = (
        "ControlNets are made for U-Nets that read a prompt and latents, Zero123's reads one token of a picture, and that picture's "
        "latents beside the others"
    )

    name: str = ""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options):
        """As `VAEPrior.from_pretrained`, without ControlNets. Neither image encoder nor camera layer is loaded here."""
        with _pointing_to_ready_models():
            prior = super().from_pretrained(pretrained_model_name_or_path, **options)
        prior.name = model_name(pretrained_model_name_or_path)
        return prior

    @torch.no_grad()
    def reference(self, embedding: ReferenceEmbedding, image: Tensor) -> Reference:
        """The picture (H, H, 3) in [0, 1], the object on white, that `encode_reference` encoded, with its latents.

        The latents are the posterior's mode without the VAE's scaling factor: that is how Zero123 was trained.

        Raises ValueError for another shape, PriorError where the camera's layer is not made for this U-Net.
        """
        _check_image(image)
        wanted = self.unet.config.cross_attention_dim
        if len(embedding.bias) != wanted:
            raise PriorError(f"the camera's linear layer gives {len(embedding.bias)} numbers, wanted {wanted} for this U-Net")
        numbers = (tensor.to(self.device, self.arithmetic_dtype) for tensor in embedding)
        return Reference(*numbers, self._encode_raw(image[None].to(self.device)))

    def conditioning(
        self,
        reference: Reference,
        elevation_deg: Tensor,
        azimuth_deg: Tensor,
        distance: Tensor,
        *,
        reference_elevation_deg: float,
        reference_azimuth_deg: float,
        reference_distance: float,
        pose: str = "auto",
        distance_unit: float = DISTANCE_UNIT,
    ) -> Conditioning:
        """What B views are to show: the reference's object from where each camera stands; see `relative_pose` and `resolve_pose`.

        cond (B, 1, D) = layer([CLIP embedding, pose]); uncond zeros; reference (B, C, h, w), which `predict_noise` zeroes in the
        unconditional prediction as well.
        """
        moved = relative_pose(
            elevation_deg,
            azimuth_deg,
            distance,
            reference_elevation_deg=reference_elevation_deg,
            reference_azimuth_deg=reference_azimuth_deg,
            reference_distance=reference_distance,
            pose=resolve_pose(pose, self.name),
            distance_unit=distance_unit,
        ).to(self.device, self.arithmetic_dtype)
        batch = len(moved)
        with without_autocast(self.device):
            joined = torch.cat([reference.embedding.expand(batch, -1, -1), moved[:, None]], dim=-1)
            cond = F.linear(joined, reference.weight, reference.bias)
        return Conditioning(cond, torch.zeros_like(cond), reference=reference.latents.expand(batch, -1, -1, -1))

    def _channels_taken(self) -> int:
        return 2 * self.latent_channels

    def _check_conditioning(self, conditioning: Conditioning) -> None:
        found = None if conditioning.reference is None else tuple(conditioning.reference.shape)
        wanted = (len(conditioning), self.latent_channels, self.latent_size, self.latent_size)
        if found != wanted:
            raise ValueError(f"conditioning.reference: found {found}, wanted the reference picture's latents {wanted}")

    def _check_unet(self, config) -> None:
        for name in ("addition_embed_type", "class_embed_type"):
            if config.get(name) is not None:
                raise PriorError(f"the U-Net's {name} is {config[name]!r}, wanted none: this is no Zero123 model")
