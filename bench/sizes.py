"""What `pip install clip475` adds to torch, torchvision and transformers, in MB: python bench/sizes.py

A package counts with all that it needs, unless torch, torchvision or transformers need it too.
"""

import os
import re
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement


def megabytes(name):
    "The size of a package's files, without what Python compiles."
    files = [f for f in distribution(name).files or [] if "__pycache__" not in f.parts]
    return sum(os.path.getsize(f.locate()) for f in files if f.locate().is_file()) / 1e6


def with_needs(names):
    "The names, and those of all packages that they need here."
    found, waiting = set(), list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        try:
            requires = distribution(name).requires or []
        except PackageNotFoundError:
            continue
        if name not in found:
            found.add(name)
            needs = map(Requirement, requires)
            waiting += [r.name for r in needs if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


if __name__ == "__main__":
    config = ConfigParser(delimiters=["="], interpolation=None)
    config.read(Path(__file__).resolve().parents[1] / "settings.ini", encoding="utf-8")
    required = [Requirement(line).name for line in config["DEFAULT"]["requirements"].split()]
    large = with_needs(["torch", "torchvision", "transformers"])
    for name in required:
        added = with_needs([name]) - large
        if added:
            sizes = sorted(((megabytes(part), part) for part in added), reverse=True)
            parts = ", ".join(f"{part} {size:.1f}" for size, part in sizes if size >= 1)
            print(f"{name:16}{sum(size for size, _ in sizes):7.1f}  {parts}")
    print(f"{'in all':16}{sum(map(megabytes, with_needs(required) - large)):7.1f}")
