"""The model card: metadata that the Hub accepts, figures that are the record's, and no claim that is not documented."""

from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, metadata_load

from kdctl.config.preset import DistillSection, Preset
from kdctl.formats.model_card import Origin, Training, model_card
from kdctl.run.record_files import read_record
from kdctl.run.records import Estimate, QuantizeReport
from kdctl.stages import pipeline
from kdctl.stages.context import open_run
from kdctl.stages.publish import is_hub_id, license_of, origin_of

HUB = Origin("org/Model-1B-Instruct", "org/Model-1B-Instruct", "apache-2.0")


@pytest.fixture(scope="module")
def report(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> QuantizeReport:
    """Return what quantize.json says of a small student."""
    from kdctl.config.resolve import load_preset

    preset = load_preset("smoke", {"teacher.model": str(tiny_dir), "eval.tasks": []})
    return pipeline.quantize(*open_run(preset, tmp_path_factory.mktemp("run")))


def test_metadata_is_what_the_hub_reads(report: QuantizeReport, tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(model_card(report, HUB), encoding="utf-8")
    assert metadata_load(path) == {
        "license": "apache-2.0",
        "base_model": "org/Model-1B-Instruct",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["compressed-tensors", "int4", "kdctl"],
    }
    card = ModelCard.load(path)
    assert card.data.to_dict() == metadata_load(path)
    assert card.text.lstrip().startswith("# Model-1B-Instruct, INT4\n")


def test_what_is_not_known_is_not_claimed(report: QuantizeReport) -> None:
    card = ModelCard(model_card(report, Origin("pkg:package/file.gguf", None, "see: LICENSE\nfile")))
    assert card.data.to_dict().keys() == {"library_name", "pipeline_tag", "tags"}
    assert card.text.lstrip().startswith("# file, INT4\n")


def test_figures_are_those_of_the_record(report: QuantizeReport) -> None:
    kl = report.distribution.forward_kl
    text = model_card(report, HUB)
    assert f"| KL(teacher‖student) per token | {kl.value:.4f} [{kl.low:.4f}, {kl.high:.4f}] |" in text
    assert f"{report.student_bytes / 2**20:.1f} MiB" in text
    assert "4 bits, group size 32, asymmetric" in text


def test_text_of_one_document_has_no_interval(report: QuantizeReport) -> None:
    one = report.model_copy(update={"text": report.text.model_copy(update={"documents": 1})})
    assert f"| text perplexity | {one.text.perplexity.value:.2f} (one document); teacher" in model_card(one, HUB)


def test_a_distilled_student_says_how_it_was_trained(report: QuantizeReport) -> None:
    settings = DistillSection(lmbda=0.5, beta=1.0)
    training = Training("mine", settings, 40, report.distribution, Estimate(value=0.5, low=0.4, high=0.6))
    text = model_card(report, HUB, training)
    assert "knowledge-distillation" in ModelCard(text).data.to_dict()["tags"]
    assert "# Model-1B-Instruct, INT4, distilled (mine)" in text
    assert "| λ (share of student-written sequences) | 0.5 |" in text
    assert "| training | 40 steps, " in text
    assert "| share of that KL removed | 0.5000 [0.4000, 0.6000] |" in text
    assert "| what learned | weights |" in text
    scales = replace(training, settings=DistillSection(train="scales", train_norms=True))
    assert "| what learned | scales, codes as they were; norms |" in model_card(report, HUB, scales)


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric", "claimed"),
    [
        (4, 32, False, True),
        (4, 128, True, True),
        (8, 64, True, True),
        (8, 64, False, False),
        (3, 64, True, False),
        (4, 16, False, False),
    ],
)
def test_vllm_is_named_only_for_what_it_documents(
    report: QuantizeReport, bits: int, group_size: int, symmetric: bool, claimed: bool
) -> None:
    grid = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    text = model_card(report.model_copy(update=grid), HUB)
    assert ("vllm serve" in text) == claimed
    assert ("transformers only" in text) != claimed
    assert ("symmetric" if symmetric else "asymmetric") in text
    assert "vLLM was not run" in text


@pytest.mark.slow
def test_every_student_folder_carries_its_card_under_the_sums(smoke: Preset, tmp_path: Path) -> None:
    job = open_run(smoke, tmp_path)
    variant = job.context.paths.variant(pipeline.distill(*job).variant)
    for folder in (job.context.paths.student, variant.final):
        report = read_record(folder / "quantize.json", QuantizeReport)
        text = (folder / "README.md").read_text(encoding="utf-8")
        assert f"{report.distribution.forward_kl.value:.4f}" in text
        assert "  README.md\n" in (folder / "SHA256SUMS").read_text()
    assert f"distilled ({variant.name})" in text


def test_license_comes_from_the_teachers_card_only(smoke: Preset, tiny_dir: Path, tmp_path: Path) -> None:
    assert license_of(tiny_dir) is None
    for text, expected in (
        ("---\nlicense: mit\n---\n", "mit"),
        ("no metadata", None),
        ("---\nlicense: [\n---\n", None),
        ("---\nlicense: [mit, other]\n---\n", None),
    ):
        (tmp_path / "README.md").write_text(text)
        assert license_of(tmp_path) == expected
    assert origin_of(open_run(smoke, tmp_path / "run").teacher) == Origin(str(tiny_dir))


def test_hub_ids_are_told_from_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "local").mkdir(parents=True)
    found = [is_hub_id(name) for name in ("org/model", "org/local", "gpt2", "pkg:a/b", "/abs/model", "./a/b")]
    assert found == [True, False, False, False, False, False]
