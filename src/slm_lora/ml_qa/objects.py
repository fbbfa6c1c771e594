"""Collect the public objects of scikit-learn, SciPy and NumPy in a fixed order."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from slm_lora.errors import UsageError

if TYPE_CHECKING:
    from numpydoc.docscrape import NumpyDocString

Kind = Literal["class", "function", "method", "distribution"]

LIBRARIES = ("scikit-learn", "scipy", "numpy")
"""Distribution names, in the order in which their objects are collected."""

# An explicit list, because walking packages would depend on other installed packages. An object
# that several modules export belongs to the first of them. Masked variants (numpy.ma,
# scipy.stats.mstats) and four of the six polynomial bases are left out as near-duplicates.
_MODULES = """
sklearn.base sklearn.calibration sklearn.cluster sklearn.compose sklearn.covariance
sklearn.cross_decomposition sklearn.datasets sklearn.decomposition sklearn.discriminant_analysis
sklearn.dummy sklearn.ensemble sklearn.exceptions sklearn.feature_extraction
sklearn.feature_extraction.image sklearn.feature_extraction.text sklearn.feature_selection
sklearn.frozen sklearn.gaussian_process sklearn.gaussian_process.kernels sklearn.impute
sklearn.inspection sklearn.isotonic sklearn.kernel_approximation sklearn.kernel_ridge
sklearn.linear_model sklearn.manifold sklearn.metrics sklearn.metrics.cluster
sklearn.metrics.pairwise sklearn.mixture sklearn.model_selection sklearn.multiclass
sklearn.multioutput sklearn.naive_bayes sklearn.neighbors sklearn.neural_network sklearn.pipeline
sklearn.preprocessing sklearn.random_projection sklearn.semi_supervised sklearn.svm sklearn.tree
sklearn.utils sklearn.utils.class_weight sklearn.utils.extmath sklearn.utils.multiclass
sklearn.utils.sparsefuncs

scipy.stats scipy.stats.qmc scipy.stats.contingency scipy.stats.sampling scipy.optimize
scipy.optimize.elementwise scipy.linalg scipy.linalg.interpolative scipy.sparse
scipy.sparse.linalg scipy.sparse.csgraph scipy.signal scipy.signal.windows scipy.fft
scipy.integrate scipy.interpolate scipy.ndimage scipy.spatial scipy.spatial.distance
scipy.spatial.transform scipy.special scipy.cluster.hierarchy scipy.cluster.vq
scipy.differentiate scipy.io scipy.io.wavfile scipy.odr scipy.constants

