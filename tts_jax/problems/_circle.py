"""Sums over planar data of ReLU neurons, in time (neurons) · log(data + neurons).

With (w·x)_+ the normal equations and the forces need Σ xxᵀ over the data in the intersection of two
half-planes. Write w = s w̃ with s = ±1 and w̃ in the upper half-plane, at an angle in [0, π). While
that angle grows from 0 to π, each datum changes sides once: those of class a come to the positive
side of w̃, those of class d leave it. Let x̂ = x in class a and x̂ = −x in class d, so that
w̃·x̂ > 0 after the change. With A = a, B = d if s = 1 and A = d, B = a if s = −1,

    (w·x)_+ = w̃·x̂ after the change if x is in A,    −w̃·x̂ before it if x is in B,    else 0.

Let Fᵉ(w̃) be the mean of x̂x̂ᵀ over the data of class e that have changed before w̃ (0 for the others)
and Tᵉ its value at π: prefix sums in the order of the changes. For neurons k before j in the order
of their angles, and any symmetric Gᵉ, the Gram matrix is K_kj = Σ_e Vᵉ_k·Uᵉ_j/m with the vectors

    Vᵉ_k = ( (Fᵉ_k − [e = B_k] Gᵉ) w̃_k,   −[e = B_k] w̃_k ),
    Uᵉ_j = ( [e = A_j] w̃_j,   (Fᵉ_j − [e = A_j] Gᵉ − [e = B_j] Tᵉ) w̃_j ),

eight numbers in all. Thus K + λI has a Cholesky factor of the same kind, which one pass over blocks
of neurons finds. If G is the value of F between two blocks, the parts of V are covariances of the
outputs of neurons before it with what has changed, those of U of neurons after it with what has
yet to change, if the data carried independent noise: what is subtracted from a block is then never
much more than the block, and nothing cancels but what does so in the matrix itself.
"""

from typing import NamedTuple, Self

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tts_jax._precision import require_double_precision


BLOCK = 16
_CELLS = 2  # per datum


class RidgeInfo(NamedTuple):
    """How well a ridge system was solved.

    Attributes:
        condition: (tr K + λ)/λ, which bounds the condition number of K + λI.
        residual: the largest entry of |(K + λI) u − Φᵀy/n − λb|.
    """

    condition: Float[Array, ""]
    residual: Float[Array, ""]


