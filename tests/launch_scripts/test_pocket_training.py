"""Every stage of the pocket model's training, at toy size, through the real classes."""

import json

import numpy as np
import pytest
import torch

from launch_scripts import train_pocket
from launch_scripts.pocket import captions, export, normal_unet, normals, renders, shapes, text, unet, vae
from launch_scripts.pocket.training import Schedule, checkpoint_path, rate_factor, train


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """Work folder after all stages of the smoke setting."""
    threads = torch.get_num_threads()
    folder = tmp_path_factory.mktemp("pocket")
    train_pocket.main(["--smoke", "--output", str(folder)])
    torch.set_num_threads(threads)
    return folder


def losses(folder, name):
    return [json.loads(line)["loss"] for line in (folder / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("arguments", [["--workers", "0"], ["--minutes-unet", "0"], ["--minutes-normal-unet", "0"], ["--stage", "paint"]])
def test_bad_arguments_end_with_a_message(arguments, capsys):
    with pytest.raises(SystemExit):
        train_pocket.parse_args(arguments)
    assert arguments[0] in capsys.readouterr().err


def test_exported_folder_is_a_plain_sdxl_pipeline(output):
    from diffusers import StableDiffusionXLPipeline

    folder = output / "assets" / "pocket"
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a red brick vase", num_inference_steps=2, guidance_scale=5.0, height=128, width=128, output_type="np").images
    assert image.shape == (1, 128, 128, 3) and np.isfinite(image).all()
    weights = [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".ckpt")]
    assert not weights and len(list(folder.rglob("*.safetensors"))) == 4
    assert (folder / "vocabulary.txt").read_text().split() == captions.vocabulary()
    assert not any(str(output) in path.read_text() for path in folder.rglob("*.json"))


def test_exported_controlnet_steers_the_pipeline(output):
    from diffusers import ControlNetModel, StableDiffusionXLControlNetPipeline

    control = ControlNetModel.from_pretrained(output / "assets" / "pocket-controlnet-depth")
    for convolution in [*control.controlnet_down_blocks, control.controlnet_mid_block]:  # a dozen steps leave them near zero
        torch.nn.init.normal_(convolution.weight, std=0.3)
    pipeline = StableDiffusionXLControlNetPipeline.from_pretrained(output / "assets" / "pocket", controlnet=control, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)

    def run(depth):
        generator = torch.Generator().manual_seed(0)
        return pipeline(
            "a zebra bunny", image=depth, num_inference_steps=2, generator=generator, height=128, width=128, output_type="np"
        ).images

    near, far = run(torch.ones(1, 3, 128, 128)), run(torch.zeros(1, 3, 128, 128))
    assert np.isfinite(near).all() and np.abs(near - far).max() > 1e-3


def test_the_normal_controlnet_learns_with_everything_else_frozen(output, tmp_path):
    torch.manual_seed(0)
    stage = normals.NormalStage(output / "assets", output, batch=4)
    stage.preview = lambda modules, folder: None
    before = [parameter.clone() for parameter in stage.modules["controlnet"].parameters()]
    train(stage, Schedule(5, 10, 1, 2e-3, warmup_steps=2, log_seconds=-1.0), tmp_path, resume=False)
    assert any(not torch.equal(a, b) for a, b in zip(before, stage.modules["controlnet"].parameters()))
    assert all(parameter.grad is None for module in stage.frozen.values() for parameter in module.parameters())
    assert set(stage.errors(stage.modules["controlnet"], timesteps=(300,))) == {"none", "right", "red mirrored"}
    saved = output / "assets" / "pocket-controlnet-normal"
    assert {path.name for path in saved.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}


def test_a_mirrored_normal_image_is_that_of_the_mirrored_view():
    rng = np.random.default_rng(0)
    view = rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)
    mirrored = normals.mirror(view)
    assert np.array_equal(mirrored[:, :, 1:], view[:, ::-1, 1:]) and np.array_equal(mirrored[..., 0], 255 - view[:, ::-1, 0])
    assert np.array_equal(normals.mirror(mirrored), view)


def normal_maps_of(mesh, azimuth=0.0):
    mesh = renders.TriangleMesh(*(torch.as_tensor(part) for part in mesh))
    return renders.render_normal_maps(mesh, [(0.0, azimuth, 2.2, 1.0)], renders.make_rasterizer("cpu"))[0]


def test_a_normal_map_of_nothing_is_grey():
    nothing = (np.full((3, 3), 50.0, np.float32), np.array([[0, 1, 2]]))
    np.testing.assert_allclose(normal_maps_of(nothing), np.full((128, 128, 3), 0.5))


