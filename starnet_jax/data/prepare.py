"""Prepares a TFDS dataset, first of all ImageNet from its tar files.

`python -m starnet_jax.data.prepare --name=imagenet2012 --manual_dir=DIR_WITH_TARS --dir=OUT`
"""

import contextlib
import os
import shutil
import signal
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from starnet_jax import command
from starnet_jax.data import dataset, ilsvrc_tar, imagenet, records
from starnet_jax.errors import BadInput, nearest
from starnet_jax.log import log

WHERE = "https://image-net.org/download-images (after registration)"


def _parser() -> command.Parser:
    parser = command.Parser(
        prog="python -m starnet_jax.data.prepare",
        description="Writes a TFDS dataset for training. ImageNet is made from ILSVRC2012_img_"
        "train.tar and ILSVRC2012_img_val.tar; what TFDS can download, it downloads.",
        epilog="A dataset appears under its name when it is complete, and not before.",
    )
    parser.add_argument(
        "--name",
        default="imagenet2012",
        help="of the dataset in TFDS, such as imagenet2012 (the default) or imagenet_v2/topimages",
    )
    parser.add_argument(
        "--manual_dir",
        metavar="DIR_WITH_TARS",
        help="where the files lie that nobody but you may download",
    )
    parser.add_argument(
        "--dir",
        required=True,
        metavar="OUT",
        help="the data.dir of the runs, local or gs://; the dataset goes to OUT/NAME/VERSION",
    )
    parser.add_argument(
        "--file_format",
        choices=records.FORMATS,
        help="array_record (the default on a disk) needs no index; tfrecord (the default on gs://) "
        "is what most tools read",
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    return command.run(_run, argv)


def _run(argv: Sequence[str]) -> None:
    arguments = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        builder = prepare(
            arguments.name,
            arguments.dir,
            arguments.manual_dir,
            arguments.file_format or records.FORMATS[records.is_remote(arguments.dir)],
        )
    except KeyboardInterrupt:
        print("interrupted; nothing half-written is left", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    print(f"{'split':<12} {'examples':>10} {'files':>6} {'GB':>7}")
    for name, split in builder.info.splits.items():
        size = split.num_bytes / 1e9
        print(f"{name:<12} {split.num_examples:>10} {split.num_shards:>6} {size:7.2f}")
    print(
        f"ready in {builder.data_path}; train with --config.data.source=tfds "
        f"--config.data.name={arguments.name} --config.data.dir={arguments.dir}"
    )


def prepare(name: str, data_dir: str, manual_dir: str | None, file_format: str):
    """Writes the dataset below `data_dir`, if it is not there yet, and returns its builder.

    Everything that can be known to fail is checked first. The files are written to a folder
    `incomplete.*`, which takes the dataset's name at the end and is removed after a failure.

    Args:
      name: TFDS name, with config where it has several.
      data_dir: local or `gs://`.
      manual_dir: the folder with the files that TFDS cannot download.
      file_format: `array_record` or `tfrecord`.

    Raises:
      BadInput: an unknown dataset, files that are missing or damaged, a folder that cannot be
        written or is too small, a failed download.
    """
    builder = _builder(name, data_dir)
    if builder.data_path.exists():
        return _existing(builder, file_format)
    tars = _find_tars(builder.name, manual_dir)
    if not tars and manual_dir is None and builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
        instructions = " ".join(builder.MANUAL_DOWNLOAD_INSTRUCTIONS.split())
        raise BadInput(f"--manual_dir: {name} needs files that you fetch by hand: {instructions}")
    with _no_folders_after_failure(builder), _errors_in_one_line(builder, manual_dir):
        _check_writable(data_dir, tars)
        _show_totals(builder, tars)
        _report_leftovers(builder)
        log(f"writing {builder.info.full_name} as {file_format} to {builder.data_path}")
        with contextlib.redirect_stdout(sys.stderr):
            _write(builder, manual_dir, file_format)
    for tar in imagenet.TARS.get(builder.name, ()):
        found = builder.info.splits[tar.split].num_examples
        if found != tar.num_examples:
            log(f"{tar.name} held {found} images; the full set has {tar.num_examples}")
    return builder


def _builder(name: str, data_dir: str):
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow greets on import
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    import tensorflow_datasets as tfds

    try:
        return tfds.builder(name, data_dir=data_dir, try_gcs=False)
    except tfds.core.registered.DatasetNotFoundError:
        known = nearest(name, dataset.known_names())
        known = known if "did you mean" in known else ""
        raise BadInput(f"--name: no TFDS dataset {name!r}{known}") from None
    except (ValueError, AssertionError) as error:  # config or version
        raise BadInput(f"--name: {' '.join(str(error).split())}") from None
    except ImportError as error:
        raise BadInput(f"--name: {name!r} needs a package: {records.reason(error)}") from None
    except (*records.file_errors(), RuntimeError) as error:
        raise BadInput(f"--dir: cannot read {data_dir}: {records.reason(error)}") from None


def _existing(builder, file_format: str):
    if not (builder.data_path / "dataset_info.json").exists():
        raise BadInput(f"--dir: {builder.data_path} is there, but holds no dataset; remove it")
    stored = builder.info.file_format.value
    if stored != file_format:
        raise BadInput(
            f"--file_format: {builder.data_path} is there already, as {stored}; "
            "remove it first, or take another --dir"
        )
    log(f"{builder.data_path} is there already; nothing to do")
    return builder


def _find_tars(name: str, manual_dir: str | None) -> list[tuple[imagenet.Tar, Path]]:
    """The tar files that the dataset is made of, found and checked."""
    import tensorflow_datasets as tfds

    expected = imagenet.TARS.get(name, ())
    if not expected:
        return []
    names = " and ".join(tar.name for tar in expected)
    if manual_dir is None:
        raise BadInput(f"--manual_dir: {name} is made of {names}, from {WHERE}; say where they lie")
    folder = Path(manual_dir).expanduser()
    if not folder.is_dir():
        raise BadInput(f"--manual_dir: no directory {manual_dir}; it should hold {names}")
    missing = [tar.name for tar in expected if not (folder / tar.name).is_file()]
    if missing:
        raise BadInput(f"--manual_dir: {manual_dir} lacks {' and '.join(missing)}, from {WHERE}")
    wnids = tfds.core.tfds_path("datasets/imagenet2012/labels.txt").read_text().split()
    for tar in expected:
        ilsvrc_tar.check(tar, folder / tar.name, wnids)
    return [(tar, folder / tar.name) for tar in expected]


def _check_writable(data_dir: str, tars: list) -> None:
    if records.is_remote(data_dir):
        return
    folder = Path(data_dir).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise BadInput(f"--dir: cannot write to {data_dir}: {error.strerror}") from None
    needed, free = sum(path.stat().st_size for _, path in tars), shutil.disk_usage(folder).free
    if free < needed:
        raise BadInput(
            f"--dir: {data_dir} has {free / 1e9:.0f} GB free, too little for {needed / 1e9:.0f} GB"
        )


def _show_totals(builder, tars: list) -> None:
    """Tells TFDS how many examples there will be, so that its bars show the time that is left."""
    from tensorflow_datasets.core import splits

    full = [tar for tar, path in tars if path.stat().st_size == tar.num_bytes]
    if full:
        expected = [
            splits.SplitInfo(name=tar.split, shard_lengths=[tar.num_examples], num_bytes=0)
            for tar in full
        ]
        builder.info.set_splits(splits.SplitDict(expected))


def _report_leftovers(builder) -> None:
    """Names the folders that a killed preparation left; another one may still be writing there."""
    if builder.data_path.parent.exists():
        for path in builder.data_path.parent.glob("incomplete.*"):
            log(f"{path} is left from a preparation that was killed, or still runs; you may remove")


def _write(builder, manual_dir: str | None, file_format: str) -> None:
    import tensorflow_datasets as tfds

    manual_dir = manual_dir and os.path.expanduser(manual_dir)
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(manual_dir=manual_dir),
        file_format=file_format,
    )


@contextlib.contextmanager
def _errors_in_one_line(builder, manual_dir: str | None):
    """Turns what files, disk, network and TFDS do wrong into BadInput."""
    import tensorflow_datasets as tfds

    try:
        yield
    except tarfile.TarError as error:
        raise BadInput(f"--manual_dir: a tar file in {manual_dir} is damaged: {error}") from None
    except (
        *records.file_errors(),
        tfds.download.DownloadError,
        AssertionError,  # TFDS misses a file in manual_dir
        ImportError,
        RuntimeError,  # TFDS cannot encode an example
    ) as error:
        reason = " ".join(str(error).split())  # with the name of the file
        raise BadInput(f"--name: {builder.name} could not be prepared: {reason}") from None


@contextlib.contextmanager
def _no_folders_after_failure(builder):
    """Removes the folders that a failure leaves empty; finished downloads stay for the next try."""
    downloads, target = Path(builder.data_dir_root, "downloads"), Path(builder.data_path)
    inner_first = downloads / "extracted", downloads / builder.name, downloads, *target.parents
    made = [folder for folder in inner_first if not folder.exists()]
    try:
        yield
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
