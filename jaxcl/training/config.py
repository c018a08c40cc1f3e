"""The configuration of a run: every field with its default, and the checks that need no data and no device."""

import difflib
from typing import Any

from ml_collections import ConfigDict, config_dict

from jaxcl.buffer import DRAWS, EXCHANGES, HANDOVERS, MEMORIES, POLICIES, REPEATS, TIERS
from jaxcl.buffer.selection import FEATURES, KEYS, QUOTAS, SELECTIONS
from jaxcl.data import SCENARIOS
from jaxcl.errors import UserError
from jaxcl.registry import short
from jaxcl.strategies import STRATEGIES, Strategy, default_options, make_strategy

REPLAYS = ("draw", "append", "append_part")
ORDERS = ("shuffled", "sequential")


def default_config() -> ConfigDict:
    """All fields of a run; a config file changes what it needs and `--config.FIELD=VALUE` overrides it.

    Sizes are global: they count rows over all devices, so that a config is the same experiment on any number of them.
    """
    return ConfigDict(
        {
            "name": "run",  # a title for reports
            "seed": 0,  # of weights, order of rows, augmentation, buffer
            "strategy": "er",
            "strategies": {name: options for name in STRATEGIES if (options := default_options(name))},
            "batch_size": 64,  # new rows a step
            "epochs": 1,  # passes over a task's data
            "log_every": 50,  # steps between lines in metrics.jsonl
            "data": {
                "source": "digits",  # digits | tfds:NAME | npz:FILE | ptychography:SIDE
                "data_dir": config_dict.placeholder(str),  # of TFDS; its own default where not given
                "scenario": "class",  # class | domain | instance | permuted | rotated | blurry | si_blurry
                "tasks": 5,  # a number of tasks, or the classes of each: ((0, 1), (2, 3))
                "class_order_seed": config_dict.placeholder(int),  # shuffles the classes; natural order where not given
                "scenario_seed": 0,  # of permutations, angles, scattered rows, validation rows
                "scattered": 0.1,  # of blurry and si_blurry: the share of rows that come with another task
                "disjoint": 0.5,  # of si_blurry: the share of classes that come with one task only
                "validation": 0.0,  # share of each class's train rows that stands in for the test set; 0: the test set
                "loss_classes": "all",  # all | seen | task: among which a row is classified in training
                "placement": "shuffled",  # by_class: every batch is handed to the devices sorted by class
                "augment": (),  # crop, flip: on device, afresh at every replay
                "mean": config_dict.placeholder(tuple),  # per channel of images in 0..1
                "std": config_dict.placeholder(tuple),
                "image_size": config_dict.placeholder(int),  # of TFDS: cut images to this side, at random in training
                "threads": 2,  # that read ahead
            },
            "model": {
                "name": "mlp",
                "dtype": "float32",  # of the computation: float32 | bfloat16
                "options": {},  # see jaxcl.models.make_model
            },
            "optimizer": {
                "name": "sgd",  # sgd | adamw
                "learning_rate": 0.1,
                "momentum": 0.0,  # of sgd
                "nesterov": False,  # of sgd
                "weight_decay": 0.0,  # of sgd: L2 in the gradient; of adamw: decoupled
                "clip_norm": config_dict.placeholder(float),  # of the global gradient
                "schedule": "constant",  # constant | cosine | steps; each task begins anew
                "warmup_epochs": 0.0,  # of every task; the learning rate rises linearly
                "warmup_from": 0.0,  # the share of the learning rate with which it begins
                "decay_epochs": (),  # of schedule = steps: from these epochs on
                "decay_factors": (),  # the learning rate is multiplied by these
            },
            "buffer": {
                "capacity": 200,  # rows in the union of all devices' shards
                "share": config_dict.placeholder(float),  # of all tasks' training rows: gives the capacity instead
                "policy": "class_random",  # of rows that enter as they arrive; those that are selected have "herding"
                "representatives": 64,  # rows drawn a step
                "candidates": 16,  # of a batch: expected rows stored once a class is full (class_random)
                "memory": "sharded",  # sharded | replicated | independent
                "exchange": "mix",  # mix | balance | local
                "sampling": "uniform",  # uniform | class_balanced
                "replay": "draw",  # draw | append | append_part: see jaxcl/training/replay.py
                "repeats": "all",  # all | first_epoch | distinct: what happens to a row that comes by again
                "tier": "device",  # device | host: where records lie
                "path": config_dict.placeholder(str),  # of the host tier: a folder for memory-mapped files
                "handover": "outputs",  # of the host tier: outputs | callback, how rows leave the step
                "queue": 4,  # of the host tier: steps that may wait to be stored
                "selection": {  # of a task's rows, at its end
                    "by": config_dict.placeholder(
                        str
                    ),  # random | closest | furthest | icarl; else rows enter as they arrive
                    "features": "clean",  # clean | augmented: of what images
                    "random_keys": "shared",  # shared | per_shard: whether an independent memory's choices are all the same
                    "quota": "adaptive",  # adaptive: capacity / classes seen; fixed: capacity // all classes
                    "ways": 1,  # independent choices that share a sharded memory
                },
            },
            "finetune": {  # at a task's end, on the memory alone
                "epochs": 0,  # 0: none
                "learning_rate": config_dict.placeholder(float),  # constant; that of the optimizer where not given
                "frozen": (),  # parts of the model that it leaves alone, as its parameters are named
                "order": "shuffled",  # shuffled | sequential: class by class, all ranks at the same place
                "ranks": config_dict.placeholder(int),  # of sequential; the devices where not given
            },
            "eval": {"batch_size": 256},
            "checkpoint": {  # beside those at the end of every task
                "every_steps": 0,  # 0: not by steps
                "every_seconds": 600.0,  # 0: not by the clock
                "keep": 2,  # the newest
            },
        }
    )


