import os
import pickle
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from starnet_jax.data import records
from starnet_jax.data.records import DamagedRecord, Shard, open_records
from starnet_jax.errors import BadInput

COUNTS = (5, 1, 7)


def framed(data: bytes) -> bytes:
    """One TFRecord."""
    length = struct.pack("<Q", len(data))
    checksums = [records.masked(google_crc32c.value(part)) for part in (length, data)]
    return length + checksums[0] + data + checksums[1]


def content(shard: int, record: int) -> bytes:
    return np.random.default_rng([shard, record]).bytes(100 * shard + record)


def write(folder: Path, file_format: str, counts=COUNTS) -> list[Shard]:
    """Writes files with these many records each."""
    shards = []
    for i, count in enumerate(counts):
        path = folder / f"data-train.{file_format}-{i:05}-of-{len(counts):05}"
        if file_format == "tfrecord":
            path.write_bytes(b"".join(framed(content(i, k)) for k in range(count)))
        else:
            writer = ArrayRecordWriter(str(path), "group_size:1")
            for k in range(count):
                writer.write(content(i, k))
            writer.close()
        shards.append(Shard(str(path), 0, count, count))
    return shards


EXPECTED = [content(i, k) for i, count in enumerate(COUNTS) for k in range(count)]


@pytest.fixture(params=records.FORMATS)
def opened(request, tmp_path):
    return open_records(write(tmp_path, request.param), request.param, tmp_path)


def read_all(source) -> list[bytes]:
    return [source[i] for i in range(len(source))]


def test_all_records_are_read_in_order(opened):
    assert read_all(opened) == EXPECTED


def test_names_tell_file_and_record(opened):
    assert opened.name(0).endswith("-00000-of-00003, record 0")
    assert opened.name(5).endswith("-00001-of-00003, record 0")
    assert opened.name(12).endswith("-00002-of-00003, record 6")


@pytest.mark.parametrize("index", [-1, 13])
def test_index_outside_is_refused(opened, index):
    with pytest.raises(IndexError):
        opened[index]


@pytest.mark.parametrize("file_format", records.FORMATS)
def test_parts_of_files_are_read(file_format, tmp_path):
    first, second, third = write(tmp_path, file_format)
    parts = [
        first._replace(skip=2, take=2),
        second._replace(take=0),
        third._replace(skip=6, take=1),
    ]
    source = open_records(parts, file_format, tmp_path)
    assert read_all(source) == [EXPECTED[2], EXPECTED[3], EXPECTED[12]]
    assert source.name(0).endswith("record 2")


def test_no_files_are_an_empty_split(tmp_path):
    for file_format in records.FORMATS:
        assert len(open_records([], file_format, tmp_path)) == 0


def test_pickled_records_read_the_same(opened):
    opened[0]  # opens a file
    assert read_all(pickle.loads(pickle.dumps(opened))) == EXPECTED


def test_threads_share_the_records(opened):
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(opened.__getitem__, list(range(13)) * 50)) == EXPECTED * 50


def test_forked_and_spawned_processes_read_at_once(opened):
    """In a process of its own: forking is not safe where JAX has threads."""
    script = (
        "import multiprocessing, pickle, sys, threading\n"
        "source = pickle.loads(sys.stdin.buffer.read())\n"
        "indices = list(range(13)) * 100\n"
        "read = lambda: [source[i] for i in indices]\n"
        "expected = read()\n"
        "def child():\n"
        "    assert read() == expected\n"
        "context = multiprocessing.get_context('fork')\n"
        "stop = threading.Event()\n"
        "def parent():\n"
        "    while not stop.is_set():\n"
        "        assert read() == expected\n"
        "thread = threading.Thread(target=parent)\n"
        "thread.start()\n"
        "children = [context.Process(target=child) for _ in range(3)]\n"
        "[c.start() for c in children]\n"
        "[c.join() for c in children]\n"
        "stop.set()\n"
        "thread.join()\n"
        "assert all(c.exitcode == 0 for c in children)\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", script], input=pickle.dumps(opened), capture_output=True, timeout=60
    )
    assert process.returncode == 0, process.stderr.decode()


