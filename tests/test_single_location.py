"""Single-location regression: the risk, the closure in five overlaps, and the published runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad
from scipy.special import erf, owens_t

import tts_jax as tts
from tts_jax.problems import single_location


KEY = jax.random.key(0)
# the published descent; runs of 30 seeds share what is compiled
OPTIONS = {"key": KEY, "epsilon": 1.0, "step_size": 4e-3, "tau": [0.0, 80.0]}
NAMES = ("kappa", "nu", "theta", "eta", "rho")
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(120)
WEIGHTS = WEIGHTS / WEIGHTS.sum()


def reached(run, near=0.95):
    """Which seeds end at one of the two minima (k, v) = ±(k*, v*)."""
    kappa, nu = (run.observables[name][:, -1] for name in ("kappa", "nu"))
    return (np.abs(kappa) > near) & (np.abs(nu) > near) & (kappa * nu > 0)


def unit(count, axes, seed=0):
    vectors = np.random.default_rng(seed).normal(size=(count, axes))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


# --- the risk -------------------------------------------------------------------------------------


def quadrature(problem, kappa, nu, theta, eta, rho, gain=None, square=1.0):
    """The risk by Gauss–Hermite quadrature of its expectations over one normal number."""
    count, spread = problem.tokens, float(problem.spread)
    gain = float(problem.gain) if gain is None else gain
    shift, z = np.sqrt(problem.dimension / 2), NODES
    seen, noise = erf(gain * (shift * kappa + spread * z)), erf(gain * z)
    read = shift * theta + spread * rho * z
    c = WEIGHTS @ (z * noise)
    risk = spread**2 + WEIGHTS @ (seen**2 * (read**2 + spread**2 * (square - rho**2)))
    risk -= 2 * WEIGHTS @ (seen * (spread**2 * (nu - eta * rho) + spread * eta * z * read))
    risk += (count - 1) * (WEIGHTS @ (noise**2 * (rho**2 * z**2 + square - rho**2)))
    risk += (count - 1) * (count - 2) * c**2 * rho**2
    return risk + 2 * (count - 1) * c * rho * (WEIGHTS @ (seen * read))


def test_the_mean_square_of_erf():
    """By Owen's function, by quadrature, and its derivatives by differences."""
    t, g = np.meshgrid(np.linspace(-14.0, 14.0, 57), [0.0, 0.05, 0.3, 0.64, 1.4, 3.0])
    h, a = np.sqrt(2) * t / np.sqrt(1 + 2 * g**2), 1 / np.sqrt(1 + 4 * g**2)
    with jax.enable_x64(True):
        zeta = jax.jit(single_location.mean_square_erf)
        np.testing.assert_allclose(
            zeta(jnp.asarray(t), jnp.asarray(g)), 1 - 8 * owens_t(h, a), atol=1e-14
        )
        at = 1.3, 0.7

        def density(z):
            return erf(at[0] + at[1] * z) ** 2 * np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)

        expected = quad(density, -12, 12, epsabs=1e-13)[0]
        np.testing.assert_allclose(zeta(*map(jnp.asarray, at)), expected, rtol=1e-12)
        first = jax.jit(jax.grad(zeta, argnums=(0, 1)))
        hessian = jax.jit(jax.hessian(zeta, argnums=(0, 1)))
        step, found = 1e-5, first(*at)
        for axis in range(2):
            up, down = (tuple(np.add(at, sign * step * np.eye(2)[axis])) for sign in (1, -1))
            slope = (zeta(*map(jnp.asarray, up)) - zeta(*map(jnp.asarray, down))) / (2 * step)
            np.testing.assert_allclose(found[axis], slope, rtol=1e-8)
            bend = (np.array(first(*up)) - np.array(first(*down))) / (2 * step)
            np.testing.assert_allclose(np.array(hessian(*at)[axis]), bend, rtol=1e-7)


