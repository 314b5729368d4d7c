"""How much to damp, from the data: generalised cross-validation and the evidence."""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree, Scalar

from curvax._control import map_in_chunks
from curvax._pytree import stop_gradient, tree_dtype
from curvax.linear._jacobi import check_count, check_key
from curvax.linear._quadrature import EXACT, Rule, entries_of, gauss_rule, product_of, radau
from curvax.operators._damped import check_real, signature
from curvax.operators._dense import MAX_DENSE_ELEMENTS, ravel
from curvax.operators._lanczos import lanczos

# Candidates, in the logarithm, and refinements of the best one by the golden section.
_GRID, _GOLDEN_STEPS = 192, 40
_GOLDEN = (5**0.5 - 1) / 2
# Eigenvalues below this many times eps of the largest are taken for zero; λ is not looked for below either.
_ROUNDING = 10
# Probes that are pushed through the operator at once.
_CHUNK = 4


class DampingChoice(eqx.Module):
    """A damping that was chosen by a criterion.

    Attributes:
        damping: λ; NaN where A or the data hold a NaN or A is zero, and by cross-validation where the data are.
        error: The standard error of log λ that comes from probing; 0 where the spectrum was computed.
        at_end: Whether the criterion has no minimum inside of the range that was searched: λ is next to nothing, or so
            large that the data are taken for noise.
        noise_variance: σ², by `damping_by_evidence`; else None.
        prior_variance: τ² = σ²/λ, by `damping_by_evidence`; else None.
        normal: Whether λ is for JᵀJ + λI, and not for A + λI.
    """

    damping: Scalar
    error: Scalar
    at_end: Bool[Array, ""]
    noise_variance: Scalar | None
    prior_variance: Scalar | None
    normal: bool = eqx.field(static=True)


def damping_by_cross_validation(
    operator: lx.AbstractLinearOperator,
    vector: PyTree[Array],
    *,
    key: PRNGKeyArray | None = None,
    num_probes: int = 16,
    num_steps: int = 40,
    dense_size: int = 512,
) -> DampingChoice:
    """λ that minimises the generalised cross-validation score: predict each entry of b from all the others.

    GCV(λ) = m ‖(I − H)b‖² / tr(I − H)², with the influence matrix H = J (JᵀJ + λI)⁻¹ Jᵀ for least squares
    ‖Jx − b‖² + λ‖x‖², and H = A (A + λI)⁻¹ for a positive semidefinite A (kernel ridge regression). It asks
    for noise of one variance, independent from entry to entry, which need not be known; and for more than
    some twenty entries: with few of them it may take the noise for a signal. Correlated noise fools it for certain.

    Args:
        operator: A, tagged `lx.positive_semidefinite_tag`, or any other J, square or not, for which λ is that of
            JᵀJ + λI; real; vectors of any structure.
        vector: b, in the space that the operator maps to.
        key: For random probes, needed above `dense_size`.
        num_probes: Probes for the trace, at least 2.
        num_steps: Lanczos steps for b and for each probe.
        dense_size: Up to this size (the smaller one) the spectrum is computed from the matrix.

    Returns:
        A `DampingChoice`; a constant without derivative. λ lies between 10 eps and 100 times the largest eigenvalue of
        A or JᵀJ. Of a spectrum that is probed, eigenvalues below 20 eps times the largest count as zero, and `error`
        is the spread over the probes and what the last third of the Lanczos steps has changed.

    Raises:
        ValueError: `vector` has another structure than the operator's output, or one is not real; no `key` where it is
            needed; a number of probes or steps out of range.

    Cost: n products and one eigenvalue or singular value decomposition; or (num_probes + 1) · num_steps products with
        A, or with J and Jᵀ, and 4 · num_steps vectors.

    Example:
        ```python
        import jax, jax.numpy as jnp, lineax as lx, curvax as cx

        J = jax.random.normal(jax.random.key(0), (60, 20))
        b = J @ jnp.ones(20) + 2.0 * jax.random.normal(jax.random.key(1), (60,))
        choice = cx.linear.damping_by_cross_validation(lx.MatrixLinearOperator(J), b)
        x = jnp.linalg.solve(J.T @ J + choice.damping * jnp.eye(20), J.T @ b)
        ```

    Source: G. H. Golub, M. Heath, G. Wahba, "Generalized cross-validation as a method for choosing a good ridge
        parameter", 1979; for large matrices G. H. Golub, U. von Matt, "Generalized cross-validation for large-scale
        problems", 1997.
    """
    options = (num_probes, num_steps, dense_size)
    return _choose("damping_by_cross_validation", operator, vector, key, options, _cross_validation, None)