def test_tensorflow_reads_what_is_framed_here(tmp_path):
    import tensorflow as tf

    shards = write(tmp_path, "tfrecord")
    dataset = tf.data.TFRecordDataset([shard.path for shard in shards])
    assert list(dataset.as_numpy_iterator()) == EXPECTED


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.lists(st.binary(max_size=300), max_size=12))
def test_scan_finds_any_records(data):
    file = b"".join(map(framed, data))
    offsets, sizes, damage = records.scan(lambda at, n: file[at : at + n], len(file))
    assert not damage
    assert [file[o + 12 : o + 12 + s] for o, s in zip(offsets, sizes, strict=True)] == data


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(max_size=40), min_size=1, max_size=6), st.data())
def test_scan_keeps_what_lies_before_the_damage(data, draw):
    file = b"".join(map(framed, data))
    ends = np.cumsum([16 + len(one) for one in data])
    cut = draw.draw(st.integers(0, len(file) - 1))
    whole = int(np.searchsorted(ends, cut, side="right"))
    offsets, _, damage = records.scan(lambda at, n: file[:cut][at : at + n], cut)
    assert len(offsets) == whole
    assert bool(damage) == (cut not in (0, *ends))

    place = draw.draw(st.integers(0, len(data) - 1))
    start = ends[place] - 16 - len(data[place])
    flipped = bytearray(file)
    flipped[start + draw.draw(st.integers(0, 11))] ^= 1 << draw.draw(st.integers(0, 7))
    offsets, _, damage = records.scan(lambda at, n: bytes(flipped[at : at + n]), len(flipped))
    assert len(offsets) == place and damage


@pytest.mark.parametrize("file_format", records.FORMATS)
def test_truncated_file_fails_where_it_is_cut_and_names_it(file_format, tmp_path, capsys):
    shards = write(tmp_path, file_format)
    os.truncate(shards[2].path, os.path.getsize(shards[2].path) - 500)
    source = open_records(shards, file_format, tmp_path)
    assert len(source) == 13
    assert [source[i] for i in range(6)] == EXPECTED[:6]
    with pytest.raises(DamagedRecord) as error:
        source[12]
    assert f"{shards[2].path}, record 6: the file" in str(error.value)
    if file_format == "tfrecord":
        assert source[6] == EXPECTED[6]
        assert "3 of its 7 records cannot be read" in capsys.readouterr().err


def test_flipped_bit_in_an_array_record_fails_and_names_it(tmp_path):
    shards = write(tmp_path, "array_record")
    path = Path(shards[2].path)
    damaged = bytearray(path.read_bytes())
    damaged[700] ^= 1
    path.write_bytes(damaged)
    source = open_records(shards, "array_record", tmp_path)
    with pytest.raises(DamagedRecord, match=f"{path}, record 2: Corrupted"):
        source[8]
    assert [source[i] for i in range(13) if i != 8] == EXPECTED[:8] + EXPECTED[9:]


def test_flipped_bit_in_the_data_of_a_tfrecord_fails_and_names_it(tmp_path):
    shards = write(tmp_path, "tfrecord")
    path = Path(shards[2].path)
    damaged = bytearray(path.read_bytes())
    damaged[50] ^= 1
    path.write_bytes(damaged)
    source = open_records(shards, "tfrecord", tmp_path)
    assert source[7] == EXPECTED[7]
    with pytest.raises(DamagedRecord, match="record 0: the checksum of the data is wrong"):
        source[6]


def test_file_replaced_while_it_is_read_is_noticed(tmp_path):
    shards = write(tmp_path, "tfrecord")
    source = open_records(shards, "tfrecord", tmp_path)
    Path(shards[2].path).write_bytes(framed(b"short") * 100)
    with pytest.raises(DamagedRecord, match="record 3: the file has changed"):
        source[9]


def test_index_is_made_once(tmp_path, monkeypatch):
    shards = write(tmp_path, "tfrecord")
    open_records(shards, "tfrecord", tmp_path / "cache")
    monkeypatch.setattr(records, "_scan_file", lambda path: pytest.fail("scanned again"))
    assert read_all(open_records(shards, "tfrecord", tmp_path / "cache")) == EXPECTED


def test_changed_file_is_indexed_again_in_the_same_place(tmp_path):
    shards = write(tmp_path, "tfrecord")
    open_records(shards, "tfrecord", tmp_path / "cache")
    changed = [content(9, k) for k in range(7)]
    Path(shards[2].path).write_bytes(b"".join(map(framed, changed)))
    source = open_records(shards, "tfrecord", tmp_path / "cache")
    assert read_all(source) == EXPECTED[:6] + changed
    assert len(list((tmp_path / "cache" / "index").iterdir())) == 1


