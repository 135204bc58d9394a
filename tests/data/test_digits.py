import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from starnet_jax.data import digits
from starnet_jax.errors import BadInput


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    digits.prepare(folder)
    return folder / "digits" / digits.VERSION


def emptied(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def record_lost(folder: Path) -> None:
    next(folder.glob("digits-test.*")).unlink()


def record_cut_off(folder: Path) -> None:
    os.truncate(next(folder.glob("digits-train.*")), 100_000)


def bit_flipped(folder: Path) -> None:
    path = next(folder.glob("digits-train.*"))
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)


def info_cut_off(folder: Path) -> None:
    os.truncate(folder / "dataset_info.json", 100)


def features_lost(folder: Path) -> None:
    (folder / "features.json").unlink()


DAMAGES = (emptied, record_lost, record_cut_off, bit_flipped, info_cut_off, features_lost)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_digits_are_written_anew_with_a_word(damage, whole, tmp_path, capsys):
    folder = tmp_path / "digits" / digits.VERSION
    shutil.copytree(whole, folder)
    damage(folder)
    builder = digits.prepare(tmp_path)
    assert f"the digits in {folder} are damaged; they are written anew" in capsys.readouterr().err
    assert {name: split.num_examples for name, split in builder.info.splits.items()} == {
        "train": 1347,
        "test": 450,
    }
    records = "digits-train.array_record-00000-of-00001"
    assert files(folder)[records] == files(whole)[records]
    assert files(folder).keys() == files(whole).keys()


def test_whole_digits_are_left_as_they_are(whole, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole.parent.rglob("*")}
    digits.prepare(whole.parent.parent)
    assert {path: path.stat().st_mtime_ns for path in whole.parent.rglob("*")} == before
    assert not capsys.readouterr().err


def test_processes_mend_the_digits_at_once(whole, tmp_path):
    folder = tmp_path / "digits" / digits.VERSION
    shutil.copytree(whole, folder)
    record_lost(folder)
    script = (
        "from starnet_jax.data import digits, source\n"
        f"opened = source.TfdsSource(digits.prepare({str(tmp_path)!r}), 'test')\n"
        "print(len([opened[i] for i in range(len(opened))]))\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", script], stdout=-1, stderr=-1, text=True)
        for _ in range(3)
    ]
    ends = [process.communicate(timeout=120) for process in processes]
    assert [out for out, _ in ends] == ["450\n"] * 3, ends
    assert sum("written anew" in err for _, err in ends) == 1


def test_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"config\.data\.dir: cannot write the digits to"):
        digits.prepare(tmp_path / "file")
