"""The configuration of a run: every field, and the checks that need no data and no device."""

import re
from typing import Any

from ml_collections import ConfigDict

from jaxcl.check import (
    FRACTION,
    NAME,
    NOT_NEGATIVE,
    PATH,
    POSITIVE,
    SEED,
    SHARE,
    Rule,
    between,
    check,
    each,
    found_in,
    is_number,
    one_of,
    refused,
    unknown_field,
)
from jaxcl.data import AUGMENTATIONS, SCENARIOS
from jaxcl.errors import UserError
from jaxcl.fields import Field, Fields, check_fields, default_of
from jaxcl.metrics import METRICS, asks_means
from jaxcl.models import MODELS
from jaxcl.registry import short
from jaxcl.runs.writers import WRITERS
from jaxcl.strategies import STRATEGIES, Strategy, make_strategy
from jaxcl.training.large_batch import BATCH_FIELDS, check_batch
from jaxcl.training.latents import check_latent
from jaxcl.training.layout import MESH, check_parts, shards_of
from jaxcl.training.memory_fields import BUFFER, FINETUNE, LATENT
from jaxcl.training.prior import PRIORS

THREADS = between(1, 256)
WORKERS = between(0, 256)
SIDE = between(1, 4096)
DIGEST = Rule(lambda x: isinstance(x, str) and re.fullmatch("[0-9a-f]{16}", x) is not None, "16 digits 0-9a-f")
NUMBERS = Rule(each(Rule(is_number, "")).ok, "a list of numbers")


def _lists_tasks(x: Any) -> bool:
    if isinstance(x, list | tuple):
        return bool(x) and all(isinstance(task, list | tuple) and task and each(NOT_NEGATIVE).ok(task) for task in x)
    return POSITIVE.ok(x)


