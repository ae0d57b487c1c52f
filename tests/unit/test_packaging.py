"""The packages that pyproject.toml lists one by one are the ones that exist."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_package_folder_is_listed():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "trawl").rglob("__init__.py")}
    assert set(setuptools["packages"]) == {".".join(folder.parts) for folder in folders} | {"trawl_cli"}
