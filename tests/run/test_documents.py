"""Per-document sums: their table on disk, and columns that a folder has or lacks."""

import numpy as np
import pyarrow as pa

from kdctl.run.documents import PerDocument, as_table, from_table
from kdctl.run.measures import FORWARD_KL, PERPLEXITY, TOKEN_MEASURES

COLUMNS = ["forward_kl", "reverse_kl", "agree", "nll", "teacher_nll"]


def made_up() -> PerDocument:
    random = np.random.default_rng(0)
    return PerDocument(random.integers(1, 9, 3).astype(float), {name: random.random(3) for name in COLUMNS})


def test_table_has_one_row_a_document():
    found = made_up()
    table = as_table(found, ["a", "b", "c"])
    assert table.column_names == ["prompt_id", "tokens", *COLUMNS]
    assert table["tokens"].to_pylist() == found.tokens.tolist()
    again = from_table(table)
    assert np.array_equal(again.tokens, found.tokens)
    assert list(again.sums) == COLUMNS
    assert all(np.array_equal(again.sums[name], found.sums[name]) for name in COLUMNS)


def test_columns_of_no_known_measure_are_left_out_and_missing_ones_are_seen():
    table = as_table(made_up())
    assert from_table(table).complete
    assert from_table(table.append_column("strange", pa.array([1.0, 2.0, 3.0]))).complete
    lacking = from_table(table.drop_columns(["nll"]))
    assert not lacking.complete
    assert [one.name for one in TOKEN_MEASURES.values() if not lacking.has(one)] == ["perplexity"]


def test_a_value_is_the_mean_per_token_or_exp_of_it():
    found = PerDocument(np.array([1.0, 3.0]), {"forward_kl": np.array([2.0, 4.0]), "nll": np.array([2.0, 4.0])})
    assert found.mean(FORWARD_KL) == found.value(FORWARD_KL) == found.mean(PERPLEXITY) == 1.5
    assert found.value(PERPLEXITY) == np.exp(1.5)
