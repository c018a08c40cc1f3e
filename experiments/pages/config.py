"""Writes the tables of docs/config.md: the fields of both kinds of run, as they are declared.

python -m experiments.pages.config
"""

from experiments.pages import page
from jaxcl import fields
from jaxcl.contrastive import config as contrastive
from jaxcl.training import config as training

PATH = page.ROOT / "docs" / "config.md"


def tables() -> dict[str, str]:
    """Of each mark."""
    return {"training": fields.table(training.fields()), "contrastive": fields.table(contrastive.fields())}


if __name__ == "__main__":
    page.fill(PATH, tables())
