"""Seconds of each per-pixel rule on SDXL-sized gradients, as ratios against torch's own global norm clip of the same tensor."""

import torch
from report import arguments, median_seconds, report

from threestudio_pgc.pixelgrad import RULES, gradient_statistics


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
    for name, run in runs.items():
        seconds = median_seconds(run, args.repeats, synchronize=synchronize)
        rows.append({"what": name, "ms": seconds * 1e3, "ratio": seconds / reference})
    report(rows, args.output)


if __name__ == "__main__":
    main()
