import pytest
import torch

from threestudio_pgc.diffusion.precision import parameter_memory, resolve_dtype, set_attention
from threestudio_pgc.diffusion.prior import Conditioning, PriorError
from threestudio_pgc.diffusion.sdxl import SDXLPrior


@pytest.mark.parametrize(
    "name, device, expected",
    [
        ("auto", "cuda", torch.float16),
        ("auto", "cpu", torch.float32),
        ("fp32", "cuda", torch.float32),
        ("fp16", "cuda", torch.float16),
        ("bf16", "cpu", torch.bfloat16),
        (torch.bfloat16, "cpu", torch.bfloat16),
    ],
)
def test_resolve_dtype(name, device, expected):
    assert resolve_dtype(name, device) == expected


def test_fp16_on_a_cpu_is_refused_with_a_reason(tiny_sdxl):
    with pytest.raises(PriorError, match="dtype: fp16 on a CPU is refused: .*Wanted fp32, bf16 or auto"):
        SDXLPrior.from_pretrained(tiny_sdxl, dtype="fp16")


def test_unknown_options_name_the_known_ones(tiny_sdxl):
    with pytest.raises(PriorError, match="dtype: found 'half', wanted one of auto, fp32, fp16, bf16"):
        resolve_dtype("half", "cpu")
    with pytest.raises(PriorError, match="attention: found 'flash', wanted one of sdpa, sliced, xformers"):
        set_attention(torch.nn.Identity(), "flash")


def test_parameter_memory_by_precision():
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2, dtype=torch.float16))
    assert parameter_memory(net) == (26, 16 * 4 + 10 * 2, {"float32": 16, "float16": 10})
    assert parameter_memory(torch.nn.Identity()) == (0, 0, {})


def test_conditioning_moves_as_a_whole():
    conditioning = Conditioning(torch.zeros(3, 2, 4), torch.zeros(3, 2, 4), pooled_cond=torch.zeros(3, 5)).to(torch.float64)
    assert len(conditioning) == 3
    assert conditioning.cond.dtype == conditioning.uncond.dtype == conditioning.pooled_cond.dtype == torch.float64
    assert conditioning.pooled_uncond is None and conditioning.time_ids is None
