"""StarNet-S050 on scikit-learn's handwritten digits: a minute on a laptop.

python -m starnet_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
"""

from ml_collections import ConfigDict

from starnet_jax.config import argument


def get_config(text: str = "") -> ConfigDict:
    """Variant `star` or `sum`; the flag `tiny` trains for two epochs only."""
    chosen = argument(text, ["star", "sum"], tiny=False)
    return ConfigDict(
        dict(
            model=dict(name=f"starnet_s050_{chosen.variant}", num_classes=10),
            data=dict(source="digits", image_size=32, train_examples=1347),
            augment=dict(crop_scale=(0.5, 1.0), crop_ratio=(0.85, 1.18), flip=0.0),
            # Rounding that puts a ReLU6 input on the other side of a kink moves the losses by 1e-3.
            # With this seed none does in the first 20 steps: one and four devices agree to 1e-6.
            seed=10,
            batch_size=64,
            epochs=2 if chosen.tiny else 16,
            optimizer=dict(learning_rate=3e-3, weight_decay=0.025),
            schedule=dict(per="step", warmup_epochs=1),
            checkpoint=dict(every_epochs=1 if chosen.tiny else 4),
        )
    )
