"""One full guidance step with the split backward pass, against the usual one whose encoder graph stays alive while the U-Net runs.

Both compute the same image gradient from the same random weights: SDXL's own VAE encoder at full width and a narrow U-Net, so that the
encoder's activations are what differs. Each scenario runs in a process of its own; memory is the peak above the loaded models.
`--pocket` times the bundled model's step instead, the one a CPU user waits for.
"""

import concurrent.futures
import multiprocessing
import resource
import time

import torch
from report import arguments, report

VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.13025,
    "force_upcast": False,
}
UNET = {
    "block_out_channels": [64, 128],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "use_linear_projection": True,
    "cross_attention_dim": 64,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 32,
    "projection_class_embeddings_input_dim": 6 * 32 + 64,
}
SCHEDULER = {"_class_name": "EulerDiscreteScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULER |= {"num_train_timesteps": 1000, "prediction_type": "epsilon"}


def build(size: int, pocket: bool, device: str):
    from threestudio_pgc.diffusion.sdxl import SDXLPrior

    if pocket:
        return SDXLPrior.from_pretrained("builtin:pocket", controlnet="builtin:pocket-controlnet-depth", device=device)
    torch.manual_seed(0)
    unet = {**UNET, "sample_size": size // 8, "in_channels": 4, "out_channels": 4}
    configs = {"vae": VAE, "unet": unet, "scheduler": SCHEDULER}
    dtype = torch.float16 if device == "cuda" else torch.float32
    return SDXLPrior.from_config(configs, device=device, dtype=dtype, image_size=size)


def one_graph(image, prior, conditioning, timesteps, noise, control) -> torch.Tensor:
    """The reference: encode with a graph, keep it over the U-Net, backward through everything, clip what arrives."""
    return _one_graph([image], prior, conditioning, timesteps, noise, control)


def _one_graph(images, prior, conditioning, timesteps, noise, control) -> torch.Tensor:
    from threestudio_pgc.diffusion.objectives import sds
    from threestudio_pgc.pixelgrad import clip_norm

    leaves, loss = [image.clone().requires_grad_(True) for image in images], 0.0
    level = prior.noise_level(timesteps)
    for leaf in leaves:
        latents = prior.encode(leaf)
        prediction = prior.predict_noise(level.add_noise(latents.detach(), noise), timesteps, conditioning, control)
        loss = loss + (latents * sds(prediction, noise, level, guidance_scale=100.0)).sum()
    loss.backward()
    return torch.cat([clip_norm(leaf.grad, 0.1) for leaf in leaves])


def two_in_one_graph(image, *given) -> torch.Tensor:
    """The joint stage as it is usually written: the losses of colours and normals added up, one backward pass."""
    return _one_graph([image, 1 - image], *given)


def two_after_one_another(image, *given) -> torch.Tensor:
    """The joint stage here: each picture's backward pass through the encoder is over before the other's begins."""
    return torch.cat([split(1)(picture, *given) for picture in (image, 1 - image)])


def split(views):
    def step(image, prior, conditioning, timesteps, noise, control) -> torch.Tensor:
        from threestudio_pgc.diffusion.distillation import distill
        from threestudio_pgc.pixelgrad import clip_norm

        options = {"timesteps": timesteps, "noise": noise, "control": control, "views_per_pullback": views}
        return distill(image, prior, conditioning, rule=clip_norm, threshold=0.1, guidance_scale=100.0, **options).regulated

    return step


SCENARIOS = {
    "one graph (reference)": one_graph,
    "split, 1 view": split(1),
    "split, auto": split("auto"),
    "colours and normals, one graph": two_in_one_graph,
    "colours and normals, split": two_after_one_another,
}


def measure(name: str, size: int, batch: int, repeats: int, pocket: bool) -> dict:
    from threestudio_pgc.diffusion.prior import Conditioning

    device = "cuda" if torch.cuda.is_available() else "cpu"
    prior = build(size, pocket, device)
    size = prior.image_size
    config = prior.unet.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    conditioning = Conditioning(
        draw(batch, 20, config.cross_attention_dim), draw(batch, 20, config.cross_attention_dim), draw(batch, pooled), draw(batch, pooled)
    )
    image = torch.rand(batch, size, size, 3, generator=generator).to(device)
    noise = draw(batch, prior.latent_channels, prior.latent_size, prior.latent_size)
    timesteps = torch.randint(20, 500, (batch,), generator=generator).to(device)
    control = image if prior.controlnets else None

    def peak() -> float:
        if device == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

    with torch.no_grad():  # libraries allocate their workspaces once; that is not the step's memory
        prior.encode(image[:1, :32, :32].contiguous()) if not pocket else None
    before = peak()
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        gradient = SCENARIOS[name](image, prior, conditioning, timesteps, noise, control)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return {"seconds": sorted(times)[len(times) // 2], "MiB": peak() - before, "gradient": gradient.double().norm().item()}


def main() -> None:
    parser = arguments("guidance", __doc__)
    parser.add_argument("--size", type=int, default=256, help="side of the image in pixels")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--pocket", action="store_true", help="the bundled model and its ControlNet at 128 pixels")
    args = parser.parse_args()
    rows = []
    for name in SCENARIOS:
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            found = pool.submit(measure, name, args.size, args.batch, args.repeats, args.pocket).result()
        rows.append({"what": name, **found})
    reference = rows[0]
    for row in rows:
        row |= {"time ratio": row["seconds"] / reference["seconds"], "memory ratio": row["MiB"] / reference["MiB"]}
    report(rows, args.output)


if __name__ == "__main__":
    main()