@pytest.mark.parametrize("spoiled", [b"", b"PK\3\4 no archive", None])
def test_spoiled_index_is_made_again(spoiled, tmp_path):
    shards = write(tmp_path, "tfrecord")
    open_records(shards, "tfrecord", tmp_path / "cache")
    (path,) = (tmp_path / "cache" / "index").iterdir()
    path.write_bytes(path.read_bytes()[:200] if spoiled is None else spoiled)
    assert read_all(open_records(shards, "tfrecord", tmp_path / "cache")) == EXPECTED


def test_cache_that_cannot_be_written_costs_only_a_message(tmp_path, capsys):
    shards = write(tmp_path, "tfrecord")
    (tmp_path / "cache").write_text("")
    assert read_all(open_records(shards, "tfrecord", tmp_path / "cache")) == EXPECTED
    assert "cannot keep" in capsys.readouterr().err


def test_remote_files_are_read_in_blocks(tmp_path, monkeypatch):
    """The way to `gs://`, walked on local files."""
    shards = write(tmp_path, "tfrecord")
    monkeypatch.setattr(records, "is_remote", lambda path: True)
    monkeypatch.setattr(records, "REMOTE_BLOCK", 150)
    assert read_all(open_records(shards, "tfrecord", tmp_path / "cache")) == EXPECTED


@pytest.mark.parametrize("file_format", records.FORMATS)
def test_missing_file_is_bad_input(file_format, tmp_path):
    shards = write(tmp_path, file_format)
    os.unlink(shards[1].path)
    with pytest.raises(BadInput, match=f"cannot read {shards[1].path}: No such file"):
        open_records(shards, file_format, tmp_path)


def test_array_record_lost_after_the_start_is_no_damage(tmp_path):
    shards = write(tmp_path, "array_record")
    source = open_records(shards, "array_record", tmp_path)
    os.rename(shards[2].path, tmp_path / "elsewhere")
    with pytest.raises(BadInput) as error:
        source[8]
    path = shards[2].path
    assert str(error.value) == f"config.data.dir: cannot read {path}: No such file or directory"
    assert not isinstance(error.value, DamagedRecord)
    os.rename(tmp_path / "elsewhere", path)
    assert source[8] == EXPECTED[8]


def test_array_record_that_cannot_be_opened_is_no_damage(tmp_path):
    shards = write(tmp_path, "array_record")
    source = open_records(shards, "array_record", tmp_path)
    os.rename(shards[2].path, tmp_path / "elsewhere")
    os.mkdir(shards[2].path)
    with pytest.raises(BadInput, match=f"cannot read {shards[2].path}: Is a directory") as error:
        source[8]
    assert not isinstance(error.value, DamagedRecord)


def test_array_record_without_content_is_damaged_and_says_why(tmp_path):
    shards = write(tmp_path, "array_record")
    os.truncate(shards[2].path, 0)
    source = open_records(shards, "array_record", tmp_path)
    with pytest.raises(DamagedRecord, match="record 2: the file is cut off or damaged: ArrayRec"):
        source[8]


def test_file_of_another_dataset_is_bad_input(tmp_path):
    shards = write(tmp_path, "tfrecord")
    shards[1] = shards[1]._replace(take=2, length=2)
    with pytest.raises(BadInput, match="holds 1 records, but the dataset says 2"):
        open_records(shards, "tfrecord", tmp_path)


def test_unknown_format_is_bad_input(tmp_path):
    with pytest.raises(BadInput, match="stored as riegeli"):
        open_records([], "riegeli", tmp_path)


def test_limit_on_open_files_is_raised_or_named(tmp_path, monkeypatch):
    import resource

    limits = {"soft": 100, "hard": 4096}
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limits["soft"], limits["hard"]))
    monkeypatch.setattr(resource, "setrlimit", lambda which, pair: limits.update(soft=pair[0]))
    records._allow_open_files(1024)
    assert limits["soft"] == 1536
    limits["hard"] = 1024
    limits["soft"] = 100
    with pytest.raises(BadInput, match="ulimit -n"):
        records._allow_open_files(1024)


def test_progress_tells_the_time_that_is_left(monkeypatch, capsys):
    monkeypatch.setattr(records, "PROGRESS_SECONDS", -1.0)
    assert list(records.progress("abc", 3, "files indexed")) == list("abc")
    assert "2/3 files indexed, about 0 s left" in capsys.readouterr().err


def test_array_records_in_a_bucket_are_refused_with_the_way_out(tmp_path):
    shard = records.Shard("gs://bucket/x.array_record-00000-of-00001", 0, 1, 1)
    with pytest.raises(BadInput, match="--file_format=tfrecord"):
        records.open_records([shard], "array_record", tmp_path)
