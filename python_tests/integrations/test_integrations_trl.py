"""Our GRPOTrainer beside TRL's: the same loss, gradients and logs, and options that are refused by name."""

import pytest
import torch

trl = pytest.importorskip("trl", reason="trl is not installed")

from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM  # noqa: E402

from grpo_engine.integrations import trl as ours  # noqa: E402

WORDS = [f"w{i}" for i in range(61)]
PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9", "w10 w11"]
SHAPE = {
    "vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


def qwen2(tied=True):
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=tied))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0 if p.dim() == 2 else 1.0)  # far from uniform distributions
    return model


def tokenizer():
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", pad_token="w0")


def reward(completions, **_):
    return [sum(int(word[1:]) % 5 for word in text.split()) / 10 for text in completions]


def trainer(cls, folder, model=None, peft_config=None, **options):
    options = {"beta": 0.0, "max_steps": 10, "per_device_train_batch_size": 8, "num_generations": 4,
               "max_completion_length": 6, "learning_rate": 1e-3, "lr_scheduler_type": "constant"} | options  # fmt: skip
    config = trl.GRPOConfig(
        output_dir=str(folder), use_cpu=True, bf16=options.pop("bf16", False), gradient_checkpointing=False, seed=3,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, **options,
    )  # fmt: skip
    return cls(
        model=model or qwen2(), reward_funcs=reward, args=config, processing_class=tokenizer(), peft_config=peft_config,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS * 8}),
    )  # fmt: skip


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """TRL's trainer and ours, of one model; tests set their options anew."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("pair")
    qwen2(tied=False).save_pretrained(folder / "model")
    options = {"model": str(folder / "model"), "beta": 0.04, "max_completion_length": 9, "temperature": 0.7,
               "gradient_accumulation_steps": 2, "steps_per_generation": 4,
               "model_init_kwargs": {"dtype": "float32"}}  # fmt: skip
    return [trainer(cls, folder / cls.__module__, **options) for cls in (trl.GRPOTrainer, ours.GRPOTrainer)]


def batch(seed, *, T=9, B=6):
    """What `_compute_loss` is given: prompts padded on the left, completions on the right, one of them masked whole."""
    g = torch.Generator().manual_seed(seed)

    def mask(lengths, width):
        return (torch.arange(width) < torch.tensor(lengths)[:, None]).long()

    keep = mask([9, 4, 1, 0, 7, 9], T)
    old = -torch.rand(B, T, generator=g) * 4
    return {
        "prompt_ids": torch.randint(1, 61, (B, 5), generator=g),
        "prompt_mask": mask([5, 2, 3, 5, 1, 4], 5).flip(1),
        "completion_ids": torch.randint(1, 61, (B, T), generator=g),
        "completion_mask": keep,
        "advantages": torch.tensor([1.0, -0.2, 0.4, 1.0, -0.3, 0.8]),
        "old_per_token_logps": old,
        "ref_per_token_logps": old + 0.3 * torch.randn(B, T, generator=g),
        "num_items_in_batch": keep.sum() * 4,
    }  # fmt: skip


def around_the_policy(one, inputs, seed):
    """Old and reference log-probs around the policy's own: clips bind for some tokens and for some sequences."""
    ids, attention = (torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], dim=1) for x in ("ids", "mask"))
    with torch.no_grad():
        now = one._get_per_token_logps_and_entropies(one.model, ids, attention, inputs["completion_ids"].shape[1])[0]
    g = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, *now.shape, generator=g) + torch.randn(2, len(now), 1, generator=g)
    return inputs | {"old_per_token_logps": now + 0.4 * noise[0], "ref_per_token_logps": now + 0.4 * noise[1]}


DEFAULTS = {"loss_type": "dapo", "importance_sampling_level": "token", "beta": 0.0, "use_bias_correction_kl": True,
            "epsilon": 0.2, "epsilon_high": 0.28, "delta": None, "top_entropy_quantile": 1.0,
            "off_policy_mask_threshold": None, "use_vllm": False}  # fmt: skip


def set_options(trainers, **options):
    options = DEFAULTS | options
    for one in trainers:
        for name, value in options.items():
            for holder in (one.args, one):
                if hasattr(holder, name):
                    setattr(holder, name, value)
        one.epsilon_low = one.args.epsilon
        one.model.load_state_dict(qwen2(tied=False).state_dict())
        one.current_gradient_accumulation_steps = 2
        one.model.train()
        one._metrics["train"].clear()