@pytest.mark.parametrize("gain", [0.05, 0.1, 0.9])
def test_the_risk_is_that_of_quadrature(gain):
    problem = tts.SingleLocation(gain=gain, tokens=7)
    ks, vs = unit(40, 6), unit(40, 6, 1)
    ks[:10, 0] *= 9.0
    ks /= np.linalg.norm(ks, axis=1, keepdims=True)
    with jax.enable_x64(True):
        found = jax.jit(jax.vmap(problem.loss))(vs, ks)
        long = jax.jit(jax.vmap(problem.loss))(1.7 * vs, ks)
        seen = problem.overlaps_of(ks, vs)
    seen = {name: np.asarray(seen[name]) for name in NAMES}
    rows = [[seen[name][row] for name in NAMES] for row in range(40)]
    expected = [quadrature(problem, *row) for row in rows]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    factor = np.array([1.0, 1.7, 1.7, 1.0, 1.7])  # a longer v
    expected = [quadrature(problem, *(row * factor), square=1.7**2) for row in rows]
    np.testing.assert_allclose(long, expected, rtol=1e-12)


def test_the_risk_is_that_of_prompts():
    """|mean − R| < 4 standard errors over 10⁵ prompts in NumPy, at d = 20."""
    problem = tts.SingleLocation(dimension=20, tokens=6, gain=0.6, form="vectors", noise=0.3)
    rng = np.random.default_rng(0)
    (k,), (v,) = unit(1, 20, 4), unit(1, 20, 5)
    k[0] += 1.0
    k /= np.linalg.norm(k)
    tokens = rng.normal(size=(100_000, 6, 20))
    tokens[:, 3] *= np.sqrt(0.5)  # any one may be the token that tells
    tokens[:, 3, 0] += np.sqrt(10)
    labels = tokens[:, 3, 1] + 0.3 * rng.normal(size=100_000)
    error = (np.sum(erf(0.6 * tokens @ k) * (tokens @ v), axis=1) - labels) ** 2
    with jax.enable_x64(True):
        risk = float(problem.loss(v, k)) + 0.3**2
    assert abs(error.mean() - risk) < 4 * error.std() / np.sqrt(error.size)
    assert risk > 1.0


def test_prompts_have_the_risk_as_their_mean():
    problem = tts.SingleLocation(dimension=10, tokens=4, gain=0.6, batch=4000, form="vectors")
    (k,), (v,) = unit(1, 10, 4), unit(1, 10, 5)

    def loss(step):
        return problem.sample_loss(v, k, problem.sample(key=KEY, step=step))

    losses = jax.lax.map(jax.jit(loss), jnp.arange(50))
    assert abs(np.mean(losses) - problem.loss(v, k)) < 4 * np.std(losses) / np.sqrt(50)


