"""Rollout: the same responses whatever the batch, the pages or the threads, and log-probs equal to training's.

On CUDA, and where a test says so, with steps planned ahead and padded decode steps, which CUDA records as graphs.
"""

import contextlib
import dataclasses

import models
import pytest
import torch
from conftest import NO_CUDA

from grpo_engine.config import RolloutConfig
from grpo_engine.model.flops import causal_pairs, forward_flops
from grpo_engine.records.ledger import Ledger
from grpo_engine.rollout import model_runner
from grpo_engine.rollout.engine import Engine, SamplingRequest, derive_seeds, generate
from grpo_engine.rollout.model_runner import padded_pages, padded_rows
from grpo_engine.train.batch import minibatches

pytestmark = pytest.mark.usefixtures("device")
PLENTY = RolloutConfig(max_new_tokens=24)
SCARCE = RolloutConfig(max_new_tokens=24, num_pages=6, max_running=4, max_step_tokens=9)


@pytest.fixture
def model(device):
    return models.random_model(scale=4.0)


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(97, (n,), generator=generator).tolist() for n in (3, 15, 16, 17, 31, 32, 1)]


def run(model, prompts, config=PLENTY, **kwargs):
    """`model`: or an engine."""
    kwargs = {"group_size": 4, "stop_ids": [7, 8], **kwargs}
    seeds = kwargs.pop("seeds", derive_seeds(1, 2, count=len(prompts) * kwargs["group_size"]))
    if isinstance(model, Engine):
        return model.generate(prompts, seeds=seeds, config=config, **kwargs)
    return generate(model, prompts, seeds=seeds, config=config, **kwargs)


def plain(model):
    return Engine(model, lookahead=False, graphs=False)


def vars_of(record):
    return {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}


