"""Prompts of a Vision Transformer whose weights stay: learned tokens, or keys and values, that its blocks see beside an image.

Which ones a row gets is decided by its query: the feature of its class token without prompts. No gradient goes through it.
Each prompt has a key; the nearest is that of the largest cosine. With q the query and k the keys of a row's prompts,
the loss grows by

    - pull * mean over the valid rows of all devices of the sum over its k of cos(k, q)

    l2p          Wang et al., CVPR 2022, Learning to prompt for continual learning: the `top_k` nearest of a pool, as tokens
                 before those of the image
    dualprompt   Wang et al., ECCV 2022, DualPrompt: complementary prompting for rehearsal-free continual learning: in some
                 blocks general keys and values before the image's own in attention, the same for every row; in others those
                 of an expert, one a task: in training that of the row's own task, in evaluation the nearest

As in the authors' code but for this: the query is by the weights as they are, of which the authors keep a second copy, the same
as long as the backbone is frozen; the majority of `batchwise` is that of the valid rows of all devices, and of training alone,
so that no prediction depends on the rows beside it.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.check import Rule, check, one_of, refused
from jaxcl.mesh import Axis
from jaxcl.models._norms.base import PENALTIES, Mask, facts_of, of_groups, valid_of
from jaxcl.models._options import WHOLE, Amount, Size, bind
from jaxcl.models._parts import PROMPTS
from jaxcl.models._towers import unit
from jaxcl.types import PyTree

OPTION = "model.options.prompts"
Prefix = tuple[jax.Array, jax.Array]  # further keys and values of attention, [B, L, H, D / H] each
Blocks = Annotated[
    tuple[int, ...],
    Rule(
        lambda x: isinstance(x, tuple) and bool(x) and all(map(WHOLE.ok, x)) and len({*x}) == len(x),
        "numbers of blocks, from 0, each once",
    ),
]
Options = Annotated[Mapping[str, Any], Rule(lambda x: isinstance(x, Mapping), "a group of options")]
_init = nn.initializers.uniform(0.01)


class Added(NamedTuple):
    """What blocks get beside the tokens of B images.

    Attributes:
      tokens: by the number of a block, `[B, L, D]`, before all that it gets from the block below.
      prefixes: by the number of a block.
      read: of the tokens behind the last block, those whose mean is the input of the head.
    """

    tokens: Mapping[int, jax.Array]
    prefixes: Mapping[int, Prefix]
    read: slice


NOTHING = Added({}, {}, slice(0, 1))


class L2P(nn.Module):
    """Params `keys` `[M, D]` and `pool` `[blocks, M, L, D]`.

    Attributes:
      width: D.
      axis_name: mesh axis of the batch, or axes; None where this device has all of it.
      pool: M prompts.
      length: L, tokens of a prompt.
      top_k: prompts of a row.
      batchwise: whether in training all rows get the prompts that most of them would; a tie goes to the lower number.
      blocks: before which the tokens are put.
      read: which tokens the head classifies by: the mean of those of the "prompts", the class "token", or the mean of "both".
      pull: see above.
    """

    width: int
    axis_name: Axis | None
    pool: Size = 10
    length: Size = 10
    top_k: Size = 4
    batchwise: bool = True
    blocks: Blocks = (0,)
    read: Literal["prompts", "token", "both"] = "prompts"
    pull: Amount = 1.0

    reads: ClassVar[bool] = False  # this and the next, see `Model`
    begin: ClassVar[Any] = None

    @property
    def mixes(self) -> str:
        return f"{OPTION}.batchwise" if self.batchwise else ""

    @nn.compact
    def __call__(self, query: jax.Array, *, train: bool, mask: Mask = None) -> Added:
        """query float32 `[B, D]`."""
        keys = self.param("keys", _init, (self.pool, self.width))
        pool = self.param("pool", _init, (len(self.blocks), self.pool, self.length, self.width))
        cosines = cosines_of(query, keys)
        nearest = lax.top_k(cosines, self.top_k)[1]
        if train and self.batchwise:
            nearest = jnp.broadcast_to(self._majority(nearest, mask), nearest.shape)
        taken = jax.vmap(of_groups, (0, None))(nearest, self.pool)  # [B, k, M]
        if train:
            self.sow(PENALTIES, "pull", -self.pull * jnp.einsum("bkm,bm->b", taken, cosines, precision="highest"))
        tokens = jnp.einsum("bkm,nmld->nbkld", taken, pool, precision="highest")
        tokens = tokens.reshape(len(self.blocks), len(query), -1, self.width)
        ahead = len(self.blocks) * self.top_k * self.length
        read = {"prompts": slice(0, ahead), "token": slice(ahead, ahead + 1), "both": slice(0, ahead + 1)}[self.read]
        return Added(dict(zip(self.blocks, tokens, strict=True)), {}, read)

    def _majority(self, nearest: jax.Array, mask: Mask) -> jax.Array:
        """The prompts that are most often among those of the valid rows of all devices, `[k]`."""
        rows = of_groups(nearest.ravel(), self.pool).reshape(len(nearest), -1, self.pool).sum(1)
        votes = jnp.sum(rows if mask is None else jnp.where(valid_of(mask)[:, None], rows, 0), 0)
        return lax.top_k(votes if self.axis_name is None else lax.psum(votes, self.axis_name), self.top_k)[1]


class DualPrompt(nn.Module):
    """Params `keys` `[T, D]`, `general` `[blocks, 2, L, H, D / H]`, `expert` `[blocks, 2, T, L, H, D / H]`; of the 2 the first
    are attention's keys.

    Attributes:
      width, heads: D, and H of attention.
      tasks: T.
      general_length, expert_length: L of either.
      general_blocks, expert_blocks: those whose attention gets them; one that is in both gets the general ones first.
      inherit: whether a task's expert begins as that of the task before ended; else as it was drawn.
      pull: see above.
    """

    width: int
    heads: int
    tasks: int
    general_length: Size = 5
    expert_length: Size = 5
    general_blocks: Blocks = (0, 1)
    expert_blocks: Blocks = (2, 3, 4)
    inherit: bool = True
    pull: Amount = 1.0

    reads: ClassVar[bool] = True  # this and the next two, see `Model`
    mixes: ClassVar[str] = ""

    @property
    def begin(self) -> Any:
        return inherited if self.inherit else None

    @nn.compact
    def __call__(self, query: jax.Array, *, train: bool, mask: Mask = None) -> Added:
        """query float32 `[B, D]`; in training `mask` is `RowFacts`."""
        split = (self.heads, self.width // self.heads)
        keys = self.param("keys", _init, (self.tasks, self.width))
        general = self.param("general", _init, (len(self.general_blocks), 2, self.general_length, *split))
        shape = (len(self.expert_blocks), 2, self.tasks, self.expert_length, *split)
        expert = self.param("expert", _init, shape)
        cosines = cosines_of(query, keys)
        taken = of_groups(facts_of(mask).task if train else jnp.argmax(cosines, -1), self.tasks)  # [B, T]
        if train:
            self.sow(PENALTIES, "pull", -self.pull * jnp.sum(taken * cosines, -1))
        every = jnp.broadcast_to(general[:, :, None], (*general.shape[:2], len(query), *general.shape[2:]))
        own = jnp.einsum("bt,nitlhd->niblhd", taken, expert, precision="highest")
        found: dict[int, jax.Array] = {}
        for blocks, parts in ((self.general_blocks, every), (self.expert_blocks, own)):
            for block, part in zip(blocks, parts, strict=True):
                found[block] = jnp.concatenate([found[block], part], 2) if block in found else part
        return Added({}, {block: (part[0], part[1]) for block, part in found.items()}, NOTHING.read)


def inherited(params: PyTree, task: jax.Array) -> PyTree:
    """The parameters with the task's expert as that of the task before."""
    own = params[PROMPTS]
    expert = jnp.moveaxis(own["expert"], -4, 0)
    expert = jnp.moveaxis(expert.at[task].set(expert[task - 1]), 0, -4)
    return params | {PROMPTS: own | {"expert": expert}}


