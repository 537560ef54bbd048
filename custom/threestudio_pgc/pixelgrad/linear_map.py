"""A linear stand-in for the VAE: each latent pixel an affine function of the image pixel under it (paper, appendix A.2, figure 6)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class LinearMap:
    """latent = weight @ rgb + bias, per pixel. `weight` is (C, 3), `bias` (C,), for rgb in [0, 1]."""

    weight: Tensor
    bias: Tensor

    def encode(self, image: Tensor, latent_size: int) -> Tensor:
        """(B, H, W, 3) in [0, 1] -> (B, C, latent_size, latent_size): antialiased down-sampling, then the affine map.

        The down-sampling kernel is a tent as wide as a latent pixel, so the transpose of this map, which the pullback applies, is a
        smooth up-sampling of the latent gradient.
        """
        small = F.interpolate(image.movedim(-1, 1), size=(latent_size, latent_size), mode="bilinear", antialias=True, align_corners=False)
        weight, bias = self.weight.to(small), self.bias.to(small)
        return torch.einsum("ck,bkhw->bchw", weight, small) + bias.view(1, -1, 1, 1)


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


# The paper's own maps for the SDXL VAE. Its text calls the first one latent -> image; the shapes (4 x 3, a bias of 4) and a round trip of
# mid-grey say the reverse, so they stand here by what they do.
PAPER_ENCODER = LinearMap(
    weight=torch.tensor([[-0.5537, 1.8844, 2.1757], [-3.4900, 1.7472, 1.6805], [0.6894, 3.2756, -3.4658], [-2.4909, 1.3309, -0.1115]]),
    bias=torch.tensor([-1.6590, 0.3810, -0.3939, 0.7896]),
)
PAPER_DECODER_WEIGHT = torch.tensor(
    [[0.1956, -0.0910, 0.0462, -0.1521], [0.2125, -0.0206, 0.0401, -0.1215], [0.2208, 0.0047, -0.0028, -0.1083]]
)
PAPER_DECODER_BIAS = torch.tensor([0.5573, 0.5105, 0.4635])


def load_linear_map(path: str) -> LinearMap:
    """A map saved as safetensors with `weight` (C, 3) and `bias` (C,).

    Raises:
        ValueError: no such file, or not such tensors; names the file.
    """
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"pgc.linear_map: {path} cannot be read as safetensors: {error}") from error
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    weight, bias = shapes.get("weight", ()), shapes.get("bias", ())
    if len(weight) != 2 or weight[1] != 3 or bias != weight[:1]:
        raise ValueError(f"pgc.linear_map: {path} holds {shapes}, wanted weight (C, 3) and bias (C,)")
    return LinearMap(tensors["weight"], tensors["bias"])