def same(a, b):
    return (
        torch.equal(a.tokens, b.tokens)
        and torch.equal(a.logprob, b.logprob)
        and torch.equal(a.entropy, b.entropy)
        and a.finish == b.finish
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scarce_pages_and_threads_change_no_bit(prompts, dtype, on_threads):
    model = models.random_model(scale=4.0, dtype=dtype)
    prompts = [*prompts, [1, 2, 3]]  # eight threads take part then, though not in every kernel of the small model
    one, *others = on_threads(lambda: run(model, prompts))
    assert all(same(one, other) for other in others)
    scarce = run(model, prompts, SCARCE)
    assert scarce.stats.preemptions > 0 and scarce.stats.recomputed_tokens > 0
    assert same(one, scarce)


def test_a_response_depends_on_its_own_prompt_and_seed_alone(model, prompts):
    together = run(model, prompts)
    responses = together.responses()
    seeds = derive_seeds(1, 2, count=28)
    for p in (0, 3, 6):
        alone = run(model, [prompts[p]], seeds=seeds[4 * p : 4 * p + 4])
        assert alone.responses() == responses[4 * p : 4 * p + 4]


@pytest.mark.parametrize("config", [PLENTY, SCARCE])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_the_trainers_bit_for_bit(model, prompts, config, temperature, device):
    rollout = run(model, prompts, config, temperature=temperature)
    with torch.device("cpu"):
        (minibatch,) = minibatches(rollout, torch.zeros(28), count=1, tokens_per_micro_batch=100)
    assert len(minibatch.micro_batches) > 3
    for micro in minibatch.micro_batches:
        tensors = {k: v.to(device) for k, v in vars_of(micro).items() if isinstance(v, torch.Tensor)}
        micro = dataclasses.replace(micro, **tensors)
        logprob, _ = model.logprobs(
            micro.tokens, micro.cu_seqlens, cu_groups=micro.cu_groups, rows=micro.rows, target=micro.target,
            positions_T=micro.positions, temperature=temperature,
        )  # fmt: skip
        assert torch.equal(logprob, micro.old_logprob)
        assert (logprob < 0).all()


def test_responses_end_at_a_stop_token_or_at_the_limit(model, prompts):
    rollout = run(model, prompts)
    assert set(rollout.finish) == {"stop", "length"}
    for response, finish in zip(rollout.responses(), rollout.finish, strict=True):
        assert (response[-1] in (7, 8)) == (finish == "stop")
        assert not {7, 8} & set(response[:-1])
        assert len(response) == 24 if finish == "length" else len(response) <= 24


def test_tokens_hold_the_prompts_and_nothing_is_scored_there(model, prompts):
    rollout = run(model, prompts)
    for n, (start, length) in enumerate(zip(rollout.cu_seqlens[:-1].tolist(), rollout.prompt_len.tolist(), strict=True)):
        assert rollout.tokens[start : start + length].tolist() == prompts[n // 4]
        assert not rollout.logprob[start : start + length].any()


def test_each_prompt_is_computed_once_for_its_group(model, prompts):
    assert run(model, prompts).stats.prefill_tokens == sum(map(len, prompts))


def test_filters_keep_the_full_logprob(model, prompts):
    config = PLENTY.model_copy(update={"top_k": 1})
    greedy = run(model, prompts, temperature=0.0)
    top1 = run(model, prompts, config)
    assert top1.responses() == greedy.responses()
    assert torch.equal(top1.logprob, greedy.logprob) and (top1.logprob <= 0).all() and top1.logprob.any()


def test_progress_counts_responses(model, prompts):
    seen = []
    run(model, prompts, progress=lambda done, wanted: seen.append((done, wanted)))
    assert seen[-1] == (28, 28) and [d for d, _ in seen] == sorted(d for d, _ in seen)


def test_requests_of_different_kinds_are_sampled_together_as_alone(model, prompts):
    kinds = [(prompts, 4, 1.0, 24), (prompts[:3], 1, 0.0, 5), (prompts[2:], 3, 0.7, 11)]
    requests = [
        SamplingRequest(prompts=p, group_size=g, seeds=derive_seeds(1, i, count=len(p) * g), temperature=t, max_new_tokens=n)
        for i, (p, g, t, n) in enumerate(kinds)
    ]
    for config in (PLENTY, SCARCE):
        together = Engine(model).stream(requests, stop_ids=[7, 8], config=config).run()
        for request, batch in zip(requests, together, strict=True):
            limits = config.model_copy(update={"max_new_tokens": request.max_new_tokens})
            alone = generate(
                model, request.prompts, group_size=request.group_size, seeds=request.seeds, stop_ids=[7, 8],
                config=limits, temperature=request.temperature,
            )  # fmt: skip
            assert same(batch, alone) and batch.group_size == request.group_size
            assert batch.temperature == alone.temperature == request.temperature
            assert torch.equal(batch.cu_seqlens, alone.cu_seqlens) and torch.equal(batch.prompt_len, alone.prompt_len)


def stream(model, prompts, engine=None):
    request = SamplingRequest(
        prompts=prompts, group_size=4, seeds=derive_seeds(1, 2, count=4 * len(prompts)), temperature=1.0,
        max_new_tokens=PLENTY.max_new_tokens,
    )  # fmt: skip
    return (engine or Engine(model)).stream([request], stop_ids=[7, 8], config=PLENTY)


def test_a_stream_yields_each_response_when_it_is_finished(model, prompts):
    rollout = stream(model, prompts)
    with pytest.raises(RuntimeError, match="iterated over to its end"):
        _ = rollout.batches
    steps = []
    for sequences, responses in rollout:
        assert not torch.is_inference_mode_enabled()  # the caller's own code may need gradients
        steps.append(dict(zip(sequences, responses, strict=True)))
    assert sum(map(len, steps)) == 28 and len(steps) > 5 and all(steps)  # not all at the end
    heard = {n: response for step in steps for n, response in step.items()}
    (batch,) = rollout.batches
    assert [heard[n] for n in range(28)] == batch.responses() and same(batch, run(model, prompts))


@pytest.mark.parametrize("lookahead", [False, True])
def test_a_stream_that_is_left_early_costs_the_next_rollout_nothing(model, prompts, lookahead, monkeypatch):
    engine, left = Engine(model, lookahead=lookahead, graphs=False), []

    @contextlib.contextmanager
    def running():
        try:
            yield
        except BaseException as e:
            left.append(type(e))
            raise

    monkeypatch.setattr(engine.runner, "running", running)
    rollout = stream(model, prompts, engine)
    next(iter(rollout))
    assert left == [GeneratorExit]  # at once, and not when the rollout itself is forgotten
    rollout = stream(model, prompts, engine)
    with pytest.raises(ZeroDivisionError):
        for _ in rollout:
            raise ZeroDivisionError
    assert left == [GeneratorExit] * 2
    with pytest.raises(RuntimeError, match="iterated over to its end"):
        rollout.run()
    assert same(run(engine, prompts), run(model, prompts))


def test_the_ledger_books_what_the_responses_took(model, prompts):
    ledger = Ledger()
    rollout = run(model, prompts, ledger=ledger)
    cost = ledger.close_step()
    lengths = [len(a) for a in rollout.responses()]
    assert cost["prefill"].tokens == sum(map(len, prompts))
    assert cost["decode"].tokens == sum(lengths) - 28  # the last of a response is never computed
    pairs = sum(causal_pairs(len(p)) for p in prompts)
    assert cost["prefill"].flops == forward_flops(model, tokens=cost["prefill"].tokens, pairs=pairs, head_rows=28)
    pairs = sum(
        causal_pairs(len(prompts[n // 4]) + length - 1) - causal_pairs(len(prompts[n // 4]))
        for n, length in enumerate(lengths)
    )
    assert cost["decode"].flops == forward_flops(
        model, tokens=cost["decode"].tokens, pairs=pairs, head_rows=sum(lengths) - 28
    )


def test_no_prompts():
    rollout = run(models.random_model(), [])
    assert rollout.num_sequences == 0 and rollout.tokens.numel() == 0


def test_seeds_differ_and_repeat():
    assert derive_seeds(1, 2, count=1000).unique().numel() == 1000
    assert torch.equal(derive_seeds(1, 2, count=5), derive_seeds(1, 2, count=9)[:5])
    assert not torch.equal(derive_seeds(1, 2, count=5), derive_seeds(2, 1, count=5))


# ---------------------------------------------------------------- planned ahead, padded

# few tokens, for the emulator's sake; one in eight stops a response
BRIEF = RolloutConfig(max_new_tokens=9)
BRIEF_SCARCE = BRIEF.model_copy(update={"num_pages": 4, "max_running": 4, "max_step_tokens": 9})


def brief(engine, prompts, config=BRIEF, **kwargs):
    return run(engine, prompts[:3], config, **{"group_size": 4, "stop_ids": range(0, 97, 8), **kwargs})


@pytest.mark.parametrize("config", [BRIEF, BRIEF_SCARCE])
def test_planning_ahead_and_padding_change_no_bit(model, prompts, config, device):
    want = brief(plain(model), prompts, config)
    assert set(want.finish) == {"stop", "length"} and (want.stats.preemptions > 0) == (config is BRIEF_SCARCE)
    for lookahead, graphs in ((True, False), (False, True), (True, True)):
        engine = Engine(model, lookahead=lookahead, graphs=graphs)
        for _ in range(2 if device == "cuda" else 1):  # the second time, all from graphs
            got = brief(engine, prompts, config)
            assert same(got, want) and torch.equal(got.cu_seqlens, want.cu_seqlens)
        assert not graphs or len(engine.runner.padded_sizes) >= 3
        assert got.stats.decode_tokens == want.stats.decode_tokens  # rows that were dropped are not counted


def test_requests_of_different_kinds_planned_ahead(model, prompts):
    requests = [
        SamplingRequest(
            prompts=prompts[:p], group_size=g, seeds=derive_seeds(p, count=p * g), temperature=t, max_new_tokens=n
        )
        for p, g, t, n in ((2, 4, 1.0, 8), (3, 1, 0.0, 1), (1, 2, 0.7, 2))
    ]
    config = BRIEF.model_copy(update={"top_p": 0.9, "top_k": 20, "max_running": 6})
    batches = [
        engine.stream(requests, stop_ids=range(0, 97, 8), config=config).run()
        for engine in (plain(model), Engine(model, lookahead=True, graphs=True))
    ]
    for want, got in zip(*batches, strict=True):
        assert same(got, want)


def test_a_step_is_started_before_the_one_before_is_waited_for(model, prompts, monkeypatch):
    events = []

    def noted(cls, method, name):
        original = getattr(cls, method)
        monkeypatch.setattr(cls, method, lambda self, *args: (events.append(name), original(self, *args))[1])

    noted(model_runner.ModelRunner, "start", "start")
    noted(model_runner.StartedStep, "finish", "finish")
    brief(Engine(model, lookahead=True), prompts[:1])
    steps = events.count("start")
    assert steps > 5 and events == ["start", *["start", "finish"] * (steps - 1), "finish"]


def test_padding_rows_write_nothing(model, prompts, monkeypatch):
    monkeypatch.setattr(model_runner, "padded_rows", lambda rows: rows + 3)
    caches = []
    for engine in (plain(model), Engine(model, lookahead=False, graphs=True)):
        brief(engine, prompts)
        cache = engine.runner.cache
        with torch.inference_mode():
            for pages in (cache.key, cache.value):
                pages.fill_(float("nan"))  # and what padding rows read of it does not reach the others
        assert not brief(engine, prompts).logprob.isnan().any()
        caches.append([pages.view(torch.int32) for pages in (cache.key, cache.value)])
    assert engine.runner.padded_sizes
    for mine, padded in zip(*caches, strict=True):
        assert torch.equal(mine, padded)


class Recorded:
    """In place of a CUDA graph, where there are none: what it was recorded over must be as it was."""

    def __init__(self, runner, inputs):
        self.runner, self.inputs, self.over = runner, inputs, self.now(runner, inputs)
        self.replays = 0

    @staticmethod
    def now(runner, inputs):
        tensors = (*runner.model.parameters(), runner.cache.key, runner.cache.value, runner._samples.bytes, *inputs)
        return [t.data_ptr() for t in tensors], runner._filters

    def replay(self):
        assert self.now(self.runner, self.inputs) == self.over
        self.replays += 1
        self.runner._sample_into_buffer(self.inputs, decode_only=True)


def test_an_engine_serves_rollouts_of_all_sizes_and_weights_that_move(model, prompts, device, monkeypatch):
    graphs = []

    def record(runner, inputs):
        graphs.append(Recorded(runner, inputs))
        return graphs[-1]

    if device == "cpu":
        monkeypatch.setattr(model_runner.ModelRunner, "_record", record)
    engine = Engine(model, lookahead=True, graphs=True)
    same_pages = BRIEF.model_copy(update={"num_pages": 8})
    kinds = [
        (prompts[:1], same_pages),
        (prompts[1:3], same_pages),  # more samples
        (prompts[1:3], BRIEF.model_copy(update={"num_pages": 12})),  # more pages
        (prompts[1:3], BRIEF.model_copy(update={"num_pages": 12, "top_k": 5})),
        (prompts[:1], BRIEF.model_copy(update={"page_size": 32})),
    ]
    for chosen, config in kinds:
        seen = set()
        for change in ("nothing", "weights in place", "weights elsewhere"):
            with torch.no_grad():
                if change == "weights in place":
                    model.final_norm.mul_(1.1)
                elif change == "weights elsewhere":
                    model.layers[0].out_weight.data = model.layers[0].out_weight * 0.9
            want = brief(plain(model), chosen, config, group_size=2)
            assert same(brief(engine, chosen, config, group_size=2), want)
            seen.add(want.logprob.numpy().tobytes())
        assert len(seen) == 3
    engine.release()
    assert engine.runner.padded_sizes == [] and same(brief(engine, chosen, config, group_size=2), want)
    assert device != "cpu" or sum(graph.replays for graph in graphs) > len(graphs)


def test_an_engine_goes_on_after_an_error(model, prompts):
    engine = Engine(model, lookahead=True, graphs=True)
    want = brief(engine, prompts)
    norm = model.final_norm.detach().clone()

    def spoil(done, wanted):
        with torch.no_grad():
            model.final_norm.fill_(float("nan"))

    with pytest.raises(RuntimeError, match="logits of sequence .* hold NaN"):
        brief(engine, prompts, progress=spoil)
    with torch.no_grad():
        model.final_norm.copy_(norm)
    assert same(brief(engine, prompts), want)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=NO_CUDA)], indirect=True)
def test_the_host_waits_for_nothing_but_its_events(model, prompts):
    engine = Engine(model)
    want = brief(engine, prompts)  # records
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert same(brief(engine, prompts), want)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_padded_sizes():
    sizes = sorted({padded_rows(n) for n in range(1, 1025)})
    assert sizes[:16] == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32] and len(sizes) == 36
    for n in range(1, 1025):
        assert n <= padded_rows(n) < 1.25 * n and padded_rows(n) in sizes
    assert [padded_pages(n, 16) for n in (0, 1, 16, 17, 33, 64)] == [16, 16, 16, 32, 64, 64]
    assert [padded_pages(n, 512) for n in (1, 2, 3)] == [1, 2, 4]


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "change,says",
    [
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"prompts": [[1, 97]]}, r"prompt 0 holds token 97, outside the vocabulary \[0, 97\)"),
        ({"prompts": [[-1]]}, "prompt 0 holds token -1"),
        ({"prompts": [[1] * 240]}, "prompt 0 has 240 tokens; with max_new_tokens=24 .* 256 positions"),
        ({"group_size": 0}, "group_size must be >= 1, got 0"),
        ({"seeds": torch.zeros(3, dtype=torch.int64)}, r"seeds must be \[P\*G\] = \[4\] int64, got \[3\]"),
        ({"prompts": [[1] * 90], "config": SCARCE}, "prompt 0: .*6"),
    ],
)
def test_a_bad_request_is_refused_before_any_work(model, change, says):
    with pytest.raises(ValueError, match=says):
        run(model, **{"prompts": [[1, 2]], **change})


def test_diverged_weights_name_the_sequence():
    model = models.random_model()
    with torch.no_grad():
        model.final_norm.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="logits of sequence 0 at position 2 hold NaN"):
        run(model, [[1, 2]])
