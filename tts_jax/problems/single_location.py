"""Marion, Berthier, Biau & Boyer (ICLR 2025, arXiv 2410.01537): single-location regression.

One of L tokens in ℝ^d, X_0 ~ N(√(d/2) k*, γ²I), tells the output y = ⟨X_0, v*⟩ + noise; the others
are N(0, I), and k*, v* are orthogonal unit vectors. An attention layer with unit vectors k, v and
gain λ,

    T(X) = Σ_l erf(λ⟨X_l, k⟩) ⟨X_l, v⟩,

has to find which token it is, and what to read there. Its risk is a function of five overlaps

    κ = ⟨k, k*⟩,   ν = ⟨v, v*⟩,   θ = ⟨v, k*⟩,   η = ⟨k, v*⟩,   ρ = ⟨k, v⟩.

Gradients lie in the span of k*, v*, k, v, so that projected gradient descent in ℝ^d is closed in
these five: the form `"overlaps"` runs it with vectors of six entries, `"vectors"` of d. Without
loss of generality k* and v* are the first two unit vectors. Descent on batches is closed too, in
law: see `prompt_gradient`.

The paper moves k and v at one rate. T is linear in v, so `SingleLocation` has v as the fast and k
as the slow variable; ε = 1 is the published descent. `ScheduledLocation` has k and v fast and the
published schedule λ/(1 + τ) of the gain as the slow drift.
"""

from typing import Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.scipy.special import erf
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from tts_jax import AbstractProblem, State, checks
from tts_jax.fast import AbstractFastSolver, Quadratic
from tts_jax.geometry import AbstractGeometry, Euclidean, Product, Sphere


_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)
_AXES = 6  # of the form "overlaps": k*, v*, and four that hold the rest of k and v and their noise


# --- the risk --------------------------------------------------------------------------------


def _slope(x: Array) -> Array:
    """The derivative of erf."""
    return 2.0 / np.sqrt(np.pi) * jnp.exp(-(x**2))


@jax.custom_jvp
def mean_square_erf(t: Float[Array, "..."], g: Float[Array, "..."]) -> Float[Array, "..."]:
    """ζ(t, g) = E erf(t + g z)² for a standard normal z, to rounding.

    It is 1 − 8 T(h, a) with Owen's function T, h = t√2/√(1 + 2g²), a = 1/√(1 + 4g²) ≤ 1, whose
    integral from 0 to a is Gauss–Legendre's with 16 nodes. Its derivatives are closed forms.
    """
    t, g = jnp.asarray(t), jnp.asarray(g)
    square = 2.0 * t**2 / (1.0 + 2.0 * g**2)  # h²
    a = 1.0 / jnp.sqrt(1.0 + 4.0 * g**2)
    x = a[..., None] * (0.5 + 0.5 * jnp.asarray(_NODES, a.dtype))
    values = jnp.exp(-0.5 * square[..., None] * (1.0 + x**2)) / (1.0 + x**2)
    # 8 T = (8/2π) · (a/2) Σ weight · value
    return 1.0 - 2.0 / np.pi * a * jnp.sum(jnp.asarray(_WEIGHTS, a.dtype) * values, axis=-1)


def _square_slope(t: Array, g: Array) -> Array:
    """∂ζ/∂t."""
    width, narrow = jnp.sqrt(1.0 + 2.0 * g**2), jnp.sqrt(1.0 + 4.0 * g**2)
    u = t / width
    return 2.0 / width * erf(u / narrow) * _slope(u)


def _square_curvature(t: Array, g: Array) -> Array:
    """∂²ζ/∂t²."""
    width, narrow = jnp.sqrt(1.0 + 2.0 * g**2), jnp.sqrt(1.0 + 4.0 * g**2)
    u = t / width
    bend = _slope(u / narrow) / narrow - 2.0 * u * erf(u / narrow)
    return 2.0 / width**2 * bend * _slope(u)


