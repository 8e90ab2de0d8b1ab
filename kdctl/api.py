"""kdctl from Python: ``open_run``, then the stages of the command line, each as ``stage(*run)``."""

from kdctl.base.errors import KdctlError
from kdctl.stages.context import Context, Run, open_run
from kdctl.stages.distill import distill
from kdctl.stages.evaluate import evaluate
from kdctl.stages.pipeline import report, rollout, run_all
from kdctl.stages.quantize import compare, quantize

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
