"""The report of a sweep."""

from __future__ import annotations

from functools import partial
from pathlib import PurePath

from trawl.observers import Observer
from trawl.report.heat_maps import draw_heat_map, heat_map
from trawl.report.known_spectra import spectra_section
from trawl.report.page import Page, Section, Table, Tile, sections
from trawl.report.pictures import Picture, render
from trawl.report.plots import MOST_ROWS, draw_errors, draw_front, draw_layers, draw_ranges, error_curves, ranges_of
from trawl.report.reading import Measure, Scores, Study, Trial
from trawl.report.units import NONE, describe, interval, method_name, minus, unit_of

PARTS = ("validation", "test")
FINISHED = ("complete", "stopped", "failed")
MOST_BEST = 12


def sweep_page(study: Study, observer: Observer) -> Page:
    """Put together the report of a sweep, finished or not; its pictures are drawn, its spectra measured."""
    objectives = study.shown_objectives
    shown: list[Section | None] = []
    if objectives:
        shown = [
            best_table(study, objectives[0]),
            figures_table(study),
            heat_maps(study, objectives),
            best_layers(study, objectives[0]),
            over_ranges(study, objectives[0]),
            front(study, objectives[0]),
            composition(study, objectives[0]),
        ]
    done = sum(trial.state in FINISHED for trial in study.trials)
    name = PurePath(study.model).name or study.model
    return Page(
        kind="Sweep",
        title=name,
        headline=headline(study),
        facts=facts(study),
        tiles=tiles(study),
        notice=notice(study, done),
        progress=None if study.state == "complete" else done / max(len(study.trials), 1),
        sections=sections(
            *shown,
            errors(study),
            _spectra(study, observer),
            rebuild(study),
            failures(study),
            reading_help(study),
        ),
        footer=f"trawl {study.trawl}, study of {study.started} to {study.updated}",
    )


def _spectra(study: Study, observer: Observer) -> Section | None:
    """Return the spectra of what the best trial approximates."""
    if (best := study.trial(study.best)) is None:
        return None
    return spectra_section(study.model, roles=best.roles, layers=best.layers, rank=best.rank, observer=observer)


def headline(study: Study) -> str:
    """Say the result in one sentence, and whether it exceeds the noise."""
    best = study.trial(study.best)
    if best is None or not study.shown_objectives:
        return "No intervention has been scored on the whole validation part yet."
    objective = study.shown_objectives[0]
    unit, part = unit_of(objective), "test" if best.test else "validation"
    base, measure = _measure(study.base[part], objective), best.measure(part, objective)
    if measure.gain is None or measure.value is None:
        return f"The best on validation is {describe(best)}."
    chosen = "" if part == "test" else "So far the best on validation: "
    gained = f"{unit.signed(measure.gain)} {unit.gain}"
    if measure.gain_stderr is None:
        return f"{chosen}{describe(best)} gains {gained} of {unit.name} on the {part} part; its noise is not known."
    low, high = interval(measure)
    span = f"95% interval {unit.signed(low)} to {unit.signed(high)}"
    if low <= 0 <= high:
        return (
            f"{chosen}{describe(best)} moves {unit.name} on the {part} part by {gained}, "
            f"which is within the noise ({span})."
        )
    verb = "improves" if measure.gain > 0 else "worsens"
    before, after = (unit.value(Measure(m.value)) for m in (base, measure))
    return f"{chosen}{describe(best)} {verb} {unit.name} on the {part} part from {before} to {after}: {gained}, {span}."


def facts(study: Study) -> tuple[tuple[str, str], ...]:
    """Return the study's circumstances."""
    tasks = ", ".join(
        f"{task['task']} ({task['validation']:,} validation, {_tested(task['test'])})" for task in study.tasks
    )
    return (
        ("Model", f"{study.model} ({study.family}, {study.layers} layers, {study.parameters:,} parameters)"),
        ("Tasks", tasks),
        ("Search", f"{study.sampler}, {', '.join(study.objectives)}, seed {study.seed}"),
        ("Command", study.command or "from Python"),
    )


def _tested(records: int | None) -> str:
    """Say how large the test part is; it is scored last, and counted then."""
    return "test records not scored yet" if records is None else f"{records:,} test records"