def damping_by_evidence(
    operator: lx.AbstractLinearOperator,
    vector: PyTree[Array],
    *,
    noise_variance: Scalar | float | None = None,
    key: PRNGKeyArray | None = None,
    num_probes: int = 16,
    num_steps: int = 40,
    dense_size: int = 512,
) -> DampingChoice:
    """λ that maximises the marginal likelihood of b: the ratio of the variance of the noise to that of the prior.

    The model is b = J x + noise with x ~ N(0, τ² I) and noise ~ N(0, σ² I), so that b ~ N(0, σ² (I + J Jᵀ/λ)) with
    λ = σ²/τ²; for a positive semidefinite A it is b ~ N(0, σ² (I + A/λ)), a Gaussian process with the kernel τ² A.
    σ² is fitted as well, unless it is given. Where the model is right this is the best choice; where x is no
    draw from the prior, cross-validation is safer.

    Args:
        operator: A, tagged `lx.positive_semidefinite_tag`, or any other J, square or not, for which λ is that of
            JᵀJ + λI; real; vectors of any structure.
        vector: b, in the space that the operator maps to, of mean zero under the model.
        noise_variance: σ² above 0, if it is known.
        key: For random probes, needed above `dense_size`.
        num_probes: Probes for the determinant, at least 2.
        num_steps: Lanczos steps for b and for each probe.
        dense_size: Up to this size (the smaller one) the spectrum is computed from the matrix.

    Returns:
        A `DampingChoice`, with both variances; as for `damping_by_cross_validation`.

    Raises:
        ValueError: As for `damping_by_cross_validation`; a known `noise_variance` is not above 0.

    Cost: as `damping_by_cross_validation`.

    Example:
        ```python
        import jax, jax.numpy as jnp, lineax as lx, curvax as cx

        J = jax.random.normal(jax.random.key(0), (60, 20))
        b = J @ jax.random.normal(jax.random.key(2), (20,)) + 2.0 * jax.random.normal(jax.random.key(1), (60,))
        choice = cx.linear.damping_by_evidence(lx.MatrixLinearOperator(J), b)
        choice.noise_variance, choice.prior_variance  # about 4 and 1
        ```

    Source: D. J. C. MacKay, "Bayesian interpolation", 1992; determinants by quadrature after S. Ubaru, J. Chen,
        Y. Saad, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature", 2017.
    """
    if noise_variance is not None and (
        jnp.shape(noise_variance) != ()
        or (not isinstance(noise_variance, jax.core.Tracer) and not float(noise_variance) > 0)
    ):
        raise ValueError(
            f"`noise_variance` of `damping_by_evidence` must be a number above 0, found {noise_variance}. None fits it."
        )
    options = (num_probes, num_steps, dense_size)
    return _choose("damping_by_evidence", operator, vector, key, options, _evidence, noise_variance)


class _Spectrum(NamedTuple):
    """bᵀ f(K) b = Σ vector_weights · f(vector_nodes), and tr f(K) likewise, for K = A or J Jᵀ."""

    vector_nodes: Float[Array, " k"]
    vector_weights: Float[Array, " k"]
    nodes: Float[Array, "probes k"]
    weights: Float[Array, "probes k"]


_Score = Callable[[_Spectrum, int, Scalar | None, Scalar], Scalar]


def _cross_validation(spectrum: _Spectrum, size: int, noise: Scalar | None, damping: Scalar) -> Scalar:
    """log GCV. λ² cancels, so that nothing vanishes for small λ."""
    del noise
    misfit = jnp.sum(spectrum.vector_weights / (spectrum.vector_nodes + damping) ** 2)
    trace = jnp.sum(spectrum.weights / (spectrum.nodes + damping))
    return jnp.log(size * misfit) - 2 * jnp.log(trace)


def _evidence(spectrum: _Spectrum, size: int, noise: Scalar | None, damping: Scalar) -> Scalar:
    """−2/m log p(b), up to a constant."""
    determinant = jnp.sum(spectrum.weights * jnp.log1p(spectrum.nodes / damping)) / size
    fitted = _noise_variance(spectrum, size, damping)
    return determinant + (jnp.log(fitted) if noise is None else fitted / noise)


