import dataclasses
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import ilsvrc
import numpy as np
import pytest
from ilsvrc import example, write_set
from PIL import Image

from starnet_jax.config import Data
from starnet_jax.data import dataset, imagenet
from starnet_jax.data.records import DamagedRecord
from starnet_jax.data.source import FakeSource, TfdsSource, open_source
from starnet_jax.errors import BadInput


def imagenet_data(folder: object, name: str = "imagenet2012") -> Data:
    return Data(source="tfds", name=name, dir=str(folder))


def read_all(source) -> list:
    return [source.encoded(i) for i in range(len(source))]


def message(data: Data, split: str | None = "train", num_classes: int = 1000) -> str:
    """The line that opening the data ends with."""
    with pytest.raises(BadInput) as error:
        open_source(data, split, num_classes)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- ImageNet from its tar files ------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "validation", "train[25%:75%]", "validation[-3:]"])
def test_records_equal_those_that_tfds_reads(split, imagenet_dir):
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(f"{imagenet_dir}/imagenet2012/5.1.0")
    decoders = {"image": tfds.decode.SkipDecoding()}
    if "tfrecord" in imagenet_dir:
        oracle = tfds.as_numpy(builder.as_dataset(split=split, decoders=decoders))
    else:  # TensorFlow does not read the others
        oracle = builder.as_data_source(split, decoders=decoders)
    expected = [(example["image"], int(example["label"])) for example in oracle]
    assert read_all(open_source(imagenet_data(imagenet_dir), split, 1000)) == expected


def test_training_images_are_those_of_the_tar_files(imagenet_dir):
    source = open_source(imagenet_data(imagenet_dir), "train", 1000)
    expected = {
        (content, list(source.class_names).index(wnid))
        for wnid, files in ilsvrc.train_files(6).items()
        for name, content in files.items()
        if name not in (ilsvrc.CMYK, ilsvrc.PNG)
    }
    stored = set(read_all(source))
    assert len(source) == 24 and expected <= stored
    for encoded, label in stored - expected:  # the two that TFDS repairs
        image = Image.open(io.BytesIO(encoded))
        assert (image.format, image.mode) == ("JPEG", "RGB")
        assert source.class_names[label] in ("n01739381", "n02105855")
    png = ilsvrc.noise(3)
    label = list(source.class_names).index("n02105855")
    (repaired,) = [x for x, y in stored - expected if y == label]
    difference = np.asarray(Image.open(io.BytesIO(repaired)), int) - np.asarray(png, int)
    assert np.abs(difference).mean() < 3


def test_validation_images_have_the_labels_of_tfds(imagenet_dir):
    import tensorflow_datasets as tfds

    labels = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt").read_text().split()
    files = ilsvrc.validation_files(12)
    source = open_source(imagenet_data(imagenet_dir), None, 1000)
    expected = {
        (files[name], list(source.class_names).index(wnid))
        for name, wnid in zip(sorted(files), labels, strict=False)
    }
    assert set(read_all(source)) == expected


def test_images_decode_to_rgb(imagenet_dir):
    source = open_source(imagenet_data(imagenet_dir), "train", 1000)
    images = [source[i][0] for i in range(len(source))]
    assert {image.mode for image in images} == {"RGB"}
    assert (900, 9) in {image.size for image in images}