TASKS = Rule(_lists_tasks, "a positive number, or the classes of each task, such as ((0, 1), (2, 3))")
OPTIMIZER = {
    "name": Field("sgd", "the optimiser", one_of(("sgd", "adamw", "lars", "lamb"))),
    "learning_rate": Field(0.1, "at its peak; of lars and lamb a share of each layer's length", POSITIVE),
    "momentum": Field(0.0, "of sgd and lars", FRACTION),
    "nesterov": Field(False, "of sgd and lars: Nesterov's momentum"),
    "trust": Field(0.001, "of lars: what it multiplies the length of a layer's weights by", POSITIVE),
    "weight_decay": Field(0.0, "of sgd, lars: L2 in the gradient; of adamw, lamb: decoupled", NOT_NEGATIVE),
    "clip_norm": Field(None, "the gradient is scaled down to this global norm; None: it is not", POSITIVE, float),
    "schedule": Field(
        "constant", "of the learning rate; every task begins it anew", one_of(("constant", "cosine", "steps"))
    ),
    "warmup_epochs": Field(0.0, "of every task, in which the learning rate rises linearly", NOT_NEGATIVE),
    "warmup_from": Field(0.0, "the share of the learning rate with which the warm-up begins", between(0, 1)),
    "decay_epochs": Field((), "of schedule = steps: from these epochs on, ascending", each(NOT_NEGATIVE)),
    "decay_factors": Field((), "one for each of decay_epochs: what the learning rate is multiplied by", each(POSITIVE)),
}
LOG = {
    "log_every": Field(50, "steps between lines in metrics.jsonl", POSITIVE),
    "writers": Field(
        ("tensorboard",), "where scalars go beside metrics.jsonl: see docs/looking.md", each(found_in(WRITERS))
    ),
}
AVERAGE = Field(
    0.0, "of the weights, for evaluation: its decay, see jaxcl/training/average.py; 0: the last weights", FRACTION
)
CHECKPOINT = {
    "every_steps": Field(0, "checkpoints beside those at the end of every task; 0: not by steps", NOT_NEGATIVE),
    "every_seconds": Field(600.0, "the same by the clock; 0: not by the clock", NOT_NEGATIVE),
    "keep": Field(2, "how many, the newest", POSITIVE),
    "accept_other_code": Field(
        False, "whether to go on where modules of the user's own have changed since the run began"
    ),
}
IMAGES = {
    "mean": Field(None, "of each channel of images in 0..1, taken off; None: not normalised", NUMBERS, tuple),
    "std": Field(None, "of each channel, which the rest is divided by", each(POSITIVE), tuple),
    "image_size": Field(
        None, "of tfds, folder and hf: images are cut to this side, at random in training", POSITIVE, int
    ),
    "threads": Field(2, "that read ahead", THREADS),
    "workers": Field(0, "processes that read ahead, each with so many threads; 0: threads alone", WORKERS),
}
DATA = {
    "source": Field("digits", "digits, folder:DIR, hf:DIR, npz:FILE or DIR, tfds:NAME, ptychography:SIDE", PATH),
    "data_dir": Field(None, "of TFDS; None: its own default", PATH, str),
    "scenario": Field("class", "how the rows are divided into tasks", found_in(SCENARIOS)),
    "tasks": Field(5, "how many, or the classes of each", TASKS, (int, tuple)),
    "class_order_seed": Field(None, "shuffles the classes; None: their natural order", NOT_NEGATIVE, int),
    "scenario_seed": Field(0, "of permutations, angles, scattered rows, validation rows", NOT_NEGATIVE),
    "scattered": Field(0.1, "of blurry and si_blurry: the share of rows that come with another task", between(0, 1)),
    "disjoint": Field(0.5, "of si_blurry: the share of classes that come with one task only", between(0, 1)),
    "validation": Field(
        0.0, "the share of each class's train rows that stands in for the test set; 0: the test set", FRACTION
    ),
    "loss_classes": Field(
        "all", "among which classes a row is classified in training", one_of(("all", "seen", "task"))
    ),
    "placement": Field(
        "shuffled", "by_class: every batch is handed to the devices sorted by class", one_of(("shuffled", "by_class"))
    ),
    "on_device": Field(
        "auto",
        "whether the rows of a task lie on every device, so that batches are handed over as numbers; auto: where they are "
        "few, decoded already, and not cut at random",
        one_of(("auto", "always", "never")),
    ),
    "augment": Field(
        (), "of new and replayed images: on device, afresh at every replay", each(found_in(AUGMENTATIONS))
    ),
    "resize": Field(
        None, "the side to which the device scales every image, augmented, before the model reads it", SIDE, int
    ),
    **IMAGES,
}
LOSS = {
    "prior": Field(
        "none", "balanced: the loss corrects how often classes come, see jaxcl/training/prior.py", one_of(PRIORS)
    ),
    "replay_weight": Field(1.0, "of a replayed row in the mean over all rows, where a new one weighs 1", POSITIVE),
}


def fields(outside: Fields | None = None) -> Fields:
    """All fields of a run. Sizes are global: they count rows over all devices, so that a config is the same experiment on any
    number of them.

    Args:
      outside: the options of strategies from outside the package.
    """
    options = {name: _options(name, f"see jaxcl/strategies/{name}.py") for name in STRATEGIES}
    return {
        "name": Field("run", "a title for reports"),
        "seed": Field(0, "of weights, order of rows, augmentation, buffer", SEED),
        "strategy": Field("er", "the method of continual learning", found_in(STRATEGIES)),
        "strategies": {name: found for name, found in options.items() if found} | dict(outside or {}),
        "batch_size": Field(64, "new rows a step", POSITIVE),
        "microbatches": Field(
            1, "parts in which a device takes its rows of a step, new and replayed, through the network", POSITIVE
        ),
        "epochs": Field(1, "passes over a task's data", POSITIVE),
        "steps_per_call": Field(
            0,
            "steps that a program takes at once, at most; checkpoints and stops wait for its end; "
            "0: as many as take about 0.2 s together. In the host tier one",
            NOT_NEGATIVE,
        ),
        **LOG,
        "data": DATA,
        "model": {
            "name": Field("mlp", "the network", found_in(MODELS)),
            "dtype": Field("float32", "of the computation", one_of(("float32", "bfloat16"))),
            "options": Field({}, "of the network: see its file in jaxcl/models"),
            "init_from": Field(
                None,
                "weights to begin with: a file (safetensors, npz, .pth), a run's folder, or package:NAME; see "
                "docs/pretrained.md",
                PATH,
                str,
            ),
            "init_digest": Field(
                None, "of these weights; filled in as the run begins; given: other ones are refused", DIGEST, str
            ),
        },
        "freeze": Field(
            (),
            "parts of the model, as its parameters are named, that stay as they are in all training; backbone: all but "
            "head, neck and prompts; block_*: all of such names",
            each(NAME),
        ),
        "loss": LOSS,
        "optimizer": {
            **OPTIMIZER,
            "scales": Field({}, "of the learning rate, by part of the model, named as in freeze: {'backbone': 0.01}"),
            "later_tasks": Field(1.0, "the share of it in every task but the first", SHARE),
            "average": AVERAGE,
            **BATCH_FIELDS,
            "split_state": Field(
                False,
                "whether each device updates a part of the weights it holds, and keeps its state of that part alone",
            ),
        },
        "mesh": MESH,
        "buffer": BUFFER,
        "latent": LATENT,
        "finetune": FINETUNE,
        "eval": {
            "batch_size": Field(256, "rows of an evaluation's step", POSITIVE),
            "metrics": Field((), "further metrics of every evaluation", each(found_in(METRICS))),
        },
        "checkpoint": CHECKPOINT,
    }


