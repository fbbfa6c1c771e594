"""English grammar by word lists, to complete fragments of docstrings to sentences.

There is no parser: docstrings use few verbs, and fragments with unknown words are refused.
"""

from __future__ import annotations

import re


def word_set(text: str) -> frozenset[str]:
    """Return the words of a text as a set."""
    return frozenset(text.split())


# Verbs for functions: the first words of summaries.
FUNCTION_VERBS = word_set(
    """
    add adjust analyze append apply approximate assemble assign augment binarize bracket
    broadcast build calculate center check classify clip cluster combine compare compute
    concatenate construct convert convolve copy count create cross-correlate decompose
    deconvolve delete design detect determine differentiate discretize divide downsample draw
    dump encode enforce ensure estimate evaluate expand export extract fetch fill find fit
    flatten force form format generate get give impute implement indicate initialize insert
    integrate interchange interpolate interpret invert iterate join learn load make map mask
    maximize merge minimize modify move multiply normalize pack pad parse partition perform
    permute plot predict print produce project put query ravel read reconstruct reduce register
    remove repeat replace represent resample reset reshape restrict retrieve return reverse roll
    rotate round run save scale select set shift show shuffle simulate solve sort split stack
    standardize subtract suppress swap take test transform transpose trim truncate turn undo
    unpack unwrap update upsample use validate write yield zoom
    """
)
# Verbs for parameters.
PARAMETER_VERBS = word_set(
    """
    adjust affect allow change choose contain control correspond decide define denote describe
    determine disable enable enforce ensure force give govern hold impose indicate influence
    override provide regulate represent restrict select specify store tell toggle turn
    """
)
AUXILIARIES = word_set(
    """
    is are was were will must should can may might has have does do cannot would could need
    needs isn't aren't don't doesn't won't can't
    """
)
FINITE_VERBS = word_set(
    """
    specifies determines controls defines indicates contains returns gives uses represents
    corresponds takes sets allows makes requires depends applies affects becomes holds accepts
    leads produces results refers describes consists computes behaves exists occurs yields means
    performs supports provides prevents disables enables ignores tends increases decreases
    """
)
SUBORDINATORS = word_set(
    """
    before after that which who whose whom where when if whether while as how because since
    until unless whenever whatever what than though although so whereas why
    """
)
# Words after the head of a noun phrase.
_COMPLEMENTS = word_set(
    """
    of in for to with that which from on at by used where when if along over between as such
    whose containing giving defining describing representing against after before during under
    per within without about into through returned passed applied associated corresponding
    computed needed required using whether how defined given obtained estimated found seen
    fitted specifying determining controlling indicating suitable available known present
    necessary
    """
)
# Heads that take "a" if they have no article; all others take "the".
_KINDS = word_set(
    """
    array matrix function callable list tuple sequence string dictionary dict flag instance
    object vector scalar integer float boolean iterable iterator generator namedtuple dataframe
    bunch mapping collection mixin class wrapper callback
    """
)
_SINGULAR_IN_S = word_set(
    """
    axis basis bias class loss mass radius status analysis process access address gas lens atlas
    canvas kwargs args chaos series compass bus focus synthesis thesis hypothesis previous
    various
    """
)
_PLURAL_WITHOUT_S = frozenset({"coefs", "criteria", "people"})
_DETERMINERS = word_set(
    """
    the a an any each one two three some all both either no another every this these
    """
)
_ARTICLES = frozenset({"A", "An", "The"})
_PLURAL_DETERMINERS = frozenset({"two", "three", "some", "all", "both", "these"})
# Names that keep their capital inside a sentence.
_PROPER = word_set(
    """
    Adams Airy Akaike Akima Anderson Bartlett Bayes Bayesian Bernoulli Bessel Birch Boltzmann
    Bonferroni Boolean Bray Brent Brier Broyden Butterworth California Calinski Canberra
    Cartesian Cauchy Chebyshev Chi Cholesky Cohen Cython Davies Delaunay Dijkstra Dirichlet
    Elastic Epanechnikov Euclidean Euler Fisher Floater Floyd Fortran Fourier Fowlkes Friedman
    Frobenius Gamma Gauss Gaussian Gegenbauer Gini Givens Gower Gram Hamming Hankel Hausdorff
    Haversine Hermite Hermitian Hessenberg Hessian Hilbert Householder Huber I Jaccard Jacobi
    Jacobian Jensen Johnson Kaiser Kelvin Kendall Kolmogorov Kronecker Krylov Kullback Labeled
    Lagrange Laguerre Lambert Laplace Laplacian Lasso Leave Lebedev Ledoit Legendre Levenberg
    Levene Lipschitz Lomb Lorentz Mahalanobis Mann Markov Matern Mathieu Matplotlib Matthews
    Minkowski Monte Moore Nelder Newton Nyquist Nystroem Nystrom Olivetti Owen Parzen Pearson
    Penrose Poisson Python Rand Rayleigh Riccati Ridge Riemann Romberg Runge Savitzky Schur
    Shannon Simpson Sobol Spearman Struve Student Swiss Sylvester Taylor Theil Tikhonov Toeplitz
    Tukey Vandermonde Voigt Voronoi Ward Wasserstein Weibull Welch Wiener Wilcoxon Wishart Wolfe
    Wright Yates Yeo Yule
    """
)


