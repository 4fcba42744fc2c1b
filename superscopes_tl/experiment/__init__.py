"""One source prompt: settings, plan, cells, controls, the run, and its result."""

from superscopes_tl.experiment.cells import finished_cells, make_patches, mean, score_readings
from superscopes_tl.experiment.config import CONTROLS, Generate, SweepConfig
from superscopes_tl.experiment.controls import make_control, other_prompts, rescored
from superscopes_tl.experiment.plan import Cell, SweepPlan, lay_out, plan_sweep
from superscopes_tl.experiment.results import (
    By,
    Contextualization,
    Reads,
    SweepResult,
    contextualization,
    flags,
    rows_at,
    worth_recovered,
)
from superscopes_tl.experiment.run import (
    SweepError,
    SweepInterrupted,
    best_cells,
    collect,
    iter_sweep,
    refine,
    run_map,
    run_plans,
    sweep,
    write_cell,
)
from superscopes_tl.experiment.store import COLUMNS, SITE, TYPES, EvaluationFile, Reading
from superscopes_tl.experiment.vector_plans import plan_vectors, read_vector, read_vectors

__all__ = [
    "COLUMNS",
    "CONTROLS",
    "SITE",
    "TYPES",
    "By",
    "Cell",
    "Contextualization",
    "EvaluationFile",
    "Generate",
    "Reading",
    "Reads",
    "SweepConfig",
    "SweepError",
    "SweepInterrupted",
    "SweepPlan",
    "SweepResult",
    "best_cells",
    "collect",
    "contextualization",
    "finished_cells",
    "flags",
    "iter_sweep",
    "lay_out",
    "make_control",
    "make_patches",
    "mean",
    "other_prompts",
    "plan_sweep",
    "plan_vectors",
    "read_vector",
    "read_vectors",
    "refine",
    "rescored",
    "rows_at",
    "run_map",
    "run_plans",
    "score_readings",
    "sweep",
    "worth_recovered",
    "write_cell",
]
