"""Prompts as the guidance gets them."""

import pytest
import torch

from tests.diffusion.tiny import build_tiny_sd
from threestudio_pgc.diffusion.conditioning import perp_neg
from threestudio_pgc.modules.prompt_processor import PromptProcessor


@pytest.fixture
def process(tiny_sdxl, tmp_path):
    def run(prompt="a red vase", **config):
        config = {"pretrained_model_name_or_path": str(tiny_sdxl), "cache_dir": str(tmp_path), "prompt": prompt, **config}
        return PromptProcessor(config)()

    return run


@pytest.mark.parametrize("prompt", ["", "   "])
def test_an_empty_prompt_is_refused(process, prompt):
    with pytest.raises(ValueError, match="system.prompt_processor.prompt"):
        process(prompt)


def test_each_view_gets_its_own_words(process):
    prompts = process("a red vase", negative_prompt="a cup", prompt_back="a green vase")
    elevation, azimuth = torch.tensor([0.0, 0.0, 0.0, 80.0]), torch.tensor([0.0, 90.0, 180.0, 0.0])
    viewed = prompts.conditioning(elevation, azimuth, torch.ones(4))
    wanted = ["a red vase, front view", "a red vase, side view", "a green vase", "a red vase, overhead view"]
    for row, text in enumerate(wanted):
        assert torch.equal(viewed.cond[row], prompts.encoded[text].embedding)
        assert torch.equal(viewed.pooled_cond[row], prompts.encoded[text].pooled)
        assert torch.equal(viewed.uncond[row], prompts.encoded["a cup"].embedding)
    plain = prompts.conditioning(elevation, azimuth, torch.ones(4), view_dependent=False)
    assert all(torch.equal(row, prompts.encoded["a red vase"].embedding) for row in plain.cond)


def test_thresholds_move_the_views(process):
    prompts = process("a red vase", front_threshold=10.0)
    seen = prompts.conditioning(torch.zeros(1), torch.tensor([30.0]), torch.ones(1))
    assert torch.equal(seen.cond[0], prompts.encoded["a red vase, side view"].embedding)


def test_words_the_model_does_not_know_are_told_through_the_host(process, caplog, monkeypatch):
    import logging

    monkeypatch.setattr(logging.getLogger("threestudio_pgc"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        process("a qwertyuiop vase")
    assert "qwertyuiop" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        process("qwertyuiop asdfghjk")
    assert "NO word" in caplog.text


def test_a_negative_prompt_of_its_own(process):
    prompts = process(negative_prompt="a cup")
    elevation, azimuth = torch.zeros(2), torch.tensor([0.0, 180.0])
    separate = prompts.conditioning(elevation, azimuth, torch.ones(2), separate_negative=True)
    assert separate.negatives.shape[:2] == separate.pooled_negatives.shape[:2] == (1, 2)
    together = prompts.conditioning(elevation, azimuth, torch.ones(2))
    assert together.negatives is None
    for row in range(2):
        assert torch.equal(separate.uncond[row], prompts.encoded[""].embedding)
        assert torch.equal(separate.negatives[0, row], prompts.encoded["a cup"].embedding)
        assert torch.equal(together.uncond[row], prompts.encoded["a cup"].embedding)
        assert torch.equal(separate.cond[row], together.cond[row])


def test_perpendicular_negatives(process):
    prompts = process(negative_prompt="a cup", use_perp_neg=True, overhead_threshold=50.0)
    elevation, azimuth = torch.tensor([0.0, 0.0, 55.0]), torch.tensor([0.0, 45.0, 0.0])
    found = prompts.conditioning(elevation, azimuth, torch.ones(3))
    side, front, _, overhead = (prompts.encoded[view] for view in prompts.prompts_vd)
    for row, expected in enumerate((front.embedding, (front.embedding + side.embedding) / 2, overhead.embedding)):
        torch.testing.assert_close(found.cond[row], expected)
        assert torch.equal(found.uncond[row], prompts.encoded["a cup"].embedding)
    assert torch.equal(found.negative_weights, perp_neg(elevation, azimuth, overhead=50.0).away)
    assert found.negative_weights[:, 2].tolist() == [0, 0]


def test_perpendicular_negatives_that_cannot_be_had(process):
    prompts = process(use_perp_neg=True)
    views = torch.zeros(1), torch.zeros(1), torch.ones(1)
    with pytest.raises(ValueError, match="use_perp_neg: found true without view-dependent prompts"):
        prompts.conditioning(*views, view_dependent=False)
    with pytest.raises(ValueError, match="use_perp_neg: found true, wanted false: this objective needs the negative prompt on its own"):
        prompts.conditioning(*views, separate_negative=True)


def test_a_model_without_pooled_embeddings(process, tmp_path):
    prompts = process(pretrained_model_name_or_path=str(build_tiny_sd(tmp_path / "sd")))
    found = prompts.conditioning(torch.zeros(1), torch.zeros(1), torch.ones(1), separate_negative=True)
    assert torch.equal(found.cond[0], prompts.encoded["a red vase, front view"].embedding)
    assert found.pooled_cond is found.pooled_uncond is found.pooled_negatives is None


def test_the_processor_is_known_to_the_host():
    from threestudio_pgc.host import find

    assert find("pgc-prompt-processor") is PromptProcessor
