"""Output moments: the pass back through a model block by block, against gradients of the whole model."""

import json
import shutil
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
import transformers

from tests.unit.test_calibration import CPU, EXPERTS, calibrated, windows
from tests.zoo import HIDDEN, INNER, ZOO, build_zoo, randomize, save_model
from trawl.calibration import Moments, gradients
from trawl.calibration.gradients import gather_gradients
from trawl.calibration.outputs import OutputMoments, output_file, write_output_record
from trawl.calibration.streaming import open_chain
from trawl.calibration.weights import DAMPING, stack_weights
from trawl.checkpoint import open_folder
from trawl.decompose import CP, SVD, TensorSlices, Tucker, Weights
from trawl.decompose.weighing import measured
from trawl.errors import CheckpointError, LoadError, PlanError, ShapeError
from trawl.families import Placement
from trawl.planning import match_checkpoint
from trawl.stacking import READ_INNER, StoredSlices, make_stacks
from trawl.views import View

CAUSAL = [name for name, entry in ZOO.items() if entry.auto == "AutoModelForCausalLM"]


def gathered(folder, ids, out, kind, *, low=False):
    """Run token ids through a checkpoint and back, and open its output moments."""
    checkpoint = open_folder(folder)
    match = match_checkpoint(checkpoint)
    chain = replace(open_chain(checkpoint, match, CPU), low=low)
    blocks = gather_gradients(chain, ids, match.placements, out, kind)
    write_output_record(out, kind, {}, blocks)
    return match, OutputMoments.read(out, kind)


def losses(model, ids):
    """Return the summed next-token cross-entropy of each window."""
    logits = model(input_ids=ids).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").sum(1)


def close(found, expected):
    assert (found.double() - expected.double()).abs().max() <= 1e-4 * expected.abs().max()
    assert expected.abs().max() > 0


@pytest.mark.parametrize("name", CAUSAL)
def test_fisher_rows_are_those_of_the_whole_models_weight_gradients(zoo, tmp_path, name):
    ids = windows(3, 8)
    match, outputs = gathered(zoo(name), ids, tmp_path, "fisher")
    model = build_zoo(name)
    tensors = list(dict.fromkeys(part.tensor for part in match.placements))
    weights = [dict(model.named_parameters())[tensor] for tensor in tensors]
    squares = dict.fromkeys(match.placements, 0.0)
    for loss in losses(model, ids):
        gradients = dict(zip(tensors, torch.autograd.grad(loss, weights, retain_graph=True), strict=True))
        for part in match.placements:
            squares[part] += part.view.apply(gradients[part.tensor]).double().square() / len(ids)
    for part, found in squares.items():
        close(outputs.matrix(part), found.sum(0 if part.role in READ_INNER else 1))


@pytest.mark.parametrize("name", CAUSAL)
def test_kronecker_factors_are_moments_of_the_gradients_of_outputs(zoo, tmp_path, name):
    """Against hooks on the whole model; a slice's part of an output is cut out by the view of its weight."""
    ids = windows(2, 8)
    match, outputs = gathered(zoo(name), ids, tmp_path, "kronecker")
    model, seen = build_zoo(name), {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | transformers.Conv1D):
            hook = lambda _, __, made, path=path: seen.update({f"{path}.weight": made[0].flatten(0, -2)})  # noqa: E731
            module.register_full_backward_hook(hook)
    losses(model, ids).sum().backward()
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for part in match.placements:
        outputs_last = isinstance(model.get_submodule(part.tensor.removesuffix(".weight")), transformers.Conv1D)
        total = 0.0
        for row in seen[part.tensor].double():
            slice_ = part.view.apply((row if outputs_last else row[:, None]).expand(shapes[part.tensor]))
            delta = slice_[0] if part.role in READ_INNER else slice_[:, 0]
            total += torch.outer(delta, delta) / ids.numel()
        close(outputs.matrix(part), total)


@pytest.mark.parametrize("name", CAUSAL)
def test_blocks_that_multiply_in_bfloat16_give_nearly_the_same_gradients(zoo, tmp_path, name):
    ids = windows(2, 8)
    match, outputs = gathered(zoo(name), ids, tmp_path / "stored", "kronecker")
    _, rounded = gathered(zoo(name), ids, tmp_path / "rounded", "kronecker", low=True)
    for part in match.placements:
        difference = torch.linalg.matrix_norm(outputs.matrix(part) - rounded.matrix(part))
        assert 0 < difference <= 0.15 * torch.linalg.matrix_norm(outputs.matrix(part)), part