def tiles(study: Study) -> tuple[Tile, ...]:
    """Return the most telling numbers."""
    best = study.trial(study.best)
    stopped, failed = study.count("stopped"), study.count("failed")
    aside = ", ".join(f"{number} {word}" for number, word in ((stopped, "stopped early"), (failed, "failed")) if number)
    trials = Tile("Trials scored", f"{study.count('complete'):,} of {len(study.trials):,}", aside)
    if not study.shown_objectives:
        return (trials,)
    objective = study.shown_objectives[0]
    unit = unit_of(objective)
    part = "test" if study.base["test"] else "validation"
    found = [Tile(f"Base, {part}", unit.value(Measure(_measure(study.base[part], objective).value)), unit.name)]
    composed = study.composition.test if study.composition and part == "test" else None
    for label, scores in ((f"Best, {part}", best and best.scores(part)), (f"Composed, {part}", composed)):
        if scores:
            measure = _measure(scores, objective)
            found.append(Tile(label, unit.value(Measure(measure.value)), f"{unit.gained(measure)} {unit.gain}"))
    if best and best.kept is not None:
        found.append(Tile("Best keeps", f"{best.kept:.2%}", "of all parameters, if factored"))
    return (*found, trials)


def notice(study: Study, done: int) -> str:
    """Say how far an unfinished study is."""
    if study.state == "complete":
        return ""
    states = [(study.count(state), state) for state in ("complete", "stopped", "failed", "running", "waiting")]
    counted = ", ".join(f"{number:,} {state}" for number, state in states if number)
    untested = "" if study.base["test"] else " The test part has not been scored, and what is best may still change."
    return (
        f"Unfinished ({study.state}): {done:,} of {len(study.trials):,} trials are done ({counted}), "
        f"as of {study.updated}.{untested}"
    )


def best_table(study: Study, objective: str) -> Section | None:
    """Return the best trials beside the base and the composition, each with its intervals."""
    unit = unit_of(objective)
    ranked = _ranked(study, objective)
    if not ranked:
        return None
    rows: list[tuple[str, ...]] = [
        (
            "",
            "base",
            *[""] * 3,
            *_columns(study.base["validation"], objective),
            *_columns(study.base["test"], objective),
            "",
        )
    ]
    if made := study.composition:
        name = " + ".join(map(str, made.trials))
        rows.append(
            (name, "composed", "", "", "", *_columns(made.validation, objective), *_columns(made.test, objective), "")
        )
    rows += [_row(trial, objective) for trial in ranked[:MOST_BEST]]
    marked = {n for n, row in enumerate(rows) if row[0] == str(study.best)}
    columns: tuple[str, ...] = (
        "trial",
        "method",
        "roles",
        "layers",
        "rank",
        f"validation, {unit.name}",
        f"gain, {unit.gain} [95%]",
    )
    columns += (f"test, {unit.name}", f"gain, {unit.gain} [95%]", "kept")
    text = (
        f"The {min(MOST_BEST, len(ranked))} best of {len(ranked)} by {unit.name} on the validation part, with standard "
        "errors and 95% intervals of the paired difference to the base. Being chosen for their validation gain, the "
        "best owe part of it to luck; the test part, which took no part in the choice, is the figure to quote."
    )
    return Section("Best interventions", text, table=Table(columns, tuple(rows), 5, frozenset(marked)))


def _ranked(study: Study, objective: str) -> list[Trial]:
    """Return the wholly scored trials, the best on validation first."""
    scored = [(trial.measure("validation", objective).gain, trial) for trial in study.trials]
    known = [(gain, trial) for gain, trial in scored if gain is not None]
    return [trial for _, trial in sorted(known, key=lambda item: (-item[0], item[1].number))]


def _row(trial: Trial, objective: str) -> tuple[str, ...]:
    kept = NONE if trial.kept is None else f"{trial.kept:.2%}"
    parts = (_columns(trial.scores(part), objective) for part in PARTS)
    named = (str(trial.number), method_name(trial.method), trial.roles, trial.layers, trial.rank_text)
    return (*named, *(text for part in parts for text in part), kept)


