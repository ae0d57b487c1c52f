"""Budgets: the knapsack against brute force, and curves against what decompositions really lose."""

import ctypes
import itertools
import math
import sys
from types import SimpleNamespace

import pytest
import scipy.optimize
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import block_diag

from trawl.budget import Form, Option, choose, make_pieces
from trawl.budget import ledger as ledger_module
from trawl.budget.curves import Point, Workshop
from trawl.budget.ledger import Ledger, Measured
from trawl.budget.pieces import SMALLEST, TRIAL_SHARES, Piece, make_pairs
from trawl.budget.trials import close_ones, probe_blocks
from trawl.calibration import make_moments, random_calibration
from trawl.calibration.weights import stack_weights
from trawl.checkpoint import open_folder
from trawl.decompose import SVD
from trawl.errors import PlanError
from trawl.planning import match_checkpoint
from trawl.recipe import Recipe

OPTIONS = st.builds(Option, st.integers(0, 60), st.floats(0, 1).map(lambda damage: round(damage, 3)))
CPU = torch.device("cpu")


@given(st.lists(st.lists(OPTIONS, min_size=1, max_size=4), min_size=1, max_size=4), st.integers(0, 200))
def test_the_choice_is_the_best_of_all_that_fit(menus, budget):
    fitting = [
        sum(option.damage for option in taken)
        for taken in itertools.product(*menus)
        if sum(option.size for option in taken) <= budget
    ]
    if not fitting:
        with pytest.raises(PlanError, match="out of reach"):
            choose(menus, budget)
        return
    chosen = [menu[index] for menu, index in zip(menus, choose(menus, budget), strict=True)]
    assert sum(option.size for option in chosen) <= budget
    assert sum(option.damage for option in chosen) == pytest.approx(min(fitting), abs=1e-9)


@given(
    st.lists(st.lists(OPTIONS, min_size=1, max_size=3), min_size=2, max_size=4),
    st.lists(OPTIONS, min_size=1, max_size=3),
    st.lists(OPTIONS, min_size=1, max_size=3),
    st.integers(0, 200),
)
def test_a_menu_in_place_of_two_others_is_chosen_where_it_is_better(menus, of_first_two, of_last_two, budget):
    count = len(menus)
    covers = [*((place,) for place in range(count)), (0, 1), (count - 2, count - 1)]
    everything = [*menus, of_first_two, of_last_two]
    fitting = []
    for pattern in itertools.product([False, True], repeat=2):
        used = [number for number in (count, count + 1) if pattern[number - count]]
        taken_places = [place for number in used for place in covers[number]]
        if len(taken_places) > len(set(taken_places)):
            continue
        used += [place for place in range(count) if place not in taken_places]
        fitting += [
            sum(option.damage for option in taken)
            for taken in itertools.product(*(everything[number] for number in used))
            if sum(option.size for option in taken) <= budget
        ]
    if sum(min(option.size for option in menu) for menu in menus) > budget:
        with pytest.raises(PlanError, match="out of reach"):
            choose(everything, budget, covers)
        return
    indices = choose(everything, budget, covers)
    seen = [place for number, index in enumerate(indices) if index is not None for place in covers[number]]
    assert sorted(seen) == list(range(count))
    chosen = [menu[index] for menu, index in zip(everything, indices, strict=True) if index is not None]
    assert sum(option.size for option in chosen) <= budget
    assert sum(option.damage for option in chosen) == pytest.approx(min(fitting), abs=1e-9)


def test_thousands_of_options_are_solved_to_within_a_ten_thousandth():
    """Of the relaxation, which takes parts of options and so does no more damage than any choice."""
    generator = torch.Generator().manual_seed(0)
    menus = []
    for _ in range(90):
        sizes = torch.randint(100, 100_000, (50,), generator=generator).tolist()
        scale = float(torch.rand(1, generator=generator)) + 0.01
        menus.append([Option(0, 100.0), *(Option(size, scale / size) for size in sizes)])
    every = [option for menu in menus for option in menu]
    relaxed = scipy.optimize.linprog(
        [option.damage for option in every],
        A_ub=[[option.size for option in every]],
        b_ub=[2_000_000],
        A_eq=block_diag(*(torch.ones(1, len(menu)).numpy() for menu in menus)),
        b_eq=[1] * len(menus),
    )
    chosen = [menu[index] for menu, index in zip(menus, choose(menus, 2_000_000), strict=True)]
    assert sum(option.size for option in chosen) <= 2_000_000
    assert sum(option.damage for option in chosen) <= 1.0001 * relaxed.fun


