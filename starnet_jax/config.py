"""Settings: from a config file and the command line to one checked, frozen `RunConfig`.

Each section is the arguments of one constructor; this file holds their types and defaults.
"""

import ast
import dataclasses
import importlib.util
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from starnet_jax.errors import BadInput, nearest, nearest_key


@dataclass(frozen=True)
class Model:
    """The arguments of `models.create_model`; None leaves a value to the model."""

    name: str = "starnet_s1"
    num_classes: int = 1000
    op: str | None = None
    stage_ops: tuple[str, ...] | None = None
    activation: str | None = None
    activation_placement: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    drop_path: float = 0.0


@dataclass(frozen=True)
class Data:
    """Where images come from; see `data.source`."""

    source: Literal["digits", "tfds", "folder", "fake"] = "digits"
    name: str | None = None  # the TFDS name
    dir: str | None = None  # where the prepared dataset lies
    image_size: int = 224  # side, in pixels
    train_split: str = "train"
    eval_split: str | None = None  # None: validation, else test; a folder's val
    train_examples: int | None = None  # known for the digits; checked when the data are opened
    workers: int = 2  # decoding threads or processes; see `data.workers`


@dataclass(frozen=True)
class Augment:
    """Random changes in training; see `data.decode.train_image` and `data.on_device`."""

    crop_scale: tuple[float, float] = (0.08, 1.0)  # area, as fractions of the image
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width over height
    flip: float = 0.5  # probability
    randaugment: str | None = None  # such as rand-m9-mstd0.5-inc1
    color_jitter: float = 0.0  # without effect while randaugment is on, as in timm 0.6.13
    mixup: float = 0.0  # alpha of the mixing weight's Beta distribution; 0 for none
    cutmix: float = 0.0  # likewise
    mix_prob: float = 1.0  # of mixing at all
    mix_switch: float = 0.5  # of cutmix, where both are on
    erase_prob: float = 0.0  # of random erasing
    label_smoothing: float = 0.1


@dataclass(frozen=True)
class Optimizer:
    """AdamW; see `optimizer.create`."""

    learning_rate: float = 3e-3
    weight_decay: float = 0.025
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float | None = None  # largest norm of all gradients together
    layer_decay: float = 1.0  # factor on the rate per block away from the head
    accumulate: int = 1  # parts that a batch is computed in, one after another, to save memory
    skip_nonfinite: int = 0  # steps in a row without finite loss and gradient that are left out


@dataclass(frozen=True)
class Schedule:
    """Cosine with linear warm-up; see `optimizer.schedule`."""

    per: Literal["epoch", "step"] = "epoch"  # how often the rate changes
    warmup_epochs: int = 5
    warmup_learning_rate: float = 1e-6
    min_learning_rate: float = 1e-5
    cooldown_epochs: int = 0  # at the minimum, after the cosine; added to `epochs`


@dataclass(frozen=True)
class Eval:
    """Evaluation of the whole eval split; see `evaluate`."""

    every_epochs: int = 1
    crop: float = 0.875  # fraction of the resized short side
    sets: tuple[str, ...] = ()  # further TFDS test sets, scored by --mode=eval
    batch_size: int | None = None  # global; None takes the training batch


@dataclass(frozen=True)
class Checkpoint:
    """When to save and what to keep; see `checkpoint`."""

    every_epochs: int = 1
    minutes: float | None = 10.0  # since the last save, after which one comes between epochs
    keep: int = 2  # the newest
    keep_best: bool = True  # and the one with the best top-1
    permanent_steps: int | None = None  # multiples of this are saved and never deleted
    grace_seconds: float = 30.0  # to save in after SIGTERM, SIGINT or a preemption notice


@dataclass(frozen=True)
class Log:
    """See `metrics`."""

    every_steps: int = 10
    tensorboard: bool = True
    wandb: str | None = None  # a Weights & Biases project


@dataclass(frozen=True)
class Processes:
    """Patience with the machines of a run, in seconds; see `mesh` and `interruption`."""

    start_timeout: float = 300.0  # until all processes have met
    step_timeout: float = 1800.0  # without a finished step, compilation included


