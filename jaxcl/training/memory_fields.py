"""The fields of a config that say what is remembered: the buffer, fine-tuning on it, activations instead of images."""

from jaxcl.buffer import DRAWS, EXCHANGES, HANDOVERS, MEMORIES, POLICIES, REPEATS, TIERS
from jaxcl.buffer.selection import FEATURES, KEYS, QUOTAS, SELECTIONS
from jaxcl.check import NAME, NOT_NEGATIVE, PATH, POSITIVE, SHARE, between, each, found_in, one_of
from jaxcl.fields import Field, Fields
from jaxcl.latent import DTYPES

REPLAYS = ("draw", "append", "append_part")  # see jaxcl/training/batches.py
ORDERS = ("shuffled", "sequential")
BELOW = ("frozen", "slow")

SELECTION = {
    "by": Field(
        None, "how a task's rows are chosen at its end; None: rows enter as they arrive", one_of(SELECTIONS), str
    ),
    "features": Field("clean", "of what images features are taken", one_of(FEATURES)),
    "random_keys": Field("shared", "whether an independent memory's choices are all the same", one_of(KEYS)),
    "quota": Field("adaptive", "adaptive: capacity / classes seen; fixed: capacity / all classes", one_of(QUOTAS)),
    "ways": Field(1, "independent choices that share a sharded memory", POSITIVE),
}
BUFFER: Fields = {
    "capacity": Field(200, "rows in the union of all devices' shards", POSITIVE),
    "share": Field(None, "of all tasks' training rows: gives the capacity instead", SHARE, float),
    "policy": Field(
        "class_random", "which slot a row takes as it arrives; selected rows have herding", found_in(POLICIES)
    ),
    "representatives": Field(64, "rows drawn a step", POSITIVE),
    "candidates": Field(16, "of a batch: expected rows stored once a class is full (class_random)", POSITIVE),
    "memory": Field(
        "sharded", "one memory divided among the devices, a copy each, or one of its own each", one_of(MEMORIES)
    ),
    "exchange": Field("mix", "which drawn rows move between devices", found_in(EXCHANGES)),
    "sampling": Field("uniform", "how rows are drawn", one_of(DRAWS)),
    "replay": Field("draw", "how the memory takes part in a task: see jaxcl/training/batches.py", one_of(REPLAYS)),
    "repeats": Field("all", "what happens to a row that comes by again", one_of(REPEATS)),
    "tier": Field("device", "where records lie", one_of(TIERS)),
    "path": Field(None, "of the host tier: a folder for memory-mapped files", PATH, str),
    "handover": Field("outputs", "of the host tier: how rows leave the step", one_of(HANDOVERS)),
    "queue": Field(4, "of the host tier: steps that may wait to be stored", POSITIVE),
    "selection": SELECTION,
}
FINETUNE = {
    "epochs": Field(0, "passes over the memory alone at a task's end; 0: none", NOT_NEGATIVE),
    "learning_rate": Field(None, "constant; None: that of the optimizer", POSITIVE, float),
    "frozen": Field((), "parts of the model that it leaves alone, as its parameters are named", each(NAME)),
    "order": Field("shuffled", "sequential: class by class, all ranks at the same place", one_of(ORDERS)),
    "ranks": Field(None, "of sequential; None: the devices", POSITIVE, int),
}
LATENT = {
    "layer": Field(
        None,
        "the part of the model whose output stands for the images, or features, the input of its head. None: images",
        NAME,
        str,
    ),
    "below": Field(
        "frozen",
        "what lies below it: frozen, as model.init_from has it, so that all rows are activations; slow: it learns from new "
        "rows, which are images, by optimizer.scales, and the memory alone holds activations",
        one_of(BELOW),
    ),
    "dtype": Field("float16", "in which activations are stored; int8: with a scale a row", one_of(DTYPES)),
    "views": Field(0, "augmented views of a row beside the plain one, of which each time one is drawn", between(0, 64)),
    "cache": Field(None, "a folder that keeps activations for other runs; None: they are computed anew", PATH, str),
}
