"""StarNet on ImageNet-1k: paper Table 6, recipe of supplement Table 12.

    python -m starnet_jax.main --config=configs/starnet.py:s1 --workdir=DIR

Variants s1 s2 s3 s4 s050 s100 s150. Published top-1 (paper / released weights): s1 73.5 / 73.6,
s2 74.8 / 74.7, s3 77.3 / 77.4, s4 78.4 / 78.8, s050 55.7, s100 64.3, s150 68.0. Our own accuracy
and hours on a TPU: not yet measured.

`recipe=paper` (default): weight decay 0.025, stochastic depth 0.1 for s4 and 0 for the others.
`recipe=release`, behind the released weights: weight decay 0.05, stochastic depth 0 / 0.01 / 0.01 /
0.02 for s1 to s4. `tiny`: a minute on a laptop, on the digits.

Both recipes share what the authors' script leaves in force without the paper saying so: random
erasing 0.25, ten more epochs at the smallest rate, a rate that changes once per epoch, BatchNorm
over 256 images. `batch_size=N` takes another global batch and scales the learning rate with it.
"""

from ml_collections import ConfigDict

from starnet_jax.config import argument, tiny

PAPER_DROP_PATH = {"s4": 0.1}
RELEASE_DROP_PATH = {"s2": 0.01, "s3": 0.01, "s4": 0.02}


def get_config(text: str = "") -> ConfigDict:
    """`VARIANT[,recipe=paper|release][,tiny][,batch_size=N]`."""
    variants = ["s1", "s2", "s3", "s4", "s050", "s100", "s150"]
    chosen = argument(text, variants, recipe=("paper", "release"), tiny=False, batch_size=2048)
    paper = chosen.recipe == "paper"
    drop_path = (PAPER_DROP_PATH if paper else RELEASE_DROP_PATH).get(chosen.variant, 0.0)
    config = ConfigDict(
        dict(
            model=dict(name=f"starnet_{chosen.variant}", drop_path=drop_path, dtype="bfloat16"),
            data=dict(
                source="tfds",
                name="imagenet2012",
                train_examples=1_281_167,
                workers=32,
            ),
            augment=dict(
                randaugment="rand-m1-mstd0.5-inc1",
                mixup=0.8,
                cutmix=0.2,
                erase_prob=0.25,
                label_smoothing=0.1,
            ),
            batch_size=chosen.batch_size,
            epochs=300,
            optimizer=dict(
                learning_rate=3e-3 * chosen.batch_size / 2048,
                weight_decay=0.025 if paper else 0.05,
            ),
            schedule=dict(warmup_epochs=5, cooldown_epochs=10),
            bn_group=256,
        )
    )
    return tiny(config) if chosen.tiny else config
