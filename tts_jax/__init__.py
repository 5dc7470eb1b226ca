"""Fast, exact simulation of two-timescale (fast–slow) learning dynamics in JAX."""

from tts_jax import (
    checks as checks,
    fast as fast,
    geometry as geometry,
    regime as regime,
    theory as theory,
)
from tts_jax._curvature import (
    Curvature as Curvature,
    smallest_curvature as smallest_curvature,
)
from tts_jax._flow import flow as flow
from tts_jax._hitting import hitting_times as hitting_times
from tts_jax._limit import limit as limit
from tts_jax._precision import double_precision as double_precision
from tts_jax._problem import AbstractProblem as AbstractProblem, State as State
from tts_jax._rosenbrock import Rodas5P as Rodas5P
from tts_jax._separation import separation as separation
from tts_jax._sgd import sgd as sgd
from tts_jax._sharp_limit import sharp_limit as sharp_limit
from tts_jax._sweep import Grid as Grid, resume as resume, sweep as sweep
from tts_jax._trajectory import (
    Event as Event,
    Status as Status,
    Trajectory as Trajectory,
    load as load,
)
from tts_jax._version import __version__ as __version__
from tts_jax.problems._energy_distance import (
    circle_energy_distance as circle_energy_distance,
    energy_distance as energy_distance,
)
from tts_jax.problems._targets import (
    Function as Function,
    PiecewiseConstant as PiecewiseConstant,
    PiecewiseLinear as PiecewiseLinear,
)
from tts_jax.problems._teachers import CircleTeacher as CircleTeacher, TorusTeacher as TorusTeacher
from tts_jax.problems._ultrafast import UltraFastDiffusion as UltraFastDiffusion
from tts_jax.problems.additive import Additive as Additive
from tts_jax.problems.implicit_diffusion import ImplicitDiffusion as ImplicitDiffusion
from tts_jax.problems.kim_suzuki import InContext as InContext
from tts_jax.problems.single_location import (
    ScheduledLocation as ScheduledLocation,
    SingleLocation as SingleLocation,
)
from tts_jax.problems.takakura_suzuki import MeanFieldKernel as MeanFieldKernel
from tts_jax.problems.univariate import Univariate as Univariate
from tts_jax.problems.varpro import Radial as Radial, Relu as Relu, VarPro as VarPro
