"""The weights of a run as files for a server, and the engine that is made with them."""

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from kdctl.base.errors import ServerError
from kdctl.config.preset import Form
from kdctl.distill.fsdp import whole_rows
from kdctl.distill.shadow import Shadow
from kdctl.formats.export import in_form
from kdctl.formats.student import Student, packed_tensors, save_changed, unquantized_tensors
from kdctl.model.teacher import Teacher
from kdctl.run.files import remove
from kdctl.stages.context import Context


@dataclass
class TeacherFiles:
    """The teacher as files; it never changes."""

    teacher: Teacher
    log: Path
    trained: bool = False

    def start(self, form: Form) -> Path:
        """Return its folder, or the GGUF file that it comes from. Raises ServerError where there is none."""
        if form != "gguf":
            return self.teacher.folder()
        found = Path(self.teacher.settings.model)
        if found.suffix == ".gguf" and found.is_file():
            return found
        raise ServerError(
            f"llama-server needs a GGUF file, and the teacher {self.teacher.settings.model} is none on this disk; "
            "start the server yourself with the teacher as a GGUF file and give rollout.url, or use vllm or sglang"
        )

    def write(self, form: Form, policy_step: int) -> Path:
        """Return the same: nothing trains a teacher."""
        return self.start(form)

    def clear(self, policy_step: int = -1) -> None:
        """Do nothing."""


@dataclass
class FolderFiles:
    """A finished model as files. scratch: where exports of it are written."""

    folder: Path
    scratch: Path
    trained: bool = True
    """A server that runs may hold another model, and is given this one."""

    @property
    def log(self) -> Path:
        """Return where a server that is started for it writes what it prints."""
        return self.scratch / "server.log"

    def start(self, form: Form) -> Path:
        """Return the folder, or its export."""
        return in_form(self.folder, form, self.scratch / "model")

    def write(self, form: Form, policy_step: int) -> Path:
        """Return the same: nothing trains it."""
        return self.start(form)

    def clear(self, policy_step: int = -1) -> None:
        """Do nothing; the scratch folder goes as a whole."""


@dataclass
class StudentFiles:
    """The student as files: ``student/``, and what training has made of it by now once ``shadow`` is there."""

    context: Context
    folder: Path
    """Where students in training are written."""
    shadow: Shadow | None = None
    others: dict[str, Tensor] = field(default_factory=dict)
    """The tensors outside the quantized layers."""

    @property
    def trained(self) -> bool:
        """Tell whether training changes the weights."""
        return self.shadow is not None

    @property
    def log(self) -> Path:
        """Return where a server that is started for it writes what it prints."""
        return self.folder / "server.log"

    def start(self, form: Form) -> Path:
        """Return ``student/``, or its export."""
        student = self.context.paths.student
        return in_form(student, form, self._place(0))

    def write(self, form: Form, policy_step: int) -> Path:
        """Write the student as it is now; it is divided where training is, and the main process writes it."""
        if self.shadow is None:
            return self.start(form)
        changed: dict[str, Tensor] = {}
        for name, weight in whole_rows(self.shadow.quantized(), self.context.ranks):
            if self.context.ranks.is_main:
                changed |= packed_tensors(name, weight)
        folder = self._place(policy_step)

        def written() -> Path:
            remove(folder)
            save_changed(folder, self.context.paths.student, {**self.others, **changed})
            return in_form(folder, form, folder)

        return self.context.ranks.on_main(written)

    def _place(self, policy_step: int) -> Path:
        return self.folder / f"step-{policy_step:06d}"

    def clear(self, policy_step: int = -1) -> None:
        """Remove what was written for other steps than one; all of it once no server needs it any more."""

        def cleared() -> None:
            for path in self.folder.glob("step-*"):
                if not path.name.startswith(self._place(policy_step).name):
                    remove(path)

        self.context.ranks.on_main(cleared)

    def follow(self, shadow: Shadow, student: Student) -> None:
        """Take up what training moves: the weights on the grid, and norms where they are trained."""
        self.shadow = shadow
        self.others = unquantized_tensors(student.model, student.weights)
