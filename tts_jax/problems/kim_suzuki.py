"""Nonlinear features in context: a mean-field network below a linear attention.

The two-timescale problem of Kim & Suzuki (2024, arXiv 2402.01258). N particles (a_j, w_j) make k
features of an input, and linear attention with the matrix W predicts the label of a query from a
prompt of n labelled inputs, all with the features' help:

    h(x) = (1/N) Σ_j a_j s(w_j·x)                                s: the logistic function
    ŷ(x) = (1/n) Σ_i y_i h(x_i)ᵀ W h(x)

Every prompt has a task v of its own, y = v·f⁰(x) with E vvᵀ = I. Let S = E hhᵀ and S₀ = E f⁰hᵀ. The
loss is half the mean square of ŷ − y over tasks, prompts and queries:

    L(W, h) = ½ E|f⁰ − S₀Wh|²                                                      n = ∞
            + (1/2n) (E|f⁰|² hᵀWSWᵀh − tr S₀WSWᵀS₀ᵀ)                               else

W is fast. With M = (1 − 1/n) S₀ᵀS₀ + (1/n) E|f⁰|²hhᵀ, ∇_W L = MWS − S₀ᵀS₀. So W* = M⁻¹S₀ᵀS₀S⁻¹, and
S⁻¹ at n = ∞ (Lemma 3.1), where what is left is L(h) = ½ tr(E f⁰f⁰ᵀ − S₀S⁻¹S₀ᵀ). The particles are
slow. E is the mean over a given set of inputs, from which prompts and queries are drawn.

`birth_death` is an addition of ours: particles with weights, which grow where the first variation
of the loss is below its mean.
"""

import math
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, PRNGKeyArray, PyTree

from tts_jax import AbstractProblem, State, checks
from tts_jax.fast import AbstractFastSolver, Solution, condition_of, least_norm
from tts_jax.geometry import AbstractGeometry, Particles


class Prompts(NamedTuple):
    """Prompts of one step.

    Attributes:
        tasks: v of each prompt, standard normal.
        context: which inputs are in the prompt.
        query: which input is asked for.
    """

    tasks: Float[Array, "B k"]
    context: Int[Array, "B n"]
    query: Int[Array, " B"]


class Moments(NamedTuple):
    """What the loss knows about the features.

    Attributes:
        gram: S = E hhᵀ.
        cross: S₀ = E f⁰hᵀ.
        system: M, of which ∇_W L = MWS − S₀ᵀS₀.
    """

    gram: Float[Array, "k k"]
    cross: Float[Array, "k k"]
    system: Float[Array, "k k"]


class WeightedParticles(AbstractGeometry):
    """Particles with weights p_j that stand for the measure Σ_j p_j δ_{x_j}, ours.

    The slow variable is a dict with the entry `log_weight`, the logarithms of the weights `[N]`, of
    which Σ p_j = 1; all other entries are particles along their first axis. Where V is the first
    variation of the loss, the velocity is that of the Wasserstein–Fisher–Rao gradient flow

        dx_j/dτ = −∇V(x_j),         d(log p_j)/dτ = −rate · (V(x_j) − Σ_i p_i V(x_i)).

    Attributes:
        rate: of births and deaths.
    """

    rate: Float[ArrayLike, ""]

    def project(self, point: PyTree[Array]) -> PyTree[Array]:
        return point | {"log_weight": jax.nn.log_softmax(point["log_weight"])}

    def tangent(self, point: PyTree[Array], vector: PyTree[Array]) -> PyTree[Array]:
        own = vector["log_weight"]
        mean = jnp.sum(jax.nn.softmax(point["log_weight"]) * own)
        return vector | {"log_weight": own - mean}

    def velocity(self, point: PyTree[Array], force: PyTree[Array]) -> PyTree[Array]:
        weight = jax.nn.softmax(point["log_weight"])
        # a particle without weight feels no force, and stays
        weight = jnp.maximum(weight, jnp.finfo(weight.dtype).tiny)

        def per_weight(leaf: Array) -> Array:
            return leaf / weight.reshape(-1, *(1,) * (leaf.ndim - 1))

        moved = jax.tree.map(per_weight, force)
        return moved | {"log_weight": self.rate * moved["log_weight"]}


