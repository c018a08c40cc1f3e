"""What sources share: the form of their errors, and the check of labels."""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxcl.data.source import MOST_CLASSES
from jaxcl.errors import DataError, UserError


def wrong(name: str, what: str) -> UserError:
    """The error for a source `name` of which `what` is true."""
    return UserError(f"data.source: {name!r} {what}")


def brief(error: BaseException) -> str:
    """The first cause in one short line, without the page that may follow."""
    while error.__cause__:
        error = error.__cause__
    message = re.sub(r'^Failed to construct dataset .*?}": ', "", str(error))
    line = next((line.strip() for line in message.splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line}"[:160].rstrip(": ")


@contextlib.contextmanager
def whole(name: str, folder: Any) -> Iterator[None]:
    """Within, a prepared set is opened and read; whatever its readers raise, of files that are damaged, becomes one line.

    Raises:
      UserError: they did; names the folder.
    """
    try:
        yield
    except UserError:
        raise
    except DataError as error:  # of a row, which it names
        raise UserError(str(error).replace("data:", "data.source:", 1)) from None
    except Exception as error:
        raise wrong(name, f"cannot be read from {folder}, is it damaged? ({brief(error)})") from None


def read_each(
    called: Callable[[int], str], records: Any, rows: Sequence[int], decode: Callable[[Any, int], np.ndarray]
) -> list[np.ndarray]:
    """`decode(record, row)` of these rows of a prepared set, read together; if that fails one by one, to tell which it is.

    Args:
      called: what a row is called.
      records: by random access, `records.__getitems__(rows)`.

    Raises:
      DataError: a record cannot be read; names it.
    """
    with contextlib.suppress(Exception):
        return [decode(record, row) for record, row in zip(records.__getitems__(rows), rows, strict=True)]
    found = []
    for row in rows:
        try:
            found.append(decode(records.__getitems__([row])[0], row))
        except Exception as error:
            raise DataError(f"data: {called(row)} cannot be read, is it damaged? ({brief(error)})") from None
    return found


def check_labels(name: str, where: str, labels: np.ndarray, num_classes: int) -> None:
    """Raises:
    UserError: the split called `where` is empty, or labels int `[n]` lie outside 0..num_classes-1, or that is too many.
    """
    if num_classes > MOST_CLASSES:
        raise wrong(name, f"has {num_classes} classes, give at most {MOST_CLASSES}")
    if not len(labels):
        raise wrong(name, f"has no rows in {where}, give at least one")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise wrong(name, f"has labels {low}..{high} in {where}, give 0..{num_classes - 1}")
