"""The uses that a model makes of its parameters, put together in blocks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import jax
import numpy as np

from curvax.capture._block import Block
from curvax.capture._finder import Findings, Found, Use
from curvax.capture._layout import Layout, merged
from curvax.capture._piece import Piece, piece
from curvax.capture._site import Factor, Site, SiteKind

# Of a longer axis statistics keep the diagonal of a second moment only.
LARGEST_FACTOR = 8192
# Likewise of a whole parameter that is added somewhere: a table of positions is long, a bias is not.
LARGEST_BIAS = 1024


# The fallback of a parameter that the model does not use.
NOT_USED = "none: not used"


@dataclass(frozen=True)
class Group:
    """The sites of one block: all uses of the same entries of a parameter. Received, never made by a user; static.

    Attributes:
        name: Name of the parameter, with a number after `#` where several groups share one.
        sites: Where statistics are taken, of each of which there is one result; none where there is no reverse
            derivative or the parameter is not used.
        block: The coordinates.
        fallback: Empty if every use is a known site. Else what is done instead, and why.
        uses: What the model does with these entries, for people.
    """

    name: str
    sites: tuple[Site, ...]
    block: Block
    fallback: str
    uses: tuple[str, ...]


@dataclass
class _Cluster:
    """Matrix sites with the same coordinates, or transposed ones."""

    leaf: int
    coordinates: Layout
    members: list[tuple[Found, Use, bool]]
    bias: Use | None = None


@dataclass
class _Single:
    """Entries of a parameter with one site, whatever their uses are."""

    leaf: int
    coordinates: Layout
    uses: list[Use]


@dataclass
class _Claims:
    """What is claimed of the parameters, until nothing is claimed twice.

    Attributes:
        names: Of the parameters.
        structures: Their shapes and dtypes.
        findings: What is used how.
        clusters: Groups of matrix sites.
        whole: Parameters that are taken in one piece, and why.
    """

    names: Sequence[str]
    structures: Sequence[jax.ShapeDtypeStruct]
    findings: Findings
    clusters: list[_Cluster] = field(default_factory=list)
    whole: dict[int, str] = field(default_factory=dict)


def groups(
    names: Sequence[str], structures: Sequence[jax.ShapeDtypeStruct], findings: Findings
) -> tuple[Group, ...]:
    """All groups, in the order of the parameters; together their blocks cover every entry that is used.

    Args:
        names: Of the parameters.
        structures: Their shapes and dtypes.
        findings: What the model does with them.
    """
    kept = {leaf: uses for leaf, uses in findings.uses.items() if structures[leaf].size > 0}
    claims = _Claims(names, structures, replace(findings, uses=kept))
    for leaf, uses in kept.items():
        if any(use.kind == "none" for use in uses) or _routed(uses, findings):
            claims.whole[leaf] = ""
    _cluster(claims)
    singles = _settle(claims)
    found: list[tuple[int, int, Group]] = []
    for cluster in claims.clusters:
        if cluster.leaf not in claims.whole:
            found.append((cluster.leaf, cluster.coordinates.offset, _matrix_group(claims, cluster)))
    for single in singles:
        found.append((single.leaf, single.coordinates.offset, _single_group(claims, single)))
    covered = {leaf for leaf, _, _ in found} | {i for _, _, g in found for i in g.block.leaves}
    for leaf in set(range(len(names))) - covered:
        if structures[leaf].size > 0:
            found.append((leaf, 0, _single_group(claims, _Single(leaf, _entirely(structures[leaf]), []))))
    found.sort(key=lambda f: f[:2])
    return _named([group for _, _, group in found])


def _entirely(like: jax.ShapeDtypeStruct) -> Layout:
    return Layout(0, ((), merged([(like.size, 1)]), ()))


def _routed(uses: Sequence[Use], findings: Findings) -> bool:
    """Whether weights are looked up by the data: each lookup would bring a cotangent of a weight's size."""
    sites = [findings.sites[use.site] for use in uses if use.kind == "site"]
    return any(site.rank > 1 and "contracted" in findings.readers[site.key] for site in sites)


def _cluster(claims: _Claims) -> None:
    """Bring the matrix sites of each parameter together by their coordinates."""
    for leaf, uses in claims.findings.uses.items():
        for use in (u for u in uses if u.kind == "site"):
            found = claims.findings.sites[use.site]
            coordinates = found.coordinates
            if leaf in claims.whole:
                continue
            if coordinates is None or piece(coordinates, claims.structures[leaf].size) is None:
                claims.whole[leaf] = use.reason or "rearranged in a way that no strides describe"
                continue
            stack, rows, columns = coordinates.axes
            turned = Layout(coordinates.offset, (stack, columns, rows))
            for cluster in (c for c in claims.clusters if c.leaf == leaf):
                if cluster.coordinates in (coordinates, turned):
                    cluster.members.append((found, use, cluster.coordinates != coordinates))
                    break
            else:
                claims.clusters.append(_Cluster(leaf, coordinates, [(found, use, False)]))
    for cluster in claims.clusters:
        cluster.bias = _common_bias(claims, cluster)


