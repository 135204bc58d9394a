"""From names and settings to modules: what is accepted, what is refused and how."""

import jax
import jax.numpy as jnp
import oracle
import pytest
from flax import linen as nn

from starnet_jax import create_model
from starnet_jax.errors import BadInput
from starnet_jax.models import model_names, reduction
from starnet_jax.models.demonet import DemoBlock
from starnet_jax.models.starnet import StarBlock

IMAGE = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
POINTS = jax.ShapeDtypeStruct((2, 2), jnp.float32)


def calls(model, x, train=True):
    """Every module's name and dtype of output, and the operation of every block, in call order."""
    dtypes, ops = {}, []

    def record(next_function, args, kwargs, context):
        result = next_function(*args, **kwargs)
        if context.method_name == "__call__":
            dtypes["/".join(context.module.path)] = result.dtype.name
            if isinstance(context.module, StarBlock | DemoBlock):
                ops.append(context.module.op)
        return result

    with oracle.xla_depthwise(), nn.intercept_methods(record):
        jax.eval_shape(lambda key, x: model.init(key, x, train=train), jax.random.key(0), x)
    return dtypes, ops


def ops_of(name, x=IMAGE, **settings):
    return calls(create_model(name, num_classes=2, **settings), x)[1]


@pytest.mark.parametrize("name", model_names())
def test_every_listed_name_makes_a_model(name):
    x = jax.ShapeDtypeStruct((2, reduction(name), reduction(name), 3), jnp.float32)
    model = create_model(name, num_classes=7)
    with oracle.xla_depthwise():
        logits, _ = jax.eval_shape(
            model.init_with_output, jax.random.key(0), x if reduction(name) else POINTS
        )
    assert (logits.shape, logits.dtype) == ((2, 7), jnp.float32)


def test_the_papers_models_are_listed():
    papers = {f"starnet_{size}" for size in ("s1", "s2", "s3", "s4", "s050", "s100", "s150")}
    assert papers | {"demonet_2d"} <= set(model_names())


@pytest.mark.parametrize(
    "name, side",
    [("starnet_s1", 32), ("starnet_s050_sum", 32), ("demonet_d3_w8", 16), ("demonet_2d_star", 0)],
)
def test_reduction_is_the_stride_of_the_last_feature_map(name, side):
    assert reduction(name) == side


def test_demonet_takes_depth_and_width_from_its_name():
    model = create_model("demonet_d7_w24")
    assert (len(model.stage_ops), model.width) == (7, 24)


@pytest.mark.parametrize(
    "name, x, blocks",
    [("starnet_s050", IMAGE, 6), ("demonet_d3_w8", IMAGE, 3), ("demonet_2d", POINTS, 4)],
)
@pytest.mark.parametrize(
    "suffix, settings, op",
    [
        ("", {}, "star"),
        ("_star", {}, "star"),
        ("_sum", {}, "sum"),
        ("", {"op": "sum"}, "sum"),
        ("_star", {"op": "sum"}, "sum"),
    ],
    ids=["default", "_star", "_sum", "op", "op_over_suffix"],
)
def test_suffix_and_setting_choose_the_operation_of_every_block(
    name, x, blocks, suffix, settings, op
):
    assert ops_of(name + suffix, x, **settings) == [op] * blocks


@pytest.mark.parametrize("stage", range(4))
def test_an_operation_of_a_stage_changes_exactly_its_blocks(stage):
    depths = (1, 2, 4, 2)
    stage_ops = tuple("sum" if i == stage else "star" for i in range(4))
    expected = [op for op, depth in zip(stage_ops, depths, strict=True) for _ in range(depth)]
    assert ops_of("starnet_s150", stage_ops=stage_ops) == expected


@pytest.mark.parametrize("name, x", [("demonet_d4_w8", IMAGE), ("demonet_2d", POINTS)])
def test_operations_of_blocks_reach_the_blocks_in_order(name, x):
    ops = ("sum", "star", "star", "sum")
    assert ops_of(name, x, stage_ops=ops) == list(ops)


