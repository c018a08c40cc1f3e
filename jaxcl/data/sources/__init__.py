"""Where images come from; one file a kind of source.

A file NAME.py has a function `NAME(*, rest, ..., **_) -> (train, test)`. It is called with keywords, of which it names those
that it uses: `rest`, what `data.source` says behind the kind ("FILE" of "npz:FILE", "" of "digits"), and `data_dir`,
`cache_bytes` and `image_size`, see `open_source`. A source that does not name `image_size` takes no other than None.
"""

import difflib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable

from jaxcl.check import at_least, check
from jaxcl.data.given import KIND
from jaxcl.data.source import Source
from jaxcl.errors import UserError
from jaxcl.registry import Registry

SOURCES: Registry[Callable[..., tuple[Source, Source]]] = Registry("data.source", __name__)


def open_source(
    name: str, data_dir: str | None = None, cache_bytes: int = 1 << 30, image_size: int | None = None
) -> tuple[Source, Source]:
    """Opens a data set and returns its (train, test) sources.

    Args:
      name: KIND or KIND:REST, where KIND is one of `SOURCES` or `module.path:name`.
      data_dir: the TFDS folder; None is TFDS's own default (`TFDS_DATA_DIR` or ~/tensorflow_datasets). A set that
        is not there yet is downloaded and prepared, which for most sets needs TensorFlow.
      cache_bytes: such a set is decoded into memory if both splits together take at most this many bytes.
      image_size: of tfds, folder and hf: cuts images of any size to squares of this side: the middle one, and in training a
        random window (see `Source.read_random`). Such a set is decoded batch by batch. None: images have one size already.

    Raises:
      UserError: the set is unknown, cannot be prepared, or is not one of labelled uint8 images of one size.
    """
    kind, rest = parse(name)
    source = SOURCES[kind]
    data_dir = os.path.expanduser(data_dir) if data_dir else None
    options = {"rest": rest, "data_dir": data_dir, "image_size": image_size, "cache_bytes": cache_bytes}
    try:
        inspect.signature(source).bind(**options)
    except (TypeError, ValueError) as error:  # of a name from outside
        raise UserError(f"data.source: {name!r} is not allowed, {kind} is no source: {error}") from None
    if image_size is not None:
        check("data.image_size", image_size, at_least(1))
        if "image_size" not in inspect.signature(source).parameters:
            raise UserError(f"data.image_size: {image_size} is not allowed, give None: {name!r} has images of one size")
    return source(**options)


def parse(name: str) -> tuple[str, str]:
    """KIND and REST of a name; a kind from outside has a colon itself."""
    kind, _, rest = name.partition(":")
    if kind == KIND:
        raise UserError(f"data.source: {name!r} was handed over by a program; hand it to train_and_evaluate again")
    if kind in SOURCES:
        return kind, rest
    top = kind.partition(".")[0]
    if rest and (top in sys.modules or (top and importlib.util.find_spec(top))):
        attribute, _, rest = rest.partition(":")
        return f"{kind}:{attribute}", rest
    meant = _meant(name, kind, rest)
    hint = f"; did you mean {meant}?" if meant else ""
    raise UserError(f"data.source: {name!r} is not allowed, give one of {', '.join(SOURCES)} or module:name{hint}")


def _meant(name: str, kind: str, rest: str) -> str | None:
    """What a user who wrote the unknown source `name` probably meant."""
    if name.endswith(".npz") and not rest:
        return f"npz:{name}"
    near = difflib.get_close_matches(kind.lower(), SOURCES, 1)
    if near or rest:
        return f"{near[0]}:{rest}".rstrip(":") if near else None
    from jaxcl.data.sources.tfds import close_name

    close = close_name(name)
    return f"tfds:{close}" if close else None