@pytest.mark.parametrize(("size", "more"), [(10**9, 100), (10**7, 3), (10**9, 1)])
def test_a_budget_of_the_least_is_met_whatever_the_solver_rounds(size, more):
    menus = [[Option(size + more, 0.0), Option(size, 1.0)], [Option(5, 0.0), Option(5, 1.0)]]
    assert choose(menus, size + 5) == (1, 0)
    assert choose([*menus, [Option(2 * size, 0.5)]], size + 5, [("a",), ("b",), ("a", "b")]) == (1, 0, None)


def test_what_the_solver_prints_reaches_nobody(monkeypatch, capfd):
    solve = scipy.optimize.milp

    def printing(*args, **options):
        ctypes.CDLL(None).puts(b"of no interest")
        return solve(*args, **options)

    monkeypatch.setattr(scipy.optimize, "milp", printing)
    sys.stdout.write("before\n")
    assert choose([[Option(1, 1.0), Option(2, 0.5)]], 2) == (1,)
    sys.stdout.write("after\n")
    ctypes.CDLL(None).fflush(None)
    assert capfd.readouterr().out == "before\nafter\n"


def measured(damages, structures=("narrow",)):
    points = [Point(Form(name, (size,), 100 * size), 10.0 / size) for name in structures for size in (2, 4, 6, 8)]
    return Measured(None, points, damages)


def test_damage_is_carried_over_by_the_loss():
    known = measured({("narrow", (4,)): (0.1, 0.0), ("narrow", (8,)): (0.025, 0.0)})
    by_size = {form.sizes[0]: damage for form, damage in ((point.form, known.predict(point)) for point in known.points)}
    assert by_size[4] == 0.1
    assert by_size[8] == 0.025
    assert by_size[2] == pytest.approx(0.4)  # damage goes with the square of the loss, beyond the sizes measured too
    assert by_size[6] == pytest.approx(0.1 * (4 / 6) ** 2)
    one = measured({("joint", (4,)): (0.1, 0.0)}, ("joint", "single"))
    damages = {point.form: one.predict(point) for point in one.points}
    assert damages[Form("joint", (8,), 800)] == pytest.approx(0.05)
    assert damages[Form("single", (8,), 800)] == pytest.approx(0.05)  # its loss is in the same unit


def test_noise_makes_no_damage_negative_and_no_slope_steep():
    known = measured({("narrow", (4,)): (0.0, 0.0), ("narrow", (8,)): (1.0, 0.0)})
    assert all(0 < known.predict(point) < math.inf for point in known.points)


@pytest.fixture(scope="module")
def workshop(zoo, tmp_path_factory):
    checkpoint = open_folder(zoo("llama"))
    match = match_checkpoint(checkpoint)
    moments = make_moments(random_calibration(checkpoint, match, 256), tmp_path_factory.mktemp("moments"))
    return Workshop(checkpoint, moments, CPU), make_pieces(match, Recipe(keep=0.5))


def test_what_was_measured_with_other_damping_or_on_another_text_is_not_known(workshop, tmp_path, monkeypatch):
    workshop, (piece, *_) = workshop
    windows = torch.arange(6).view(2, 3)
    Ledger.of(tmp_path, workshop.moments, windows).save(Measured(piece, [], {("narrow", (16,)): (0.25, 0.5)}))
    assert Ledger.of(tmp_path, workshop.moments, windows).load(piece).damages == {("narrow", (16,)): (0.25, 0.5)}
    assert Ledger.of(tmp_path, workshop.moments, windows + 1).load(piece) is None
    monkeypatch.setattr(ledger_module, "DAMPING", 0.5)
    assert Ledger.of(tmp_path, workshop.moments, windows).load(piece) is None


def test_torn_files_of_what_was_measured_are_made_anew(workshop, tmp_path):
    workshop, pieces = workshop
    piece = next(piece for piece in pieces if piece.cut)
    ledger = Ledger.of(tmp_path, workshop.moments, torch.arange(6).view(2, 3))
    ledger.save(Measured(piece, [], {("narrow", (16,)): (0.25, 0.5)}))
    order = ledger.elimination(piece, workshop)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-9])
    assert ledger.load(piece) is None
    again = ledger.elimination(piece, workshop)
    assert torch.equal(again.order, order.order)
    assert torch.equal(again.costs, order.costs)


