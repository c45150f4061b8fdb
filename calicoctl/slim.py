"""Loads libraries without the parts this program never uses.

A cold command spends most of its time on imports. Some libraries import much more than this program uses:
`pyroute2`, `netaddr` and `docker` import their whole tree in their `__init__`; `etcd` imports a DNS resolver for SRV
discovery, which is not used here; `urllib3` imports the package metadata reader for an HTTP/2 mode that is off;
`requests` imports a character set detector for bodies of unknown encoding. `install()` adds an
import finder that leaves those parts out:

* a *bare* package keeps its path but does not run its `__init__`, so that `import pyroute2.iproute` loads just that;
* a *deferred* module is a placeholder that loads the real module when one of its attributes is used.

No library guarantees that this works. Tests check each library in the version installed. Without `install()`,
everything works, too, only slower.
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

BARE = frozenset({"pyroute2", "netaddr", "docker"})

DEFERRED = frozenset({"dns", "dns.resolver", "importlib.metadata", "charset_normalizer"})


class _Bare:
    """Loader of a bare package: leaves the module empty instead of executing `__init__`."""

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        pass


class _Placeholder(ModuleType):
    """A module that is replaced by the real one when one of its attributes is used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(_load(self.__name__), name)


class _Deferred:
    """Loader of a deferred module: creates a placeholder, with the attributes that libraries use on importing it."""

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
    """Finds bare and deferred modules; leaves all others to the next finders."""

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


def install() -> None:
    """Add the finder before Python's own. Modules that are loaded already stay as they are."""
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def _load(name: str) -> ModuleType:
    """Replace the placeholders of the module `name` and of its package by the real modules; return the real `name`."""
    for part in (name.partition(".")[0], name):
        if part in _finder.deferred:
            _finder.deferred.discard(part)
            sys.modules.pop(part, None)
    return importlib.import_module(name)