def _common_bias(claims: _Claims, cluster: _Cluster) -> Use | None:
    """The bias that every site of a cluster has, and nothing else reads their outputs."""
    biases = []
    for found, _, turned in cluster.members:
        readers = claims.findings.readers[found.key]
        bias = readers[0] if len(readers) == 1 else None
        if turned or found.kind == "embedding" or not isinstance(bias, Use) or bias.coordinates is None:
            return None
        biases.append(bias)
    first = biases[0]
    assert first.coordinates is not None
    same = all(b.view.leaf == first.view.leaf and b.coordinates == first.coordinates for b in biases)
    fits = first.coordinates.shape == cluster.coordinates.shape[:2]
    if not same or not fits or piece(first.coordinates, claims.structures[first.view.leaf].size) is None:
        return None
    return first


def _settle(claims: _Claims) -> list[_Single]:
    """Give up what is claimed twice, biases before parameters, until nothing is; what is left is taken singly."""
    while True:
        alive = [c for c in claims.clusters if c.leaf not in claims.whole]
        for cluster in alive:
            if cluster.bias is not None and cluster.bias.view.leaf in claims.whole:
                cluster.bias = None
        folded = {
            id(r) for c in alive if c.bias for f, _, _ in c.members for r in claims.findings.readers[f.key]
        }
        singles = _singles(claims, folded)
        if not _doubly_claimed(claims, alive, singles):
            return singles


def _singles(claims: _Claims, folded: set[int]) -> list[_Single]:
    found: list[_Single] = []
    for leaf, uses in claims.findings.uses.items():
        if leaf in claims.whole:
            found.append(_Single(leaf, _entirely(claims.structures[leaf]), uses))
            continue
        for use in uses:
            if use.kind == "site" or id(use) in folded:
                continue
            coordinates = _positions(use, claims.structures[leaf])
            for single in found:
                if (single.leaf, single.coordinates) == (leaf, coordinates):
                    single.uses.append(use)
                    break
            else:
                found.append(_Single(leaf, coordinates, [use]))
    return found


def _positions(use: Use, like: jax.ShapeDtypeStruct) -> Layout:
    """The entries of a parameter that a view shows, in the order in which they lie there."""
    layout = use.view.layout
    if layout is None:
        return _entirely(like)
    atoms = layout.without_broadcasts().atoms
    offset = layout.offset + sum((n - 1) * s for n, s in atoms if s < 0)
    in_order = sorted(((n, abs(s)) for n, s in atoms), key=lambda atom: -atom[1])
    coordinates = Layout(offset, (merged(use.view.stack), merged(in_order), ()))
    return _entirely(like) if piece(coordinates, like.size) is None else coordinates


def _doubly_claimed(claims: _Claims, clusters: Sequence[_Cluster], singles: Sequence[_Single]) -> bool:
    """Whether entries were claimed twice, and claims were given up for it."""
    owners: dict[int, list[tuple[Layout, _Cluster | None]]] = {}
    for cluster in clusters:
        owners.setdefault(cluster.leaf, []).append((cluster.coordinates, None))
        if cluster.bias is not None and cluster.bias.coordinates is not None:
            owners.setdefault(cluster.bias.view.leaf, []).append((cluster.bias.coordinates, cluster))
    for single in singles:
        owners.setdefault(single.leaf, []).append((single.coordinates, None))
    for leaf, claimed in owners.items():
        if len(claimed) == 1:
            continue
        taken = np.zeros(claims.structures[leaf].size, bool)
        if all([coordinates.mark(taken) for coordinates, _ in claimed]):
            continue
        given_up = [cluster for _, cluster in claimed if cluster is not None]
        for cluster in given_up:
            cluster.bias = None
        if not given_up:
            claims.whole[leaf] = "used in several shapes that overlap"
        return True
    return False


# Groups from claims.


def _factors(sizes: Sequence[int], vocabulary: Sequence[bool]) -> tuple[Factor, Factor]:
    rows, columns = (
        "diagonal" if words or size > LARGEST_FACTOR else "dense"
        for size, words in zip(sizes, vocabulary, strict=True)
    )
    return rows, columns  # type: ignore[return-value]


