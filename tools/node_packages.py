"""Installs npm packages outside the clone and prints the path of their node_modules.

    python tools/node_packages.py tests/foreign_client/package.json

The folder is named by the package.json's content and lasts between runs.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from workspace import CACHE, digest, locked, run


def node_modules(package_json: Path) -> Path:
    """The installed packages of a package.json."""
    folder = CACHE / "node" / digest(package_json)
    done = folder / "installed"
    with locked(folder.with_suffix(".lock")):
        if not done.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(package_json, folder / "package.json")
            run(["npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--prefix", folder])
            done.touch()
    return folder / "node_modules"


if __name__ == "__main__":
    print(node_modules(Path(sys.argv[1])))