def _columns(scores: Scores | None, objective: str) -> tuple[str, str]:
    """Write the value and the gain of an objective."""
    measure, unit = _measure(scores, objective), unit_of(objective)
    return unit.value(measure), unit.gained(measure)


def _measure(scores: Scores | None, objective: str) -> Measure:
    return (scores.objectives.get(objective) if scores else None) or Measure(None)


def figures_table(study: Study) -> Section | None:
    """Return every figure of the base, the best and the composition, so that no task gain stands alone."""
    part = "test" if study.base["test"] else "validation"
    best, made = study.trial(study.best), study.composition
    compared: list[tuple[str, Scores | None]] = [("best", best.scores(part) if best else None)]
    if made:
        compared.append(("composed", made.test if part == "test" else made.validation))
    base = study.base[part]
    known = [(name, {(task, figure): m for task, figure, m in scores.figures}) for name, scores in compared if scores]
    if not base or not known:
        return None
    rows = []
    for task, figure, measure in base.figures:
        others = [found.get((task, figure), Measure(None)) for _, found in known]
        rows.append((task, figure, _plain(measure), *(text for m in others for text in (_plain(m), _plain_gain(m)))))
    columns = ("task", "figure", "base", *(text for name, _ in known for text in (name, "gain [95%]")))
    text = f"Every figure on the {part} part. A gain is positive where the model became better."
    return Section("All figures", text, table=Table(columns, tuple(rows), 2))


def _plain(measure: Measure) -> str:
    if measure.value is None:
        return NONE
    return minus(f"{measure.value:.4g}") + ("" if measure.stderr is None else f" ± {measure.stderr:.2g}")


def _plain_gain(measure: Measure) -> str:
    if measure.gain is None:
        return NONE
    low_high = "" if measure.gain_stderr is None else " [{:+.3g}, {:+.3g}]".format(*interval(measure))
    return minus(f"{measure.gain:+.3g}{low_high}")


def heat_maps(study: Study, objectives: tuple[str, ...]) -> Section | None:
    """Return the heat maps of every objective, on validation and on test."""
    pictures: list[Picture] = []
    for objective in objectives:
        for part in PARTS:
            if found := heat_map(study, part, objective):
                alt = f"Heat map of the gain in {found.unit.name} on the {part} part, by layer and rank"
                caption = f"{found.unit.name.capitalize()}, {part} part"
                draw = partial(draw_heat_map, found=found)
                pictures.append(render(f"gain-{objective}-{part}", alt, draw, caption))
    if not pictures:
        return None
    text = (
        "Each cell is one intervention in one layer; its colour is the difference to the base. A number, or a dot "
        "where there is no room for one, stands where the difference exceeds twice its own standard error, bold for a "
        "gain. Hatched: stopped early, not compared. Framed: the best on validation. On the test part only the best of "
        "each layer is scored, once."
    )
    return Section("Gain by layer and rank", text, tuple(pictures))


def best_layers(study: Study, objective: str) -> Section | None:
    """Return the gain of each layer's best trial on both parts."""
    chosen = [(layer, study.trial(number)) for layer, number in sorted(study.best_of_layer.items())]
    rows = [(str(layer), *_row(trial, objective)) for layer, trial in chosen if trial]
    if not rows:
        return None
    unit = unit_of(objective)
    alt = f"Gain in {unit.name} of the best intervention in each layer, with 95% intervals"
    picture = render("layers", alt, partial(draw_layers, study=study, objective=objective))
    columns: tuple[str, ...] = ("layer", "trial", "method", "roles", "layers", "rank", f"validation, {unit.name}")
    columns += (f"gain, {unit.gain} [95%]", f"test, {unit.name}", f"gain, {unit.gain} [95%]", "kept")
    text = "Each layer's best trial on validation. Bars are 95% intervals of the paired difference to the base."
    return Section("Best of each layer", text, (picture,), Table(columns, tuple(rows), 6), folded=True)


