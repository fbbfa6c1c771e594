"""The public objects of scikit-learn, SciPy and NumPy, walked in a fixed order."""

from __future__ import annotations

import importlib
import inspect
import re
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from slm_lora.errors import UsageError

if TYPE_CHECKING:
    from numpydoc.docscrape import NumpyDocString

Kind = Literal["class", "function", "method", "distribution"]

LIBRARIES = ("scikit-learn", "scipy", "numpy")
"""Distribution names, in the order in which their objects are walked."""

# Written out, because walking packages would follow whatever is installed beside them. An object
# that several modules export belongs to the first of them. Masked variants (numpy.ma,
# scipy.stats.mstats) and four of the six polynomial bases say the same in almost the same words.
_MODULES = (
    *(
        f"sklearn.{name}"
        for name in (
            "base calibration cluster compose covariance cross_decomposition datasets "
            "decomposition discriminant_analysis dummy ensemble exceptions feature_extraction "
            "feature_extraction.image feature_extraction.text feature_selection frozen "
            "gaussian_process gaussian_process.kernels impute inspection isotonic "
            "kernel_approximation kernel_ridge linear_model manifold metrics metrics.cluster "
            "metrics.pairwise mixture model_selection multiclass multioutput naive_bayes neighbors "
            "neural_network pipeline preprocessing random_projection semi_supervised svm tree "
            "utils utils.class_weight utils.extmath utils.multiclass utils.sparsefuncs"
        ).split()
    ),
    *(
        f"scipy.{name}"
        for name in (
            "stats stats.qmc stats.contingency stats.sampling optimize "
            "optimize.elementwise linalg linalg.interpolative sparse sparse.linalg sparse.csgraph "
            "signal signal.windows fft integrate interpolate ndimage spatial spatial.distance "
            "spatial.transform special cluster.hierarchy cluster.vq differentiate io io.wavfile "
            "odr constants"
        ).split()
    ),
    *(
        f"numpy{name}"
        for name in (
            " .linalg .fft .random .polynomial .polynomial.polynomial .polynomial.chebyshev "
            ".lib.stride_tricks .exceptions"
        ).split(" ")
    ),
)

# They exist only after a module of sklearn.experimental was imported by someone: leaving them out
# keeps the rows independent of what the process did before.
_EXPERIMENTAL = {"HalvingGridSearchCV", "HalvingRandomSearchCV", "IterativeImputer"}

# The legacy generator repeats numpy.random.Generator; an ndarray's methods repeat the functions;
# chararray and matrix are kept by NumPy for old code only.
_REPEATING = {
    "numpy.random.RandomState",
    "numpy.ndarray",
    "numpy.ma.MaskedArray",
    "numpy.matrix",
    "numpy.recarray",
    "numpy.record",
    "numpy.memmap",
    "numpy.chararray",
    "numpy.random.Generator.bytes",
}


class Documented(NamedTuple):
    """A public object with its parsed docstring.

    ``owner`` is the class of a method, and the object itself otherwise.
    """

    name: str
    kind: Kind
    owner: str
    doc: NumpyDocString
    signature: inspect.Signature | None

    @property
    def library(self) -> str:
        """Name of the library, as its users write it."""
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

    text = inspect.getdoc(value)
    if not text:
        return None
    try:
        doc = NumpyDocString(text)
    except ValueError:  # a section that stands twice, say
        return None
    opening = " ".join([*doc["Summary"], *doc["Extended Summary"]])
    if not opening or re.search(r"deprecated|DEPRECATED", opening):
        return None
    return doc


def _kind(value: Any) -> Kind | None:
    if inspect.isclass(value):
        return "class"
    if hasattr(value, "rvs") and hasattr(value, "__call__"):
        return "distribution"
    return "function" if callable(value) else None


def _is_dtype(value: Any, numpy: ModuleType) -> bool:
    # Scalar types have platform-dependent names and aliases, and dtype classes no prose.
    return inspect.isclass(value) and (
        issubclass(value, (numpy.generic, numpy.dtype)) or isinstance(value, type(numpy.dtype))
    )


def _methods(name: str, value: type, seen: set[int]) -> Iterator[Documented]:
    for method_name in sorted(dir(value)):
        # set_fit_request and its like are generated, one text for all estimators.
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
        # An inherited method is asked about once, under the first class that shows it.
        if function is None or inspect.isclass(function) or id(function) in seen:
            continue
        seen.add(id(function))
        if doc := _parsed(function):
            full_name = f"{name}.{method_name}"
            if full_name not in _REPEATING:
                yield Documented(full_name, "method", name, doc, _signature(function))


def public_objects() -> list[Documented]:
    """Every documented public class, function, distribution and method, each under one name.

    Aliases are left out: the first name in the order of the modules, then of the alphabet, is
    the object's name.

    Raises:
        UsageError: one of the libraries is missing, or Python runs without docstrings (-OO).
    """
    found: list[Documented] = []
    # Identities of what was walked; `kept_alive` keeps them from being given to another object.
    seen: set[int] = set()
    kept_alive: list[Any] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import numpydoc.docscrape  # noqa: F401

            modules = [importlib.import_module(name) for name in _MODULES]
        except ImportError as error:
            raise UsageError(
                f"the ml-qa data set needs {error.name}: pip install numpydoc scipy scikit-learn"
            ) from error
        numpy = importlib.import_module("numpy")
        for module in modules:
            names = getattr(module, "__all__", None) or dir(module)
            for attribute in sorted(set(names)):
                if attribute.startswith("_") or attribute in _EXPERIMENTAL:
                    continue
                name = f"{module.__name__}.{attribute}"
                value = getattr(module, attribute, None)
                kind = _kind(value)
                if (
                    kind is None
                    or id(value) in seen
                    or inspect.ismodule(value)
                    or _is_dtype(value, numpy)
                    or not _is_at_home(value, module)
                    or name in _REPEATING
                ):
                    continue
                seen.add(id(value))
                kept_alive.append(value)
                doc = _parsed(value)
                if doc is None:
                    continue
                signature = None if kind == "distribution" else _signature(value)
                found.append(Documented(name, kind, name, doc, signature))
                if kind == "class":
                    found.extend(_methods(name, value, seen))
    if not found:
        raise UsageError("docstrings are stripped: run Python without -OO to build ml-qa")
    return found


def _is_at_home(value: Any, module: ModuleType) -> bool:
    """Whether a value belongs to the module's library, not to something that it imports."""
    if module.__name__ == "numpy.random" and inspect.ismethod(value):
        return False  # the module-level legacy generator repeats numpy.random.Generator
    defined_in = getattr(value, "__module__", None)
    if hasattr(module, "__all__"):
        return str(defined_in or module.__name__).split(".")[0] == module.__name__.split(".")[0]
    # Without __all__ a module's imports cannot be told from its own names otherwise.
    return f"{defined_in}.".startswith(f"{module.__name__}.")
