"""The command `python -m starnet_jax.data.doctor`: whether the data are fit to train on, how fast.

To be run before an accelerator is paid for; it needs none.
"""

import io
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from starnet_jax import command
from starnet_jax import config as config_lib
from starnet_jax.config import RunConfig
from starnet_jax.data import decode, pipeline, records
from starnet_jax.data.source import Source, open_source
from starnet_jax.errors import BadInput
from starnet_jax.log import log

SAMPLE = 64  # images of each split that are decoded
SHEET = (6, 6)  # rows and columns
TILE = 160  # pixels, a label line of 16 included
SECONDS = 5.0  # that the speed is measured for


def _parser() -> command.Parser:
    parser = command.Parser(
        prog="python -m starnet_jax.data.doctor",
        description="Opens, counts, decodes and times the data of a config; needs no accelerator.",
        epilog="--config.KEY=VALUE overrides a setting: --config.data.dir=DIR",
    )
    parser.add_argument("--config", required=True, metavar="FILE[:ARGUMENT]")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("doctor.png"),
        metavar="PNG",
        help="the contact sheet of augmented training images (default: doctor.png)",
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    return command.run(_run, argv)


def _run(argv: Sequence[str]) -> None:
    flags, overrides = command.split_overrides(argv)
    arguments = _parser().parse_args(flags)
    config = config_lib.load(arguments.config, overrides)
    splits = {}
    for use, split in (("train", config.data.train_split), ("eval", config.data.eval_split)):
        log(f"opening the {use} split")
        splits[use] = open_source(config.data, split, config.model.num_classes)
        print(f"{use}: {len(splits[use]):,} images, {config.model.num_classes} classes")
    for use, source in splits.items():
        log(f"decoding {SAMPLE} images to {use} on")
        print(f"{use}: {sample(source, config.seed)}")
    train = splits["train"]
    config_lib.with_train_examples(config, len(train))
    write_sheet(config, train, arguments.output)
    print(f"sheet: {arguments.output}, augmented training images with their labels; look at it")
    log(f"measuring speed for {SECONDS:.0f} s")
    print(speed_in_words(images_per_second(config, train), len(train), os.cpu_count()))


def sample(source: Source, seed: int) -> str:
    """Decodes a random sample; returns sizes, modes and failures in words.

    Raises:
      BadInput: not one image of the sample can be decoded.
    """
    rng = np.random.default_rng(seed)
    indices = rng.choice(len(source), min(SAMPLE, len(source)), replace=False)
    sizes, modes, failures = [], [], []
    for index in map(int, indices):
        try:
            encoded, _ = source.encoded(index)
            if isinstance(encoded, bytes):
                sizes.append(decode.rgb(encoded).size)
                modes.append(Image.open(io.BytesIO(encoded)).mode)
            else:
                sizes.append(encoded.size)
                modes.append(encoded.mode)
        except decode.Undecodable as error:
            failures.append(f"{source.name(index)}: {error}")
        except records.DamagedRecord as error:
            failures.append(str(error))
    if not sizes:
        raise BadInput(f"none of {len(indices)} images can be decoded, first {failures[0]}")
    areas = np.argsort([w * h for w, h in sizes])
    smallest, median, largest = (sizes[areas[i]] for i in (0, len(areas) // 2, -1))
    spelled = ", ".join(f"{modes.count(mode)} {mode}" for mode in sorted(set(modes)))
    text = (
        f"{len(sizes)} of {len(indices)} sampled images decode; {smallest[0]}x{smallest[1]} to "
        f"{largest[0]}x{largest[1]}, median {median[0]}x{median[1]}; {spelled}"
    )
    return text + (f"; unreadable: {', '.join(failures[:3])}" if failures else "")


def write_sheet(config: RunConfig, source: Source, path: Path) -> None:
    """Writes a PNG of images as the first training steps see them, each above its label.

    Raises:
      BadInput: the file cannot be written.
    """
    rows, columns = SHEET
    sheet = Image.new("RGB", (columns * TILE, rows * TILE), "white")
    draw = ImageDraw.Draw(sheet)
    batch = next(_batches(config, source, rows * columns, steps=1, workers=1))
    for i, (image, label) in enumerate(zip(batch["image"], batch["label"], strict=True)):
        left, top = i % columns * TILE, i // columns * TILE
        sheet.paste(Image.fromarray(image).resize((TILE - 20, TILE - 20)), (left + 10, top + 2))
        name = str(source.class_names[label])[:24]
        draw.text((left + 10, top + TILE - 16), name, fill="black")
    try:
        sheet.save(path, "PNG")
    except OSError as error:
        raise BadInput(f"--output: cannot write {path}: {error.strerror}") from None


def images_per_second(config: RunConfig, source: Source) -> float:
    """Training images that one worker makes ready in a second, its start left out."""
    batches = _batches(config, source, batch_size=min(32, len(source)), steps=1 << 20, workers=1)
    next(batches)
    start, count = time.monotonic(), 0
    while time.monotonic() - start < SECONDS:
        count += len(next(batches)["label"])
    batches.close()
    return count / (time.monotonic() - start)


def speed_in_words(rate: float, num_examples: int, cores: int) -> str:
    """What `rate` images a second and core mean for an epoch on this host."""
    minutes = num_examples / (rate * cores) / 60
    return (
        f"speed: {rate:,.0f} images/s per core; {cores} cores like it would feed "
        f"{rate * cores:,.0f} images/s, an epoch of {num_examples:,} in {minutes:,.1f} min"
    )


def _batches(config: RunConfig, source: Source, batch_size: int, steps: int, workers: int):
    batch_size = min(batch_size, len(source))
    return pipeline.train_batches(
        source,
        config.augment,
        image_size=config.data.image_size,
        batch_size=batch_size,
        seed=config.seed,
        steps=range(steps),
        share=slice(0, batch_size),
        workers=workers,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
