"""Exact-rule scoring: hand-written verdicts, planted faults, and no text that makes it fall over."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instil.evaluate.tasks import Score, TaskSummary, score, summarise

EXPECTED = '{"name":"Ava Holm","order":"4821","date":null,"amount":24.50}'

RIGHT = [
    EXPECTED,
    '{"name":"Ava Holm","order":"4821","date":null,"amount":24.5}',
    '{"amount": 2.45e1, "date": null, "order": "4821", "name": "Ava Holm"}',
    ' \n{"name":"\\u0041va Holm","order":"4821","date":null,"amount":24.500}\n',
]

# answer, keys, share of right values: all of them valid JSON objects, none of them right
WRONG = [
    ('{"name":"Ava Holms","order":"4821","date":null,"amount":24.50}', True, 3 / 4),  # wrong value
    ('{"name":"ava holm","order":"4821","date":null,"amount":24.50}', True, 3 / 4),  # other case
    ('{"name":"Ava Holm ","order":"4821","date":null,"amount":24.50}', True, 3 / 4),  # a space in a string
    ('{"name":"Ava Holm","order":"4821","date":null,"amount":"24.50"}', True, 3 / 4),  # a number as a string
    ('{"name":"Ava Holm","order":4821,"date":null,"amount":24.50}', True, 3 / 4),  # a string as a number
    ('{"name":"Ava Holm","order":"4821","date":"null","amount":24.50}', True, 3 / 4),  # null as a string
    ('{"name":"Ava Holm","order":"4821","date":"","amount":24.50}', True, 3 / 4),  # empty for null
    ('{"name":"Ava Holm","order":"4821","date":false,"amount":24.50}', True, 3 / 4),
    ('{"name":null,"order":null,"date":null,"amount":null}', True, 1 / 4),
    ('{"name":"Ava Holm","order":"4821","date":null,"amount":24.50,"note":1}', False, 1.0),  # an extra key
    ('{"name":"Ava Holm","order":"4821","amount":24.50}', False, 3 / 4),  # a missing key, though null
    ('{"Name":"Ava Holm","order":"4821","date":null,"amount":24.50}', False, 3 / 4),
    ("{}", False, 0.0),
]

INVALID = [
    "",
    "null",
    "4821",
    '"Ava Holm"',
    f"[{EXPECTED}]",
    EXPECTED[:-1],  # cut short
    EXPECTED + " Anything else?",  # trailing text
    EXPECTED + EXPECTED,
    "Here you are: " + EXPECTED,
    f"```json\n{EXPECTED}\n```",
    EXPECTED.replace('"', "'"),  # single quotes
    EXPECTED.replace("24.50", "24.50,"),
    EXPECTED.replace("null", "None"),
    EXPECTED.replace("24.50", "NaN"),
    EXPECTED.replace("24.50", "-Infinity"),
    EXPECTED.replace('"date"', '"name":"Ava Holm","date"'),  # a key twice
    '{"a":' * 100_000,
    '{"a":' + "[" * 100_000,
    '{"a":' + "9" * 5_000 + "}",  # longer than Python turns into an int
    "\ufeff" + EXPECTED,
    "\ud800",
]


@pytest.mark.parametrize("answer", RIGHT)
def test_a_right_record_is_exact_in_any_layout(answer: str):
    "Order of keys, white space, escapes and trailing zeros do not change a record."
    assert score(answer, EXPECTED) == Score(rule="json", exact=True, valid=True, keys=True, values=1.0)


@pytest.mark.parametrize(("answer", "keys", "values"), WRONG)
def test_a_planted_error_is_found_and_only_it(answer: str, keys: bool, values: float):
    "One fault costs one value, or the keys; never the validity."
    assert score(answer, EXPECTED) == Score(rule="json", exact=False, valid=True, keys=keys, values=values)


@pytest.mark.parametrize("answer", INVALID)
def test_what_is_not_one_json_object_is_invalid(answer: str):
    "A reader of JSON would refuse it, so nothing in it counts."
    assert score(answer, EXPECTED) == Score(rule="json", exact=False, valid=False, keys=False, values=0.0)


@pytest.mark.parametrize(
    ("answer", "expected", "exact"),
    [
        ("late", "late", True),
        (" late\n", "late", True),
        ("late", "late\n", True),
        ("Late", "late", False),
        ("late.", "late", False),
        ("", "late", False),
        ("", "", True),
        ("4821", "4821", True),
        ("4821.0", "4821", False),  # a number alone is text, not a record
        ("[1, 2]", "[1,2]", False),
        ('{"a":1}', "late", False),
        ("{'a': 1}", "{'a': 1}", True),  # what is expected is no JSON, so it is text
    ],
)
def test_other_answers_are_compared_as_text(answer: str, expected: str, exact: bool):
    "The expected answer alone chooses the rule; text must match to the character, but for white space around it."
    assert score(answer, expected) == Score(rule="exact", exact=exact)


@pytest.mark.parametrize(
    ("answer", "expected", "exact"),
    [
        ('{"a":1}', '{"a":1.0}', True),
        ('{"a":true}', '{"a":1}', False),
        ('{"a":0}', '{"a":false}', False),
        ('{"a":9007199254740993}', '{"a":9007199254740992}', False),
        ('{"a":[1,{"b":null}]}', '{"a":[1.0,{"b":null}]}', True),
        ('{"a":[1,{"b":null}]}', '{"a":[1,{"b":0}]}', False),
        ('{"a":[1,2]}', '{"a":[2,1]}', False),
        ('{"a":[1]}', '{"a":[1,1]}', False),
        ('{"a":[true]}', '{"a":[1]}', False),
        ('{"a":{"b":1,"c":2}}', '{"a":{"c":2,"b":1}}', True),
        ('{"a":{"b":1}}', '{"a":{"b":1,"c":2}}', False),
        ('{"a":{"b":1,"b":1}}', '{"a":{"b":1}}', False),
        ('{"a":{}}', '{"a":[]}', False),
        ("{}", "{}", True),
        ('{"a":1}', "{}", False),
    ],
)
def test_values_are_compared_as_json_values(answer: str, expected: str, exact: bool):
    "true is not 1, numbers are equal in value, lists in order, objects in any order, at every depth."
    assert score(answer, expected).exact is exact


@given(st.text(), st.text())
def test_no_text_makes_the_score_fall_over(answer: str, expected: str):
    "A model may write anything; where no record is expected, right means equal."
    found = score(answer, expected)
    assert found.rule == "json" or found.exact is (answer.strip() == expected.strip())


@given(st.text() | st.text(alphabet='{}[]":,0e-.nul \\').map(lambda text: '{"name":' + text))
def test_no_text_in_place_of_a_record_falls_over(answer: str):
    "Whatever the answer, the levels are nested: exact within keys within valid."
    found = score(answer, EXPECTED)
    assert found.exact <= found.keys <= found.valid
    assert 0.0 <= found.values <= 1.0


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), JSON, max_size=5))
def test_a_record_equals_itself_however_it_is_written(record: dict):
    "Two writers of JSON may differ in layout, in escapes and in the order of keys."
    other = json.dumps(dict(reversed(record.items())), indent=1, ensure_ascii=False)
    assert score(other, json.dumps(record)) == Score(rule="json", exact=True, valid=True, keys=True, values=1.0)


def test_a_summary_counts_each_level_of_each_task():
    "Counts stay counts, so that summaries can be added; the share of values is a mean over the records alone."
    scores = {
        "record": [score(text, EXPECTED) for text in (EXPECTED, WRONG[0][0], WRONG[-1][0], "no")],
        "label": [score("late", "late"), score("late", "broken"), score("late ", "late")],
        "none": [],
    }
    summary = summarise(scores)
    assert list(summary) == ["record", "label", "none"]
    assert summary["record"] == TaskSummary("record", 4, 1, 4, 3, 2, (1 + 3 / 4 + 0 + 0) / 4)
    assert summary["label"] == TaskSummary("label", 3, 2, 0, 0, 0, None)
    assert summary["none"] == TaskSummary("none", 0, 0, 0, 0, 0, None)
    assert summary["record"].exact_share == 1 / 4
    assert summary["none"].exact_share is None


def test_scoring_does_not_load_torch():
    "The rules are of use where no model is."
    code = "import sys, instil.evaluate.tasks; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