def test_on_the_manifold():
    """The risk there, its slope in κ, its stationary points, and the derivatives off it are 0."""
    problem = tts.SingleLocation()
    gain, spread, shift = 0.1, np.sqrt(0.5), np.sqrt(200.0)
    c = gain * shift / np.sqrt(1 + 2 * gain**2 * spread**2)
    inner = c / np.sqrt(1 + 4 * gain**2 * spread**2)

    def slope(kappa, nu):
        bend = 2 / np.sqrt(np.pi) * np.exp(-((c * kappa) ** 2))
        return -2 * spread**2 * c * bend * (nu - erf(inner * kappa))

    def of_overlaps(overlaps):
        kappa, nu, theta, eta, rho = overlaps
        rest = jnp.sqrt(1.0 - kappa**2 - eta**2)
        b = (rho - kappa * theta - eta * nu) / rest
        k = jnp.stack([kappa, eta, rest, 0.0 * b])
        return problem.risk(k, jnp.stack([theta, nu, b, 0.0 * b]), problem.gain)

    with jax.enable_x64(True):
        slopes, loss = jax.jit(jax.grad(of_overlaps)), jax.jit(problem.loss)
        zetas, both = jax.jit(single_location.mean_square_erf), jax.jit(problem.fields)
        for kappa, nu in [(0.3, -0.5), (-0.2, 0.1), (0.7, 0.9)]:
            state = problem.state(kappa=kappa, nu=nu)
            zeta = zetas(jnp.array([gain * shift * kappa, 0.0]), jnp.array([gain * spread, gain]))
            expected = spread**2 - 2 * spread**2 * nu * erf(c * kappa) + spread**2 * zeta[0]
            np.testing.assert_allclose(loss(*state), expected + 9 * zeta[1], rtol=1e-13)
            found = slopes(jnp.array([kappa, nu, 0.0, 0.0, 0.0]))
            expected = [slope(kappa, nu), -2 * spread**2 * erf(c * kappa), 0.0, 0.0, 0.0]
            np.testing.assert_allclose(found, expected, atol=1e-13)
        for kappa, nu in [(1, 1), (-1, -1), (1, -1), (-1, 1), (0, 0)]:
            fields = both(*problem.state(kappa=kappa, nu=nu))
            np.testing.assert_allclose(np.concatenate(fields), 0.0, atol=1e-13)
        bend = jax.jit(jax.hessian(of_overlaps))(jnp.zeros(5))[:2, :2]
        assert np.linalg.eigvalsh(bend)[0] < 0.0 < np.linalg.eigvalsh(bend)[1]
    # ±(1, 1) are the minima on [−1, 1]²: κ and ν are pushed out there, and not at (1, −1)
    assert slope(1.0, 1.0) < 0.0 < slope(-1.0, -1.0)
    assert slope(1.0, -1.0) > 0.0
    np.testing.assert_allclose(problem.loss(*problem.state(kappa=1, nu=1)), 0.1135, atol=5e-5)


@pytest.mark.parametrize("form", ["overlaps", "vectors"])
def test_gradients_by_differences(form):
    problem = tts.SingleLocation(dimension=9, tokens=5, gain=0.7, form=form)
    axes = problem.axes_of_vectors
    (k,), (v,) = unit(1, axes, 2), unit(1, axes, 3)
    step = 1e-5
    with jax.enable_x64(True):
        loss = jax.jit(lambda both: problem.loss(both[axes:], both[:axes]))
        both = np.concatenate([k, v])
        found = problem.fields(v, k)
        moves = step * np.eye(2 * axes)
        slopes = [(loss(both + move) - loss(both - move)) / (2 * step) for move in moves]
    # along the spheres, where the formula is that of unit vectors
    for mine, point, slope in zip(found, (v, k), (slopes[axes:], slopes[:axes]), strict=True):
        slope = np.array(slope)
        np.testing.assert_allclose(mine, -(slope - (slope @ point) * point), atol=1e-8)


# --- projected gradient descent, and its closure --------------------------------------------------


def test_steps_are_those_of_numpy():
    """Projected descent in NumPy, with differences of the risk by quadrature."""
    problem = tts.SingleLocation(dimension=8, tokens=5, gain=0.7, form="vectors")
    (k,), (v,) = unit(1, 8, 2), unit(1, 8, 3)
    start = tts.State(v, k)

    def risk(k, v):
        return quadrature(problem, k[0], v[1], v[0], k[1], k @ v)

    def slopes(*both):
        found = []
        for which in range(2):
            moves = np.zeros((8, 2, 8))
            moves[:, which] = 1e-5 * np.eye(8)
            found.append([(risk(*(both + m)) - risk(*(both - m))) / 2e-5 for m in moves])
        return np.array(found)

    def moved(x, slope):
        x = x - 0.02 * (slope - (slope @ x) * x)
        return x / np.linalg.norm(x)

    for _ in range(4):
        of_k, of_v = slopes(k, v)
        k, v = moved(k, of_k), moved(v, of_v)
    run = tts.sgd(problem, key=KEY, state=start, epsilon=1.0, step_size=0.02, tau=[0.08])
    np.testing.assert_allclose(run.slow[0, -1], k, atol=1e-8)
    np.testing.assert_allclose(run.fast[0, -1], v, atol=1e-8)


