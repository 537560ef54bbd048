"""A scalar loss whose gradient at the rendered image is a given tensor."""

import torch
from torch import Tensor


class _GivenGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.image_dtype = image.dtype
        # Half the squared gradient: what 0.5 |x - (x - g)|^2 would print, without the rounding that formula puts into its own gradient.
        return (0.5 * gradient.square().sum()).clamp(max=torch.finfo(gradient.dtype).max)

    @staticmethod
    def backward(ctx, scale: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * scale.to(gradient.dtype)).to(ctx.image_dtype), None


def surrogate_loss(image: Tensor, gradient: Tensor) -> Tensor:
    """Scalar float32 loss with d loss / d image = `gradient`, exactly.

    The regulated gradient enters the 3D model through this one door, so whatever the trainer does later (a loss weight, a division by the
    batch size, an AMP scale) multiplies an already regulated gradient and cannot shift the threshold.

    Args:
        image: (B, H, W, C), part of the renderer's graph.
        gradient: same shape; taken as a constant.

    Raises:
        ValueError: shapes differ, which would otherwise broadcast silently.
    """
    if image.shape != gradient.shape:
        raise ValueError(f"surrogate_loss: image is {tuple(image.shape)} but the gradient is {tuple(gradient.shape)}; wanted equal shapes")
    with torch.autocast(device_type=image.device.type, enabled=False):
        return _GivenGradient.apply(image, gradient.detach())
