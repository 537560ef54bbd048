"""Seconds of the texture fields on a CPU: the fused hash grid against its plain torch twin, forward and backward to the table."""

import torch
from report import arguments, median_seconds, report

from threestudio_pgc.scene.fields import FIELD_PRESETS, HashGridField

parser = arguments("fields", __doc__)
parser.add_argument("--points", type=int, default=30_000, help="four views of 128 pixels, half of them covered")
parser.add_argument("--threads", type=int, default=1)
options = parser.parse_args()
torch.set_num_threads(options.threads)


def step(function, points: torch.Tensor, weights: torch.Tensor) -> None:
    function(points).backward(weights)


rows = []
for preset in FIELD_PRESETS:
    torch.manual_seed(0)
    field = HashGridField.from_preset(preset, backend="numba")
    encoding = field.encoding
    points = torch.nn.functional.normalize(torch.randn(options.points, 3), dim=-1) * 0.8
    weights = torch.randn(options.points, encoding.n_output)
    with torch.no_grad():
        forward = median_seconds(lambda: encoding(points), options.repeats)  # noqa: B023
        forward_twin = median_seconds(lambda: encoding.forward_torch(points), options.repeats)  # noqa: B023
    both = median_seconds(lambda: step(encoding, points, weights), options.repeats)  # noqa: B023
    both_twin = median_seconds(lambda: step(encoding.forward_torch, points, weights), options.repeats)  # noqa: B023
    with_mlp = median_seconds(lambda: step(field, points, torch.ones(options.points, 3)), options.repeats)  # noqa: B023
    rows.append(
        {
            "preset": preset,
            "parameters": sum(parameter.numel() for parameter in field.parameters()),
            "points": options.points,
            "forward ms": forward * 1e3,
            "twin ms": forward_twin * 1e3,
            "ratio": forward_twin / forward,
            "forward+backward ms": both * 1e3,
            "twin f+b ms": both_twin * 1e3,
            "ratio f+b": both_twin / both,
            "whole field f+b ms": with_mlp * 1e3,
        }
    )
report(rows, options.output)
