"""Shared by all tests: float64 on, the paper's problem, starts, the published code's results."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import tts_jax as tts


jax.config.update("jax_enable_x64", True)

JUMPS = [0.2, 0.35, 0.5, 0.65, 0.8]
VALUES = [1.0, 5.0, 1.0, 3.0, 1.0, 5.0]


@pytest.fixture(scope="session")
def target():
    return tts.PiecewiseConstant(JUMPS, VALUES)


@pytest.fixture(scope="session")
def problem(target):
    """The paper's univariate problem."""
    return tts.Univariate(target, neurons=20, eta=4e-3, noise=1.0)


@pytest.fixture(scope="session")
def starts(problem):
    """32 random starts."""
    return jax.vmap(lambda key: problem.init(key=key))(jax.random.split(jax.random.key(7), 32))


@pytest.fixture(scope="session")
def separated(problem):
    """A start whose gaps are all at least 10 widths and whose hitting times differ."""
    slow = np.array([0.05, 0.10, 0.16, 0.25, 0.29, 0.33, 0.40, 0.44, 0.48, 0.56])
    slow = np.concatenate([slow, [0.60, 0.63, 0.70, 0.73, 0.78, 0.85, 0.89, 0.93, 0.96, 0.99]])
    return problem.state(slow=slow)


@pytest.fixture(scope="session")
def published():
    """Results of the published code on the one-dimensional experiments."""
    return json.loads((Path(__file__).parent / "data" / "published_1d.json").read_text())
