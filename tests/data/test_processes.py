"""Several processes together make the global batches of one."""

import json
import socket
import subprocess
import sys

import pytest
import runs

BATCH, SIDE, STEPS, FIRST = 16, 16, 3, 82  # 84 steps are an epoch of the digits: it ends inside

SCRIPT = f"""
import json, sys
import jax, jax.numpy as jnp, numpy as np
from starnet_jax import config as config_lib, mesh as mesh_lib
from starnet_jax.data import pipeline
from starnet_jax.data.source import open_source

index, count, port, data_dir = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
if count > 1:
    jax.distributed.initialize("localhost:" + port, count, index)
config = config_lib.resolve({{
    "batch_size": {BATCH}, "epochs": 1, "model": {{"num_classes": 10}},
    "data": {{"source": "digits", "dir": data_dir, "image_size": {SIDE}}},
    "augment": {{"randaugment": "rand-m9-mstd0.5-inc1"}},
}})
mesh = mesh_lib.create(config)
batches = pipeline.train_batches(
    open_source(config.data, "train", 10), config.augment, image_size={SIDE},
    batch_size={BATCH}, seed=3, steps=range({FIRST}, {FIRST + STEPS}),
    share=mesh_lib.share({BATCH}), workers=1 + index,
)
place = jnp.arange({SIDE}**2 * 3).reshape({SIDE}, {SIDE}, 3)
@jax.jit
def digest(batch):  # of every position; exact in integers, so any changed byte or place shows
    image = jnp.sum(batch["image"].astype(jnp.int32) * (place % 97 + 1), (1, 2, 3))
    return jnp.stack([batch["index"], batch["label"], image], 1)
whole = jax.jit(digest, out_shardings=mesh_lib.replicated(mesh))
digests = [np.asarray(whole(mesh_lib.put(batch, mesh))).tolist() for batch in batches]
print(json.dumps(digests))
"""


def digests(count: int, data_dir: str) -> list:
    """Per step and position index, label and a digest of the pixels, as each process sees them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(index), str(count), port, data_dir],
            env=runs.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    for process, (_, error) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, error
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> str:
    from starnet_jax.data import digits

    folder = str(tmp_path_factory.mktemp("digits"))
    digits.prepare(folder)
    return folder


def test_four_processes_and_one_see_the_same_global_batches(data_dir):
    (whole,) = digests(1, data_dir)
    assert len(whole) == STEPS and len(whole[0]) == BATCH
    assert digests(4, data_dir) == [whole] * 4
