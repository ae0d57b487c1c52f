"""FactoredLinear against the multiplied-out matrix: orientation, cores, fused parts, sharing, copies, gradients."""

import copy
import gc
import pickle
import threading
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from trawl.descriptor import DescribedSlice, DescribedStack, Descriptor
from trawl.errors import LoadError, ShapeError
from trawl.factors import Factors
from trawl.hf.factor_stack import FactorStack
from trawl.hf.linear import FEW_ROWS, NEVER, FactoredLinear, cheapest_order, make_part, with_neighbours
from trawl.hf.replacement import check_loaded, install, multiply_out, stacks_of
from trawl.interpolation import interpolated_sides, restored
from trawl.views import View

INNER, HIDDEN = 12, 8
THREE = (("part", 3), ("dim", 2))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def thirds(stored, canonical, sizes=THREE):
    return [View(stored, canonical, sizes, (("part", i, i + 1),)) for i in range(3)]


# name: (views of the slices in one tensor, its shape, the axis that is the output)
LAYOUTS = {
    "linear in": ([View("inner hidden")], (INNER, HIDDEN), 0),
    "linear out": ([View("hidden inner", "inner hidden")], (HIDDEN, INNER), 0),
    "conv1d in": ([View("hidden inner", "inner hidden")], (HIDDEN, INNER), 1),
    "conv1d out": ([View("inner hidden")], (INNER, HIDDEN), 1),
    "halves": (
        [View("(part inner) hidden", "", (("part", 2),), (("part", i, i + 1),)) for i in (0, 1)],
        (2 * INNER, HIDDEN),
        0,
    ),
    "conv1d thirds": (thirds("hidden (part inner)", "(part inner) hidden", (("part", 3),)), (HIDDEN, 3 * INNER), 1),
    "interleaved": (thirds("(heads part dim) hidden", ""), (3 * INNER, HIDDEN), 0),
    "permuted": ([View("(heads dim) hidden", "(dim heads) hidden", (("dim", 2),))], (INNER, HIDDEN), 0),
    "permuted thirds": (thirds("(heads part dim) hidden", "(part dim heads) hidden"), (3 * INNER, HIDDEN), 0),
    "fused outputs": (thirds("(heads part dim) inner", "inner (part heads dim)"), (3 * HIDDEN, INNER), 0),
}
RANKS = {"diagonal": (4, 4), "full": (5, 3), "diagonal interpolated": (6, 6), "full interpolated": (7, 6)}


def described(views, shape, kind, *, mixed=False):
    slices = tuple(DescribedSlice("h.0.w.weight", shape, view) for view in views)
    size, rank, core = (len(views), INNER, HIDDEN), (2 if mixed else len(views), *RANKS[kind]), kind.split()[0]
    sides = interpolated_sides(size, rank, full=core == "full")
    return DescribedStack("fc.0", size, rank, core, mixed, "F32", "h.0.trawl.fc_0", slices, interpolated=sides)


def filled(description, seed=0):
    stack = FactorStack(description, torch.float32, torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.normal_(generator=generator)
        for order in stack.buffers():
            order.copy_(torch.randperm(len(order), generator=generator))
    return stack


def factors_of(stack):
    names = stack.description.factor_shapes
    return Factors(**restored({name: getattr(stack, name).detach() for name in names}))


def make(layout, core="full", *, mixed=False, bias=True, together=True):
    """Return a module, and the dense matrix (in, out) that it stands for."""
    views, shape, out_axis = LAYOUTS[layout]
    stack = filled(described(views, shape, core, mixed=mixed))
    parts = [make_part(stack, index, out_axis) for index in range(len(views))]
    parts = with_neighbours(parts) if together else parts
    module = FactoredLinear(parts, out_axis, nn.Parameter(torch.randn(shape[out_axis])) if bias else None)
    factors = factors_of(stack)
    dense = torch.full(shape, float("nan"))
    with torch.no_grad():
        for index, view in enumerate(views):
            view.scatter(factors.slice(index), dense)
    return module, dense.T if out_axis == 0 else dense


CASES = [
    pytest.param(layout, core, mixed, id=f"{layout}-{core}{'-mixed' * mixed}")
    for layout, (views, _, _) in LAYOUTS.items()
    for core in RANKS
    for mixed in (False, True)[: len(views)]
    if len(views) == 1 or core != "diagonal interpolated"  # of several diagonals no factor is
]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("layout", "core", "mixed"), CASES)
def test_forward_is_the_product_with_the_dense_matrix(layout, core, mixed, grad):
    module, dense = make(layout, core, mixed=mixed)
    assert (module.in_features, module.out_features) == tuple(dense.shape)
    for batch in ((), (1, 1), (2, 7), (2, FEW_ROWS), (4000,), (0,)):  # from none to enough rows to fold the core
        x = torch.randn(*batch, dense.shape[0])
        with torch.set_grad_enabled(grad):
            found = module(x)
        torch.testing.assert_close(found, x @ dense + module.bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("layout", "core", "mixed"), CASES)
