import json

import ml_collections
import pytest
from hypothesis import given
from hypothesis import strategies as st

from starnet_jax import config as config_lib
from starnet_jax.errors import BadInput

SMALLEST = {"batch_size": 8, "epochs": 1}
KEYS = config_lib._keys()


@pytest.mark.parametrize(
    "reference",
    [
        "configs/quickstart.py",
        "configs/quickstart.py:sum",
        *[f"configs/starnet.py:{v}" for v in ("s1", "s2", "s3", "s4", "s050", "s100", "s150")],
        "configs/starnet.py:s4,recipe=release",
        "configs/starnet.py:s4,tiny",
        "configs/demonet.py:d12_w192_sum",
        "configs/demonet.py:d12_w192_star,tiny",
    ],
)
def test_config_resolves_and_survives_json(reference):
    config = config_lib.load(reference)
    assert config_lib.resolve(json.loads(json.dumps(config.to_json()))) == config


def test_paper_and_release_recipes_differ_as_published():
    paper = config_lib.load("configs/starnet.py:s4")
    release = config_lib.load("configs/starnet.py:s4,recipe=release")
    assert (paper.optimizer.weight_decay, paper.model.drop_path) == (0.025, 0.1)
    assert (release.optimizer.weight_decay, release.model.drop_path) == (0.05, 0.02)
    assert paper.batch_size == release.batch_size == 2048
    assert paper.total_epochs == 310


def test_overrides_win_and_take_the_type_of_the_setting():
    config = config_lib.resolve(
        SMALLEST,
        {
            "optimizer.learning_rate": "1",
            "model.stage_ops": "sum,sum,star,star",
            "augment.crop_scale": "(0.5, 1)",
            "bn_group": "256",
            "log.tensorboard": "false",
            "data.dir": "none",
            "data.name": "mnist",
        },
    )
    assert config.optimizer.learning_rate == 1.0
    assert config.model.stage_ops == ("sum", "sum", "star", "star")
    assert config.augment.crop_scale == (0.5, 1.0)
    assert config.bn_group == 256
    assert config.log.tensorboard is False
    assert (config.data.dir, config.data.name) == (None, "mnist")


def test_config_dict_is_taken_as_it_is():
    assert config_lib.resolve(ml_collections.ConfigDict(SMALLEST)) == config_lib.resolve(SMALLEST)


@pytest.mark.parametrize(
    ("settings", "overrides", "named"),
    [
        ({"batch_sise": 8, "epochs": 1}, {}, "'batch_size'"),
        ({"batch_size": 8}, {}, "epochs is not set"),
        (SMALLEST | {"model": 3}, {}, "is a section"),
        (SMALLEST | {"optimizer": {"learning_rate": "fast"}}, {}, "expected a number"),
        (SMALLEST | {"batch_size": 8.0}, {}, "expected a whole number"),
        (SMALLEST | {"batch_size": True}, {}, "expected a whole number"),
        (SMALLEST, {"model": "3"}, "unknown key"),
        (SMALLEST, {"epochs.x": "3"}, "unknown key"),
        (SMALLEST, {"model.dtype": "float16"}, "did you mean 'bfloat16'"),
        (SMALLEST, {"augment.crop_scale": "0.5"}, "2 values"),
        (SMALLEST, {"augment.randaugment": "rand-q9"}, "randaugment"),
        (SMALLEST, {"optimizer.clip_norm": "0"}, "above 0"),
        (SMALLEST, {"seed": "1" + "0" * 19}, "seed"),
        (SMALLEST, {"optimizer.learning_rate": "1" + "0" * 400}, "learning_rate"),
        (SMALLEST, {"augment.crop_scale": "1,0.5"}, "smallest <= largest"),
        (SMALLEST, {"bn_group": "devise"}, "'device'"),
        (SMALLEST, {"ema": "1"}, "in [0, 1)"),
        (SMALLEST, {"data.source": "tfds"}, "data.name"),
        (SMALLEST, {"data.source": "fake"}, "data.train_examples"),
        (SMALLEST, {"optimizer.learning_rate": "nan"}, "learning_rate"),
        (SMALLEST, {"optimizer.learning_rate": "1e999"}, "learning_rate"),
    ],
)
def test_bad_settings_name_the_key_and_the_nearest_right_one(settings, overrides, named):
    with pytest.raises(BadInput) as error:
        config_lib.resolve(settings, overrides)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


@given(st.sampled_from(KEYS), st.text(max_size=20))
def test_any_text_for_any_key_resolves_or_ends_in_one_line(key, text):
    try:
        config = config_lib.resolve(SMALLEST, {key: text})
    except BadInput as error:
        assert "\n" not in str(error)
    else:
        assert config_lib.resolve(config.to_json()) == config


@given(st.text(max_size=20))
def test_any_key_resolves_or_ends_in_one_line(key):
    if key not in KEYS:
        with pytest.raises(BadInput, match="unknown key"):
            config_lib.resolve(SMALLEST, {key: "1"})


def test_argument_takes_variant_options_and_flags():
    parse = config_lib.argument
    options = dict(recipe=("paper", "release"), tiny=False, epochs=90)
    assert vars(parse("", ["s1", "s2"], **options)) == dict(
        variant="s1", recipe="paper", tiny=False, epochs=90
    )
    assert vars(parse("s2,recipe=release,tiny,epochs=3", ["s1", "s2"], **options)) == dict(
        variant="s2", recipe="release", tiny=True, epochs=3
    )


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("s9", "known: s1, s2"),
        ("s2,recipe=relaese", "'release'"),
        ("s2,recipe", "known: paper, release"),
        ("s2,tiny=1", "flag"),
        ("s2,tinny", "'tiny'"),
        ("s2,epochs=many", "whole number"),
    ],
)
def test_bad_argument_names_the_nearest_right_one(text, named):
    with pytest.raises(BadInput) as error:
        config_lib.argument(text, ["s1", "s2"], recipe=("paper", "release"), tiny=False, epochs=90)
    assert named in str(error.value)


def test_config_file_that_raises_ends_in_one_line(tmp_path):
    (tmp_path / "broken.py").write_text("def get_config(arg):\n    raise KeyError('a\\nb')\n")
    with pytest.raises(BadInput) as error:
        config_lib.load(str(tmp_path / "broken.py"))
    assert "KeyError" in str(error.value) and "\n" not in str(error.value)
    (tmp_path / "syntax.py").write_text("def get_config(:\n")
    with pytest.raises(BadInput, match="SyntaxError"):
        config_lib.load(str(tmp_path / "syntax.py"))
