"""Seconds of each per-pixel rule on SDXL-sized gradients, as ratios against torch's own global norm clip of the same tensor."""

import torch
from report import arguments, median_seconds, report

from threestudio_pgc.pixelgrad import RULES, QuantileThreshold, gradient_statistics, isolated_outliers, pixel_norm


def main() -> None:
    args = arguments("rules", __doc__).parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    gradient = torch.randn(4, 1024, 1024, 3, device=device)
    parameter = torch.nn.Parameter(torch.empty_like(gradient))

    def global_clip() -> None:
        parameter.grad = gradient.clone()
        torch.nn.utils.clip_grad_norm_([parameter], 0.1)

    reference = median_seconds(global_clip, args.repeats, synchronize=synchronize)
    rows = [{"what": "torch clip_grad_norm_ (reference)", "ms": reference * 1e3, "ratio": 1.0}]
    runs = {name: lambda rule=rule: rule(gradient, 0.1) for name, rule in RULES.items()}
    runs["clip-norm, linf"] = lambda: RULES["clip-norm"](gradient, 0.1, norm="linf")
    runs["statistics"] = lambda: gradient_statistics(gradient, 0.1)
    adaptive = QuantileThreshold(0.99)
    runs["adaptive threshold, running histogram"] = lambda: adaptive(gradient)
    runs["the same quantile of one step by sorting"] = lambda: pixel_norm(gradient).flatten().sort().values[int(0.99 * 4 * 1024 * 1024)]
    runs["isolated outliers"] = lambda: isolated_outliers(pixel_norm(gradient))
    for name, run in runs.items():
        seconds = median_seconds(run, args.repeats, synchronize=synchronize)
        rows.append({"what": name, "ms": seconds * 1e3, "ratio": seconds / reference})
    report(rows, args.output)


if __name__ == "__main__":
    main()