@pytest.fixture(scope="module")
def starts():
    """Overlaps of 30 pairs of random vectors."""
    ks, vs = unit(30, 12, 6), unit(30, 12, 7)
    rows = [ks[:, 0], vs[:, 1], vs[:, 0], ks[:, 1], np.sum(ks * vs, axis=1)]
    return dict(zip(NAMES, rows, strict=True))


def test_five_overlaps_are_closed(starts):
    """The same runs in ℝ⁶ and in ℝ⁴⁰⁰, turned at random around k* and v*."""
    few, many = tts.SingleLocation(gain=0.5), tts.SingleLocation(gain=0.5, form="vectors")
    state = many.state(**starts)
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(398, 398)))
    for part in state:
        part[:, 2:] = part[:, 2:] @ turn
    options = {"key": KEY, "epsilon": 0.5, "step_size": 4e-3, "tau": [0.0, 1.0]}
    short = tts.sgd(few, state=few.state(**starts), **options)
    long = tts.sgd(many, state=state, **options)
    for name in NAMES:
        np.testing.assert_allclose(short.observables[name][:, 0], starts[name], atol=1e-14)
        np.testing.assert_allclose(
            short.observables[name], long.observables[name], rtol=0, atol=1e-11
        )
    np.testing.assert_allclose(short.loss, long.loss, rtol=1e-11)
    assert np.median(np.abs(short.observables["kappa"][:, -1] - starts["kappa"])) > 1e-2
    np.testing.assert_allclose(np.linalg.norm(long.slow, axis=-1), 1.0, atol=1e-14)


def test_both_forms_start_from_the_same_vectors():
    for start in ("sphere", "manifold"):
        both = [
            tts.SingleLocation(dimension=30, form=form, start=start).init(key=jax.random.key(3))
            for form in ("overlaps", "vectors")
        ]
        few, many = (
            tts.SingleLocation().overlaps_of(jnp.asarray(one.slow), jnp.asarray(one.fast))
            for one in both
        )
        for name in NAMES:
            np.testing.assert_allclose(few[name], many[name], atol=1e-6)
        assert (float(few["rho"]) == 0.0) == (start == "manifold")


def test_the_minimal_experiment():
    """All 30 starts on the manifold reach a minimum and never leave the manifold."""
    problem = tts.SingleLocation(start="manifold")
    with jax.enable_x64(True):  # one program for all starts
        state = jax.vmap(lambda key: problem.init(key=key))(jax.random.split(KEY, 30))
    problem = tts.SingleLocation()
    run = tts.sgd(problem, state=state, **OPTIONS)
    assert np.all(reached(run))
    with jax.enable_x64(True):
        least = float(problem.loss(*problem.state(kappa=1, nu=1)))
    np.testing.assert_allclose(run.loss[:, -1], least, rtol=0.01)
    assert np.all(run.observables["manifold_distance"] == 0.0)
    assert np.all(np.abs(run.observables["kappa"][:, 0]) < 4 / np.sqrt(400))


def test_from_the_sphere():
    """λ = .9 reaches no minimum; λ = .1 some, the others the one with the roles swapped."""
    wide = tts.sgd(tts.SingleLocation(gain=0.9), seeds=30, **OPTIONS | {"step_size": 1e-3})
    assert not np.any(reached(wide))
    run = tts.sgd(tts.SingleLocation(gain=0.1), seeds=30, **OPTIONS)
    good = reached(run)
    assert 9 <= good.sum() <= 24
    seen = {name: np.abs(run.observables[name][~good, -1]) for name in NAMES}
    np.testing.assert_allclose(seen["kappa"], 0.0, atol=0.02)
    np.testing.assert_allclose(seen["eta"], 1.0, atol=0.02)
    np.testing.assert_allclose(seen["theta"], 0.63, atol=0.01)
    np.testing.assert_allclose(run.loss[~good, -1], 0.1155, rtol=0.01)


# --- batches --------------------------------------------------------------------------------------


