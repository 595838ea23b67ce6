"""The wheel holds every module and data file, and imports from a clean place."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "blockdiffusion"

IMPORT_ALL = """
import pkgutil, sys
sys.path.insert(0, sys.argv[1])
import blockdiffusion
assert blockdiffusion.__file__.startswith(sys.argv[1]), blockdiffusion.__file__
names = [m.name for m in pkgutil.walk_packages(blockdiffusion.__path__, "blockdiffusion.")]
for name in names:
    __import__(name)
for name in blockdiffusion.__all__:
    getattr(blockdiffusion, name)
from blockdiffusion.reports.page import _asset
_asset("page.css"), _asset("page.js")
print(len(names))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT],
        check=True,
        capture_output=True,
    )
    (path,) = out.glob("*.whl")
    return path


def test_the_wheel_holds_everything(wheel):
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if "dist-info" not in name}
    wanted = {
        f"blockdiffusion/{path.relative_to(SOURCE)}"
        for path in SOURCE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert packed == wanted


def test_every_module_imports_from_the_wheel(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, str(tmp_path / "site")],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    modules = [path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py"]
    assert int(result.stdout) == len(modules)


def test_the_command_is_installed():
    entry = (ROOT / "pyproject.toml").read_text()
    assert 'blockdiff = "blockdiffusion.cli:main"' in entry
