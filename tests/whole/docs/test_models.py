"""The zoo's part of docs/models.md is what the last full sweep found."""

from __future__ import annotations

from tests.support.pages import page
from tests.whole.zoo.page import rewritten
from tests.whole.zoo.results import Found, Results, Verdict, read


def test_the_page_says_what_the_sweep_found() -> None:
    text = page("models.md")
    assert text == rewritten(text, read()), "run: python -m tests.whole.zoo.page"


def test_every_class_is_counted_and_named_with_its_reason() -> None:
    found = [
        Found("causal", "llama", "LlamaForCausalLM", Verdict("right", "", 100)),
        Found("causal", "mixtral", "MixtralForCausalLM", Verdict("right", "", 12)),
        Found("causal", "odd", "OddForCausalLM", Verdict("wrong in load", "1.0e+00")),
        Found("masked", "ibert", "IBertForMaskedLM", Verdict("refused", "no matrix | none")),
        Found("masked", "timm", "TimmForMaskedLM", Verdict("unbuilt", "needs timm. You can")),
    ]
    shown = rewritten("<!-- zoo -->\n<!-- /zoo -->\n", Results({"date": "today"}, found))
    assert "Last swept: today." in shown
    assert "| causal language models | 2 | | | 1 |" in shown
    assert "| masked language models | | 1 | 1 | |" in shown
    assert "`llama`, `mixtral` (12 %)." in shown
    assert "| `odd` | `OddForCausalLM` | wrong in load: 1.0e+00 |" in shown
    assert "| `ibert` | `IBertForMaskedLM` | no matrix \\| none |" in shown
    assert "| `timm` | `TimmForMaskedLM` | needs timm |" in shown