numpy numpy.linalg numpy.fft numpy.random numpy.polynomial numpy.polynomial.polynomial
numpy.polynomial.chebyshev numpy.lib.stride_tricks numpy.exceptions
"""

# These exist only after an import of sklearn.experimental: without them the rows do not depend on
# earlier imports of the process.
_EXPERIMENTAL = {"HalvingGridSearchCV", "HalvingRandomSearchCV", "IterativeImputer"}

# The legacy generator duplicates numpy.random.Generator, methods of ndarray duplicate functions,
# and NumPy keeps chararray and matrix for old code only.
_REDUNDANT = {
    "numpy.random.RandomState",
    "numpy.ndarray",
    "numpy.ma.MaskedArray",
    "numpy.matrix",
    "numpy.recarray",
    "numpy.record",
    "numpy.memmap",
    "numpy.chararray",
    "numpy.random.Generator.bytes",
    "scipy.special.sinc",  # that of NumPy, wrapped when SCIPY_ARRAY_API is set
}


class DocumentedObject(NamedTuple):
    """A public object with its parsed docstring.

    Attributes:
        name: qualified name.
        kind: kind of the object.
        owner: the class of a method; otherwise the object itself.
        doc: sections of the docstring.
        signature: call signature; None if unknown.
    """

    name: str
    kind: Kind
    owner: str
    doc: NumpyDocString
    signature: inspect.Signature | None

    @property
    def library(self) -> str:
        """Name of the library in its usual spelling."""
        return {"sklearn": "scikit-learn", "scipy": "SciPy", "numpy": "NumPy"}[
            self.name.split(".", 1)[0]
        ]

    @property
    def short_name(self) -> str:
        """The name without its module; ``Class.method`` for a method."""
        parts = self.name.split(".")
        return ".".join(parts[-2:] if self.kind == "method" else parts[-1:])


def _signature(value: Any) -> inspect.Signature | None:
    try:
        return inspect.signature(value)
    except (TypeError, ValueError):  # compiled functions and ufuncs may have none
        return None


def _parsed(value: Any) -> NumpyDocString | None:
    from numpydoc.docscrape import NumpyDocString

    # Not inspect.getdoc, which would take the docstring of a base class.
    text = value.__doc__
    if not isinstance(text, str):
        return None
    try:
        doc = NumpyDocString(inspect.cleandoc(text))
    except ValueError:  # such as a duplicate section
        return None
    opening = " ".join([*doc["Summary"], *doc["Extended Summary"]])
    if not opening or re.search(r"deprecated|DEPRECATED", opening):
        return None
    return doc


def _kind(value: Any) -> Kind | None:
    if inspect.isclass(value):
        return "class"
    if hasattr(value, "rvs") and callable(value):
        return "distribution"
    return "function" if callable(value) else None


def _is_dtype(value: Any, numpy: ModuleType) -> bool:
    # Scalar types have platform-dependent names and aliases; dtype classes have no prose.
    return inspect.isclass(value) and (
        issubclass(value, (numpy.generic, numpy.dtype)) or isinstance(value, type(numpy.dtype))
    )


def _methods(name: str, value: type, seen: set[int]) -> Iterator[DocumentedObject]:
    for method_name in sorted(dir(value)):
        # set_fit_request and similar methods are generated, with one text for all estimators.
        if method_name.startswith("_") or re.fullmatch(r"set_\w+_request", method_name):
            continue
        definer = next((base for base in value.__mro__ if method_name in vars(base)), None)
        if definer is None or definer.__module__.split(".")[0] not in {"sklearn", "scipy", "numpy"}:
            continue
        raw = vars(definer)[method_name]
        function = raw.__func__ if isinstance(raw, (classmethod, staticmethod)) else raw
        if not callable(function):
            # scikit-learn's available_if keeps the method inside a descriptor.
            function = getattr(raw, "fn", None)
        # An inherited method is used once, for the first class that has it.
        if function is None or inspect.isclass(function):
            continue
        if id(inspect.unwrap(function)) in seen:
            continue
        seen.add(id(inspect.unwrap(function)))
        if doc := _parsed(function):
            full_name = f"{name}.{method_name}"
            if full_name not in _REDUNDANT:
                yield DocumentedObject(full_name, "method", name, doc, _signature(function))


def public_objects() -> list[DocumentedObject]:
    """Return every documented public class, function, distribution and method once.

    Aliases are left out: an object has its first name in the order of modules, then of the
    alphabet.

    Raises:
        UsageError: one of the libraries is missing, or Python runs without docstrings (-OO).
    """
    if sys.flags.optimize >= 2:
        raise UsageError("docstrings are stripped: run Python without -OO to build ml-qa")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            importlib.import_module("numpydoc.docscrape")
            modules = [importlib.import_module(name) for name in _MODULES.split()]
        except ImportError as error:
            raise UsageError(
                f"the ml-qa data set needs {error.name}: pip install numpydoc scipy scikit-learn"
            ) from error
        # Identities of collected objects, so that aliases are left out.
        seen: set[int] = set()
        objects: list[DocumentedObject] = []
        # All functions before any method: enet_path comes before ElasticNet.path.
        for name, kind, value in list(_exported(modules, seen)):
            if doc := _parsed(value):
                signature = None if kind == "distribution" else _signature(value)
                objects.append(DocumentedObject(name, kind, name, doc, signature))
            if inspect.isclass(value):
                objects.extend(_methods(name, value, seen))
    return objects


def _exported(modules: list[ModuleType], seen: set[int]) -> Iterator[tuple[str, Kind, Any]]:
    """Yield name, kind and value of exported objects, sorted within each module."""
    numpy = importlib.import_module("numpy")
    for module in modules:
        for attribute in sorted(set(getattr(module, "__all__", None) or dir(module))):
            name = f"{module.__name__}.{attribute}"
            if attribute.startswith("_") or attribute in _EXPERIMENTAL or name in _REDUNDANT:
                continue
            value: Any = getattr(module, attribute, None)
            kind = _kind(value)
            if kind is None or _is_dtype(value, numpy) or not _is_defined_in_library(value, module):
                continue
            # SciPy wraps its functions when SCIPY_ARRAY_API is set, aliases one by one.
            identity = id(inspect.unwrap(value))
            if identity not in seen:
                seen.add(identity)
                yield name, kind, value


def _is_defined_in_library(value: Any, module: ModuleType) -> bool:
    """Whether a value is defined in the module's library, not imported from another."""
    if module.__name__ == "numpy.random" and inspect.ismethod(value):
        return False  # the module-level legacy generator duplicates numpy.random.Generator
    defined_in = getattr(value, "__module__", None)
    if hasattr(module, "__all__"):
        return str(defined_in or module.__name__).split(".")[0] == module.__name__.split(".")[0]
    # Without __all__ only this distinguishes a module's own names from its imports.
    return f"{defined_in}.".startswith(f"{module.__name__}.")
