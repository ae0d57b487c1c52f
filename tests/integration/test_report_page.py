"""What a report says, and how it is drawn: from synthetic results, no model."""

import json
import re
import warnings
from html.parser import HTMLParser

import pytest

pytest.importorskip("matplotlib", reason="needs the extra: pip install 'trawl-llm[plot]'")

from tests.synthetic_sweep import synthetic_sweep, write_sweep
from trawl.errors import PlanError
from trawl.report import write_report
from trawl.report.heat_maps import draw_heat_map, heat_map
from trawl.report.page import to_html
from trawl.report.palette import DIVERGING_LEVELS, PALETTE, gain_colour
from trawl.report.pictures import render
from trawl.report.plots import error_curves, ranges_of
from trawl.report.reading import Measure, expand_layers, read_folder, read_study
from trawl.report.sweep_page import best_table, figures_table, headline, sweep_page
from trawl.report.units import unit_of

HOSTILE = '<script>alert(1)</script> & "x" \'y\' $\\frac$ 日本 id="z" #1f6f8b'


def silent(stage, done, total):
    pass


def small(state="complete", **changes):
    """A study of three layers, quick to draw."""
    return synthetic_sweep(state, tried=3, **changes)


def page_of(**changes):
    return sweep_page(read_study(small(**changes)), silent)


def section(page, title):
    return next(item for item in page.sections if item.title == title)


@pytest.fixture(scope="module")
def complete():
    return page_of()


@pytest.fixture(scope="module")
def html(complete):
    return to_html(complete)