def prior_of(config: ConfigDict, strategy: Strategy) -> str:
    """`loss.prior` as it applies to this strategy: without a memory, or with a way of its own with the bias, it is "none"."""
    return config.loss.prior if strategy.draws and not strategy.own_bias else "none"


def default_config() -> ConfigDict:
    """All fields with their defaults; a config file changes what it needs and `--config.FIELD=VALUE` overrides it."""
    return default_of(fields())


def check_config(config: ConfigDict, devices: int) -> None:
    """Checks what can be told without data.

    Raises:
      UserError: a field is unknown, missing or of another type, or a value is not allowed on `devices` devices.
    """
    check_values(config)
    shards = shards_of(config, devices)
    check_writers(config)
    check_optimizer(config)
    check_batch(config, shards)
    sizes = ["batch_size", "eval.batch_size"]
    strategy = make_strategy(config.strategy, config.strategies.get(short(config.strategy), {}))
    if strategy.draws:
        sizes.append("buffer.representatives")
        _check_buffer(config, strategy)
        _check_replay(config, strategy, shards)
    _check_loss(config, strategy)
    _check_evaluation(config, strategy)
    check_latent(config, strategy)
    check_evenly(config, sizes, shards)
    check_parts(config, strategy, shards)
    if strategy.check is not None:
        strategy.check(config)


def check_values(config: ConfigDict) -> None:
    """Whether the config has every field and no other, and each a value that is allowed by itself.

    Raises:
      UserError: it has not.
    """
    check_fields(config, fields(_outside(config)))


def _options(strategy: str, meaning: str) -> Fields:
    return {option: Field(default, meaning) for option, default in STRATEGIES.options(strategy).items()}


def _outside(config: ConfigDict) -> Fields:
    """The options that the config gives a strategy from outside, under its short name."""
    name, groups = config.get("strategy"), config.get("strategies")
    if not isinstance(name, str) or ":" not in name or not isinstance(groups, ConfigDict) or short(name) not in groups:
        return {}
    options = _options(name, "")
    for option in groups[short(name)]:
        if option not in options:
            raise unknown_field(f"strategies.{short(name)}.{option}", list(options))
    return {short(name): {option: options[option] for option in groups[short(name)]}}


def check_writers(config: ConfigDict) -> None:
    """Whether every writer is there; whether it works is seen when it writes.

    Raises:
      UserError: one cannot be imported.
    """
    for name in config.writers:
        WRITERS[name]


