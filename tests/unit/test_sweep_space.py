"""What a sweep tries, how it cuts tasks in two, and how it compares scores with the base model's."""

import json
import math

import numpy as np
import pytest

from trawl.errors import PlanError
from trawl.evaluation import Figure, TaskResult, parse_task
from trawl.sweeps.scores import Scores, TaskScores, check_objectives, estimate, gain, score_pieces, summarize
from trawl.sweeps.setup import Setup
from trawl.sweeps.space import Intervention, Space
from trawl.sweeps.split import split_task


@pytest.fixture
def spec(tmp_path):
    """Return a function that writes a task file with so many records, and gives its SPEC."""

    def write(kind: str, count: int) -> str:
        path = tmp_path / f"{kind}{count}"
        if kind == "ppl":
            path.write_text("".join(f"line {n} of the text\n" for n in range(count)))
            return f"ppl:{path}"
        rows = {
            "qa": lambda n: {"prompt": f"question {n}", "answers": ["yes"]},
            "choice": lambda n: {"query": f"query {n}", "choices": ["a", "b"], "gold": n % 2},
            "pairs": lambda n: {"sentence1": f"one {n}", "sentence2": "two", "score": n},
        }
        path.write_text("".join(json.dumps(rows[kind](n)) + "\n" for n in range(count)))
        return f"{kind}:{path}"

    return write


def test_a_space_is_the_product_of_its_parts_and_each_run_comes_once():
    space = Space((4, (2, 3, 3)), ("cp", "tucker"), ("fc", "q,k"), "1-4", (1, 2, "all"))
    assert [run for _, run in space.runs(6)] == ["1", "2", "3", "4", "1-2", "3-4", "1-4"]
    found = space.interventions(6)
    assert len(found) == len(set(found)) == 7 * 2 * (1 + 2)  # the triple is for Tucker alone
    assert {item.method for item in found if item.rank == (2, 3, 3)} == {"tucker"}
    assert (space.ladder("cp"), space.ladder("tucker")) == ((4,), (4, (2, 3, 3)))
    assert all(Intervention.from_json(json.loads(json.dumps(item.to_json()))) == item for item in found)
    assert [run for _, run in Space((4,), layers="2", group_layers=(1, "all")).runs(6)] == ["2"]


def test_the_recipe_of_an_intervention_makes_one_stack_across_the_run():
    recipe = Intervention("tucker", "up,down", "2-3", 2, (2, 3, 3)).recipe(seed=7, n_iter_max=5, tol=None)
    assert (recipe.method, recipe.rank, recipe.layers, recipe.seed) == ("tucker", (2, 3, 3), "2-3", 7)
    assert recipe.n_iter_max == 5
    assert recipe.group_layers == "all"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranks": ()}, "no ranks"),
        ({"methods": ()}, "no methods"),
        ({"group_layers": (0,)}, "group_layers holds 0"),
    ],
)
def test_an_empty_space_is_refused(changes, message):
    with pytest.raises(PlanError, match=message):
        Space(**{"ranks": (4,), **changes})


@pytest.mark.parametrize(("kind", "pieces"), [("qa", 4), ("choice", 2), ("pairs", 1)])
def test_the_two_parts_are_disjoint_and_cover_the_task(kind, pieces, spec):
    task = parse_task(spec(kind, 600))
    parts = split_task(task, 0.2, 5, None)
    assert len(parts.validation) == pieces
    drawn = [record for piece in parts.validation[: 2 if kind != "pairs" else 1] for record in piece.task.records]
    (test,) = parts.test
    assert (len(drawn), len(test.task.records)) == (120, 480)
    assert sorted([*drawn, *test.task.records], key=lambda record: record.line) == list(task.records)
    assert drawn != sorted(drawn, key=lambda record: record.line)  # so that the first piece is a sample too
    assert split_task(task, 0.2, 5, None) == parts
    assert split_task(task, 0.2, 6, None) != parts
    limited = split_task(task, 0.5, 5, 40)
    lines = [record.line for piece in (limited.validation[0], limited.test[0]) for record in piece.task.records]
    assert sorted(lines) == [record.line for record in task.records[:40]]


def test_losses_of_questions_come_first_and_their_answers_last(spec):
    first, second, *written = split_task(parse_task(spec("qa", 600)), 0.2, 0, None).validation
    assert len(first.task.records) == 50
    assert [(piece.task.losses, piece.task.answers) for piece in (first, second)] == [(True, False)] * 2
    assert [(piece.task.losses, piece.task.answers) for piece in written] == [(False, True)] * 2
    assert [piece.task.records for piece in written] == [first.task.records, second.task.records]
    (only, _) = split_task(parse_task(spec("qa", 60)), 0.5, 0, None).validation
    assert len(only.task.records) == 30  # too few for a verdict on a part of them


