"""Prompts as the guidance gets them."""

import pytest
import torch

from threestudio_pgc.modules.prompt_processor import SDXLPromptProcessor


@pytest.fixture
def process(tiny_sdxl, tmp_path):
    def run(prompt, **config):
        config = {"pretrained_model_name_or_path": str(tiny_sdxl), "cache_dir": str(tmp_path), "prompt": prompt, **config}
        return SDXLPromptProcessor(config)()

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