def test_a_batch_in_the_plane_is_a_batch_in_space():
    """One step from prompts in ℝ¹¹, and from their entries in the plane with the Wishart matrix of
    the others: the same overlaps."""
    options = {"dimension": 11, "tokens": 3, "gain": 0.6, "batch": 2}
    many = tts.SingleLocation(form="vectors", **options)
    few = tts.SingleLocation(**options)
    rng = np.random.default_rng(5)
    overlaps = {"kappa": 0.3, "nu": -0.2, "theta": 0.4, "eta": 0.5, "rho": 0.1}
    flat, wide = few.state(**overlaps), many.state(**overlaps)
    # the frame that the flat form has: its signs are those of two reflections
    with jax.enable_x64(True):
        _, of_k, of_v = single_location._frame(*map(jnp.asarray, (flat.slow[2:], flat.fast[2:])))
    signs = np.sign([of_k[0], of_v[1]]) * np.sign([wide.slow[2], wide.fast[3]])
    tokens = rng.normal(size=(2, 3, 11))
    tokens[:, 0] *= np.sqrt(0.5)
    tokens[:, 0, 0] += np.sqrt(5.5)
    labels = rng.normal(size=2)
    plane = tokens[..., :4].copy()
    plane[..., 2:] *= signs
    # the coefficients of the tokens in both gradients, in NumPy
    x = 0.6 * tokens @ wide.slow
    misfit = np.sum(erf(x) * (tokens @ wide.fast), axis=1) - labels
    of_v = misfit[:, None] * erf(x)
    of_k = misfit[:, None] * 0.6 * 2 / np.sqrt(np.pi) * np.exp(-(x**2)) * (tokens @ wide.fast)
    rest = np.stack([of_k, of_v]).reshape(2, -1) @ tokens[..., 4:].reshape(6, 7)
    scale = np.array([np.sqrt(0.5), 1.0, 1.0])
    weights = np.stack([of_k * scale, of_v * scale]).reshape(2, -1)
    lower = np.linalg.cholesky(weights @ weights.T)
    factor = np.linalg.solve(lower, rest)
    factor = np.linalg.cholesky(factor @ factor.T)
    drawn = {"tokens": plane, "labels": labels, "rest": factor[[0, 1, 1], [0, 0, 1]]}
    given = {"tokens": tokens, "labels": labels}
    ends = [
        tts.sgd(
            problem,
            state=state,
            samples=jax.tree.map(lambda leaf: np.asarray(leaf)[None], sample),
            epsilon=1.0,
            step_size=0.3,
            tau=[0.3],
        )
        for problem, state, sample in ((few, flat, drawn), (many, wide, given))
    ]
    for name in NAMES:
        one, other = (end.observables[name][0, -1] for end in ends)
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)
        assert abs(one - overlaps[name]) > 1e-3


@pytest.mark.parametrize("dimension", [6, 11])
def test_the_wishart_matrix_of_the_rest(dimension):
    """Its factor by Bartlett: χ² of d − 4 and d − 5 degrees of freedom, and a normal number."""
    problem = tts.SingleLocation(dimension=dimension, tokens=2, batch=1)
    rest = jax.vmap(lambda step: problem.sample(key=KEY, step=step)["rest"])(jnp.arange(40_000))
    rest = np.asarray(rest, dtype=float)
    for values, degrees in ((rest[:, 0] ** 2, dimension - 4), (rest[:, 2] ** 2, dimension - 5)):
        assert abs(values.mean() - degrees) < 4 * np.sqrt(2 * degrees / 40_000)
        fourth = 12 * degrees * (degrees + 4) - 4 * degrees**2  # E(χ² − n)⁴ − its variance²
        assert abs(values.var() - 2 * degrees) < 4 * np.sqrt(fourth / 40_000)
    assert abs(rest[:, 1].mean()) < 4 / np.sqrt(40_000)
    assert abs(rest[:, 1].var() - 1.0) < 4 * np.sqrt(2 / 40_000)
    corr = np.corrcoef(rest.T)
    assert np.all(np.abs(corr[~np.eye(3, dtype=bool)]) < 4 / np.sqrt(40_000))


