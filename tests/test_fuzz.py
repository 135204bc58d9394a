"""Whatever stands on the command line ends in settings, or in one line that says what is wrong."""

import random

import pytest
import runs
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from starnet_jax import command, errors, main, mesh, train_state
from starnet_jax import config as config_lib

KEYS = config_lib._keys()
VALUES = [
    *("0", "1", "-1", "2", "7", "64", "1e-3", "1e38", "-0.5", "0.5", "nan", "inf", "1e999"),
    *("", " ", "none", "None", "true", "False", "star", "sum", "global", "device", "float16"),
    *("()", "(1,2)", "0.1,0.9", "star,sum,star,star", "[[", "{'a':1}", "'", '"', "\\", "\x00"),
    *("999999999999999999999", "0x10", "1_000", "ä", "../..", "/", "~", "rand-m9-n2", "rand-"),
    *("starnet_s1", "demonet_d2_w16", "demonet_2d", "tfds", "folder", "gs://b/d", "a=b", "--x"),
]
FILES = ["quickstart", "starnet", "demonet", "nothing"]
ARGUMENTS = [
    "",
    "s1",
    "s4,recipe=release",
    "star,tiny",
    "d2_w16_sum,tiny",
    "tiny",
    ",",
    "s1,,",
    "=",
]

keys = st.sampled_from(KEYS) | st.sampled_from(KEYS).map(lambda k: k[:-1]) | st.text(max_size=12)
values = st.sampled_from(VALUES) | st.text(max_size=8)
overrides = st.builds("--config.{}={}".format, keys, values)
flags = st.sampled_from(["--mode=eval", "--mode=tran", "--profile", "--workdir", "-h2", "x", "--"])
references = st.builds(
    "--config=configs/{}.py{}".format,
    st.sampled_from(FILES),
    st.just("") | st.sampled_from(ARGUMENTS).map(":{}".format) | st.text(max_size=6),
)
commands = st.builds(
    lambda reference, rest: [reference, "--workdir=nowhere", *rest],
    references,
    st.lists(overrides | flags, max_size=3),
)


def understand(words: list[str]) -> config_lib.RunConfig:
    """What `main` does with its words before it opens data."""
    rest, given = command.split_overrides(words)
    arguments = main._parser().parse_args(rest)
    config = config_lib.load(arguments.config, given)
    train_state.model(config, mesh.create(config))
    return config


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(commands)
@example(["--config=configs/quickstart.py", "--workdir=w", "--config.optimiser.lr=1"])
@example(["--config=configs/quickstart.py", "--workdir=w", "--config.eval.batch_size=0"])
@example(["--config=\x00", "--workdir=w"])
def test_words_become_settings_or_one_line(words):
    try:
        config = understand(words)
    except errors.BadInput as error:
        assert str(error).strip()
        assert len(str(error).splitlines()) == 1, str(error)
    except SystemExit as end:  # --help
        assert end.code == 0
    else:
        assert config_lib.resolve(config.to_json()) == config


def test_the_nearest_key_of_a_mistyped_section_is_named():
    with pytest.raises(errors.BadInput, match=r"optimizer\.learning_rate"):
        understand(["--config=configs/quickstart.py", "--workdir=w", "--config.optimiser.lr=1"])


HARMLESS = [key for key in KEYS if key not in ("data.image_size", "epochs", "model.name")]


@pytest.mark.parametrize("seed", range(10))
def test_a_process_ends_well_or_in_one_line(seed, tmp_path):
    rng = random.Random(seed)
    change = f"--config.{rng.choice(HARMLESS)}={rng.choice([v for v in VALUES if v.isprintable()])}"
    flags = [*runs.SMALL, "--config.epochs=1", "--config.log.tensorboard=false", change]
    process = runs.main(runs.QUICKSTART, f"--workdir={tmp_path}/w", *flags)
    lines = [line for line in process.stderr.splitlines() if not line.startswith(("[", "  "))]
    if process.returncode == errors.DONE:
        assert "done in" in process.stdout
    else:
        assert process.returncode == errors.BAD_INPUT, (change, process.stderr)
        assert len(lines) == 1 and lines[0].startswith("error: "), (change, process.stderr)