def test_a_text_is_cut_at_line_ends_and_its_windows_are_shared_out(spec):
    task = parse_task(spec("ppl", 400))
    parts = split_task(task, 0.2, 5, 50)
    lines = [piece.task.text.splitlines() for piece in (*parts.validation, *parts.test)]
    assert sorted(line for piece in lines for line in piece) == sorted(task.text.splitlines())
    assert 60 <= sum(map(len, lines[:-1])) <= 100  # 80 in chunks of about 10
    assert [piece.limit for piece in (*parts.validation, *parts.test)] == [2, 8, 40]
    assert split_task(task, 0.2, 5, 50) == parts
    assert split_task(task, 0.2, 6, 50) != parts


def test_what_cannot_be_split_is_refused(spec):
    for made, count, limit, message in (
        ("qa", 2, None, r"2 record\(s\) cannot be split"),
        ("choice", 600, 1, r"1 record\(s\) cannot be split"),
        ("ppl", 39, None, r"39 line\(s\) of text; a sweep needs at least 40"),
        ("ppl", 400, 2, "limit 2 leaves a part without a window"),
    ):
        with pytest.raises(PlanError, match=message):
            split_task(parse_task(spec(made, count)), 0.2, 0, limit)
    with pytest.raises(PlanError, match="lm-eval scores a task whole"):
        split_task(parse_task("lm:arc_easy"), 0.2, 0, None)


def test_an_estimate_is_the_weighted_mean_with_its_standard_error():
    draw = np.random.default_rng(0)
    values, weights = draw.normal(size=30), draw.uniform(1, 5, size=30)
    mean = np.average(values, weights=weights)
    error = math.sqrt(30 / 29 * (((weights * (values - mean)) ** 2).sum())) / weights.sum()
    assert estimate(tuple(values), tuple(weights)) == pytest.approx((mean, error))
    plain = values.std(ddof=1) / math.sqrt(30)
    assert estimate(tuple(values), (1.0,) * 30) == pytest.approx((values.mean(), plain))
    first = estimate(tuple(values[:10]), tuple(weights))  # of a stopped trial
    assert first == pytest.approx(estimate(tuple(values[:10]), tuple(weights[:10])))
    assert estimate((2.0,), (3.0,)) == (2.0, None)
    assert math.isnan(estimate((1.0, math.nan), (1.0, 1.0))[0])
    assert math.isnan(estimate((1.0, math.inf), (1.0, 1.0))[0])


def scores(loss, correct=None, kind="qa"):
    values = {"log_loss": tuple(loss)} | ({} if correct is None else {"correct": tuple(correct)})
    return Scores((TaskScores("qa:x", kind, values, (1.0,) * len(loss)),))


def test_gains_are_paired_and_positive_is_better(spec):
    tasks = (parse_task(spec("qa", 10)),)
    draw = np.random.default_rng(1)
    loss, right = draw.normal(3, 2, size=40), draw.integers(0, 2, size=40).astype(float)
    less, more = loss - 0.5 + draw.normal(0, 0.01, size=40), np.ones(40)
    base, better = scores(loss, right), scores(less, more)
    for name, difference, value in (("log_loss", loss - less, less), ("accuracy", more - right, more)):
        found = gain(better, base, name, tasks)
        assert found.value == pytest.approx(value.mean())
        assert found.gain == pytest.approx(difference.mean())
        assert found.gain > 0
        assert found.gain_stderr == pytest.approx(difference.std(ddof=1) / math.sqrt(40))
        assert gain(base, better, name, tasks).gain == pytest.approx(-found.gain)
    assert gain(better, base, "log_loss", tasks).gain_stderr < 0.01 < gain(better, base, "log_loss", tasks).stderr / 10
    assert gain(base, base, "log_loss", tasks).gain == 0
    assert gain(better, base, "spearman", tasks) is None


def test_a_stopped_trial_is_compared_over_the_records_that_it_has(spec):
    tasks = (parse_task(spec("qa", 10)),)
    base = scores([1.0, 2.0, 3.0, 100.0], [1.0, 0.0, 1.0, 1.0])
    stopped = scores([2.0, 2.0, 5.0])
    assert gain(stopped, base, "log_loss", tasks).gain == pytest.approx(-1)
    assert gain(stopped, base, "accuracy", tasks) is None  # never measured
    summary = summarize(stopped, base, ("accuracy", "log_loss", "kept"), tasks)
    assert (summary["records"], summary["of"]) == (3, 4)
    assert list(summary["objectives"]) == ["log_loss"]


