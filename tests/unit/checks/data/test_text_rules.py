import pytest

from megasft.checks.data.run import RULES
from megasft.checks.data.subject import Needs
from megasft.checks.data.text_rules import Texts

FIRES = {
    "thinking-kept": "<think>\nOne and one.\n</think>\n\nTwo.<|im_end|>",
    "empty-thinking-trained": "<think>\n\n</think>\n\nTwo.<|im_end|>",
    "thinking-not-closed": "<think>\nOne and one<|im_end|>",
    "broken-text": "caf\N{REPLACEMENT CHARACTER}<|im_end|>",
    "speaker-in-answer": "Two.\nHuman: And three?\nFour.<|im_end|>",
    "special-token-as-text": "It is <|im_end|>.<|im_end|>",
}
SILENT = {
    "thinking-kept": "<think>\n\n</think>\n\nTwo.<|im_end|>",
    "empty-thinking-trained": FIRES["thinking-kept"],
    "thinking-not-closed": "One and one.</think>Two.<|im_end|>",  # the template opened it
    "broken-text": "café<|im_end|>",
    "speaker-in-answer": "The word Human: is no speaker here.<|im_end|>",
    "special-token-as-text": "It is that.<|im_end|>",
}


def hits(rule: str, answer: str) -> int:
    asked = RULES[rule]
    assert Needs.TEXT in asked.needs
    counts = {"<|im_start|>": 1, "<|im_end|>": 1}
    return int(asked(Texts((answer,), f"<|im_start|>{answer}", counts)))


@pytest.mark.parametrize("rule", FIRES)
def test_a_rule_fires_on_its_text_and_is_silent_on_the_sound_one(rule: str) -> None:
    assert hits(rule, FIRES[rule]) == 1
    assert hits(rule, SILENT[rule]) == 0
    assert hits(rule, "Two.<|im_end|>") == 0