def over_ranges(study: Study, objective: str) -> Section | None:
    """Return the gains of trials over several layers."""
    found = ranges_of(study, objective)
    if not found:
        return None
    shown = found[:MOST_ROWS]
    alt = f"Gain in {unit_of(objective).name} of interventions over several layers, with 95% intervals"
    picture = render("ranges", alt, partial(draw_ranges, trials=shown, objective=objective))
    some = f"The {len(shown)} best of {len(found)}" if len(shown) < len(found) else f"All {len(found)}"
    text = f"{some} interventions over several layers at once, best on validation first, with 95% intervals. "
    text += "Layers form one stack unless a row says otherwise (by 1: layer by layer)."
    return Section("Several layers at once", text, (picture,))


def front(study: Study, objective: str) -> Section | None:
    """Return gain against kept parameters."""
    if not any(trial.kept is not None for trial in _ranked(study, objective)):
        return None
    alt = f"Gain in {unit_of(objective).name} against kept parameters, with the Pareto front"
    picture = render("front", alt, partial(draw_front, study=study, objective=objective))
    text = (
        "Kept parameters are those of the model if the factors were stored in place of the matrices, as a share of "
        "all. The line is the Pareto front: no trial has both fewer parameters and a larger gain. Its bars are 95% "
        "intervals."
    )
    return Section("Gain against kept parameters", text, (picture,))


def composition(study: Study, objective: str) -> Section | None:
    """Return the steps of the composition."""
    made, unit = study.composition, unit_of(objective)
    if made is None:
        return None
    rows = []
    for number, step in enumerate(made.steps, 1):
        trial = study.trial(step.trial)
        moved = NONE if step.improvement is None else unit.signed(step.improvement)
        noise = NONE if step.noise is None else f"{step.noise * unit.factor:.{unit.digits}f}"
        what = describe(trial) if trial else f"trial {step.trial}"
        rows.append((str(number), what, "kept" if step.kept else "left out", step.reason, moved, noise))
    columns = ("step", "intervention", "", "reason", f"improvement, {unit.gain}", "noise")
    marked = frozenset(n for n, step in enumerate(made.steps) if step.kept)
    order = made.order.replace("-", " ")
    text = f"Tried one upon another, {order}; each is kept if validation improves by more than its noise."
    ends = [
        (part, _measure(scores, objective)) for part, scores in (("validation", made.validation), ("test", made.test))
    ]
    gains = [
        f"{unit.gained(measure)} {unit.gain} on the {part} part" for part, measure in ends if measure.gain is not None
    ]
    note = f"Together, against the base: {'; '.join(gains)}." if gains else ""
    return Section("Composition", text, table=Table(columns, tuple(rows), 4, marked), note=note)


def errors(study: Study) -> Section | None:
    """Return the relative error of every stack that was decomposed."""
    curves = error_curves(study)
    if not curves:
        return None
    alt = "Relative error of every stack by layer and rank"
    picture = render("errors", alt, partial(draw_errors, curves=curves))
    text = (
        "How far each stack is from its approximation, ‖T − T̂‖ / ‖T‖ in the Frobenius norm. A bar spans the layers of "
        "one stack. An error near 1 means that little of the matrices is left, which need not harm the task."
    )
    return Section("Error per stack", text, (picture,))


def rebuild(study: Study) -> Section | None:
    """Return the commands that make the winner's checkpoint."""
    if not study.commands:
        return None
    what = "the composition" if study.composition and len(study.composition.trials) > 1 else "the best intervention"
    return Section("Rebuild the winner", f"These commands make {what} into a checkpoint.", commands=study.commands)


def failures(study: Study) -> Section | None:
    """Return the trials that failed, with their errors."""
    rows = [(str(t.number), describe(t), t.error or NONE) for t in study.trials if t.state == "failed"]
    if not rows:
        return None
    return Section("Failed trials", table=Table(("trial", "intervention", "error"), tuple(rows), 3), folded=True)


def reading_help(study: Study) -> Section:
    """Say how the figures came about."""
    text = (
        f"Records are split once, by seed {study.seed}, into a validation part, on which everything is chosen, and a "
        "test part, scored once for the base, the best, the best of each layer and the composition. A gain is "
        "the mean over records of the difference to the base on the same record, with the sign that makes positive "
        "better; its standard error is that of the paired difference, and a 95% interval is ± 1.96 of it. Intervals "
        "are of one comparison each and do not allow for how many were made."
    )
    return Section("How to read this", text)
