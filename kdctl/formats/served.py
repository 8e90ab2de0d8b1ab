"""Whether a server that opens a student folder computes what is computed here.

Two programs round differently, so that their log-probabilities cannot be equal; they must be as near as rounding makes
them. KL(served‖here) is estimated on tokens that the server draws itself, as the mean of r − 1 − log r with
r = p_here/p_served, which is unbiased and never negative (Schulman 2020).
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from kdctl import stats
from kdctl.base.errors import StoreError
from kdctl.base.progress import Reporter
from kdctl.config.preset import Form, RolloutSection
from kdctl.formats.export import in_form
from kdctl.formats.records import Check
from kdctl.formats.student import load_student
from kdctl.model.stops import stop_ids
from kdctl.model.tokenizer import load_tokenizer
from kdctl.rollout.sampling import Sampling
from kdctl.rollout.server.child import Child
from kdctl.rollout.server.gap import BOUND, gap
from kdctl.rollout.server.pool import Pool
from kdctl.rollout.server.rules import log_probabilities
from kdctl.rollout.server.writer import Writer
from kdctl.rollout.store import RolloutStore
from kdctl.run.paths import enclosing_run
from kdctl.run.records import Estimate, Prompt, Rollout

DOCUMENTS = 32
"""Held-out completions that are scored, and prompts that the server completes."""
TOKENS = 64
"""Longest completion that it draws."""
KL_BOUND = 0.02
"""Largest KL of the served student to the one here, nats a token."""


def check_served(folder: Path, engine: str, form: Form | None, device: torch.device, reporter: Reporter) -> list[Check]:
    """Compare a student folder as a server computes it with the student here.

    engine: a server's name, a command that starts one, or the address of one that holds the folder. Raises ServerError
    for one that cannot be started or asked, StoreError where there are no held-out completions to compare on.
    """
    texts = _heldout(folder)
    student = load_student(folder, device)
    vocabulary = student.model.config.get_text_config().vocab_size
    stop = stop_ids(folder, load_tokenizer(folder, student.model.config.model_type), vocabulary)
    with _served(folder, engine, form, reporter) as pool:
        writer = Writer(pool, stop, vocabulary, "student", folder.name)
        (place,) = pool.places
        writer.find_stops(texts[0].prompt_ids)
        with reporter.task(f"{place.server.kind} reads held-out completions"):
            there = torch.tensor(writer.score(texts, place))
        items = [(Prompt(one.prompt_id, one.prompt_index, one.prompt_ids), 0) for one in texts]
        with reporter.task(f"{place.server.kind} completes held-out prompts"):
            drawn = writer.draw(items, Sampling(1.0, 1.0, 0, TOKENS, 0, 0), 0)
    found = gap(there, log_probabilities(student.model, texts))
    moved = _divergence(drawn, log_probabilities(student.model, drawn))
    said = f"{place.server.kind} {place.about.version}: "
    return [
        Check(
            name="served log-probabilities",
            status="passed" if found.sound else "failed",
            detail=f"{said}{found.mean:.4f} nats off those here on average over {found.tokens} held-out tokens, "
            f"{found.largest:.2f} at most; the bound is {BOUND:g} on average",
        ),
        Check(
            name="served distribution",
            status="passed" if moved.value <= KL_BOUND else "failed",
            detail=f"{said}KL(served‖here) {moved.value:.4f} [{moved.low:.4f}, {moved.high:.4f}] nats a token, on "
            f"{sum(len(one.completion_ids) for one in drawn)} tokens that it drew; the bound is {KL_BOUND:g}",
        ),
    ]


def _heldout(folder: Path) -> list[Rollout]:
    """Read held-out completions of the run folder around a student."""
    run = enclosing_run(folder)
    if run is None or not run.heldout.is_dir():
        raise StoreError(
            f"{folder} is in no run folder with held-out completions, and a served student is compared on these; name "
            "a student where kdctl made it, such as runs/quickstart/student"
        )
    return [one for one in RolloutStore(run.heldout).read()[:DOCUMENTS] if one.completion_ids]


@contextmanager
def _served(folder: Path, engine: str, form: Form | None, reporter: Reporter) -> Iterator[Pool]:
    """Give access to a server that holds a student, one that runs or one that is started and ended."""
    settings = RolloutSection()
    with ExitStack() as held:
        url = engine
        if not engine.startswith(("http://", "https://")):
            scratch = Path(held.enter_context(TemporaryDirectory(prefix="kdctl-")))
            run = enclosing_run(folder)
            log = (run.served if run else scratch) / "server.log"  # it is to be there when this ended
            child = Child(engine, log, reporter)
            held.callback(child.stop)
            url = child.start(in_form(folder, form or child.form, scratch / "student"))
        (url,) = RolloutSection(engine="server", url=(url,)).url  # as clients need it
        pool = Pool([url], settings.batch_size, settings.timeout_s, reporter.note)
        pool.meet()
        yield pool


def _divergence(drawn: list[Rollout], here: torch.Tensor) -> Estimate:
    """Estimate KL(served‖here) a token with its interval over completions."""
    parts = here.double().split([len(one.completion_ids) for one in drawn])
    sums = []
    for one, values in zip(drawn, parts, strict=True):
        ratio = values - torch.tensor(one.logprobs, dtype=torch.float64)
        sums.append(float((ratio.exp() - 1 - ratio).sum()))
    return stats.ratio(sums, [len(one.completion_ids) for one in drawn])