def test_stage_operations_win_over_the_operation_of_the_network():
    ops = ("star", "sum", "star", "star")
    assert ops_of("demonet_d4_w8_sum", stage_ops=ops) == list(ops)


def test_a_setting_that_is_none_keeps_its_default():
    assert create_model("starnet_s1", activation=None).activation == "relu6"


def test_networks_without_batchnorm_ignore_its_groups():
    assert create_model("demonet_d2_w8", bn_groups=4) == create_model("demonet_d2_w8")


@pytest.mark.parametrize(
    "name, settings, words",
    [
        ("starnet_s11", {}, ["'starnet_s11'", "did you mean 'starnet_s1'"]),
        ("starnet_s5_sum", {}, ["'starnet_s5'", "did you mean 'starnet_s"]),
        ("demonet_d12w192", {}, ["'demonet_d12w192'", "demonet_d12_w192"]),
        ("demonet_d0_w192", {}, ["'demonet_d0_w192'", "demonet_d12_w192"]),
        ("vgg", {}, ["'vgg'", "known:", "starnet_s1", "demonet_d12_w192"]),
        ("starnet_s1", {"op": "stra"}, ["op", "'stra'", "did you mean 'star'"]),
        ("starnet_s1", {"stage_ops": ("star", "star", "sun", "star")}, ["'sun'", "'sum'"]),
        ("starnet_s1", {"stage_ops": ("star",) * 3}, ["stage_ops", "4", "3"]),
        ("demonet_d3_w8", {"stage_ops": ("star",) * 4}, ["stage_ops", "3", "4"]),
        ("starnet_s1", {"dtype": "bfloat"}, ["dtype", "'bfloat'", "did you mean 'bfloat16'"]),
        ("starnet_s1", {"activation": "rlu6"}, ["activation", "'rlu6'", "'relu6'"]),
        ("starnet_s1", {"activation_placement": "frst"}, ["placement", "'frst'", "'first'"]),
        ("starnet_s1", {"droppath": 0.1}, ["'droppath'", "did you mean 'drop_path'"]),
        ("starnet_s1", {"base_dim": 8}, ["'base_dim'"]),
        ("demonet_2d", {"drop_path": 0.1}, ["'drop_path'"]),
    ],
)
def test_bad_input_names_what_is_wrong_and_the_nearest_right(name, settings, words):
    with pytest.raises(BadInput) as error:
        create_model(name, **settings)
    message = str(error.value)
    assert [word for word in words if word not in message] == []
    assert "\n" not in message


# The classifier is float32; in DemoNet so is the LayerNorm that follows the mean over tokens.
@pytest.mark.parametrize(
    "name, x, float32",
    [
        ("starnet_s050", IMAGE, {"", "head"}),
        ("demonet_d2_w8", IMAGE, {"", "head", "norm"}),
        ("demonet_2d", POINTS, {"", "head", "norm"}),
    ],
)
@pytest.mark.parametrize("train", [True, False])
def test_bfloat16_computes_all_but_the_classifier_in_bfloat16(name, x, float32, train):
    dtypes, _ = calls(create_model(name, num_classes=2, dtype="bfloat16"), x, train)
    assert {path for path, dtype in dtypes.items() if dtype != "bfloat16"} == float32


@pytest.mark.parametrize(
    "name, x", [("starnet_s050", IMAGE), ("demonet_d2_w8", IMAGE), ("demonet_2d", POINTS)]
)
def test_float32_is_the_default_everywhere(name, x):
    dtypes, _ = calls(create_model(name, num_classes=2), x)
    assert set(dtypes.values()) == {"float32"}


@pytest.mark.parametrize(
    "name, x", [("starnet_s050", IMAGE), ("demonet_d2_w8", IMAGE), ("demonet_2d", POINTS)]
)
def test_bfloat16_keeps_parameters_and_statistics_in_float32(name, x):
    model = create_model(name, num_classes=2, dtype="bfloat16")
    with oracle.xla_depthwise():
        variables = jax.eval_shape(model.init, jax.random.key(0), x)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(variables)} == {"float32"}
