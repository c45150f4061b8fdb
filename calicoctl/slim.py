"""Shortens the import of third-party libraries by leaving out the parts that this program never uses.

`install()` adds an import finder for two kinds of modules:

* A bare package, in BARE: its `__init__` does not run, since it would import the whole package. Its submodules can be
  imported.
* A deferred module, in DEFERRED: a placeholder is imported instead. The real module is loaded when an attribute is read
  that the placeholder lacks.

The program also works without `install()`: then imports only take longer. The libraries do not guarantee that these
parts can be left out, so tests check this with the installed versions.
"""

from __future__ import annotations

import importlib
import sys
import threading
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

BARE = frozenset({"pyroute2", "netaddr", "docker"})

# etcd uses dns for SRV discovery, urllib3 importlib.metadata for HTTP/2, requests charset_normalizer for bodies of
# unknown encoding: this program needs none of these. http.client and asyncio import ssl, which is needed for https only
DEFERRED = frozenset({"dns", "dns.resolver", "importlib.metadata", "charset_normalizer", "ssl", "asyncio.sslproto"})


class _Bare:
    """The loader of a bare package. It does not execute the package's `__init__`, so the module is empty."""

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        pass


class _Placeholder(ModuleType):
    """The placeholder of a deferred module.

    Reading an attribute that the placeholder lacks loads the real module, and returns the attribute of that module. If
    the attribute's name begins with two underscores, AttributeError is raised instead.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(_load(self.__name__), name)


class _Deferred:
    """The loader of a deferred module. It creates a placeholder with those attributes that libraries read on import."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = _Placeholder(spec.name)
        if spec.name == "importlib.metadata":
            # urllib3.http2: `from importlib.metadata import version`, called only when HTTP/2 is switched on
            module.version = lambda package: _load(spec.name).version(package)  # type: ignore[attr-defined]
        elif spec.name == "charset_normalizer":
            # requests compares it with the range it was tested with, and warns when it is missing
            module.__version__ = "3.0.0"  # type: ignore[attr-defined]
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


class _Finder:
    def __init__(self) -> None:
        self.deferred = set(DEFERRED)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name in BARE:
            spec = PathFinder.find_spec(name, path)
            if spec is not None:
                spec.loader = _Bare()  # type: ignore[assignment]
            return spec
        if name in self.deferred:
            return ModuleSpec(name, _Deferred(), is_package="." not in name)  # type: ignore[arg-type]
        return None


_finder = _Finder()
_lock = threading.Lock()


def install() -> None:
    """Add the import finder, unless it was added before. Modules that are already loaded stay as they are."""
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def _load(name: str) -> ModuleType:
    """Replace the placeholder of the module `name`, and that of its top-level package, by the real modules.

    Returns the real module `name`.
    """
    for part in (name.partition(".")[0], name):
        with _lock:  # other threads must not import a placeholder again between these two steps
            if part in _finder.deferred:
                _finder.deferred.discard(part)
                sys.modules.pop(part, None)
    return importlib.import_module(name)