def test_a_normal_map_is_half_the_world_space_normal_above_grey():
    vertices, faces = shapes.box((0, 0, 0), (1, 1, 1))
    cube = (vertices.astype(np.float32), faces)
    front, back = normal_maps_of(cube), normal_maps_of(cube, azimuth=180.0)
    np.testing.assert_allclose(front[64, 64], [1.0, 0.5, 0.5], atol=1e-6)  # +x, where the camera at azimuth 0 is
    np.testing.assert_allclose(back[64, 64], [0.0, 0.5, 0.5], atol=1e-6)
    corner = normal_maps_of(cube, azimuth=45.0)
    np.testing.assert_allclose(corner[64, 80], [0.5, 1.0, 0.5], atol=1e-6)  # the wall at the right is that of +y
    np.testing.assert_allclose(corner[64, 48], [1.0, 0.5, 0.5], atol=1e-6)
    np.testing.assert_allclose(corner[0, 0], 0.5)


def test_a_chunk_of_normal_maps_depends_on_seed_and_number_only():
    cube, backend = shapes.Shape("cube", *shapes.box((0, 0, 0), (1, 1, 1)), False, 1.0), renders.make_rasterizer("cpu")
    (first, records), (again, same), (other, _) = (renders.make_normal_chunk(k, 0, [cube], backend, views=5) for k in (3, 3, 4))
    assert np.array_equal(first, again) and records == same and (first != other).any()
    assert first.shape == (5, 128, 128, 3) and len(records) == 5


def test_half_of_the_captions_of_a_normal_map_name_no_look():
    known, backend = set(captions.vocabulary()), renders.make_rasterizer("cpu")
    cube = shapes.Shape("cube", *shapes.box((0, 0, 0), (1, 1, 1)), False, 1.0)
    records = renders.make_normal_chunk(0, 0, [cube], backend, views=16)[1]
    rich = [caption for record in records for caption in record["captions"][:4]]
    plain = [caption for record in records for caption in record["captions"][4:]]
    assert set(plain) <= {f"a {name}{view}" for name in ("cube", "box") for view in ("", ", front view", ", side view", ", back view")}
    assert any("view" in caption for caption in plain) and any("view" not in caption for caption in plain)
    assert all(set(captions.words_of(caption)) <= known for caption in rich) and not set(rich) & set(plain)


def test_normal_maps_are_not_mirrored_for_training(output):
    folder = output / "normal_maps"
    images, found = np.load(folder / "images.npy")[:2], np.load(folder / "latents.npy")
    assert found.shape[1] == 1
    expected = normals.load_finished(output / "assets")["vae"].encode(vae.to_input(images)).latent_dist.mode()
    torch.testing.assert_close(torch.from_numpy(found[:2, 0]).float(), expected, atol=0.1, rtol=0.05)  # bfloat16


def test_the_unet_for_normal_maps_learns_with_everything_else_frozen(output, tmp_path):
    torch.manual_seed(0)
    stage = normal_unet.NormalUnetStage(output / "assets", output / "normal_maps", batch=4)
    stage.preview = lambda modules, folder: None
    before = [parameter.clone() for parameter in stage.modules["unet"].parameters()]
    train(stage, Schedule(5, 40, 1, 2e-3, warmup_steps=2, log_seconds=-1.0), tmp_path, resume=False)
    history = losses(tmp_path, "normal-unet")
    assert np.mean(history[-5:]) < 0.95 * np.mean(history[:5])
    assert any(not torch.equal(a, b) for a, b in zip(before, stage.modules["unet"].parameters()))
    assert all(parameter.grad is None for module in stage.frozen.values() for parameter in module.parameters())
    assert stage.learnt == 12  # of sixteen
    assert set(stage.errors(stage.modules["unet"], timesteps=(300,))) == {"empty", "own", "another's"}