@pytest.mark.slow
def test_both_forms_have_one_law():
    """Means and second moments of the overlaps after 12 steps from 3000 seeds each, within 4.5
    standard errors."""
    options = {"dimension": 8, "tokens": 3, "gain": 0.6, "batch": 2, "noise": 0.1}
    samples = []
    for form, key in (("overlaps", 1), ("vectors", 2)):
        problem = tts.SingleLocation(form=form, **options)
        start = problem.state(kappa=0.3, nu=0.2, theta=-0.2, eta=0.1, rho=0.1)
        run = tts.sgd(
            problem,
            key=jax.random.key(key),
            seeds=3000,
            state=start,
            epsilon=1.0,
            step_size=0.04,
            tau=[0.48],
        )
        seen = np.stack([run.observables[name][:, -1] for name in NAMES])
        pairs = seen[:, None] * seen[None]
        samples.append(np.concatenate([seen, pairs[np.triu_indices(5)]]))
    one, other = samples
    error = np.sqrt((one.var(axis=1) + other.var(axis=1)) / 3000)
    assert np.all(np.abs(one.mean(axis=1) - other.mean(axis=1)) < 4.5 * error)
    assert np.all(one[:5].std(axis=1) > 0.05)


def test_a_frame_of_parallel_or_no_rests():
    turn, of_k, of_v = single_location._frame(jnp.zeros(4), jnp.zeros(4))
    np.testing.assert_array_equal(np.stack([*of_k, *of_v]), 0.0)
    axes = np.stack([turn(tuple(row)) for row in np.eye(4)])
    np.testing.assert_allclose(axes @ axes.T, np.eye(4), atol=1e-6)
    k = jnp.array([0.0, 0.6, 0.0, -0.8])
    turn, of_k, of_v = single_location._frame(k, -0.5 * k)
    np.testing.assert_allclose(np.abs(of_k), [1.0, 0.0, 0.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(turn(of_v), -0.5 * k, atol=1e-6)


# --- two timescales -------------------------------------------------------------------------------


def test_v_is_eliminated():
    """v*(k) is the best of all unit vectors, free or not."""
    problem = tts.SingleLocation(gain=0.4, dimension=40)
    free = tts.SingleLocation(free=True, gain=0.4, dimension=40)
    (k,) = unit(1, 6, 9)
    best, loose = problem.critical(k), free.critical(k)
    with jax.enable_x64(True):
        loss = jax.jit(lambda v: free.loss(v, k))
        losses = jax.vmap(loss)(unit(500, 6, 10))
        hessian, right = jax.jit(jax.hessian(loss))(np.zeros(6)), -jax.grad(loss)(np.zeros(6))
        slope = np.asarray(jax.grad(loss)(best))
    assert loss(best) < np.min(losses)
    np.testing.assert_allclose(slope - (slope @ best) * best, 0.0, atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(best), 1.0, rtol=1e-12)
    np.testing.assert_allclose(loose, np.linalg.solve(hessian, right), rtol=1e-10)
    assert loss(loose) < loss(best)
    for kappa in (0.2, -0.7):  # on the manifold v* itself
        star = problem.critical(problem.state(kappa=kappa, nu=0.3).slow)
        np.testing.assert_allclose(star, np.sign(kappa) * np.eye(6)[1], atol=1e-12)


@pytest.mark.slow
def test_the_flow_nears_the_limit_like_epsilon():
    problem = tts.SingleLocation(gain=0.4, dimension=40)
    (k,) = unit(1, 6, 9)
    start = tts.State(problem.critical(k), k)
    tau, solver = np.array([0.1, 0.4]), "tsit5"
    exact = tts.limit(problem, start, tau=tau, solver=solver)
    gaps = []
    for epsilon in (4e-3, 2e-3):
        near = tts.flow(problem, start, epsilon=epsilon, tau=tau, solver=solver)
        gaps.append(np.max(np.abs(np.asarray(near.slow) - exact.slow)))
    assert 1.7 < gaps[0] / gaps[1] < 2.3
    number = tts.separation(problem, start, epsilon=1e-3)
    assert 0.0 < float(number) < 0.1


@pytest.mark.slow
def test_on_the_manifold_v_jumps_to_its_star():
    """v*(k) = sign(κ) v*, and the reduced descent has the limits of the joint one."""
    problem = tts.SingleLocation(start="manifold")
    run = tts.sgd(problem, key=KEY, seeds=8, regime="limit", step_size=4e-2, tau=[0.0, 80.0])
    kappa, nu = (run.observables[name] for name in ("kappa", "nu"))
    np.testing.assert_allclose(nu, np.sign(kappa), atol=1e-12)
    assert np.all(np.sign(kappa[:, 0]) == np.sign(kappa[:, -1]))
    assert np.all(reached(run))


def test_the_schedule_is_a_slow_variable():
    """Steps are those of descent with λ/(1 + rt)."""
    rate, size = 1e-2, 2e-3
    problem = tts.ScheduledLocation(gain=1.0, dimension=40)
    start = problem.state(kappa=0.3, nu=0.2, theta=-0.2, eta=0.1, rho=0.1)
    options = {"key": KEY, "state": start, "epsilon": rate / size}
    run = tts.sgd(problem, step_size=size, tau=rate * np.array([1, 20]), **options)
    k, v = start.fast["k"], start.fast["v"]
    fixed = tts.SingleLocation(dimension=40)
    slopes = jax.jit(jax.grad(fixed.risk, argnums=(0, 1)))
    for step in range(20):
        with jax.enable_x64(True):
            of_k, of_v = (np.asarray(one) for one in slopes(k, v, 1.0 / (1.0 + rate * step)))
        k, v = k - size * (of_k - (of_k @ k) * k), v - size * (of_v - (of_v @ v) * v)
        k, v = k / np.linalg.norm(k), v / np.linalg.norm(v)
    np.testing.assert_allclose(run.fast["k"][0, -1], k, rtol=0, atol=1e-12)
    np.testing.assert_allclose(run.fast["v"][0, -1], v, rtol=0, atol=1e-12)
    np.testing.assert_allclose(run.observables["gain"][0], 1 / (1 + rate * np.array([1, 20])))
    np.testing.assert_allclose(run.slow[0], run.tau, rtol=1e-12)
    with jax.enable_x64(True):
        loss = problem.risk(k, v, 1 / (1 + 20 * rate))
    np.testing.assert_allclose(run.loss[0, -1], loss, rtol=1e-12)


@pytest.mark.slow
def test_the_flow_is_the_schedule_with_small_steps():
    rate, size = 1e-2, 2e-3
    problem = tts.ScheduledLocation(gain=1.0, dimension=40)
    start = problem.state(kappa=0.3, nu=0.2, theta=-0.2, eta=0.1, rho=0.1)
    options = {"key": KEY, "state": start, "epsilon": rate / size}
    flow = tts.flow(problem, start, epsilon=rate / size, tau=[0.2], solver="tsit5")
    gaps = []
    for finer in (1, 2):
        near = tts.sgd(problem, step_size=size / finer, tau=[0.2], **options)
        gaps.append(np.max(np.abs(near.fast["k"][0, -1] - flow.fast["k"][-1])))
    assert 1.7 < gaps[0] / gaps[1] < 2.3


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [tts.SingleLocation, tts.ScheduledLocation])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gain": 0.0}, "`gain` must be positive"),
        ({"gain": [0.1, 0.2]}, "`gain` must be one number"),
        ({"gain": np.nan}, "`gain`"),
        ({"spread": -1.0}, "`spread` must be zero or positive"),
        ({"noise": np.inf}, "`noise`"),
        ({"dimension": 1}, "`dimension` must be an integer of at least 2"),
        ({"dimension": 5, "batch": 2}, "`dimension` must be an integer of at least 6"),
        ({"dimension": 40.0}, "`dimension`"),
        ({"tokens": 0}, "`tokens`"),
        ({"batch": 0}, "`batch`"),
        ({"form": "five"}, "`form` must be one of"),
        ({"start": "plane"}, "`start` must be one of"),
    ],
)
def test_bad_arguments(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)


