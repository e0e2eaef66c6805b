"""clip475: learn how pictures and words come to share one space.

Every notebook of `nbs/` is one module here, and loads on first use: after `import clip475`,
`clip475.model` just works, and the import itself costs next to nothing.
"""
import sys

__version__ = "0.1.0"

if sys.version_info < (3, 11):
    raise ImportError("clip475 needs Python 3.11 or newer and this is Python %d.%d: install a newer one and make a new environment with it" % sys.version_info[:2])


def _modules():
    from pkgutil import iter_modules
    return sorted(m.name for m in iter_modules(__path__) if not m.name.startswith("_"))


def __getattr__(name):
    "Load the submodule `name` when it is first asked for (PEP 562)."
    from importlib import import_module
    if name in _modules(): return import_module("clip475." + name)
    raise AttributeError("module 'clip475' has no attribute %r; its modules are: %s" % (name, ", ".join(_modules())))


def __dir__(): return sorted([*globals(), *_modules()])