@dataclass(frozen=True)
class RunConfig:
    """Everything that a run depends on."""

    batch_size: int  # global
    epochs: int
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    eval: Eval = field(default_factory=Eval)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    log: Log = field(default_factory=Log)
    mesh: Processes = field(default_factory=Processes)
    ema: float = 0.0  # decay of the weight average, 0 for none
    bn_group: int | Literal["global", "device"] = "global"  # examples per BatchNorm statistic
    seed: int = 0

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in an epoch; known once `data.train_examples` is."""
        if self.data.train_examples is None:
            raise BadInput("data.train_examples: not known before the data are opened; set it")
        return self.data.train_examples // self.batch_size

    @property
    def total_epochs(self) -> int:
        return self.epochs + self.schedule.cooldown_epochs

    @property
    def total_steps(self) -> int:
        return self.total_epochs * self.steps_per_epoch

    def to_json(self) -> dict[str, Any]:
        """The settings as nested dictionaries that JSON keeps unchanged."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def load(reference: str, overrides: Mapping[str, str] | None = None) -> RunConfig:
    """Runs a config file and returns the checked settings.

    Args:
      reference: `FILE` or `FILE:ARGUMENT`; a file of the installed package is found by its name
        from anywhere (`configs/starnet.py:s1`).
      overrides: dotted key to text, as on the command line.

    Raises:
      BadInput: no such file, an unknown key, a wrong type, an impossible value.
    """
    path, _, argument = reference.partition(":")
    get_config = _get_config(_find(path))
    try:
        settings = get_config(argument)
    except BadInput as error:
        raise BadInput(f"--config={reference}: {error}") from None
    except (Exception, SystemExit) as error:
        raise BadInput(f"--config={reference}: {_one_line(error)}") from error
    return resolve(settings, overrides)


def resolve(settings: Mapping, overrides: Mapping[str, str] | None = None) -> RunConfig:
    """Checks nested settings and freezes them.

    Args:
      settings: a ConfigDict or nested dictionary; keys that it leaves out take their defaults.
      overrides: dotted key to text, as on the command line; they win.

    Raises:
      BadInput: an unknown key, a wrong type, an impossible value; the message names the key.
    """
    settings = settings.to_dict() if hasattr(settings, "to_dict") else settings
    if not isinstance(settings, Mapping):
        raise BadInput(f"config: get_config gives {settings!r}, not a ConfigDict")
    config = _build(RunConfig, settings, prefix="")
    for key, text in (overrides or {}).items():
        config = _override(config, key.split("."), text, prefix="")
    _check_values(config)
    return config


def with_train_examples(config: RunConfig, num_examples: int) -> RunConfig:
    """Fills in `data.train_examples` once the data are open, or checks the number that is set.

    Raises:
      BadInput: the number is another, too small for a batch, or makes more steps than int32 holds.
    """
    if config.data.train_examples not in (None, num_examples):
        raise BadInput(
            f"config.data.train_examples: {config.data.train_examples}, but the training split has "
            f"{num_examples}"
        )
    if num_examples < config.batch_size:
        raise BadInput(
            f"config.batch_size: {config.batch_size} is more than the {num_examples} training "
            "examples"
        )
    data = dataclasses.replace(config.data, train_examples=num_examples)
    config = dataclasses.replace(config, data=data)
    if config.total_steps >= 1 << 31:
        raise BadInput(f"config.epochs: {config.total_steps} steps are too many to count in int32")
    return config