def test_impossible_overlaps_and_vectors_off_the_sphere():
    problem = tts.SingleLocation(dimension=30)
    for bad in ({"kappa": 1.2, "nu": 0.0}, {"kappa": 1.0, "nu": 0.0, "theta": 0.5}):
        with pytest.raises(ValueError, match="must be overlaps of unit vectors"):
            problem.state(**bad)
    with pytest.raises(ValueError, match="must be overlaps"):
        problem.state(kappa=np.nan, nu=0.0)
    good = problem.state(kappa=0.1, nu=0.2)
    options = {"key": KEY, "epsilon": 1.0, "step_size": 1e-3, "tau": [1e-3]}
    for bad in (tts.State(2.0 * good.fast, good.slow), tts.State(good.fast, 2.0 * good.slow)):
        with pytest.raises(ValueError, match="must lie on the problem's `Sphere`"):
            tts.sgd(problem, state=bad, **options)
    with pytest.raises(ValueError, match="must have leaves whose trailing axes are"):
        tts.sgd(problem, state=tts.State(good.fast[:5], good.slow), **options)
    small = tts.SingleLocation(dimension=3, form="vectors")
    assert np.all(small.state(kappa=1.0, nu=1.0).slow == [1.0, 0.0, 0.0])
    with pytest.raises(ValueError, match="`dimension` must be at least 4"):
        small.state(kappa=0.5, nu=0.5)


