"""DemoNet on ImageNet-1k, star against sum: paper Tables 2 and 3, recipe of supplement Table 10.

    python -m starnet_jax.main --config=configs/demonet.py:d12_w192_star --workdir=DIR

Any depth, width and operation. Published top-1 of d12_w192: star 71.7, sum 66.2, averaged weights.
Our own accuracy and hours on a TPU: not yet measured. `tiny`: a minute on a laptop, on the digits.

Paper and script print colour jitter 0.4; it is inert while RandAugment is on. `batch_size=N` takes
another global batch and scales the learning rate with it.
"""

from ml_collections import ConfigDict

from starnet_jax.config import argument, tiny


def get_config(text: str = "") -> ConfigDict:
    """`dDEPTH_wWIDTH_OP[,tiny][,batch_size=N]`, d12_w192_star by default."""
    chosen = argument(text, tiny=False, batch_size=2048)
    config = ConfigDict(
        dict(
            model=dict(name=f"demonet_{chosen.variant or 'd12_w192_star'}", dtype="bfloat16"),
            data=dict(
                source="tfds",
                name="imagenet2012",
                train_examples=1_281_167,
                workers=32,
            ),
            augment=dict(
                randaugment="rand-m9-mstd0.5-inc1",
                color_jitter=0.4,
                mixup=0.8,
                cutmix=1.0,
                erase_prob=0.25,
                label_smoothing=0.1,
            ),
            batch_size=chosen.batch_size,
            epochs=300,
            optimizer=dict(learning_rate=4e-3 * chosen.batch_size / 2048, weight_decay=0.05),
            schedule=dict(warmup_epochs=5, cooldown_epochs=10),
            ema=0.9998,
        )
    )
    return tiny(config) if chosen.tiny else config