def test_blocks_may_return_tuples(zoo, tmp_path, monkeypatch):
    """As those of a model whose code lies beside its checkpoint may; its own code takes the first entry."""
    ids = windows(2, 8)
    match, plain = gathered(zoo("llama"), ids, tmp_path / "plain", "fisher")
    chain = open_chain(open_folder(zoo("llama")), match, CPU)
    model = chain.model.model

    def forward(input_ids=None, inputs_embeds=None):
        hidden = model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        rotary = model.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
        for layer in chain.layers:
            hidden = layer(hidden, position_embeddings=rotary)[0]
        return SimpleNamespace(logits=chain.model.lm_head(model.norm(hidden)))

    for layer in chain.layers:
        own = layer.forward
        monkeypatch.setattr(layer, "forward", lambda *args, own=own, **kwargs: (own(*args, **kwargs), None))
    monkeypatch.setattr(chain.model, "forward", forward)
    blocks = gather_gradients(chain, ids, match.placements, tmp_path, "fisher")
    write_output_record(tmp_path, "fisher", {}, blocks)
    found = OutputMoments.read(tmp_path, "fisher")
    for part in match.placements:
        close(found.matrix(part), plain.matrix(part))


def test_experts_have_their_own_rows(tmp_path):
    """Transformers merges gate and up of all experts into one weight; the checkpoint keeps them apart."""
    config = transformers.MixtralConfig(**EXPERTS)
    model = randomize(transformers.AutoModelForCausalLM.from_config(config)).eval()
    checkpoint = open_folder(save_model(model, tmp_path / "model"))
    ids = windows(2, 8)
    path = "model.layers.1.block_sparse_moe.experts.{}.{}.weight"
    view, down = View("inner hidden"), View("hidden inner", "inner hidden")
    parts = [
        Placement(1, role, path.format(expert, name), down if role == "down" else view, (INNER, HIDDEN))
        for expert in range(4)
        for role, name in (("gate", "w1"), ("down", "w2"), ("up", "w3"))
    ]
    chain = open_chain(checkpoint, match_checkpoint(checkpoint), CPU)
    write_output_record(tmp_path, "fisher", {}, gather_gradients(chain, ids, parts, tmp_path, "fisher"))
    outputs = OutputMoments.read(tmp_path, "fisher")
    experts = model.model.layers[1].mlp.experts
    weights, rows = (experts.gate_up_proj, experts.down_proj), 0.0
    for loss in losses(model, ids):
        both, last = torch.autograd.grad(loss, weights, retain_graph=True)
        rows += torch.cat([both, last.mT.new_zeros(4, HIDDEN, HIDDEN)], dim=1).square().sum(2) / len(ids)
        rows[:, 2 * INNER :] += last.square().sum(2) / len(ids)
    for expert in range(4):
        gate, end, up = (outputs.matrix(part) for part in parts[3 * expert : 3 * expert + 3])
        torch.testing.assert_close(torch.cat([gate, up, end]), rows[expert], rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def weighted(zoo, tmp_path_factory):
    """Moments of a tiny llama with both kinds of output moments."""
    folder, out = zoo("llama"), tmp_path_factory.mktemp("moments")
    torch.manual_seed(0)
    ids = windows(4)
    moments = calibrated(folder, ids, out)
    chain = open_chain(open_folder(folder), match_checkpoint(open_folder(folder)), CPU)
    parts = match_checkpoint(open_folder(folder)).placements
    for kind in ("fisher", "kronecker"):
        blocks = gather_gradients(chain, ids, parts, out, kind)
        write_output_record(out, kind, asdict(moments.identity), blocks)
    return folder, out


@pytest.mark.parametrize("kind", ["fisher", "kronecker"])
@pytest.mark.parametrize("share", ["none", "input"])
def test_methods_lower_the_error_that_gradients_weigh(weighted, kind, share):
    folder, out = weighted
    checkpoint = open_folder(folder)
    moments = Moments.open(out, checkpoint, kind)
    stacks = make_stacks(match_checkpoint(checkpoint).placements, 1, single=True, share=share)
    for stack in stacks:
        source = StoredSlices(checkpoint, stack, 2.0, CPU)
        full, inputs_only = (stack_weights(each, stack) for each in (moments, Moments.open(out, checkpoint)))
        full.check(stack.shape)
        assert None not in (*full.inner, *full.hidden)
        found, other = (SVD(rank=6).decompose(source, weights=each) for each in (full, inputs_only))
        assert found.weighted_error < measured(source, other, full).weighted_error


@pytest.mark.parametrize("method", [SVD(rank=3), CP(rank=3), Tucker(rank=3)])
@pytest.mark.parametrize("inner", [7, 12])
def test_a_diagonal_moment_may_be_its_diagonal(method, inner):
    """By either side, with a moment on the other, and with a row that does not count."""
    size = 1 if isinstance(method, SVD) else 3
    x, y = torch.randn(size, inner, 10), torch.randn(20, 10)
    rows = torch.rand(inner).mul_(torch.arange(inner) != 2)
    hidden = y.T @ y / 20
    full = Weights((torch.diag(rows),) * size, (hidden,) * size)
    thin = Weights((rows,) * size, (hidden,) * size)
    thin.check(tuple(x.shape))
    one, other = (method.decompose(TensorSlices(x), weights=each) for each in (full, thin))
    for s in range(size):
        torch.testing.assert_close(one.slice(s), other.slice(s), rtol=1e-3, atol=1e-4)
    assert other.weighted_error == pytest.approx(one.weighted_error, rel=1e-4)
    assert Weights((torch.ones(inner),), (None,)).plain
    assert not Weights((rows,), (None,)).plain
    with pytest.raises(ShapeError, match=r"is \(3,\) of .* or its diagonal"):
        Weights((rows[:3],) * size, (hidden,) * size).check(tuple(x.shape))
    with pytest.raises(ShapeError, match="diagonal of squares"):
        Weights((-rows,) * size, (hidden,) * size).check(tuple(x.shape))


def test_outputs_of_joined_slices_are_independent(weighted):
    folder, out = weighted
    moments = Moments.open(out, open_folder(folder), "kronecker")
    stack, *_ = make_stacks(match_checkpoint(open_folder(folder)).placements, 1, single=True, share="input")
    (inner,) = stack_weights(moments, stack).inner
    for part, place in zip(stack.slices, stack.places, strict=True):
        moment = moments.outputs.matrix(part)
        extra = inner[place.rows, place.rows] - moment
        assert torch.allclose(
            extra, DAMPING * moment.diagonal().mean() * torch.eye(len(moment)), rtol=1e-3, atol=1e-4 * extra.max()
        )
    assert stack.roles == ("q", "k", "v")
    assert torch.count_nonzero(inner[HIDDEN:, :HIDDEN]) == 0


def test_a_fisher_diagonal_is_not_damped(weighted):
    folder, out = weighted
    moments = Moments.open(out, open_folder(folder), "fisher")
    for stack in make_stacks(match_checkpoint(open_folder(folder)).placements, 1, single=True, share="input"):
        weights = stack_weights(moments, stack)
        rows = torch.cat([moments.outputs.matrix(part) for part in stack.slices])
        assert torch.equal(weights.hidden[0] if stack.roles[0] in READ_INNER else weights.inner[0], rows)


def test_a_folder_without_gradients_says_how_to_add_them(zoo, tmp_path):
    moments = calibrated(zoo("llama"), windows(2), tmp_path)
    with pytest.raises(PlanError, match=r"none of gradients.*add them with --calibrate .* \(text\.txt\)"):
        Moments.open(tmp_path, open_folder(zoo("llama")), "fisher")
    write_output_record(tmp_path, "fisher", {**asdict(moments.identity), "tokens_sha256": "other"}, {})
    with pytest.raises(PlanError, match="none of gradients"):
        Moments.open(tmp_path, open_folder(zoo("llama")), "fisher")


def test_damaged_output_moments_are_refused(weighted, tmp_path):
    folder, out = weighted
    copy = shutil.copytree(out, tmp_path / "copy")
    (copy / output_file("fisher", 1)).write_bytes(b"torn")
    with pytest.raises(LoadError, match=r"fisher\.json has damaged moments"):
        Moments.open(copy, open_folder(folder), "fisher")
    Moments.open(copy, open_folder(folder), "kronecker")
    record = json.loads((copy / "kronecker.json").read_bytes())
    (copy / "kronecker.json").write_text(json.dumps({**record, "blocks": {**record["blocks"], "other": 1}}))
    with pytest.raises(LoadError, match=r"kronecker-0001\.safetensors has no moment of other"):
        Moments.open(copy, open_folder(folder), "kronecker")
    (copy / "kronecker.json").write_text(json.dumps({**record, "format_version": 99}))
    with pytest.raises(LoadError, match=r"format version 99"):
        Moments.open(copy, open_folder(folder), "kronecker")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"lm_head.weight": float("nan")}, "the loss on the calibration text is nan"),
        ({"model.norm.weight": 1e30}, r"layer 2: .* by the output of .* is not finite"),
        (
            {"model.layers.1.mlp.up_proj.weight": 1e-25, "model.layers.1.mlp.down_proj.weight": 1e25},
            r"layer 1: .* by the output of model\.layers\.1\.mlp\.up_proj",
        ),
    ],
)
def test_gradients_that_are_not_finite_name_their_layer(tmp_path, weights, message):
    """Weights so large that the way forward is finite and the way back is not."""
    model = build_zoo("llama")
    for name, factor in weights.items():
        model.get_parameter(name).data.mul_(factor)
    folder = save_model(model, tmp_path / "model")
    with pytest.raises(CheckpointError, match=message):
        gathered(folder, windows(2), tmp_path / "moments", "fisher")


def test_a_model_that_predicts_no_next_token_is_refused(zoo, tmp_path):
    with pytest.raises(PlanError, match="BertForMaskedLM predicts no next token"):
        gathered(zoo("bert"), windows(2), tmp_path, "fisher")


def test_hidden_states_that_do_not_fit_on_the_disk_are_told_and_removed(zoo, tmp_path, monkeypatch):
    monkeypatch.setattr(gradients.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(PlanError, match=r"0\.0 GB are free there; lower --calibration-tokens"):
        gathered(zoo("llama"), windows(2), tmp_path, "fisher")
    assert not list(tmp_path.iterdir())
