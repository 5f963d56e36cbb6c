"""srlib: multi-layer latent variable models learned with variationally optimised short run MCMC.

The executable companion of Nijkamp, Pang, Han, Zhou, Zhu and Wu, "Learning Multi-layer Latent Variable Model via
Variational Optimization of Short Run MCMC for Approximate Inference", ECCV 2020. Each module opens with the equations it
implements.
"""

from .closed_form import ClosedForm
from .data import Dataset, DatasetUnavailable, load, to_uint8, to_unit_range
from .generators import Generator, LadderGenerator, LinearGenerator, TopDownGenerator
from .langevin import (
    Chain,
    DivergenceError,
    geometric_step_sizes,
    noise_scale_from_step_size,
    short_run,
    step_size_from_noise_scale,
)
from .learning import ShortRun
from .log_determinants import LowRankLogDet, log_abs_det_jacobian, low_rank_log_abs_det
from .posterior import Posterior
from .step_size import (
    StepSizeResult,
    StepSizeSearch,
    descend_step_size,
    grid_search_step_size,
    kl_objective,
)
from .system import System
from .training import History, TrainingPlan

__version__ = "0.1.0"

__all__ = [
    "Chain",
    "ClosedForm",
    "Dataset",
    "DatasetUnavailable",
    "DivergenceError",
    "Generator",
    "History",
    "LadderGenerator",
    "LinearGenerator",
    "LowRankLogDet",
    "Posterior",
    "ShortRun",
    "StepSizeResult",
    "StepSizeSearch",
    "System",
    "TopDownGenerator",
    "TrainingPlan",
    "descend_step_size",
    "geometric_step_sizes",
    "grid_search_step_size",
    "kl_objective",
    "load",
    "log_abs_det_jacobian",
    "low_rank_log_abs_det",
    "noise_scale_from_step_size",
    "short_run",
    "step_size_from_noise_scale",
    "to_uint8",
    "to_unit_range",
]
