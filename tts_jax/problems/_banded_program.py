"""The univariate problem's stiff flow as a program for LLVM: Rodas5P on banded stages, in lanes.

In plateau values F_k = Σ_{j≤k} a_j of neurons in the order of their positions the network is a sum
of local bumps, so that the Hessian of the loss in y = (F_0, u_1, F_1, u_2, …, F_m) is banded: its
half-bandwidth is 2K + 2 where neighbours up to the K-th overlap, that is are closer than η. The
gradient flow reads

    M y′ = −∇L(y),   M = ε tridiag(−1, 2, −1) on F (the last diagonal entry is 1), 1 on u,

and a stage of a Rosenbrock method solves S k_i = −∇L(y_i) + M Σ_j (C_ij/h) k_j with
S = M/(γh) + ∇²L, symmetric, by a banded LDLᵀ without pivoting. With ε = 0 this is the reduced
flow as a differential-algebraic equation, for which Rodas5P is made. There the loss gets a ridge
ρ|a|² of a few ulp: without it two neurons that meet approach each other for ever, with opposite
weights that grow like one over their distance; with it they stop at some 1e-3 η.

Pair functions of the signed gap r = (u_j − u_i)/η, i < j, with W the difference of two independent
transitions: T = E(W − r)₊, Q = P(W > r), κ the density of W. They vanish for r ≥ 1 and hold for
any r, so neurons may cross within a step; afterwards they are put in order again. Every
evaluation checks that no pair beyond the K-th neighbour overlaps; if one does, the step is done
again with a wider band. A transition that crosses an end of [0, 1] takes the part beyond it off
again; positions farther out count as the place where the transition just leaves the interval.

Vectors hold one number per lane; a lane's numbers do not depend on its neighbours, nor on K.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

from tts_jax._rosenbrock import GAMMA, A, C, H
from tts_jax._simd.writer import (
    ADDRESS,
    WARP,
    WHOLE,
    Array,
    Index,
    Mask,
    Real,
    Target,
    Variable,
    Writer,
)
from tts_jax.problems import _step


ENTRIES = ("settle", "advance", "finish")
STAGES = len(A)
ITERATIONS = 12  # for the ends of the spectrum of the Gram matrix
OVERLAP = 1.02  # neighbours count as overlapping below this many widths when K is chosen
NARROW_BANDS = 7  # bands of fewer neighbours have code of their own
MOST_IN_REGISTERS = 2  # neighbours whose columns are eliminated without memory between
FARTHEST = 8.0  # a step in which a neuron moves by more widths is tried again with a smaller size

# Arrays of one vector per entry, with their lengths: m neurons, n = 2m + 1 rows, b = 2K + 3.
VECTORS = {
    "state": "n",  # y at the start of the step
    "next": "n",  # y at its end
    "stage": "n",  # y_i
    "right": "n",  # right-hand sides, then solutions
    "stages": f"{STAGES} * n",  # k_i
    "dense": "3 * n",
    "band": "(n + b) * b",  # row i: S(i, i), S(i, i−1), …; then L; zeros after the last
    "inverse": "n",  # 1/D
    "weight": "m + 2",  # a
    "place": "m + 2",  # u, no farther out than half a width
    "area": "m + 2",  # ∫₀^u f*, smoothed
    "level": "m + 2",  # f* at u, smoothed
    "trim": "m + 2",  # how far inside the transition at a jump a neuron is, in widths
    "drift": "m + 2",  # what the ends of [0, 1] add to ½∂L/∂F_k
    "filling": "m + 2",  # ∫f* over plateau k
    "pull": "m + 2",  # what pairs of neurons farther apart add to Σ_j a_j T_kj
    "misfit": "m + 2",  # E_j = ∫(f − f*)σ′_j/η
    "extra": "m + 2",  # what the ends, and pairs of neurons farther apart, add to it
    "left": "m + 2",  # −u/η
    "right_end": "m + 2",  # (u − 1)/η
    "order": "m + 2",  # which group of coincident neurons of the caller this is
    "share": "m + 2",  # one over their number, and their number
    "count": "m + 2",
    "hold": "m + 2",  # what of S belongs to a weight alone
    # of the jump that counts for a neuron: its place, its size, f* before it, ∫f* up to it, between
    # which positions no other jump counts, and between which it is the nearest
    "near": "m + 2",
    "size": "m + 2",
    "before": "m + 2",
    "filled": "m + 2",
    "low_end": "m + 2",
    "high_end": "m + 2",
    "low_cell": "m + 2",
    "high_cell": "m + 2",
    "lane": "16",
}
# Vectors in `lane`.
TIME, STEP_SIZE, EPSILON, LIVE, FACTOR, ACCEPTED, LOST, NEXT_TIME, OVERLAPS, NARROW, WILD = range(
    11
)
# Arrays of indices or numbers of one lane each, or shared.
LANE_INDICES = ("start", "record", "steps", "accepts", "widest")
NUMBERS = (
    *("eta", "per_eta", "rtol", "atol", "end", "first", "last", "total", "square", "ridge"),
    *("per_scale", "fast_share", "least_step", "first_step"),
)
SIZES = (
    *("neurons", "jumps", "times", "starts", "max_steps", "reduced", "apart", "widest_band"),
    *("too_wide", "length"),
)
SHARED = (
    *("numbers", "sizes", "queue", "tau"),
    *("jump", "height", "jump_before", "jump_filled", "jump_low", "jump_high"),
    *("jump_low_cell", "jump_high_cell"),
    *("start_state", "start_order", "start_share", "start_epsilon"),
    *("record_state", "record_order", "loss", "fast", "slow", "condition"),
    *("status", "step_count", "accept_count", "bandwidth", "record_count", "reached", "which"),
    "visits",
)
SLOTS = {name: place for place, name in enumerate((*VECTORS, *LANE_INDICES, *SHARED))}
# What is known of the jump that counts for a neuron, and the array of all jumps it is from.
_OF_NEURON = {
    **{"near": "jump", "size": "height", "before": "jump_before", "filled": "jump_filled"},
    **{"low_end": "jump_low", "high_end": "jump_high"},
    **{"low_cell": "jump_low_cell", "high_cell": "jump_high_cell"},
}
OF_INDICES = {
    *("sizes", "queue", "status", "step_count", "accept_count", "bandwidth", "record_count"),
    *("which", "visits", *LANE_INDICES),
}


class Scope:
    """A writer with the arrays of the work table at hand."""

    def __init__(self, writer: Writer) -> None:
        self.writer = w = writer
        self.table = Array(w, writer.arguments[0], WHOLE)
        self._sizes = self.array("sizes")
        self.m = self.size("neurons")
        self.rows = self.m * 2 + 1

    @property
    def stride(self) -> Index:
        """Vectors per row of the band; the function's last argument must be K."""
        return self.writer.index(self.writer.arguments[-1]) * 2 + 3

    def array(self, name: str) -> Array:
        w = self.writer
        address = self.table[SLOTS[name]]
        if w.target.cuda and name not in SHARED:
            address = address + self._own(name)
        pointer = w.builder.inttoptr(address.ir, ADDRESS)
        if name in VECTORS:
            return w.vectors(pointer)
        return w.indices(pointer) if name in OF_INDICES else w.numbers(pointer)

    def _own(self, name: str) -> Index:
        """From the memory of the first thread of a GPU to that of this one, in bytes."""
        w = self.writer
        thread = w.thread()
        if name in LANE_INDICES:
            return thread * 8
        warp, place = (
            Index(w, operation(thread.ir, ir.Constant(WHOLE, number)))
            for operation, number in ((w.builder.udiv, WARP), (w.builder.urem, WARP))
        )
        return (warp * self.size("length") * WARP + place) * 8

    def size(self, name: str) -> Index:
        return self._sizes[SIZES.index(name)]

    def number(self, name: str) -> Real:
        return self.array("numbers")[NUMBERS.index(name)]

    def shared(self, name: str) -> Real:
        """A number, for every lane."""
        return self.writer.splat(self.number(name))