def _noise_variance(spectrum: _Spectrum, size: int, damping: Scalar) -> Scalar:
    """bᵀ (I + K/λ)⁻¹ b / m."""
    return jnp.sum(spectrum.vector_weights * (damping / (spectrum.vector_nodes + damping))) / size


def _choose(
    name: str,
    operator: lx.AbstractLinearOperator,
    vector: PyTree[Array],
    key: PRNGKeyArray | None,
    options: tuple[int, int, int],
    score: _Score,
    noise: Scalar | float | None,
) -> DampingChoice:
    num_probes, num_steps, dense_size = options
    check_real(operator, f"`operator` of `{name}`")
    if signature(vector) != signature(operator.out_structure()):
        raise ValueError(
            f"`vector` of `{name}` must be in the space that `operator` maps to, {operator.out_structure()}; found "
            f"{jax.eval_shape(lambda: vector)}."
        )
    normal = not lx.is_positive_semidefinite(operator)
    if normal and lx.is_negative_semidefinite(operator):
        raise ValueError(
            f"`operator` of `{name}` is tagged negative semidefinite; pass `-operator`, and `-vector`."
        )
    dtype = tree_dtype(operator.out_structure())
    rows, columns = operator.out_size(), operator.in_size()
    if min(rows, columns) == 0:
        raise ValueError(f"`operator` of `{name}` has no elements.")
    if min(rows, columns) <= dense_size and rows * columns <= MAX_DENSE_ELEMENTS:
        counts, key = None, None
    else:
        counts = check_count("num_probes", name, num_probes), check_count("num_steps", name, num_steps)
        if counts[0] < 2:
            raise ValueError(
                f"`num_probes` of `{name}` must be at least 2, to tell its error; found {num_probes}."
            )
        key = check_key(name, key)
    fixed = None if noise is None else jnp.asarray(noise, dtype)
    return _best(operator, ravel(vector, dtype), fixed, key, counts, score)


