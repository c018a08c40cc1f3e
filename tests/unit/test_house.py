"""The order of the house: which room may use which, and that no file is more than a sitting."""

import ast
import pathlib
import subprocess

import pytest

REPO = pathlib.Path(__file__).resolve().parents[2]
# A file imports from rooms of a lower floor, or from its own room.
FLOORS = {
    **dict.fromkeys(("errors", "types"), 0),
    **dict.fromkeys(("check", "marks", "registry", "mesh", "sealed", "memory", "signals", "compilation"), 1),
    **dict.fromkeys(
        ("fields", "latent", "losses", "nearest_mean", "optimizer", "partition", "shipped", "summaries"), 2
    ),
    **dict.fromkeys(("buffer", "data", "metrics", "models", "pretrained", "report"), 3),
    "strategies": 4,
    "runs": 5,
    "training": 6,
    **dict.fromkeys(("contrastive", "search"), 7),
    "cli": 8,
    **dict.fromkeys(("commands", "__main__"), 9),
}


def python_files(*folders: str) -> list[pathlib.Path]:
    listed = subprocess.run(["git", "ls-files", *folders], cwd=REPO, capture_output=True, text=True, check=True).stdout
    return [REPO / name for name in listed.splitlines() if name.endswith(".py") and (REPO / name).is_file()]


def name_of(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")


def imports(path: pathlib.Path, everywhere: bool = True) -> set[str]:
    """Dotted names that a file imports; without `everywhere` those that it imports as it is loaded."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if everywhere else iter(tree.body)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_arrows_between_rooms_go_one_way():
    wrong = []
    for path in python_files("jaxcl"):
        room = path.relative_to(REPO / "jaxcl").parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        for name in imports(path):
            top, *rest = name.split(".")
            if top in ("experiments", "configs", "tests"):
                wrong.append(f"{path.relative_to(REPO)} imports {name}")
            elif top == "jaxcl" and rest and rest[0] != room and rest[0] in FLOORS and FLOORS[rest[0]] >= FLOORS[room]:
                wrong.append(f"{path.relative_to(REPO)}, on floor {FLOORS[room]}, imports {name}")
    assert not wrong, "\n".join(wrong)


def test_no_file_imports_itself_by_way_of_others():
    paths = {name_of(path): path for path in python_files("jaxcl", "experiments")}
    arrows = {}
    for name, path in paths.items():
        asked = imports(path, everywhere=False)
        # "from package import module" means the module; a package's __init__ stands for itself alone.
        arrows[name] = {x if x in paths else x.rpartition(".")[0] for x in asked} & paths.keys() - {name}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way[way.index(name) :], name))
        if name not in done:
            for other in arrows[name]:
                visit(other, (*way, name))
            done.add(name)

    for name in paths:
        visit(name, ())


def test_flax_is_imported_in_models_alone():
    wrong = [
        str(path.relative_to(REPO))
        for path in python_files("jaxcl", "experiments", "configs")
        if "models" not in path.parts and any(name.split(".")[0] == "flax" for name in imports(path))
    ]
    assert not wrong, wrong


def test_configs_import_jaxcl_alone():
    """They lie in another folder when they are installed: one uses another by `jaxcl.shipped`."""
    allowed = ("jaxcl", "ml_collections", "typing")
    wrong = {
        f"{path.name}: {name}"
        for path in python_files("configs")
        for name in imports(path)
        if name.split(".")[0] not in allowed
    }
    assert not wrong, wrong


def test_every_command_is_a_module_of_experiments_too():
    """`python -m experiments.NAME` from a checkout; what it does is in the package."""
    names = [path.stem for path in python_files("jaxcl/commands") if path.stem != "__init__"]
    for name in names:
        assert imports(REPO / "experiments" / f"{name}.py") == {f"jaxcl.commands.{name}.command"}
    assert {"train", "compare", "sweep", "report"} <= set(names)


@pytest.mark.parametrize("words", ["jax.shard_map", "jax.experimental.shard_map"])
def test_functions_go_onto_the_mesh_in_one_place(words):
    wrong = [
        str(path.relative_to(REPO))
        for path in python_files("jaxcl", "experiments")
        if words + "(" in path.read_text() and path.name != "mesh.py"
    ]
    assert not wrong, wrong


def test_no_file_is_longer_than_400_lines():
    long = {
        str(path.relative_to(REPO)): n for path in python_files() if (n := len(path.read_text().splitlines())) > 400
    }
    assert not long, long