def test_an_objective_over_several_tasks_is_their_mean(spec):
    tasks = (parse_task(spec("qa", 10)), parse_task(spec("pairs", 10)))
    pairs = {name: TaskScores("pairs:x", "pairs", {}, (1.0,) * 9, {"spearman": (name, 0.3)}) for name in (0.25, 0.75)}
    base = Scores((*scores([1.0, 1.0], [0.0, 1.0]).tasks, pairs[0.25]))
    other = Scores((*scores([1.0, 1.0], [1.0, 1.0]).tasks, pairs[0.75]))
    found = gain(other, base, "accuracy", tasks)
    assert (found.value, found.gain) == pytest.approx(((1 + 0.75) / 2, (0.5 + 0.5) / 2))
    assert found.gain_stderr == pytest.approx(math.hypot(0.5, math.hypot(0.3, 0.3)) / 2)
    assert gain(other, base, "log_loss", tasks).gain == 0  # of the task that has one


def test_what_is_not_a_number_is_written_as_null_and_gains_nothing(spec):
    tasks = (parse_task(spec("qa", 10)),)
    base, broken = scores([1.0, 2.0], [1.0, 0.0]), scores([math.nan, 2.0], [0.0, 0.0])
    summary = summarize(broken, base, ("log_loss",), tasks)
    assert summary["objectives"]["log_loss"] == {"value": None, "stderr": None, "gain": None, "gain_stderr": None}
    json.dumps(summary, allow_nan=False)
    assert not gain(broken, base, "log_loss", tasks).exceeds(0.0)


def test_pieces_are_joined_in_order_and_scores_survive_json():
    def result(number, scores, overlong=0, kind="qa"):
        figures = (Figure("f", 0.0, None, higher_is_better=True),)
        return TaskResult("qa:x", kind, figures, number, overlong, {}, scores=scores)

    joined = score_pieces(
        [
            result(2, {"log_loss": (1.0, 2.0)}, 1),
            result(1, {"log_loss": (3.0,)}, 2),
            result(3, {"correct": (1.0,) * 3}, 3),
        ]
    )
    assert joined.values == {"log_loss": (1.0, 2.0, 3.0), "correct": (1.0, 1.0, 1.0)}
    assert joined.overlong == 3  # the answers are asked of the same records
    text = score_pieces([result(2, {"loss_sum": (8.0, 3.0), "tokens": (4.0, 2.0)}, kind="ppl")])
    assert (text.values, text.weights) == ({"loss": (2.0, 1.5)}, (4.0, 2.0))
    assert text.figures()["loss"][0] == pytest.approx(11 / 6)
    whole = Scores((joined, text))
    assert Scores.from_json(json.loads(json.dumps(whole.to_json()))) == whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objectives": ("acuracy",)}, "'acuracy' is no figure of qa tasks; did you mean 'accuracy'"),
        ({"objectives": ("kept",)}, "give accuracy or log_loss beside kept"),
        ({"objectives": ("spearman",)}, "'spearman' is no figure of qa tasks"),
        ({"tasks": ()}, "no task given"),
        ({"fraction": 1.0}, "validation share is 1.0"),
        ({"sampler": "gird"}, "unknown sampler 'gird'; did you mean 'grid'"),
        ({"limit": 0}, "limit is 0"),
        ({"trials": -1}, "trials is -1"),
    ],
)
def test_a_setup_that_cannot_be_is_refused_before_any_model_is_opened(changes, message, spec):
    with pytest.raises(PlanError, match=message):
        Setup(**{"model": "absent", "space": Space((4,)), "tasks": (spec("qa", 40),), **changes}).parsed()


def test_answers_are_written_only_for_an_objective_that_looks_at_them(spec):
    tasks = (spec("qa", 40),)
    for objectives, answers in ((("log_loss",), False), (("log_loss", "f1"), True), (("accuracy", "kept"), True)):
        (task,) = Setup("absent", Space((4,)), tasks, objectives).parsed()
        check_objectives(objectives, (task,))
        assert task.answers is answers


def test_what_decides_results_is_a_sweeps_identity(spec):
    setup = Setup("model", Space((4,)), (spec("qa", 40),))
    tasks = setup.parsed()
    same = Setup("elsewhere", Space((4,)), setup.tasks, trials=3, device="cpu", batch_tokens=9, prefix_memory=0)
    assert same.identity("weights", "tokenizer", tasks) == setup.identity("weights", "tokenizer", tasks)
    for other in (
        Setup("model", Space((4, 8)), setup.tasks),
        Setup("model", Space((4,)), setup.tasks, seed=1),
        Setup("model", Space((4,)), setup.tasks, patience=None),
    ):
        assert other.identity("weights", "tokenizer", tasks) != setup.identity("weights", "tokenizer", tasks)
    assert setup.identity("weights", "another", tasks) != setup.identity("weights", "tokenizer", tasks)
    assert setup.identity("others", "tokenizer", tasks) != setup.identity("weights", "tokenizer", tasks)
    other_task = (parse_task(spec("qa", 41)),)
    assert setup.identity("weights", "tokenizer", other_task) != setup.identity("weights", "tokenizer", tasks)