KINDS: dict[str, Callable[..., Any]] = {"l2p": L2P, "dualprompt": DualPrompt}


def cosines_of(query: jax.Array, keys: jax.Array) -> jax.Array:
    """Of each query `[B, D]` with each key `[M, D]`: float32 `[B, M]`."""
    return jnp.einsum("bd,md->bm", unit(query), unit(keys), precision="highest")


def make_prompts(options: Mapping[str, Any], *, depth: int, **given: Any) -> nn.Module | None:
    """The prompts of a network of so many blocks by these options, of which `kind` is one of `KINDS`; None without any.

    Args:
      given: width, heads, tasks, axis_name: what of them a kind names.

    Raises:
      UserError: an unknown kind or option, or a value that is not allowed.
    """
    if not options:
        return None
    own = dict(options)
    kind = own.pop("kind", None)
    check(f"{OPTION}.kind", kind, one_of(KINDS))
    made = bind(str(kind), KINDS[str(kind)], own, given, OPTION, more=("kind",))
    for field in ("blocks", "general_blocks", "expert_blocks"):
        blocks = getattr(made, field, ())
        if any(block >= depth for block in blocks):
            raise refused(f"{OPTION}.{field}", blocks, f"numbers below {depth}, the blocks of the network")
    if isinstance(made, L2P) and made.top_k > made.pool:
        raise refused(f"{OPTION}.top_k", made.top_k, f"at most pool = {made.pool}")
    return made
