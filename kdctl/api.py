"""kdctl from Python: ``open_run``, then the stages of the command line, each as ``stage(*run)``."""

import transformers

from kdctl.base.errors import KdctlError
from kdctl.stages.context import Context, Run, open_run
from kdctl.stages.distill import distill
from kdctl.stages.evaluate import evaluate
from kdctl.stages.pipeline import report, rollout, run_all
from kdctl.stages.quantize import compare, quantize

transformers.logging.disable_progress_bar()  # a Reporter tells what goes on

__all__ = [
    "Context",
    "KdctlError",
    "Run",
    "compare",
    "distill",
    "evaluate",
    "open_run",
    "quantize",
    "report",
    "rollout",
    "run_all",
]
