"""Images a second on the host, ours against the authors' way, in alternating rounds.

`python benchmarks/input.py [--json=FILE]` makes JPEGs of 500x375 from the two sample photos of
scikit-learn (random parts, quality 98, about 107 kB each, as ImageNet's are 110 kB), puts them into
an image folder, and feeds them through `data.pipeline` and through `reference_input.py`, two
workers each. Tables go to standard output, progress to standard error.
"""

import argparse
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import PIL
import reference_input
from PIL import Image, features

sys.path.insert(0, str(Path(__file__).parent.parent))

from starnet_jax.config import Augment
from starnet_jax.data import decode, pipeline, randaugment, workers
from starnet_jax.data.source import FolderSource

RECIPES = {"StarNet": "rand-m1-mstd0.5-inc1", "DemoNet": "rand-m9-mstd0.5-inc1"}
SIZE, WORKERS, BATCH = 224, 2, 64
IMAGES, WARM_UP, BATCHES, ROUNDS = 256, 8, 24, 7  # batches: 8 of the 24 before the clock runs
STAGE_IMAGES, STAGE_ROUNDS = 128, 5
V5E_HOST_CPUS = 224


def main() -> None:
    """Parses the command line, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--stages", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stages:
        side, policy, folder = options.stages
        print(json.dumps(stages(side, policy, encoded_images(Path(folder)))))
        return
    with tempfile.TemporaryDirectory() as folder:
        results = measure(Path(folder), options.rounds)
    print(report(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


def measure(folder: Path, rounds: int) -> dict:
    """Everything that the report shows; takes some minutes."""
    sizes = write_photos(folder / "train", IMAGES)
    results = {
        "machine": machine(),
        "jpeg_kilobytes": statistics.mean(sizes) / 1000,
        "rounds": rounds,
        "load_before": os.getloadavg()[0],
        "recipes": {},
    }
    for recipe, policy in RECIPES.items():
        rates = throughput(folder, policy, rounds)
        results["recipes"][recipe] = {
            "policy": policy,
            "throughput": rates,
            "milliseconds": stage_medians(folder, policy),
        }
    results["exactness"] = exactness(encoded_images(folder))
    results["load_after"] = os.getloadavg()[0]
    return results


def machine() -> dict:
    """What the figures depend on."""
    return {
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "libjpeg_turbo": features.version("libjpeg_turbo"),
    }


def cpu_name() -> str:
    """The model, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


# --- Photos ---------------------------------------------------------------------------------------