def output_error(workshop, part, changed):
    """E‖(W − Ŵ) x‖² of one matrix's outputs, by the moments."""
    checkpoint, moment = workshop.checkpoint, workshop.moments.input(part).matrix.double()
    before, after = (part.view.apply(t).double() for t in (checkpoint.read(part.tensor), changed[part.tensor]))
    miss = before - after if part.role not in ("o", "down") else (before - after).T
    return float(torch.einsum("ij,jk,ik->", miss, moment, miss))


def test_every_curve_says_what_its_forms_really_lose(workshop):
    workshop, pieces = workshop
    seen = set()
    for piece in pieces[:3]:
        elimination = workshop.elimination(piece) if piece.cut else None
        for structure in piece.structures:
            points = workshop.curve(piece, structure, elimination)
            sizes = [point.form.parameters for point in points]
            assert sizes == sorted(sizes)
            assert sizes[-1] < piece.parameters
            losses = [point.loss for point in points]
            assert losses == sorted(losses, reverse=True)
            for point in (points[0], points[len(points) // 2]):
                changed = workshop.tensors(piece, point.form, elimination)
                parts = [part for part in piece.slices if part.tensor in changed]
                real = sum(output_error(workshop, part, changed) for part in parts)
                assert point.loss == pytest.approx(real, rel=0.05, abs=1e-6), (piece.name, structure, point.form)
            seen.add(structure)
    assert seen == {"narrow", "joint", "single"}


def test_a_trial_is_offered_at_sizes_whose_loss_falls_and_multiplies_out_to_what_it_says(workshop):
    workshop, pieces = workshop
    fc = next(piece for piece in pieces if piece.cut)
    for structure in fc.trials:
        points = workshop.curve(fc, structure, None)
        sizes, losses = [point.form.parameters for point in points], [point.loss for point in points]
        assert sizes == sorted(set(sizes))
        assert losses == sorted(losses, reverse=True)
        assert 0.1 * fc.parameters <= sizes[0] < SMALLEST * fc.parameters * 1.5
        assert 0.8 * fc.parameters < sizes[-1] < fc.parameters
        for share in TRIAL_SHARES[structure]:
            form = fc.of_share(structure, share)
            (point,) = [point for point in points if point.form == form]
            assert share - 0.06 <= form.parameters / fc.parameters <= share
            changed = workshop.tensors(fc, form, None)
            assert set(changed) == {part.tensor for part in fc.slices}
            weights = stack_weights(workshop.moments, fc.stacks(structure)[0])
            missed = whole = 0.0
            for s, part in enumerate(fc.slices):
                before, after = (
                    part.view.apply(t).double() for t in (workshop.checkpoint.read(part.tensor), changed[part.tensor])
                )
                sides = [side[s].double() if side[s] is not None else None for side in (weights.inner, weights.hidden)]
                missed += weighed(before - after, *sides)
                whole += weighed(before, *sides)
            assert point.loss == pytest.approx(missed / whole, rel=0.05)
    assert set(fc.trials) == {"tucker", "cp"}


def test_a_trial_is_decomposed_once_for_its_loss_and_its_damage(workshop, monkeypatch):
    workshop, pieces = workshop
    fc = next(piece for piece in pieces if piece.cut)
    made, methods = [], Piece.methods

    def counted(self, form):
        if form.structure in TRIAL_SHARES and form.parameters:
            made.append(form)
        return methods(self, form)

    monkeypatch.setattr(Piece, "methods", counted)
    joint, *_ = workshop.curve(fc, "joint", None)
    points = [point for structure in fc.trials for point in workshop.curve(fc, structure, None)]
    trials = [point.form for point in Measured(fc, points).references()]
    for form in (joint.form, *trials):  # in the order in which damages are asked for
        workshop.tensors(fc, form, None)
    assert len(trials) == 4
    assert sorted(made, key=str) == sorted(trials, key=str)


def weighed(matrix, inner, hidden):
    left = matrix if inner is None else inner @ matrix
    right = matrix if hidden is None else matrix @ hidden
    return float((left * right).sum())


def test_two_layers_share_the_right_factor_of_what_reads_one_kind_of_input(workshop):
    workshop, pieces = workshop
    pairs = {pair.name: pair for pair in make_pairs(pieces)}
    assert set(pairs) == {"fc.0+1", "qkv.0+1"}  # the third layer has no partner, and o reads an inner side
    pair = pairs["qkv.0+1"]
    assert pair.layers == (0, 1)
    assert pair.covers == ("qkv.0", "qkv.1")
    (stack,) = pair.stacks("shared")
    assert stack.joined
    points = workshop.curve(pair, "shared", None)
    form = points[len(points) // 2].form
    changed = workshop.tensors(pair, form, None)
    parts = {part.role + str(part.layer): part.view.apply(changed[part.tensor]).double() for part in pair.slices}
    assert torch.linalg.matrix_rank(torch.cat(list(parts.values())), rtol=1e-5) == form.sizes[0]
    (recipe,) = pair.recipes(form)
    assert recipe == {
        "method": "svd",
        "rank": form.sizes[0],
        "layers": "0,1",
        "roles": "q,k,v",
        "group_layers": 2,
        "share": "input",
    }


@pytest.mark.parametrize(("damage", "close"), [(0.05, {"tucker"}), (0.5, set())])
def test_a_trial_is_measured_everywhere_only_if_it_came_close(damage, close, workshop):
    workshop, pieces = workshop
    fc = next(piece for piece in pieces if piece.cut)
    forms = {structure: fc.of_share(structure, 0.6) for structure in ("tucker", "cp")}
    narrow = fc.narrow(fc.widths()[-1] // 2)
    assert narrow.parameters <= forms["tucker"].parameters
    points = [Point(narrow, 1.0), *(Point(form, 0.1) for form in forms.values())]
    damages = {("narrow", narrow.sizes): (0.1, 0.0), ("tucker", forms["tucker"].sizes): (damage, 0.0)}
    damages["cp", forms["cp"].sizes] = (9.0, 0.0)
    tried = Measured(fc, points, damages)
    assert close_ones(tried, {fc.name: tried}, keep=0.8) == close
    assert close_ones(tried, {fc.name: tried}, keep=1.3) == set()  # it is smaller than half of that


def test_trials_are_made_in_a_few_blocks_that_are_spread():
    def piece(layer, *members):
        return Piece("x", (SimpleNamespace(layer=layer),), members=members)

    assert probe_blocks([piece(layer) for layer in range(30)]) == [7, 22]
    assert probe_blocks([piece(0), piece(1), piece(2), piece(0, "a", "b")]) == [0]


def test_pieces_hold_every_matrix_once(workshop):
    workshop, pieces = workshop
    tensors = [part.tensor for piece in pieces for part in piece.slices]
    assert len(tensors) == len(set(tensors)) == 3 * 7
    assert sum(piece.parameters for piece in pieces) == sum(
        workshop.checkpoint.tensors[tensor].parameters for tensor in tensors
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"keep": 0.5, "method": "cp"}, "a budget chooses a method"),
        ({"keep": 0.5, "rank": 4}, "a budget chooses every rank"),
        ({"keep": 0.5, "size": 100}, "one of keep, size and parts"),
        ({"keep": 0.5, "write": "dense"}, "pass --write factored, or --plain"),
        ({"keep": 0.5, "plain": True, "write": "factored"}, "plain is for a budget's ordinary checkpoint"),
        ({"keep": 0.5, "anchored": True}, "anchored"),
        ({"method": "mixed"}, "one of keep, size and parts"),
        ({"plain": True, "rank": 4}, "plain goes with a budget"),
        ({"parts": ({"rank": 4},), "rank": 4}, "parts goes with a budget"),
    ],
)
def test_contradictions_are_refused_in_one_line(values, message):
    with pytest.raises(PlanError, match=message):
        Recipe(**values)


def test_a_matrix_beyond_its_break_even_stays_dense(workshop):
    workshop, pieces = workshop
    (piece,) = [piece for piece in pieces if piece.name == "qkv.1"]
    shapes = {part.role: part.shape for part in piece.slices}
    assert shapes["q"] != shapes["v"]  # grouped-query attention
    forms = [point.form for point in workshop.curve(piece, "single", None)]
    mixed = [form for form in forms if 0 in form.sizes]
    assert mixed
    for form in forms:
        for stack, rank in zip(piece.stacks("single"), form.sizes, strict=True):
            assert rank == 0 or SVD(rank).parameters(stack.shape) < stack.parameters
        assert len(piece.recipes(form)) == sum(rank > 0 for rank in form.sizes)
