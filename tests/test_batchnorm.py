"""BatchNorm under jit: groups, devices and running statistics, against NumPy in float64."""

import json
import subprocess
import sys

import numpy as np
import pytest
import runs

B, H, C = 32, 3, 5

SCRIPT = f"""
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from starnet_jax.models.layers import BatchNorm

mesh = Mesh(np.array(jax.devices()), ("data",))
x = np.random.default_rng(0).normal(3, 2, ({B}, {H}, {H}, {C})).astype(np.float32)
x = jax.device_put(x, NamedSharding(mesh, P("data")))
whole = NamedSharding(mesh, P())
result = {{}}
for groups in map(int, sys.argv[1:]):
    norm = BatchNorm(groups=groups)
    variables = jax.device_put(norm.init(jax.random.key(0), x, True), whole)
    step = jax.jit(lambda v, x: norm.apply(v, x, True, mutable=["batch_stats"]))
    compiled = step.lower(variables, x).compile()
    y, changed = compiled(variables, x)
    stats = changed["batch_stats"]
    forward = jax.jit(lambda v, x: norm.apply(v, x, True, mutable=["batch_stats"])[0])
    text = forward.lower(variables, x).compile().as_text()
    result[groups] = dict(
        y=np.asarray(y).tolist(),
        mean=np.asarray(stats["mean"]).tolist(),
        var=np.asarray(stats["var"]).tolist(),
        collectives=text.count("all-reduce(") + text.count("all-gather("),
    )
print(json.dumps(result))
"""


def oracle(groups: int):
    """Output and running statistics after one step from mean 0 and variance 1."""
    x = np.random.default_rng(0).normal(3, 2, (B, H, H, C)).astype(np.float32).astype(np.float64)
    parts = x.reshape(groups, -1, H, H, C)
    mean = parts.mean((1, 2, 3), keepdims=True)
    var = parts.var((1, 2, 3), keepdims=True)
    y = ((parts - mean) / np.sqrt(var + 1e-5)).reshape(x.shape)
    unbiased = parts.var((1, 2, 3), ddof=1).mean(0)
    return y, 0.1 * mean.mean((0, 1, 2, 3)), 0.9 + 0.1 * unbiased


@pytest.fixture(scope="module", params=[1, 8])
def measured(request):
    """What the layer gives for 1, 2, 4 and 8 groups on that many devices."""
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, "1", "2", "4", "8"],
        env=runs.environment(request.param),
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return request.param, json.loads(process.stdout)


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_each_group_is_normalised_by_its_own_statistics(measured, groups):
    _, result = measured
    y, mean, var = oracle(groups)
    np.testing.assert_allclose(result[str(groups)]["y"], y, atol=2e-6)
    np.testing.assert_allclose(result[str(groups)]["mean"], mean, rtol=1e-6)
    np.testing.assert_allclose(result[str(groups)]["var"], var, rtol=1e-6)


def test_a_group_per_device_needs_no_communication_to_normalise(measured):
    devices, result = measured
    assert result[str(devices)]["collectives"] == 0
    if devices > 1:
        assert result["1"]["collectives"] > 0
