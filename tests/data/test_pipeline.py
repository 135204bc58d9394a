import gc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from starnet_jax.config import Augment, Data
from starnet_jax.data import decode, digits, order, pipeline, randaugment, workers
from starnet_jax.data.records import DamagedRecord
from starnet_jax.data.source import FakeSource, FolderSource, open_source
from starnet_jax.errors import BadInput

AUGMENT = Augment()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return Data(source="digits", dir=str(tmp_path_factory.mktemp("tfds")), image_size=32)


def training(source, steps, share=slice(None), seed=0, augment=AUGMENT, workers=2, processes=None):
    return pipeline.train_batches(
        source,
        augment,
        image_size=32,
        batch_size=24,
        seed=seed,
        steps=steps,
        share=share,
        workers=workers,
        processes=processes,
    )


def train(*args, **kwargs):
    return list(training(*args, **kwargs))


def evaluate(source, share=slice(None), batch_size=100, processes=None):
    return list(
        pipeline.eval_batches(
            source,
            image_size=32,
            crop=0.875,
            batch_size=batch_size,
            share=share,
            workers=2,
            processes=processes,
        )
    )


@pytest.fixture
def photos(tmp_path):
    """An image folder of 48 small JPEGs in two classes."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 48), ("val", 10)):
        for i in range(count):
            path = tmp_path / split / f"class{i % 2}" / f"{i:02d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(256, size=(40, 30 + i, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
    return tmp_path


def spoil(source, *indices):
    """Cuts the files of some examples in the middle."""
    for i in indices:
        path = Path(source.name(i))
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])


def assert_equal(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        for key in batch:
            np.testing.assert_array_equal(batch[key], other[key])


def test_digits_are_the_scans_of_scikit_learn(data):
    splits = {split: open_source(data, split, 10) for split in ("train", "test")}
    assert {name: len(source) for name, source in splits.items()} == {"train": 1347, "test": 450}
    assert list(splits["test"].class_names) == list("0123456789")
    margin = digits.MARGIN
    stored = []
    for source in splits.values():
        for i in range(len(source)):
            image, label = source[i]
            pixels = np.asarray(image)[margin:-margin, margin:-margin, 0]
            stored.append((np.round(pixels * (16 / 255)).astype(int).tobytes(), label))
    scans = load_digits()
    original = [
        (x.astype(int).tobytes(), int(y)) for x, y in zip(scans.images, scans.target, strict=True)
    ]
    assert sorted(stored) == sorted(original)


def test_digits_are_prepared_once(data):
    open_source(data, "train", 10)
    files = {file: file.stat().st_mtime_ns for file in Path(data.dir).rglob("digits-*")}
    assert len(files) == 2
    digits.prepare(data.dir)
    assert {file: file.stat().st_mtime_ns for file in files} == files


def test_batches_are_uint8_images_with_labels_and_indices(data):
    source = open_source(data, "train", 10)
    (batch,) = train(source, range(1))
    shapes = {key: (value.shape, value.dtype) for key, value in batch.items()}
    assert shapes == {
        "image": ((24, 32, 32, 3), np.uint8),
        "label": ((24,), np.int32),
        "index": ((24,), np.int32),
    }
    assert [source[int(i)][1] for i in batch["index"]] == batch["label"].tolist()


def test_a_restart_gives_the_same_batches_whatever_the_threads(data):
    source = open_source(data, "train", 10)
    whole = train(source, range(60))
    assert_equal(train(source, range(57, 60), workers=5), whole[57:])


def test_two_processes_together_make_the_batch_of_one(data):
    source = open_source(data, "train", 10)
    whole = train(source, range(3))
    halves = zip(
        train(source, range(3), slice(0, 12)), train(source, range(3), slice(12, 24)), strict=True
    )
    joined = [{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in halves]
    assert_equal(joined, whole)


def test_another_seed_gives_other_batches(data):
    source = open_source(data, "train", 10)
    (one,), (two,) = train(source, range(1)), train(source, range(1), seed=1)
    assert (one["index"] != two["index"]).any()


@pytest.mark.parametrize("batch_size", [90, 100, 600])
def test_evaluation_sees_every_example_once_and_masks_the_filling(data, batch_size):
    source = open_source(data, "test", 10)
    shares = [slice(0, batch_size // 2), slice(batch_size // 2, batch_size)]
    parts = [evaluate(source, share, batch_size) for share in shares]
    assert len(parts[0]) == len(parts[1])
    batches = parts[0] + parts[1]
    seen = np.concatenate([b["index"][b["mask"]] for b in batches])
    assert sorted(seen) == list(range(450))


def test_an_error_while_decoding_reaches_the_caller():
    class Broken(FakeSource):
        def encoded(self, index):
            raise OSError("broken file")

    with pytest.raises(OSError, match="broken file"):
        train(Broken(48, 32, 10), range(1))


# --- What stands at a position --------------------------------------------------------------------


def test_every_image_is_the_one_that_its_step_and_position_say(photos):
    source = FolderSource(str(photos), "train")
    augment = Augment(crop_scale=(0.3, 0.9), flip=0.2, randaugment="rand-m9-mstd0.5-inc1")
    policy = randaugment.parse(augment.randaugment)
    batches = train(source, range(1, 3), augment=augment, seed=7)
    for step, batch in zip(range(1, 3), batches, strict=True):
        indices = order.step_indices(7, step, 24, len(source))
        np.testing.assert_array_equal(batch["index"], indices)
        for position in range(24):
            encoded, label = source.encoded(indices[position])
            rng = order.example_rng(7, step, position)
            expected = decode.train_image(encoded, 32, rng, (0.3, 0.9), flip=0.2, policy=policy)
            np.testing.assert_array_equal(batch["image"][position], expected)
            assert batch["label"][position] == label


def test_an_unknown_policy_is_refused_before_the_first_batch():
    with pytest.raises(BadInput, match="unknown token 'q3'"):
        training(FakeSource(48, 32, 10), range(1), augment=Augment(randaugment="rand-q3"))


def test_several_labels_are_filled_up():
    class Several(FakeSource):
        def encoded(self, index):
            return super().encoded(index)[0], tuple(range(index))

    (batch,) = evaluate(Several(3, 32, 10), batch_size=4)
    assert batch["label"].shape == (4, pipeline.MAX_LABELS)
    assert [row[row >= 0].tolist() for row in batch["label"]] == [[], [0], [0, 1], []]
    assert batch["mask"].tolist() == [True, True, True, False]


# --- Images that cannot be decoded ----------------------------------------------------------------


def test_a_broken_image_is_left_out_counted_and_logged(photos, capsys):
    source = FolderSource(str(photos), "train")
    (whole,) = train(source, range(1))
    indices = whole["index"]
    spoil(source, indices[3], indices[7], indices[8], indices[23])
    (batch,) = train(source, range(1))

    takes_over = {3: 4, 7: 9, 8: 9, 23: 0}
    expected = [indices[takes_over.get(position, position)] for position in range(24)]
    assert batch["index"].tolist() == expected
    assert batch["label"].tolist() == [source.encoded(i)[1] for i in expected]
    for position in set(range(24)) - set(takes_over):
        np.testing.assert_array_equal(batch["image"][position], whole["image"][position])
    rng = order.example_rng(0, 0, 7)  # the stream is the position's, not the example's
    moved = decode.train_image(source.encoded(indices[9])[0], 32, rng)
    np.testing.assert_array_equal(batch["image"][7], moved)

    logged = capsys.readouterr().err
    for position in takes_over:
        assert source.name(indices[position]) in logged
    assert "5 so far" in logged and "6 so far" not in logged  # position 7 comes across two
    assert_equal(train(source, range(1), processes=True), [batch])
    halves = [train(source, range(1), share)[0] for share in (slice(0, 12), slice(12, 24))]
    assert_equal([{k: np.concatenate([half[k] for half in halves]) for k in batch}], [batch])


def test_a_damaged_record_is_left_out_too(capsys):
    class Damaged(FakeSource):
        def encoded(self, index):
            if index % 2:
                raise DamagedRecord(f"shard 1, record {index}: the checksum is wrong")
            return super().encoded(index)

    batches = train(Damaged(48, 32, 10), range(2))
    assert all((batch["index"] % 2 == 0).all() for batch in batches)
    logged = capsys.readouterr().err
    assert "the checksum is wrong" in logged
    assert logged.count("left out") < 20  # not a line for each of the many


def test_a_batch_without_one_good_image_is_an_error(photos):
    source = FolderSource(str(photos), "train")
    spoil(source, *range(48))
    with pytest.raises(BadInput, match="not one image of step 0"):
        train(source, range(1))


@pytest.mark.parametrize("processes", [False, True])
def test_evaluation_fails_and_names_the_broken_image(photos, processes):
    source = FolderSource(str(photos), "val")
    spoil(source, 7)
    with pytest.raises(BadInput, match=source.name(7)):
        evaluate(source, processes=processes)


# --- Processes ------------------------------------------------------------------------------------


def test_processes_make_the_batches_of_threads(data):
    augment = Augment(randaugment="rand-m1-mstd0.5-inc1")
    source = open_source(data, "train", 10)
    threads = train(source, range(9), augment=augment, processes=False)
    assert_equal(train(source, range(9), augment=augment, processes=True, workers=3), threads)
    test = open_source(data, "test", 10)
    assert_equal(evaluate(test, processes=True), evaluate(test, processes=False))


def test_many_workers_are_processes(monkeypatch):
    asked = []
    monkeypatch.setattr(workers, "_Processes", lambda *args: asked.append(args[2]))
    with pytest.raises(AttributeError):
        train(FakeSource(48, 32, 10), range(1), workers=5)
    assert asked == [5]


@pytest.fixture
def helpers(monkeypatch):
    """The helper processes that a test starts."""
    started = []

    class Recorded(workers._Helper):
        def __init__(self, *args):
            super().__init__(*args)
            started.append(self)

    monkeypatch.setattr(workers, "_Helper", Recorded)
    return started


def test_no_process_outlives_its_batches(helpers):
    batches = training(FakeSource(480, 32, 10), range(20), processes=True)
    next(batches)
    assert all(helper.process.poll() is None for helper in helpers)
    batches.close()
    assert len(helpers) == 2
    assert all(helper.process.poll() is not None for helper in helpers)


def test_a_process_that_dies_is_an_error_and_no_silence(helpers):
    batches = training(FakeSource(4800, 32, 10), range(200), processes=True)
    next(batches)
    helpers[0].process.kill()
    with pytest.raises(RuntimeError, match="data process ended"):
        list(batches)
    gc.collect()  # of the failed calls' frames, which once crashed the interpreter


def test_memory_is_used_again_but_never_under_a_batch_in_use(data):
    source = open_source(data, "train", 10)
    expected = train(source, range(20), processes=False)
    places, held = set(), []
    for i, batch in enumerate(training(source, range(20), processes=True)):
        places.add(batch["image"].ctypes.data)
        if i in (2, 11):
            held.append((i, batch["image"][:]))  # a view counts as use
    assert len(places) < 12
    for i, image in held:
        np.testing.assert_array_equal(image, expected[i]["image"])
