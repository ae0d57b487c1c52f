"""Tasks, windows and figures: all of an evaluation that needs no model."""

import json
import math
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from trawl.errors import PlanError
from trawl.evaluation import ChoiceTask, HarnessTask, PairsTask, PerplexityTask, QATask, parse_task
from trawl.evaluation.choice import predictions
from trawl.evaluation.pairs import spearman
from trawl.evaluation.perplexity import _figures, make_windows
from trawl.evaluation.qa import contains, token_f1
from trawl.evaluation.results import Figure, TaskResult, mean
from trawl.evaluation.scoring import Likelihood
from trawl.evaluation.tasks import Choice

QA = {"prompt": "The sky is", "answers": ["blue", "grey"], "extra": 1}
CHOICE = {"query": "Is it?", "choices": ["yes", "no"], "gold": 1}
PAIRS = [{"sentence1": "a", "sentence2": "b", "score": 0}, {"sentence1": "a", "sentence2": "c", "score": 2.5}]


def lines(path, *values):
    path.write_text("".join(v if isinstance(v, str) else json.dumps(v) + "\n" for v in values), encoding="utf-8")
    return path


def test_each_kind_reads_its_file(tmp_path):
    qa = parse_task(f"qa:{lines(tmp_path / 'qa.jsonl', chr(10), QA)}?tokens=3")
    assert isinstance(qa, QATask)
    assert (qa.tokens, qa.records[0].line, qa.records[0].answers) == (3, 2, ("blue", "grey"))
    path = lines(tmp_path / "choice.jsonl", CHOICE)
    choice = parse_task(rf"choice:{path}?template=Q & A: {{query}}\nAnswer:")
    assert isinstance(choice, ChoiceTask)
    assert choice.template == "Q & A: {query}\nAnswer:"
    assert parse_task(f"choice:{path}").template == "{query}"
    pairs = parse_task(f"pairs:{lines(tmp_path / 'pairs.jsonl', *PAIRS)}")
    assert isinstance(pairs, PairsTask)
    assert [record.score for record in pairs.records] == [0.0, 2.5]
    (tmp_path / "text.txt").write_bytes(b"one\r\ntwo")
    text = parse_task(f"ppl:{tmp_path / 'text.txt'}")
    assert isinstance(text, PerplexityTask)
    assert text.text == "one\r\ntwo"
    assert parse_task("lm:arc_easy?fewshot=0") == HarnessTask("lm:arc_easy?fewshot=0", "arc_easy", 0)


def test_a_question_mark_in_a_file_name_is_part_of_it(tmp_path):
    assert parse_task(f"qa:{lines(tmp_path / 'what?.jsonl', QA)}").records[0].prompt == "The sky is"


