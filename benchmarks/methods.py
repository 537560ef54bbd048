"""One guidance step of each distillation method on the bundled model, against SDS's; and VSD's adapter against its published form.

The published form of variational score distillation fine-tunes a second copy of the U-Net with LoRA; here the same adapter sits on a
deep copy. Both must give the same gradient. `MiB kept` is what the method adds to the prior: parameters and optimiser state.
"""

import copy

import torch
from report import arguments, median_seconds, report


class SecondNetwork:
    """VSD with the adapter on a copy of the U-Net, which is kept beside the prior's own."""

    def __init__(self, method, prior):
        self.method = method
        self.prior = copy.copy(prior)
        self.prior.unet = self.prior.network = copy.deepcopy(prior.network)
        method.prepare(self.prior)

    def __call__(self, views):
        from threestudio_pgc.diffusion import objectives
        from threestudio_pgc.diffusion.methods import Residual

        z_t, camera = views.noisy(), views.camera.reshape(-1, 16)
        guided = views.guide(views.predict(z_t, views.timesteps))
        training = self.method._training
        adapted = training.predict(z_t, views.timesteps, views.conditioning, views.control, camera)
        training.step(views.latents, views.conditioning, views.control, camera, views.generator)
        return Residual(objectives.vsd(guided, adapted, views.level, views.weighting))


def kept_mib(training, copied=None) -> float:
    parameters = list(training.adapter.parameters())
    size = sum(p.numel() * p.element_size() for p in parameters)
    size += sum(t.numel() * t.element_size() for state in training.optimizer.state.values() for t in state.values() if torch.is_tensor(t))
    if copied is not None:
        size += sum(p.numel() * p.element_size() for p in copied.parameters())
    return size / 2**20


def main() -> None:
    parser = arguments("methods", __doc__)
    parser.add_argument("--batch", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(1)  # the bundled model gains nothing from more

    from threestudio_pgc.diffusion.methods import METHODS, Views, make_method
    from threestudio_pgc.diffusion.prior import Conditioning
    from threestudio_pgc.diffusion.sdxl import SDXLPrior

    prior = SDXLPrior.from_pretrained("builtin:pocket", channels_last=True)
    config = prior.unet.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    batch, size = args.batch, prior.latent_size
    hidden, vector = draw(3, batch, 20, config.cross_attention_dim), draw(3, batch, pooled)
    image = torch.rand(batch, prior.image_size, prior.image_size, 3, generator=generator)
    noise = draw(batch, prior.latent_channels, size, size)
    timesteps = torch.randint(20, 500, (batch,), generator=generator)
    with torch.no_grad():
        latents = prior.encode(image)

    def views(method):
        negatives = {"negatives": hidden[2:], "pooled_negatives": vector[2:]} if method.separate_negative else {}
        given = Conditioning(hidden[0], hidden[1], vector[0], vector[1], **negatives)
        camera, source = torch.eye(4).expand(batch, 4, 4), torch.Generator().manual_seed(1)
        scale = method.guidance_scale or 0.0
        return Views(prior, image, latents, noise, timesteps, given, guidance_scale=scale, cfg=method.cfg, camera=camera, generator=source)

    rows = []
    for name in METHODS:
        method = make_method(name)
        method.prepare(prior)
        with torch.no_grad():
            first = method(views(method)).latent.double().norm().item()
            seconds = median_seconds(lambda method=method: method(views(method)), args.repeats)
        kept = kept_mib(method._training) if name == "vsd" else 0.0
        rows.append({"method": name, "seconds": seconds, "MiB kept": kept, "first gradient": first})
    method = make_method("vsd")
    twin = SecondNetwork(method, prior)
    with torch.no_grad():
        first = twin(views(method)).latent.double().norm().item()
        seconds = median_seconds(lambda: twin(views(method)), args.repeats)
    kept = kept_mib(method._training, twin.prior.unet)
    rows.append({"method": "vsd, second U-Net", "seconds": seconds, "MiB kept": kept, "first gradient": first})
    for row in rows:
        row["time ratio to sds"] = row["seconds"] / rows[0]["seconds"]
    report(rows, args.output)


if __name__ == "__main__":
    main()
