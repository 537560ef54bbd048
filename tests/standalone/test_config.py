import re
from dataclasses import dataclass, field
from typing import Any

import pytest
from omegaconf import MISSING, OmegaConf

from threestudio_pgc.standalone import registry
from threestudio_pgc.standalone.config import ConfigError, check_config, load_config, parse_structured

yaml_text = """
name: demo
tag: "${rmspace:${system.prompt_processor.prompt},_}"
use_timestamp: false
data_type: views
data: {width: 8}
system_type: lift
system:
  guidance_type: sds
  guidance: {pgc: {threshold: [0, 1.0, 0.1, 100]}}
  prompt_processor: {prompt: a red cat}
  optimizer: {name: Adam, args: {lr: 0.1}}
trainer: {max_steps: 4}
checkpoint: {save_last: true}
"""


@dataclass
class Pgc:
    enabled: bool = True
    threshold: Any = 0.1


@dataclass
class ViewsConfig:
    width: int = 4
    height: int = 4


@dataclass
class SdsConfig:
    pgc: Pgc = field(default_factory=Pgc)
    guidance_scale: float = 100.0
    model: str | None = None


@dataclass
class LiftConfig:
    guidance_type: str = MISSING
    guidance: dict = field(default_factory=dict)
    prompt_processor: dict = field(default_factory=dict)
    optimizer: dict = field(default_factory=dict)
    exporter_type: str = "mesh-exporter"
    exporter: dict = field(default_factory=dict)
    must: int = 1


@dataclass
class DemandingConfig:
    seed_points: int = MISSING


@pytest.fixture(autouse=True)
def parts(monkeypatch):
    monkeypatch.setattr(registry, "_parts", {})
    named = {"views": ViewsConfig, "sds": SdsConfig, "lift": LiftConfig, "demanding": DemandingConfig}
    for name, config in named.items():
        registry.register(name)(type(name, (), {"Config": config}))


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "demo.yaml"
    path.write_text(yaml_text)
    return path


def test_good_config_is_resolved_and_passes(path):
    config = load_config(path, cli_args=["system.guidance.pgc.enabled=false", "trainer.max_steps=9", "seed=5"], n_gpus=2)
    check_config(config)
    assert config.tag == "a_red_cat" and config.trial_dir == "outputs/demo/a_red_cat"
    assert (config.trainer.max_steps, config.seed, config.n_gpus, config.resume) == (9, 5, 2, None)
    guidance = parse_structured(SdsConfig, config.system.guidance)
    assert guidance.pgc.enabled is False and list(guidance.pgc.threshold) == [0, 1.0, 0.1, 100]  # nested defaults filled too
    assert not (path.parent / "outputs").exists()


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["sytem.guidance_type=sds"], "sytem: no such key; did you mean 'system'?"),
        (["data.widht=3"], "data.widht: no such key; did you mean 'width'?"),
        (["system.guidence.pgc.enabled=false"], "system.guidence: no such key; did you mean 'guidance'?"),
        (["system.guidance.pgc.enable=false"], "system.guidance.pgc.enable: no such key; did you mean 'enabled'?"),
        (["system.guidance.xyzzy=1"], "system.guidance.xyzzy: no such key; known: guidance_scale, model, pgc"),
        (["system.guidance.pgc=off"], "system.guidance.pgc: found False, wanted keys: enabled, threshold"),
        (["system.guidance.pgc.enabled=maybe"], "system.guidance.pgc.enabled: Value 'maybe' is not a valid bool"),
        (["system.guidance.guidance_scale=high"], "system.guidance.guidance_scale: Value 'high'"),
        (["system.guidance_type=sdx"], "system.guidance_type: 'sdx' is not registered; did you mean 'sds'?"),
        (["system.guidance_type=demanding", "system.guidance={}"], "system.guidance.pgc: no such key"),
        (["system_type=left"], "system_type: 'left' is not registered; did you mean 'lift'?"),
        (["data_type="], "data_type: must be set"),
        (["data_type=demanding", "data={}"], "data.width: no such key"),
        (["trainer.max_step=3"], "trainer.max_step: no such key; did you mean 'max_steps'?"),
        (["trainer.accelerator=gpu"], "trainer.accelerator: use --gpu"),
        (["checkpoint.save_topk=1"], "checkpoint.save_topk: no such key; did you mean 'save_top_k'?"),
        (["system.optimizer.name=Adamm"], "system.optimizer.name: 'Adamm'; did you mean 'Adam'?"),
        (["system.optimizer.arg.lr=1"], "system.optimizer.arg: no such key; did you mean 'args'?"),
        (["system.optimizer.args.learning_rate=1"], "system.optimizer.args.learning_rate: no such key"),
        (["tag=off"], "tag: found False; YAML reads on/off/yes/no as true/false"),
        (["tag="], "tag: found nothing, and use_timestamp is false"),
        (["name=${nowhere}"], "nowhere"),
        (["trainer.max_steps"], "trainer.max_steps: not understood; overrides are written key=value"),
        (["=3"], "=3: not understood"),
        (["name=[1"], "name=[1: the value cannot be read"),
    ],
)
def test_bad_override_names_the_key(path, overrides, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_config(load_config(path, cli_args=overrides))


def test_mandatory_key_of_a_class_is_demanded(path):
    path.write_text(yaml_text.replace("guidance: {pgc: {threshold: [0, 1.0, 0.1, 100]}}", "").replace("sds", "demanding"))
    with pytest.raises(ConfigError, match="system.guidance.seed_points: must be set"):
        check_config(load_config(path))


def test_mandatory_key_of_the_file_is_demanded_by_name_though_the_tag_needs_it(path):
    path.write_text(yaml_text.replace("a red cat", '"???"'))
    with pytest.raises(ConfigError, match="^system.prompt_processor.prompt: must be set .add e.g. system.prompt_processor.prompt=..."):
        load_config(path)
    assert load_config(path, cli_args=["system.prompt_processor.prompt=a cat"]).tag == "a_cat"


def test_default_exporter_is_asked_for_only_when_exporting(path):
    config = load_config(path)
    check_config(config)
    with pytest.raises(ConfigError, match="system.exporter_type: 'mesh-exporter' is not registered"):
        check_config(config, export=True)


@pytest.mark.parametrize("text, message", [("", "holds no"), ("- 1\n", "holds no"), ("a: [", "cannot be read"), (None, "no such file")])
def test_bad_file(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=f"--config: .*{message}"):
        load_config(path)


def test_timestamp_is_made_once_and_kept_by_a_saved_config(path):
    first = load_config(path, cli_args=["use_timestamp=true"])
    assert re.fullmatch(r"a_red_cat@\d{8}-\d{6}", first.trial_name)
    path.write_text(OmegaConf.to_yaml(first, resolve=True))
    assert load_config(path).trial_dir == first.trial_dir


def test_resolvers(path):
    path.write_text(yaml_text + "description: '${basename:a/b.obj} ${add:1,2} ${gt0:1}'\n")
    assert load_config(path).description == "b.obj 3 True"


def test_parse_structured_of_nothing_gives_the_defaults():
    assert parse_structured(SdsConfig) == parse_structured(SdsConfig, {}) == OmegaConf.structured(SdsConfig)


def test_a_list_where_a_mapping_stands_is_refused_by_its_key():
    with pytest.raises(ConfigError, match="^guidance: wanted keys and values"):
        parse_structured(LiftConfig, {"guidance": [1, 2]})
