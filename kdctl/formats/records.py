"""What is said of folders and files for others, as typed records (no torch)."""

from typing import Literal

from kdctl.run.records import Record

ExportFormat = Literal["gguf", "dense", "hqq"]


class ExportReport(Record):
    """What ``kdctl export`` wrote."""

    format: ExportFormat
    path: str
    weights: str
    """Fingerprint of the student that was exported."""
    size_bytes: int
    block_type: str | None = None
    """GGUF only: the type that holds the codes."""
    exact_blocks: float | None = None
    """GGUF only: share of blocks whose scale and offset are the grid's to the bit."""
    largest_difference: float | None = None
    """GGUF only: largest distance of a weight from Q(W), which is rounded to the model's dtype and a GGUF's is not."""
    rounded_difference: float | None = None
    """GGUF only: the same with the GGUF's weights rounded to the model's dtype, as transformers reads them."""


class Check(Record):
    """One thing that was looked at in a student folder."""

    name: str
    status: Literal["passed", "failed", "unknown"]
    detail: str
    needs_teacher: bool = False
    """Where it cannot be looked at without the teacher, "unknown" is no failure."""

    @property
    def acceptable(self) -> bool:
        """Tell whether the folder may be used as far as this check goes."""
        return self.status == "passed" or (self.status == "unknown" and self.needs_teacher)


class VerifyReport(Record):
    """What ``kdctl verify`` found in a student folder."""

    folder: str
    passed: bool
    checks: tuple[Check, ...]