def test_prepared_data_are_read_without_tensorflow(imagenet_dir):
    script = (
        "import sys\n"
        "from starnet_jax.config import Data\n"
        "from starnet_jax.data.source import open_source\n"
        f"data = Data(source='tfds', name='imagenet2012', dir={imagenet_dir!r})\n"
        "source = open_source(data, 'train', 1000)\n"
        "[source[i] for i in range(len(source))]\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def test_pickled_source_reads_the_same(imagenet_dir):
    source = open_source(imagenet_data(imagenet_dir), "validation", 1000)
    assert read_all(pickle.loads(pickle.dumps(source))) == read_all(source)


def test_examples_are_named_by_file_and_record(imagenet_dir):
    source = open_source(imagenet_data(imagenet_dir), "validation[5:]", 1000)
    assert source.name(0).startswith(f"{imagenet_dir}/imagenet2012/5.1.0/imagenet2012-validation.")
    assert source.name(0).endswith("-00000-of-00001, record 5")


def test_version_may_be_named(imagenet_dir):
    assert len(open_source(imagenet_data(imagenet_dir, "imagenet2012:5.1.0"), "train", 1000)) == 24


@pytest.mark.parametrize(
    ("change", "split", "num_classes", "named"),
    [
        ({"name": "imagenet2102"}, "train", 1000, "did you mean 'imagenet2012'?"),
        ({"name": "imagenet_a"}, "test", 1000, "prepare --name=imagenet_a --dir="),
        ({"name": "imagenet2012:5.0.0"}, "train", 1000, "no version 5.0.0; did you mean '5.1.0'?"),
        ({"name": "imagenet2012/x"}, "train", 1000, "no config 'x'"),
        ({"name": "../imagenet2012"}, "train", 1000, "NAME/CONFIG:VERSION"),
        ({}, "valdation", 1000, "has no split 'valdation'; did you mean 'validation'?"),
        ({}, "train[:10", 1000, "write it like 'train[:10%]'"),
        ({}, "train[:0]", 1000, "is empty"),
        ({}, "train", 100, "config.model.num_classes: 100, but the data have 1000 classes"),
    ],
)
def test_what_does_not_fit_is_named(change, split, num_classes, named, imagenet_dir):
    data = dataclasses.replace(imagenet_data(imagenet_dir), **change)
    assert named in message(data, split, num_classes)


@pytest.mark.parametrize("below", ["imagenet2012", "imagenet2012/5.1.0"])
def test_directory_inside_the_dataset_is_corrected(below, imagenet_dir):
    found = message(imagenet_data(Path(imagenet_dir) / below))
    assert f"did you mean the one around it, '{imagenet_dir}'?" in found


def test_unprepared_imagenet_names_directory_and_command(tmp_path):
    found = message(imagenet_data(tmp_path))
    assert f"config.data.dir: {tmp_path} holds no prepared imagenet2012" in found
    assert f"--name=imagenet2012 --dir={tmp_path} --manual_dir=DIR_WITH_TARS" in found
    (tmp_path / "imagenet2012" / "incomplete.ABCDEF_5.1.0").mkdir(parents=True)
    assert "holds no prepared imagenet2012" in message(imagenet_data(tmp_path))


def test_missing_directory_is_named(tmp_path):
    found = message(imagenet_data(tmp_path / "nowhere"))
    assert f"config.data.dir: {tmp_path}/nowhere does not exist; to prepare it: python" in found
    (tmp_path / "file").write_text("")
    assert f"cannot read {tmp_path}/file" in message(imagenet_data(tmp_path / "file"))


def test_broken_metadata_are_named(tmp_path):
    (tmp_path / "imagenet2012" / "5.1.0").mkdir(parents=True)
    assert "is no readable TFDS dataset" in message(imagenet_data(tmp_path))


def test_directory_without_permission_is_named(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(dataset, "_entries", refuse)
    assert f"cannot read {tmp_path}: Permission denied" in message(imagenet_data(tmp_path))


@pytest.mark.parametrize("failing", ["_entries", "builder_from_directory"])
def test_bucket_that_cannot_be_read_is_named(failing, tmp_path, monkeypatch):
    import tensorflow as tf
    import tensorflow_datasets as tfds

    def refuse(path):
        raise tf.errors.PermissionDeniedError(None, None, f"no right to\n{path}")

    (tmp_path / "imagenet2012" / "5.1.0").mkdir(parents=True)
    monkeypatch.setattr(dataset if failing == "_entries" else tfds, failing, refuse)
    found = message(imagenet_data(tmp_path))
    assert found.startswith("config.data.dir: ") and f"no right to {tmp_path}" in found


# --- Its relatives --------------------------------------------------------------------------------


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_real_leaves_out_images_without_labels(file_format, tmp_path, capsys):
    labels = [[3], [], [7, 999, 0], [], [5]]
    examples = [example(i, original_label=i, real_label=x) for i, x in enumerate(labels)]
    write_set(
        tmp_path,
        "imagenet2012_real",
        examples,
        split="validation",
        label="real_label",
        file_format=file_format,
    )
    for _ in range(2):  # the second time from the cache
        source = open_source(imagenet_data(tmp_path, "imagenet2012_real"), None, 1000)
        assert [source.encoded(i)[1] for i in range(len(source))] == [(3,), (7, 999, 0), (5,)]
        assert [source.name(i)[-8:] for i in range(3)] == ["record 0", "record 2", "record 4"]
        assert source.classes is None and source.several
        assert "2 of 5 images have no label and are left out" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["imagenet_a", "imagenet_r"])
def test_sets_of_200_classes_say_which(name, tmp_path):
    classes = imagenet.SUBSETS[name]
    write_set(tmp_path, name, [example(i, label=int(classes[i])) for i in (0, 50, 199)])
    source = open_source(imagenet_data(tmp_path, name), None, 1000)
    assert source.classes is classes
    assert [source.encoded(i)[1] for i in range(3)] == classes[[0, 50, 199]].tolist()


def test_label_that_a_set_cannot_have_is_named(tmp_path):
    assert 0 not in imagenet.SUBSETS["imagenet_a"]
    write_set(tmp_path, "imagenet_a", [example(0, label=6), example(1, label=0)])
    source = open_source(imagenet_data(tmp_path, "imagenet_a"), "test", 1000)
    with pytest.raises(BadInput, match="record 1: label 0 is none of the 200 classes") as error:
        source.encoded(1)
    assert not isinstance(error.value, DamagedRecord)


def test_split_without_labels_is_refused_when_it_is_opened(tmp_path):
    write_set(tmp_path, "imagenet2012", [example(0, label=-1)])
    found = message(imagenet_data(tmp_path), "test")
    assert "record 0: label -1 is none of the 1000 classes of imagenet2012/1.0.0" in found


def test_subsets_are_200_known_classes():
    import tensorflow_datasets as tfds

    wnids = tfds.core.tfds_path("datasets/imagenet2012/labels.txt").read_text().split()
    for classes in imagenet.SUBSETS.values():
        assert len(set(classes.tolist())) == 200 and sorted(classes) == classes.tolist()
        assert classes[0] >= 0 and classes[-1] < 1000
    first = {name: wnids[classes[0]] for name, classes in imagenet.SUBSETS.items()}
    assert first == {"imagenet_a": "n01498041", "imagenet_r": "n01443537"}
    assert {wnids[classes[-1]] for classes in imagenet.SUBSETS.values()} == {"n12267677"}


def test_config_is_named_where_there_are_several(tmp_path):
    write_set(tmp_path, "imagenet_v2", [example(0, label=1)], config="topimages")
    assert len(open_source(imagenet_data(tmp_path, "imagenet_v2"), None, 1000)) == 1
    write_set(
        tmp_path,
        "imagenet_v2",
        [example(i, label=i) for i in (4, 2)],
        config="threshold-0.7",
    )
    assert "imagenet_v2/threshold-0.7, imagenet_v2/topimages" in message(
        imagenet_data(tmp_path, "imagenet_v2"), "test"
    )
    source = open_source(imagenet_data(tmp_path, "imagenet_v2/threshold-0.7"), "test", 1000)
    assert [label for _, label in read_all(source)] == [4, 2]
    assert "did you mean 'topimages'" in message(imagenet_data(tmp_path, "imagenet_v2/topimage"))


def test_newest_version_is_taken(tmp_path):
    write_set(tmp_path, "imagenet_sketch", [example(0, label=1)])
    old = tmp_path / "imagenet_sketch" / "1.0.0"
    for version in ("1.9.0", "1.10.0"):
        (old.parent / version).mkdir()
    assert dataset.find("imagenet_sketch", str(tmp_path)).name == "1.10.0"
    assert dataset.find("imagenet_sketch:1.0.0", str(tmp_path)) == old


def test_record_that_is_no_example_is_damaged(tmp_path):
    import tensorflow as tf

    write_set(
        tmp_path,
        "imagenet_sketch",
        [example(i, label=i) for i in (1, 2)],
        file_format="tfrecord",
    )
    (file,) = (tmp_path / "imagenet_sketch" / "1.0.0").glob("*.tfrecord-*")
    first = next(tf.data.TFRecordDataset(str(file)).as_numpy_iterator())
    with tf.io.TFRecordWriter(str(file)) as writer:
        writer.write(first)
        writer.write(b"no example")
    source = open_source(imagenet_data(tmp_path, "imagenet_sketch"), "test", 1000)
    assert source.encoded(0)[1] == 1
    with pytest.raises(DamagedRecord, match=f"{file}, record 1: "):
        source.encoded(1)


def test_dataset_without_classes_is_refused(tmp_path):
    import tensorflow_datasets as tfds

    tfds.dataset_builders.store_as_tfds_dataset(
        name="numbers",
        version="1.0.0",
        features=tfds.features.FeaturesDict({"x": np.int64}),
        split_datasets={"train": [(0, {"x": 1})]},
        data_dir=tmp_path,
    )
    assert "numbers has no image with a class label, only: x" in message(
        imagenet_data(tmp_path, "numbers")
    )


# --- Image folders --------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    ilsvrc.write_folders(tmp_path)
    return tmp_path


def folder_data(path: object) -> Data:
    return Data(source="folder", dir=str(path))


def test_folder_has_the_files_under_their_classes(folder):
    source = open_source(folder_data(folder), "train", 4)
    assert tuple(source.class_names) == ilsvrc.CLASSES
    files = ilsvrc.train_files(6)
    expected = [
        (files[wnid][name], label)
        for label, wnid in enumerate(ilsvrc.CLASSES)
        for name in sorted(files[wnid])
    ]
    assert read_all(source) == expected
    assert source.name(0) == str(folder / "train/n01440764/n01440764_0.JPEG")
    assert {source[i][0].mode for i in range(len(source))} == {"RGB"}
    assert pickle.loads(pickle.dumps(source)).encoded(7) == expected[7]


def test_folder_takes_nested_images_and_passes_over_the_rest(folder):
    place = folder / "train" / "n01440764"
    before = len(open_source(folder_data(folder), "train", 4))
    (place / "deep" / "deeper").mkdir(parents=True)
    content = next(place.glob("*.JPEG")).read_bytes()
    for name in ("deep/b.png", "deep/deeper/ä.Jpg", ".hidden.jpg", "notes.txt", "deep/.x.png"):
        (place / name).write_bytes(content)
    (place / "deep" / "up").symlink_to(place, target_is_directory=True)
    (folder / "train" / ".cache").mkdir()
    source = open_source(folder_data(folder), "train", 4)
    assert len(source) == before + 2
    assert [Path(source.name(i)).name for i in (0, 1)] == ["b.png", "ä.Jpg"]
    assert source.encoded(1) == (content, 0)


@pytest.mark.parametrize("split", ["val", "validation", "test", None])
def test_folder_finds_the_validation_images(split, folder):
    source = open_source(folder_data(folder), split, 4)
    assert source.name(0).startswith(str(folder / "val"))


def test_folder_of_that_very_name_goes_first(folder):
    os.rename(folder / "val", folder / "test")
    os.symlink(folder / "train", folder / "val")
    assert open_source(folder_data(folder), "test", 4).name(0).startswith(str(folder / "test"))
    assert open_source(folder_data(folder), None, 4).name(0).startswith(str(folder / "val"))


def no_images(folder: Path) -> None:
    for path in (folder / "train" / "n02105855").iterdir():
        path.unlink()


def no_classes(folder: Path) -> None:
    (folder / "train").rename(folder / "old")
    (folder / "train").mkdir()


def only_files(folder: Path) -> None:
    no_classes(folder)
    (folder / "train" / "a.jpg").write_bytes(b"")


def fewer_in_val(folder: Path) -> None:
    (folder / "val" / "n02105855").rename(folder / "old")


def other_in_val(folder: Path) -> None:
    (folder / "train" / "n02105855").rename(folder / "old")


@pytest.mark.parametrize(
    ("spoil", "split", "named"),
    [
        (no_images, "train", "train/n02105855 has no images"),
        (no_classes, "train", "train holds no class folders"),
        (only_files, "train", "train holds images such as a.jpg but no class folders"),
        (fewer_in_val, "val", "val has no folder for class 'n02105855'"),
        (other_in_val, "val", "val/n02105855 is no class of"),
        (lambda folder: None, "trian", "no folder 'trian'; did you mean 'train'?"),
        (lambda folder: None, "train", "num_classes: 1000, but the data have 4 classes"),
    ],
)
def test_folder_that_does_not_fit_is_named(spoil, split, named, folder):
    spoil(folder)
    assert named in message(folder_data(folder), split)


def test_missing_folders_are_named(tmp_path):
    assert "needs the folder around train/, val/" in message(Data(source="folder"))
    assert "cannot read" in message(folder_data(tmp_path / "nowhere"))
    assert "has no folder 'train'; it has no folders" in message(folder_data(tmp_path))
    assert "local disk" in message(folder_data("gs://bucket/imagenet"))


def test_removed_image_is_damaged(folder):
    source = open_source(folder_data(folder), "train", 4)
    os.unlink(source.name(3))
    with pytest.raises(DamagedRecord, match=f"{source.name(3)}: No such file"):
        source.encoded(3)


# --- The others -----------------------------------------------------------------------------------


def test_noise_larger_than_memory_is_refused():
    with pytest.raises(BadInput, match=r"config\.data\.image_size: 200000 is too large .* 4096"):
        FakeSource(100, 200_000, 10)


def test_digits_and_noise_have_the_same_face():
    digit = open_source(Data(), None, 10)
    fake = open_source(Data(source="fake", train_examples=20, image_size=8), "train", 5)
    assert isinstance(digit, TfdsSource) and isinstance(fake, FakeSource)
    assert Image.open(io.BytesIO(digit.encoded(0)[0])).format == "PNG"
    assert fake.encoded(7)[1] == 2 and fake[7][0].size == (8, 8) and fake.name(7)
    assert digit.classes is None and fake.classes is None
    assert not digit.several and not fake.several