class AttentionSolver(AbstractFastSolver):
    """W* = M⁻¹S₀ᵀS₀S⁻¹, and S⁻¹ for infinite prompts, of the population whatever the sample.

    Where S or M is singular its inverse is the pseudoinverse. `condition` is that of the equations
    for W, the product of theirs, and infinite where W* is not unique; `gram_condition` that of S.
    """

    def solve(
        self,
        problem: "InContext",
        slow: PyTree[Array],
        sample: Any = None,
        start: Any = None,
    ) -> Solution:
        del sample, start
        gram, cross, system = problem.moments(slow)
        eye = jnp.eye(gram.shape[0], dtype=gram.dtype)
        inverse = least_norm(gram, lambda at: eye - gram @ at, jnp.zeros_like(gram))
        fast, target = inverse, cross.T @ cross
        if problem.prompt_length is not None:
            right = target @ inverse
            fast = least_norm(system, lambda at: right - system @ at, jnp.zeros_like(gram))
        slope = system @ fast @ gram - target
        conditions = [
            condition_of(jnp.linalg.eigvalsh(jax.lax.stop_gradient(one))) for one in (gram, system)
        ]
        info = {"residual": jnp.max(jnp.abs(slope)), "condition": conditions[0] * conditions[1]}
        return Solution(fast, info | {"gram_condition": conditions[0]})