def argument(text: str, variants: Sequence[str] | None = None, **options) -> types.SimpleNamespace:
    """Parses a config's string argument: a variant first, then `key=value` or flags.

    Args:
      text: such as `s4,recipe=release,tiny`.
      variants: the allowed variants, the default first; None allows any text.
      **options: name to default: False for a flag, a tuple of the allowed texts (the first is the
        default), or a number.

    Returns:
      A namespace with `variant` and every option.

    Raises:
      BadInput: an unknown variant, option or value.
    """
    first, *rest = text.split(",")
    if not first:
        first = variants[0] if variants else ""
    if variants is not None and first not in variants:
        raise BadInput(f"variant {first!r}{nearest(first, variants)}")
    chosen = {
        name: default[0] if isinstance(default, tuple) else default
        for name, default in options.items()
    }
    for token in rest:
        name, equals, value = token.partition("=")
        if name not in options:
            raise BadInput(f"unknown option {token!r}{nearest(name, options)}")
        chosen[name] = _option(name, options[name], value if equals else None)
    return types.SimpleNamespace(variant=first, **chosen)


def tiny(settings):
    """Shrinks the ConfigDict of any run to a minute on a laptop: digits, 32 px, two epochs."""
    digits = dict(
        source="digits", name=None, dir=None, train_examples=1347, image_size=32, workers=2
    )
    with settings.ignore_type():
        settings.update(dict(batch_size=64, epochs=2, bn_group="global", data=digits))
        settings.model.update(dict(num_classes=10, dtype="float32"))
        settings.schedule.update(dict(per="step", warmup_epochs=1, cooldown_epochs=0))
    return settings


def _option(name: str, default: Any, value: str | None) -> Any:
    if default is False:
        if value is not None:
            raise BadInput(f"option {name!r} is a flag and takes no value")
        return True
    if isinstance(default, tuple):
        if value not in default:
            raise BadInput(f"option {name}={value}{nearest(value, default)}")
        return value
    return _convert(name, _literal(value or ""), type(default))


def _find(path: str) -> Path:
    """The file as given; else, for `configs/NAME` or `NAME`, the one that came with the package."""
    package = Path(__file__).parent
    candidates = [Path(path)]
    if Path(path).parent in (Path("configs"), Path()):
        name = Path(path).name
        candidates += [package / "configs" / name, package.parent / "configs" / name]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    known = [f"configs/{p.name}" for p in sorted((package.parent / "configs").glob("*.py"))]
    known = known or [f"configs/{p.name}" for p in sorted((package / "configs").glob("*.py"))]
    raise BadInput(f"--config: no file {path!r}{nearest(path, known)}")


def _get_config(path: Path):
    spec = importlib.util.spec_from_file_location(f"starnet_jax_config_{path.stem}", path)
    if spec is None:
        raise BadInput(f"--config: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise BadInput(f"--config: {path}: {_one_line(error)}") from error
    if not hasattr(module, "get_config"):
        raise BadInput(f"--config: {path} has no function get_config")
    return module.get_config


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _build(section: type, settings: Mapping, prefix: str):
    """Makes the dataclass `section` from nested settings, checking every key and type."""
    hints = typing.get_type_hints(section)
    values = {}
    for key, value in settings.items():
        if key not in hints:
            full = f"{prefix}{key}"
            raise BadInput(f"config: unknown key {full!r}{nearest_key(full, _keys())}")
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, Mapping):
                raise BadInput(f"config.{prefix}{key}: is a section, not {value!r}")
            values[key] = _build(hints[key], value, prefix=f"{prefix}{key}.")
        else:
            values[key] = _convert(prefix + key, value, hints[key])
    missing = [f.name for f in dataclasses.fields(section) if _required(f) and f.name not in values]
    if missing:
        raise BadInput(f"config: {prefix}{missing[0]} is not set")
    return section(**values)


def _required(f: dataclasses.Field) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _override(section, path: list[str], text: str, prefix: str):
    """Returns `section` with the value at `path` replaced by the one that `text` spells."""
    key, *rest = path
    hints = typing.get_type_hints(type(section))
    full = prefix + ".".join(path)
    if key not in hints or bool(rest) != dataclasses.is_dataclass(hints[key]):
        raise BadInput(f"--config.{full}: unknown key{nearest_key(full, _keys())}")
    if rest:
        value = _override(getattr(section, key), rest, text, prefix=f"{prefix}{key}.")
    elif str in _options(hints[key]) and _literal(text) is not None:
        value = text  # a folder may be called 2012
    else:
        value = _convert(full, _literal(text), hints[key])
    return dataclasses.replace(section, **{key: value})