def check_config(config: ConfigDict, devices: int) -> None:
    """Checks what can be told without data.

    Raises:
      UserError: a field is unknown, missing or of another type, or a value is not allowed on `devices` devices.
    """
    check_fields(config, default_config(), "config")
    _one_of("strategy", config.strategy, tuple(STRATEGIES))
    _one_of("data.placement", config.data.placement, ("shuffled", "by_class"))
    _one_of("data.scenario", config.data.scenario, SCENARIOS)
    _one_of("data.loss_classes", config.data.loss_classes, ("all", "seen", "task"))
    allowed = {"policy": POLICIES, "memory": MEMORIES, "exchange": EXCHANGES, "sampling": DRAWS, "repeats": REPEATS}
    allowed |= {"tier": TIERS, "handover": HANDOVERS}
    for field, names in allowed.items():
        _one_of(f"buffer.{field}", config.buffer[field], names)
    _one_of("optimizer.name", config.optimizer.name, ("sgd", "adamw"))
    _one_of("optimizer.schedule", config.optimizer.schedule, ("constant", "cosine", "steps"))
    for field in ("batch_size", "epochs", "log_every", "eval.batch_size", "data.threads", "checkpoint.keep"):
        _positive(field, _get(config, field))
    _positive("optimizer.learning_rate", config.optimizer.learning_rate)
    not_negative = (
        "seed",
        "finetune.epochs",
        "optimizer.warmup_epochs",
        "optimizer.weight_decay",
        "optimizer.momentum",
    )
    for field in (*not_negative, "checkpoint.every_steps", "checkpoint.every_seconds"):
        if _get(config, field) < 0:
            raise UserError(f"{field}: {_get(config, field)} is not allowed, give 0 or more")
    if not 0 <= config.data.validation < 1:
        raise UserError(f"data.validation: {config.data.validation} is not allowed, give a share from 0 to less than 1")
    chosen = config.buffer.selection
    if chosen.by is not None:
        _one_of("buffer.selection.by", chosen.by, SELECTIONS)
    for field, names in {"features": FEATURES, "random_keys": KEYS, "quota": QUOTAS}.items():
        _one_of(f"buffer.selection.{field}", chosen[field], names)
    _positive("buffer.selection.ways", chosen.ways)
    if chosen.ways > 1 and config.buffer.memory != "sharded":
        raise UserError(
            f"buffer.selection.ways: {chosen.ways} is not allowed with buffer.memory = {config.buffer.memory}, "
            "give 1 or memory = sharded"
        )
    _one_of("buffer.replay", config.buffer.replay, REPLAYS)
    _one_of("finetune.order", config.finetune.order, ORDERS)
    sizes = ["batch_size", "eval.batch_size"]
    strategy = make_strategy(config.strategy, config.strategies.get(short(config.strategy), {}))
    if strategy.draws:
        for field in ("buffer.capacity", "buffer.representatives", "buffer.candidates", "buffer.queue"):
            _positive(field, _get(config, field))
        share = config.buffer.share
        if share is not None and not 0 < share <= 1:
            raise UserError(f"buffer.share: {share} is not allowed, give a number above 0 and at most 1")
        if config.buffer.tier == "host" and strategy.visit is not None and strategy.visits == "buffer":
            raise UserError(
                f"buffer.tier: host is not allowed with {config.strategy}, which reads the memory on the devices"
            )
        if config.buffer.tier == "host" and (chosen.by or strategy.selection):
            raise UserError("buffer.tier: host is not allowed with rows selected at a task's end, give device")
        _check_replay(config, strategy, devices)
        if config.buffer.candidates > config.batch_size:
            raise UserError(
                f"buffer.candidates: {config.buffer.candidates} is more than a batch holds, "
                f"give at most batch_size = {config.batch_size}"
            )
        sizes.append("buffer.representatives")
        if config.strategy == "mir" and config.strategies.mir.replayed > config.buffer.representatives:
            raise UserError(
                f"strategies.mir.replayed: {config.strategies.mir.replayed} is more than a step draws, "
                f"give at most buffer.representatives = {config.buffer.representatives}"
            )
    for field in sizes:
        if _get(config, field) % devices:
            raise UserError(
                f"{field}: {_get(config, field)} rows cannot be shared evenly, give a multiple of {devices} devices"
            )
    o = config.optimizer
    if len(o.decay_epochs) != len(o.decay_factors):
        raise UserError(
            f"optimizer.decay_factors: {len(o.decay_factors)} values for {len(o.decay_epochs)} decay_epochs, "
            "give one for each"
        )
    if list(o.decay_epochs) != sorted(o.decay_epochs):
        raise UserError(f"optimizer.decay_epochs: {tuple(o.decay_epochs)} must ascend")
    if o.schedule == "steps" and not o.decay_epochs:
        raise UserError("optimizer.decay_epochs: () is not allowed with schedule = steps, give the epochs of the decay")
    if not 0 <= o.warmup_from <= 1:
        raise UserError(f"optimizer.warmup_from: {o.warmup_from} is not allowed, give a number from 0 to 1")
    if not o.warmup_epochs < config.epochs and o.warmup_epochs > 0:
        raise UserError(f"optimizer.warmup_epochs: {o.warmup_epochs} must be less than epochs = {config.epochs}")