MISTAKES = [
    ("qqa:{f}", [QA], r"unknown task kind 'qqa'; did you mean 'qa'\?; expected ppl:FILE, qa:FILE"),
    ("facts.jsonl", [QA], r"did you mean 'qa:facts.jsonl'"),
    ("story.txt", [QA], r"did you mean 'ppl:story.txt'"),
    ("qa:", [QA], "names nothing after qa:"),
    ("qa:{dir}/tsk.jsonl", [QA], r"no such task file: .*tsk.jsonl; did you mean 'task.jsonl'"),
    ("qa:{dir}", [QA], "cannot read the task file .*directory"),
    ("qa:{f}", [""], r"task.jsonl is empty"),
    ("ppl:{f}", [" \n\n"], r"task.jsonl is empty"),
    ("qa:{f}", [QA, "{\n"], r"task.jsonl:2: not JSON"),
    ("qa:{f}", [QA, "\n", "[1]\n"], r"task.jsonl:3: a JSON list; expected one JSON object a line"),
    ("qa:{f}", [{"promt": "x", "answers": ["y"]}], r"task.jsonl:1: no 'prompt'; did you mean 'promt'"),
    ("qa:{f}", [{**QA, "prompt": " "}], r":1: prompt is ' '; expected a text that is not blank"),
    ("qa:{f}", [{**QA, "answers": "blue"}], r":1: answers is 'blue'; expected a list"),
    ("qa:{f}", [QA, {**QA, "answers": ["blue", ""]}], r":2: answers holds ''; expected texts that tokenise"),
    ("choice:{f}", [{**CHOICE, "gold": 2}], r":1: gold is 2; expected the number of a choice, 0 to 1"),
    ("choice:{f}", [{**CHOICE, "gold": True}], r":1: gold is True"),
    ("choice:{f}", [{**CHOICE, "choices": ["yes"]}], r":1: one choice; expected at least two"),
    ("choice:{f}?template=Question:", [CHOICE], r"the template 'Question:' has no {query}"),
    ("choice:{f}?templat={{query}}", [CHOICE], r"unknown option 'templat'; did you mean 'template'\?; choice takes"),
    ("qa:{f}?tokens=0", [QA], r"tokens is '0'; expected a whole number of at least 1"),
    ("ppl:{f}?context=4", ["text"], r"unknown option 'context'; ppl takes no options"),
    ("pairs:{f}", [{**PAIRS[0], "score": "3"}], r":1: score is '3'; expected a number"),
    ("pairs:{f}", [PAIRS[0], '{"sentence1": "a", "sentence2": "b", "score": NaN}\n'], r":2: score is nan"),
    ("pairs:{f}", [PAIRS[0]] * 2, r"every pair has the same score"),
    ("lm:absent.yaml", [QA], r"no such file: absent.yaml"),
]


@pytest.mark.parametrize(("spec", "content", "message"), MISTAKES)
def test_a_bad_task_is_a_plan_error_on_one_line(spec, content, message, tmp_path):
    path = lines(tmp_path / "task.jsonl", *content)
    with pytest.raises(PlanError, match=message) as caught:
        parse_task(spec.format(f=path, dir=tmp_path))
    assert "\n" not in str(caught.value)


def test_a_byte_that_is_not_utf8_is_named_by_its_line(tmp_path):
    (tmp_path / "t.txt").write_bytes(b"fine\nbad \xff\n")
    with pytest.raises(PlanError, match=r"t.txt:2: byte 9 is not UTF-8"):
        parse_task(f"ppl:{tmp_path / 't.txt'}")


@settings(deadline=None)
@given(st.integers(0, 60), st.integers(2, 12), st.data(), st.integers(0, 2), st.booleans())
def test_windows_score_every_token_once_within_the_context(tokens, context, data, prefix, leads):
    prefix = min(prefix, context - 1)
    leads = leads or prefix > 0
    stride = data.draw(st.integers(1, context - max(prefix, 1) + 1))
    windows = make_windows(tokens, context, stride, prefix, scores_first=leads)
    scored = [token for window in windows for token in range(window.first, window.stop)]
    assert scored == list(range(0 if leads else 1, tokens))
    for number, window in enumerate(windows):
        lead = prefix if number else max(prefix, int(leads))
        fed = lead + window.stop - 1 - window.start
        assert fed <= context
        assert lead + window.first - window.start >= 1  # every scored token has one before it
        if number:
            assert window.stop - window.first <= stride
            assert fed == min(context, lead + window.stop - 1)  # as much context as there is room for


def test_perplexity_of_known_losses():
    figures = {figure.name: figure for figure in _figures([6.0, 2.0, 1.0], [3, 2, 1], 10)}
    assert figures["loss"].value == pytest.approx(1.5)
    assert figures["perplexity"].value == pytest.approx(math.exp(1.5))
    assert figures["bits_per_byte"].value == pytest.approx(9 / math.log(2) / 10)
    # residuals s - L n: 1.5, -1.0, -0.5
    error = math.sqrt(3 / 2 * (1.5**2 + 1.0 + 0.25)) / 6
    assert figures["loss"].stderr == pytest.approx(error)
    assert figures["perplexity"].stderr == pytest.approx(error * math.exp(1.5))
    assert _figures([6.0], [3], 10)[0].stderr is None
    assert _figures([6000.0], [3], 10)[0].value == math.inf