def _horner(coefficients: tuple[float, ...], x: Real) -> Real:
    value = x.writer.real(coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        value = value * x + coefficient if coefficient else value * x
    return value


def pair(w: Writer, r: Real, *, density: bool) -> tuple[Real, Real, Real | None]:
    """T, Q and κ of the signed gap r."""
    s = w.abs(r)
    d = w.maximum(1.0 - s, 0.0)
    near = s < 0.5
    d2 = d * d
    d4 = d2 * d2
    d6 = d4 * d2
    mean = (_step.NEAR_MEAN[0], _step.NEAR_MEAN[1] - 0.5, *_step.NEAR_MEAN[2:])
    overlap = w.where(near, _horner(mean, s), (d6 * d) * _step.FAR_MEAN)
    tail = w.where(near, _horner(_step.NEAR_TAIL, s), d6 * _step.FAR_TAIL)
    kappa = None
    if density:
        kappa = w.where(near, _horner(_step.NEAR_DENSITY, s), (d4 * d) * _step.FAR_DENSITY)
    return overlap + w.maximum(-r, 0.0), w.where(r < 0.0, 1.0 - tail, tail), kappa


def _neighbour_terms(w: Writer, r: Real) -> tuple[Real, Real]:
    """h = T(r) − T(0) + r/2 and c = ½ − Q(r), without cancellation at small r."""
    s = w.abs(r)
    d = w.maximum(1.0 - s, 0.0)
    near = s < 0.5
    d2 = d * d
    d4 = d2 * d2
    d6 = d4 * d2
    square = s * s
    bend = square * _horner(_step.NEAR_MEAN[2:], s)
    far = s * 0.5 + ((d6 * d) * _step.FAR_MEAN - _step.NEAR_MEAN[0])
    turn = -(s * _horner(_step.NEAR_TAIL[1:], s))
    turn = w.where(near, turn, 0.5 - d6 * _step.FAR_TAIL)
    return w.where(near, bend, far), w.where(r < 0.0, -turn, turn)


def ramp(w: Writer, z: Real) -> Real:
    t = w.maximum(0.5 - w.abs(z), 0.0)
    square = t * t
    return w.maximum(z, 0.0) + square * square


def step(w: Writer, z: Real) -> Real:
    t = w.maximum(0.5 - w.abs(z), 0.0)
    tail = (t * t) * t * 4.0
    return w.where(z > 0.0, 1.0 - tail, tail)


def bump(w: Writer, z: Real) -> Real:
    t = w.maximum(0.5 - w.abs(z), 0.0)
    return (t * t) * 12.0


class Program:
    """All functions of the engine in one module.

    The entry points take the work table: `settle` moves the starts to the critical manifold,
    `advance` solves starts from the queue, `finish` turns records into answers. On a GPU the
    kernel `banded_flow` calls them in all threads.
    """

    def __init__(self, module: Any, target: Target) -> None:
        self.module, self.target, self.lanes = module, target, target.lanes
        self.cuts = {
            name: self._cut(name, first, second)
            for name, first, second in (
                ("cut_mean", step, step),
                ("cut_cdf", bump, step),
                ("cut_density", bump, bump),
            )
        }
        self.locate = self._locate()
        self.edges = self._edges()
        self.gradient = self._gradient()
        self.edge_hessian = self._edge_hessian()
        self.hessian = self._hessian()
        self.factor = self._factor()
        self.solve = self._solve()
        self.project = self._project()
        self.band = self._band()
        self.condition = self._condition()
        self.attempt = self._attempt()
        self.densify = self._densify()
        self.record = self._record()
        self.refill = self._refill()
        self.advance = self._advance()
        self.settle = self._settle()
        self.finish = self._finish()
        if target.cuda:
            self._kernel()

    def _kernel(self) -> None:
        """The kernel `banded_flow(table, number, count)`: an entry point in every thread.

        Entry points are numbered. `count` listed states are dealt out to the threads. It is one
        kernel, because the driver compiles all functions anew for each.
        """
        w, _ = self._function("banded_flow", (WHOLE, WHOLE))
        w.function.calling_convention = "ptx_kernel"
        table, number, count = w.arguments
        for place, name in enumerate(ENTRIES):
            entry = getattr(self, name)
            with w.when(w.index(number).equals(place)):
                w.call(entry, table, *(w.index(0), count)[: len(entry.arguments) - 1])
        w.give()

    @contextmanager
    def _groups(self, w: Writer, first: Index, last: Index) -> Iterator[Index]:
        """The first state of each group of the vectors' length; on a GPU, the states of a thread.

        The last group may reach beyond the last state. Threads of a warp make as many turns.
        """
        if not w.target.cuda:
            with w.range(first, last, self.lanes) as group:
                yield group
            return
        thread = w.thread()
        place = Index(w, w.builder.urem(thread.ir, ir.Constant(WHOLE, WARP)))
        with w.range(first + thread - place, last, w.threads()) as group:
            yield group + place

    def _function(
        self, name: str, extra: tuple[Any, ...] = (), result: Any = None
    ) -> tuple[Writer, Scope]:
        writer = Writer(self.module, name, (ADDRESS, *extra), self.target, result)
        return writer, Scope(writer)

    # --- edges of the interval ---

    def _cut(self, name: str, first: Any, second: Any) -> Writer:
        """∫_{t<0} f(t + p) g(t + q) dt between the breakpoints, as in `_step`."""
        vector = ir.VectorType(ir.DoubleType(), self.lanes)
        w = Writer(self.module, name, (vector, vector), self.target, vector)
        p, q = (Real(w, argument) for argument in w.arguments)
        smaller, larger = w.minimum(p, q), w.maximum(p, q)
        low = w.minimum(-0.5 - smaller, 0.0)
        one = w.minimum(w.maximum(-larger, low), 0.0)
        two = w.minimum(w.maximum(-smaller, low), 0.0)
        total = w.real(0.0)
        for start, stop in ((low, one), (one, two), (two, w.real(0.0))):
            half, middle = (stop - start) * 0.5, (stop + start) * 0.5
            part = w.real(0.0)
            for node, weight in zip(_step.NODES, _step.WEIGHTS, strict=True):
                t = middle + half * float(node)
                part = part + (first(w, t + p) * second(w, t + q)) * float(weight)
            total = total + half * part
        w.give(total)
        return w

    def _cut_of(self, w: Writer, name: str, p: Real, q: Real) -> Real:
        return Real(w, w.call(self.cuts[name], p, q))

    @staticmethod
    def _own_cut(w: Writer, p: Real) -> tuple[Real, Real]:
        """∫_{t<0} σ(t + p)² dt and ∫_{t<0} σ(t + p) σ′(t + p) dt = σ(p)²/2."""
        t = w.maximum(0.5 - w.abs(p), 0.0)
        square = t * t
        fourth = square * square
        seventh = (fourth * square) * t * (16 / 7)
        whole = p - 0.125 + fourth * 2.0 + (1 / 28 - seventh)
        share = step(w, p)
        return w.where(p > 0.0, whole, seventh), (share * share) * 0.5

    def _locate(self) -> Writer:
        """locate(table, j): find the jump that counts for neuron j, where it is not known."""
        w, scope = self._function("locate", (WHOLE,))
        j = w.index(w.arguments[1])
        u = scope.array("place")[j]
        own = {name: scope.array(name) for name in _OF_NEURON}
        lost = (u < own["low_end"][j]) | (u > own["high_end"][j])
        found = {name: w.variable(own[name][j]) for name in _OF_NEURON}
        jumps = {name: scope.array(source) for name, source in _OF_NEURON.items()}
        with w.range(0, scope.size("jumps")) as k:
            nearer = lost & (u > jumps["low_cell"][k])  # than the jumps before
            for name, place in found.items():
                place.set(w.where(nearer, w.splat(jumps[name][k]), place.get()))
        for name, place in found.items():
            own[name][j] = place.get()
        w.give()
        return w

    def _forget(self, w: Writer, scope: Scope, y: Array) -> None:
        """Have neurons look for their nearest jump anew, so that no result depends on the past."""
        low_end, low, high = map(scope.array, ("low_end", "low_cell", "high_cell"))

        def forget(j: Index) -> None:
            u = y[j * 2 - 1]
            low_end[j] = w.where((u <= low[j]) | (u > high[j]), float("inf"), low_end[j])

        w.each(1, scope.m + 1, forget)

    def _edges(self) -> Writer:
        """What transitions across an end of [0, 1] add to `drift`, `pull`, `extra`, `filling`."""
        w, scope = self._function("edges", (ADDRESS,))
        y = w.vectors(w.arguments[1])
        m = scope.m
        eta, per_eta = scope.shared("eta"), scope.shared("per_eta")
        first, last = scope.shared("first"), scope.shared("last")
        names = ("place", "drift", "filling", "pull", "extra", "weight", "left", "right_end")
        place, drift, filling, pull, extra, weight, left, right = map(scope.array, names)
        top = y[m * 2]

        def fill(j: Index, area: Real) -> None:
            for k, part in ((j - 1, area), (j, -area)):
                filling[k] = filling[k] + part
                drift[k] = drift[k] - part

        def measure(j: Index) -> None:
            left[j] = -(place[j] * per_eta)
            right[j] = (place[j] - 1.0) * per_eta

        w.each(1, m + 1, measure)
        passed = w.variable(w.real(0.0))  # Σ_{i<j} a_i R_i
        with w.range(1, m + 1) as j:
            p, q = left[j], right[j]
            with w.when(w.any(p > -0.5)):
                beyond, share = ramp(w, p), step(w, p)
                pull[0] = pull[0] + weight[j] * beyond
                pull[j] = pull[j] + y[0] * beyond
                fill(j, first * (eta * beyond))
                extra[j] = extra[j] - (y[0] - first) * share
                mean, tail = self._own_cut(w, p)
                pull[j] = pull[j] + weight[j] * mean
                extra[j] = extra[j] - weight[j] * tail
                with w.range(1, m + 1) as i:
                    with w.when(w.any(left[i] > -0.5) & ~i.equals(j)):
                        a = weight[i]
                        pull[j] = pull[j] + a * self._cut_of(w, "cut_mean", left[i], p)
                        extra[j] = extra[j] - a * self._cut_of(w, "cut_cdf", p, left[i])
            with w.when(w.any(q > -0.5)):
                beyond, share = ramp(w, q), step(w, q)
                cut = eta * beyond
                drift[j - 1] = drift[j - 1] - y[j * 2 - 2] * cut
                drift[j] = drift[j] + y[j * 2] * cut
                fill(j, -(last * cut))
                extra[j] = extra[j] - (top - last) * share
                pull[j] = pull[j] - beyond * (top - y[j * 2 - 2])
                mean, tail = self._own_cut(w, q)
                pull[j] = pull[j] + weight[j] * mean
                extra[j] = extra[j] + weight[j] * tail
                with w.range(1, m + 1) as i:
                    with w.when(w.any(right[i] > -0.5) & ~i.equals(j)):
                        a = weight[i]
                        pull[j] = pull[j] + a * self._cut_of(w, "cut_mean", right[i], q)
                        extra[j] = extra[j] + a * self._cut_of(w, "cut_cdf", q, right[i])
            pull[j] = pull[j] - passed.get()
            passed.set(passed.get() + weight[j] * ramp(w, q))
        w.give()
        return w

    # --- gradient ---

    def _look(self, w: Writer, scope: Scope) -> None:
        """For every neuron ∫₀^u f* and f*(u), smoothed, and, where jumps are farther apart than η,
        how far inside the transition at a jump it is."""
        eta, per_eta, first = map(scope.shared, ("eta", "per_eta", "first"))
        near, size, before, filled, *_ = map(scope.array, _OF_NEURON)
        place, area, level, trim = map(scope.array, ("place", "area", "level", "trim"))
        jump, height, jumps = scope.array("jump"), scope.array("height"), scope.size("jumps")
        apart = scope.size("apart") > 0

        def look(j: Index) -> None:
            u = place[j]
            beyond, tall = u - near[j], size[j]
            t = w.maximum(0.5 - w.abs(beyond * per_eta), 0.0)
            cube = (t * t) * t
            spread = w.maximum(beyond, 0.0) + (eta * t) * cube
            tail = tall * (cube * 4.0)
            trim[j] = t
            area[j] = filled[j] + before[j] * beyond + tall * spread
            level[j] = before[j] + w.where(beyond > 0.0, tall - tail, tail)

        with w.when(apart):
            w.each(1, scope.m + 1, look)
        with w.when(~apart):
            with w.range(1, scope.m + 1) as j:
                u = place[j]
                base, mean = w.variable(first * u), w.variable(first)
                with w.range(0, jumps) as k:
                    z = (u - jump[k]) * per_eta
                    tall = w.splat(height[k])
                    base.set(base.get() + tall * (eta * ramp(w, z)))
                    mean.set(mean.get() + tall * step(w, z))
                area[j] = base.get()
                level[j] = mean.get()

    def _meet(self, w: Writer, scope: Scope, y: Array, bound: Index) -> tuple[Mask, Mask]:
        """Find every neuron's `place` and jump. Where one reaches an end of [0, 1]; and whether a
        pair beyond the K-th neighbour overlaps."""
        eta, place = scope.shared("eta"), scope.array("place")
        low_end, high_end = scope.array("low_end"), scope.array("high_end")
        low, high = eta * -0.5, 1.0 + eta * 0.5
        inner, outer = eta * 0.5, 1.0 - eta * 0.5
        apart = scope.size("apart") > 0
        crossing, narrow, lost = (w.variable(w.real(0.0) > 1.0) for _ in range(3))
        farthest = w.variable(w.real(float("-inf")))  # of all beyond the K-th on the left

        def put(j: Index) -> None:
            u = w.minimum(w.maximum(y[j * 2 - 1], low), high)
            place[j] = u
            crossing.set(crossing.get() | (u < inner) | (u > outer))
            lost.set(lost.get() | (u < low_end[j]) | (u > high_end[j]))

        def compare(j: Index) -> None:
            farthest.set(w.maximum(farthest.get(), place[j - bound - 1]))
            narrow.set(narrow.get() | (place[j] - farthest.get() < eta))

        w.each(1, scope.m + 1, put)
        with w.when(w.any(lost.get()) & apart):
            with w.range(1, scope.m + 1) as j:
                w.call(self.locate, w.arguments[0], j)
        w.each(bound + 2, scope.m + 1, compare)
        return crossing.get(), narrow.get()

    def _gradient(self) -> Writer:
        """gradient(table, y, g, K): g = −∇L; whether a pair beyond the K-th neighbour overlaps.

        One pass from left to right, plateau by plateau; ends and wider pairs are added after it.
        """
        bit = ir.IntType(1)
        w, scope = self._function("gradient", (ADDRESS, ADDRESS, WHOLE), bit)
        y, g, bound = w.vectors(w.arguments[1]), w.vectors(w.arguments[2]), w.index(w.arguments[3])
        m = scope.m
        eta, per_eta = scope.shared("eta"), scope.shared("per_eta")
        place, weight, misfit, filling = map(scope.array, ("place", "weight", "misfit", "filling"))
        near, size, level_before = map(scope.array, ("near", "size", "before"))
        low, high = eta * -0.5, 1.0 + eta * 0.5
        own = eta * _step.NEAR_MEAN[0]  # η T_ii
        crossing, narrow = self._meet(w, scope, y, bound)
        self._look(w, scope)
        area, level, trim = map(scope.array, ("area", "level", "trim"))
        apart = scope.size("apart") > 0

        def close(j: Index, a: Real, u: Real, sides: Real, pairs: Real) -> None:
            """What neuron j at u with weight a feels."""
            error = sides * 0.5 + (pairs - level[j])
            error = w.where((u > low) & (u < high), error, 0.0)
            misfit[j] = error
            g[j * 2 - 1] = (a * error) * 2.0

        weight[1] = y[2] - y[0]
        excess = w.variable(y[0] * place[1] + own * weight[1] - area[1])  # of plateau i − 1
        filling[0] = area[1]
        under = w.variable(y[0])
        pairs, lean, lean_next = (w.variable(w.real(0.0)) for _ in range(3))

        def advance(i: Index) -> None:
            u, following = place[i], place[i + 1]
            before, here, after = y[i * 2 - 2], y[i * 2], y[i * 2 + 2]
            a, other = here - before, after - here
            weight[i + 1] = other
            gap = following - u
            r = gap * per_eta
            drift = w.variable(here * gap - own * (a - other))
            fill = w.variable(area[i + 1] - area[i])
            over, under_next = w.variable(here), w.variable(here)
            pairs_next, lean_last = (w.variable(w.real(0.0)) for _ in range(2))
            with w.maybe(r < 1.0):
                # Neurons i and i + 1 overlap. As they come closer their weights may grow like one
                # over their distance, with opposite signs. The terms are arranged so that such
                # weights only meet small factors: with h = T(r) − T(0) + r/2 and c = ½ − Q(r),
                # which vanish like r² and r,
                #
                #   ½∂L/∂F_i:  F_i ηr − η (a_i − a_{i+1}) (T(0) − T(r))
                #                = ηr (F_{i−1} + F_{i+1})/2 + η (a_i − a_{i+1}) h,
                #   E_i:       ½(F_{i−1} + F_i) + a_{i+1} Q = ½(F_{i−1} + F_{i+1}) − a_{i+1} c.
                bend, turn = _neighbour_terms(w, r)
                joint = gap * ((before + after) * 0.5) + (eta * bend) * (a - other)
                drift.set(w.where(r < 1.0, joint, drift.get()))
                overlap = eta * w.where(r < 1.0, bend - r * 0.5 + _step.NEAR_MEAN[0], 0.0)
                lean.set(lean.get() + other * overlap)
                lean_last.set(-(a * overlap))
                tight = w.abs(r) < 0.5
                over.set(w.where(tight, after, here))
                under_next.set(w.where(tight, before, here))
                tail = 0.5 - turn
                pairs.set(pairs.get() + w.where(tight, -(other * turn), other * tail))
                pairs_next.set(w.where(tight, a * turn, -(a * tail)))
                with w.maybe(apart):
                    v = near[i]
                    ahead = w.maximum(following - v, 0.0) - w.maximum(u - v, 0.0)
                    first, second = trim[i], trim[i + 1]
                    powers = (second - first) * (
                        (second + first) * (second * second + first * first)
                    )
                    direct = level_before[i] * gap + size[i] * (ahead + eta * powers)
                    same = tight & near[i + 1].equals(v) & w.spread(apart)
                    fill.set(w.where(same, direct, fill.get()))
            filling[i] = fill.get()
            g[i * 2 - 2] = (excess.get() + lean.get()) * -2.0
            close(i, a, u, under.get() + over.get(), pairs.get())
            excess.set(drift.get() - fill.get())
            under.set(under_next.get())
            pairs.set(pairs_next.get())
            lean.set(lean_next.get())
            lean_next.set(lean_last.get())

        w.each(1, m, advance)
        g[m * 2 - 2] = (excess.get() + lean.get()) * -2.0
        close(m, y[m * 2] - y[m * 2 - 2], place[m], under.get() + y[m * 2], pairs.get())
        last = scope.shared("total") - area[m]
        filling[m] = last
        drift_last = y[m * 2] * (1.0 - place[m]) - own * weight[m]
        g[m * 2] = ((drift_last - last) + lean_next.get()) * -2.0
        beyond = w.any(crossing)
        with w.when(beyond | (bound > 1)):
            self._add_wider(w, scope, beyond)
        with w.when(scope.size("reduced") > 0):
            ridge, share = scope.shared("ridge"), scope.array("share")
            weight[0], weight[m + 1] = y[0], 0.0
            share[0], share[m + 1] = 1.0, 0.0

            def hold_back(k: Index) -> None:
                step_up, next_step = weight[k] * share[k], weight[k + 1] * share[k + 1]
                g[k * 2] = g[k * 2] - ridge * (step_up - next_step) * 2.0

            w.each(0, m + 1, hold_back)
        lane = scope.array("lane")
        seen = narrow & (lane[LIVE] > 0.5)
        lane[NARROW] = w.where(seen, w.real(1.0), 0.0)
        w.give(w.any(seen))
        return w

    def _add_wider(self, w: Writer, scope: Scope, crossing: Mask) -> None:
        """Add what pairs beyond the next neighbours, and the ends of [0, 1], do to the gradient."""
        g, bound, m = w.vectors(w.arguments[2]), w.index(w.arguments[3]), scope.m
        eta, per_eta = scope.shared("eta"), scope.shared("per_eta")
        names = ("place", "weight", "misfit", "drift", "pull", "extra")
        place, weight, misfit, drift, pull, extra = map(scope.array, names)

        def clear(j: Index) -> None:
            drift[j] = 0.0
            pull[j] = 0.0
            extra[j] = 0.0

        w.each(0, m + 2, clear)
        with w.range(1, m) as i:
            a, u = weight[i], place[i]
            own_pull, own_misfit = w.variable(pull[i]), w.variable(extra[i])
            end = self._least(w, i + bound, m)
            with w.range(i + 2, end + 1) as j:
                r = (place[j] - u) * per_eta
                with w.when(w.any(r < 1.0)):
                    overlap, tail, _ = pair(w, r, density=False)
                    other = weight[j]
                    own_pull.set(own_pull.get() + other * overlap)
                    own_misfit.set(own_misfit.get() + other * tail)
                    pull[j] = pull[j] + a * overlap
                    extra[j] = extra[j] - a * tail
            pull[i] = own_pull.get()
            extra[i] = own_misfit.get()
        with w.when(crossing):
            w.call(self.edges, w.arguments[0], w.arguments[1])
        low, high = eta * -0.5, 1.0 + eta * 0.5

        def push(k: Index) -> None:
            g[k * 2] = g[k * 2] - (drift[k] - eta * (pull[k] - pull[k + 1])) * 2.0

        def steer(j: Index) -> None:
            u = place[j]
            error = w.where((u > low) & (u < high), misfit[j] + extra[j], 0.0)
            misfit[j] = error
            g[j * 2 - 1] = (weight[j] * error) * 2.0

        w.each(0, m + 1, push)
        w.each(1, m + 1, steer)

    @staticmethod
    def _least(w: Writer, first: Index, second: Index) -> Index:
        return w.where(first < second, first, second)

    # --- stage matrix ---

    @staticmethod
    def _add(scope: Scope, row: Index, below: Index | int, value: Real) -> None:
        """S(row, row − below) += value, below ≥ 0; the last argument of the function is K."""
        band = scope.array("band")
        place = row * scope.stride + below
        band[place] = band[place] + value

    def _add_either(self, scope: Scope, one: Index, other: Index, value: Real) -> None:
        """S(one, other) += value, whichever is the row of the lower triangle."""
        w = scope.writer
        row = w.where(one < other, other, one)
        self._add(scope, row, row + row - one - other, value)

    def _overlap(
        self, scope: Scope, i: Index, j: Index, value: Real, diagonal: float = -2.0
    ) -> None:
        """What T_ij = T_ji, i < j, adds to the block of F; `value` is −2η T_ij.

        Of neighbours, F_i gets it `diagonal` times.
        """
        w = scope.writer
        distance = (j - i) * 2
        self._add(scope, j * 2, distance, value)
        self._add(scope, j * 2, distance + 2, -value)
        self._add(scope, j * 2 - 2, distance, value)
        others = w.where((j - i).equals(1), w.number(diagonal), w.number(-1.0))
        self._add(scope, j * 2 - 2, distance - 2, value * others)

    def _response(self, scope: Scope, j: Index, i: Index, value: Real) -> None:
        """What the coefficient of a_i in E_j adds to the block of (F, u); `value` is −2a_j q_ji."""
        self._add_either(scope, i * 2, j * 2 - 1, value)
        self._add_either(scope, i * 2 - 2, j * 2 - 1, -value)

    def _attraction(self, scope: Scope, i: Index, j: Index, value: Real) -> None:
        """What κ_ij, i < j, adds to the block of u; `value` is 2a_i a_j κ_ij/η."""
        self._add(scope, j * 2 - 1, (j - i) * 2, value)
        self._add(scope, i * 2 - 1, 0, -value)
        self._add(scope, j * 2 - 1, 0, -value)

    def _edge_hessian(self) -> Writer:
        w, scope = self._function("edge_hessian", (ADDRESS, WHOLE))
        y = w.vectors(w.arguments[1])
        m = scope.m
        eta, per_eta = scope.shared("eta"), scope.shared("per_eta")
        left, right, weight = scope.array("left"), scope.array("right_end"), scope.array("weight")
        low = w.variable(y[0] - scope.shared("first"))  # f − f* at 0
        high = w.variable(y[m * 2] - scope.shared("last"))  # and at 1
        with w.range(1, m + 1) as j:
            low.set(low.get() + weight[j] * step(w, left[j]))
            high.set(high.get() - weight[j] * step(w, right[j]))
        with w.range(1, m + 1) as j:
            a = weight[j]
            p, q = left[j], right[j]
            for side, sign in ((left, 1.0), (right, -1.0)):
                own = side[j]
                with w.when(w.any(own > -0.5)):
                    share = step(w, own)
                    if sign > 0:
                        beyond = ramp(w, p) * eta
                        # T_0j; the bias has no neighbour on its left
                        self._add(scope, j * 2, j * 2, beyond * -2.0)
                        twice = w.where(j.equals(1), w.number(4.0), w.number(2.0))
                        self._add(scope, j * 2 - 2, j * 2 - 2, beyond * twice)
                        self._add(scope, j * 2 - 1, j * 2 - 1, (a * share) * 2.0)
                        self._add(
                            scope, j * 2 - 1, 0, (a * low.get()) * (bump(w, p) * per_eta) * -2.0
                        )
                    else:
                        self._add_either(scope, m * 2, j * 2 - 1, (a * share) * 2.0)
                        self._add(
                            scope, j * 2 - 1, 0, (a * high.get()) * (bump(w, q) * per_eta) * 2.0
                        )
                        # −R_j in T_jk for all k ≥ j
                        beyond = ramp(w, q) * eta
                        self._self_overlap(scope, j, beyond * 2.0)
                        with w.range(j + 1, m + 1) as k:
                            self._overlap(scope, j, k, beyond * 2.0)
                    mean, tail = self._own_cut(w, own)
                    self._self_overlap(scope, j, (mean * eta) * -2.0)
                    self._response(scope, j, j, (a * tail) * (2.0 * sign))
                    with w.range(j + 1, m + 1) as k:
                        with w.when(w.any(side[k] > -0.5)):
                            mean = self._cut_of(w, "cut_mean", own, side[k])
                            self._overlap(scope, j, k, (mean * eta) * -2.0)
                            for one, other in ((j, k), (k, j)):
                                tail = self._cut_of(w, "cut_cdf", side[one], side[other])
                                value = (weight[one] * tail) * (2.0 * sign)
                                self._response(scope, one, other, value)
                            density = self._cut_of(w, "cut_density", own, side[k])
                            value = (a * weight[k]) * (density * per_eta)
                            self._attraction(scope, j, k, value * -2.0)
        w.give()
        return w

    def _self_overlap(self, scope: Scope, i: Index, value: Real) -> None:
        """What T_ii adds to the block of F; `value` is −2η T_ii."""
        self._add(scope, i * 2, 0, value)
        self._add(scope, i * 2, 2, -value)
        self._add(scope, i * 2 - 2, 0, value)

    def _hessian(self) -> Writer:
        """hessian(table, y, K): S at y, after `gradient` there."""
        w, scope = self._function("hessian", (ADDRESS, WHOLE))
        bound = w.index(w.arguments[2])
        m, jumps, stride = scope.m, scope.size("jumps"), scope.stride
        eta, per_eta = scope.shared("eta"), scope.shared("per_eta")
        names = ("place", "misfit", "weight", "share", "count", "band")
        place, misfit, weight, share, count, band = map(scope.array, names)
        place[m + 1] = 1.0
        jump, height, near, size = map(scope.array, ("jump", "height", "near", "size"))
        apart = scope.size("apart") > 0
        lane = scope.array("lane")
        rate = 1.0 / (lane[STEP_SIZE] * GAMMA)
        inertia, hold = lane[EPSILON] * rate, scope.array("hold")
        w.each(0, (scope.rows + bound * 2 + 2) * stride, lambda spot: band.__setitem__(spot, 0.0))
        own = eta * _step.NEAR_MEAN[0]  # η T_ii
        # M and the ridge
        firm = inertia + scope.shared("ridge") * 2.0
        hold[0], hold[m + 1] = firm, 0.0
        w.each(1, m + 1, lambda j: hold.__setitem__(j, firm * share[j]))
        reached = w.variable(w.real(0.0))  # beyond 1, by the transition of the neuron before

        def diagonal(k: Index) -> None:
            # 2(u_{k+1} − u_k) − 2η (T_kk + T_{k+1,k+1} − 2T_{k,k+1}); the ends have one neuron
            gap = place[k + 1] - place[k]
            at_end = k.equals(0) | k.equals(m)
            width = w.variable(gap - own * w.where(at_end, w.number(1.0), w.number(2.0)))
            r = w.where(at_end, w.real(2.0), gap * per_eta)
            with w.maybe(r < 1.0):
                bend = _neighbour_terms(w, r)[0]
                width.set(w.where(r < 1.0, (eta * bend) * 2.0, width.get()))
            beyond = w.where(
                k.equals(m), w.real(0.0), eta * ramp(w, (place[k + 1] - 1.0) * per_eta)
            )
            band[k * 2 * stride] = (width.get() + (reached.get() - beyond)) * 2.0 + (
                hold[k] + hold[k + 1]
            )
            reached.set(beyond)

        w.each(0, m + 1, diagonal)
        crossing = w.variable(w.real(0.0) > 1.0)

        def neuron(j: Index) -> None:
            a, error, u = weight[j], misfit[j], place[j]
            crossing.set(crossing.get() | (u < eta * 0.5) | (u > 1.0 - eta * 0.5))
            self._add(scope, j * 2, 2, own * 2.0 - hold[j])
            self._add(scope, j * 2, 1, error * -2.0 - a)
            self._add(scope, j * 2 - 1, 1, error * 2.0 - a)
            t = w.maximum(0.5 - w.abs((u - near[j]) * per_eta), 0.0)
            slope = w.variable(size[j] * (t * t))
            with w.when(~apart):
                slope.set(w.real(0.0))
                with w.range(0, jumps) as k:
                    t = w.maximum(0.5 - w.abs((u - jump[k]) * per_eta), 0.0)
                    slope.set(slope.get() + height[k] * (t * t))
            curvature = (a * slope.get()) * (per_eta * 24.0)
            self._add(scope, j * 2 - 1, 0, curvature + rate * count[j])

        w.each(1, m + 1, neuron)
        with w.range(1, m) as i:
            a, u = weight[i], place[i]
            with w.range(i + 1, self._least(w, i + bound, m) + 1) as j:
                r = (place[j] - u) * per_eta
                with w.when(w.any(r < 1.0)), w.stores_last():
                    overlap, tail, density = pair(w, r, density=True)
                    other = weight[j]
                    # on the diagonal it is counted already
                    self._overlap(scope, i, j, (eta * overlap) * -2.0, diagonal=0.0)
                    self._response(scope, i, j, (a * tail) * -2.0)
                    self._response(scope, j, i, (other * tail) * 2.0)
                    self._attraction(scope, i, j, (a * other) * (density * per_eta) * 2.0)
        with w.when(w.any(crossing.get())):
            w.call(self.edge_hessian, *w.arguments)
        w.give()
        return w

    # --- banded LDLᵀ ---

    def _for_bound(self, name: str, extra: tuple[Any, ...], narrow: Any, wide: Any) -> Writer:
        """A function whose last argument is K: narrow bands have code of their own."""
        functions = {bound: narrow(bound) for bound in range(NARROW_BANDS)}
        general = wide()
        w, _ = self._function(name, (*extra, WHOLE))
        bound = w.index(w.arguments[-1])
        for case, function in functions.items():
            with w.when(bound.equals(case)):
                w.call(function, *w.arguments)
        with w.when(bound >= NARROW_BANDS):
            w.call(general, *w.arguments)
        w.give()
        return w

    def _factor(self) -> Writer:
        """factor(table, K): L and 1/D in place of S."""
        return self._for_bound("factor", (), self._factor_narrow, self._factor_wide)

    def _factor_narrow(self, bound: int) -> Writer:
        """The same for one K, without inner loops."""
        w, scope = self._function(f"factor_{bound}", (WHOLE,))
        width, stride = 2 * bound + 2, 2 * bound + 3
        band, inverse = scope.array("band"), scope.array("inverse")
        if bound <= MOST_IN_REGISTERS:
            # S(k + i, k + j), less what the columns before k take off
            rest = [
                [w.variable(band[i * stride + (i - j)]) for j in range(i + 1)]
                for i in range(width + 1)
            ]

            def eliminate(k: Index) -> None:
                column = [row[0].get() for row in rest]
                d = 1.0 / column[0]
                inverse[k] = d
                after = k * stride + (width + 1) * stride
                new = [band[after + (width - j)] for j in range(width + 1)]
                for i in range(1, width + 1):
                    ratio = Real(w, (column[i] * d).ir)
                    band[k * stride + i * (stride + 1)] = ratio
                    for j in range(1, i + 1):
                        rest[i - 1][j - 1].set(rest[i][j].get() - ratio * column[j])
                for j, value in enumerate(new):
                    rest[width][j].set(value)

            w.each(0, scope.rows, eliminate)
            w.give()
            return w
        with w.range(0, scope.rows) as k:
            place = k * stride
            d = 1.0 / band[place]
            inverse[k] = d
            # rows beyond the last are zero, and stay so
            column = [band[place + i * (stride + 1)] for i in range(1, width + 1)]
            for i, value in enumerate(column, start=1):
                ratio = Real(w, (value * d).ir)
                row = place + i * stride
                for j in range(1, i + 1):
                    band[row + (i - j)] = band[row + (i - j)] - ratio * column[j - 1]
                band[row + i] = ratio
        w.give()
        return w

    def _factor_wide(self) -> Writer:
        """The same for any K."""
        w, scope = self._function("factor_wide", (WHOLE,))
        bound = w.index(w.arguments[1])
        width, stride, rows = bound * 2 + 2, scope.stride, scope.rows
        band, inverse = scope.array("band"), scope.array("inverse")
        with w.range(0, rows) as k:
            d = 1.0 / band[k * stride]
            inverse[k] = d
            end = self._least(w, width, rows - 1 - k)
            with w.range(1, end + 1) as i:
                row = (k + i) * stride
                value = band[row + i]
                with w.when(w.any(~value.equals(0.0))):
                    ratio = Real(w, (value * d).ir)
                    with w.range(1, i) as j:
                        place = row + i - j
                        band[place] = band[place] - ratio * band[(k + j) * stride + j]
                    band[row] = band[row] - ratio * value
        with w.range(0, rows) as k:
            d = inverse[k]
            end = self._least(w, width, rows - 1 - k)
            with w.range(1, end + 1) as i:
                place = (k + i) * stride + i
                band[place] = band[place] * d
        w.give()
        return w

    def _solve(self) -> Writer:
        """solve(table, x, K): x ← S⁻¹ x."""
        return self._for_bound("solve", (ADDRESS,), self._solve_narrow, self._solve_wide)

    def _solve_narrow(self, bound: int) -> Writer:
        """The same for one K, with the last results in registers."""
        w, scope = self._function(f"solve_{bound}", (ADDRESS, WHOLE))
        x, rows = w.vectors(w.arguments[1]), scope.rows
        band, inverse = scope.array("band"), scope.array("inverse")
        width, stride = 2 * bound + 2, 2 * bound + 3
        window = [w.variable(w.real(0.0)) for _ in range(width)]  # the last result first

        def eliminate(total: Real, entry: Any) -> Real:
            for distance in range(width, 0, -1):
                total = total - entry(distance) * window[distance - 1].get()
            for distance in range(width - 1, 0, -1):
                window[distance].set(window[distance - 1].get())
            window[0].set(total)
            return total

        def forward(i: Index) -> None:
            place = i * stride
            x[i] = eliminate(x[i], lambda below: band[place + below])

        def backward(i: Index) -> None:
            # rows beyond the last are zero
            total = Real(w, (x[i] * inverse[i]).ir)
            place = i * stride
            x[i] = eliminate(total, lambda above: band[place + above * (stride + 1)])

        w.each(0, rows, forward)
        for value in window:
            value.set(w.real(0.0))
        w.each(rows - 1, -1, backward, step=-1)
        w.give()
        return w

    def _solve_wide(self) -> Writer:
        """The same for any K."""
        w, scope = self._function("solve_wide", (ADDRESS, WHOLE))
        x, bound = w.vectors(w.arguments[1]), w.index(w.arguments[2])
        width, stride, rows = bound * 2 + 2, scope.stride, scope.rows
        band, inverse = scope.array("band"), scope.array("inverse")
        with w.range(1, rows) as i:
            total = w.variable(x[i])
            with w.range(self._least(w, width, i), 0, -1) as below:
                total.set(total.get() - band[i * stride + below] * x[i - below])
            x[i] = total.get()
        with w.range(rows - 1, -1, -1) as i:
            total = w.variable(Real(w, (x[i] * inverse[i]).ir))
            with w.range(self._least(w, width, rows - 1 - i), 0, -1) as above:
                row = i + above
                total.set(total.get() - band[row * stride + above] * x[row])
            x[i] = total.get()
        w.give()
        return w

    # --- one step ---

    def _project(self) -> Writer:
        """project(table, y, K): F ← F*(u), the plateau values of least loss; widens K as needed."""
        w, scope = self._function("project", (ADDRESS, WHOLE), WHOLE)
        y, bound = w.vectors(w.arguments[1]), w.variable(w.index(w.arguments[2]))
        right, band = scope.array("right"), scope.array("band")
        rows = scope.rows
        done = w.variable(w.index(0))
        with w.repeat() as turn:
            self._forget(w, scope, y)
            narrow = self._gradient_of(w, y, right, bound.get())
            narrow = narrow & (bound.get() < scope.size("widest_band"))
            bound.set(w.where(narrow, self._wider(scope, bound.get()), bound.get()))
            turn.again_if(narrow)
            turn.stop_if(done.get() > 3)
            with w.when(done.get().equals(0)):
                w.call(self.hessian, w.arguments[0], y.base, bound.get())
                stride = bound.get() * 2 + 3
                with w.range(0, rows) as row:
                    with w.range(0, stride) as below:
                        # positions stay: no coupling with them
                        odd = self._odd(w, row) | self._odd(w, row - below)
                        kept = w.where(odd, w.number(0.0), w.number(1.0))
                        place = row * stride + below
                        band[place] = band[place] * kept
                    with w.when(self._odd(w, row)):
                        band[row * stride] = 1.0
                w.call(self.factor, w.arguments[0], bound.get())
            with w.range(1, rows, 2) as row:
                right[row] = 0.0
            w.call(self.solve, w.arguments[0], right.base, bound.get())
            with w.range(0, rows, 2) as row:
                y[row] = y[row] + right[row]
            done.set(done.get() + 1)
        w.give(bound.get())
        return w

    def _condition(self) -> Writer:
        """condition(table, K): the condition number of the Gram matrix, into right[0], after
        `project`.

        The smallest eigenvalue is that of inverse iteration, with G⁻¹ = 2C⁻¹ (∂²L/∂F²)⁻¹ C⁻ᵀ where
        F = Ca; the largest one is taken at η → 0, where G_ij = 1 − max(u_i, u_j).
        """
        w, scope = self._function("condition", (WHOLE,))
        m, bound = scope.m, w.index(w.arguments[1])
        x, right, place = scope.array("stage"), scope.array("right"), scope.array("place")
        inverse, largest = w.variable(w.real(0.0)), w.variable(w.real(0.0))

        def scale() -> None:
            squares = w.variable(w.real(1e-300))
            with w.range(0, m + 1) as k:
                squares.set(squares.get() + x[k] * x[k])
            factor = 1.0 / w.sqrt(squares.get())
            with w.range(0, m + 1) as k:
                x[k] = x[k] * factor

        # the closest neurons want opposite weights
        sign = w.variable(w.real(1.0))
        with w.range(0, m + 1) as k:
            x[k] = sign.get()
            sign.set(-sign.get())
        with w.range(0, ITERATIONS):
            scale()
            x[m + 1] = 0.0
            with w.range(0, m + 1) as k:
                right[k * 2] = x[k] - x[k + 1]
            with w.range(1, scope.rows, 2) as row:
                right[row] = 0.0
            w.call(self.solve, w.arguments[0], right.base, bound)
            before, product = w.variable(w.real(0.0)), w.variable(w.real(0.0))
            with w.range(0, m + 1) as k:
                moved = (right[k * 2] - before.get()) * 2.0
                before.set(right[k * 2])
                product.set(product.get() + moved * x[k])
                x[k] = moved
            inverse.set(product.get())
        with w.range(0, m + 1) as k:
            x[k] = 1.0
        with w.range(0, ITERATIONS):
            scale()
            # Σ_j (1 − max(u_i, u_j)) x_j: from the right, then the left
            tail, product = w.variable(w.real(0.0)), w.variable(w.real(0.0))
            with w.range(m, -1, -1) as k:
                right[k] = tail.get()
                tail.set(tail.get() + (1.0 - place[k]) * x[k])
            head = w.variable(w.real(0.0))
            with w.range(0, m + 1) as k:
                head.set(head.get() + x[k])
                moved = right[k] + (1.0 - place[k]) * head.get()
                product.set(product.get() + moved * x[k])
                x[k] = moved
            largest.set(product.get())
        right[0] = largest.get() * inverse.get()
        w.give()
        return w

    @staticmethod
    def _odd(w: Writer, value: Index) -> Mask:
        one = ir.Constant(WHOLE, 1)
        bit = w.builder.and_(value.ir, one)
        return Mask(w, w.builder.icmp_signed("==", bit, one))

    def _gradient_of(self, w: Writer, y: Array, g: Array, bound: Index) -> Mask:
        return Mask(w, w.call(self.gradient, w.arguments[0], y.base, g.base, bound))

    def _band(self) -> Writer:
        """band(table): the number K of neighbours that overlap in some lane.

        The number of each lane is left in `lane[OVERLAPS]`.
        """
        w, scope = self._function("band_of", (), WHOLE)
        y, lane = scope.array("state"), scope.array("lane")
        m, eta = scope.m, scope.shared("eta")
        low, high = eta * -0.5, 1.0 + eta * 0.5
        count, live = w.variable(w.index(0)), lane[LIVE] > 0.5
        lane[OVERLAPS] = 0.0

        def place(j: Index) -> Real:
            return w.minimum(w.maximum(y[j * 2 - 1], low), high)

        with w.repeat() as turn:
            further = count.get() + 1
            found = w.variable(w.real(0.0) > 1.0)

            def compare(i: Index, further: Index = further, found: Variable = found) -> None:
                close = place(i + further) - place(i) < eta * OVERLAP
                found.set(found.get() | (close & live))

            w.each(1, m - further + 1, compare)
            turn.stop_if(~w.any(found.get()))
            count.set(further)
            lane[OVERLAPS] = w.where(found.get(), w.to_real(further), lane[OVERLAPS])
        w.give(count.get())
        return w

    def _attempt(self) -> Writer:
        """attempt(table, K): k_i and y at the end of a step; the K that was wide enough."""
        w, scope = self._function("attempt", (WHOLE,), WHOLE)
        bound = w.variable(w.index(w.arguments[1]))
        names = ("state", "next", "stage", "stages", "lane", "share", "count")
        state, following, stage, stages, lane, share, count = map(scope.array, names)
        rows, m, widest = scope.rows, scope.m, scope.size("widest_band")
        k = [stages.offset(rows * i) for i in range(STAGES)]
        lane[WILD] = 0.0
        share[0] = 1.0
        w.each(1, m + 1, lambda j: count.__setitem__(j, 1.0 / share[j]))
        with w.repeat() as turn:

            def widen_if(narrow: Mask) -> None:
                # where the band cannot be wider, the step is too long for the lane
                full = bound.get() >= widest
                with w.when(narrow & full):
                    lane[WILD] = w.maximum(lane[WILD], lane[NARROW])
                bound.set(w.where(narrow, self._wider(scope, bound.get()), bound.get()))
                turn.again_if(narrow)

            self._forget(w, scope, state)
            # the band has room for every state
            narrow = self._gradient_of(w, state, k[0], bound.get())
            bound.set(w.where(narrow, self._wider(scope, bound.get()), bound.get()))
            turn.again_if(narrow)
            w.call(self.hessian, w.arguments[0], state.base, bound.get())
            w.call(self.factor, w.arguments[0], bound.get())
            w.call(self.solve, w.arguments[0], k[0].base, bound.get())
            for i in range(1, STAGES):
                self._move(w, scope, i)
                widen_if(self._gradient_of(w, stage, k[i], bound.get()))
                self._mix(w, scope, i)
                w.call(self.solve, w.arguments[0], k[i].base, bound.get())
            last = k[STAGES - 1]
            w.each(0, rows, lambda row: following.__setitem__(row, stage[row] + last[row]))
            turn.stop_if(w.true)
        w.give(bound.get())
        return w

    def _move(self, w: Writer, scope: Scope, i: int) -> None:
        """y_i. Lanes in which it is wild get their state back; their step will be rejected."""
        state, stage, stages, lane = map(scope.array, ("state", "stage", "stages", "lane"))
        k = [stages.offset(scope.rows * j) for j in range(i)]
        wild, farthest = w.variable(lane[WILD] > 0.5), scope.shared("eta") * FARTHEST

        def moved(row: Index, origin: Real) -> Real:
            if i >= 6:  # the last two stages differ from the one before by its k alone
                return stage[row] + k[i - 1][row]
            for j in range(i):
                if A[i, j]:
                    origin = origin + k[j][row] * float(A[i, j])
            return origin

        def move(row: Index) -> None:
            stage[row] = moved(row, state[row])
            before = state[row + 1]
            place = moved(row + 1, before)
            stage[row + 1] = place
            wild.set(wild.get() | ~(w.abs(place - before) <= farthest))

        w.each(0, scope.rows - 1, move, step=2)
        stage[scope.rows - 1] = moved(scope.rows - 1, state[scope.rows - 1])
        with w.when(w.any(wild.get())):
            lane[WILD] = w.where(wild.get(), w.real(1.0), 0.0)
            with w.range(0, scope.rows) as row:
                stage[row] = w.where(wild.get(), state[row], stage[row])

    def _mix(self, w: Writer, scope: Scope, i: int) -> None:
        """Add M Σ_j (C_ij/h) k_j to −∇L(y_i); on F, M is the second difference of the shares."""
        stages, lane, share, count = map(scope.array, ("stages", "lane", "share", "count"))
        k = [stages.offset(scope.rows * j) for j in range(i)]
        now, per_step = stages.offset(scope.rows * i), 1.0 / lane[STEP_SIZE]
        epsilon = Real(w, lane[EPSILON].ir)

        def mixed(row: Index | int) -> Real:
            total = k[0][row] * float(C[i, 0])
            for j in range(1, i):
                total = total + k[j][row] * float(C[i, j])
            return Real(w, (Real(w, total.ir) * per_step).ir)

        last = w.variable(mixed(0))
        flux = w.variable(last.get() * share[0])

        def mix(row: Index) -> None:
            j = Index(w, w.builder.lshr(row.ir, ir.Constant(WHOLE, 1)))
            following = mixed(row + 2)
            ahead = (following - last.get()) * share[j + 1]
            now[row] = now[row] + epsilon * (flux.get() - ahead)
            now[row + 1] = now[row + 1] + mixed(row + 1) * count[j + 1]
            flux.set(ahead)
            last.set(following)

        w.each(0, scope.rows - 1, mix, step=2)
        final = scope.rows - 1
        now[final] = now[final] + epsilon * flux.get()

    @staticmethod
    def _wider(scope: Scope, bound: Index) -> Index:
        w, widest = scope.writer, scope.size("widest_band")
        quarter = Index(w, w.builder.lshr(bound.ir, ir.Constant(WHOLE, 2)))
        wanted = bound + quarter + 1
        return w.where(wanted < widest, wanted, widest)

    def _densify(self) -> Writer:
        """densify(table): the coefficients of the dense output."""
        w, scope = self._function("densify")
        stages, dense, rows = scope.array("stages"), scope.array("dense"), scope.rows
        k = [stages.offset(rows * i) for i in range(STAGES)]

        def bend(row: Index) -> None:
            loaded = [k[j][row] for j in range(STAGES)]
            for i in range(len(H)):
                total = loaded[0] * float(H[i, 0])
                for j in range(1, STAGES):
                    total = total + loaded[j] * float(H[i, j])
                dense[rows * i + row] = total

        w.each(0, rows, bend)
        w.give()
        return w

    # --- lanes ---

    def _column(
        self, scope: Scope, name: str, row: Index | int, lane: Index
    ) -> tuple[Array, Index]:
        """Where one lane's number of a vector is."""
        row = scope.writer.index(row) if isinstance(row, int) else row
        return scope.array(name).numbers(), row * self.lanes + lane

    def _get(self, scope: Scope, name: str, row: Index | int, lane: Index) -> Real:
        numbers, place = self._column(scope, name, row, lane)
        return numbers[place]

    def _put(self, scope: Scope, name: str, row: Index | int, lane: Index, value: Any) -> None:
        numbers, place = self._column(scope, name, row, lane)
        numbers[place] = value

    def _record(self) -> Writer:
        """record(table, lane, θ): the state of a lane at a share θ of its step."""
        w, scope = self._function("record", (WHOLE, ir.DoubleType()))
        lane, theta = w.index(w.arguments[1]), Real(w, w.arguments[2])
        start, records = scope.array("start")[lane], scope.array("record")
        target = start * scope.size("times") + records[lane]
        out = scope.array("record_state").offset(target * scope.rows)
        order = scope.array("record_order").offset(target * scope.m)
        rows, rest = scope.rows, 1.0 - theta
        with w.range(0, rows) as row:
            y0, y1 = (self._get(scope, name, row, lane) for name in ("state", "next"))
            d0, d1, d2 = (self._get(scope, "dense", rows * i + row, lane) for i in range(3))
            bend = d0 + theta * (d1 + theta * d2)
            out[row] = rest * y0 + theta * (y1 + rest * bend)
        with w.range(0, scope.m) as j:
            order[j] = self._get(scope, "order", j + 1, lane)
        records[lane] = records[lane] + 1
        w.give()
        return w

    def _refill(self) -> Writer:
        """refill(table, lane, turn): take the start whose turn it is, or come to rest."""
        w, scope = self._function("refill", (WHOLE, WHOLE))
        lane, turn = (w.index(argument) for argument in w.arguments[1:])
        starts, rows, m = scope.size("starts"), scope.rows, scope.m
        self._put(scope, "lane", LIVE, lane, 0.0)
        self._put(scope, "lane", TIME, lane, 0.0)
        with w.when(turn >= starts):
            # a lane at rest holds the first start, and takes steps that come to nothing
            self._put(scope, "lane", STEP_SIZE, lane, scope.number("least_step"))
            self._put(scope, "lane", EPSILON, lane, 1.0)
            given = scope.array("start_state")
            with w.range(0, rows) as row:
                self._put(scope, "state", row, lane, given[row])
            with w.range(1, m + 1) as j:
                self._put(scope, "share", j, lane, 1.0)
        with w.when(turn < starts):
            start = scope.array("visits")[turn]
            self._put(scope, "lane", LIVE, lane, 1.0)
            epsilon = scope.array("start_epsilon")[start]
            self._put(scope, "lane", EPSILON, lane, epsilon)
            longest = scope.number("first_step")
            # weights relax at rates up to about 2 (m + 1) / ε
            first = epsilon * (0.2 / w.to_real(m + 1))
            first = w.where(epsilon > 0.0, w.minimum(first, longest), longest)
            self._put(scope, "lane", STEP_SIZE, lane, first)
            for name in ("record", "steps", "accepts", "widest"):
                scope.array(name)[lane] = w.index(0)
            scope.array("start")[lane] = start
            given = scope.array("start_state").offset(start * rows)
            with w.range(0, rows) as row:
                self._put(scope, "state", row, lane, given[row])
                self._put(scope, "next", row, lane, given[row])
                for i in range(3):
                    self._put(scope, "dense", rows * i + row, lane, 0.0)
            for name in ("order", "share"):
                given = scope.array(f"start_{name}").offset(start * m)
                with w.range(0, m) as j:
                    self._put(scope, name, j + 1, lane, given[j])
            with w.when(scope.array("tau")[0] <= 0.0):
                w.call(self.record, w.arguments[0], lane, w.number(0.0))
        w.give()
        return w

    def _error(self, w: Writer, scope: Scope) -> None:
        """The scaled error of the step, and what follows for its size."""
        state, following, lane = map(scope.array, ("state", "next", "lane"))
        m, rows = scope.m, scope.rows
        error = scope.array("stages").offset(rows * (STAGES - 1))
        rtol, atol = scope.shared("rtol"), scope.shared("atol")
        squares, largest, sizes = (w.variable(w.real(0.0)) for _ in range(3))

        def scaled(error: Real, before: Real, after: Real) -> Real:
            return error / (atol + rtol * w.maximum(w.abs(before), w.abs(after)))

        first = scaled(error[0], state[0], following[0])
        squares.set(first * first)

        def measure(j: Index) -> None:
            now, last = j * 2, j * 2 - 2
            fast = (values[now] - values[last] for values in (error, state, following))
            size = scaled(*fast)
            squares.set(squares.get() + size * size)
            position = j * 2 - 1
            size = w.abs(scaled(error[position], state[position], following[position]))
            largest.set(w.maximum(size, largest.get()))
            sizes.set(sizes.get() + size)

        w.each(1, m + 1, measure)
        count = w.splat(w.to_real(m + 1))
        mean = w.sqrt(squares.get() / count) * scope.shared("fast_share")
        total = w.maximum(mean, largest.get() * scope.shared("per_scale"))
        gap = (squares.get() - squares.get()) + (sizes.get() - sizes.get())
        finite = gap.equals(0.0) & (lane[WILD] < 0.5)
        good = finite & (total < 1.0)
        # beyond these the factor is at its bounds
        within = w.minimum(w.maximum(total, 1e-6), 1e4)
        factor = w.inverse_root(within, 5) * 0.9
        factor = w.minimum(w.maximum(factor, 0.2), 10.0)
        factor = w.where(good, factor, w.minimum(factor, 1.0))
        lane[FACTOR] = w.where(finite, factor, 0.2)
        lane[LOST] = w.where(finite, w.real(0.0), 1.0)
        lane[ACCEPTED] = w.where(good, w.real(1.0), 0.0)

    def _sort(self, w: Writer, scope: Scope) -> None:
        """Put the neurons of every lane in order again."""
        state, order, share = map(scope.array, ("state", "order", "share"))
        m = scope.m
        with w.repeat() as turn:
            moved = w.variable(w.real(0.0) > 1.0)
            with w.range(1, m) as k:
                left, right = state[k * 2 - 1], state[k * 2 + 1]
                swap = right < left
                with w.when(w.any(swap)):
                    moved.set(moved.get() | swap)
                    state[k * 2 - 1] = w.where(swap, right, left)
                    state[k * 2 + 1] = w.where(swap, left, right)
                    own = state[k * 2]
                    other = state[k * 2 - 2] + state[k * 2 + 2] - own
                    state[k * 2] = w.where(swap, other, own)
                    for labels in (order, share):
                        first, second = labels[k], labels[k + 1]
                        labels[k] = w.where(swap, second, first)
                        labels[k + 1] = w.where(swap, first, second)
            turn.stop_if(~w.any(moved.get()))

    def _advance(self) -> Writer:
        """advance(table): solve starts from the queue until it is empty; on a GPU one a thread."""
        w, scope = self._function("advance")
        table = w.arguments[0]
        state, following, lane = map(scope.array, ("state", "next", "lane"))
        steps, accepts, widest = map(scope.array, ("steps", "accepts", "widest"))
        records, tau = scope.array("record"), scope.array("tau")
        end = scope.shared("end")
        with w.range(0, self.lanes) as each:
            first = w.thread() if w.target.cuda else w.take_next(scope.array("queue"))
            w.call(self.refill, table, each, first)
        with w.repeat() as turn:
            live = lane[LIVE] > 0.5
            turn.stop_if(~w.any(live))
            size, time = lane[STEP_SIZE], lane[TIME]
            left = end - time
            closing = size * 1.0001 > left
            lane[STEP_SIZE] = w.where(closing & live, left, size)
            lane[NEXT_TIME] = w.where(closing, end, time + size)
            needed = w.index(w.call(self.band, table))
            with w.when(needed >= scope.size("widest_band")):
                with w.range(0, self.lanes) as each:
                    need = w.to_index(self._get(scope, "lane", OVERLAPS, each))
                    live_here = self._get(scope, "lane", LIVE, each) > 0.5
                    with w.when(live_here & (need >= scope.size("widest_band"))):
                        self._end(w, scope, each, scope.size("too_wide"))
            turn.again_if(needed >= scope.size("widest_band"))
            w.call(self.attempt, table, needed)
            self._error(w, scope)
            due = w.variable(w.index(0))
            with w.range(0, self.lanes) as each:
                live_here = self._get(scope, "lane", LIVE, each) > 0.5
                with w.when(live_here):
                    steps[each] = steps[each] + 1
                    need = w.to_index(self._get(scope, "lane", OVERLAPS, each))
                    widest[each] = w.where(widest[each] < need, need, widest[each])
                accepted = self._get(scope, "lane", ACCEPTED, each) > 0.5
                with w.when(live_here & accepted):
                    accepts[each] = accepts[each] + 1
                    with w.when(tau[records[each]] <= self._get(scope, "lane", NEXT_TIME, each)):
                        due.set(w.index(1))
            with w.when(due.get() > 0):
                w.call(self.densify, table)
                with w.range(0, self.lanes) as each:
                    accepted = self._get(scope, "lane", ACCEPTED, each) > 0.5
                    live_here = self._get(scope, "lane", LIVE, each) > 0.5
                    with w.when(live_here & accepted):
                        time_here, size_here, next_here = (
                            self._get(scope, "lane", row, each)
                            for row in (TIME, STEP_SIZE, NEXT_TIME)
                        )
                        with w.repeat() as again:
                            # the place behind the last recorded time holds infinity
                            at = tau[records[each]]
                            again.stop_if(at > next_here)
                            theta = w.where(
                                at.equals(next_here), w.number(1.0), (at - time_here) / size_here
                            )
                            w.call(self.record, table, each, theta)
            accepted = (lane[ACCEPTED] > 0.5) & (lane[LIVE] > 0.5)

            def keep(row: Index, accepted: Mask = accepted) -> None:
                state[row] = w.where(accepted, following[row], state[row])

            w.each(0, scope.rows, keep)
            self._sort(w, scope)
            lane[TIME] = w.where(accepted, lane[NEXT_TIME], lane[TIME])
            live = lane[LIVE] > 0.5
            lane[STEP_SIZE] = w.where(live, lane[STEP_SIZE] * lane[FACTOR], lane[STEP_SIZE])
            with w.range(0, self.lanes) as each:
                with w.when(self._get(scope, "lane", LIVE, each) > 0.5):
                    self._close(w, scope, each)
        w.give()
        return w

    def _close(self, w: Writer, scope: Scope, each: Index) -> None:
        """If a lane has come to an end, write how and take the next start."""
        at = self._get(scope, "lane", TIME, each)
        steps = scope.array("steps")[each]
        small = self._get(scope, "lane", STEP_SIZE, each) < scope.number("least_step")
        rejected = self._get(scope, "lane", ACCEPTED, each) < 0.5
        lost = self._get(scope, "lane", LOST, each) > 0.5
        # the codes of `Status`
        status = w.where(steps >= scope.size("max_steps"), w.index(1), w.index(0))
        stuck = w.where(lost, w.index(3), w.index(2))
        status = w.where(small & rejected, stuck, status)
        finished = at >= scope.number("end")
        status = w.where(finished, w.index(0), status)
        with w.when(finished | (status > 0)):
            self._end(w, scope, each, status)

    def _end(self, w: Writer, scope: Scope, each: Index, status: Index) -> None:
        start = scope.array("start")[each]
        scope.array("status")[start] = status
        scope.array("step_count")[start] = scope.array("steps")[each]
        scope.array("accept_count")[start] = scope.array("accepts")[each]
        scope.array("bandwidth")[start] = scope.array("widest")[each]
        scope.array("record_count")[start] = scope.array("record")[each]
        scope.array("reached")[start] = self._get(scope, "lane", TIME, each)
        # a thread of a GPU has one start: those of a warp, which move together, are alike
        cuda = w.target.cuda
        following = scope.size("starts") if cuda else w.take_next(scope.array("queue"))
        w.call(self.refill, w.arguments[0], each, following)

    # --- before and after ---

    def _gather(self, w: Writer, scope: Scope, first: Index, last: Index, source: str, order: str):
        """Load the listed states `first`, … before `last` into the lanes; spare lanes repeat."""
        lane, listed = scope.array("lane"), scope.array("which")
        lane[STEP_SIZE] = 1.0
        lane[EPSILON] = 0.0
        lane[LIVE] = 1.0
        with w.range(0, self.lanes) as each:
            wanted = first + each
            which = listed[w.where(wanted < last, wanted, last - 1)]
            given = scope.array(source).offset(which * scope.rows)
            with w.range(0, scope.rows) as row:
                self._put(scope, "state", row, each, given[row])
            given = scope.array(order).offset(which * scope.m)
            with w.range(0, scope.m) as j:
                self._put(scope, "order", j + 1, each, given[j])
                self._put(scope, "share", j + 1, each, 1.0)
                self._put(scope, "count", j + 1, each, 1.0)

    def _settle(self) -> Writer:
        """settle(table, first, last): the listed starts onto the critical manifold."""
        w, scope = self._function("settle", (WHOLE, WHOLE))
        first, last = (w.index(argument) for argument in w.arguments[1:])
        state = scope.array("state")
        with self._groups(w, first, last) as group:
            self._gather(w, scope, group, last, "start_state", "start_order")
            w.call(self.project, w.arguments[0], state.base, w.index(1))
            with w.range(0, self._least(w, w.index(self.lanes), last - group)) as each:
                which = scope.array("which")[group + each]
                out = scope.array("start_state").offset(which * scope.rows)
                with w.range(0, scope.rows) as row:
                    out[row] = self._get(scope, "state", row, each)
        w.give()
        return w

    def _finish(self) -> Writer:
        """finish(table, first, last): weights, positions and losses of the listed records."""
        w, scope = self._function("finish", (WHOLE, WHOLE))
        first, last = (w.index(argument) for argument in w.arguments[1:])
        state, right, filling = map(scope.array, ("state", "right", "filling"))
        m = scope.m
        losses, fast, slow = map(scope.array, ("loss", "fast", "slow"))
        with self._groups(w, first, last) as group:
            self._gather(w, scope, group, last, "record_state", "record_order")
            bound = w.variable(w.index(1))
            with w.when(scope.size("reduced") > 0):
                settled = w.call(self.project, w.arguments[0], state.base, bound.get())
                bound.set(w.index(settled))
                w.call(self.condition, w.arguments[0], bound.get())
                with w.range(0, self._least(w, w.index(self.lanes), last - group)) as each:
                    which = scope.array("which")[group + each]
                    scope.array("condition")[which] = self._get(scope, "right", 0, each)
            with w.repeat() as turn:
                self._forget(w, scope, state)
                narrow = self._gradient_of(w, state, right, bound.get())
                turn.stop_if(~narrow | (bound.get() >= scope.size("widest_band")))
                bound.set(self._wider(scope, bound.get()))
            loss = w.variable(scope.shared("square"))
            with w.range(0, m + 1) as k:
                loss.set(loss.get() - state[k * 2] * (right[k * 2] * 0.5 + filling[k]))
            right[0] = loss.get()
            with w.range(0, self._least(w, w.index(self.lanes), last - group)) as each:
                which = scope.array("which")[group + each]
                losses[which] = self._get(scope, "right", 0, each)
                weights = fast.offset(which * (m + 1))
                weights[0] = self._get(scope, "state", 0, each)
                positions = slow.offset(which * m)
                with w.range(1, m + 1) as j:
                    neuron = w.to_index(self._get(scope, "order", j, each))
                    level, before = (
                        self._get(scope, "state", row, each) for row in (j * 2, j * 2 - 2)
                    )
                    weights[neuron + 1] = level - before
                    positions[neuron] = self._get(scope, "state", j * 2 - 1, each)
        w.give()
        return w