def _check_replay(config: ConfigDict, strategy: Strategy, devices: int) -> None:
    """Whether rows of the memory may be treated as the config asks."""
    buffer, finetune = config.buffer, config.finetune
    selects = bool(buffer.selection.by or strategy.selection)
    for field, asked in (("buffer.replay", buffer.replay != "draw"), ("finetune.epochs", finetune.epochs > 0)):
        if asked and not strategy.alike:
            allowed = [name for name in STRATEGIES if make_strategy(name).alike]
            raise UserError(
                f"{field}: {_get(config, field)} is not allowed with {config.strategy}, whose loss tells new rows from "
                f"replayed ones; choose one of {', '.join(allowed)}"
            )
        if asked and not selects:
            raise UserError(
                f"{field}: {_get(config, field)} needs a memory that is filled at a task's end, give buffer.selection.by"
            )
    if finetune.learning_rate is not None:
        _positive("finetune.learning_rate", finetune.learning_rate)
    ranks = devices if finetune.ranks is None else finetune.ranks
    if finetune.epochs and finetune.order == "sequential" and (ranks < 1 or config.batch_size % ranks):
        raise UserError(f"finetune.ranks: {ranks} is not allowed, give a divisor of batch_size = {config.batch_size}")


def unknown_field(name: str, parent: str, allowed: list[str]) -> UserError:
    """The error for a field that does not exist, with the nearest one that does."""
    near = difflib.get_close_matches(name, allowed, n=1)
    hint = f"did you mean {near[0]}?" if near else f"allowed are {', '.join(sorted(allowed))}"
    return UserError(f"{parent}.{name}: no such field; {hint}")


def check_fields(config: ConfigDict, default: ConfigDict, path: str) -> None:
    """Whether `config` has the fields of `default`, with values of their types.

    Raises:
      UserError: it has not.
    """
    for name in config:
        if name not in default:
            raise unknown_field(name, path, list(default))
    for name in default:
        field = f"{path}.{name}"
        if name not in config:
            raise UserError(f"{field}: missing; start the config from jaxcl.training.config.default_config()")
        if isinstance(default[name], ConfigDict):
            if not isinstance(config[name], ConfigDict):
                raise UserError(f"{field}: {config[name]!r} is not a group of fields")
            if field != "config.model.options":
                check_fields(config[name], default[name], field)
        elif field == "config.data.tasks" or config[name] is None:
            continue
        elif not isinstance(config[name], (want := _type(default, name))):
            raise UserError(f"{field}: {config[name]!r} is not allowed, give a value of type {want[-1].__name__}")


def _type(default: ConfigDict, name: str) -> tuple[type, ...]:
    want = default.get_type(name)
    return {float: (int, float), tuple: (list, tuple), int: (int,)}.get(want, (want,))


def _get(config: ConfigDict, path: str) -> Any:
    for name in path.split("."):
        config = config[name]
    return config


def _one_of(field: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{field}: {value!r} is unknown, choose one of {', '.join(allowed)}")


def _positive(field: str, value: float) -> None:
    if not value > 0:
        raise UserError(f"{field}: {value} is not allowed, give a positive number")