class InContext(AbstractProblem):
    """In-context learning with features a s(w·x), W fast.

    Attributes:
        inputs: the inputs, `[m, d]`.
        targets: f⁰ at the inputs, `[m, k]`.
        particles: their number N.
        prompt_length: n, `None` for the limit n → ∞.
        prompts: prompts that `sgd` draws per step, each with a task and a query; `None` for the
            loss itself, which is then gradient descent.
        birth_death: the rate of births and deaths, ours; `None` for particles of equal weights.
        teacher: the weights of k logistic neurons that f⁰ is made of, `[k, d]`, if there are such.
    """

    inputs: Float[Array, "m d"]
    targets: Float[Array, "m k"]
    particles: int = eqx.field(static=True)
    prompt_length: int | None = eqx.field(static=True)
    prompts: int | None = eqx.field(static=True)
    birth_death: float | None
    teacher: Float[Array, "k d"] | None

    dims: ClassVar = {
        "fast": ("key", "query"),
        "slow.a": ("particle", "feature"),
        "slow.w": ("particle", "coordinate"),
        "slow.log_weight": ("particle",),
    }

    def __init__(
        self,
        inputs: Float[ArrayLike, "m d"],
        targets: Float[ArrayLike, "m k"],
        *,
        particles: int = 100,
        prompt_length: int | None = None,
        prompts: int | None = None,
        birth_death: float | None = None,
        teacher: Float[ArrayLike, "k d"] | None = None,
    ) -> None:
        """Build the problem.

        Raises:
            ValueError: shapes that do not go together, numbers that are not finite, fewer inputs
                or particles than features, a prompt shorter than the number of features, `prompts`
                without a `prompt_length`.
        """
        self.inputs, self.targets = _table("inputs", inputs), _table("targets", targets)
        count, features = self.targets.shape
        if count != self.inputs.shape[0]:
            raise ValueError(
                f"Argument `targets` must have one row for each of the {self.inputs.shape[0]} "
                f"inputs, got shape {self.targets.shape}."
            )
        if count < features:
            raise ValueError(
                f"Argument `inputs` must have at least {features} rows, one for each feature, or "
                f"their Gram matrix is singular, got {count}. Add inputs."
            )
        least = "The least is k, the number of features."
        self.particles = checks.integer("particles", particles, features, least)
        self.prompt_length = self.prompts = None
        if prompt_length is not None:
            # n pairs see n directions of a task at most
            self.prompt_length = checks.integer("prompt_length", prompt_length, features, least)
        if prompts is not None:
            self.prompts = checks.positive_integer("prompts", prompts, "Or leave it out.")
            if prompt_length is None:
                raise ValueError(
                    f"Argument `prompts` must be left out for infinite prompts, got {prompts}. "
                    f"Pass `prompt_length=` to draw prompts."
                )
        if birth_death is not None and not (0.0 < birth_death < math.inf):
            raise ValueError(
                f"Argument `birth_death` must be positive and finite, got {birth_death!r}. Leave "
                f"it out for particles of equal weights."
            )
        self.birth_death = birth_death
        self.teacher = None if teacher is None else _table("teacher", teacher)
        form = (features, self.inputs.shape[1])
        if self.teacher is not None and self.teacher.shape != form:
            raise ValueError(
                f"Argument `teacher` must have shape {form}, one row for each feature, got "
                f"{self.teacher.shape}."
            )

    @classmethod
    def of_teacher(
        cls,
        *,
        key: PRNGKeyArray,
        dimension: int = 10,
        features: int = 3,
        samples: int = 1500,
        **options: Any,
    ) -> "InContext":
        """Gaussian inputs and f⁰ of k logistic neurons, mixed so that E f⁰f⁰ᵀ = I.

        Args:
            key: for the inputs and the neurons' weights, all standard normal.
            dimension: d.
            features: k.
            samples: number of inputs.
            options: further arguments of `InContext`.

        Raises:
            ValueError: a number below 1, neurons that are not independent on the inputs.
        """
        sizes = {"dimension": dimension, "features": features, "samples": samples}
        for name, value in sizes.items():
            checks.positive_integer(name, value, "Raise it.")
        places, points = jax.random.split(key)
        inputs, teacher = (
            _normal(one, (size, dimension)) for one, size in ((points, samples), (places, features))
        )
        neurons = _logistic(inputs @ teacher.T)
        values, vectors = np.linalg.eigh(neurons.T @ neurons / samples)
        if not values[0] > 1e-12 * values[-1]:
            raise ValueError(
                f"Argument `samples` must be large enough for {features} independent neurons, got "
                f"{samples}. Raise it."
            )
        targets = neurons @ (vectors / np.sqrt(values)) @ vectors.T
        return cls(inputs, targets, teacher=teacher, **options)

    # --- states -----------------------------------------------------------------------------

    def init(self, *, key: PRNGKeyArray) -> State:
        """Standard normal particles, of equal weights, and W = I."""
        kind, sizes = jnp.result_type(float), (self.targets.shape[1], self.inputs.shape[1])
        # drawn in float32, so that they do not depend on the precision
        slow = {
            name: jax.random.normal(own, (self.particles, size), jnp.float32).astype(kind)
            for name, own, size in zip("aw", jax.random.split(key), sizes, strict=True)
        }
        if self.birth_death is not None:
            slow["log_weight"] = jnp.full(self.particles, -math.log(self.particles), kind)
        return State(jnp.eye(sizes[0], dtype=kind), slow)

    def saddle(self, *, key: PRNGKeyArray, missing: int = 1) -> dict[str, np.ndarray]:
        """Particles at a strict saddle of the reduced flow at n = ∞, where L = `missing`/2.

        Half of them are at the teacher's neurons and make k − `missing` coordinates of f⁰, the
        others are random and make `missing` features u, E uuᵀ = I, without correlation to f⁰.

        Raises:
            ValueError: no teacher, `missing` not from 1 to k, too few particles, targets that the
                teacher does not make.
        """
        if self.teacher is None:
            raise ValueError("A `saddle` needs a teacher. Build the problem by `of_teacher`.")
        features, dimension = self.teacher.shape
        if checks.positive_integer("missing", missing, "It is at most k.") > features:
            raise ValueError(f"Argument `missing` must be at most {features}, got {missing}.")
        known, kept = self.particles // 2, features - missing
        free = self.particles - known
        if known < features or free <= features + missing:
            raise ValueError(
                f"A `saddle` needs at least {2 * (features + missing + 1)} particles, got "
                f"{self.particles}. Raise `particles`."
            )
        places, values = jax.random.split(key)
        w = np.concatenate(
            [np.resize(self.teacher, (known, dimension)), _normal(places, (free, dimension))]
        )
        heights = _logistic(self.inputs @ w.T)
        mixed, *_ = np.linalg.lstsq(heights[:, :features], self.targets, rcond=None)
        if not np.allclose(heights[:, :features] @ mixed, self.targets, atol=1e-8):
            raise ValueError("A `saddle` needs targets that are mixtures of the teacher's neurons.")
        a = np.zeros((self.particles, features))
        shared = np.bincount(np.arange(known) % features)[np.arange(known) % features]
        a[:known, :kept] = self.particles * np.resize(mixed, (known, features))[:, :kept]
        a[:known] /= shared[:, None]
        seen = self.targets.T @ heights[:, known:]  # what the random ones have in common with f⁰
        random = _normal(values, (free, missing))
        random -= np.linalg.pinv(seen) @ (seen @ random)
        made = heights[:, known:] @ random / self.particles
        gram = made.T @ made / len(made)
        a[known:, kept:] = random @ np.linalg.inv(np.linalg.cholesky(gram)).T
        return {"a": a, "w": w}

    @property
    def geometry(self) -> AbstractGeometry:
        if self.birth_death is None:
            return Particles()
        return WeightedParticles(self.birth_death)

    @property
    def fast_solver(self) -> AttentionSolver:
        return AttentionSolver()

    # --- losses -------------------------------------------------------------------------------

    def features(
        self, slow: dict[str, Array], inputs: Float[ArrayLike, "... d"]
    ) -> Float[Array, "... k"]:
        """h at inputs."""
        a, w = jnp.asarray(slow["a"]), jnp.asarray(slow["w"])
        heights = jax.nn.sigmoid(jnp.asarray(inputs, w.dtype) @ w.T)
        if self.birth_death is None:
            return heights @ a / self.particles
        return heights @ (jax.nn.softmax(slow["log_weight"])[:, None] * a)

    def predict(
        self,
        fast: Float[Array, "k k"],
        slow: dict[str, Array],
        inputs: Float[ArrayLike, "n d"],
        labels: Float[ArrayLike, " n"],
        queries: Float[ArrayLike, "... d"],
    ) -> Float[Array, "..."]:
        """ŷ at queries, of a prompt of inputs and labels of any length."""
        h = self.features(slow, inputs)
        mean = jnp.asarray(labels, h.dtype) @ h / len(h)
        return self.features(slow, queries) @ jnp.asarray(fast, h.dtype).T @ mean

    def moments(self, slow: dict[str, Array]) -> Moments:
        """S, S₀ and M."""
        h, f = self._on_inputs(slow)
        gram, cross = h.T @ h / len(h), f.T @ h / len(h)
        system = cross.T @ cross
        if self.prompt_length is not None:
            weighted = jnp.sum(f**2, axis=1)[:, None] * h
            system += (h.T @ weighted / len(h) - system) / self.prompt_length
        return Moments(gram, cross, system)

    def loss(self, fast: Float[Array, "k k"], slow: dict[str, Array]) -> Float[Array, ""]:
        """L(W, h)."""
        h, f = self._on_inputs(slow)
        cross = f.T @ h / len(h)
        answer = h @ (cross @ fast).T
        square = jnp.mean(jnp.sum((f - answer) ** 2, axis=1))
        if self.prompt_length is not None:
            mixed = h @ fast
            each = jnp.sum(f**2, axis=1) * jnp.sum(mixed @ (h.T @ h / len(h)) * mixed, axis=1)
            square += jnp.mean(each - jnp.sum(answer**2, axis=1)) / self.prompt_length
        return square / 2.0

    def sample(self, *, key: PRNGKeyArray, step: Any) -> Prompts | tuple[()]:
        """The prompts of one step; `()` for the loss itself."""
        if self.prompts is None or self.prompt_length is None:
            return ()
        count, features = self.targets.shape
        keys = jax.random.split(jax.random.fold_in(key, step), 3)
        tasks = jax.random.normal(keys[0], (self.prompts, features), jnp.float32)
        context = jax.random.randint(keys[1], (self.prompts, self.prompt_length), 0, count)
        query = jax.random.randint(keys[2], (self.prompts,), 0, count)
        return Prompts(tasks.astype(jnp.result_type(float)), context, query)

    def sample_loss(
        self, fast: Float[Array, "k k"], slow: dict[str, Array], sample: Prompts | tuple[()]
    ) -> Float[Array, ""]:
        """Half the mean square of ŷ − y over prompts."""
        if not isinstance(sample, Prompts):
            return self.loss(fast, slow)
        h, f = self._on_inputs(slow)
        tasks = sample.tasks.astype(h.dtype)
        labels = jnp.einsum("bk,bnk->bn", tasks, f[sample.context])
        mean = jnp.einsum("bn,bnk->bk", labels, h[sample.context]) / sample.context.shape[1]
        answer = jnp.sum((mean @ fast) * h[sample.query], axis=1)
        return jnp.mean((answer - jnp.sum(tasks * f[sample.query], axis=1)) ** 2) / 2.0

    def relaxation_rate(
        self, fast: Float[Array, "k k"], slow: dict[str, Array]
    ) -> Float[Array, ""]:
        """The smallest eigenvalue of ∇²_W L = S ⊗ M."""
        del fast
        gram, _, system = self.moments(slow)
        rate = jnp.ones((), gram.dtype)
        for matrix in (gram, system):
            values = jnp.linalg.eigvalsh(matrix)
            hidden = len(values) * jnp.finfo(values.dtype).eps * values[-1]
            rate = rate * jnp.where(values[0] > hidden, values[0], 0.0)
        return rate

    def observables(self, fast: Float[Array, "k k"], slow: dict[str, Array]) -> dict[str, Array]:
        """`effective_particles`, 1/Σ p², of weighted particles."""
        if self.birth_death is None:
            return {}
        return {"effective_particles": 1.0 / jnp.sum(jax.nn.softmax(slow["log_weight"]) ** 2)}

    def settings(self) -> dict[str, Any]:
        length = math.inf if self.prompt_length is None else self.prompt_length
        return {
            "prompt_length": np.asarray(float(length)),
            "birth_death": np.asarray(0.0 if self.birth_death is None else self.birth_death),
            "data": np.asarray(self.inputs.shape[0]),
        }

    def _on_inputs(self, slow: dict[str, Array]) -> tuple[Array, Array]:
        """h and f⁰ at the inputs."""
        h = self.features(slow, self.inputs)
        return h, jnp.asarray(self.targets, h.dtype)


# --- arguments ------------------------------------------------------------------------------


def _table(name: str, value: Any) -> Any:
    table = np.asarray(value, dtype=np.float64)
    if table.ndim != 2 or 0 in table.shape:
        raise ValueError(
            f"Argument `{name}` must have shape [rows, columns], neither of them 0, got shape "
            f"{table.shape}. Give one row for each input."
        )
    return checks.finite(name, table, "Clean the data.")


def _normal(key: PRNGKeyArray, shape: tuple[int, ...]) -> np.ndarray:
    return np.asarray(jax.random.normal(key, shape, jnp.float32), dtype=np.float64)


def _logistic(z: Any) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-z))
