"""Small files in the layout of ILSVRC2012, with the oddities that the real ones have."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

CMYK = "n01739381_1309.JPEG"  # these two TFDS knows by name, and repairs
PNG = "n02105855_2933.JPEG"
CLASSES = ("n01440764", "n01739381", "n02105855", "n15075141")


def noise(seed: int, width: int = 90, height: int = 70, mode: str = "RGB") -> Image.Image:
    """A smooth random image."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, channels), np.uint8)
    return Image.fromarray(small.squeeze(), mode).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str = "JPEG") -> bytes:
    """The image as a file of that kind."""
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def train_files(per_class: int) -> dict[str, dict[str, bytes]]:
    """Class to file name to content: ordinary images and, in each class, one that is not."""
    files = {
        wnid: {f"{wnid}_{i}.JPEG": encode(noise(100 * c + i)) for i in range(per_class - 1)}
        for c, wnid in enumerate(CLASSES)
    }
    files["n01440764"]["n01440764_grey.JPEG"] = encode(noise(1, mode="L"))
    files["n01739381"][CMYK] = encode(noise(2, mode="CMYK"))
    files["n02105855"][PNG] = encode(noise(3), "PNG")
    files["n15075141"]["n15075141_wide.JPEG"] = encode(noise(4, 900, 9))
    return files


def validation_files(count: int) -> dict[str, bytes]:
    """File name to content; the first are tiny, tall and grey."""
    odd = [noise(5, 3, 2), noise(6, 7, 600), noise(7, mode="L")]
    images = (odd + [noise(1000 + i) for i in range(count)])[:count]
    return {f"ILSVRC2012_val_{i:08}.JPEG": encode(x) for i, x in enumerate(images, 1)}


def write(folder: Path, per_class: int = 6, validation: int = 12) -> None:
    """Writes ILSVRC2012_img_train.tar, a tar of tars, and ILSVRC2012_img_val.tar."""
    classes = train_files(per_class).items()
    inner = {f"{wnid}.tar": _tar(files).getvalue() for wnid, files in classes}
    (folder / "ILSVRC2012_img_train.tar").write_bytes(_tar(inner).getvalue())
    images = validation_files(validation)
    (folder / "ILSVRC2012_img_val.tar").write_bytes(_tar(images).getvalue())


def write_folders(folder: Path, per_class: int = 6) -> None:
    """Writes the training images as `train/` and `val/`, one directory per class."""
    for split in ("train", "val"):
        for wnid, files in train_files(per_class).items():
            (folder / split / wnid).mkdir(parents=True)
            for name, content in files.items():
                (folder / split / wnid / name).write_bytes(content)


def write_set(
    folder, name, examples, *, config=None, split="test", label="label", file_format=None
):
    """Writes a set with the features of TFDS's ImageNet relatives."""
    import tensorflow_datasets as tfds

    wnids = tfds.core.tfds_path("datasets/imagenet2012/labels.txt")
    one = tfds.features.ClassLabel(names_file=wnids)
    features = {
        "image": tfds.features.Image(encoding_format="jpeg"),
        "label": one,
        "file_name": tfds.features.Text(),
    }
    if label == "real_label":
        features |= {"original_label": one, "real_label": tfds.features.Sequence(one)}
        del features["label"]
    tfds.dataset_builders.store_as_tfds_dataset(
        name=name,
        version="1.0.0",
        features=tfds.features.FeaturesDict(features),
        split_datasets={split: list(enumerate(examples))},
        config=config,
        data_dir=folder,
        file_format=file_format or "array_record",
        disable_shuffling=True,
    )


def example(seed: int, **labels) -> dict:
    image = np.asarray(noise(seed))
    return {"image": image, "file_name": f"{seed}.JPEG"} | labels


def _tar(files: dict[str, bytes]) -> io.BytesIO:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return archive
