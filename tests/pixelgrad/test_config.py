import pytest

from threestudio_pgc.pixelgrad import PGCConfig, check_pgc


@pytest.mark.parametrize("fields", [{}, {"threshold": [0, 0.5, 0.05, 100]}, {"threshold": [0.5, 0.05, 100]}, {"views_per_pullback": 2}])
def test_sound_blocks_pass(fields):
    check_pgc(PGCConfig(**fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rule": "clip"}, "pgc.rule: found 'clip', wanted one of clip-norm"),
        ({"norm": "l1"}, "pgc.norm: found 'l1'"),
        ({"threshold": 0}, "pgc.threshold: found 0, wanted values greater than 0"),
        ({"threshold": -1.0}, "pgc.threshold"),
        ({"threshold": "high"}, "pgc.threshold: found 'high', wanted a number or a schedule"),
        ({"threshold": [0, 0.5, -0.1, 100]}, "pgc.threshold"),
        ({"threshold": [0.1, 0.2]}, "pgc.threshold"),
        ({"threshold": None}, "pgc.threshold"),
        ({"pullback": "jacobian"}, "pgc.pullback: found 'jacobian', wanted one of vae, linear, none"),
        ({"views_per_pullback": 0}, "pgc.views_per_pullback"),
        ({"linear_map": "map.safetensors"}, "pgc.linear_map.*because pullback is 'vae'"),
    ],
)
def test_contradictions_are_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        check_pgc(PGCConfig(**fields))