def check_optimizer(config: ConfigDict) -> None:
    """What relates the fields of the optimiser to each other and to the epochs.

    Raises:
      UserError: they do not go together.
    """
    o = config.optimizer
    if len(o.decay_epochs) != len(o.decay_factors):
        raise refused(
            "optimizer.decay_factors", o.decay_factors, f"one for each of the {len(o.decay_epochs)} decay_epochs"
        )
    if list(o.decay_epochs) != sorted(o.decay_epochs):
        raise refused("optimizer.decay_epochs", o.decay_epochs, "epochs that ascend")
    if o.schedule == "steps" and not o.decay_epochs:
        raise refused("optimizer.decay_epochs", o.decay_epochs, "the epochs of the decay that schedule = steps needs")
    if o.warmup_epochs >= config.epochs:
        raise refused("optimizer.warmup_epochs", o.warmup_epochs, f"less than epochs = {config.epochs}")
    for part, scale in o.get("scales", {}).items():
        check(f"optimizer.scales.{part}", scale, NOT_NEGATIVE)


def check_evenly(config: ConfigDict, sizes: list[str], devices: int) -> None:
    """Whether every device gets as many rows.

    Raises:
      UserError: one of these fields is no multiple of the devices.
    """
    for field in sizes:
        if _get(config, field) % devices:
            raise refused(field, _get(config, field), f"a multiple of {devices} devices")


def _check_buffer(config: ConfigDict, strategy: Strategy) -> None:
    """Whether the sizes of the buffer go together, and its place with what the strategy needs."""
    buffer, chosen = config.buffer, config.buffer.selection
    if buffer.tier == "host" and strategy.visit is not None and strategy.visits == "buffer":
        raise UserError(
            f"buffer.tier: host is not allowed with {config.strategy}, which reads the memory on the devices"
        )
    if buffer.tier == "host" and (chosen.by or strategy.selection):
        raise UserError("buffer.tier: host is not allowed with rows selected at a task's end, give device")
    if chosen.ways > 1 and buffer.memory != "sharded":
        raise UserError(
            f"buffer.selection.ways: {chosen.ways} is not allowed with buffer.memory = {buffer.memory}, "
            "give 1 or memory = sharded"
        )
    if buffer.candidates > config.batch_size:
        raise refused("buffer.candidates", buffer.candidates, f"at most batch_size = {config.batch_size}")
    if buffer.share is not None:
        return
    held = f"at most buffer.capacity = {buffer.capacity}"
    if chosen.ways > buffer.capacity:
        raise refused("buffer.selection.ways", chosen.ways, held)
    if buffer.representatives > buffer.capacity and buffer.memory != "independent" and buffer.replay == "draw":
        raise refused("buffer.representatives", buffer.representatives, held)


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
    ranks = devices if finetune.ranks is None else finetune.ranks
    if finetune.epochs and finetune.order == "sequential" and config.batch_size % ranks:
        raise refused("finetune.ranks", ranks, f"a divisor of batch_size = {config.batch_size}")


def _check_loss(config: ConfigDict, strategy: Strategy) -> None:
    """Whether the strategy's loss is one that the fields of `loss` can change."""
    loss, finetune = config.loss, config.finetune
    if prior_of(config, strategy) != "none" and finetune.epochs and finetune.order == "sequential":
        raise refused(
            "finetune.order", finetune.order, f"shuffled, as loss.prior = {loss.prior} needs rows of all classes"
        )
    if loss.replay_weight == 1:
        return
    if not strategy.draws or strategy.weights or strategy.rehearse or config.buffer.replay != "draw":
        why = (
            "has no mean over new and replayed rows"
            if config.buffer.replay == "draw"
            else "is given with buffer.replay"
        )
        raise refused("loss.replay_weight", loss.replay_weight, f"1: {config.strategy} {why}")


def means_asked(config: ConfigDict) -> list[str]:
    """The metrics that classify by the class means of the memory."""
    return [name for name in config.eval.metrics if asks_means(METRICS[name])]


def _check_evaluation(config: ConfigDict, strategy: Strategy) -> None:
    """Whether there is what the evaluation uses."""
    average = config.optimizer.average
    if average and strategy.last_weights:
        raise refused("optimizer.average", average, f"0: {config.strategy} {strategy.last_weights}")
    for name in means_asked(config):
        if not strategy.draws:
            raise refused("eval.metrics", name, f"one that needs no memory: {config.strategy} has none")
        if config.buffer.tier == "host":
            raise refused("eval.metrics", name, "one that needs no memory on the devices, or buffer.tier = device")


def _get(config: ConfigDict, path: str) -> Any:
    for name in path.split("."):
        config = config[name]
    return config
