"""PyTorch state dicts in and out: exact, and clear about what does not fit."""

import jax
import numpy as np
import pytest
from flax import traverse_util

from starnet_jax import create_model
from starnet_jax.errors import BadInput
from starnet_jax.models import reduction
from starnet_jax.weights import from_torch, to_torch

NAMES = ["starnet_s050", "demonet_d2_w8", "demonet_2d"]
every_name = pytest.mark.parametrize("name", NAMES)


def random_variables(name, num_classes=5):
    """Random bits in every float but those of an exponent, so that none of them is NaN."""
    side = reduction(name)
    x = jax.ShapeDtypeStruct((1, side, side, 3) if side else (1, 2), "float32")
    model = create_model(name, num_classes=num_classes)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes)


def leaves(variables):
    return traverse_util.flatten_dict(variables, sep="/")


def assert_same_bits(actual, expected):
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert (actual[key].shape, actual[key].dtype) == (value.shape, value.dtype), key
        assert actual[key].tobytes() == value.tobytes(), key


@every_name
def test_to_torch_and_back_gives_the_same_bits(name):
    variables = random_variables(name)
    assert_same_bits(leaves(from_torch(name, to_torch(name, variables))), leaves(variables))


@every_name
def test_from_torch_and_back_gives_the_same_bits(name):
    state_dict = to_torch(name, random_variables(name))
    assert_same_bits(to_torch(name, from_torch(name, state_dict)), state_dict)


@pytest.mark.parametrize(
    "file, name",
    [
        ("starnet_s050", "starnet_s050"),
        ("starnet_s050_sum", "starnet_s050_sum"),
        ("DemoNet_d12_w32_mul", "demonet_d12_w32_star"),
        ("demonet_2d_sum", "demonet_2d_sum"),
    ],
)
def test_the_authors_state_dict_survives_the_round_trip(golden, file, name):
    with np.load(golden / "models" / f"{file}.npz") as data:
        state_dict = {k.removeprefix("state/"): data[k] for k in data if k.startswith("state/")}
    assert_same_bits(to_torch(name, from_torch(name, state_dict)), state_dict)


@pytest.mark.torch
@pytest.mark.parametrize("name", ["starnet_s1", "starnet_s150", "demonet_d3_w32", "demonet_2d"])
def test_keys_and_shapes_are_those_of_the_pytorch_networks(name):
    pytest.importorskip("torch")
    import torch_reference

    make = {
        "demonet_d3_w32": lambda: torch_reference.demonet(3, 32, num_classes=5),
        "demonet_2d": lambda: torch_reference.demonet_2d(num_classes=5),
    }
    network = make.get(name, lambda: torch_reference.starnet(name, num_classes=5))()
    expected = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    ours = to_torch(name, random_variables(name))
    assert {key: value.shape for key, value in ours.items()} == expected


@pytest.mark.parametrize(
    "name, path, key, axes",
    [
        ("starnet_s050", "params/stem/conv/kernel", "stem.0.conv.weight", (3, 2, 0, 1)),
        (
            "starnet_s050",
            "params/stages_2/blocks_1/dwconv/conv/kernel",
            "stages.2.2.dwconv.conv.weight",
            (3, 2, 0, 1),
        ),
        ("starnet_s050", "params/head/kernel", "head.weight", (1, 0)),
        ("starnet_s050", "batch_stats/norm/mean", "norm.running_mean", (0,)),
        (
            "starnet_s050",
            "batch_stats/stages_1/downsample/bn/var",
            "stages.1.0.bn.running_var",
            (0,),
        ),
        ("demonet_d2_w8", "params/blocks_1/f/kernel", "blocks.1.f.weight", (1, 0)),
        ("demonet_d2_w8", "params/blocks_0/gamma", "blocks.0.gamma", (0,)),
        ("demonet_2d", "params/blocks_3/norm/scale", "blocks.3.norm.weight", (0,)),
    ],
)
def test_every_kind_of_array_goes_to_pytorchs_name_and_layout(name, path, key, axes):
    variables = random_variables(name)
    expected = leaves(variables)[path].transpose(axes)
    np.testing.assert_array_equal(to_torch(name, variables)[key], expected)


