"""The adapter of variational score distillation: nothing at first, then the score of what it is shown, and the prior untouched."""

import pytest
import torch

from tests.diffusion.tiny import build_tiny_sdxl, random_conditioning
from threestudio_pgc.diffusion.adapter import AdapterTraining, LowRankAdapter
from threestudio_pgc.diffusion.sdxl import SDXLPrior

T = torch.tensor([100, 700])


@pytest.fixture
def prior(tiny_sdxl, tiny_controlnet):
    """A new one for every test: hooks stay on the network."""
    return SDXLPrior.from_pretrained(tiny_sdxl, controlnet=tiny_controlnet)


def latents(batch=2, seed=0):
    return torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def cameras(batch=2, seed=5):
    return torch.randn(batch, 16, generator=torch.Generator().manual_seed(seed))


def stir(adapter):
    """Give a fresh adapter weights that do something."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in (*adapter.up, adapter.camera_out):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def train(training, steps, start=0):
    return [
        training.step(latents(seed=9), random_conditioning(2), None, cameras(), torch.Generator().manual_seed(1000 + start + number))
        for number in range(steps)
    ]


def test_a_fresh_adapter_changes_nothing(prior):
    arguments = latents(), T, random_conditioning(2)
    before = prior.predict_conditional(*arguments)
    adapter = LowRankAdapter(prior)
    with adapter.active(cameras()):
        assert torch.equal(prior.predict_conditional(*arguments), before)


def test_it_acts_while_it_is_active_and_only_then(prior):
    arguments = latents(), T, random_conditioning(2)
    before = prior.predict_noise(*arguments)
    adapter = LowRankAdapter(prior)
    stir(adapter)
    with adapter.active(cameras()):
        inside = prior.predict_conditional(*arguments)
    assert (inside - before.cond).abs().max() > 1e-3
    after = prior.predict_noise(*arguments)
    assert torch.equal(after.cond, before.cond) and torch.equal(after.uncond, before.uncond)
    with pytest.raises(ZeroDivisionError), adapter.active(cameras()):
        1 / 0  # noqa: B018
    assert torch.equal(prior.predict_noise(*arguments).cond, before.cond)


def test_it_can_be_taken_off_for_good(prior):
    arguments = latents(), T, random_conditioning(2)
    before = prior.predict_conditional(*arguments)
    adapter = LowRankAdapter(prior)
    stir(adapter)
    adapter.remove()
    with adapter.active(cameras()):
        assert torch.equal(prior.predict_conditional(*arguments), before)
    assert not any(module._forward_hooks for module in prior.unet.modules())


def test_every_attention_projection_is_adapted_and_every_view_has_its_own_camera(prior):
    attention = [name for name, module in prior.unet.named_modules() if hasattr(module, "to_q")]
    adapter = LowRankAdapter(prior, rank=3)
    assert len(adapter.down) == 4 * len(attention) > 0
    assert all(down.shape[0] == up.shape[1] == 3 for down, up in zip(adapter.down, adapter.up))
    stir(adapter)
    c = cameras()
    with adapter.active(c):
        both = prior.predict_conditional(latents(), T, random_conditioning(2))
    with adapter.active(c.flip(0)):
        swapped = prior.predict_conditional(latents(), T, random_conditioning(2))
    assert all((both[view] - swapped[view]).abs().max() > 1e-4 for view in range(2))
    conditioning = random_conditioning(2)
    first = type(conditioning)(
        *(x[:1] for x in (conditioning.cond, conditioning.uncond, conditioning.pooled_cond, conditioning.pooled_uncond))
    )
    with adapter.active(c[:1]):
        alone = prior.predict_conditional(latents()[:1], T[:1], first)
    torch.testing.assert_close(alone[0], both[0], rtol=1e-4, atol=1e-5)


def test_the_low_rank_terms_are_the_written_sum(tiny_sdxl):
    """W x + up(down(x)) in the layer itself equals the hook."""
    arguments = latents().double(), T, random_conditioning(2)
    prior = SDXLPrior.from_pretrained(tiny_sdxl).to(dtype=torch.float64)
    adapter = LowRankAdapter(prior)
    stir(adapter)
    with adapter.active():
        hooked = prior.predict_conditional(*arguments)
    merged = SDXLPrior.from_pretrained(tiny_sdxl).to(dtype=torch.float64)
    layers = [module for name, module in merged.unet.named_modules() if name.endswith((".to_q", ".to_k", ".to_v", ".to_out.0"))]
    with torch.no_grad():
        for layer, down, up in zip(layers, adapter.down, adapter.up, strict=True):
            layer.weight += up @ down
    torch.testing.assert_close(merged.predict_conditional(*arguments), hooked, rtol=1e-10, atol=1e-12)


def test_the_gradient_is_autograd_of_the_published_loss(tiny_sdxl):
    """E ||eps_adapter - eps||^2, in float64, against backward() through everything; the network itself gets no gradient."""
    prior = SDXLPrior.from_pretrained(tiny_sdxl).to(dtype=torch.float64)
    training = AdapterTraining(prior)
    stir(training.adapter)
    seen = {}

    class Stop(torch.optim.SGD):
        def step(self):
            seen.update({id(p): p.grad.clone() for group in self.param_groups for p in group["params"]})

    training.optimizer = Stop(training.adapter.parameters(), lr=1.0)
    z, c = latents().double(), cameras().double()
    loss = training.step(z, random_conditioning(2), None, c, torch.Generator().manual_seed(7))

    generator = torch.Generator().manual_seed(7)
    t = torch.randint(0, 1000, (2,), generator=generator)
    noise = torch.randn(z.shape, generator=generator).double()
    kept = torch.rand(2, 1, generator=generator) >= 0.1
    abar = prior.alphas_cumprod[t].view(-1, 1, 1, 1)
    with training.adapter.active(c * kept):
        predicted = prior.predict_conditional(abar.sqrt() * z + (1 - abar).sqrt() * noise, t, random_conditioning(2))
    expected = (predicted - noise).pow(2).mean()
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    for parameter in training.adapter.parameters():
        torch.testing.assert_close(seen[id(parameter)], parameter.grad, rtol=1e-9, atol=1e-14)
    assert all(parameter.grad is None for parameter in prior.unet.parameters())


def test_checkpointing_changes_nothing(tiny_sdxl):
    trained = []
    for checkpointing in (False, True):
        prior = SDXLPrior.from_pretrained(tiny_sdxl).to(dtype=torch.float64)
        training = AdapterTraining(prior, learning_rate=1e-2, checkpointing=checkpointing)
        stir(training.adapter)
        train(training, 2)
        trained.append(torch.cat([parameter.detach().flatten() for parameter in training.adapter.parameters()]))
    torch.testing.assert_close(trained[1], trained[0], rtol=1e-9, atol=1e-12)


def test_its_loss_falls_on_a_toy(prior):
    training = AdapterTraining(prior, rank=8, learning_rate=1e-2)
    views = latents(seed=9), random_conditioning(2), None, cameras()
    losses = [training.step(*views, torch.Generator().manual_seed(4)) for _ in range(100)]  # one t, one noise: it can learn them by heart
    assert losses[-1] < 0.8 * losses[0]


def test_half_precision_networks_train_it_in_float32(tiny_sdxl):
    full, half = (SDXLPrior.from_pretrained(tiny_sdxl, dtype=dtype) for dtype in ("fp32", "bf16"))
    trained = []
    for prior in (full, half):
        training = AdapterTraining(prior)
        assert {parameter.dtype for parameter in training.adapter.parameters()} == {torch.float32}
        training.optimizer = torch.optim.SGD(training.adapter.parameters(), lr=1.0)
        train(training, 1)
        trained.append(torch.cat([up.detach().flatten() for up in training.adapter.up]))
    assert torch.nn.functional.cosine_similarity(trained[0], trained[1], dim=0) > 0.97


def test_it_goes_on_bit_for_bit_from_its_state(tiny_sdxl):
    whole, begun, resumed = (AdapterTraining(SDXLPrior.from_pretrained(tiny_sdxl)) for _ in range(3))
    losses = train(whole, 6)
    train(begun, 3)
    resumed.load_state_dict(begun.state_dict())
    assert train(resumed, 3, start=3) == losses[3:]
    for name, value in whole.adapter.state_dict().items():
        assert torch.equal(resumed.adapter.state_dict()[name], value), name
    assert train(begun, 3, start=3) == losses[3:]


def test_a_step_without_a_finite_gradient_is_skipped(prior):
    training = AdapterTraining(prior)
    before = {name: value.clone() for name, value in training.adapter.state_dict().items()}
    training.step(latents() * float("nan"), random_conditioning(2), None, cameras(), torch.Generator().manual_seed(0))
    assert all(torch.equal(value, before[name]) for name, value in training.adapter.state_dict().items())


def test_what_cannot_be_adapted_is_refused(prior):
    for rank in (0, 1.5, True):
        with pytest.raises(ValueError, match="lora_rank"):
            LowRankAdapter(prior, rank=rank)


def _in_a_process(rank, folder, results):
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{results}/store", rank=rank, world_size=2)
    training = AdapterTraining(SDXLPrior.from_pretrained(folder), learning_rate=1e-3)
    for number in range(3):  # other views and noise in each process
        training.step(latents(seed=rank), random_conditioning(2), None, cameras(), torch.Generator().manual_seed(10 * number + rank))
    torch.save(training.adapter.state_dict(), f"{results}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_keep_one_adapter(tmp_path):
    import torch.multiprocessing as mp

    folder = build_tiny_sdxl(tmp_path / "m")
    mp.spawn(_in_a_process, args=(str(folder), str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert any(value.any() for name, value in first.items() if name.startswith("up"))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