@pytest.mark.slow
def test_a_free_v_diverges_with_large_steps():
    free = tts.SingleLocation(free=True)
    run = tts.sgd(free, key=KEY, seeds=2, epsilon=1e-3, step_size=10.0, tau=[0.0, 10.0])
    assert np.all(run.status == int(tts.Status.DIVERGED))
    assert np.all(np.isnan(run.loss[:, -1]))


def test_steps_that_diverge_and_regimes_that_do_not_fit():
    huge = OPTIONS | {"step_size": 1e300, "tau": [0.0, 3e300]}
    run = tts.sgd(tts.SingleLocation(), seeds=30, **huge)
    assert np.all(run.status == int(tts.Status.DIVERGED))
    assert np.all(np.isnan(run.loss[:, -1]))
    batches = tts.SingleLocation(batch=2)
    for regime, more in (("limit", {}), (tts.regime.Inner(3), {"epsilon": 1.0})):
        with pytest.raises(ValueError, match="`regime` must be 'joint' for this SingleLocation"):
            tts.sgd(batches, key=KEY, tau=[1e-2], step_size=1e-2, regime=regime, **more)
    for kind in (tts.SingleLocation, tts.ScheduledLocation):
        batches = kind(batch=2)
        with pytest.raises(TypeError, match="no loss of a batch"):
            batches.sample_loss(*batches.init(key=KEY), batches.sample(key=KEY, step=0))
    flat = tts.SingleLocation(dimension=2, form="vectors")
    with pytest.raises(ValueError, match="`dimension` must be at least 4"):
        flat.state(kappa=0.6, nu=1.0)
    np.testing.assert_array_equal(
        flat.state(kappa=0.6, nu=0.6, theta=0.8, eta=0.8, rho=0.96).slow, [0.6, 0.8]
    )


def test_the_schedule_is_a_clock_also_where_k_and_v_are_eliminated():
    solver = tts.fast.GradientSteps(20, 0.01)
    run = tts.sgd(
        tts.ScheduledLocation(dimension=40),
        key=KEY,
        regime=tts.regime.Eliminated(solver),
        step_size=0.01,
        tau=[0.0, 0.2],
    )
    np.testing.assert_allclose(run.slow[0], [0.0, 0.2], rtol=1e-12)


def test_newtons_method_is_not_for_the_sphere():
    with pytest.raises(TypeError, match="`fast.Argmin` is for a fast variable"):
        tts.ScheduledLocation().critical(0.0)
