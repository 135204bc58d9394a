import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import ilsvrc
import pytest

from starnet_jax.data import prepare
from starnet_jax.errors import BadInput

TARS = ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")


def run(*arguments: object) -> subprocess.CompletedProcess:
    words = [sys.executable, "-m", "starnet_jax.data.prepare", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=120)


def test_command_builds_imagenet_and_says_what_it_made(tars, tmp_path):
    process = run(f"--manual_dir={tars}", f"--dir={tmp_path}", "--file_format=tfrecord")
    assert process.returncode == 0, process.stderr
    rows = [line.split()[:3] for line in process.stdout.splitlines()]
    assert ["train", "24", "1"] in rows and ["validation", "12", "1"] in rows
    assert "24 images; the full set has 1281167" in process.stderr
    version = tmp_path / "imagenet2012" / "5.1.0"
    assert version.is_dir() and [entry.name for entry in version.parent.iterdir()] == ["5.1.0"]

    again = run(f"--manual_dir={tars}", f"--dir={tmp_path}", "--file_format=tfrecord")
    assert again.returncode == 0 and "nothing to do" in again.stderr
    other = run(f"--manual_dir={tars}", f"--dir={tmp_path}")
    assert other.returncode == 2 and "as tfrecord" in other.stderr.splitlines()[-1]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_command_leaves_nothing_behind(sent, tars, tmp_path):
    for name in TARS:
        (tmp_path / name).symlink_to(tars / name)
    out = tmp_path / "out"
    script = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job ignores it
        "from tensorflow_datasets.core import writer\n"
        "from starnet_jax.data import prepare\n"
        "finalize = writer.Writer.finalize\n"
        "def slow(self):\n"
        "    print('writing', flush=True, file=sys.stderr)\n"
        "    time.sleep(60)\n"
        "writer.Writer.finalize = slow\n"
        f"sys.exit(prepare.main(['--manual_dir={tmp_path}', '--dir={out}']))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    while "writing\n" not in process.stderr.readline():
        assert process.poll() is None
    assert list((out / "imagenet2012").glob("incomplete.*"))
    process.send_signal(sent)
    assert process.wait(30) == 128 + sent
    assert not list((out / "imagenet2012").iterdir())


def test_leftovers_of_a_killed_preparation_are_named(tars, tmp_path, capsys):
    left = tmp_path / "imagenet2012" / "incomplete.ABCDEF_5.1.0"
    left.mkdir(parents=True)
    prepare.prepare("imagenet2012", str(tmp_path), str(tars), "array_record")
    assert f"{left} is left" in capsys.readouterr().err
    assert left.exists()


def lacking(folder: Path) -> Path:
    ilsvrc.write(folder)
    (folder / TARS[1]).unlink()
    return folder


def swapped(folder: Path) -> Path:
    ilsvrc.write(folder)
    shutil.copy(folder / TARS[1], folder / TARS[0])
    return folder


def no_tar(folder: Path) -> Path:
    ilsvrc.write(folder)
    (folder / TARS[0]).write_text("<html>sign in</html>")
    return folder


def cut_off(folder: Path) -> Path:
    ilsvrc.write(folder)
    os.truncate(folder / TARS[0], 20_000)
    return folder


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda folder: None, "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar"),
        (lambda folder: folder / "nowhere", "no directory"),
        (lambda folder: folder, "lacks ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar"),
        (lacking, "lacks ILSVRC2012_img_val.tar, from https://image-net.org"),
        (swapped, "should hold one .tar for each class, but begins with ILSVRC2012_val_00000001"),
        (no_tar, "cannot read"),
        (cut_off, "is damaged"),
    ],
)
def test_wrong_manual_dir_ends_in_one_line(make, named, tmp_path):
    (tmp_path / "tars").mkdir()
    folder = make(tmp_path / "tars")
    with pytest.raises(BadInput) as error:
        prepare.prepare(
            "imagenet2012", str(tmp_path / "out"), folder and str(folder), "array_record"
        )
    message = str(error.value)
    assert message.startswith("--manual_dir") and named in message and "\n" not in message
    assert not list(tmp_path.glob("out/imagenet2012/*"))


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("imagenet2102", "'imagenet2012'"),
        ("imagenet2012:1.0.0", "1.0.0"),
        ("imagenet_v2/top", "top"),
        ("imagenet2012_multilabel", "--manual_dir"),
        ("imagenet2012_real", "made of ILSVRC2012_img_val.tar"),
    ],
)
def test_wrong_name_ends_in_one_line(name, named, tmp_path):
    with pytest.raises(BadInput) as error:
        prepare.prepare(name, str(tmp_path), None, "array_record")
    assert named in str(error.value) and "\n" not in str(error.value)


def test_output_that_cannot_be_written_ends_in_one_line(tars, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (str(tmp_path / "file" / "out"), "/proc/out"):
        with pytest.raises(BadInput, match="--dir: cannot write"):
            prepare.prepare("imagenet2012", folder, str(tars), "array_record")


def test_full_disk_is_noticed_before_the_work(tars, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(BadInput, match="too little"):
        prepare.prepare("imagenet2012", str(tmp_path), str(tars), "array_record")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "--dir"),
        (["--dir=x", "--manual-dir=y"], "'--manual_dir'"),
        (["--dir=x", "--file_format=riegeli"], "tfrecord"),
    ],
)
def test_wrong_flag_ends_in_one_line(arguments, named, capsys):
    assert prepare.main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and named in lines[0]


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as end:
        prepare.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert all(flag in text for flag in ("--name", "--manual_dir", "--dir", "--file_format"))
