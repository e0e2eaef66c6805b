"""clip475: learn how pictures and words come to share one space.

    import clip475

    model = clip475.load("runs/demo")
    clip475.search("a dog in the snow", "my_photos/", k=5, model=model)

The names of the front door, such as `clip475.load` and `clip475.recall_at_k`, and the packages, such as
`clip475.models`, are imported when they are first used: `import clip475` itself costs next to nothing.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if sys.version_info < (3, 11):  # noqa: UP036
    raise ImportError(
        "clip475 needs Python 3.11 or newer and this is Python %d.%d: "  # noqa: UP031
        "install a newer one and make a new environment with it" % sys.version_info[:2]
    )

_PACKAGES = ("core", "data", "models", "training", "evaluation", "searching", "studies", "app")

# Type checkers and editors read these imports; Python itself goes by the table below.
if TYPE_CHECKING:
    from .app.checks import check as check
    from .core.config import LabConfig as LabConfig
    from .core.files import LabError as LabError
    from .data.pixels import preprocess as preprocess
    from .evaluation.retrieval import recall_at_k as recall_at_k
    from .models.freezing import freeze as freeze
    from .searching.folder import search as search
    from .searching.model import ImageTextModel as ImageTextModel
    from .searching.model import classify as classify
    from .searching.model import encode_image as encode_image
    from .searching.model import encode_text as encode_text
    from .searching.model import load as load
    from .searching.model import similarity as similarity
    from .training.loss import info_nce as contrastive_loss  # noqa: F401
    from .training.loss import info_nce as info_nce

# name: (module, name in it)
_FRONT_DOOR = {
    "load": ("searching.model", "load"),
    "ImageTextModel": ("searching.model", "ImageTextModel"),
    "preprocess": ("data.pixels", "preprocess"),
    "encode_image": ("searching.model", "encode_image"),
    "encode_text": ("searching.model", "encode_text"),
    "similarity": ("searching.model", "similarity"),
    "classify": ("searching.model", "classify"),
    "search": ("searching.folder", "search"),
    "contrastive_loss": ("training.loss", "info_nce"),
    "info_nce": ("training.loss", "info_nce"),
    "recall_at_k": ("evaluation.retrieval", "recall_at_k"),
    "freeze": ("models.freezing", "freeze"),
    "LabConfig": ("core.config", "LabConfig"),
    "LabError": ("core.files", "LabError"),
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
        "module 'clip475' has no attribute %r; it has: %s"  # noqa: UP031
        % (name, ", ".join([*_FRONT_DOOR, *_PACKAGES]))
    )


def __dir__() -> list[str]:
    return sorted({*globals(), *_FRONT_DOOR, *_PACKAGES})
