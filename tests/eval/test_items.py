"""Which items are not independent of each other."""

from collections import Counter

from kdctl.eval.items import cluster_labels
from kdctl.eval.offline import winogrande


def sentence(text: str, first: str = "Ann", second: str = "Eve") -> dict[str, str]:
    return {"sentence": text, "option1": first, "option2": second}


def test_twin_sentences_share_a_label_and_nothing_else_does() -> None:
    docs = [
        sentence("Ann asked Eve for help since _ was tired of it."),
        sentence("Ann asked Eve for help since _ was good at it."),
        sentence("Ann asked Eve for help since _ was good at it.", "Eve", "Ann"),
        sentence("Ann asked Eve for help since _ was good at it.", "Ann", "Joe"),
        sentence("Nobody knew whether _ had ever met Joe.", "Ann", "Joe"),
        sentence("Ann asked Eve for help since _ was tired of it."),
    ]
    assert cluster_labels("w", docs) == ["w 0", "w 0", "w 0", "w 3", "w 4", "w 5"]


def test_documents_are_labelled_by_subject_or_by_task() -> None:
    docs = [{"subject": "law"}, {"subject": "art"}, {"question": "?"}]
    assert cluster_labels("mmlu", docs) == ["law", "art", "mmlu"]


def test_the_twins_of_winogrande_have_opposite_answers() -> None:
    docs: list[dict[str, str]] = winogrande()["validation"].to_list()
    labels = cluster_labels("winogrande", docs)
    counts = Counter(Counter(labels).values())
    assert counts == {1: 699, 2: 284}
    for before, after, own, other in zip(docs, docs[1:], labels, labels[1:], strict=False):
        assert own != other or before["answer"] != after["answer"]
