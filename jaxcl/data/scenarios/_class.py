"""`class`: new classes. A task holds all rows of its own. Bouvier et al. (CCGrid 2024, section VI): ImageNet's 1,000 classes
as 4 tasks of 250."""

from jaxcl.data.scenarios.base import Made, Split


def class_(split: Split) -> Made:
    return split.by_class(), split.train, split.test
