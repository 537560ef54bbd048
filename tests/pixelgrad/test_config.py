import pytest

from threestudio_pgc.pixelgrad import PGCConfig, check_pgc, make_threshold


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"threshold": [0, 0.5, 0.05, 100]},
        {"threshold": [0.5, 0.05, 100]},
        {"threshold": {"quantile": 0.99}},
        {"threshold": {"quantile": 0.5, "window": 10}},
        {"views_per_pullback": 2},
        {"pullback": "linear", "linear_map": "paper"},
    ],
)
def test_sound_blocks_pass(fields):
    check_pgc(PGCConfig(**fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rule": "clip"}, "pgc.rule: found 'clip', wanted one of clip-norm"),
        ({"norm": "l1"}, "pgc.norm: found 'l1'"),
        ({"threshold": 0}, "pgc.threshold: found 0, wanted values greater than 0"),
        ({"threshold": -1.0}, "pgc.threshold"),
        ({"threshold": "high"}, "pgc.threshold: found 'high', wanted a number, a schedule"),
        ({"threshold": [0, 0.5, -0.1, 100]}, "pgc.threshold"),
        ({"threshold": [0.1, 0.2]}, "pgc.threshold"),
        ({"threshold": None}, "pgc.threshold"),
        ({"threshold": {"quantile": 1.0}}, "pgc.threshold.quantile: found 1.0, wanted a number between 0 and 1"),
        ({"threshold": {"quantile": 0}}, "pgc.threshold.quantile: found 0,"),
        ({"threshold": {"quantile": 0.9, "window": 0}}, "pgc.threshold.window: found 0,"),
        ({"threshold": {"quantil": 0.9}}, "pgc.threshold.quantil: found 0.9, wanted only the keys quantile and window"),
        ({"threshold": {}}, "pgc.threshold: found {}"),
        ({"pullback": "jacobian"}, "pgc.pullback: found 'jacobian', wanted one of vae, linear, none"),
        ({"views_per_pullback": 0}, "pgc.views_per_pullback"),
        ({"linear_map": "map.safetensors"}, "pgc.linear_map.*because pullback is 'vae'"),
    ],
)
def test_contradictions_are_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        check_pgc(PGCConfig(**fields))


def test_an_adaptive_threshold_is_made_from_the_block():
    made = make_threshold(PGCConfig(threshold={"quantile": 0.9, "window": 7}, norm="linf"))
    assert (made.quantile, made.window, made.norm) == (0.9, 7, "linf")
    assert make_threshold(PGCConfig()) is None and make_threshold(PGCConfig(threshold=[0.5, 0.1, 10])) is None