@mean_square_erf.defjvp
def _mean_square_erf_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    (t, g), (dt, dg) = primals, tangents
    # g is the root of a variance, so that ∂ζ/∂g = g ∂²ζ/∂t²
    slope = _square_slope(t, g) * dt + g * _square_curvature(t, g) * dg
    return mean_square_erf(t, g), slope


class AbstractLocation(AbstractProblem):
    """What the two problems of single-location regression share.

    Attributes:
        dimension: d, of the tokens.
        tokens: their number L.
        gain: λ > 0; in `ScheduledLocation` its value at τ = 0.
        spread: γ ≥ 0, the standard deviation of the token that matters.
        noise: that of the output.
        batch: prompts per step of `sgd`; `None` descends the risk itself.
        form: `"overlaps"`: k and v have 6 entries, whatever d; `"vectors"`: d entries.
        start: of `init`: `"sphere"`, uniform, or `"manifold"`, where θ = η = ρ = 0.
    """

    dimension: int = eqx.field(static=True)
    tokens: int = eqx.field(static=True)
    gain: Float[Array, ""]
    spread: Float[Array, ""]
    noise: Float[Array, ""]
    batch: int | None = eqx.field(static=True)
    form: Literal["overlaps", "vectors"] = eqx.field(static=True)
    start: Literal["sphere", "manifold"] = eqx.field(static=True)

    def __init__(
        self,
        *,
        dimension: int = 400,
        tokens: int = 10,
        gain: Float[ArrayLike, ""] = 0.1,
        spread: Float[ArrayLike, ""] = 0.5**0.5,
        noise: Float[ArrayLike, ""] = 0.0,
        batch: int | None = None,
        form: Literal["overlaps", "vectors"] = "overlaps",
        start: Literal["sphere", "manifold"] = "sphere",
    ) -> None:
        """Build the problem.

        Raises:
            ValueError: `gain` ≤ 0, `spread` or `noise` < 0, too small a `dimension`, no tokens, an
                unknown `form` or `start`.
        """
        # batches in the form "overlaps" ask for a random direction outside of four
        least = 2 if batch is None or form == "vectors" else 6
        self.dimension = checks.integer("dimension", dimension, least, "The paper has 400.")
        self.tokens = checks.positive_integer("tokens", tokens, "The paper has 10.")
        self.gain = checks.as_float(
            checks.positive("gain", gain, "The paper has 0.1 to 2.", single=True)
        )
        remedy = "It is a standard deviation."
        self.spread, self.noise = (
            checks.as_float(checks.nonnegative(name, value, remedy, single=True))
            for name, value in (("spread", spread), ("noise", noise))
        )
        remedy = "Leave it out to descend the risk itself."
        self.batch = None if batch is None else checks.positive_integer("batch", batch, remedy)
        checks.one_of("form", form, ("overlaps", "vectors"))
        self.form = form
        checks.one_of("start", start, ("sphere", "manifold"))
        self.start = start

    @property
    def axes_of_vectors(self) -> int:
        """The number of entries of k and of v."""
        return _AXES if self.form == "overlaps" else self.dimension

    # --- states -----------------------------------------------------------------------------

    def vectors(
        self,
        *,
        kappa: Float[ArrayLike, "..."],
        nu: Float[ArrayLike, "..."],
        theta: Float[ArrayLike, "..."] = 0.0,
        eta: Float[ArrayLike, "..."] = 0.0,
        rho: Float[ArrayLike, "..."] = 0.0,
    ) -> tuple[Any, Any]:
        """Unit vectors (k, v), `[..., n]`, with these overlaps.

        Raises:
            ValueError: no unit vectors have them.
        """
        near = 1e-9 if jnp.result_type(float) == jnp.float64 else 1e-6
        given = (kappa, nu, theta, eta, rho)
        concrete = not any(isinstance(one, Tracer) for one in given)
        number = np if concrete else jnp  # NumPy keeps 64 bits whatever the global setting
        kappa, nu, theta, eta, rho = number.broadcast_arrays(
            *(number.asarray(one, float) for one in given)
        )
        square = 1.0 - kappa**2 - eta**2
        a = number.sqrt(number.maximum(square, 0.0))
        cross = rho - kappa * theta - eta * nu
        b = number.where(a > near, cross / number.where(a > near, a, 1.0), 0.0)
        rest = 1.0 - theta**2 - nu**2 - b**2
        c = number.sqrt(number.maximum(rest, 0.0))
        if concrete:
            bad = (square < -near) | (rest < -near) | (np.abs(cross - a * b) > np.sqrt(near))
            bad |= ~np.isfinite(cross)
            if np.any(bad):
                first = tuple(np.argwhere(bad)[0])
                told = ", ".join(f"{one[first]:.6g}" for one in (kappa, nu, theta, eta, rho))
                raise ValueError(
                    f"Arguments `kappa`, `nu`, `theta`, `eta`, `rho` must be overlaps of unit "
                    f"vectors with the orthogonal unit vectors k*, v*, got {told}. Their Gram "
                    f"matrix must have no negative eigenvalue."
                )
        zero = number.zeros_like(a)
        spare = self.axes_of_vectors - 4
        lost = [part for axis, part in ((2, a), (2, number.abs(b)), (3, c)) if axis >= spare + 4]
        if concrete and any(np.any(part > near) for part in lost):
            raise ValueError(
                f"Argument `dimension` must be at least 4 for these overlaps in the form "
                f"'vectors', got {self.dimension}."
            )
        k = number.stack([kappa, eta, a, zero, *max(spare, 0) * [zero]], axis=-1)
        v = number.stack([theta, nu, b, c, *max(spare, 0) * [zero]], axis=-1)
        return k[..., : self.axes_of_vectors], v[..., : self.axes_of_vectors]

    def overlaps_of(
        self, k: Float[Array, "... n"], v: Float[Array, "... n"]
    ) -> dict[str, Float[Array, "..."]]:
        """κ, ν, θ, η, ρ by the names `kappa`, `nu`, `theta`, `eta`, `rho`."""
        seen = {"kappa": k[..., 0], "nu": v[..., 1], "theta": v[..., 0], "eta": k[..., 1]}
        return seen | {"rho": jnp.sum(k * v, axis=-1)}

    def draw(self, key: PRNGKeyArray) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
        """A random start (k, v): of one key the same in both forms, up to a rotation."""
        normals = jax.random.normal(key, (2, self.dimension))
        k, v = normals
        if self.start == "manifold":
            # as published: k without v*, and v without k* and what else k has
            k, v = k.at[1].set(0.0), v.at[0].set(0.0)
            other = Sphere().project(k.at[0].set(0.0)) if self.dimension > 2 else 0.0 * k
            v = v - (other @ v) * other
        k, v = Sphere().project(k), Sphere().project(v)
        if self.form == "vectors":
            return k, v
        seen = self.overlaps_of(k, v)
        if self.start == "manifold":
            seen = {"kappa": seen["kappa"], "nu": seen["nu"]}  # the rest is rounding
        return self.vectors(**seen)

    # --- the risk ---------------------------------------------------------------------------

    def risk(
        self,
        k: Float[Array, " n"],
        v: Float[Array, " n"],
        gain: Float[ArrayLike, ""],
        square: Float[ArrayLike, ""] = 1.0,
    ) -> Float[Array, ""]:
        """The risk E(T(X) − y)² without the variance of the noise, in closed form (Theorem 1).

        Args:
            k: a unit vector.
            v: a vector.
            gain: λ.
            square: |v|².
        """
        k, v, count = jnp.asarray(k), jnp.asarray(v), self.tokens
        shift, spread = np.sqrt(self.dimension / 2.0), jnp.asarray(self.spread, k.dtype)
        gain = jnp.asarray(gain, k.dtype)
        kappa, eta, theta, nu, rho = k[0], k[1], v[0], v[1], jnp.sum(k * v)
        t, g = gain * shift * kappa, gain * spread
        width = jnp.sqrt(1.0 + 2.0 * g**2)
        u = t / width
        # E erf, E z erf, E (z² − 1) erf and the same of erf², at t + g z
        mean, first = erf(u), g * _slope(u) / width
        second = -2.0 * g**2 * u * _slope(u) / width**2
        mean2, first2 = mean_square_erf(t, g), g * _square_slope(t, g)
        second2 = g**2 * _square_curvature(t, g)
        pull = shift * theta
        right = spread**2 * (nu * mean + eta * rho * second) + spread * eta * pull * first
        own = (pull**2 + spread**2 * square) * mean2 + 2.0 * spread * pull * rho * first2
        own += (spread * rho) ** 2 * second2
        # a token of noise: E erf², E (z² − 1) erf² and E z erf
        wide, wider = 1.0 + 2.0 * gain**2, 1.0 + 4.0 * gain**2
        quiet = 4.0 / np.pi * jnp.arctan(jnp.sqrt(wider)) - 1.0
        loud = 8.0 / np.pi * gain**2 / (wide * jnp.sqrt(wider))
        c = 2.0 * gain / jnp.sqrt(np.pi * wide)
        others = quiet * square + rho**2 * (loud + (count - 2) * c**2)
        others += 2.0 * c * rho * (pull * mean + spread * rho * first)
        return spread**2 - 2.0 * right + own + (count - 1) * others

    # --- prompts ----------------------------------------------------------------------------

    @property
    def samples_serve_once(self) -> bool:
        return self.batch is not None and self.form == "overlaps"

    def sample(self, *, key: PRNGKeyArray, step: Any) -> dict[str, Array]:
        """The prompts of one step: `tokens [batch, L, d]` of which the first one tells, and
        `labels [batch]`; without a batch nothing.

        In the form `"overlaps"` tokens have 4 entries, along k*, v* and the plane of what else k
        and v have, wherever that is; `rest [3]` is the Cholesky factor of a Wishart matrix, by
        Bartlett, for the other d − 4. Normal numbers are drawn in float32.
        """
        if self.batch is None:
            return {}
        axes = 4 if self.form == "overlaps" else self.dimension
        count = self.batch * self.tokens * axes
        # χ² of n degrees is −2 Σ log of n/2 uniform numbers, and a normal one squared if n is odd
        halves = (self.dimension - 4) // 2, (self.dimension - 5) // 2
        logs = sum(halves) if self.form == "overlaps" else 0
        # one call, as every call costs the same again
        below = float(np.nextafter(np.float32(-1.0), np.float32(0.0)))
        key = jax.random.fold_in(key, step)
        uniform = jax.random.uniform(
            key, (logs + count + self.batch + 2,), jnp.float32, minval=below, maxval=1.0
        )
        normals = np.float32(np.sqrt(2.0)) * jax.lax.erf_inv(uniform[logs:])
        spread = jnp.asarray(self.spread, jnp.float32)
        signal = np.zeros((self.tokens, axes), np.float32)
        signal[0, 0] = np.sqrt(self.dimension / 2.0)
        scale = jnp.where(np.arange(self.tokens)[:, None] == 0, spread, jnp.float32(1.0))
        tokens = scale * normals[:count].reshape(self.batch, self.tokens, axes) + signal
        labels = tokens[:, 0, 1] + jnp.asarray(self.noise, jnp.float32) * normals[count:-2]
        drawn = {"tokens": tokens, "labels": labels}
        if self.form == "vectors":
            return drawn
        squares = -2.0 * jnp.log(0.5 * (1.0 - uniform[:logs]))
        odd, even = normals[-1] ** 2, self.dimension % 2 == 0
        large = jnp.sum(squares[: halves[0]]) + (0.0 if even else odd)
        small = jnp.sum(squares[halves[0] :]) + (odd if even else 0.0)
        return drawn | {"rest": jnp.stack([jnp.sqrt(large), normals[-2], jnp.sqrt(small)])}

    def prompt_loss(
        self, k: Float[Array, " n"], v: Float[Array, " n"], gain: Array, sample: dict[str, Array]
    ) -> Float[Array, ""]:
        """The mean of (T(X) − y)² over the prompts of a step.

        Raises:
            TypeError: the form is `"overlaps"`.
        """
        if self.form == "overlaps":
            raise TypeError(
                f"`{type(self).__name__}` has no loss of a batch in the form 'overlaps', which "
                f"knows its gradient only, in law. Use `form='vectors'`, or `regime='joint'`."
            )
        tokens = sample["tokens"]
        found = jnp.sum(erf(gain * (tokens @ k)) * (tokens @ v), axis=-1)
        return jnp.mean((found - sample["labels"]) ** 2)

    def prompt_gradient(
        self, k: Float[Array, " n"], v: Float[Array, " n"], gain: Array, sample: dict[str, Array]
    ) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
        """The gradients of `prompt_loss` in k and v, in law.

        They are sums C X over the tokens, with coefficients C `[2, tokens]` that depend only on the
        tokens' entries along k*, v* and the plane of what else k and v have. Given these, the
        other d − 4 entries are C Z with standard normal Z, in law R Z′ with RRᵀ = CCᵀ, and what
        matters of them is their Gram matrix R (Z′Z′ᵀ) Rᵀ: two vectors of two entries have it.
        """
        if self.form == "vectors":
            grad = jax.grad(self.prompt_loss, argnums=(0, 1))
            return grad(k, v, gain, sample)
        turn, (a, _, _, _), (b, c, _, _) = _frame(k[2:], v[2:])
        zero = jnp.zeros_like(a)
        near_k, near_v = jnp.stack([k[0], k[1], a, zero]), jnp.stack([v[0], v[1], b, c])
        tokens = sample["tokens"]  # [batch, L, 4]
        x = gain * jnp.sum(tokens * near_k, axis=-1)
        seen, read = erf(x), jnp.sum(tokens * near_v, axis=-1)
        misfit = jnp.sum(seen * read, axis=-1) - sample["labels"]
        misfit = 2.0 * misfit / misfit.shape[0]
        of_v = misfit[:, None] * seen
        of_k = misfit[:, None] * gain * _slope(x) * read
        # the spread of each token in the directions that it does not tell
        spread = jnp.where(np.arange(self.tokens) == 0, jnp.asarray(self.spread, x.dtype), 1.0)
        first, second = of_k * spread, of_v * spread
        gram = jnp.sum(first * first), jnp.sum(first * second), jnp.sum(second * second)
        one = jnp.sqrt(gram[0])
        two = gram[1] / jnp.where(one > 0.0, one, 1.0)
        three = jnp.sqrt(jnp.maximum(gram[2] - two**2, 0.0))
        rest = sample["rest"]
        own_k = jnp.sum(of_k[..., None] * tokens, axis=(0, 1))
        own_v = jnp.sum(of_v[..., None] * tokens, axis=(0, 1))
        out_k = one * rest[0], zero
        out_v = two * rest[0] + three * rest[1], three * rest[2]
        grad_k = turn((own_k[2], own_k[3], *out_k))
        grad_v = turn((own_v[2], own_v[3], *out_v))
        return jnp.stack([*own_k[:2], *grad_k]), jnp.stack([*own_v[:2], *grad_v])

    # --- records ----------------------------------------------------------------------------

    def seen(self, k: Float[Array, " n"], v: Float[Array, " n"]) -> dict[str, Float[Array, ""]]:
        """The overlaps, and the distance √(θ² + η² + ρ²) to the manifold where these are 0."""
        seen = self.overlaps_of(k, v)
        off = seen["theta"] ** 2 + seen["eta"] ** 2 + seen["rho"] ** 2
        # √ has no derivative at 0
        off = jnp.where(off > 0.0, jnp.sqrt(jnp.where(off > 0.0, off, 1.0)), 0.0)
        return seen | {"manifold_distance": off}

    def settings(self) -> dict[str, Any]:
        return {
            "dimension": np.asarray(self.dimension),
            "tokens": np.asarray(self.tokens),
            "gain": self.gain,
            "spread": self.spread,
            "noise": self.noise,
        }

    def notes(self) -> dict[str, str]:
        batch = "none" if self.batch is None else f"{self.batch}"
        return {"form": self.form, "start": self.start, "batch": batch}