def loss_and_gradient(one, inputs):
    loss = one.compute_loss(one.model, inputs)
    one.model.zero_grad()
    loss.backward()
    return float(loss.detach()), torch.cat([p.grad.flatten() for p in one.model.parameters() if p.grad is not None])


def assert_equal(theirs, mine, inputs, tolerance=1e-6):
    """The two trainers' losses, gradients and what they log."""
    (want, gradient), (got, my_gradient) = (loss_and_gradient(one, inputs) for one in (theirs, mine))
    assert want != 0 and gradient.norm() > 1e-3
    assert got == pytest.approx(want, rel=tolerance)
    assert (my_gradient - gradient).norm() <= tolerance * gradient.norm()
    for mode in ("train", "eval"):
        assert mine._metrics[mode].keys() == theirs._metrics[mode].keys()
        for name, values in theirs._metrics[mode].items():
            assert mine._metrics[mode][name] == pytest.approx(values, rel=tolerance, abs=tolerance, nan_ok=True), name


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ours.LOSSES)
def test_ten_steps_are_trls(pair, loss_type, level, beta):
    theirs, mine = pair
    high = 1.2 if loss_type == "cispo" else 0.28
    set_options(pair, loss_type=loss_type, importance_sampling_level=level, beta=beta, epsilon_high=high)
    optimizer = torch.optim.AdamW(mine.model.parameters(), lr=1e-3)
    for step in range(10):
        assert_equal(theirs, mine, around_the_policy(theirs, batch(step), step))
        optimizer.step()
        theirs.model.load_state_dict(mine.model.state_dict())
    logged = {name: sum(values) for name, values in mine._metrics["train"].items()}
    clipped = ["cispo_clip_ratio"] if loss_type == "cispo" else ["clip_ratio/low_mean", "clip_ratio/high_mean"]
    assert min(logged[name] for name in clipped) > 0 and logged["entropy"] > 0 and (logged.get("kl", 0) > 0) == (beta > 0)


def with_importance_ratio(width):
    return {"importance_sampling_ratio": torch.rand(6, width, generator=torch.Generator().manual_seed(2)) * 2}


@pytest.mark.parametrize(
    "options, more",
    [
        ({"delta": 1.5}, {}),
        ({"use_bias_correction_kl": False}, {}),
        ({"epsilon": 1.7}, {}),
        ({"top_entropy_quantile": 0.4, "loss_type": "bnpo"}, {}),
        ({"off_policy_mask_threshold": 0.1, "loss_type": "grpo"}, {}),
        ({"use_vllm": True}, with_importance_ratio(9)),
        ({"use_vllm": True, "loss_type": "grpo", "importance_sampling_level": "sequence"}, with_importance_ratio(1)),
        ({}, {"tool_mask": (torch.arange(54).view(6, 9) % 3 > 0).long()}),
        ({}, {"advantages": torch.linspace(-0.5, 1.5, 54).view(6, 9)}),
        ({}, {"old_per_token_logps": None}),
        ({"loss_type": "bnpo", "importance_sampling_level": "sequence"}, {"old_per_token_logps": None}),
    ],
    ids=lambda x: ",".join(x) or "-",
)
def test_options_that_weight_or_mask_tokens(pair, options, more):
    set_options(pair, beta=0.04, **options)
    inputs = around_the_policy(pair[0], batch(1), 1) | more
    assert_equal(*pair, {name: value for name, value in inputs.items() if value is not None})


def test_evaluation_and_bfloat16_are_trls_too(pair):
    set_options(pair)
    inputs = around_the_policy(pair[0], batch(1), 1)
    for one in pair:
        one.model.eval()
    assert_equal(*pair, inputs)
    set_options(pair)
    with torch.autocast("cpu", torch.bfloat16):  # the logits of TRL are rounded to bfloat16
        assert_equal(*pair, inputs, tolerance=0.02)


def test_a_head_in_float32_over_a_bfloat16_model(tmp_path):
    pair = [
        trainer(cls, tmp_path / cls.__module__, qwen2(tied=False).bfloat16(), cast_lm_head_to_fp32=True)
        for cls in (trl.GRPOTrainer, ours.GRPOTrainer)
    ]
    for one in pair:
        one.current_gradient_accumulation_steps = 1
    inputs = around_the_policy(pair[0], batch(1), 1)
    (want, gradient), (got, mine) = (loss_and_gradient(one, inputs) for one in pair)
    assert got == pytest.approx(want, rel=1e-5)
    assert (mine - gradient).norm() <= 2**-8 * gradient.norm()  # of the head's and the body's weights, bfloat16


