"""Rules of the house: which way imports point, what is never imported, and that the package opens quickly."""

import ast
import re
from pathlib import Path

import pytest
from scripts import script

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sora_jax"
MODULES = sorted(PACKAGE.rglob("*.py"))
CODE = [*MODULES, *(path for part in ("configs", "experiments", "tests") for path in (ROOT / part).rglob("*.py"))]

# A room may import from lower floors and from itself. Same floor means: they do not know one another.
FLOORS = [
    ("errors",),
    ("mesh", "flow", "counting", "intervals", "json_files", "media", "tensors"),
    ("layers", "attention", "hosts", "safety"),
    ("text", "codec", "dit", "sampler", "vision"),
    ("data", "video"),
    ("model_folder",),
    ("interop", "request", "pipeline", "mesh_choice"),
    ("generate",),
    ("models", "training"),
    ("evaluation", "plan"),
    ("cli",),
    ("__main__",),
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
NEVER = {"torch", "tensorflow", "diffusers", "transformers", "pickle"}
# What compares with the public implementations, where they are installed.
COMPARES = {
    ROOT / "tests/golden/make.py",
    ROOT / "tests/golden/published.py",
    ROOT / "tests/interop/test_parity.py",
    ROOT / "experiments/benchmark_vs_diffusers.py",
}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[str]:
    """Full names of everything a file imports, at any depth; `from a import b` counts as a.b."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def test_every_room_has_a_floor():
    assert {room(path) for path in MODULES} - {"__init__"} <= FLOOR.keys()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    if path == PACKAGE / "__init__.py":
        assert not [name for name in imports(path) if name.startswith("sora_jax")]  # names are imported on first use
        return
    here = room(path)
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "sora_jax" or len(parts) == 1:
            continue
        there = parts[1]
        assert there == here or FLOOR[there] < FLOOR[here], f"{here} imports {name}, which is not below it"


@pytest.mark.parametrize(
    "path", [path for path in CODE if path not in COMPARES], ids=lambda p: str(p.relative_to(ROOT))
)
def test_nothing_imports_another_framework_or_pickle(path):
    assert not {name.split(".")[0] for name in imports(path)} & NEVER


def test_frames_are_written_in_one_place():
    """Only the exit calls `media.encode`, only media.py encodes, and no other library that writes pictures is there.

    `media.png` gives the bytes of a picture that the user gave, for the manifest of what is made of it.
    """
    writers, encoders = set(), set()
    for path in MODULES:
        here = path.relative_to(PACKAGE).as_posix()
        assert here == "media.py" or not {n.split(".")[0] for n in imports(path)} & {"av", "PIL", "cv2", "imageio"}, (
            here
        )
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and (ast.unparse(node) == "media.encode" or node.attr == "_ENCODERS"):
                writers.add(here)
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "media.png":
                encoders.add(here)
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("savefig", "imsave", "tofile"):
                # A chart of figures: no frames are on it.
                assert (here, ast.unparse(node.args[0])) == ("evaluation/report.py", "folder / 'figures.png'")
        assert not {"sora_jax.media.encode", "sora_jax.media.png"} & {*imports(path)}, here
    assert writers == {"safety/release.py"} and encoders == {"request.py"}


def test_no_file_names_a_place_on_somebodys_machine():
    place = re.compile(r"/(work|root|home|Users|opt)/\w")
    texts = [*CODE, *ROOT.glob("*.md"), *ROOT.glob("*.toml"), ROOT / "setup.py"]
    found = [f"{path.relative_to(ROOT)}: {hit[0]}" for path in texts if (hit := place.search(path.read_text()))]
    assert not found


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_a_config_says_what_it_is_and_can_be_made(path):
    module = script(path)
    assert module.__doc__ and module.__doc__.strip()
    config = module.get_config()
    assert config.task in ("codec", "dit")
    assert module.get_config() is not config
