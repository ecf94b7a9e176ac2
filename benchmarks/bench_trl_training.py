"""A training step of TRL's GRPOTrainer with our log-probs and our loss, beside its own; the model is transformers'."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the repository, however this file is started
import tempfile  # noqa: E402

import torch  # noqa: E402

from benchmarks import peers  # noqa: E402
from benchmarks.shapes import (  # noqa: E402
    LADDER_VOCABULARY,
    equal_lengths,
    ladder_config,
    log_normal_lengths,
    sequence_flops,
)
from benchmarks.table import Case, main  # noqa: E402
from grpo_engine.model import weights  # noqa: E402
from grpo_engine.model.decoder import Model  # noqa: E402

PROMPT, ANSWER = 24, 24  # tokens, the answers' on average
LR, TEMPERATURE, BETA = 1e-6, 0.9, 0.04  # the weights hardly move while they are timed
TOLERANCE = 2e-5  # loss and gradient norm after some steps
NOTE = (
    "Log-probs of given answers, loss, backward, clipping and AdamW of one batch, off-policy and with a reference; no "
    "sampling, which is transformers' own in both. Losses and gradient norms agree before anything is timed. The model is "
    "torch's, whose bits change with the number of threads."
)


class Steps:
    """Steps of a trainer on one batch, as `training_step` and the optimizer take them."""

    def __init__(self, trainer, batch):
        self.trainer, self.batch = trainer, batch
        self.model = trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR, fused=True)

    def gradients(self):
        self.model.zero_grad()
        loss = self.trainer.compute_loss(self.model, self.batch)
        loss.backward()
        return [loss.detach(), *(p.grad for p in self.model.parameters())]

    def step(self):
        loss = self.gradients()[0]
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return torch.stack([loss, norm])


def make(trainer_class, model_folder, longest):
    import transformers
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from trl import GRPOConfig

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    words = Tokenizer(models.WordLevel({"w0": 0}, unk_token="w0"))
    config = GRPOConfig(
        output_dir=f"{model_folder}/out", use_cpu=True, bf16=False, gradient_checkpointing=False,
        max_completion_length=longest, temperature=TEMPERATURE, beta=BETA,
        epsilon_high=0.28, report_to="none", model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip
    return trainer_class(
        model=str(model_folder), reward_funcs=lambda completions, **_: [0.0] * len(completions), args=config,
        train_dataset=Dataset.from_dict({"prompt": ["w0"]}),
        processing_class=transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", pad_token="w0"),
    )  # fmt: skip


def batch_of(lengths, vocabulary):
    """Prompts of one length and completions padded to the longest."""
    N, T = len(lengths), max(lengths)
    keep = (torch.arange(T) < torch.tensor(lengths)[:, None]).long()
    logprob = -torch.rand(N, T) * 4
    return {
        "prompt_ids": torch.randint(1, vocabulary, (N, PROMPT)),
        "prompt_mask": torch.ones(N, PROMPT, dtype=torch.int64),
        "completion_ids": torch.randint(1, vocabulary, (N, T)),
        "completion_mask": keep,
        "advantages": torch.randn(N),
        "old_per_token_logps": logprob,
        "ref_per_token_logps": logprob + 0.3 * torch.randn(N, T),
        "num_items_in_batch": keep.sum(),
    }  # fmt: skip


def case(size, answers, kind, vocabulary):
    from trl import GRPOTrainer as Theirs

    from grpo_engine.integrations.trl import GRPOTrainer as Ours

    lengths = (equal_lengths if kind == "equal" else log_normal_lengths)(answers, ANSWER)
    model = Model(ladder_config(size, vocabulary=vocabulary)).init_weights(1, std=None)
    batch = batch_of(lengths, vocabulary)
    with tempfile.TemporaryDirectory() as folder:
        weights.save_checkpoint(model, Path(folder) / "model")
        ours, theirs = (Steps(make(trainer, Path(folder) / "model", max(lengths)), batch) for trainer in (Ours, Theirs))
    return Case(
        name=f"{size}, vocabulary {vocabulary:,}, {answers} answers, {kind} lengths (longest {max(lengths)}, "
        f"{sum(lengths)} tokens)",
        ours=ours.step,
        peers={"TRL": theirs.step},
        tolerance=TOLERANCE,
        bits=ours.gradients,
        flops=3.0 * sequence_flops(model, [PROMPT + n - 1 for n in lengths], head_rows=sum(lengths)),
        derived={"tokens/s": lambda seconds: sum(lengths) / seconds},
    )


def cases(quick):
    if not peers.installed("trl"):
        print("trl_training: trl is not installed", file=sys.stderr)
        return
    for size, answers, vocabulary in (
        ("0.2M", 64, LADDER_VOCABULARY),
        ("0.8M", 64, LADDER_VOCABULARY),
        ("0.2M", 32, 32_000),
    ):
        for kind in ("equal", "log-normal")[quick:]:
            yield case(size, answers, kind, vocabulary)


if __name__ == "__main__":
    main("trl_training", cases, whole=True, unit="ms", note=NOTE)
