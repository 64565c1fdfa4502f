"""The short tables of results hold what the long ones in docs/results hold."""

from __future__ import annotations

from tests.support.pages import CLASSIFIER, LANGUAGE, measured, page, table


def test_perplexities_in_statistics_md() -> None:
    figures = measured("results/language-model.md", LANGUAGE)
    shown = table(page("statistics.md"), LANGUAGE)
    assert len(shown) > 10
    for start, *row in shown:
        assert row == [figures[start][column] for column in (0, 1, 4, 6, 7)], start
    assert f"All {len(figures) - 1} starts" in page("statistics.md")


def test_accuracies_in_fine_tuning_md() -> None:
    figures = measured("results/classifier.md", CLASSIFIER)
    shown = table(page("fine-tuning.md"), "| start | residual | stored bits |")
    assert len(shown) > 10
    for start, *row in shown:
        assert row == [figures[start][column] for column in (0, 1, 3, 4)], start