def _matrix_group(claims: _Claims, cluster: _Cluster) -> Group:
    leaf, bias = cluster.leaf, cluster.bias
    stack, rows, columns = cluster.coordinates.shape
    words = [False, False]
    for found, _, turned in cluster.members:
        words[0 if turned else 1] |= found.kind == "embedding"
    columns += bias is not None
    factors = _factors((rows, columns), words)
    sites, uses = [], []
    for found, use, turned in cluster.members:
        shared, steps = 1, 1
        for size, role in found.geometry.roles:
            shared *= size if role == "shared" else 1
        for level in found.levels:
            steps *= 1 if level.stacked else level.length
        ins, outs = (rows, columns) if turned else (columns, rows)
        of_inputs, of_cotangents = factors if turned else factors[::-1]
        site = Site(
            found.key, found.kind, claims.names[leaf], use.source, stack, shared, steps, ins, outs,
            bias is not None, turned, of_inputs, of_cotangents, found.levels, found.geometry, leaf=leaf,
        )  # fmt: skip
        sites.append(site)
        uses.append(_described(found.kind, use.source, bias is not None, turned, steps))
    leaves, layouts = [leaf], [cluster.coordinates]
    if bias is not None and bias.coordinates is not None:
        leaves.append(bias.view.leaf)
        layouts.append(bias.coordinates)
    block = _block(claims, leaves, layouts, (stack, rows, columns), factors)
    return Group(claims.names[leaf], tuple(sites), block, "", tuple(uses))


def _single_group(claims: _Claims, single: _Single) -> Group:
    leaf, findings = single.leaf, claims.findings
    name, kinds = claims.names[leaf], {use.kind for use in single.uses}
    stack, rows, _ = single.coordinates.shape
    fallback = _fallback(single, claims)
    measured = bool(single.uses) and not fallback.startswith("none")
    kind: SiteKind = "other" if kinds - {"bias", "scale"} else "scale" if "scale" in kinds else "bias"
    factor: Factor = "dense" if kind == "bias" and rows <= LARGEST_BIAS else "diagonal"
    block = _block(claims, [leaf], [single.coordinates], (stack, rows, 1), (factor, "dense"))
    where = "" if single.coordinates.offset == 0 else f"+{single.coordinates.offset}"
    site = Site(
        name + where, kind, name, single.uses[0].source if single.uses else "", stack, 1, 1, 1, rows,
        cotangent_factor=factor, piece=replace(block.pieces[0], shape=(stack, rows)), leaf=leaf,
    )  # fmt: skip
    uses = []
    for use in single.uses:
        found = findings.sites.get(use.site)
        uses.append(_described(found.kind if found else use.kind, use.source))
    return Group(name, (site,) if measured else (), block, fallback, tuple(uses))


def _fallback(single: _Single, claims: _Claims) -> str:
    """What is done instead of a known site, and why."""
    if not single.uses:
        return NOT_USED
    for use in single.uses:
        if use.kind == "none":
            return f"none: {use.reason}"
    if _routed(single.uses, claims.findings):
        return (
            "none: weights looked up by the data would bring cotangents of tokens × weight; multiply all experts "
            "and choose among the results, or dispatch tokens by one-hot products"
        )
    reason = claims.whole.get(single.leaf, "")
    reasons = [reason] if reason else []
    reasons += [use.reason for use in single.uses if use.kind == "other" and use.reason not in reasons]
    return f"gradients of the examples, diagonal: {'; '.join(reasons)}" if reasons else ""


def _block(
    claims: _Claims,
    leaves: Sequence[int],
    layouts: Sequence[Layout],
    shape: tuple[int, int, int],
    factors: tuple[Factor, Factor],
) -> Block:
    pieces: list[Piece] = []
    for leaf, layout in zip(leaves, layouts, strict=True):
        cut = piece(layout, claims.structures[leaf].size)
        assert cut is not None
        pieces.append(cut)
    return Block(
        tuple(claims.names[i] for i in leaves),
        shape,
        *factors,
        len(leaves) > 1,
        tuple(leaves),
        tuple(pieces),
        tuple(claims.structures[i] for i in leaves),
        len(claims.names),
    )


def _described(kind: str, source: str, bias: bool = False, turned: bool = False, steps: int = 1) -> str:
    words = [kind + (" + bias" if bias else "")]
    words += ["transposed"] if turned else []
    words += [f"{steps} steps"] if steps > 1 else []
    words += [source] if source else []
    return ", ".join(words)


def _named(found: Sequence[Group]) -> tuple[Group, ...]:
    """With names that tell the groups of one parameter apart."""
    counts: Mapping[str, int] = {g.name: sum(h.name == g.name for h in found) for g in found}
    seen: dict[str, int] = {}
    named = []
    for group in found:
        number = seen[group.name] = seen.get(group.name, -1) + 1
        named.append(replace(group, name=f"{group.name}#{number}") if counts[group.name] > 1 else group)
    return tuple(named)
