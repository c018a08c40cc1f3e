"""The tables of docs/configs.md: what rehearsal reaches with the shipped configs, of `experiments.studies.rehearsal`.

python -m experiments.pages.configs
"""

from experiments.pages.page import RESULTS, ROOT, fill, load, where
from experiments.studies import rehearsal

PAGE = ROOT / "docs" / "configs.md"
CONFIGS = ("split_mnist", "split_cifar10")


def parts() -> dict[str, str]:
    """What stands between each mark of the page."""
    return {name: part(name) for name in CONFIGS}


def part(name: str) -> str:
    if not (RESULTS / f"rehearsal_{name}.json").is_file():
        return "Not measured yet."
    found = load(f"rehearsal_{name}")
    return f"{rehearsal.markdown(found)}\n\n{where(found)}"


if __name__ == "__main__":
    fill(PAGE, parts())
