"""The marks of the files that a command makes again under the same name: what lacks ours is someone else's and is refused."""

import os
import pathlib

from jaxcl.errors import UserError

HTML = '<meta name="generator" content="jaxcl">'  # in the head of a page
PNG = {"Software": "jaxcl"}  # among the texts of a picture
JSON = "jaxcl"  # the first key: the version that wrote it
_MARKS = {".html": HTML.encode(), ".png": b"Software\0jaxcl", ".json": f'{{\n "{JSON}": '.encode()}


def check_ours(field: str, path: pathlib.Path) -> None:
    """Whether `path` may be written: it is not there, or it is a page, a picture or a JSON file of ours.

    Raises:
      UserError: something else is there, a symbolic link for instance.
    """
    if os.path.lexists(path) and not _is_ours(path):
        raise UserError(f"{field}: {path} is not a file of jaxcl; remove it or give another folder")


def _is_ours(path: pathlib.Path) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return _MARKS[path.suffix] in file.read(1024)
    except OSError:
        return False