@eqx.filter_jit
def _best(
    operator: lx.AbstractLinearOperator,
    b: Float[Array, " m"],
    fixed: Scalar | None,
    key: PRNGKeyArray | None,
    counts: tuple[int, int] | None,
    score: _Score,
) -> DampingChoice:
    """One program, also where it is called outside of `jit`."""
    operator, b, fixed = stop_gradient((operator, b, fixed))
    dtype, rows, normal = b.dtype, b.size, not lx.is_positive_semidefinite(operator)
    if counts is None:
        spectrum = _exact(*entries_of(operator, dtype), b, normal)
        damping, at_end = _minimised(spectrum, rows, fixed, score)
        error = jnp.zeros((), dtype)
    else:
        assert key is not None
        num_probes, num_steps = counts[0], min(counts[1], rows)
        signs = jax.random.bernoulli(key, shape=(num_probes, rows))
        starts = jnp.concatenate([b[None], jnp.where(signs, 1, -1).astype(dtype)])
        product = product_of(operator, dtype, normal)
        fewer = max(1, 2 * num_steps // 3)

        def rules(start: Float[Array, " m"]) -> tuple[Rule, Rule]:
            krylov = lanczos(product, start, num_steps)
            return gauss_rule(krylov), gauss_rule(krylov, fewer)

        spectrum, earlier = (_probed(rule, b) for rule in map_in_chunks(rules, starts, _CHUNK))
        doubts = _doubts(spectrum, earlier)
        found, ends = jax.lax.map(lambda s: _minimised(s, rows, fixed, score), doubts)
        damping, at_end, logs = found[0], ends[0], jnp.log(found)
        spread = (num_probes - 1) * jnp.var(logs[2:])
        error = jnp.sqrt(spread + (logs[0] - logs[1]) ** 2)
    variance = None
    if score is _evidence:
        variance = _noise_variance(spectrum, rows, damping) if fixed is None else fixed
    prior = None if variance is None else variance / damping
    return DampingChoice(damping, error, at_end, variance, prior, normal)


def _exact(matrix: Float[Array, "m n"], sound: Scalar, b: Float[Array, " m"], normal: bool) -> _Spectrum:
    """From the eigenvalues of A, or the singular values of J."""
    rows, columns = matrix.shape
    if normal:
        left, sizes, _ = jnp.linalg.svd(matrix, full_matrices=False)
        values = sizes**2
    else:
        values, left = jnp.linalg.eigh(matrix)
        values = jnp.maximum(values, 0)
    inside = jnp.matmul(left.T, b, precision=EXACT)
    # What no column of J reaches: zeros of J Jᵀ.
    outside = b - jnp.matmul(left, inside, precision=EXACT)
    rest = jnp.sum(outside**2) if rows > columns else jnp.zeros((), b.dtype)
    nodes = jnp.append(sound * values, jnp.zeros((), values.dtype))
    weights = jnp.append(jnp.ones_like(values), jnp.asarray(rows - len(values), values.dtype))
    return _Spectrum(nodes, jnp.append(inside**2, rest), nodes[None], weights[None])


def _probed(rules: Rule, b: Float[Array, " m"]) -> _Spectrum:
    """From the rules for b, which is first, and for each probe.

    They are chosen so that both criteria are bounded from above, but for the luck of the probes: where the steps
    do not resolve the small eigenvalues, a bound from below would have its minimum at λ = 0.
    """
    # What rounding made of zero is zero: next to the least λ it would count, where K is of low rank.
    least = _ROUNDING * jnp.finfo(b.dtype).eps * jnp.max(jnp.abs(rules.nodes), axis=1, keepdims=True)
    own = jax.tree.map(lambda a: a[0], rules._replace(nodes=jnp.maximum(rules.nodes, least)))
    nodes, weights, _ = radau(own, jnp.zeros((), b.dtype))
    others = rules.first[1:] ** 2 * (b.size / (len(rules.first) - 1))
    positive = lambda nodes, least: jnp.where(nodes <= 2 * least, 0, nodes)
    return _Spectrum(
        positive(nodes, least[0]), weights * jnp.sum(b**2), positive(rules.nodes[1:], least[1:]), others
    )


def _doubts(spectrum: _Spectrum, earlier: _Spectrum) -> _Spectrum:
    """The spectrum, that of fewer steps, and those without one of the probes (the jackknife), stacked."""
    num_probes, length = spectrum.nodes.shape

    def without(probe: Array) -> _Spectrum:
        kept = jnp.where(jnp.arange(num_probes) == probe, 0, num_probes / (num_probes - 1))
        return spectrum._replace(weights=spectrum.weights * kept.astype(spectrum.weights.dtype)[:, None])

    missing = length - earlier.nodes.shape[1]
    padded = jax.tree.map(lambda a: jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, missing)]), earlier)
    both = jax.tree.map(lambda *a: jnp.stack(a), spectrum, padded)
    left = jax.vmap(without)(jnp.arange(num_probes))
    return jax.tree.map(lambda *a: jnp.concatenate(a), both, left)


def _minimised(
    spectrum: _Spectrum, size: int, noise: Scalar | None, score: _Score
) -> tuple[Scalar, Bool[Array, ""]]:
    """The best λ of a grid, refined by the golden section; whether it is at an end of it."""
    dtype = spectrum.nodes.dtype
    largest = jnp.maximum(jnp.max(spectrum.nodes), jnp.max(spectrum.vector_nodes))
    low, high = jnp.log(_ROUNDING * jnp.finfo(dtype).eps * largest), jnp.log(100 * largest)
    at = lambda log: score(spectrum, size, noise, jnp.exp(log))  # noqa: E731
    grid = jnp.linspace(0, 1, _GRID, dtype=dtype) * (high - low) + low
    scores = jax.lax.map(at, grid)
    best = jnp.argmin(scores)
    left, right = grid[jnp.maximum(best - 1, 0)], grid[jnp.minimum(best + 1, _GRID - 1)]

    def narrower(_: Array, ends: tuple[Scalar, Scalar]) -> tuple[Scalar, Scalar]:
        left, right = ends
        width = jnp.asarray(_GOLDEN, dtype) * (right - left)
        inner, outer = right - width, left + width
        lower = at(inner) < at(outer)
        return jnp.where(lower, left, inner), jnp.where(lower, outer, right)

    left, right = jax.lax.fori_loop(0, _GOLDEN_STEPS, narrower, (left, right))
    found = jnp.exp(0.5 * (left + right))
    known = jnp.all(jnp.isfinite(scores))
    return jnp.where(known, found, jnp.nan), (best == 0) | (best == _GRID - 1) | ~known
