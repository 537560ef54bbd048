"""A linear stand-in for the VAE: each latent pixel an affine function of the image pixel under it (paper, appendix A.2, figure 6)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class LinearMap:
    """out = weight @ in + bias at every pixel. `weight` is (out, in), `bias` (out,); image pixels are rgb in [0, 1]."""

    weight: Tensor
    bias: Tensor

    def __call__(self, pixels: Tensor) -> Tensor:
        """(B, in, h, w) -> (B, out, h, w)."""
        return torch.einsum("ck,bkhw->bchw", self.weight.to(pixels), pixels) + self.bias.to(pixels).view(1, -1, 1, 1)

    def encode(self, image: Tensor, latent_size: int) -> Tensor:
        """(B, H, W, 3) in [0, 1] -> (B, C, latent_size, latent_size): antialiased down-sampling, then the affine map.

        The down-sampling kernel is a tent as wide as a latent pixel, so the transpose of this map, which the pullback applies, is a
        smooth up-sampling of the latent gradient.
        """
        return self(shrink(image, latent_size))

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, h, w, 3), a thumbnail, not clamped."""
        return self(latents).movedim(1, -1)


def shrink(image: Tensor, latent_size: int) -> Tensor:
    """(B, H, W, 3) -> (B, 3, latent_size, latent_size): the image pixel that lies under each latent pixel, as the linear map sees it."""
    return F.interpolate(image.movedim(-1, 1), size=(latent_size, latent_size), mode="bilinear", antialias=True, align_corners=False)


def fit_affine(inputs: Tensor, outputs: Tensor, *, ridge: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Ridge regression outputs = weight @ inputs + bias. The bias is not penalised.

    Args:
        inputs: (N, K).
        outputs: (N, C).
        ridge: weight of the squared norm of `weight`, per sample.

    Returns:
        weight (C, K), bias (C,), in the inputs' dtype; solved in float64.

    Raises:
        ValueError: fewer samples than unknowns per output (K + 1).
    """
    if len(inputs) != len(outputs):
        raise ValueError(f"fit_affine: {len(inputs)} inputs but {len(outputs)} outputs")
    if len(inputs) < inputs.shape[1] + 1:
        raise ValueError(f"fit_affine: found {len(inputs)} samples, wanted at least {inputs.shape[1] + 1}")
    x, y = inputs.double(), outputs.double()
    x_mean, y_mean = x.mean(dim=0), y.mean(dim=0)
    x, y = x - x_mean, y - y_mean
    gram = x.T @ x / len(x) + ridge * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    weight = torch.linalg.solve(gram, x.T @ y / len(x)).T
    bias = y_mean - weight @ x_mean
    return weight.to(inputs.dtype), bias.to(inputs.dtype)


def tell_apart(maps: Iterable[LinearMap]) -> tuple[LinearMap, LinearMap]:
    """(encoder, decoder) of two maps in any order, by shape alone: the encoder takes 3 channels, the decoder gives 3.

    Raises:
        ValueError: not one of each. Latents of 3 channels fit both ways and are refused too.
    """
    maps = list(maps)
    encoders = [one for one in maps if one.weight.shape[1] == 3 and one.weight.shape[0] != 3]
    decoders = [one for one in maps if one.weight.shape[0] == 3 and one.weight.shape[1] != 3]
    if len(maps) != 2 or len(encoders) != 1 or len(decoders) != 1:
        shapes = [tuple(one.weight.shape) for one in maps]
        raise ValueError(f"linear maps: found weights of shapes {shapes}, wanted one (C, 3) and one (3, C), C not 3")
    return encoders[0], decoders[0]


# The paper's own maps for the SDXL VAE, under the names it prints. Its text says x = A0 z + b0 and z = A1 x + b1 for an image pixel x and
# a latent pixel z; A0 is 4 x 3 with a bias of 4, so it can only be the other way round, and a round trip of mid-grey agrees.
PAPER_MATRICES = {
    "A0": LinearMap(
        weight=torch.tensor([[-0.5537, 1.8844, 2.1757], [-3.4900, 1.7472, 1.6805], [0.6894, 3.2756, -3.4658], [-2.4909, 1.3309, -0.1115]]),
        bias=torch.tensor([-1.6590, 0.3810, -0.3939, 0.7896]),
    ),
    "A1": LinearMap(
        weight=torch.tensor([[0.1956, -0.0910, 0.0462, -0.1521], [0.2125, -0.0206, 0.0401, -0.1215], [0.2208, 0.0047, -0.0028, -0.1083]]),
        bias=torch.tensor([0.5573, 0.5105, 0.4635]),
    ),
}
PAPER_ENCODER, PAPER_DECODER = tell_apart(PAPER_MATRICES.values())


def find_linear_map(name: str | None) -> LinearMap:
    """The encoder that a configuration names: "paper" or None, the paper's for the SDXL VAE, else a safetensors file.

    Raises:
        ValueError: see `load_linear_map`.
    """
    return PAPER_ENCODER if name in (None, "paper") else load_linear_map(name)


def load_linear_map(path: str | Path) -> LinearMap:
    """The encoder in a safetensors file: `weight` (C, 3) and `bias` (C,). Other tensors in it are not read.

    Raises:
        ValueError: no such file, or not such tensors; names the file.
    """
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except Exception as error:  # safetensors' own error, for a damaged file, derives from Exception alone
        raise ValueError(f"pgc.linear_map: {path} cannot be read as safetensors: {error}") from error
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    weight, bias = shapes.get("weight", ()), shapes.get("bias", ())
    if len(weight) == 2 and weight[0] == 3 and weight[1] != 3:
        raise ValueError(f"pgc.linear_map: {path} holds weight {weight}, a map from latents to rgb; wanted (C, 3), from rgb to latents")
    if len(weight) != 2 or weight[1] != 3 or bias != weight[:1]:
        raise ValueError(f"pgc.linear_map: {path} holds {shapes}, wanted weight (C, 3) and bias (C,)")
    return LinearMap(tensors["weight"], tensors["bias"])


def linear_map_tensors(encoder: LinearMap, decoder: LinearMap) -> Mapping[str, Tensor]:
    """What a file that `load_linear_map` reads holds: the encoder's `weight` and `bias`, the decoder's `decoder_weight`, `decoder_bias`."""
    named = {"weight": encoder.weight, "bias": encoder.bias, "decoder_weight": decoder.weight, "decoder_bias": decoder.bias}
    return {name: tensor.contiguous() for name, tensor in named.items()}
