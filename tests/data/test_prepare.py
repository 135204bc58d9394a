import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
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
    assert not out.exists()


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


def validation_cut_off(size: int):
    """In an image or a header, or just where one would begin."""

    def make(folder: Path) -> Path:
        ilsvrc.write(folder)
        os.truncate(folder / TARS[1], size)
        return folder

    return make


def class_replaced(content: Callable[[bytes], bytes], wnid: str = ilsvrc.CLASSES[1]):
    """Another file in the place of the tar of a class."""

    def make(folder: Path) -> Path:
        ilsvrc.write(folder)
        files = ilsvrc.train_files(6).items()
        inner = {f"{name}.tar": ilsvrc._tar(images).getvalue() for name, images in files}
        inner[f"{wnid}.tar"] = content(inner[f"{ilsvrc.CLASSES[1]}.tar"])
        (folder / TARS[0]).write_bytes(ilsvrc._tar(inner).getvalue())
        return folder

    return make


def validation_with(change: Callable[[dict], object]):
    """Other files among the validation images."""

    def make(folder: Path) -> Path:
        ilsvrc.write(folder)
        files = ilsvrc.validation_files(12)
        change(files)
        (folder / TARS[1]).write_bytes(ilsvrc._tar(files).getvalue())
        return folder

    return make


def broken_image(folder: Path) -> Path:
    """One of those that TFDS decodes."""
    files = {ilsvrc.CMYK: b"nonsense"}
    return class_replaced(lambda tar: ilsvrc._tar(files).getvalue())(folder)


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
        (validation_cut_off(9_000), "ILSVRC2012_img_val.tar is damaged or cut off"),
        (validation_cut_off(600), "ILSVRC2012_img_val.tar is damaged or cut off"),
        (validation_cut_off(1024), "ILSVRC2012_img_val.tar is damaged or cut off at byte 1536"),
        (validation_cut_off(1536), "ILSVRC2012_img_val.tar is damaged or cut off at byte 1536"),
        (class_replaced(lambda tar: tar[:3000]), "n01739381.tar in it is cut off"),
        (class_replaced(lambda tar: tar[:4096]), "n01739381.tar in it is cut off"),
        (class_replaced(lambda tar: b""), "n01739381.tar in it is cut off"),
        (class_replaced(lambda tar: b"junk" * 1024), "n01739381.tar in it is cut off or no tar"),
        (class_replaced(bytes, "n99999999"), "holds n99999999.tar, which is no class"),
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
    assert not (tmp_path / "out").exists()


def test_a_gap_among_the_validation_images_is_named(tmp_path, capsys):
    (tmp_path / "tars").mkdir()
    gap = validation_with(lambda files: files.pop("ILSVRC2012_val_00000007.JPEG"))
    folder = gap(tmp_path / "tars")
    prepare.prepare("imagenet2012", str(tmp_path / "out"), str(folder), "array_record")
    log = capsys.readouterr().err
    assert "ILSVRC2012_val_00000008.JPEG in the place of ILSVRC2012_val_00000007.JPEG" in log


def test_image_that_cannot_be_repaired_ends_in_one_line(tmp_path):
    (tmp_path / "tars").mkdir()
    folder = broken_image(tmp_path / "tars")
    process = run(f"--manual_dir={folder}", f"--dir={tmp_path / 'out'}")
    assert process.returncode == 2, process.stderr
    assert "Traceback" not in process.stderr
    (said,) = (line for line in process.stderr.splitlines() if line.startswith("error: "))
    assert "--name: imagenet2012 could not be prepared: " in said and "JPEG" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "failure",
    [RuntimeError("Failed to encode example:\n{}"), ModuleNotFoundError("No\nmodule named 'x'")],
)
def test_failure_of_tfds_ends_in_one_line_and_keeps_what_was_there(
    failure, tars, tmp_path, monkeypatch
):
    def fail(builder, *_):
        (tmp_path / "downloads" / "extracted").mkdir(parents=True)
        (tmp_path / "downloads" / "finished").write_text("")
        builder.data_path.parent.mkdir()
        raise failure

    monkeypatch.setattr(prepare, "_write", fail)
    with pytest.raises(BadInput) as error:
        prepare.prepare("imagenet2012", str(tmp_path), str(tars), "array_record")
    expected = " ".join(str(failure).split())
    assert str(error.value) == f"--name: imagenet2012 could not be prepared: {expected}"
    assert [entry.name for entry in tmp_path.iterdir()] == ["downloads"]
    assert [entry.name for entry in (tmp_path / "downloads").iterdir()] == ["finished"]


def test_folder_of_a_version_without_dataset_is_named(tars, tmp_path):
    (tmp_path / "imagenet2012" / "5.1.0").mkdir(parents=True)
    with pytest.raises(BadInput, match="is there, but holds no dataset"):
        prepare.prepare("imagenet2012", str(tmp_path), str(tars), "tfrecord")


def test_bucket_that_cannot_be_read_ends_in_one_line(tars, monkeypatch):
    import tensorflow_datasets as tfds

    def fail(name, **_):
        raise RuntimeError("FailedPreconditionError: no\nsuch host")

    monkeypatch.setattr(tfds, "builder", fail)
    with pytest.raises(BadInput) as error:
        prepare.prepare("imagenet2012", "gs://no-such/d", str(tars), "array_record")
    expected = "--dir: cannot read gs://no-such/d: FailedPreconditionError: no such host"
    assert str(error.value) == expected


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


def test_name_that_needs_a_package_ends_in_one_line(tmp_path, monkeypatch):
    for package in ("datasets", "huggingface_hub"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BadInput, match=r"--name: 'huggingface:mnist' needs a package: .*hub"):
        prepare.prepare("huggingface:mnist", str(tmp_path), None, "array_record")


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