class SingleLocation(AbstractLocation):
    """v fast, k slow, at a fixed gain.

    `sgd(regime="joint", epsilon=1.0, step_size=α)` is the published projected gradient descent;
    `limit` and `sgd(regime="limit")` have v at the least risk on the unit sphere, or, if `free`, in
    all of space. Batches in the form `"overlaps"` are for the regime `"joint"`.

    Attributes:
        free: whether v may have any length. Then v*(k) is a linear solve.
    """

    free: bool = eqx.field(static=True)

    dims: ClassVar = {"fast": ("axis",), "slow": ("axis",)}

    def __init__(self, *, free: bool = False, **options: Any) -> None:
        """Build the problem; `options` are those that all of single-location regression has.

        Args:
            free: whether v may have any length.
            options: `dimension`, `tokens`, `gain`, `spread`, `noise`, `batch`, `form`, `start`.

        Raises:
            ValueError: `gain` ≤ 0, `spread` or `noise` < 0, too small a `dimension`, no tokens, an
                unknown `form` or `start`.
        """
        super().__init__(**options)
        self.free = free

    def init(self, *, key: PRNGKeyArray) -> State:
        k, v = self.draw(key)
        return State(v, k)

    def state(self, **overlaps: Float[ArrayLike, "..."]) -> State:
        """A state with overlaps `kappa`, `nu` and, 0 unless given, `theta`, `eta`, `rho`, `[...]`.

        Raises:
            ValueError: no unit vectors have them.
        """
        k, v = self.vectors(**overlaps)
        return State(v, k)

    @property
    def geometry(self) -> AbstractGeometry:
        return Sphere()

    @property
    def fast_geometry(self) -> AbstractGeometry:
        return Euclidean() if self.free else Sphere()

    @property
    def fast_solver(self) -> AbstractFastSolver:
        return Quadratic()

    def loss(self, fast: Float[Array, " n"], slow: Float[Array, " n"]) -> Float[Array, ""]:
        """The risk without the variance of the noise."""
        return self.risk(slow, fast, self.gain, jnp.sum(jnp.asarray(fast) ** 2))

    def sample_loss(
        self, fast: Float[Array, " n"], slow: Float[Array, " n"], sample: dict[str, Array]
    ) -> Float[Array, ""]:
        if self.batch is None:
            return self.loss(fast, slow)
        return self.prompt_loss(slow, fast, self.gain, sample)

    def sample_gradient(
        self,
        fast: Float[Array, " n"],
        slow: Float[Array, " n"],
        sample: dict[str, Array],
        *,
        gradient: str = "exact",
    ) -> State:
        if self.batch is None:
            return super().sample_gradient(fast, slow, sample, gradient=gradient)
        of_k, of_v = self.prompt_gradient(slow, fast, self.gain, sample)
        return State(of_v, of_k)

    def observables(self, fast: Float[Array, " n"], slow: Float[Array, " n"]) -> dict[str, Array]:
        return self.seen(slow, fast)