def test_a_mean_has_the_standard_error_of_independent_records():
    values = [1.0, 0.0, 0.0, 1.0, 1.0]
    figure = mean("accuracy", values, higher_is_better=True)
    assert figure.value == pytest.approx(0.6)
    assert figure.stderr == pytest.approx(statistics.stdev(values) / math.sqrt(5))
    assert mean("accuracy", [1.0], higher_is_better=True).stderr is None


def test_a_result_is_json_whatever_its_figures():
    result = TaskResult(
        "ppl:x", "ppl", (Figure("perplexity", math.inf, math.nan, False),), 1, 0, {}, scores={"a": (1.0,)}
    )
    text = json.dumps(result.to_json(), allow_nan=False)
    assert json.loads(text)["figures"] == [
        {"name": "perplexity", "value": None, "stderr": None, "higher_is_better": False}
    ]
    assert result.figure("perplexity").value == math.inf
    with pytest.raises(KeyError, match="it has perplexity"):
        result.figure("loss")


@pytest.mark.parametrize(
    ("text", "answer", "found"),
    [
        (" Russia, a country", "russia", True),
        ("it is in New York City.", "New York", True),
        ("they know nothing", "no", False),
        ("no.", "no", True),
        ("C++ it is", "C++", True),
        ("", "x", False),
    ],
)
def test_an_answer_counts_as_whole_words(text, answer, found):
    assert contains(text, answer) is found


@pytest.mark.parametrize(
    ("text", "answer", "f1"),
    [
        (" The Eiffel Tower.\nmore", "Eiffel tower", 1.0),
        ("tower of London", "Eiffel tower", 2 / 5),
        ("the the", "a", 1.0),  # nothing but articles on both sides
        ("the", "x", 0.0),
        ("x x", "x", 2 / 3),
    ],
)
def test_f1_counts_words_as_squad_does(text, answer, f1):
    assert token_f1(text, answer) == pytest.approx(f1)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.floats(-3, 3)), min_size=2, max_size=30))
def test_spearman_is_scipys(pairs):
    first, second = map(list, zip(*pairs, strict=True))
    got = spearman(first, second)
    if len(set(first)) == 1 or len(set(second)) == 1:
        assert math.isnan(got)
    else:
        assert got == pytest.approx(stats.spearmanr(first, second).statistic, abs=1e-12)


def test_spearman_of_what_is_not_finite_is_undefined():
    assert math.isnan(spearman([1.0, math.nan, 2.0], [1.0, 2.0, 3.0]))


def test_length_normalised_predictions_divide_by_characters():
    record = Choice(1, "q", ("no", "certainly"), 1)
    assert predictions(record, [Likelihood(-2.0, 1, False), Likelihood(-4.0, 2, False)]) == (0, 1)
    assert predictions(record, [Likelihood(-2.0, 1, False), Likelihood(-2.0, 1, False)]) == (0, 1)
    assert predictions(Choice(1, "q", ("aa", "bb"), 0), [Likelihood(-1.0, 1, False)] * 2) == (0, 0)


def test_where_a_choice_is_nan_none_is_the_likeliest():
    record = Choice(1, "Is it?", ("yes", "no"), 0)
    assert predictions(record, [Likelihood(-1.0, 1, True), Likelihood(-2.0, 1, True)]) == (0, 0)
    assert predictions(record, [Likelihood(math.nan, 1, True), Likelihood(-2.0, 1, True)]) == (-1, -1)
    assert predictions(record, [Likelihood(-1.0, 1, True), Likelihood(math.nan, 1, True)]) == (-1, -1)