def test_weight_is_the_stored_matrix(layout, core, mixed):
    module, dense = make(layout, core, mixed=mixed)
    _, shape, out_axis = LAYOUTS[layout]
    assert module.weight.shape == shape
    assert not module.weight.requires_grad
    torch.testing.assert_close(module.weight, dense.T if out_axis == 0 else dense)
    assert module.to(torch.bfloat16).weight.dtype == torch.float32  # the factors' own module was not cast
    module.parts[0].stack.to(torch.bfloat16)
    assert module.weight.dtype == torch.bfloat16


def test_weight_is_rounded_once():
    module, _ = make("linear in")
    module.parts[0].stack.to(torch.bfloat16)
    stack = module.parts[0].stack
    exact = stack.left.double() @ stack.core[0].double() @ stack.right.double().T
    torch.testing.assert_close(module.weight, exact.to(torch.bfloat16), rtol=0, atol=0)


def test_weight_cannot_be_set():
    module, _ = make("linear in")
    with pytest.raises(AttributeError, match="computed from its factors"):
        module.weight = nn.Parameter(torch.zeros(INNER, HIDDEN))


def test_state_dict_keeps_the_name_and_no_factor():
    module, _ = make("linear in")
    assert {name: tuple(value.shape) for name, value in module.state_dict().items()} == {
        "weight": (0,),
        "bias": (INNER,),
    }