class ScheduledLocation(AbstractLocation):
    """k and v fast, and the gain λ/(1 + τ) falling in slow time τ, the slow variable.

    With the step size α of k and v, ε = r/α is the published schedule λ/(1 + rt) of step t.
    """

    dims: ClassVar = {"fast": ("axis",), "slow": ()}

    def __init__(self, **options: Any) -> None:
        """Build the problem.

        Args:
            options: `dimension`, `tokens`, `gain`, `spread`, `noise`, `batch`, `form`, `start`.

        Raises:
            ValueError: as of `SingleLocation`.
        """
        super().__init__(**options)

    def init(self, *, key: PRNGKeyArray) -> State:
        k, v = self.draw(key)
        return State({"k": k, "v": v}, 0.0 * k[0])

    def state(self, **overlaps: Float[ArrayLike, "..."]) -> State:
        """A state at τ = 0 with overlaps `kappa`, `nu` and, 0 unless given, `theta`, `eta`, `rho`.

        Raises:
            ValueError: no unit vectors have them.
        """
        k, v = self.vectors(**overlaps)
        return State({"k": k, "v": v}, np.zeros(k.shape[:-1]))

    @property
    def fast_geometry(self) -> AbstractGeometry:
        return Product({"k": Sphere(), "v": Sphere()})

    def gain_at(self, slow: Float[Array, "..."]) -> Float[Array, "..."]:
        """λ/(1 + τ)."""
        return jnp.asarray(self.gain, jnp.result_type(slow)) / (1.0 + slow)

    def loss(self, fast: dict[str, Array], slow: Float[Array, ""]) -> Float[Array, ""]:
        """The risk at the gain of the time, without the variance of the noise."""
        return self.risk(fast["k"], fast["v"], self.gain_at(slow))

    def sample_loss(
        self, fast: dict[str, Array], slow: Float[Array, ""], sample: dict[str, Array]
    ) -> Float[Array, ""]:
        if self.batch is None:
            return self.loss(fast, slow)
        return self.prompt_loss(fast["k"], fast["v"], self.gain_at(slow), sample)

    def slow_field(self, fast: dict[str, Array], slow: Float[Array, ""]) -> Float[Array, ""]:
        """1: the slow variable is the time."""
        del fast
        return jnp.ones_like(slow)

    def slow_rate(self, fast: dict[str, Array], slow: Float[Array, ""]) -> Float[Array, ""]:
        """1/(1 + τ), at which the gain falls relative to itself."""
        del fast
        return 1.0 / (1.0 + slow)

    def fastest_rate(
        self, fast: dict[str, Array], slow: Float[Array, ""], epsilon: Array
    ) -> Float[Array, ""]:
        """The fastest rate at the start; there is more than one critical manifold."""
        jacobian = self.jacobian(fast, slow)
        return jnp.linalg.norm(jacobian.at[:-1].divide(epsilon), ord=2)

    def sample_gradient(
        self,
        fast: dict[str, Array],
        slow: Float[Array, ""],
        sample: dict[str, Array],
        *,
        gradient: str = "exact",
    ) -> State:
        del gradient
        k, v, gain = fast["k"], fast["v"], self.gain_at(slow)
        if self.batch is None:
            of_k, of_v = jax.grad(self.risk, argnums=(0, 1))(k, v, gain)
        else:
            of_k, of_v = self.prompt_gradient(k, v, gain, sample)
        return State({"k": of_k, "v": of_v}, -jnp.ones_like(slow))

    def observables(self, fast: dict[str, Array], slow: Float[Array, ""]) -> dict[str, Array]:
        return self.seen(fast["k"], fast["v"]) | {"gain": self.gain_at(slow)}


