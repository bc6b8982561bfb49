"""Rules of the house: which way imports point, what is never imported, and that the package opens quickly."""

import ast
import json
import re
from pathlib import Path

import pytest
from scripts import script

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sora_jax"
NOTEBOOKS = sorted((ROOT / "experiments").glob("*.ipynb"))
MODULES = sorted(PACKAGE.rglob("*.py"))
CODE = [*MODULES, *(path for part in ("configs", "experiments", "tests") for path in (ROOT / part).rglob("*.py"))]

# A room may import from lower floors and from itself. Same floor means: they do not know one another.
FLOORS = [
    ("errors", "background"),
    ("mesh", "flow", "counting", "intervals", "json_files", "media", "tensors"),
    ("layers", "attention", "hosts", "safety"),
    ("text", "codec", "dit", "sampler", "vision"),
    ("data", "video"),
    ("model_config",),
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


# Calls that can put frames into a file: of numpy, PIL, matplotlib, imageio, OpenCV, TensorBoard, and of ours.
WRITERS = set(
    "save savez savez_compressed tofile write_bytes save_file fromarray savefig imsave imwrite mimsave mimwrite "
    "get_writer add_video add_image add_images add_figure add_summary write_video write_videofile "
    "memmap write_array os.write os.pwrite sys.stdout.buffer dump "
    "media.encode media.png _ENCODERS _mp4 _gif".split()
)
PICTURES = {"PIL", "cv2", "imageio", "matplotlib", "moviepy", "skimage", "torchvision"}
# Where they may be, and why that is no way past the exit.
MAY_WRITE = {
    "the exit itself": {
        "sora_jax/safety/release.py": ["media.encode", "hidden.write_bytes"],
        "sora_jax/media.py": ["import PIL", "Image.fromarray", "_ENCODERS", "_mp4", "_gif"]
        + ["av.open w", "av.CodecContext.create w"],
    },
    "they go through it, as methods of Video": {
        "sora_jax/video.py": ["self.save"],
        "sora_jax/cli/generate.py": ["saver.save"],
        "sora_jax/cli/saving.py": ["video.save"],
        "sora_jax/evaluation/report.py": ["video.save", "picture.save"],
        "sora_jax/training/log.py": ["shown.save", "self._writer.file_writer.add_summary"],
        "experiments/benchmark.py": ["video.save"],
        "experiments/readme_samples.py": ["sheet.save"],
    },
    "charts of figures, on which there are no frames": {
        "sora_jax/evaluation/report.py": ["import matplotlib", "_draw_rows(report['rows'], figure).savefig"],
        "experiments/scaling_report.py": ["import matplotlib", "figure.savefig"],
    },
    "weights, tokenizers and latents": {
        "sora_jax/model_folder.py": ["(hidden / 'tokenizer.json').write_bytes"],
        "sora_jax/tensors.py": ["open wb"],
        "sora_jax/training/checkpoint.py": ["self._manager.save"],
        "sora_jax/training/loop.py": ["checkpoints.save"],
        "sora_jax/data/latents.py": ["safetensors.numpy.save"],
        "experiments/fit_gate.py": ["safetensors.numpy.save_file"],
        "experiments/loading_memory.py": ["safetensors.numpy.save_file"],
    },
    "keys, a grey pixel that is signed for trial, and the picture that a user gave, for the manifest": {
        "sora_jax/safety/keys.py": ["open wb"],
        "sora_jax/safety/provenance.py": ["path.write_bytes"],
        "sora_jax/request.py": ["media.png"],
    },
    "measurements: noise and marked frames, in memory or in folders that are deleted": {
        "experiments/benchmark.py": ["media.encode"],
        "experiments/mark_robustness.py": ["av.open w"],
        "experiments/provenance_matrix.py": ["media.encode", "target.write_bytes", "path.write_bytes"],
        "experiments/tampering.py": ["media.encode", "av.open w"],
    },
}


def writes(tree: ast.AST) -> set[str]:
    """What in a module may write pictures: calls with what they are called on, and imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            found |= {f"import {name.split('.')[0]}" for name in names if name.split(".")[0] in PICTURES}
            named = {alias.name for alias in node.names}
            found |= {f"import {name}" for name in named & (WRITERS | {"encode", "png"})}
        elif isinstance(node, ast.keyword) and node.arg == "input":  # of another program
            found |= {f"input={ast.unparse(node.value)}"}
        elif isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            found |= {text} if {node.attr, text} & WRITERS and text != "json.dump" else set()
        elif isinstance(node, ast.Name):
            found |= {node.id} & {"_ENCODERS", "_mp4", "_gif"}
        if isinstance(node, ast.Call) and (called := ast.unparse(node.func)).endswith(("open", ".create", "fdopen")):
            given = [*node.args, *(one.value for one in node.keywords)]
            words = [one.value for one in given if isinstance(one, ast.Constant) and isinstance(one.value, str)]
            modes = [word for word in words if re.fullmatch(r"[wax]b?\+?|[wax]\+?b|rb?\+b?", word)]
            if called in ("open", "av.open", "os.fdopen"):  # a mode that is not written there may be any
                modes += [f"{ast.unparse(one)} b" for one in node.args[1:2] if not isinstance(one, ast.Constant)]
            text_file = called in ("open", "os.fdopen") or called.endswith(".open") and not called.startswith("av.")
            found |= {f"{called} {mode}" for mode in modes if "b" in mode or not text_file}
    return found


def _code(path: Path) -> str:
    """Of a notebook all cells; its lines for the shell are none of Python."""
    if path.suffix == ".py":
        return path.read_text()
    cells = [cell["source"] for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    lines = [line for cell in cells for line in "".join(cell).splitlines()]
    return "\n".join("" if line.startswith(("!", "%")) else line for line in lines)


def test_frames_are_written_in_one_place():
    """Whatever can write a picture is listed above, with the reason; and what is listed is there."""
    allowed: dict[str, list[str]] = {}
    for places in MAY_WRITE.values():
        for path, calls in places.items():
            allowed.setdefault(path, []).extend(calls)
    found = {
        path.relative_to(ROOT).as_posix(): sorted(calls)
        for path in [*MODULES, *(ROOT / "experiments").rglob("*.py"), *(ROOT / "configs").rglob("*.py"), *NOTEBOOKS]
        if (calls := writes(ast.parse(_code(path))))
    }
    assert found == {path: sorted({*calls}) for path, calls in allowed.items()}


@pytest.mark.parametrize(
    "line",
    [
        "np.save(path, video.frames)",
        "numpy.savez_compressed(path, frames=frames)",
        "frames.tofile(path)",
        "Path(path).write_bytes(frames.tobytes())",
        "open(path, 'wb').write(frames.tobytes())",
        "path.open(mode='xb')",
        "writer.add_video('clip', frames)",
        "self._writer.add_image('frame', frames[0])",
        "Image.fromarray(frames[0])",
        "picture.save(path)",
        "from PIL import Image",
        "import imageio.v3 as iio",
        "iio.imwrite(path, frames)",
        "plt.imshow(frames[0]); plt.savefig(path)",
        "figure.savefig(path)",
        "av.open(path, 'w')",
        "av.open(path, mode='w', format='mp4')",
        "av.CodecContext.create('png', 'w')",
        "media.encode(frames, 8, '.mp4')",
        "from sora_jax.media import encode",
        "save = np.save",
        "open(path, 'r+b').write(frames.tobytes())",
        "open(path, mode).write(frames)",
        "av.open(path, mode)",
        "os.write(file, frames.tobytes())",
        "np.memmap(path, np.uint8, 'w+', shape=frames.shape)[:] = frames",
        "video.frames.dump(path)",
        "np.lib.format.write_array(file, frames)",
        "sys.stdout.buffer.write(frames.tobytes())",
        "subprocess.run(['ffmpeg', '-i', '-', path], input=frames.tobytes())",
        "media._mp4(frames, rate)",
        "from sora_jax.media import _gif",
    ],
)
def test_other_ways_to_write_frames_would_be_found(line):
    assert writes(ast.parse(line))


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
