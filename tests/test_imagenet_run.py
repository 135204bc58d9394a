"""Whole runs on small files in ImageNet's layout: prepare, train an epoch, evaluate exactly."""

import subprocess
import sys

import ilsvrc
import numpy as np
import pytest
import runs
from PIL import Image

TRAINED_ON, TESTED_ON = 40, 300
DOCTOR = [sys.executable, "-m", "starnet_jax.data.doctor"]
SETTINGS = [
    f"--config={runs.ROOT}/configs/demonet.py:d2_w16_star,batch_size=8",
    "--config.data.train_examples=none",
    "--config.data.image_size=32",
    "--config.data.workers=2",
    "--config.epochs=1",
    "--config.schedule.cooldown_epochs=0",
    "--config.model.dtype=float32",
    "--config.log.every_steps=1",
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Where the index of the shards is kept."""
    return runs.environment(XDG_CACHE_HOME=str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def tfds(tmp_path_factory, cache):
    """Flags for TFDS's own imagenet2012, prepared by the command from tar files."""
    tars, folder = tmp_path_factory.mktemp("tars"), tmp_path_factory.mktemp("tfds")
    ilsvrc.write(tars, per_class=TRAINED_ON // len(ilsvrc.CLASSES), validation=TESTED_ON)
    command = [sys.executable, "-m", "starnet_jax.data.prepare", "--name=imagenet2012"]
    command += [f"--manual_dir={tars}", f"--dir={folder}", "--file_format=tfrecord"]
    process = subprocess.run(command, env=cache, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return [f"--config.data.dir={folder}"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Flags for an image folder with as many images."""
    root = tmp_path_factory.mktemp("folder")
    rng = np.random.default_rng(0)
    for split, per_class in (("train", TRAINED_ON // 4), ("val", TESTED_ON // 4)):
        for label in range(4):
            (root / split / f"class {label}").mkdir(parents=True)
            for i in range(per_class):
                pixels = rng.integers(256, size=(40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / f"class {label}" / f"{i}.png")
    return [
        f"--config.data.dir={root}",
        "--config.data.source=folder",
        "--config.data.name=none",
        "--config.model.num_classes=4",
    ]


@pytest.mark.parametrize("kind", ["tfds", "folder"])
def test_an_epoch_trains_and_every_test_image_counts_once(kind, request, tmp_path, cache):
    flags = [*SETTINGS, *request.getfixturevalue(kind), f"--workdir={tmp_path}"]
    trained = runs.main(*flags, env=cache)
    assert trained.returncode == 0, trained.stderr
    assert f"{TESTED_ON}/{TESTED_ON}" in trained.stdout
    last = runs.rows(tmp_path)[-1]
    assert last["step"] == TRAINED_ON // 8
    assert last["eval/count"] == TESTED_ON

    again = runs.main(*flags, env=cache)
    assert again.returncode == 0, again.stderr
    assert "nothing left to train" in again.stderr

    evaluated = runs.main(*flags, "--mode=eval", env=cache)
    assert evaluated.returncode == 0, evaluated.stderr
    rows = {row.split()[1]: row.split()[2:] for row in evaluated.stdout.splitlines()[1:]}
    for weights, prefix in (("raw", "eval/"), ("averaged", "eval/ema_")):
        scores = [last[prefix + key] for key in ("top1", "top5", "loss")]
        expected = [f"{100 * scores[0]:.2f}", f"{100 * scores[1]:.2f}", f"{scores[2]:.4f}"]
        assert rows[weights] == [*expected, f"{TESTED_ON}/{TESTED_ON}"]


def test_further_test_sets_stand_in_one_table(tfds, tmp_path, cache):
    """ReaL without the unlabelled images, ImageNet-A over its 200 classes."""
    folder = tfds[0].partition("=")[2]
    real = [[i, i + 1] if i % 3 else [] for i in range(9)]
    ilsvrc.write_set(
        folder,
        "imagenet2012_real",
        [ilsvrc.example(i, original_label=i, real_label=x) for i, x in enumerate(real)],
        split="validation",
        label="real_label",
    )
    adversarial = [ilsvrc.example(i, label=label) for i, label in enumerate((6, 11, 13, 988))]
    ilsvrc.write_set(folder, "imagenet_a", adversarial)
    flags = [*SETTINGS, *tfds, f"--workdir={tmp_path}"]
    assert runs.main(*flags, env=cache).returncode == 0
    sets = "--config.eval.sets=imagenet2012_real,imagenet_a"
    process = runs.main(*flags, "--mode=eval", sets, env=cache)
    assert process.returncode == 0, process.stderr
    assert "3 of 9 images have no label" in process.stderr
    rows = [line.split() for line in process.stdout.splitlines()[1:]]
    assert [(row[0], row[1], row[-1]) for row in rows] == [
        (name, weights, seen)
        for name, seen in (
            ("imagenet2012", f"{TESTED_ON}/{TESTED_ON}"),
            ("imagenet2012_real", "6/6"),
            ("imagenet_a", "4/4"),
        )
        for weights in ("raw", "averaged")
    ]


def test_the_doctor_opens_counts_decodes_and_times(tfds, tmp_path, cache):
    sheet = tmp_path / "sheet.png"
    flags = [flag for flag in SETTINGS if "batch_size" not in flag.partition("=")[0]]
    process = subprocess.run(
        [*DOCTOR, *flags, *tfds, f"--output={sheet}"],
        env=cache,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert f"train: {TRAINED_ON} images, 1000 classes" in process.stdout
    assert f"eval: {TESTED_ON} images" in process.stdout
    assert "1 CMYK" in process.stdout or "RGB" in process.stdout
    assert "images/s per core" in process.stdout
    assert Image.open(sheet).size == (960, 960)


def test_the_doctor_says_how_to_mend_missing_data(tmp_path, cache):
    process = subprocess.run(
        [*DOCTOR, SETTINGS[0], f"--config.data.dir={tmp_path}"],
        env=cache,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 2
    (line,) = [line for line in process.stderr.splitlines() if line.startswith("error")]
    assert "starnet_jax.data.prepare --name=imagenet2012" in line
