"""The ultra-fast diffusion on the circle, its linear algebra and its teachers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp
from scipy.linalg import eigh

from tts_jax import Rodas5P
from tts_jax._cyclic import CyclicTridiagonal
from tts_jax._trajectory import Status
from tts_jax.problems._teachers import CircleTeacher, TorusTeacher
from tts_jax.problems._ultrafast import UltraFastDiffusion


SHIFT = 0.4 * np.pi


def fourier(gamma, k):
    """Fourier coefficients of the teacher: of a bump they are r^|k|/2π."""
    root = np.sqrt(1 + gamma)
    r = (root - 1) / (root + 1)
    return r ** np.abs(k) * (2 / 3 + np.exp(-1j * k * SHIFT) / 3) / (2 * np.pi)


@jax.jit
def solved(matrix, shift, b):
    return matrix.shifted_solver(shift)(b)


def galerkin_gap(gamma, modes):
    """The gap by Fourier–Galerkin, from the exact coefficients of the teacher."""
    k = np.arange(-modes, modes + 1)
    mass = fourier(gamma, k[:, None] - k)
    stiffness = k[:, None] * k * mass
    return eigh(stiffness, mass, eigvals_only=True, subset_by_index=[0, 2])[1]


@pytest.fixture(scope="module")
def runs():
    """Problems of 512 cells for γ = 10 and 100 and their solutions from the uniform density."""
    t = np.array([0, 1, 5, 6, 8, 10, 20, 22, 24, 31.25])
    answer = {}
    for gamma in (10.0, 100.0):
        problem = UltraFastDiffusion(CircleTeacher(gamma))
        answer[gamma] = problem, problem.solve(None, t)
    return answer


@pytest.mark.parametrize("gamma", [10.0, 100.0])
def test_mass_positivity_and_decay(runs, gamma):
    problem, solution = runs[gamma]
    assert solution.status == Status.SUCCESS
    assert solution.success
    assert problem.cells == 512
    assert np.max(np.abs(solution.density.sum(-1) * problem.width - 1)) < 1e-12
    assert np.min(solution.density) > 0.9 * np.min(problem.target)
    assert np.all(np.diff(solution.chi2) < 0)
    np.testing.assert_allclose(solution.density[-1], problem.target, rtol=1e-9)
    np.testing.assert_allclose(solution.theta, np.linspace(-np.pi, np.pi, 1025)[1::2], atol=1e-14)


@pytest.mark.parametrize(
    ("gamma", "expected"),
    [(10.0, [0.455, 0.096, 1.0e-4, 2.5e-9]), (100.0, [2.06, 0.36, 0.068, 1.3e-4, 1.5e-13])],
)
def test_known_values_of_chi2(runs, gamma, expected):
    """Numbers of an independent integration, to the digits with which they were noted."""
    _, solution = runs[gamma]
    at = [list(solution.t).index(t) for t in (0, 1, 5, 10, 20)]
    values = np.asarray(solution.chi2)[at[: len(expected)]]
    np.testing.assert_allclose(values, expected, rtol=0.05)
    np.testing.assert_allclose(values[:2], expected[:2], rtol=0.01)


@pytest.mark.parametrize("gamma", [10.0, 100.0])
def test_late_decay_is_twice_the_gap(runs, gamma):
    problem, solution = runs[gamma]
    first, last = (5.5, 10.5) if gamma == 10 else (19.5, 24.5)
    late = (solution.t > first) & (solution.t < last)
    rate = -np.polyfit(solution.t[late], np.log(solution.chi2[late]), 1)[0]
    np.testing.assert_allclose(rate, 2 * problem.spectral_gap(), rtol=0.005)


@pytest.mark.parametrize(("gamma", "twice"), [(0.0, 2.0), (10.0, 2.122), (100.0, 1.995)])
def test_gap_against_fourier_galerkin(gamma, twice):
    exact = galerkin_gap(gamma, 120)
    np.testing.assert_allclose(exact, galerkin_gap(gamma, 90), rtol=1e-9)
    np.testing.assert_allclose(2 * exact, twice, atol=5e-4)
    errors = [
        abs(UltraFastDiffusion(CircleTeacher(gamma), n).spectral_gap() - exact) / exact
        for n in (512, 1024)
    ]
    assert errors[1] < 3e-5
    assert 3.9 < errors[0] / errors[1] < 4.1


def test_gap_is_that_of_the_linearised_scheme():
    problem = UltraFastDiffusion(CircleTeacher(30.0), 64)
    values = np.linalg.eigvals(-problem.jacobian(jnp.asarray(problem.target)).as_matrix())
    np.testing.assert_allclose(np.sort(values.real)[1], problem.spectral_gap(), rtol=1e-11)


def test_second_order_in_space(runs):
    """Cell averages at t = 1 against those of 512 cells: e_n = C (1/n² − 1/512²)."""
    _, solution = runs[10.0]
    fine = solution.density[list(solution.t).index(1)]
    errors = []
    for cells in (64, 256):
        problem = UltraFastDiffusion(CircleTeacher(10.0), cells)
        density = problem.solve(None, [0.5, 1.0]).density[1]
        errors.append(np.max(np.abs(density - fine.reshape(cells, -1).mean(-1))))
    assert errors[1] < 1e-4
    assert 0.95 < errors[0] / errors[1] / (63 / 3) < 1.05


@pytest.mark.parametrize("wave", [1, 3])
def test_small_perturbation_of_a_uniform_teacher(wave):
    """∂_t h = ∂_θθ h for μ = (1 + h)/2π up to h²; on a grid k² is (2 sin(kΔ/2)/Δ)²."""
    problem = UltraFastDiffusion(np.ones(64))
    size, t = 1e-4, np.array([0.3, 0.9])
    solution = problem.solve(lambda x: 1 + size * jnp.cos(wave * x), t, rtol=1e-10, atol=1e-13)
    amplitudes = 2 * np.mean((2 * np.pi * solution.density - 1) * np.cos(wave * problem.theta), -1)
    half = wave * problem.width / 2
    rate = (2 / problem.width * np.sin(half)) ** 2
    expected = size * np.sin(half) / half * np.exp(-rate * t)  # of the cell averages
    np.testing.assert_allclose(amplitudes, expected, rtol=1e-5)


def test_against_scipy():
    """The same finite volumes, written as a matrix and integrated by BDF."""
    n = 64
    problem = UltraFastDiffusion(CircleTeacher(10.0), n)
    width = 2 * np.pi / n
    step = np.roll(np.eye(n), 1, axis=1) - np.eye(n)  # differences across the right edges
    matrix = step.T @ np.diag(problem.faces) @ step / width**2
    target = np.asarray(problem.target)
    start = 1 + 0.9 * np.cos(problem.theta - 1)
    t = np.array([0.05, 0.4])
    expected = solve_ivp(
        lambda t, y: matrix @ (target / y),
        (0, 0.4),
        start / start.sum() / width,
        method="BDF",
        t_eval=t,
        rtol=1e-9,
        atol=1e-11,
        jac=lambda t, y: -matrix * (target / y**2),
    ).y.T
    np.testing.assert_allclose(problem.solve(start, t).density, expected, rtol=1e-6)
    given = problem.velocity(jnp.asarray(start))
    np.testing.assert_allclose(given, matrix @ (target / start), atol=1e-13)


def test_structured_and_dense_jacobians_agree():
    problem = UltraFastDiffusion(CircleTeacher(50.0), 64)
    start = jnp.asarray(1 + 0.8 * np.sin(problem.theta))
    structured = problem.jacobian(start).as_matrix()
    np.testing.assert_allclose(structured, jax.jacfwd(problem.velocity)(start), rtol=1e-12)
    np.testing.assert_allclose(structured.sum(0), 0, atol=1e-11)
    t = [0.1, 1.0]
    dense = problem.solve(start, t, solver=Rodas5P())
    answer = problem.solve(start, t)
    assert answer.steps == dense.steps
    np.testing.assert_allclose(answer.density, dense.density, rtol=1e-11)


@pytest.mark.parametrize("n", [3, 4, 40])
def test_cyclic_solves(n):
    rng = np.random.default_rng(n)
    matrix = CyclicTridiagonal(*(jnp.asarray(rng.normal(size=n)) for _ in range(3)))
    b = jnp.asarray(rng.normal(size=n))
    dense = np.asarray(matrix.as_matrix())
    cyclic = sum(
        np.diag(part) @ np.roll(np.eye(n), offset, axis=1)
        for part, offset in ((matrix.lower, -1), (matrix.diagonal, 0), (matrix.upper, 1))
    )
    np.testing.assert_array_equal(dense, cyclic)
    for shift in (5.0, 50.0):
        expected = np.linalg.solve(shift * np.eye(n) - dense, b)
        np.testing.assert_allclose(solved(matrix, shift, b), expected, rtol=1e-11)


def test_solves_keep_the_sum():
    """At steps a million times the scale of the stiffest mode."""
    problem = UltraFastDiffusion(CircleTeacher(1000.0), 2048)
    matrix = problem.jacobian(jnp.asarray(problem.target))
    b = np.random.default_rng(0).normal(size=2048) + 1e-3
    lost = []
    for known in (matrix, CyclicTridiagonal(matrix.lower, matrix.diagonal, matrix.upper)):
        x = np.asarray(solved(known, 0.1, b))
        lost.append(abs(x.sum() - b.sum() / 0.1) / np.abs(x).sum())
        image = matrix.lower * np.roll(x, 1) + matrix.diagonal * x + matrix.upper * np.roll(x, -1)
        np.testing.assert_allclose(0.1 * x - image, b, atol=1e-6)
    assert lost[0] < 1e-14 < 1e-12 < lost[1]


def test_from_a_peak_to_an_uneven_teacher():
    """A contrast of 1e4 on both sides, at loose tolerances."""
    problem = UltraFastDiffusion(CircleTeacher(1e4), 64)
    solution = problem.solve(lambda x: 1e-4 + jnp.exp(20 * (jnp.cos(x - 2) - 1)), [0.1, 40.0])
    assert solution.success
    assert np.min(solution.density) > 0
    assert np.max(np.abs(solution.density.sum(-1) * problem.width - 1)) < 1e-12
    assert solution.chi2[1] < solution.chi2[0]


def test_ways_to_give_densities():
    teacher = CircleTeacher(10.0)
    problem = UltraFastDiffusion(teacher, 64)
    scaled = UltraFastDiffusion(lambda x: 7 * teacher(x), 64)
    np.testing.assert_allclose(scaled.target, problem.target, rtol=1e-14)
    np.testing.assert_allclose(scaled.faces, problem.faces, rtol=1e-14)
    given = UltraFastDiffusion(3 * np.asarray(problem.target))
    assert given.cells == 64
    np.testing.assert_allclose(given.target, problem.target, rtol=1e-14)
    np.testing.assert_allclose(given.faces, problem.faces, rtol=0.03)
    # averages, not values: of an integral known in closed form
    edges = np.linspace(-np.pi, np.pi, 65)
    cosine = UltraFastDiffusion(lambda x: 2 + jnp.cos(x), 64)
    exact = np.diff(2 * edges + np.sin(edges)) / (4 * np.pi) / cosine.width
    np.testing.assert_allclose(cosine.target, exact, rtol=1e-13)
    t = [0.0, 0.1]
    uniform = problem.solve(None, t).density
    np.testing.assert_array_equal(problem.solve(np.full(64, 5.0), t).density, uniform)
    np.testing.assert_allclose(problem.solve(lambda x: 0 * x + 2, t).density, uniform, rtol=1e-12)
    np.testing.assert_allclose(uniform[0], 1 / (2 * np.pi), rtol=1e-14)
    np.testing.assert_allclose(problem.chi2(uniform), problem.solve(None, t).chi2, rtol=1e-14)
    direct = problem.width * np.sum(problem.target**2 / uniform, -1) - 1
    np.testing.assert_allclose(problem.chi2(uniform), direct, rtol=1e-12)


def test_interpolation_and_quantiles():
    problem = UltraFastDiffusion(lambda x: 2 + jnp.cos(x), 256)
    density = problem.target
    x = np.linspace(-8, 8, 101)
    np.testing.assert_allclose(problem.at(x, density), (2 + np.cos(x)) / (4 * np.pi), atol=5e-5)
    np.testing.assert_allclose(problem.at(problem.theta, density), density, rtol=1e-12)
    np.testing.assert_allclose(
        problem.at(-np.pi, density), (density[0] + density[-1]) / 2, rtol=1e-12
    )
    levels = np.linspace(0, 1, 33)
    angles = np.asarray(problem.quantiles(levels, density))
    shares = (2 * (angles + np.pi) + np.sin(angles)) / (4 * np.pi)
    np.testing.assert_allclose(shares, levels, atol=2e-5)
    np.testing.assert_allclose(angles[[0, 16, 32]], [-np.pi, 0, np.pi], atol=1e-12)


def test_failures_are_reported_not_raised():
    problem = UltraFastDiffusion(CircleTeacher(10.0), 64)
    # more than the 10 000 steps of the default
    solution = problem.solve(None, [0.0, 1.0], rtol=1e-20, atol=1e-300)
    assert solution.status == Status.MAX_STEPS
    assert not solution.success
    assert np.all(np.isfinite(solution.density[0]))
    assert np.all(np.isnan(solution.density[1]))
    assert np.isnan(solution.chi2[1])


def test_velocity_outside_the_positive_densities():
    problem = UltraFastDiffusion(np.ones(8))
    assert np.isnan(problem.velocity(jnp.ones(8).at[2].set(-1.0))[2])


@pytest.mark.slow
def test_under_vmap():
    problem = UltraFastDiffusion(CircleTeacher(10.0), 64)
    starts = 1 + np.array([0.0, 0.5])[:, None] * np.cos(problem.theta)
    t = jnp.array([0.2, 0.5])
    together = jax.vmap(lambda start: problem.solve(start, t).density)(jnp.asarray(starts))
    for start, density in zip(starts, together, strict=True):
        np.testing.assert_allclose(problem.solve(start, t).density, density, rtol=1e-9)


@pytest.mark.slow
def test_gradient():
    def chi2(gamma):
        problem = UltraFastDiffusion(CircleTeacher(gamma), 24)
        return problem.solve(None, [0.5], rtol=1e-9, max_steps=256).chi2[-1]

    slope = jax.grad(chi2)(10.0)
    np.testing.assert_allclose(slope, (chi2(10.01) - chi2(9.99)) / 0.02, rtol=1e-5)


def test_double_precision_without_the_flag():
    expected = UltraFastDiffusion(CircleTeacher(10.0), 64).solve(None, [0.0, 0.1])
    with jax.enable_x64(False):
        problem = UltraFastDiffusion(CircleTeacher(10.0), 64)
        solution = problem.solve(None, [0.0, 0.1])
        sample = CircleTeacher(10.0).sample(jax.random.key(0), 5)
        with pytest.raises(RuntimeError, match="needs float64"):
            jax.jit(lambda t: problem.solve(None, t))(jnp.array([1.0]))
    assert solution.density.dtype == sample.dtype == np.float64
    np.testing.assert_array_equal(solution.density, expected.density)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: UltraFastDiffusion(np.ones((4, 4))), "`teacher` must be a function or a vector"),
        (lambda: UltraFastDiffusion(np.ones(8), 16), r"of shape \(16,\)"),
        (lambda: UltraFastDiffusion(np.ones(3)), "`cells` must be at least 4"),
        (lambda: UltraFastDiffusion(jnp.cos, 16), "`teacher` must be positive"),
        (lambda: UltraFastDiffusion(-np.ones(8)), "`teacher` must be positive"),
        (lambda: UltraFastDiffusion(lambda x: 1.0, 16), "`teacher` must be an element-wise"),
        (lambda: UltraFastDiffusion(CircleTeacher(np.inf), 16), "`gamma` must be finite"),
        (lambda: UltraFastDiffusion(CircleTeacher(1.0), 2.5), "`cells` must be an integer"),
        (lambda: CircleTeacher(-0.5), "`gamma` must be zero or positive"),
        (lambda: CircleTeacher(np.nan), "`gamma` must be zero or positive"),
        (lambda: CircleTeacher([1.0, np.inf]), "`gamma` must be one number"),
        (lambda: TorusTeacher(-1.0), "`gamma` must be zero or positive"),
        (lambda: TorusTeacher(1.0)(np.ones(3)), "`x` must be points with two coordinates"),
        (lambda: CircleTeacher(1.0).sample(jax.random.key(0), 0), "`count` must be an integer"),
        (lambda: CircleTeacher(1.0).sample(0, 5), "`key` must be a random key"),
    ],
)
def test_bad_problems(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(density=np.ones(5)), "`density` must have one value per cell"),
        (dict(density=np.zeros(8)), "`density` must be positive"),
        (dict(density=jnp.sin), "`density` must be positive"),
        (dict(t=[1.0, 0.5]), "`t` must be finite, non-negative and strictly increasing"),
        (dict(t=1.0), "`t` must be a vector"),
        (dict(rtol=0.0), "`rtol` must be positive"),
        (dict(atol=-1.0), "`atol` must be positive"),
        (dict(max_steps=0), "`max_steps` must be an integer"),
    ],
)
def test_bad_runs(arguments, message):
    problem = UltraFastDiffusion(np.ones(8))
    with pytest.raises(ValueError, match=message):
        problem.solve(**(dict(density=None, t=[1.0]) | arguments))


def test_bad_solver_and_queries():
    problem = UltraFastDiffusion(np.ones(8))
    with pytest.raises(TypeError, match="`solver` must be an `AbstractSolver`"):
        problem.solve(None, [1.0], solver="rodas5p")
    with pytest.raises(ValueError, match="`levels` must be at most 1"):
        problem.quantiles([0.5, 1.5], np.ones(8))
    with pytest.raises(ValueError, match="`density` must have one value per cell"):
        problem.at(0.0, np.ones(7))
    with pytest.raises(ValueError, match="three vectors of one length"):
        CyclicTridiagonal(jnp.ones(2), jnp.ones(2), jnp.ones(2))


@pytest.mark.parametrize("gamma", [0.0, 10.0, 1000.0])
def test_teacher_density(gamma):
    """The printed formula, normalised; its Fourier coefficients are known, by 4096 equal nodes."""
    theta = -np.pi + 2 * np.pi / 4096 * np.arange(4096)
    values = np.asarray(CircleTeacher(gamma)(theta))
    printed = 1 / (1 + gamma * np.sin(theta / 2) ** 2)
    printed += 0.5 / (1 + gamma * np.sin((theta - SHIFT) / 2) ** 2)
    np.testing.assert_allclose(values, printed / (printed.mean() * 2 * np.pi), rtol=1e-12)
    for k in (0, 1, 5):
        coefficient = np.mean(values * np.exp(-1j * k * theta))
        np.testing.assert_allclose(coefficient, fourier(gamma, k), atol=1e-13)
    # the printed ½ is the ratio of the masses, for each bump has mass 2π/√(1+γ)
    bump = np.mean(1 / (1 + gamma * np.sin(theta / 2) ** 2)) * 2 * np.pi
    np.testing.assert_allclose(bump, 2 * np.pi / np.sqrt(1 + gamma), rtol=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 10.0, 100.0])
def test_teacher_samples(gamma):
    count = 60_000
    sample = np.asarray(CircleTeacher(gamma).sample(jax.random.key(4), count))
    assert np.all((sample >= -np.pi) & (sample < np.pi))
    for k in (1, 2, 4):
        moment = np.mean(np.exp(-1j * k * sample))
        assert abs(moment - 2 * np.pi * fourier(gamma, k)) < 4 / np.sqrt(count)
    if gamma:
        # the two groups, each around its own mode
        groups = np.arange(count) % 3 == 1
        for group, mode in ((~groups, 0.0), (groups, SHIFT)):
            mean = np.mean(np.exp(1j * sample[group]))
            assert abs(np.angle(mean) - mode) < 0.03
            assert abs(group.mean() - (1 / 3 if mode else 2 / 3)) < 1e-4
    histogram, edges = np.histogram(sample, 24, (-np.pi, np.pi))
    fine = -np.pi + 2 * np.pi / 2400 * (np.arange(2400) + 0.5)
    shares = CircleTeacher(gamma)(fine).reshape(24, 100).mean(1) * (edges[1] - edges[0])
    assert np.max(np.abs(histogram / count - shares) / np.sqrt(shares / count)) < 4.5


def test_dirac_teachers():
    sample = CircleTeacher(np.inf).sample(jax.random.key(0), 7)
    np.testing.assert_allclose(sample, [0, SHIFT, 0, 0, SHIFT, 0, 0], atol=1e-15)
    sample = TorusTeacher(np.inf).sample(jax.random.key(0), 3)
    np.testing.assert_allclose(sample, [[-1, 0], [1, 1], [-1, 0]], atol=1e-15)
    near = CircleTeacher(1e12).sample(jax.random.key(1), 999)
    assert np.median(np.abs(near[np.arange(999) % 3 != 1])) < 1e-5


@pytest.mark.parametrize("gamma", [0.0, 100.0])
def test_torus_teacher(gamma):
    count = 40_000
    teacher = TorusTeacher(gamma)
    sample = np.asarray(teacher.sample(jax.random.key(2), count))
    assert sample.shape == (count, 2)
    assert np.all((sample >= -2) & (sample < 2))
    centres = np.where(np.arange(count)[:, None] % 2 == 0, [-1.0, 0.0], [1.0, 1.0])
    away = (sample - centres + 2) % 4 - 2
    assert np.max(np.abs(away)) <= 1
    root = np.sqrt(1 + gamma)
    r = (root - 1) / (root + 1)
    moments = np.mean(np.exp(1j * np.pi * away), axis=0)
    assert np.max(np.abs(moments - r)) < 4 / np.sqrt(count)
    # coordinates are independent
    assert abs(np.mean(np.exp(1j * np.pi * away.sum(-1))) - r**2) < 4 / np.sqrt(count)
    # midpoints of a grid: mass 1, and the shares of blocks of side 1/2
    grid = -2 + 4 / 256 * (np.arange(256) + 0.5)
    density = np.asarray(teacher(np.stack(np.meshgrid(grid, grid, indexing="ij"), axis=-1)))
    np.testing.assert_allclose(density.mean() * 16, 1, rtol=1e-5)
    shares = density.reshape(8, 32, 8, 32).mean((1, 3)) / 4
    histogram, _, _ = np.histogram2d(*sample.T, 8, ((-2, 2), (-2, 2)))
    seen = shares > 0
    assert np.all(histogram[~seen] == 0)
    error = np.abs(histogram / count - shares)[seen] / np.sqrt(shares[seen] / count)
    assert np.max(error) < 4.5


def test_teachers_are_differentiable_in_gamma():
    slope = jax.grad(lambda g: CircleTeacher(g)(1.0))(10.0)
    ends = CircleTeacher(10.001)(1.0) - CircleTeacher(9.999)(1.0)
    np.testing.assert_allclose(slope, ends / 0.002, rtol=1e-6)