def test_the_exported_unet_for_normal_maps_takes_the_place_of_the_pipelines(output):
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

    folder = output / "assets" / "pocket-normals"
    assert {path.name for path in folder.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    network = UNet2DConditionModel.from_pretrained(folder)
    pipeline = StableDiffusionXLPipeline.from_pretrained(output / "assets" / "pocket", unet=network, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a vase", num_inference_steps=2, height=128, width=128, output_type="np").images
    assert image.shape == (1, 128, 128, 3) and np.isfinite(image).all()


def test_an_export_leaves_the_readme_alone(output, tmp_path):
    (tmp_path / "README.md").write_text("words")
    export.export_network(normals.load_finished(output / "assets")["unet"], tmp_path)
    assert (tmp_path / "README.md").read_text() == "words" and (tmp_path / "config.json").exists()
    assert "_name_or_path" not in (tmp_path / "config.json").read_text()


def test_pipeline_embeds_as_the_training_did(output):
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(output / "assets" / "pocket", add_watermarker=False)
    prompt = "a green polka dot teapot, side view"
    words, empty_words, pooled, empty_pooled = pipeline.encode_prompt(prompt, negative_prompt="", device="cpu")
    ids = text.tokenize(pipeline.tokenizer, [prompt, ""])
    with torch.no_grad():
        ours, ours_pooled = text.embed((pipeline.text_encoder, pipeline.text_encoder_2), ids)
    torch.testing.assert_close(torch.cat([words, empty_words]), ours)
    torch.testing.assert_close(torch.cat([pooled, empty_pooled]), ours_pooled)


def test_every_word_is_one_token(tmp_path):
    tokenizer = text.build_tokenizer(tmp_path)
    assert [word for word in captions.vocabulary() if len(tokenizer.tokenize(word)) != 1] == []
    assert len(tokenizer.tokenize("xylophone")) > 1
    ids = text.tokenize(tokenizer, ["a red vase"])[0]
    assert ids[0] == tokenizer.bos_token_id and (ids[4:] == tokenizer.eos_token_id).all() and len(ids) == text.MAX_LENGTH


def test_revived_encoder_shares_weights(tmp_path):
    encoder = text.build_text_encoders(text.build_tokenizer(tmp_path), (32, 32), 1)[0]
    revived = text.revive(encoder)
    for ours, theirs in zip(encoder.parameters(), revived.parameters()):
        assert ours.data_ptr() == theirs.data_ptr()


def test_schedule_is_that_of_stable_diffusion():
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    torch.testing.assert_close(unet.alphas_cumprod(), scheduler.alphas_cumprod)


def test_half_of_the_times_lie_where_distillation_looks():
    times = unet.sample_times(4000, torch.Generator().manual_seed(0))
    assert times.min() >= 0 and times.max() > 990
    inside = ((times >= 20) & (times < 500)).float().mean()
    assert inside == pytest.approx(0.5 + 0.5 * 0.48, abs=0.02)


def test_learning_rate_warms_up_holds_and_falls():
    schedule = Schedule(1.0, warmup_steps=10, decay_from=0.5)
    factors = [rate_factor(schedule, progress, 100) for progress in (0.0, 0.5, 0.75, 1.0)]
    assert rate_factor(schedule, 0.0, 0) == pytest.approx(0.1)
    assert factors[0] == factors[1] == 1.0 and factors[2] == pytest.approx(0.51) and factors[3] == pytest.approx(0.02)


def test_vae_learns_and_resumes(output, tmp_path):
    torch.manual_seed(0)
    np.save(tmp_path / "images.npy", np.load(output / "images.npy"))

    def stage():
        return vae.VaeStage(vae.build_vae((8, 8, 16, 16)), tmp_path, batch=4, crop=32)

    settings = {"workers": 1, "learning_rate": 3e-3, "warmup_steps": 2, "log_seconds": -1.0}
    train(stage(), Schedule(5, 40, **settings), tmp_path, resume=False)
    history = losses(tmp_path, "vae")
    assert np.mean(history[-10:]) < 0.9 * np.mean(history[:4])
    train(stage(), Schedule(5, 44, **settings), tmp_path, resume=True)
    assert torch.load(checkpoint_path(tmp_path, "vae"), weights_only=False)["steps"] == 44
    assert len(losses(tmp_path, "vae")) == 44  # four more lines, not forty-four


@pytest.mark.parametrize("control", [False, True])
def test_denoiser_learns(output, tmp_path, control):
    torch.manual_seed(0)
    modules = unet.build_modules(output, (32, 32, 64), (32, 32), control)
    stage = unet.DiffusionStage(modules, output, batch=4)
    stage.preview = lambda modules, folder: None  # its pictures are looked at in the smoke run
    train(stage, Schedule(5, 30, 1, 2e-3, warmup_steps=2, log_seconds=-1.0), tmp_path, resume=False)
    history = losses(tmp_path, stage.name)
    assert np.mean(history[-5:]) < 0.9 * np.mean(history[:5])
    if control:
        assert modules["controlnet"].controlnet_mid_block.weight.abs().max() > 0


def test_control_starts_silent_from_the_weights_of_the_unet(output):
    modules = unet.build_modules(output, (32, 32, 64), (32, 32), True)
    torch.nn.init.normal_(modules["unet"].conv_in.weight)
    unet.start_control(modules)
    torch.testing.assert_close(modules["controlnet"].conv_in.weight, modules["unet"].conv_in.weight)
    assert not modules["controlnet"].controlnet_mid_block.weight.any()
    assert modules["controlnet"].controlnet_cond_embedding.conv_out.weight.any()


def test_whitening_changes_units_only(output):
    model = vae.build_vae((8, 8, 16, 16))
    images = np.load(output / "images.npy")[:16]
    with torch.no_grad():
        before = model.decode(model.encode(vae.to_input(images)).latent_dist.mode()).sample
        deviation = model.encode(vae.to_input(images)).latent_dist.std
        vae.whiten(model, images)
        posterior = model.encode(vae.to_input(images)).latent_dist
        after = model.decode(posterior.mode()).sample
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
    latents = posterior.mode()
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(8), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(8), atol=1e-4, rtol=0)
    assert not torch.allclose(posterior.std, deviation)
