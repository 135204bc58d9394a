"""Numbers of parameters; nothing is computed, only shapes."""

import json

import jax
import oracle
import pytest

from starnet_jax import create_model
from starnet_jax.models import reduction

# The authors' code, 1000 classes; in millions the same as the paper's Table 5 and Table 13.
PARAMETERS = {
    "starnet_s1": 2_869_168,
    "starnet_s2": 3_682_024,
    "starnet_s3": 5_750_792,
    "starnet_s4": 7_482_728,
    "starnet_s050": 542_728,
    "starnet_s100": 1_043_280,
    "starnet_s150": 1_560_616,
    "demonet_d12_w96": 1_235_464,
    "demonet_d12_w192": 4_460_584,
    "demonet_d12_w288": 9_676_360,
}


def sizes(name, num_classes=1000):
    """Elements of the parameters and of the running statistics."""
    side = reduction(name)
    x = jax.ShapeDtypeStruct((1, side, side, 3) if side else (1, 2), "float32")
    model = create_model(name, num_classes=num_classes)
    with oracle.xla_depthwise():
        variables = jax.eval_shape(model.init, jax.random.key(0), x)
    params, statistics = variables["params"], variables.get("batch_stats", {})
    return [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (params, statistics)]


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_as_many_as_published(name):
    assert sizes(name)[0] == PARAMETERS[name]


def test_all_models_have_the_authors_number_of_elements(golden):
    counts = json.loads((golden / "counts.json").read_text())
    expected = {
        name: [entry["params"], entry["bn_buffers"]] for name, entry in counts["models"].items()
    }
    assert {name: sizes(name) for name in expected} == expected


@pytest.mark.parametrize("name", ["demonet_2d_mul", "demonet_2d_sum"])
def test_point_networks_have_the_authors_number_of_parameters(golden, name):
    counts = json.loads((golden / "counts.json").read_text())
    assert sizes(name, num_classes=2) == [counts["models_2d"][name]["params"], 0]