def test_pointwise_kernels_become_convolutions():
    variables = random_variables("starnet_s050")
    kernel = leaves(variables)["params/stages_0/blocks_0/f1/conv/kernel"]
    weight = to_torch("starnet_s050", variables)["stages.0.1.f1.conv.weight"]
    np.testing.assert_array_equal(weight, kernel.T[:, :, None, None])


def test_counters_of_batchnorm_are_int64_zeros():
    state_dict = to_torch("starnet_s050", random_variables("starnet_s050"))
    counter = state_dict["stem.0.bn.num_batches_tracked"]
    assert (counter.shape, counter.dtype, counter.item()) == ((), np.int64, 0)


def test_counters_may_be_missing():
    variables = random_variables("starnet_s050")
    state_dict = to_torch("starnet_s050", variables)
    state_dict = {k: v for k, v in state_dict.items() if not k.endswith("num_batches_tracked")}
    assert_same_bits(leaves(from_torch("starnet_s050", state_dict)), leaves(variables))


@every_name
def test_arrays_are_float32_numpy(name):
    state_dict = to_torch(name, random_variables(name))
    variables = from_torch(
        name, {key: value.astype(np.float64) for key, value in state_dict.items()}
    )
    assert {(type(leaf), leaf.dtype.name) for leaf in jax.tree.leaves(variables)} == {
        (np.ndarray, "float32")
    }


@pytest.mark.torch
def test_cpu_tensors_are_accepted():
    torch = pytest.importorskip("torch")
    variables = random_variables("demonet_2d")
    tensors = {k: torch.from_numpy(v) for k, v in to_torch("demonet_2d", variables).items()}
    assert_same_bits(leaves(from_torch("demonet_2d", tensors)), leaves(variables))


@every_name
@pytest.mark.parametrize("num_classes", [2, 37])
def test_the_head_tells_the_number_of_classes(name, num_classes):
    state_dict = to_torch(name, random_variables(name, num_classes))
    assert from_torch(name, state_dict)["params"]["head"]["kernel"].shape[1] == num_classes


def refusal(name, state_dict):
    with pytest.raises(BadInput) as error:
        from_torch(name, state_dict)
    return str(error.value)


def test_missing_keys_are_named():
    state_dict = to_torch("demonet_2d", random_variables("demonet_2d"))
    del state_dict["blocks.1.f.weight"], state_dict["norm.bias"]
    message = refusal("demonet_2d", state_dict)
    assert "2 missing" in message
    assert "blocks.1.f.weight" in message
    assert "norm.bias" in message


def test_a_missing_head_is_named():
    state_dict = to_torch("demonet_2d", random_variables("demonet_2d"))
    del state_dict["head.weight"], state_dict["head.bias"]
    message = refusal("demonet_2d", state_dict)
    assert "2 missing" in message
    assert "head.weight" in message


def test_unknown_keys_are_named():
    state_dict = to_torch("demonet_2d", random_variables("demonet_2d"))
    message = refusal("demonet_2d", state_dict | {"blocks.9.f.weight": np.zeros((2, 2))})
    assert "1 unknown (blocks.9.f.weight)" in message
    assert "missing" not in message


def test_misshapen_arrays_are_named_with_both_shapes():
    state_dict = to_torch("starnet_s050", random_variables("starnet_s050"))
    key = "stages.0.1.f1.conv.weight"
    message = refusal("starnet_s050", state_dict | {key: state_dict[key][:, :, 0, 0]})
    assert f"1 misshapen ({key} [48, 16] for [48, 16, 1, 1])" in message


def test_weights_of_another_model_are_refused_by_name():
    state_dict = to_torch("demonet_d2_w8", random_variables("demonet_d2_w8"))
    assert "starnet_s050" in refusal("starnet_s050", state_dict)


def test_weights_of_the_same_shape_but_another_depth_are_refused():
    state_dict = to_torch("demonet_d2_w8", random_variables("demonet_d2_w8"))
    assert "missing (blocks.2." in refusal("demonet_d3_w8", state_dict)


def test_a_refusal_is_one_short_line_however_much_is_wrong():
    message = refusal("starnet_s050", {f"layer.{i}": np.zeros(2) for i in range(500)})
    assert "500 unknown (layer.0, layer.1, layer.2, ...)" in message
    assert "\n" not in message
    assert len(message) < 500
