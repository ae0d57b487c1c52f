"""Evaluation of tiny models, against references that score one text at a time with no batch and no padding."""

import importlib.util
import json
import math
import random
import re
import shutil
import sys
from dataclasses import replace

import pytest
import torch
import trawl_cli
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from tokenizers import decoders as token_decoders
from transformers import PreTrainedTokenizerFast

import trawl
from tests.zoo import VOCABULARY, ZOO, build_zoo
from trawl.errors import LoadError, PlanError
from trawl.evaluation import parse_task
from trawl.evaluation.pairs import embed
from trawl.evaluation.reading import Readings, prompt_batches, read, write
from trawl.evaluation.runner import run_task
from trawl.evaluation.scoring import Request, log_likelihoods
from trawl.evaluation.subject import Subject

WORDS = re.findall(
    r"\w+", "the sky is blue and the sea was green when it rained over hills of grass near an old stone house"
)
DECODERS = [name for name, entry in ZOO.items() if entry.auto == "AutoModelForCausalLM"]
BOS, EOS = 1, 2


def sentence(seed: int, count: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def make_tokenizer(*, bos: bool) -> PreTrainedTokenizerFast:
    """Train a byte-pair tokenizer of the zoo's vocabulary; with ``bos`` it begins every text with <s>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = token_decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator([sentence(seed, 40) + ".\n?:" for seed in range(20)], trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="module")
def plain():
    return make_tokenizer(bos=False)


@pytest.fixture(scope="module")
def with_bos():
    return make_tokenizer(bos=True)


@pytest.fixture
def files(tmp_path):
    """One small task file of each kind."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    qa = [
        {"prompt": sentence(i, 3 + i % 7), "answers": [sentence(50 + i, 1 + i % 2), "sea"][: 1 + i % 2]}
        for i in range(12)
    ]
    choice = [
        {"query": sentence(i, 2 + i % 5), "choices": [sentence(90 + i + j, 1 + j) for j in range(3)], "gold": i % 3}
        for i in range(12)
    ]
    pairs = [{"sentence1": sentence(i, 4), "sentence2": sentence(i + 1, 2 + i), "score": i % 5} for i in range(8)]
    for name, records in (("qa", qa), ("choice", choice), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    (folder / "text.txt").write_text(sentence(7, 120))
    return folder


def reference(model, context, continuation):
    """Return the summed log-probability of a continuation, fed alone."""
    ids = torch.tensor([[*context, *continuation]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0].double().log_softmax(-1)
    places = range(len(context) - 1, ids.shape[1] - 1)
    return sum(float(logits[place, ids[0, place + 1]]) for place in places)


def requests_of(count, longest=30):
    draw = random.Random(3)

    def tokens(most):
        return tuple(draw.randrange(3, VOCABULARY) for _ in range(draw.randint(1, most)))

    return [Request(tokens(longest), tokens(6)) for _ in range(count)]


@pytest.mark.parametrize("name", DECODERS)
def test_batched_log_likelihoods_are_those_of_each_text_alone(name, plain):
    model = build_zoo(name)
    requests = requests_of(13)
    requests += [Request(requests[0].context, (*requests[0].continuation[:-1], last)) for last in (5, 6)]  # shared rows
    expected = [reference(model, request.context, request.continuation) for request in requests]
    for batch_tokens in (1, 100, 4096):
        ticks = []
        found = log_likelihoods(Subject(model, plain, None, batch_tokens), requests, ticks.append)
        assert [item.total for item in found] == pytest.approx(expected, abs=1e-5, rel=1e-5)
        assert [item.tokens for item in found] == [len(request.continuation) for request in requests]
        assert sum(ticks) == sum(len(request.inputs) for request in requests)


def test_greedy_marks_a_continuation_of_which_every_token_is_the_likeliest(plain):
    model = build_zoo("llama")
    context = (5, 6, 7)
    best = greedy_tokens(model, context, 4)
    worse = (*best[:3], (best[3] + 1) % VOCABULARY)
    found = log_likelihoods(Subject(model, plain, None, 4096), [Request(context, best), Request(context, worse)], id)
    assert [item.greedy for item in found] == [True, False]


def greedy_tokens(model, prompt, count, ends=(EOS,)):
    """Return the likeliest tokens, each found by feeding all before it, until one that ends a text."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in ends:
                break
    return tuple(ids[len(prompt) :])


def read_in_batches(subject, requests, count):
    """Return the likelihood of each request, and what the model writes in its place; each prompt is fed once."""
    likelihoods, texts = {}, {}
    for numbers in prompt_batches([request.context for request in requests], subject, count):
        batch = [requests[number] for number in numbers]
        found = read(subject, [one.context for one in batch], [[one.continuation, (5,)] for one in batch])
        likelihoods |= {number: own[0] for number, own in zip(numbers, found.likelihoods, strict=True)}
        texts |= dict(zip(numbers, write(subject, found, count), strict=True))
    return [likelihoods[n] for n in range(len(requests))], [texts[n] for n in range(len(requests))]


@pytest.mark.parametrize(
    ("name", "window"), [*((name, None) for name in DECODERS), ("gemma3_text", 4), ("gemma2", 4), ("mistral", 4)]
)
def test_prompts_read_in_batches_give_what_each_gives_alone(name, window, plain):
    model = build_zoo(name)
    if window is not None:
        model.config.sliding_window = window
    requests = requests_of(7)
    totals = [reference(model, request.context, request.continuation) for request in requests]
    best = [greedy_tokens(model, request.context, 3) for request in requests]
    for batch_tokens in (50, 4096):
        likelihoods, texts = read_in_batches(Subject(model, plain, None, batch_tokens), requests, 3)
        assert [item.total for item in likelihoods] == pytest.approx(totals, abs=1e-5, rel=1e-5)
        assert texts == plain.batch_decode(best, skip_special_tokens=True)
    continued = [Request(one.context, tokens) for one, tokens in zip(requests, best, strict=True)]
    assert all(item.greedy for item in read_in_batches(Subject(model, plain, None, 4096), continued, 3)[0])


def test_what_a_model_writes_ends_with_its_end_of_sequence_token(plain):
    model, requests = build_zoo("llama"), requests_of(9)
    subject = Subject(model, plain, None, 4096)
    whole = greedy_tokens(model, requests[0].context, 6, ())
    for ends in (whole[2], [whole[4], whole[2]], None):
        model.generation_config.eos_token_id = ends
        stops = ends if isinstance(ends, list) else [ends]
        expected = [greedy_tokens(model, request.context, 6, stops) for request in requests]
        assert len(expected[0]) == (6 if ends is None else 1 + min(whole.index(end) for end in stops))
        assert read_in_batches(subject, requests, 6)[1] == plain.batch_decode(expected, skip_special_tokens=True)


def test_a_model_without_a_cache_writes_the_same(plain, monkeypatch):
    model, requests = build_zoo("llama"), requests_of(9)
    subject = Subject(model, plain, None, 4096)
    expected = read_in_batches(subject, requests, 5)
    forward = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda *a, use_cache, **kw: forward(*a, use_cache=False, **kw))
    subject = Subject(model, plain, None, 4096)
    likelihoods, texts = read_in_batches(subject, requests, 5)
    assert texts == expected[1]
    assert [item.total for item in likelihoods] == pytest.approx([item.total for item in expected[0]], rel=1e-5)


def test_prompts_read_for_losses_are_not_read_again_for_answers(plain, files):
    model, task = build_zoo("llama"), parse_task(f"qa:{files / 'qa.jsonl'}?tokens=4")
    subject, readings, widths = Subject(model, plain, None, 60), Readings(), []
    whole = run_task(subject, task)
    model.register_forward_pre_hook(lambda _, args, given: widths.append(given["input_ids"].shape[1]), with_kwargs=True)
    for room, fed_again in ((1 << 20, 0), (0, 3), (15000, 2), (1 << 20, 0)):
        with readings.kept(room):
            first = run_task(subject, replace(task, answers=False), readings=readings)
            widths.clear()
            second = run_task(subject, replace(task, losses=False), readings=readings)
        assert first.scores | second.scores == whole.scores
        assert sum(width > 1 for width in widths) == fed_again


def test_tokens_are_those_of_the_running_text_cut_where_the_prompt_ends(plain, with_bos):
    model = build_zoo("llama")
    for tokenizer, prefix in ((plain, ()), (with_bos, (BOS,))):
        subject = Subject(model, tokenizer, None, 4096)
        assert subject.prefix == prefix
        before, after = subject.encode_pair("the sky ", " blue")
        assert before == tokenizer("the sky")["input_ids"]
        assert before + after == tokenizer("the sky  blue")["input_ids"]
        assert subject.encode_pair(" ", "blue")[0] == [BOS]  # nothing before it: as lm-eval, the first token of a text
        assert subject.encode("<s>the") == [BOS, *plain("the")["input_ids"]]  # never twice


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("sizes", [(16, 5), (16, 16), (64, 32)])
def test_perplexity_is_that_of_windows_made_by_hand(bos, sizes, plain, with_bos, files):
    model, tokenizer, (context, stride) = build_zoo("llama"), with_bos if bos else plain, sizes
    text = (files / "text.txt").read_text()
    ids, total, done = plain(text)["input_ids"], 0.0, 0
    while done < len(ids):
        end = min(done + (stride if done else context), len(ids))
        led = bos or not done
        before = [BOS, *ids[max(end - context, 0) : done]] if led else ids[end - context - 1 : done]
        total += reference(model, before, ids[done:end])
        done = end
    (result,) = trawl.evaluate(model, f"ppl:{files / 'text.txt'}", tokenizer=tokenizer, context=context, stride=stride)
    assert result.settings == {"context": context, "stride": stride, "bos": bos, "tokens": len(ids), "bytes": len(text)}
    assert result.figure("loss").value == pytest.approx(-total / len(ids), rel=1e-5)
    assert result.figure("perplexity").value == pytest.approx(math.exp(-total / len(ids)), rel=1e-4)
    assert result.figure("bits_per_byte").value == pytest.approx(-total / math.log(2) / len(text), rel=1e-5)
    assert sum(result.scores["tokens"]) == len(ids)
    assert result.figure("loss").stderr > 0


def test_a_limit_of_windows_counts_the_bytes_that_were_scored(plain, files):
    model, text = build_zoo("llama"), (files / "text.txt").read_text()
    (result,) = trawl.evaluate(model, f"ppl:{files / 'text.txt'}", tokenizer=plain, context=16, stride=8, limit=3)
    ids = plain(text)["input_ids"]
    assert (result.scored, result.settings["tokens"]) == (3, 32)
    assert result.settings["bytes"] == len(plain.decode(ids[:32]))


def test_qa_is_that_of_each_question_alone(plain, files):
    model = build_zoo("llama")
    task = parse_task(f"qa:{files / 'qa.jsonl'}?tokens=4")
    (result,) = trawl.evaluate(model, task, tokenizer=plain, limit=10)
    for number, question in enumerate(task.records[:10]):
        prompt = plain(question.prompt)["input_ids"]
        answers = [plain(f"{question.prompt} {answer}")["input_ids"][len(prompt) :] for answer in question.answers]
        loss = min(-reference(model, prompt, answer) / len(answer) for answer in answers)
        assert result.scores["log_loss"][number] == pytest.approx(loss, rel=1e-5)
    assert result.scored == 10
    assert result.figure("log_loss").value == pytest.approx(sum(result.scores["log_loss"]) / 10)


def test_what_the_model_writes_counts_as_correct_and_exact(plain, tmp_path):
    """A question whose answer is what the model goes on with, and one whose answer is not."""
    model = build_zoo("llama")
    prompt, written = next(
        (text, words)
        for seed in range(200)
        for text in [sentence(seed, 4)]
        for words in [plain.decode(greedy_tokens(model, plain(text)["input_ids"], 3))]
        if words.startswith(" ")
        and words.strip().isalpha()
        and plain(text + words)["input_ids"][:-3] == plain(text)["input_ids"]
    )
    records = [{"prompt": prompt, "answers": ["zebra", written.strip()]}, {"prompt": prompt, "answers": ["house"]}]
    (tmp_path / "qa.jsonl").write_text("\n".join(map(json.dumps, records)))
    (result,) = trawl.evaluate(model, f"qa:{tmp_path / 'qa.jsonl'}?tokens=3", tokenizer=plain)
    assert result.scores["correct"] == (1.0, 0.0)
    assert result.scores["exact"] == (1.0, 0.0)
    assert result.scores["f1"] == (1.0, 0.0)


def test_choice_is_that_of_each_text_alone(with_bos, files):
    model = build_zoo("gpt2")
    task = parse_task(rf"choice:{files / 'choice.jsonl'}?template=q: {{query}}\nis")
    (result,) = trawl.evaluate(model, task, tokenizer=with_bos)
    for number, record in enumerate(task.records):
        prompt = with_bos(f"q: {record.query}\nis")["input_ids"]
        tokens = [with_bos(f"q: {record.query}\nis {choice}")["input_ids"][len(prompt) :] for choice in record.choices]
        totals = [reference(model, prompt, choice) for choice in tokens]
        normed = [total / len(choice) for total, choice in zip(totals, record.choices, strict=True)]
        assert result.scores["accuracy"][number] == float(max(totals) == totals[record.gold])
        assert result.scores["accuracy_norm"][number] == float(max(normed) == normed[record.gold])
        assert result.scores["log_loss"][number] == pytest.approx(
            -totals[record.gold] / len(tokens[record.gold]), rel=1e-5
        )


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_pairs_are_those_of_each_sentence_alone(name, plain, files):
    model = build_zoo(name)
    rows = [plain(sentence(seed, 2 + seed))["input_ids"] for seed in range(6)]
    expected = [model.base_model(input_ids=torch.tensor([row])).last_hidden_state[0].mean(0).double() for row in rows]
    found = embed(Subject(model, plain, None, 50), rows, id)
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), atol=1e-5, rtol=1e-5)
    (result,) = trawl.evaluate(model, f"pairs:{files / 'pairs.jsonl'}", tokenizer=plain)
    assert result.settings["context"] == {"bert": 64, "roberta": 63}[name]  # RoBERTa's positions begin after padding's
    rho = result.figure("spearman").value
    assert -1 <= rho <= 1
    assert result.figure("spearman").stderr == pytest.approx((1 - rho**2) * math.sqrt((1 + rho**2 / 2) / 5))


@pytest.mark.parametrize("kind", ["qa", "choice"])
def test_records_longer_than_the_context_are_left_out_and_counted(kind, plain, files):
    model, task = build_zoo("llama"), parse_task(f"{kind}:{files / kind}.jsonl" + "?tokens=1" * (kind == "qa"))
    texts = [
        [f"{r.prompt} {a}" for a in r.answers] if kind == "qa" else [f"{r.query} {c}" for c in r.choices]
        for r in task.records
    ]
    lengths = [max(len(plain(text)["input_ids"]) for text in each) for each in texts]
    context = sorted(lengths)[5]
    fitting = [number for number, length in enumerate(lengths) if length - 1 <= context]  # the last token is not fed
    assert 0 < len(fitting) < 12
    (whole,) = trawl.evaluate(model, task, tokenizer=plain)
    (short,) = trawl.evaluate(model, task, tokenizer=plain, context=context)
    assert (whole.scored, whole.overlong) == (12, 0)
    assert (short.scored, short.overlong) == (len(fitting), 12 - len(fitting))
    kept = [whole.scores["log_loss"][number] for number in fitting]
    assert short.scores["log_loss"] == pytest.approx(kept, rel=1e-5)  # the rest are scored as before, uncut
    with pytest.raises(PlanError, match=r"none of 12 record\(s\) fits into the context of 2 tokens"):
        trawl.evaluate(model, task, tokenizer=plain, context=2)


def test_what_a_model_cannot_do_is_a_plan_error(plain, files, zoo):
    decoder, encoder = build_zoo("llama"), build_zoo("bert")
    cases = [
        (decoder, "pairs:{}/pairs.jsonl", {}, "pairs needs an encoder, but the model is a causal language model"),
        (encoder, "qa:{}/qa.jsonl", {}, "qa needs a causal language model, but the model is an encoder"),
        (
            zoo("bert"),
            "ppl:{}/text.txt",
            {},
            "ppl needs a causal language model",
        ),  # told before any tokenizer is missed
        (decoder, "ppl:{}/text.txt", {"context": 65}, "context 65 is longer than the model's 64 positions"),
        (decoder, "ppl:{}/text.txt", {"context": 8, "stride": 9}, "stride 9 would leave tokens out"),
        (decoder, "ppl:{}/text.txt", {"limit": 0}, "limit is 0; expected at least 1"),
        (decoder, "ppl:{}/text.txt", {"dtype": "f32"}, "dtype, device, revision and trust_remote_code go with a path"),
        (decoder, "ppl:{}/text.txt", {"tokenizer": None}, "a loaded model needs its tokenizer"),
    ]
    for model, spec, options, message in cases:
        with pytest.raises(PlanError, match=message):
            trawl.evaluate(model, spec.format(files), **{"tokenizer": plain, **options})
    with pytest.raises(PlanError, match="no task given"):
        trawl.evaluate(decoder, [], tokenizer=plain)
    with pytest.raises(LoadError, match="no usable tokenizer"):
        trawl.evaluate(zoo("llama"), f"ppl:{files}/text.txt")


def test_an_answer_that_tokenises_to_nothing_is_a_plan_error(tmp_path):
    tokenizer = Tokenizer(models.BPE())  # no token for what it has not seen
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(WORDS, trainers.BpeTrainer(vocab_size=VOCABULARY, show_progress=False))
    (tmp_path / "qa.jsonl").write_text(
        '{"prompt": "the sky", "answers": ["blue"]}\n{"prompt": "the sea", "answers": ["§"]}\n'
    )
    with pytest.raises(PlanError, match="line 2: the answer '§' tokenises to nothing"):
        trawl.evaluate(
            build_zoo("llama"),
            f"qa:{tmp_path / 'qa.jsonl'}",
            tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer),
        )


def test_a_tokenizer_of_another_model_is_told(files):
    tokenizer = Tokenizer(models.WordLevel({w: 90 + i for i, w in enumerate(["[UNK]", *sorted(set(WORDS))])}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    foreign = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    with pytest.raises(PlanError, match=r"does not belong to the model: it gives token \d+, the model has 96"):
        trawl.evaluate(build_zoo("llama"), f"ppl:{files / 'text.txt'}", tokenizer=foreign)


def test_a_model_in_training_mode_is_evaluated_without_dropout_and_given_back_as_it_was(plain, files):
    model = build_zoo("gpt2")
    task = parse_task(f"ppl:{files / 'text.txt'}")
    (expected,) = trawl.evaluate(model, task, tokenizer=plain)
    model.train()
    (found,) = trawl.evaluate(model, task, tokenizer=plain)
    assert found.scores == expected.scores
    assert model.training


def test_half_precision_weights_are_scored_with_a_softmax_in_float32(plain):
    model = build_zoo("llama", torch.bfloat16)
    requests = requests_of(5)
    found = log_likelihoods(Subject(model, plain, None, 4096), requests, id)
    expected = [reference(model, request.context, request.continuation) for request in requests]
    assert [item.total for item in found] == pytest.approx(expected, rel=0.02)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run ``trawl ARGS`` in this process: (exit code, standard output, standard error)."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["trawl", *map(str, args)])
        capsys.readouterr()
        try:
            trawl_cli.main()
            code = 0
        except SystemExit as e:
            code = int(e.code or 0)
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def checkpoint(zoo, tmp_path, with_bos):
    folder = shutil.copytree(zoo("llama"), tmp_path / "model")
    with_bos.save_pretrained(folder)
    return folder


def test_the_command_prints_a_table_or_json(run, checkpoint, files):
    tasks = (
        "--task",
        f"ppl:{files}/text.txt",
        "--task",
        f"qa:{files}/qa.jsonl",
        "--task",
        f"choice:{files}/choice.jsonl",
    )
    code, out, err = run("eval", checkpoint, *tasks, "--context", 16, "--stride", 8, "--limit", 9)
    assert code == 0, err
    for word in ("perplexity", "bits_per_byte", "correct", "accuracy_norm", "±", "context 16, stride 8, bos True"):
        assert word in out
    assert "records are longer than the context of 16 tokens and left out" in out
    assert "windows 100%" in err
    code, out, err = run("eval", checkpoint, *tasks, "--dtype", "bf16", "--json")
    assert code == 0
    assert err == ""
    record = json.loads(out)
    assert [result["kind"] for result in record["results"]] == ["ppl", "qa", "choice"]
    assert all(figure["stderr"] > 0 for figure in record["results"][0]["figures"])


def test_a_factored_checkpoint_scores_as_its_dense_form(run, checkpoint, files, tmp_path):
    recipe = ("--rank", 4, "--layers", 1, "--roles", "fc")
    assert run("compress", checkpoint, *recipe, "--write", "factored", "-o", tmp_path / "factored")[0] == 0
    assert run("densify", tmp_path / "factored", "-o", tmp_path / "dense")[0] == 0
    tasks = [f"ppl:{files}/text.txt", f"choice:{files}/choice.jsonl"]
    for a, b in zip(*(trawl.evaluate(tmp_path / name, tasks) for name in ("factored", "dense")), strict=True):
        for name, values in a.scores.items():
            assert values == pytest.approx(b.scores[name], rel=1e-4)
    (base,) = trawl.evaluate(checkpoint, tasks[0])
    assert base.figure("loss").value != pytest.approx(a.figure("log_loss").value, rel=1e-4)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["{model}"], "Missing option.*--task"),
        (["{model}", "--task", "qqa:x"], "PlanError: .*did you mean 'qa'"),
        (["{model}", "--task", "qa:{files}/absent.jsonl"], "PlanError: no such task file"),
        (["{model}", "--task", "pairs:{files}/pairs.jsonl"], "PlanError: .*needs an encoder"),
        (["{model}", "--task", "qa:{files}/qa.jsonl", "--dtype", "flaot32"], "did you mean 'float32'"),
        (["{model}", "--task", "qa:{files}/qa.jsonl", "--device", "gpu"], "unknown device 'gpu'"),
        (["{files}/absent", "--task", "qa:{files}/qa.jsonl"], "no such folder"),
        (["{files}", "--task", "qa:{files}/qa.jsonl"], "has no config.json"),
        (["nobody/nothing", "--task", "qa:{files}/qa.jsonl"], "nobody/nothing"),
    ],
)
def test_a_mistake_gives_exit_code_two(args, message, run, checkpoint, files):
    code, out, err = run("eval", *(arg.format(model=checkpoint, files=files) for arg in args))
    assert code == 2, err
    assert out == ""
    assert re.search(message, re.sub(r"[\s│]+", " ", err)), err
    assert "Traceback" not in err


HARNESS = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed (extra eval)"
)
LENIENT = pytest.mark.filterwarnings("ignore")  # lm-eval and its data sets library warn of themselves


def harness_task(folder, name, data, body):
    """Write a local lm-eval task file over a local data file."""
    text = (
        f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\n  cache_dir: {folder}\n"
        f"test_split: test\n{body}"
    )
    (folder / f"{name}.yaml").write_text(text)
    return f"lm:{folder / f'{name}.yaml'}"


@HARNESS
@LENIENT
@pytest.mark.parametrize("bos", [False, True])
def test_choice_scores_are_those_of_lm_eval(bos, files, plain, with_bos, tmp_path):
    spec = harness_task(
        tmp_path,
        "local_choice",
        files / "choice.jsonl",
        'output_type: multiple_choice\ndoc_to_text: "Question: {{query}}\\nAnswer:"\ndoc_to_choice: choices\n'
        "doc_to_target: gold\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n",
    )
    own = rf"choice:{files / 'choice.jsonl'}?template=Question: {{query}}\nAnswer:"
    ours, theirs = trawl.evaluate(build_zoo("llama"), [own, spec], tokenizer=with_bos if bos else plain)
    for figure, metric in (("accuracy", "acc"), ("accuracy_norm", "acc_norm")):
        assert ours.figure(figure).value == pytest.approx(theirs.figure(metric).value)
        assert ours.figure(figure).stderr == pytest.approx(theirs.figure(metric).stderr)
    assert 0 < ours.figure("accuracy").value < 1
    assert theirs.scored == 12


@HARNESS
@LENIENT
def test_perplexity_is_that_of_lm_eval(files, plain, tmp_path):
    """Windows as long as the context, none with a token of its own before it, are lm-eval's."""
    text = (files / "text.txt").read_text()
    (tmp_path / "doc.jsonl").write_text(json.dumps({"text": text}) + "\n")
    spec = harness_task(
        tmp_path,
        "local_ppl",
        tmp_path / "doc.jsonl",
        'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list:\n  - metric: bits_per_byte\n  - metric: byte_perplexity\n",
    )
    own = f"ppl:{files / 'text.txt'}"
    ours, theirs = trawl.evaluate(build_zoo("llama"), [own, spec], tokenizer=plain, context=32, stride=32)
    assert ours.scored > 3
    assert ours.figure("bits_per_byte").value == pytest.approx(theirs.figure("bits_per_byte").value, rel=1e-6)


@HARNESS
@LENIENT
def test_an_unknown_lm_eval_task_is_a_plan_error(plain, monkeypatch):
    import lm_eval.tasks

    index = type("Index", (), {"all_tasks": ("arc_easy", "piqa")})  # the real one takes ten seconds to make
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", index)
    with pytest.raises(PlanError, match="lm-eval has no task 'arc_eazy'; did you mean 'arc_easy'"):
        trawl.evaluate(build_zoo("llama"), "lm:arc_eazy", tokenizer=plain)


def test_without_lm_eval_the_fix_is_named(monkeypatch, plain):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PlanError, match=r"pip install 'trawl-llm\[eval\]'"):
        trawl.evaluate(build_zoo("llama"), "lm:arc_easy", tokenizer=plain)