def photo(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """A random part of one of scikit-learn's sample photos."""
    from sklearn.datasets import load_sample_images

    whole = Image.fromarray(load_sample_images().images[rng.integers(2)])
    w = int(rng.integers(400, 570))
    h = w * height // width
    left, top = int(rng.integers(whole.width - w + 1)), int(rng.integers(whole.height - h + 1))
    part = whole.resize((width, height), Image.Resampling.BICUBIC, (left, top, left + w, top + h))
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else part


def write_photos(folder: Path, count: int) -> list[int]:
    """Writes an image folder of two classes; returns the sizes of the files in bytes."""
    rng = np.random.default_rng(0)
    sizes = []
    for i in range(count):
        path = folder / f"class{i % 2}" / f"{i:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(rng, 500, 375).save(path, quality=98, subsampling="4:2:0")
        sizes.append(path.stat().st_size)
    return sizes


def encoded_images(folder: Path) -> list[bytes]:
    """The content of the first files of the folder."""
    files = sorted(folder.rglob("*.jpg"))[:STAGE_IMAGES]
    return [file.read_bytes() for file in files]


# --- Throughput -----------------------------------------------------------------------------------


def throughput(folder: Path, policy: str, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Images a second, and CPU milliseconds an image, of each contender in each round."""
    contenders = {
        "ours": lambda: ours(folder, policy, processes=True),
        "theirs": lambda: theirs(folder, policy),
        "ours, in threads": lambda: ours(folder, policy, processes=False),
        "theirs, with its mixup": lambda: theirs(folder, policy, mix=True),
    }
    rates = {name: {"images_per_second": [], "cpu_milliseconds": []} for name in contenders}
    for i in range(rounds):
        shown = []
        for name, batches in contenders.items():
            rate, cpu = steady(batches())
            rates[name]["images_per_second"].append(rate)
            rates[name]["cpu_milliseconds"].append(cpu)
            shown.append(f"{name} {rate:.0f}/s ({cpu:.2f} ms)")
        print(f"{policy}, round {i + 1} of {rounds}: {', '.join(shown)}", file=sys.stderr)
    return rates


def steady(batches: Iterator) -> tuple[float, float]:
    """Images a second and CPU milliseconds an image, once all workers are at work.

    CPU time depends less on what else the machine does.
    """
    for _ in range(WARM_UP):
        next(batches)
    start, cpu = time.perf_counter(), cpu_seconds()
    count = 0
    for _ in range(BATCHES - WARM_UP):
        next(batches)
        count += BATCH
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
    batches.close()
    return count / seconds, 1e3 * cpu / count


def cpu_seconds() -> float:
    """CPU time of this process and of its children so far; of this process alone off Linux."""
    total = time.process_time()
    for file in Path("/proc/self/task").glob("*/children"):
        for child in file.read_text().split():
            fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def ours(folder: Path, policy: str, processes: bool) -> Iterator:
    """Batches of the library."""
    source = FolderSource(str(folder), "train")
    return pipeline.train_batches(
        source,
        Augment(randaugment=policy),
        image_size=SIZE,
        batch_size=BATCH,
        seed=0,
        steps=range(BATCHES),
        share=slice(None),
        workers=WORKERS,
        processes=processes,
    )


def theirs(folder: Path, policy: str, mix: bool = False) -> Iterator:
    """Batches of the authors' way."""
    files = sorted(map(str, folder.rglob("*.jpg")))
    rng = np.random.default_rng(0)
    order = np.concatenate(
        [rng.permutation(len(files)) for _ in range(-(-BATCHES * BATCH // len(files)))]
    )
    return reference_input.batches(
        [files[i] for i in order[: BATCHES * BATCH]],
        magnitude=randaugment.parse(policy).magnitude,
        size=SIZE,
        batch_size=BATCH,
        workers=WORKERS,
        mix=mix,
    )


# --- Stages ---------------------------------------------------------------------------------------


def stage_medians(folder: Path, policy: str) -> dict[str, dict[str, float]]:
    """Milliseconds an image of each stage, each side in processes as its workers are."""
    measured = {"ours": [], "theirs": []}
    for _ in range(STAGE_ROUNDS):
        for side, rounds in measured.items():
            print(f"{policy}, stages of {side}", file=sys.stderr)
            command = [sys.executable, __file__, "--stages", side, policy, str(folder)]
            environment = workers.ENVIRONMENT if side == "ours" else {}
            output = subprocess.check_output(command, env=environment | os.environ)
            rounds += json.loads(output)
    return {
        side: {stage: 1e3 * statistics.median(r[stage] for r in rounds) for stage in rounds[0]}
        for side, rounds in measured.items()
    }


def stages(side: str, policy: str, encoded: Sequence[bytes]) -> list[dict[str, float]]:
    """Seconds an image of each stage in this process, several times, after one to warm up."""
    parsed = randaugment.parse(policy)
    if side == "theirs":
        rounds = [reference_input.stages(encoded, parsed.magnitude, SIZE) for _ in range(8)]
    else:
        rounds = [our_stages(encoded, parsed, seed) for seed in range(8)]
    return rounds[1:]


def our_stages(encoded: Sequence[bytes], policy, seed: int) -> dict[str, float]:
    """The steps of `decode.train_image`, timed one by one."""
    seconds = dict.fromkeys(reference_input.STAGES, 0.0)
    batch = np.zeros((len(encoded), SIZE, SIZE, 3), np.uint8)
    for i, (data, target) in enumerate(zip(encoded, batch, strict=True)):
        rng = np.random.default_rng([seed, i])
        clock = [time.thread_time()]
        left, top, w, h = decode.crop_box(*decode.image_size(data), rng, (0.08, 1), (3 / 4, 4 / 3))
        image = decode.cropped(data, (left, top, left + w, top + h))
        clock.append(time.thread_time())
        cubic, mirrored = rng.random(2)
        image = image.resize((SIZE, SIZE), decode.FILTERS[int(cubic < 0.5)])
        clock.append(time.thread_time())
        if mirrored < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        clock.append(time.thread_time())
        array = randaugment.augment(np.asarray(image), rng, policy)
        clock.append(time.thread_time())
        target[:] = array
        clock.append(time.thread_time())
        for stage, start, end in zip(seconds, clock, clock[1:], strict=False):
            seconds[stage] += (end - start) / len(encoded)
    return seconds


# --- What exactness costs -------------------------------------------------------------------------


def exactness(encoded: Sequence[bytes]) -> dict[str, float]:
    """CPU milliseconds an image of decode, crop and resize, done exactly and in other ways."""
    rng = np.random.default_rng(1)
    large = []
    for _ in range(32):
        file = io.BytesIO()
        photo(rng, 1000, 750).save(file, "JPEG", quality=95)
        large.append(file.getvalue())
    ways: dict[str, tuple[Callable, Sequence[bytes]]] = {
        "exact, 500x375": (exact, encoded),
        "the whole image decoded, 500x375": (whole, encoded),
        "DCT-scaled decoding, 500x375": (scaled, encoded),
        "exact, 1000x750": (exact, large),
        "DCT-scaled decoding, 1000x750": (scaled, large),
    }
    times = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, (way, images) in ways.items():
            rng = np.random.default_rng(2)
            boxes = [crop(data, rng) for data in images]
            start = time.thread_time()
            for i, (data, box) in enumerate(zip(images, boxes, strict=True)):
                way(data, box, decode.FILTERS[i % 2])
            times[name].append(1e3 * (time.thread_time() - start) / len(images))
    return {name: statistics.median(values) for name, values in times.items()}


def crop(data: bytes, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a random crop."""
    left, top, w, h = decode.crop_box(*decode.image_size(data), rng, (0.08, 1), (3 / 4, 4 / 3))
    return left, top, left + w, top + h


def exact(data, box, resample):
    """What `decode.train_image` does."""
    return decode.cropped(data, box).resize((SIZE, SIZE), resample)


def whole(data, box, resample):
    """What the authors do."""
    return Image.open(io.BytesIO(data)).convert("RGB").crop(box).resize((SIZE, SIZE), resample)


def scaled(data, box, resample):
    """Lets libjpeg halve the image as often as the crop stays larger than the result."""
    image = Image.open(io.BytesIO(data))
    scale = min(box[2] - box[0], box[3] - box[1]) / SIZE
    width, height = image.size
    image.draft("RGB", (int(width / scale), int(height / scale)))
    factor = image.width / width
    box = tuple(round(edge * factor) for edge in box)
    return image.crop(box).resize((SIZE, SIZE), resample)


# --- Report ---------------------------------------------------------------------------------------


def report(results: dict) -> str:
    """The tables, as text."""
    lines = [
        f"Input, {WORKERS} workers on each side, {results['machine']['cpu']}, "
        f"{results['machine']['cpus']} CPUs, Pillow {results['machine']['pillow']}; JPEGs of "
        f"500x375, {results['jpeg_kilobytes']:.0f} kB; medians of {results['rounds']} rounds",
        "",
        "| recipe, contender | against theirs | images/s | by CPU time | CPU ms an image |",
        "|---|---|---|---|---|",
    ]
    for recipe, result in results["recipes"].items():
        theirs = result["throughput"]["theirs"]
        for name, measured in result["throughput"].items():
            rates, cpu = measured["images_per_second"], measured["cpu_milliseconds"]
            faster = ratio(rates, theirs["images_per_second"])
            cheaper = ratio(theirs["cpu_milliseconds"], cpu)
            lines.append(
                f"| {recipe}, {name} | {faster:.2f} | {statistics.median(rates):.0f} "
                f"| {cheaper:.2f} | {statistics.median(cpu):.2f} |"
            )
    lines += ["", *stage_table(results), "", *exactness_table(results["exactness"]), ""]
    lines += limits(results)
    return "\n".join(lines)


def ratio(values: Sequence[float], others: Sequence[float]) -> float:
    """The median of the ratios of the rounds."""
    return statistics.median(a / b for a, b in zip(values, others, strict=True))


def stage_table(results: dict) -> list[str]:
    """One column for each recipe and side."""
    columns = [(r, side) for r in results["recipes"] for side in ("ours", "theirs")]
    lines = [
        "CPU milliseconds an image in one worker (ours: the crop counts as decoding)",
        "",
        "| stage | " + " | ".join(f"{recipe}, {side}" for recipe, side in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    table = [results["recipes"][recipe]["milliseconds"][side] for recipe, side in columns]
    for stage in reference_input.STAGES:
        lines.append(f"| {stage} | " + " | ".join(f"{c[stage]:.2f}" for c in table) + " |")
    return [*lines, "| sum | " + " | ".join(f"{sum(c.values()):.2f}" for c in table) + " |"]


def exactness_table(times: dict[str, float]) -> list[str]:
    """One line for each way."""
    lines = ["| decode, crop and resize | ms an image |", "|---|---|"]
    return lines + [f"| {name} | {value:.2f} |" for name, value in times.items()]


def limits(results: dict) -> list[str]:
    """What limits it, in words; the last line extrapolates."""
    first = next(iter(results["recipes"].values()))
    times = first["milliseconds"]["ours"]
    total, (slowest, longest) = sum(times.values()), max(times.items(), key=lambda item: item[1])
    rate = statistics.median(first["throughput"]["ours"]["images_per_second"]) / WORKERS
    exact_ms = results["exactness"]
    scaled_gain = exact_ms["exact, 1000x750"] - exact_ms["DCT-scaled decoding, 1000x750"]
    words = [
        f"Limit: {slowest} takes {longest:.2f} of {total:.2f} ms (the release recipe).",
        "Exactness, DCT-scaled decoding: nothing to gain at 500x375, where no crop is twice the "
        f"result; at 1000x750 it would save {scaled_gain:.2f} ms.",
    ]
    return [
        *words,
        "Exactness, RandAugment: the bytes are Pillow's; its tolerance of a level is not used.",
        f"Extrapolated, not measured: {V5E_HOST_CPUS} CPUs of a v5e-8 host at {rate:.0f} images/s "
        f"each would make {V5E_HOST_CPUS * rate / 1000:.0f} thousand images/s, "
        f"{V5E_HOST_CPUS * rate / 8000:.1f} thousand a chip.",
    ]


if __name__ == "__main__":
    main()