class CircleData(eqx.Module):
    """Inputs in the plane with labels, prepared for sums over half-planes.

    Where an axis has two entries for the classes, a is the first and d the second.

    Attributes:
        flipped: x̂ in the order of the changes, then zeros, `[2, n, 2]`.
        sums: means of x̂₁², x̂₁x̂₂, x̂₂², yx̂₁, yx̂₂ over the first i of them, as if the others were 0,
            at index i, `[2, n + 1, 5]`.
        starts: how many change before a cell of directions, with a cell to spare at each end.
        places: where datum i stands in `flipped`, as a flat index.
        labels: y.
        power: the mean of y².
    """

    flipped: Float[Array, "2 n 2"]
    sums: Float[Array, "2 n1 5"]
    starts: Int[Array, "2 cells"]
    places: Int[Array, " n"]
    labels: Float[Array, " n"]
    power: Float[Array, ""]

    @classmethod
    def of(cls, inputs: Float[Array, "n 2"], labels: Float[Array, " n"]) -> Self:
        """Sort the data."""
        inputs, labels = jnp.asarray(inputs, dtype=float), jnp.asarray(labels, dtype=float)
        n = labels.size
        leaves = (inputs[:, 0] > 0) | ((inputs[:, 0] == 0) & (inputs[:, 1] < 0))
        hat = jnp.where(leaves[:, None], -inputs, inputs)
        turn = _turn(hat[:, 1], -hat[:, 0])
        zero = jnp.all(inputs == 0, axis=1)
        member = jnp.stack([~leaves & ~zero, leaves])
        order = jnp.argsort(jnp.where(member, turn, jnp.inf), axis=1)
        inside = jnp.take_along_axis(member, order, axis=1)[..., None]
        flipped = jnp.where(inside, hat[order], 0.0)
        x, y = flipped[..., 0], flipped[..., 1]
        moments = jnp.stack([x * x, x * y, y * y, labels[order] * x, labels[order] * y], axis=-1)
        sums = jnp.cumsum(moments, axis=1) / n
        rank = jnp.argsort(order, axis=1)
        cell = _cell(turn, _CELLS * n)
        held = jax.vmap(lambda own: jnp.bincount(cell, own, length=_CELLS * n))(member * 1)
        return cls(
            flipped=flipped,
            sums=jnp.pad(sums, ((0, 0), (1, 0), (0, 0))),
            starts=jnp.cumsum(jnp.pad(held, ((0, 0), (2, 1))), axis=1),
            places=jnp.where(leaves, rank[1] + n, rank[0]),
            labels=labels,
            power=jnp.mean(labels**2),
        )

    def at(self, w: Float[Array, "m 2"]) -> "Neurons":
        """Put neurons in their order: what all the sums share."""
        require_double_precision("CircleData", w)
        w = jnp.asarray(w)
        m = w.shape[0]
        upper = (w[:, 1] > 0) | ((w[:, 1] == 0) & (w[:, 0] >= 0))
        folded = jnp.where(upper[:, None], w, -w)
        turn = jax.lax.stop_gradient(_turn(folded[:, 0], folded[:, 1]))
        order, spare = _argsort(turn), -m % BLOCK
        tilde = jnp.pad(folded[order].T, ((0, 0), (0, spare)))
        upper = jnp.pad(upper[order], (0, spare))
        after = jnp.stack([upper, ~upper])
        changed = self._changed(
            jax.lax.stop_gradient(tilde), jnp.pad(turn[order], (0, spare)), after
        )
        sums = jnp.take_along_axis(self.sums, changed[..., None], axis=1)
        return Neurons(self, order, tilde, after, changed, jnp.moveaxis(sums, -1, 0))

    def _changed(
        self, tilde: Float[Array, "2 p"], turn: Float[Array, " p"], after: Bool[Array, "2 p"]
    ) -> Int[Array, "2 p"]:
        """How many data of each class have changed before w̃, by bisection.

        Those with w·x = 0 count so that they are not on the neuron's side.
        """
        row = jnp.arange(2)[:, None]
        cell = _cell(turn, self.starts.shape[1] - 3)

        def open_(interval: tuple[Array, Array]) -> Array:
            return jnp.any(interval[0] < interval[1])

        def halve(interval: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = interval
            middle = (low + high) // 2
            x = jnp.moveaxis(self.flipped.at[row, middle].get(mode="clip"), -1, 0)
            side = _dot(x, tilde)
            changed = jnp.where(after, side > 0, side >= 0) & (low < high)
            return jnp.where(changed, middle + 1, low), jnp.where(changed, high, middle)

        interval = self.starts[:, cell], self.starts[:, cell + 3]
        return jax.lax.while_loop(open_, halve, interval)[0]

    def gram(self, w: Float[Array, "m 2"]) -> Float[Array, "m m"]:
        """K = ΦᵀΦ/(n m), dense."""
        return self.at(w).gram()

    def right(self, w: Float[Array, "m 2"]) -> Float[Array, " m"]:
        """Φᵀy/n."""
        return self.at(w).right()

    def matvec(self, w: Float[Array, "m 2"], u: Float[Array, " m"]) -> Float[Array, " m"]:
        """K u."""
        return self.at(w).matvec(u)

    def ridge(
        self,
        w: Float[Array, "m 2"],
        penalty: Array | float,
        prior: Array | float = 0.0,
        refinements: int = 1,
    ) -> tuple[Float[Array, " m"], RidgeInfo]:
        """The u with (K + λI) u = Φᵀy/n + λb."""
        return self.at(w).ridge(penalty, prior, refinements)

    def force(self, u: Float[Array, " m"], w: Float[Array, "m 2"]) -> Float[Array, "m 2"]:
        """Σ r_i x_i/n over the data with w_j·x_i > 0, for every neuron j."""
        return self.at(w).force(u)

    def mean_square(self, u: Float[Array, " m"], w: Float[Array, "m 2"]) -> Float[Array, ""]:
        """The mean of r², to some ulp of the mean of y²."""
        return self.at(w).mean_square(u)

    def residuals(self, u: Float[Array, " m"], w: Float[Array, "m 2"]) -> Float[Array, " n"]:
        """r_i = f(x_i) − y_i."""
        return self.at(w).residuals(u)


class Neurons(eqx.Module):
    """Neurons in the order of their angles modulo π; zero vectors fill up the last block.

    Attributes:
        data: the data.
        order: which neuron stands there.
        tilde: w̃.
        after: whether A is class a, class d.
        changed: how many data of each class have changed.
        sums: their sums.
    """

    data: CircleData
    order: Int[Array, " m"]
    tilde: Float[Array, "2 p"]
    after: Bool[Array, "2 p"]
    changed: Int[Array, "2 p"]
    sums: Float[Array, "5 2 p"]

    def gram(self) -> Float[Array, "m m"]:
        """K = ΦᵀΦ/(n m), dense."""
        m = self.order.size
        us, vs = self._generators(jnp.zeros((3, 2, 1)))
        lower = jnp.tril(us.T @ vs)[:m, :m]
        back = jnp.argsort(self.order)
        return (lower + jnp.tril(lower, -1).T)[back[:, None], back] / m

    def right(self) -> Float[Array, " m"]:
        """Φᵀy/n."""
        return self._restore(_dot(self.tilde, self._pull()))

    def matvec(self, u: Float[Array, " m"]) -> Float[Array, " m"]:
        """K u."""
        return self._restore(_dot(self.tilde, self._push(self._arrange(u))))

    def force(self, u: Float[Array, " m"]) -> Float[Array, "m 2"]:
        """Σ r_i x_i/n over the data with w_j·x_i > 0."""
        toward = self._push(self._arrange(u)) - self._pull()
        toward = jnp.where(jnp.all(self.tilde == 0, axis=0), 0.0, toward)
        return self._restore(jnp.where(self.after[0], toward, -toward).T)

    def mean_square(self, u: Float[Array, " m"]) -> Float[Array, ""]:
        """The mean of r², to some ulp of the mean of y²: `residuals` tells more of a close fit."""
        u = self._arrange(u)
        pull = _dot(self.tilde, self._pull())
        push = _dot(self.tilde, self._push(u))
        return self.data.power + jnp.dot(u, (push - pull) - pull) / self.order.size

    def residuals(self, u: Float[Array, " m"]) -> Float[Array, " n"]:
        """r_i = f(x_i) − y_i, in time n + m."""
        n = self.data.labels.size
        weights = (self._arrange(u) * self.tilde).T[None]
        after = self.after[..., None]
        steps = jnp.zeros((2, n + 1, 2), weights.dtype)
        index = (jnp.arange(2)[:, None], self.changed)
        late = jnp.cumsum(steps.at[index].add(jnp.where(after, weights, 0.0))[:, ::-1], axis=1)
        early = jnp.cumsum(steps.at[index].add(jnp.where(after, 0.0, weights)), axis=1)
        outputs = jnp.sum((late[:, ::-1][:, 1:] - early[:, :-1]) * self.data.flipped, axis=-1)
        return outputs.reshape(-1)[self.data.places] / self.order.size - self.data.labels

    def ridge(
        self, penalty: Array | float, prior: Array | float = 0.0, refinements: int = 1
    ) -> tuple[Float[Array, " m"], RidgeInfo]:
        """The u with (K + λI) u = Φᵀy/n + λb.

        Its derivatives are those of the solution, by the linear system that they solve.

        Args:
            penalty: λ > 0.
            prior: b.
            refinements: corrections by the residual. Without any the backward error is some ulp
                at λ = 1e-4 (for inputs and neurons of length 1) and 100 ulp at 1e-8; one makes it
                that of a dense solve. Data that all lie on one line lose 1/λ ulp instead, and
                below 1e-8 the solution.
        """
        penalty = jnp.asarray(penalty, self.tilde.dtype)
        right = _dot(self.tilde, self._pull()) + penalty * jnp.asarray(prior, self.tilde.dtype)
        right = jnp.where(jnp.arange(right.size) < self.order.size, right, 0.0)

        def apply(u: Array) -> Array:
            return _dot(self.tilde, self._push(u)) + penalty * u

        factor = jax.tree.map(jax.lax.stop_gradient, self)._factor(jax.lax.stop_gradient(penalty))

        def solve(apply, right: Array) -> Array:
            u = factor.solve(right)
            for _ in range(refinements):
                u = u + factor.solve(right - apply(u))
            return u

        u = jax.lax.custom_linear_solve(apply, right, solve, symmetric=True)
        info = RidgeInfo(
            condition=(self._trace() + penalty) / penalty,
            residual=jnp.max(jnp.abs(right - apply(u))),
        )
        return self._restore(u), info

    def _arrange(self, u: Float[Array, " m"]) -> Float[Array, " p"]:
        return jnp.pad(jnp.asarray(u)[self.order], (0, self.tilde.shape[1] - u.size))

    def _restore(self, values: Float[Array, "p ..."]) -> Float[Array, "m ..."]:
        m = self.order.size
        return jnp.zeros_like(values[:m]).at[self.order].set(values[:m], unique_indices=True)

    def _totals(self) -> Float[Array, "5 2 1"]:
        return self.data.sums[:, -1].T[..., None]

    def _pull(self) -> Float[Array, "2 p"]:
        """s Σ y_i x_i/n over the data on the neuron's side."""
        sums, total = self.sums[3:], self._totals()[3:]
        return jnp.sum(sums - jnp.where(self.after, 0.0, total), axis=1)

    def _push(self, u: Float[Array, " p"]) -> Float[Array, "2 p"]:
        """s Σ f(x_i) x_i/n over the data on the neuron's side."""
        moments, total = self.sums[:3], self._totals()[:3]
        weights = (u * self.tilde)[:, None]
        late, early = jnp.where(self.after, weights, 0.0), jnp.where(self.after, 0.0, weights)
        past = _cumulate(jnp.stack([late, early, _apply(moments, weights)]))
        late, early, seen = past
        later, earlier, ahead = past[..., -1:] - past
        changed = seen + _apply(moments, later - early)
        waiting = (
            ahead - _apply(total, earlier) - _apply(moments, later) - _apply(total - moments, early)
        )
        return jnp.sum(jnp.where(self.after, changed, -waiting), axis=1) / self.order.size

    def _trace(self) -> Float[Array, ""]:
        moments, total = self.sums[:3], self._totals()[:3]
        own = jnp.sum(jnp.where(self.after, moments, total - moments), axis=1)
        return jnp.sum(_dot(self.tilde, _apply(own, self.tilde))) / self.order.size

    def _generators(self, between: Float[Array, "3 2 #p"]) -> tuple[Array, Array]:
        """U and V for the given G, `[8, p]`."""
        after, tilde = self.after, self.tilde[:, None]
        moments, total = self.sums[:3], self._totals()[:3]
        late, early = jnp.where(after, tilde, 0.0), jnp.where(after, 0.0, tilde)
        us = late, _apply(moments - jnp.where(after, between, total), tilde)
        vs = _apply(moments - jnp.where(after, 0.0, between), tilde), -early
        return jnp.concatenate(us).reshape(8, -1), jnp.concatenate(vs).reshape(8, -1)

    def _factor(self, penalty: Float[Array, ""]) -> "_Factor":
        m, blocks = self.order.size, self.tilde.shape[1] // BLOCK
        first = self.sums[:3, :, ::BLOCK]
        us, vs = self._generators(jnp.repeat(first, BLOCK, axis=2))
        us = us.T.reshape(blocks, BLOCK, 8) / jnp.sqrt(m)
        vs = vs.T.reshape(blocks, BLOCK, 8) / jnp.sqrt(m)
        within = us @ jnp.swapaxes(vs, 1, 2) + penalty * jnp.eye(BLOCK)
        moves = _moves(jnp.diff(first, axis=2, append=first[..., -1:]))
        vs = vs @ jnp.swapaxes(moves, 1, 2)

        def step(state: Array, block: tuple[Array, ...]) -> tuple[Array, Array]:
            us, vs, within, move = block
            known = us @ state
            chol = jax.lax.linalg.cholesky(within - known @ us.T, symmetrize_input=False)
            right = jnp.concatenate([us, vs - known @ move.T, jnp.eye(BLOCK)], axis=1)
            right = jax.lax.linalg.triangular_solve(chol, right, left_side=True, lower=True)
            state = move @ state @ move.T + right[:, 8:16].T @ right[:, 8:16]
            return state, right

        _, solved = jax.lax.scan(step, jnp.zeros((8, 8), us.dtype), (us, vs, within, moves))
        inward, outward, inverse = jnp.split(solved, (8, 16), axis=2)
        return _Factor(inverse, inward, outward, moves - jnp.swapaxes(outward, 1, 2) @ inward)


class _Factor(NamedTuple):
    """The Cholesky factor L of K + λI by blocks of neurons.

    Attributes:
        inverse: the inverses of its diagonal blocks L_B.
        inward: L_B⁻¹U_B.
        outward: Z_B, so that the blocks of L below L_B are U_C ··· Z_Bᵀ.
        moves: what a block makes of what comes from those before it.
    """

    inverse: Float[Array, "blocks b b"]
    inward: Float[Array, "blocks b 8"]
    outward: Float[Array, "blocks b 8"]
    moves: Float[Array, "blocks 8 8"]

    def solve(self, right: Float[Array, " p"]) -> Float[Array, " p"]:
        """L⁻ᵀL⁻¹ of a vector."""
        z = _times(self.inverse, right.reshape(self.inverse.shape[:2]))
        z = z - _times(self.inward, _carry(self.moves, _adjoint(self.outward, z)))
        moves = jnp.swapaxes(self.moves, 1, 2)
        back = _carry(moves, _adjoint(self.inward, z), reverse=True)
        return _adjoint(self.inverse, z - _times(self.outward, back)).reshape(-1)


def _times(matrices: Float[Array, "... r s"], vectors: Float[Array, "... s"]) -> Array:
    return jnp.sum(matrices * vectors[..., None, :], axis=-1)


def _adjoint(matrices: Float[Array, "... r s"], vectors: Float[Array, "... r"]) -> Array:
    return jnp.sum(matrices * vectors[..., None], axis=-2)


def _carry(moves: Array, gains: Array, reverse: bool = False) -> Array:
    """What each block gets of c ← move c + gain of those before it."""

    def step(carried: Array, block: tuple[Array, Array]) -> tuple[Array, Array]:
        move, gain = block
        return _times(move, carried) + gain, carried

    return jax.lax.scan(step, jnp.zeros_like(gains[0]), (moves, gains), reverse=reverse)[1]


def _turn(first: Array, second: Array) -> Array:
    """A direction of the upper half-plane as a number that grows from −1 to 1 with its angle.

    Vectors of length 0 come last.
    """
    size = jnp.abs(first) + second
    return jnp.where(size == 0, 1.0, -first / jnp.where(size == 0, 1.0, size))


def _cell(turn: Array, cells: int) -> Array:
    cell = jnp.floor((turn + 1.0) * (cells / 2)).astype(jnp.int32)
    return jnp.clip(cell, 0, cells - 1)


def _argsort(turn: Float[Array, " m"]) -> Int[Array, " m"]:
    """The order of numbers in [−1, 1], as close to it as 62 bits hold both a number and its index.

    Integers without companions sort several times as fast as floats with them. Neurons as close to
    each other as what is cut off may stand in any order.
    """
    bits = turn.size.bit_length()
    keys = ((turn + 1.0) * 2.0 ** (61 - bits)).astype(jnp.int64)
    keys = jnp.sort((keys << bits) | jnp.arange(turn.size), stable=False)
    return (keys & ((1 << bits) - 1)).astype(jnp.int32)


def _cumulate(values: Float[Array, "... p"]) -> Float[Array, "... p"]:
    """Cumulative sums, by blocks."""
    blocks = values.reshape(*values.shape[:-1], -1, BLOCK)
    within = blocks @ jnp.triu(jnp.ones((BLOCK, BLOCK), values.dtype))
    before = jnp.cumsum(within[..., -1], axis=-1) - within[..., -1]
    return (within + before[..., None]).reshape(values.shape)


def _dot(a: Float[Array, "2 ..."], b: Float[Array, "2 ..."]) -> Float[Array, " ..."]:
    return a[0] * b[0] + a[1] * b[1]


def _apply(matrix: Float[Array, "3 ..."], vector: Float[Array, "2 ..."]) -> Float[Array, "2 ..."]:
    """A symmetric matrix, of which three entries are stored, times a vector."""
    first = matrix[0] * vector[0] + matrix[1] * vector[1]
    return jnp.stack([first, matrix[1] * vector[0] + matrix[2] * vector[1]])


def _moves(steps: Float[Array, "3 2 blocks"]) -> Float[Array, "blocks 8 8"]:
    """How V changes when G grows by the given steps."""
    whole = steps[jnp.array([[0, 1], [1, 2]])]
    change = jnp.einsum("pqgb,gh->bpgqh", whole, jnp.eye(2)).reshape(-1, 4, 4)
    return jnp.broadcast_to(jnp.eye(8), (change.shape[0], 8, 8)).at[:, :4, 4:].set(change)