def _keys(section: type = RunConfig, prefix: str = "") -> list[str]:
    """All dotted keys."""
    keys = []
    for key, hint in typing.get_type_hints(section).items():
        nested = dataclasses.is_dataclass(hint)
        keys += _keys(hint, f"{prefix}{key}.") if nested else [prefix + key]
    return keys


def _literal(text: str) -> Any:
    """The Python value that a text on the command line spells, else the text."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return tuple(filter(None, text.split(","))) if "," in text else text


def _convert(key: str, value: Any, hint: Any) -> Any:
    """Returns `value` as the type `hint`, or raises BadInput naming the key."""
    options = _options(hint)
    for option in options:
        matched, converted = _match(value, option)
        if matched:
            return converted
    if all(typing.get_origin(o) is Literal or o is type(None) for o in options):
        choices = [str(c) for o in options for c in typing.get_args(o)]
        raise BadInput(f"config.{key}: unknown value {value!r}{nearest(value, choices)}")
    raise BadInput(f"config.{key}: expected {_spell(hint)}, got {value!r}")


def _match(value: Any, hint: Any) -> tuple[bool, Any]:
    """Whether `value` is of type `hint`, and the value as that type."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in args, value
    if origin is tuple:
        if not isinstance(value, tuple | list):
            if args[-1] is not ...:
                return False, value
            value = (value,)  # one is a list of one
        hints = [args[0]] * len(value) if args[-1] is ... else args
        if len(hints) != len(value):
            return False, value
        matches = [_match(v, h) for v, h in zip(value, hints, strict=True)]
        return all(m for m, _ in matches), tuple(v for _, v in matches)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return abs(value) < 1 << 53, float(value) if abs(value) < 1 << 53 else value
    return type(value) is hint, value


def _options(hint: Any) -> tuple:
    """The types of which a value may have any."""
    return typing.get_args(hint) if _is_union(hint) else (hint,)


def _is_union(hint: Any) -> bool:
    return isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union


