"""A linear problem whose variables are dicts: every answer is a matrix exponential."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.scipy.linalg import expm

import tts_jax as tts


class Linear(tts.AbstractProblem):
    """L = ½|a − A p|² + ½(b − Σp)² + ½k|p|², fast {a, b}, slow {p}."""

    matrix: jax.Array
    decay: jax.Array

    dims: ClassVar = {"fast.a": ("row",), "slow.p": ("column",), "decay": ("column",)}

    def init(self, *, key):
        fast = {"a": jnp.ones(3), "b": jnp.zeros(())}
        return tts.State(fast, {"p": jax.random.normal(key, (2,))})

    def loss(self, fast, slow):
        p = slow["p"]
        gaps = jnp.append(fast["a"] - self.matrix @ p, fast["b"] - jnp.sum(p))
        return (gaps @ gaps + p @ (self.decay * p)) / 2

    def critical(self, slow):
        return {"a": self.matrix @ slow["p"], "b": jnp.sum(slow["p"])}

    def settings(self):
        return {"decay": self.decay}


def linear():
    matrix = jnp.array([[1.0, 0.5], [-0.3, 0.8], [0.2, -1.0]])
    return Linear(matrix, jnp.array([2.0, 5.0]))


def flow(problem, state, epsilon, tau):
    """The states (a, b, p) of the flow at `tau`, `[T, 6]`."""
    images = jnp.concatenate([problem.matrix, jnp.ones((1, 2))])
    fast = jnp.concatenate([-jnp.eye(4), images], axis=1) / epsilon
    pull = -images.T @ images - jnp.diag(problem.decay)
    generator = jnp.concatenate([fast, jnp.concatenate([images.T, pull], axis=1)])
    start = jnp.concatenate([state.fast["a"], state.fast["b"][None], state.slow["p"]])
    return jnp.stack([expm(time * generator) @ start for time in tau])


def limit(problem, state, tau):
    """The slow variable of the limit at `tau`, `[T, 2]`."""
    return state.slow["p"] * jnp.exp(-jnp.asarray(tau)[:, None] * problem.decay)
