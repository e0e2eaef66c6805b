"""clip475: learn how pictures and words come to share one space.

The names of the front door, such as `clip475.load` and `clip475.recall_at_k`, and the packages, such as `clip475.models`,
are imported when they are first used: `import clip475` itself costs next to nothing.
"""

import sys
from importlib import import_module

__version__ = "0.1.0"

if sys.version_info < (3, 11):
    raise ImportError(
        "clip475 needs Python 3.11 or newer and this is Python %d.%d: install a newer one and make a new environment with it"
        % sys.version_info[:2]
    )

_PACKAGES = ("core", "data", "models", "training", "evaluation", "searching", "studies", "app")

# name: (module, name in it)
_FRONT_DOOR = {
    "LabConfig": ("core.config", "LabConfig"),
    "LabError": ("core.files", "LabError"),
    "freeze": ("models.text", "freeze"),
    "info_nce": ("training.loss", "info_nce"),
    "contrastive_loss": ("training.loss", "info_nce"),
    "recall_at_k": ("evaluation.retrieval", "recall_at_k"),
    "check": ("app.checks", "check"),
}

__all__ = ["__version__", *_FRONT_DOOR]


def __getattr__(name: str) -> object:
    "Import a name of the front door or a package when it is first used (PEP 562)."
    if name in _PACKAGES:
        return import_module("clip475." + name)
    if name in _FRONT_DOOR:
        module, there = _FRONT_DOOR[name]
        value = getattr(import_module("clip475." + module), there)
        globals()[name] = value
        return value
    raise AttributeError(
        "module 'clip475' has no attribute %r; it has: %s" % (name, ", ".join([*_FRONT_DOOR, *_PACKAGES]))
    )


def __dir__() -> list[str]:
    return sorted({*globals(), *_FRONT_DOOR, *_PACKAGES})