def test_only_completion_tokens_reach_the_head(pair, monkeypatch):
    rows = []
    monkeypatch.setattr(
        ours.ops, "token_logprob",
        lambda hidden, *a, call=ours.ops.token_logprob, **k: rows.append(len(hidden)) or call(hidden, *a, **k),
    )  # fmt: skip
    set_options(pair)
    inputs = batch(1)
    pair[1].compute_loss(pair[1].model, inputs)
    assert rows == [int(inputs["completion_mask"].sum())]
    logits = pair[1].model(input_ids=inputs["prompt_ids"]).logits  # as ever where TRL does not ask for its head
    assert logits.shape == (6, 5, len(WORDS))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss_type": "grpo", "beta": 0.04, "num_iterations": 2, "gradient_accumulation_steps": 2, "temperature": 0.7,
         "importance_sampling_level": "sequence", "per_device_train_batch_size": 4},
    ],
    ids=["defaults", "off-policy"],
)  # fmt: skip
def test_a_training_is_trls(options, tmp_path):
    qwen2().save_pretrained(tmp_path / "model")
    runs = []
    for cls in (trl.GRPOTrainer, ours.GRPOTrainer):
        one = trainer(cls, tmp_path / cls.__module__, str(tmp_path / "model"), **options)
        one.train()
        runs.append((one.state.log_history, torch.cat([p.detach().flatten() for p in one.model.parameters()])))
    (theirs, want), (mine, got) = runs
    assert len(theirs) == 11 and [log.keys() for log in mine] == [log.keys() for log in theirs]
    for a, b in zip(mine, theirs, strict=True):
        for name in b:
            if "time" not in name and "per_second" not in name:
                assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5, nan_ok=True), name
    assert (got - want).norm() <= 1e-5 * want.norm()


def test_adapters_are_trained_as_trls(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    pair = [
        trainer(cls, tmp_path / cls.__module__, peft_config=lora, beta=0.04) for cls in (trl.GRPOTrainer, ours.GRPOTrainer)
    ]
    pair[1].model.load_state_dict(pair[0].model.state_dict())
    for one in pair:
        one.current_gradient_accumulation_steps = 1
    assert_equal(*pair, around_the_policy(pair[0], batch(1), 1))
    with pytest.raises(ValueError, match="PROMPT_TUNING of peft"):
        prompts = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
        trainer(ours.GRPOTrainer, tmp_path, peft_config=prompts)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"loss_type": "sapo"}, "loss_type='sapo': supported are grpo, bnpo, dr_grpo, dapo, cispo, luspo"),
        ({"loss_type": "vespo"}, "loss_type='vespo'"),
        ({"loss_type": "cispo"}, "epsilon_high=0.2 of loss_type='cispo'"),
        ({"delta": 1.1}, r"delta=1.1: supported is more than 1 \+ epsilon_high = 1.2"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level='word'"),
        ({"beta": -0.1}, "beta=-0.1"),
        ({"epsilon": -0.1}, "epsilon=-0.1"),
        ({"entropy_coef": 0.1}, "without an entropy bonus"),
        ({"use_adaptive_entropy": True, "loss_type": "sapo"}, "loss_type='sapo'.*without an entropy bonus"),
    ],
    ids=str,
)
def test_an_option_that_cannot_be_expressed_is_refused_by_name(options, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        trainer(ours.GRPOTrainer, tmp_path, "no such model is looked for", **options)


def test_models_with_another_head_are_refused_by_name(tmp_path):
    biased = qwen2()
    biased.lm_head = torch.nn.Linear(32, len(WORDS))
    gemma = Gemma2ForCausalLM(Gemma2Config(**SHAPE, final_logit_softcapping=30.0))
    for model, says in [
        (biased, "bias=True.*: supported is a torch.nn.Linear without bias"),
        (gemma, "Gemma2ForCausalLM does something to its logits"),
        (qwen2().half(), "a head of torch.float16"),
    ]:
        with pytest.raises(ValueError, match=says):
            trainer(ours.GRPOTrainer, tmp_path, model)


def test_another_version_of_trl_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(ours, "version", lambda _: "1.17.0")
    with pytest.raises(RuntimeError, match="made for TRL 1.16, got 1.17.0"):
        trainer(ours.GRPOTrainer, tmp_path)
