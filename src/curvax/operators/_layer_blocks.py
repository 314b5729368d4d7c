"""The blocks of a curvature matrix that belong to the layers of a model, written out."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar

from curvax.capture import Group, Layers, PerExampleGradients, statistics
from curvax.operators._cotangents import Kind, Loss
from curvax.operators._dense import MAX_DENSE_ELEMENTS
from curvax.operators._dispatch import register
from curvax.operators._gauss_newton import num_examples
from curvax.operators._kfac import _checked, _layers
from curvax.operators._kfac_statistics import EXACT, Pass, passes
from curvax.operators._kronecker_sum import nearest_kronecker
from curvax.operators._layerwise import Layerwise
from curvax.operators._parts import eigen_of, inverse_of, logdet_of, power_of
from curvax.operators._stacked import Stacked
from curvax.operators._structured import AbstractStructuredOperator


class DenseBlock(AbstractStructuredOperator):
    """A symmetric matrix over the raveled entries of matrices: one block of `layer_blocks`."""

    matrix: lx.AbstractLinearOperator
    shape: tuple[int, int] = eqx.field(static=True)
    tags: frozenset[object] = eqx.field(static=True)

    def __init__(self, matrix: Array | lx.AbstractLinearOperator, shape: tuple[int, int]) -> None:
        self.tags = frozenset([lx.symmetric_tag, lx.positive_semidefinite_tag])
        plain = not isinstance(matrix, lx.AbstractLinearOperator)
        self.matrix = lx.MatrixLinearOperator(matrix, lx.positive_semidefinite_tag) if plain else matrix
        self.shape = shape

    def mv(self, vector: Float[Array, "m n"]) -> Float[Array, "m n"]:
        """Times the raveled vector."""
        return self.matrix.mv(vector.reshape(-1)).reshape(self.shape)

    def transpose(self) -> "DenseBlock":
        """Itself."""
        return self

    def in_structure(self) -> jax.ShapeDtypeStruct:
        """A matrix of shape (m, n)."""
        return jax.ShapeDtypeStruct(self.shape, self.matrix.in_structure().dtype)

    def out_structure(self) -> jax.ShapeDtypeStruct:
        """A matrix of shape (m, n)."""
        return self.in_structure()

    def inverse(self) -> "DenseBlock":
        """By one Cholesky factorisation."""
        return DenseBlock(inverse_of(self.matrix), self.shape)

    def power(self, exponent: float) -> "DenseBlock":
        """By one eigendecomposition."""
        return DenseBlock(power_of(self.matrix, exponent), self.shape)

    def damped(self, damping: Scalar | float) -> "DenseBlock":
        """With damping on the diagonal."""
        entries = self.matrix.as_matrix()
        return DenseBlock(
            entries + jnp.asarray(damping, entries.dtype) * jnp.eye(len(entries), dtype=entries.dtype),
            self.shape,
        )

    def trace(self) -> Scalar:
        """The sum of the diagonal."""
        return jnp.trace(self.matrix.as_matrix())

    def logdet(self) -> Scalar:
        """By one factorisation."""
        return logdet_of(self.matrix)

    def diagonal(self) -> Float[Array, " mn"]:
        """Of the matrix."""
        return jnp.diagonal(self.matrix.as_matrix())

    def eigenvalues(self) -> Float[Array, " mn"]:
        """From the smallest to the largest."""
        return eigen_of(self.matrix)[1]


register(DenseBlock)


def layer_blocks(
    model_fn: Callable[[PyTree, PyTree], PyTree],
    loss: Loss,
    params: PyTree,
    inputs: PyTree[Array],
    targets: PyTree[Array],
    *,
    kind: Kind = "exact",
    key: PRNGKeyArray | None = None,
) -> Layerwise:
    """The block of every layer in the Gauss–Newton or Fisher matrix, dense and EXACT; the MEAN over the N examples.

    What `kfac` approximates by G ⊗ A: (1/N) Σᵢ Σ_k vec(Jᵢᵀc_ik) vec(Jᵢᵀc_ik)ᵀ over the entries of one layer, with its
    bias folded in. Tied weights, tokens and steps of a `scan` are added up before the product is taken: no assumption
    about them is made. For layers of up to a thousand or so entries: as truth for an approximation, for Laplace
    approximations, or as a preconditioner.

    Args:
        model_fn: `model_fn(params, x)` → outputs, for ONE example; any pytrees.
        loss: `loss(output, target)` → scalar, for one example, as for `kfac`.
        params: Any pytree; only its floating-point arrays vary.
        inputs: Examples, stacked along the leading axis of every leaf.
        targets: Likewise.
        kind: `"exact"` (Gauss–Newton), `"monte_carlo"` (one draw for each example) or `"empirical"`, as for `kfac`.
        key: For `"monte_carlo"`.

    Returns:
        A symmetric positive semidefinite operator over the floating-point parameters, block diagonal, with
            `inverse()`, `damped(λ)`, `power(p)`, `trace()`, `logdet()`. Parameters without a reverse derivative have
            zeros.

    Raises:
        ValueError: As `kfac`; a layer of more than 4096 entries.
        RuntimeError: The Hessian of a loss that is any function has a negative eigenvalue.

    Cost: for every output (once, if sampled or empirical) a forward and a backward pass, the gradients of the N
    examples in memory, and N · n² multiplications for a layer of n entries; memory n² for each layer.

    Source: F. Dangel et al., "BackPACK: Packing more into backprop", 2020, arXiv 1912.10985, for blocks of layers.

    Example:
        ```python
        import jax, jax.numpy as jnp, curvax as cx

        x, y = jax.random.normal(jax.random.key(0), (8, 2)), jnp.ones((8, 3))
        model_fn = lambda w, x: jnp.tanh(w @ x)
        blocks = cx.operators.layer_blocks(model_fn, cx.operators.SquaredError(), jnp.ones((3, 2)), x, y)
        blocks.damped(1e-2).inverse().mv(jnp.ones((3, 2)))
        ```
    """
    arrays = _checked(params, inputs, targets, kind, "expand", key)
    return _blocks(model_fn, loss, *arrays, kind, key)


@eqx.filter_jit
def _blocks(
    model_fn: Callable[[PyTree, PyTree], PyTree],
    loss: Loss,
    params: PyTree,
    inputs: PyTree,
    targets: PyTree,
    kind: Kind,
    key: PRNGKeyArray | None,
) -> Layerwise:
    layers = _layers(model_fn, params, inputs)
    for group in layers.groups:
        _, rows, columns = group.block.shape
        if (rows * columns) ** 2 > MAX_DENSE_ELEMENTS:
            raise ValueError(
                f"The block of {group.name!r} has {rows * columns} entries, too many for `layer_blocks` (at most "
                f"{int(MAX_DENSE_ELEMENTS**0.5)}): take `kfac` or `ekfac`, or products with `gauss_newton`."
            )
    taken = passes(layers, loss, kind, inputs, targets, key)
    examples = num_examples(inputs)

    def add(total: dict[str, Array], number: Array) -> tuple[dict[str, Array], None]:
        found = example_gradients(layers, taken, params, inputs, number)
        for name, g in found.items():
            flat = g.reshape(*g.shape[:2], -1)
            total = total | {
                name: total[name] + jnp.einsum("sbi,sbj->sij", flat, flat, precision=EXACT) / examples
            }
        return total, None

    zeros = {
        group.name: jnp.zeros(
            (group.block.shape[0], *(group.block.shape[1] * group.block.shape[2],) * 2), dtype_of(group)
        )
        for group in layers.groups
    }
    total, _ = jax.lax.scan(add, zeros, jnp.arange(taken.number))
    blocks = {}
    for group in layers.groups:
        shape = group.block.shape[1:]
        blocks[group.name] = Stacked(
            eqx.filter_vmap(lambda m, shape=shape: DenseBlock(m, shape))(total[group.name])
        )
    return Layerwise.of(layers, blocks)


def dtype_of(group: Group) -> jnp.dtype:
    """Of what is summed over examples for a group: at least float32."""
    dtype = group.block.structures[0].dtype
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else dtype


def example_gradients(
    layers: Layers, taken: Pass, params: PyTree, inputs: PyTree, number: Array
) -> dict[str, Float[Array, "stack B rows columns"]]:
    """Jᵀc of one direction for each example, in the coordinates of the blocks; uses of a weight added up.

    Args:
        layers: Of the model.
        taken: Its cotangents.
        params: Where.
        inputs: All examples.
        number: Which direction.
    """
    pick = lambda c: jax.lax.dynamic_index_in_dim(c, number, keepdims=False)
    one = lambda output, given: jax.tree.map(pick, eqx.filter(taken.cotangents(output, given), eqx.is_array))
    cotangents = one if taken.directions else taken.cotangents
    found = statistics(layers, params, inputs, cotangents, PerExampleGradients(), targets=taken.targets)
    gradients = {}
    for group in layers.groups:
        total = jnp.zeros((), dtype_of(group))
        for site, g in zip(group.sites, found[group.name], strict=True):
            total = total + (g.swapaxes(2, 3) if site.transposed else g).astype(total.dtype)
        stack, rows, columns = group.block.shape
        gradients[group.name] = jnp.broadcast_to(total, (stack, num_examples(inputs), rows, columns))
    return gradients


def nearest_kronecker_layers(blocks: Layerwise, *, rank: int = 1) -> Layerwise:
    """For every layer the sum of `rank` Kronecker products nearest to its block, in the Frobenius norm.

    No G ⊗ A is nearer to the block than this one: what K-FAC loses against it comes from taking inputs and cotangents
    as independent, what this one loses from the form of a Kronecker product.

    Args:
        blocks: From `layer_blocks`.
        rank: Number of terms, at least 1; a layer of m × n has at most min(m², n²), and takes that many.

    Returns:
        An operator of the same kind. For rank 1 it is symmetric positive semidefinite, with `damped`, `damped_factors`
            and `inverse` as that of `kfac`. Sums of two and more are symmetric, need not be definite, and have an
            inverse as `KroneckerSum` has.

    Raises:
        ValueError: `blocks` are not those of `layer_blocks`, or the rank is below 1.

    Cost: a singular value decomposition of m² × n² numbers for each layer.

    Source: C. Van Loan and N. Pitsianis, "Approximation with Kronecker products", 1993; for layers A. Koroko et al.,
    "Efficient approximations of the Fisher matrix in neural networks using Kronecker product singular value
    decomposition", 2022, arXiv 2201.10285.

    Example:
        ```python
        import jax, jax.numpy as jnp, curvax as cx

        x, y = jax.random.normal(jax.random.key(0), (8, 2)), jnp.ones((8, 3))
        model_fn = lambda w, x: jnp.tanh(w @ x)
        blocks = cx.operators.layer_blocks(model_fn, cx.operators.SquaredError(), jnp.ones((3, 2)), x, y)
        cx.operators.nearest_kronecker_layers(blocks).damped(1e-2).inverse().mv(jnp.ones((3, 2)))
        ```
    """
    if rank < 1:
        raise ValueError(f"`rank` must be at least 1, found {rank}.")

    def nearest(name: str, block: lx.AbstractLinearOperator) -> lx.AbstractLinearOperator:
        if not isinstance(block, Stacked) or not isinstance(block.operator, DenseBlock):
            raise ValueError(
                f"`blocks` must come from `layer_blocks`; that of {name!r} is a {type(block).__name__}."
            )
        rows, columns = block.operator.shape
        terms = min(rank, rows**2, columns**2)
        return block.each(lambda one: nearest_kronecker(one.matrix, (rows, rows), rank=terms))

    found = {name: nearest(name, block) for name, block in blocks.blocks.items()}
    return eqx.tree_at(lambda b: b.blocks, blocks, found)