def _spell(hint: Any) -> str:
    """A type in words, such as `a number` or `text or none`."""
    if _is_union(hint):
        return " or ".join(_spell(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return " or ".join(repr(choice) for choice in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        args = typing.get_args(hint)
        count = "some" if args[-1] is ... else str(len(args))
        return f"{count} values, each {_spell(args[0])}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return words.get(hint, "none")


def _check_values(config: RunConfig) -> None:
    """Raises BadInput for values of the right type that cannot work."""
    low, high = config.augment.crop_scale
    narrow, wide = config.augment.crop_ratio
    checks = {
        "batch_size": (1 <= config.batch_size <= 1 << 20, "in [1, 2^20]"),
        "epochs": (1 <= config.epochs < 1 << 20, "at least 1, below 2^20"),
        "model.num_classes": (config.model.num_classes >= 2, "at least 2"),
        "model.drop_path": (0 <= config.model.drop_path < 1, "in [0, 1)"),
        "data.image_size": (1 <= config.data.image_size <= 1 << 13, "in [1, 8192]"),
        "data.workers": (1 <= config.data.workers <= 1024, "in [1, 1024]"),
        "data.train_examples": (_none_or_above_0(config.data.train_examples), "at least 1"),
        "augment.crop_scale": (0 < low <= high <= 1, "0 < smallest <= largest <= 1"),
        "augment.crop_ratio": (0.01 <= narrow <= wide <= 100, "0.01 <= narrowest <= widest <= 100"),
        "augment.flip": (0 <= config.augment.flip <= 1, "in [0, 1]"),
        "augment.color_jitter": (0 <= config.augment.color_jitter <= 1, "in [0, 1]"),
        "augment.mixup": (0 <= config.augment.mixup < math.inf, "at least 0"),
        "augment.cutmix": (0 <= config.augment.cutmix < math.inf, "at least 0"),
        "augment.mix_prob": (0 <= config.augment.mix_prob <= 1, "in [0, 1]"),
        "augment.mix_switch": (0 <= config.augment.mix_switch <= 1, "in [0, 1]"),
        "augment.erase_prob": (0 <= config.augment.erase_prob <= 1, "in [0, 1]"),
        "augment.label_smoothing": (0 <= config.augment.label_smoothing < 1, "in [0, 1)"),
        "optimizer.learning_rate": (
            0 < config.optimizer.learning_rate < math.inf,
            "finite and above 0",
        ),
        "optimizer.weight_decay": (0 <= config.optimizer.weight_decay < math.inf, "at least 0"),
        "optimizer.b1": (0 <= config.optimizer.b1 < 1, "in [0, 1)"),
        "optimizer.b2": (0 <= config.optimizer.b2 < 1, "in [0, 1)"),
        "optimizer.eps": (0 < config.optimizer.eps < math.inf, "above 0"),
        "optimizer.clip_norm": (_none_or_above_0(config.optimizer.clip_norm), "above 0"),
        "optimizer.layer_decay": (0 < config.optimizer.layer_decay <= 1, "in (0, 1]"),
        "optimizer.accumulate": (config.optimizer.accumulate >= 1, "at least 1"),
        "optimizer.skip_nonfinite": (config.optimizer.skip_nonfinite >= 0, "at least 0"),
        "schedule.warmup_epochs": (config.schedule.warmup_epochs >= 0, "at least 0"),
        "schedule.warmup_learning_rate": (
            0 <= config.schedule.warmup_learning_rate < math.inf,
            "at least 0",
        ),
        "schedule.min_learning_rate": (
            0 <= config.schedule.min_learning_rate < math.inf,
            "at least 0",
        ),
        "schedule.cooldown_epochs": (config.schedule.cooldown_epochs >= 0, "at least 0"),
        "eval.every_epochs": (config.eval.every_epochs >= 1, "at least 1"),
        "eval.crop": (0.1 <= config.eval.crop <= 1, "in [0.1, 1]"),
        "eval.batch_size": (
            config.eval.batch_size is None or 1 <= config.eval.batch_size <= 1 << 16,
            "in [1, 65536]",
        ),
        "checkpoint.every_epochs": (config.checkpoint.every_epochs >= 1, "at least 1"),
        "checkpoint.minutes": (_none_or_above_0(config.checkpoint.minutes), "above 0, or none"),
        "checkpoint.keep": (config.checkpoint.keep >= 1, "at least 1"),
        "checkpoint.permanent_steps": (
            _none_or_above_0(config.checkpoint.permanent_steps),
            "at least 1, or none",
        ),
        "checkpoint.grace_seconds": (
            0 < config.checkpoint.grace_seconds < 1 << 20,
            "above 0, below 2^20",
        ),
        "log.every_steps": (config.log.every_steps >= 1, "at least 1"),
        "mesh.start_timeout": (1 <= config.mesh.start_timeout < 1 << 20, "in [1, 2^20)"),
        "mesh.step_timeout": (1 <= config.mesh.step_timeout < 1 << 20, "in [1, 2^20)"),
        "ema": (0 <= config.ema < 1, "in [0, 1)"),
        "bn_group": (isinstance(config.bn_group, str) or config.bn_group >= 2, "at least 2"),
        "seed": (0 <= config.seed < 1 << 32, "in [0, 2^32)"),
    }
    for key, (ok, rule) in checks.items():
        if not ok:
            raise BadInput(f"config.{key}: must be {rule}")
    if config.data.source == "tfds" and config.data.name is None:
        raise BadInput("config.data.name: data.source='tfds' needs the name of a TFDS dataset")
    if config.data.source == "fake" and config.data.train_examples is None:
        raise BadInput("config.data.train_examples: data.source='fake' needs a number")
    if config.augment.randaugment is not None:
        from starnet_jax.data import randaugment  # here: it brings Pillow

        randaugment.parse(config.augment.randaugment)


def _none_or_above_0(value: float | None) -> bool:
    return value is None or 0 < value < math.inf