def tokenize_words(text: str) -> list[str]:
    """Split into lower-case words and separators; code is one word, parentheses are dropped."""
    text = re.sub(r"\([^()]*\)", " ", re.sub(r"`[^`]*`|\"[^\"]*\"|'[^' ]*'", "code", text))
    return re.findall(r"[a-z0-9_'\-/]+|[,;:]", text.casefold())


def split_first_word(text: str) -> tuple[str, str]:
    """Return the first word in lower case without punctuation, and the text after it."""
    first, _, rest = text.partition(" ")
    return first.rstrip(",.:;").casefold(), rest


def has_main_verb(text: str) -> bool:
    """Whether a finite verb comes before any subordinate clause, comma or colon."""
    for word in tokenize_words(text):
        if word in SUBORDINATORS or word in ",;:":
            return False
        if word in AUXILIARIES or word in FINITE_VERBS:
            return True
    return False


def third_person(verb: str) -> str:
    """Return the third person singular: "computes", "applies", "stretches"."""
    if re.search(r"(?:s|x|z|ch|sh|o)$", verb):
        return verb + "es"
    if re.search(r"[^aeiou]y$", verb):
        return verb[:-1] + "ies"
    return verb + "s"


FUNCTION_FORMS = {third_person(verb): verb for verb in FUNCTION_VERBS}
PARAMETER_FORMS = {third_person(verb): verb for verb in PARAMETER_VERBS}


def is_clause(text: str) -> bool:
    """Whether a text has a main verb: a finite one, or an imperative at the beginning."""
    opening = tokenize_words(text)[:1]
    return has_main_verb(text) or bool(opening and opening[0] in FUNCTION_VERBS | PARAMETER_VERBS)


def starts_with_verb(text: str) -> bool:
    """Whether a clause begins with a verb, so that its subject is missing."""
    verbs = FUNCTION_VERBS | PARAMETER_VERBS | FUNCTION_FORMS.keys() | PARAMETER_FORMS.keys()
    return split_first_word(text)[0] in verbs | AUXILIARIES | FINITE_VERBS


def lower_first(text: str) -> str:
    """Lower the first letter, for use inside a sentence; names, acronyms and code are kept."""
    match = re.match(r"(A|[A-Z][a-z]+)(?:[-'][\w'\-]*)?(?!\w)(?: ([A-Z][a-z]+)\b)?", text)
    if match is None or match.group(1) in _PROPER:
        return text
    if match.group(2) and match.group(2) not in _PROPER and match.group(1) not in _ARTICLES:
        return text  # "Partial Least Squares": a capitalised name
    return text[0].lower() + text[1:]


def with_indefinite(text: str) -> str:
    """Prepend "a" or "an", by the sound of the first word."""
    match = re.match(r"`?([\w\-]*)", text)
    first = match.group(1) if match else ""
    if re.match(r"[A-Z](?:[A-Z0-9]|-|$)", first):  # spelled out: an SVM, a CSR matrix
        vowel = first[0] in "AEFHILMNORSX"
    else:
        vowel = bool(re.match(r"(?:[aeiou]|8|11\b|18\b|hour|ndarray|n-)", first, re.IGNORECASE))
        vowel = vowel and not re.match(r"(?:uni(?!n|m)|use|one\b|eu|ufunc|ubiq)", first, re.I)
    return f"{'an' if vowel else 'a'} {text}"


def head_words(text: str) -> list[str]:
    """Return the words of a noun phrase up to its head, before the first complement."""
    head: list[str] = []
    for word in tokenize_words(text):
        if word in _COMPLEMENTS or word in ",;:":
            break
        # "components observed in", but "weighted mean": a participle after a noun starts a clause.
        if word.endswith("ed") and len(head) > (1 if head[:1] in (["the"], ["a"]) else 0):
            break
        # "function evaluating residuals", but "training data".
        if word.endswith("ing") and head and head[-1] in _KINDS:
            break
        head.append(word)
    return head


def is_plural(noun: str) -> bool:
    """Whether a noun is plural, judged by its ending."""
    if noun in _PLURAL_WITHOUT_S:
        return True
    return (
        noun.endswith("s") and not noun.endswith(("ss", "us", "is")) and noun not in _SINGULAR_IN_S
    )


def noun_phrase(text: str) -> tuple[str, bool]:
    """Return a fragment with an article, for use inside a sentence, and whether it is plural."""
    first = split_first_word(text)[0]
    words = head_words(text)
    # "Axis or axes" is singular, "labels or label matrix" plural: the first noun decides.
    if "or" in words:
        words = words[: words.index("or")]
    head = words[-1] if words else ""
    plural = is_plural(head)
    if first in _DETERMINERS:
        return text[0].lower() + text[1:], plural or first in _PLURAL_DETERMINERS
    lowered = lower_first(text)
    if plural:
        indefinite = first in {"additional", "extra", "optional", "other", "further", "various"}
        return (lowered if indefinite else f"the {lowered}"), True
    of_kind = head in _KINDS and first not in {"input", "output"} and f"{head} to " not in lowered
    if of_kind or re.match(r"(?:\d+|n)-?d\b|optional\b", text, re.IGNORECASE):
        return with_indefinite(lowered), False
    return f"the {lowered}", False