def test_gradients_are_those_of_the_dense_product():
    module, _ = make("permuted thirds", mixed=True, bias=False)
    stack, x = module.parts[0].stack, torch.randn(5, HIDDEN)
    found = torch.autograd.grad(module(x).square().sum(), list(stack.parameters()))
    factors = Factors(stack.left, stack.right, stack.core, stack.stack)
    parts = torch.stack([x @ factors.slice(i).T for i in range(3)])  # (part, rows, part dim heads)
    expected = torch.autograd.grad(parts.square().sum(), list(stack.parameters()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


class Products(TorchDispatchMode):
    """Collects the shapes of all matrix products."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            self.shapes.append(tuple(result.shape))
        return result


def two_linears(*, together):
    """Return gate and up of one stack, which know each other as neighbours or only share their first product."""
    slices = tuple(
        DescribedSlice(f"h.0.{name}.weight", (INNER, HIDDEN), View("inner hidden")) for name in ("gate", "up")
    )
    stack = filled(
        DescribedStack("fc.0", (2, INNER, HIDDEN), (2, 5, 3), "full", False, "F32", "h.0.trawl.fc_0", slices)
    )
    parts = with_neighbours([make_part(stack, index, 0) for index in (0, 1)])
    if not together:
        parts = [replace(part, neighbours=None) for part in parts]
    return stack, *(FactoredLinear([part], 0, nn.Parameter(torch.randn(INNER))) for part in parts)


def dense(module, x):
    return x @ module.weight.T + module.bias


either = pytest.mark.parametrize("together", [False, True])


@pytest.mark.parametrize(
    ("together", "rows", "widths"),
    [
        (False, 4, [3, 5, INNER, 5, INNER]),
        (True, 4, [3, 10, INNER]),
        (True, FEW_ROWS, [3, 10, INNER]),
        (True, FEW_ROWS + 1, [3, 3, INNER, 3, INNER]),
    ],
)
def test_slices_with_the_same_input_share_products(together, rows, widths):
    _, gate, up = two_linears(together=together)
    x = torch.randn(1, rows, HIDDEN)
    with torch.no_grad(), Products() as products:
        first, second = gate(x), up(x)
    assert [shape[-1] for shape in products.shapes] == widths
    torch.testing.assert_close(first, dense(gate, x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(second, dense(up, x), rtol=1e-4, atol=1e-4)
    with torch.no_grad(), Products() as other:
        gate(x), up(x.clone())
    assert len(other.shapes) > len(products.shapes)


WIDTHS = (12, 4, 6)


def joined_linears(rank=5):
    """Return q, k and v of unequal widths, whose right factor is one; of rank 6 it is in interpolative form."""
    slices = tuple(
        DescribedSlice(f"h.0.{name}.weight", (width, HIDDEN), View("inner hidden"))
        for name, width in zip("qkv", WIDTHS, strict=True)
    )
    shape = 1, sum(WIDTHS), HIDDEN
    ranks = 1, rank, rank
    sides = interpolated_sides(shape, ranks, full=False)
    description = DescribedStack(
        "qkv.0", shape, ranks, "diagonal", False, "F32", "h.0.trawl.qkv_0", slices, joined=True, interpolated=sides
    )
    stack = filled(description)
    parts = with_neighbours([make_part(stack, index, 0) for index in range(3)])
    return stack, *(FactoredLinear([part], 0, nn.Parameter(torch.randn(part.placement.sizes[0]))) for part in parts)


@pytest.mark.parametrize("rank", [5, 6])
@pytest.mark.parametrize("grad", [False, True])
def test_joined_slices_are_rows_of_one_product(grad, rank):
    stack, *modules = joined_linears(rank)
    assert (stack.right_order is None) == (rank == 5)
    whole = factors_of(stack).slice(0).split(WIDTHS)
    for module, matrix in zip(modules, whole, strict=True):
        torch.testing.assert_close(module.weight, matrix)
        for batch in ((), (2, 7), (2, FEW_ROWS), (0,)):
            x = torch.randn(*batch, HIDDEN)
            with torch.set_grad_enabled(grad):
                torch.testing.assert_close(module(x), x @ matrix.T + module.bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rows", "widths"), [(FEW_ROWS, [5, 22]), (FEW_ROWS + 1, [5, 12, 4, 6])])
def test_joined_slices_share_one_product_with_right(rows, widths):
    _, *modules = joined_linears()
    x = torch.randn(rows, HIDDEN)
    with torch.no_grad(), Products() as products:
        found = [module(x) for module in modules]
    assert [shape[-1] for shape in products.shapes] == widths
    for module, output in zip(modules, found, strict=True):
        torch.testing.assert_close(output, dense(module, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [5, 6])
def test_torch_compile_traces_joined_slices_whole(rank):
    _, *modules = joined_linears(rank)
    x = torch.randn(3, HIDDEN)
    compiled = torch.compile(lambda x: [module(x) for module in modules], backend="eager", fullgraph=True)
    for one, module in zip(compiled(x), modules, strict=True):
        torch.testing.assert_close(one, dense(module, x), rtol=1e-4, atol=1e-4)
    torch.compiler.reset()


def test_a_joined_slice_that_reads_the_inner_axis_is_refused():
    slices = tuple(
        DescribedSlice(f"h.0.{i}.weight", (HIDDEN, 6), View("hidden inner", "inner hidden")) for i in range(2)
    )
    shape = 1, 12, HIDDEN
    stack = filled(DescribedStack("o.0", shape, (1, 5, 5), "diagonal", False, "F32", "h.0.trawl.o_0", slices, True))
    with pytest.raises(ShapeError, match=r"stack o\.0 joins slices that read the residual stream"):
        make_part(stack, 0, 0)


def test_neighbours_are_consecutive_slices_that_read_the_residual_stream():
    views = [View("inner hidden")] * 3 + [View("hidden inner", "inner hidden")]
    slices = tuple(
        DescribedSlice(f"h.0.w{i}.weight", (HIDDEN, INNER) if i == 3 else (INNER, HIDDEN), view)
        for i, view in enumerate(views)
    )
    stack = filled(
        DescribedStack("fc.0", (4, INNER, HIDDEN), (4, 5, 3), "full", False, "F32", "h.0.trawl.fc_0", slices)
    )
    parts = [make_part(stack, index, 0) for index in range(4)]
    found = with_neighbours(parts)
    assert [part.index for part in found] == [0, 1, 2, 3]
    assert found[0].neighbours is found[1].neighbours is found[2].neighbours
    assert (found[0].neighbours.first, found[0].neighbours.stop) == (0, 3)
    assert found[3].neighbours is None
    assert [part.neighbours for part in with_neighbours([parts[0], parts[2]])] == [None, None]
    assert [part.neighbours for part in with_neighbours([parts[0]])] == [None]


@pytest.mark.parametrize(("layout", "rank"), [("interleaved", 3), ("fused outputs", 5)])
def test_fused_parts_share_the_first_product(layout, rank):
    module, _ = make(layout)
    with torch.no_grad(), Products() as products:
        module(torch.randn(4, module.in_features))
    assert [shape[-1] for shape in products.shapes].count(rank) == 1


@either
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_changed_input_or_factor_is_never_served_an_old_product(context, together):
    stack, gate, up = two_linears(together=together)
    with context():
        x = torch.randn(4, HIDDEN)
        gate(x)
        x.mul_(2)
        torch.testing.assert_close(up(x), dense(up, x), rtol=1e-4, atol=1e-4)
        gate(x), up(x)
        stack.right.data.mul_(3)  # seen by no version counter
        for module in (up, gate, up):
            torch.testing.assert_close(module(x), dense(module, x), rtol=1e-4, atol=1e-4)


@either
def test_the_shared_product_goes_with_its_input(together):
    stack, gate, _ = two_linears(together=together)
    shared = gate.parts[0].neighbours.shared if together else stack.of_hidden
    x = torch.randn(4, HIDDEN)
    with torch.no_grad():
        gate(x)
    product = weakref.ref(shared._last[2][0] if together else shared._last[2])
    reference = weakref.ref(x)
    del x
    gc.collect()
    assert reference() is None
    assert product() is None
    assert shared._last is None


@either
def test_recording_gradients_leaves_no_graph_behind(together):
    stack, gate, up = two_linears(together=together)
    x = torch.randn(4, HIDDEN)
    for _ in range(2):  # the same input again, after the graph of the first pass is freed
        (gate(x) + up(x)).sum().backward()
    assert stack.of_hidden._last is None
    assert not together or gate.parts[0].neighbours.shared._last is None


@either
def test_threads_do_not_mix_their_products(together):
    _, gate, up = two_linears(together=together)
    wrong = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _ in range(300):
                x = torch.randn(2, HIDDEN, generator=generator)
                wrong.extend(seed for each in (gate, up) if not torch.allclose(each(x), dense(each, x), atol=1e-3))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_interpolated_factors_are_multiplied_by_less_than_whole_ones():
    """Of left (12, 7) and right (8, 6) 5 and 2 rows are read; identity rows are in no product."""
    module, dense_matrix = make("linear in", "full interpolated")
    x = torch.randn(3, HIDDEN)
    with torch.no_grad(), Products() as products:
        found = module(x)
    assert module.parts[0].stack.right.shape == (2, 6)
    assert products.shapes == [(3, 6), (3, 7), (3, 5)]
    torch.testing.assert_close(found, x @ dense_matrix + module.bias, rtol=1e-4, atol=1e-4)


def test_a_row_order_that_was_not_loaded_or_is_none_is_refused():
    model = nn.Module()
    model.stack = filled(described(LAYOUTS["linear in"][0], (INNER, HIDDEN), "full interpolated"))
    for tensor in (*model.stack.parameters(), *model.stack.buffers()):
        tensor.loaded = True
    check_loaded(model, "loaded")
    model.stack.left_order[0] = model.stack.left_order[1]
    with pytest.raises(LoadError, match=r"stack\.left_order of stack fc\.0 is no order of 12 rows"):
        check_loaded(model, "loaded")
    del model.stack.left_order.loaded
    with pytest.raises(LoadError, match=r"factor stack\.left_order of stack fc\.0 was not loaded"):
        check_loaded(model, "loaded")


@pytest.mark.parametrize("core", ["full", "full interpolated"])
def test_copies_and_pickles_have_factors_and_no_products(core):
    module, _ = make("interleaved", core)
    x = torch.randn(3, HIDDEN)
    with torch.no_grad():
        expected = module(x)
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert other.parts[0].stack.of_hidden._last is None
            assert other.parts[0].stack is other.parts[2].stack is not module.parts[0].stack
            assert other.parts[0].neighbours is other.parts[2].neighbours
            assert other.parts[0].neighbours.stack is other.parts[0].stack
            assert other.parts[0].neighbours.shared._last is None
            for parameter in other.parts[0].stack.parameters():
                parameter.zero_()
            torch.testing.assert_close(other(x), module.bias.expand(3, -1))
        torch.testing.assert_close(module(x), expected)


def operations(rows, sizes, sharers, order):
    """Count the multiplications of all slices that share an input, in one order."""
    width_in, first, last, width_out = sizes
    return {
        "chain": rows * (width_in * first + sharers * (first * last + last * width_out)),
        "last": sharers * first * last * width_out + rows * (width_in * first + sharers * first * width_out),
        "first": sharers * (width_in * first * last + rows * (width_in * last + last * width_out)),
    }[order]


@pytest.mark.parametrize("sharers", [1, 2, 3])
@pytest.mark.parametrize("sizes", [(576, 100, 300, 1536), (1536, 300, 100, 576), (576, 300, 300, 1536), (64, 8, 8, 64)])
def test_the_order_of_products_is_the_cheapest(sizes, sharers):
    rows, fold_last = cheapest_order(*sizes, sharers=sharers)
    order = "last" if fold_last else "first"
    if rows == NEVER:
        width_in, first, last, width_out = sizes  # a folded factor is at most half of the dense matrix
        allowed = {"chain": True, "last": 2 * first <= width_in, "first": 2 * last <= width_out}
        counts = {each: operations(10**9, sizes, sharers, each) for each, small in allowed.items() if small}
        assert min(counts, key=counts.__getitem__) == "chain"
        return
    assert operations(rows, sizes, sharers, order) <= operations(rows, sizes, sharers, "chain")
    assert operations(rows - sharers, sizes, sharers, order) >= operations(rows - sharers, sizes, sharers, "chain")


def test_a_shared_first_product_is_kept_where_folding_the_core_into_its_factor_would_lose_it():
    """One slice folds from 576 rows; gate and up, which share most of what folding saves, from 2058."""
    assert cheapest_order(576, 400, 400, 1536, sharers=1) == (576, False)
    assert cheapest_order(576, 400, 400, 1536, sharers=2) == (2058, False)
    slices = tuple(DescribedSlice(f"h.0.{name}.weight", (1536, 576), View("inner hidden")) for name in ("gate", "up"))
    described = DescribedStack("fc.0", (2, 1536, 576), (2, 400, 400), "full", False, "F32", "h.0.trawl.fc_0", slices)
    stack = FactorStack(described, torch.float32, torch.device("meta"))
    gate_and_up = with_neighbours([make_part(stack, index, 0) for index in (0, 1)])
    assert [(part.sharers, part.fold_from, part.fold_last) for part in gate_and_up] == [(2, 2058, False)] * 2


def test_full_rank_never_folds_into_a_dense_matrix():
    assert cheapest_order(8, 8, 12, 12, sharers=1) == (NEVER, False)


@pytest.mark.parametrize("layout", ["linear in", "linear out", "interleaved"])
def test_forward_never_forms_the_dense_matrix(layout):
    module, dense = make(layout)
    for rows in (1, 5, 4000):
        with torch.no_grad(), Products() as products:
            module(torch.randn(rows, module.in_features))
        assert products.shapes
        assert not [shape for shape in products.shapes if sorted(shape) in (sorted(dense.shape), [HIDDEN, INNER])]


def test_unequal_ranks_fold_in_long_inputs():
    views, shape, axis = LAYOUTS["linear in"]
    part = make_part(filled(described(views, shape, "full")), 0, axis)
    assert part.fold_from < 4000  # so that the large batch of the first test takes that path
    views, shape, axis = LAYOUTS["linear out"]
    part = make_part(filled(described(views, shape, "full")), 0, axis)
    assert part.fold_from < 4000


@pytest.mark.parametrize(
    ("view", "shape", "axis"),
    [
        (View("inner (a b)", "inner (b a)", (("a", 2),)), (INNER, HIDDEN), 0),
        (View("hidden (a inner)", "(a inner) hidden", (("a", 2),), (("a", 0, 1),)), (HIDDEN, 2 * INNER), 0),
    ],
)
def test_views_that_change_the_input_are_refused(view, shape, axis):
    with pytest.raises(ShapeError, match="narrows or reorders the input"):
        make_part(filled(described([view], shape, "full")), 0, axis)


class Block(nn.Module):
    def __init__(self, up):
        super().__init__()
        self.up = up
        self.down = nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, x):
        return self.down(functional.relu(self.up(x)))


def block_model(up=None):
    return nn.Sequential(nn.Identity(), Block(up or nn.Linear(HIDDEN, INNER)))


def block_descriptor(shape=(INNER, HIDDEN), up="1.up.weight", stored=None):
    views = (
        (View("inner hidden") if shape[0] == INNER else View("hidden inner", "inner hidden")),
        View("hidden inner", "inner hidden"),
    )
    slices = (DescribedSlice(up, stored or shape, views[0]), DescribedSlice("1.down.weight", (HIDDEN, INNER), views[1]))
    stack = DescribedStack("fc.1", (2, INNER, HIDDEN), (2, 5, 3), "full", False, "F32", "1.trawl.fc_1", slices)
    return Descriptor((stack,))


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_install_and_multiply_out(kind):
    model = block_model(kind(HIDDEN, INNER) if kind is nn.Linear else kind(INNER, HIDDEN))
    bias = model[1].up.bias
    (stack,) = install(model, block_descriptor((INNER, HIDDEN) if kind is nn.Linear else (HIDDEN, INNER))).values()
    assert stacks_of(model) == {"1.trawl.fc_1": stack}
    assert set(model.state_dict()) == {
        *(f"1.trawl.fc_1.{factor}" for factor in ("left", "right", "core")), "1.up.weight", "1.up.bias", "1.down.weight"
    }  # fmt: skip
    assert model[1].up.bias is bias
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.normal_()
    x = torch.randn(3, HIDDEN)
    expected = model(x)
    multiply_out(model)
    assert type(model[1].up) is kind
    assert not hasattr(model[1], "trawl")
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_install_on_the_meta_device_allocates_nothing():
    with torch.device("meta"):
        model = block_model()
    install(model, block_descriptor())
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    assert model[1].up.weight.device.type == "meta"
    with pytest.raises(LoadError, match=r"1\.trawl\.fc_1\.left of stack fc\.1 was not loaded"):
        check_loaded(model, "_is_hf_initialized")


@pytest.mark.parametrize(
    ("up", "descriptor", "message"),
    [
        (None, block_descriptor(up="1.other.weight"), "Sequential has no module 1.other"),
        (None, block_descriptor(up="1.up.bias"), "not to nn.Linear, Conv1D or nn.Embedding"),
        (nn.Bilinear(2, 2, 2), block_descriptor(), "belongs to a Bilinear"),
        (nn.Linear(HIDDEN, INNER + 1), block_descriptor(), r"shape \(12, 8\), but module 1.up .* weight of \(13, 8\)"),
    ],
)
def test_install_refuses_what_does_not_fit_and_changes_nothing(up, descriptor, message):
    model = block_model(up)
    before = dict(model.named_modules())
    with pytest.raises(LoadError, match=message):
        install(model, descriptor)
    assert dict(model.named_modules()) == before