# --- an orthonormal frame of ℝ⁴ ------------------------------------------------------------------

_Four = tuple[Array, Array, Array, Array]


def _mirror(vector: tuple[Array, ...]) -> Any:
    """The reflection that takes a vector to the first axis; none where it is 0."""
    length = jnp.sqrt(sum(one**2 for one in vector))
    head = vector[0] + jnp.where(vector[0] < 0.0, -length, length)
    normal = (head, *vector[1:])
    square = sum(one**2 for one in normal)
    factor = jnp.where(square > 0.0, 2.0 / jnp.where(square > 0.0, square, 1.0), 0.0)

    def apply(other: tuple[Array, ...]) -> tuple[Array, ...]:
        along = factor * sum(n * x for n, x in zip(normal, other, strict=True))
        return tuple(x - along * n for n, x in zip(normal, other, strict=True))

    return apply


def _frame(
    k: Float[Array, " 4"], v: Float[Array, " 4"]
) -> tuple[Any, tuple[Array, ...], tuple[Array, ...]]:
    """A rotation to a frame whose first axis is along k and whose second one is in the plane of k
    and v, as a function of four entries; and the entries of k and v there."""
    first = _mirror(tuple(k))
    of_k, of_v = first(tuple(k)), first(tuple(v))
    second = _mirror(of_v[1:])
    of_v = (of_v[0], *second(of_v[1:]))

    def turn(entries: _Four) -> tuple[Array, ...]:
        return first((entries[0], *second(entries[1:])))

    return turn, of_k, of_v