class Strict(HTMLParser):
    """Collects tags, ids and texts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.addresses, self.texts = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        attributes = dict(attrs)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.addresses += [value for name, value in attrs if name.endswith(("href", "src"))]

    handle_startendtag = handle_starttag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_needs_nothing_from_outside(html, complete):
    found = Strict(html)
    assert found.tags.count("svg") == 2 * len(complete.pictures) > 0
    assert not {"script", "link", "iframe", "object", "img"} & set(found.tags)
    assert all(address.startswith("#") for address in found.addresses)
    assert not re.search(r"@import|url\((?!#)", html)
    assert len(found.ids) == len(set(found.ids))


def test_references_inside_pictures_reach_an_id(html):
    found = Strict(html)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', html))
    assert used
    assert used <= set(found.ids)


def test_the_headline_is_the_winner_on_the_test_part(complete):
    values = small()
    best = next(trial for trial in values["trials"] if trial["number"] == values["best"])
    accuracy = best["test"]["objectives"]["accuracy"]
    low = 100 * (accuracy["gain"] - 1.96 * accuracy["gain_stderr"])
    assert f"{best['method'].upper()} rank {best['rank']} of fc in layer {best['layers']} improves" in complete.headline
    assert f"to {100 * accuracy['value']:.1f}%: +{100 * accuracy['gain']:.1f} points" in complete.headline
    assert f"95% interval +{low:.1f} to" in complete.headline
    assert complete.notice == ""


@pytest.mark.parametrize(
    ("gain", "stderr", "words"),
    [
        (0.01, 0.02, "within the noise"),
        (-0.05, 0.01, "worsens"),
        (0.05, None, "noise is not known"),
        (None, None, "is CP"),
    ],
)
def test_the_headline_claims_no_more_than_the_noise_allows(gain, stderr, words):
    values = small()
    best = next(trial for trial in values["trials"] if trial["number"] == values["best"])
    best["test"]["objectives"]["accuracy"] |= {"gain": gain, "gain_stderr": stderr}
    assert words in headline(read_study(values))


def test_the_best_table_is_in_order_with_intervals():
    values = small()
    table = best_table(read_study(values), "accuracy").table
    assert [row[1] for row in table.rows[:2]] == ["base", "composed"]
    gains = [float(row[6].split()[0].replace("−", "-")) for row in table.rows[2:]]
    assert gains == sorted(gains, reverse=True)
    assert table.rows[2][0] == str(values["best"])
    assert table.marked == {2}
    assert re.fullmatch(r"\+[\d.]+ \[[+−][\d.]+, [+−][\d.]+\]", table.rows[2][6])


def test_a_task_gain_never_stands_alone(complete):
    rows = section(complete, "All figures").table.rows
    assert [row[:2] for row in rows] == [
        ("qa:qa_wikidata.jsonl", "correct"), ("qa:qa_wikidata.jsonl", "log_loss"), ("ppl:wiki.txt", "perplexity"),
    ]  # fmt: skip
    assert rows[2][4].startswith("−")  # perplexity became worse, and says so


def test_a_stopped_trial_is_hatched_and_never_ranked():
    values = small()
    stopped = {str(trial["number"]) for trial in values["trials"] if trial["state"] == "stopped"}
    for trial in values["trials"]:
        if str(trial["number"]) in stopped:
            trial["validation"]["objectives"]["accuracy"]["gain"] = 0.9
    study = read_study(values)
    found = heat_map(study, "validation", "accuracy")
    assert stopped
    assert max(found.gains) < 0.5
    picture = render("x", "x", lambda drawing: draw_heat_map(drawing, found))
    assert picture.wide.count("stopped after 60 of 300 records") == len(stopped)
    assert stopped.isdisjoint(row[0] for row in best_table(study, "accuracy").table.rows)


def test_heat_maps_hold_each_trial_of_one_layer_once_per_part():
    study = read_study(small())
    found = heat_map(study, "validation", "accuracy")
    assert [panel.title for panel in found.panels] == ["CP of fc", "CP of attn", "Tucker of fc", "Tucker of attn"]
    assert all(panel.ranks == ((1,), (8,), (64,)) for panel in found.panels)
    assert sum(len(panel.cells) for panel in found.panels) == 4 * 3 * 3
    assert len(heat_map(study, "test", "accuracy").gains) == len(study.best_of_layer)
    assert heat_map(read_study(small("searching")), "test", "accuracy") is None


def test_only_what_exceeds_the_noise_has_a_number():
    study = read_study(small())
    found = heat_map(study, "validation", "accuracy")
    beyond = [
        found.unit.short(measure.gain)
        for panel in found.panels
        for trial in panel.cells.values()
        if (measure := trial.measure("validation", "accuracy")).stands_out
    ]
    picture = render("x", "x", lambda drawing: draw_heat_map(drawing, found))
    numbers = re.findall(r">([+−][\d.]+)</text>", picture.wide)
    labels = [text for text in numbers if text not in beyond]
    assert 0 < len(beyond) < len(found.gains)
    assert len(numbers) - len(labels) >= len(beyond)
    assert all(text.startswith("−") for text in labels)  # ticks of the colour bar
    assert f"typical standard error {100 * found.noise:.1f}" in picture.wide


def test_colours_are_symmetric_and_large_losses_do_not_drown_gains():
    middle = DIVERGING_LEVELS // 2
    assert gain_colour(0.0, 0.1) == PALETTE[f"gain{middle}"][0]
    assert gain_colour(0.1, 0.1) == PALETTE[f"gain{DIVERGING_LEVELS - 1}"][0]
    assert gain_colour(-5.0, 0.1) == gain_colour(-0.1, 0.1) == PALETTE["gain0"][0]
    lights = [light for light, _ in PALETTE.values()]
    assert len(lights) == len(set(lights))
    values = small()
    values["trials"][0]["validation"]["objectives"]["log_loss"]["gain"] = -9.0
    found = heat_map(read_study(values), "validation", "log_loss")
    assert found.limit < 1
    assert "larger losses have the last colour" in render("x", "x", lambda d: draw_heat_map(d, found)).wide


def test_pictures_follow_the_scheme_and_are_the_same_every_time(complete):
    picture = complete.pictures[0]
    assert not set(re.findall(r"#[0-9a-f]{6}", picture.wide)) & {light for light, _ in PALETTE.values()}
    assert "var(--ink)" in picture.wide
    assert picture == page_of().pictures[0]
    assert picture.png.startswith(b"\x89PNG")
    assert picture.wide != picture.narrow


def test_an_unfinished_study_says_how_far_it_is():
    page = page_of(state="searching")
    done = sum(trial["state"] in {"complete", "stopped", "failed"} for trial in small("searching")["trials"])
    total = len(small()["trials"])
    assert f"Unfinished (searching): {done} of {total} trials are done" in page.notice
    assert "test part has not been scored" in page.notice
    assert page.progress == pytest.approx(done / total)
    assert page.headline.startswith("So far the best on validation: ")
    titles = [item.title for item in page.sections]
    assert "Composition" not in titles
    assert "Rebuild the winner" not in titles
    assert "<progress" in to_html(page)


def test_a_study_that_has_scored_nothing_still_has_a_page():
    values = small("searching", best=None, best_of_layer={}, front=[])
    values["base"] = {"validation": None, "test": None}
    values["tasks"] = [task | {"test": None} for task in values["tasks"]]
    for trial in values["trials"]:
        trial |= {"state": "waiting", "validation": None, "stacks": [], "kept": None}
    page = sweep_page(read_study(values), silent)
    assert page.headline.startswith("No intervention has been scored")
    assert page.pictures == ()
    assert to_html(page)


def test_unknown_errors_and_missing_numbers_are_dashes():
    values = small()
    for trial in values["trials"]:
        for part in ("validation", "test"):
            for measure in (trial[part] or {"objectives": {}})["objectives"].values():
                measure |= {"stderr": None, "gain_stderr": None}
    values["base"]["test"]["tasks"][1]["figures"][0] |= {"value": float("nan"), "stderr": None}
    study = read_study(json.loads(json.dumps(values)))
    assert "noise unknown" in to_html(sweep_page(study, silent))
    assert figures_table(study).table.rows[2][2] == "–"
    assert Measure(0.1, gain=0.1).stands_out is False


def test_tucker_triples_ladders_of_many_layers_and_objectives():
    values = small(objectives=["log_loss", "kept"], layers=80)
    for trial in values["trials"]:
        trial["rank"] = [3, trial["rank"], trial["rank"]]
        if trial["layers"].isdigit():
            trial["layers"] = str(2 * int(trial["layers"]) + 20)
    values["best_of_layer"] = {str(2 * int(layer) + 20): number for layer, number in values["best_of_layer"].items()}
    study = read_study(values)
    assert study.shown_objectives == ("log_loss", "accuracy")
    page = sweep_page(study, silent)
    assert "3,64,64" in page.pictures[0].wide
    assert "log-loss" in page.headline
    assert [picture.name for picture in page.pictures[:2]] == ["gain-log_loss-validation", "gain-log_loss-test"]


def test_ranges_are_listed_best_first_and_stacks_drawn_once():
    study = read_study(small())
    gains = [trial.measure("validation", "accuracy").gain for trial in ranges_of(study, "accuracy")]
    assert len(gains) == 48  # 2 methods, 2 roles, 4 ranges, 3 ranks
    assert gains == sorted(gains, reverse=True)
    names = [(curve.panel, curve.rank, stack.name) for curve in error_curves(study) for stack in curve.stacks]
    assert len(names) == len(set(names))
    assert {panel for panel, *_ in names} >= {"CP of fc", "Tucker of attn-kv"}


@pytest.mark.parametrize(
    ("text", "layers"), [("28", (28,)), ("3-5,9", (3, 4, 5, 9)), ("all", ()), ("", ()), ("5-x", ())]
)
def test_layers_in_a_name(text, layers):
    assert expand_layers(text) == layers


@pytest.mark.parametrize(
    ("objective", "gain", "text"),
    [
        ("accuracy", 0.1014, "+10"),
        ("accuracy", -0.042, "−4.2"),
        ("log_loss", 0.214, "+.21"),
        ("log_loss", -8.31, "−8.3"),
    ],
)
def test_numbers_fit_into_a_cell(objective, gain, text):
    assert unit_of(objective).short(gain) == text


def test_every_text_is_escaped(html):
    values = small(model=HOSTILE, family=HOSTILE, command=HOSTILE, commands=[HOSTILE], updated=HOSTILE)
    values["tasks"][0]["task"] = values["base"]["test"]["tasks"][0]["task"] = HOSTILE
    values["composition"]["steps"][0]["reason"] = HOSTILE
    for trial in values["trials"]:
        trial |= {"roles": HOSTILE, "error": HOSTILE, "method": HOSTILE}
        for stack in trial["stacks"]:
            stack["name"] = f"{HOSTILE}.28"
    text = to_html(sweep_page(read_study(values), silent))
    assert "<script" not in text
    found = Strict(text)
    assert set(found.tags) <= set(Strict(html).tags)
    assert HOSTILE in [data.strip() for data in found.texts]
    assert 'z"' not in found.ids


def test_a_report_is_sealed_and_names_its_files(tmp_path):
    written = write_report(write_sweep(tmp_path / "study", tried=3), tmp_path / "elsewhere")
    assert written.page == tmp_path / "elsewhere" / "report.html"
    assert {path.name for path in written.pictures} >= {"gain-accuracy-validation.png", "front.png", "errors.png"}
    files = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {written.page, *written.pictures, tmp_path / "study" / "results.json"}
    assert written.to_json()["pictures"] == [str(path) for path in written.pictures]


BROKEN = [
    ("{", "is not readable JSON"),
    ("[]", "holds a JSON list"),
    ("{}", "format_version None; this version of trawl reads 1"),
    (json.dumps(synthetic_sweep(format_version=2)), "format_version 2"),
    (json.dumps({key: value for key, value in synthetic_sweep().items() if key != "tasks"}), "has no 'tasks'"),
    (json.dumps(synthetic_sweep(trials=[{"number": 1}])), "has no 'rank'"),
    (json.dumps(synthetic_sweep(trials=7)), "is not as trawl writes it"),
    (json.dumps(synthetic_sweep(best_of_layer=[])), "is not as trawl writes it"),
]


@pytest.mark.parametrize(("text", "message"), BROKEN, ids=[message for _, message in BROKEN])
def test_what_cannot_be_read_is_said_in_one_line(text, message, tmp_path):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(PlanError, match=message) as caught:
        read_folder(tmp_path)
    assert "results.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_glyph_without_a_font_is_no_warning():
    values = small()
    for trial in values["trials"]:
        trial["method"] = "日本"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sweep_page(read_study(values), silent)
