"""TRL's GRPOTrainer with our log-probs and our loss: one import is another.

    pip install 'grpo_engine[trl]'
    python examples/trl_trainer.py Qwen/Qwen2.5-0.5B-Instruct    # a folder, or a name on the hub
    python examples/trl_trainer.py                               # a random model of two layers, to see it run

Everything else of a script for TRL stays as it is.
"""

import sys
import tempfile
from pathlib import Path

from datasets import Dataset
from trl import GRPOConfig

from grpo_engine.integrations.trl import GRPOTrainer  # in place of: from trl import GRPOTrainer

PROMPTS = ["Name a colour.", "Name a fruit.", "Name a river.", "Name a city."]


def brief(completions: list[str], **_) -> list[float]:
    """TRL's kind of reward: a number for each text; here, few characters are better."""
    return [-len(text) / 100 for text in completions]


def random_model(folder: Path) -> str:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from grpo_engine.model.tokenizer import train_bpe

    vocabulary = train_bpe(PROMPTS, vocab_size=300, folder=folder).vocab_size
    shape = Qwen2Config(vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                        num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    Qwen2ForCausalLM(shape).save_pretrained(folder)
    return str(folder)


def main(model: str | None = None, *, steps: int = 5) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=f"{folder}/out", max_steps=steps, learning_rate=1e-5, per_device_train_batch_size=8,
            num_generations=4, max_completion_length=16, loss_type="dapo", epsilon_high=0.28, beta=0.001, logging_steps=1,
            save_strategy="no", report_to="none", bf16=False, model_init_kwargs={"dtype": "float32"},
        )  # fmt: skip
        trainer = GRPOTrainer(
            model or random_model(Path(folder) / "model"), reward_funcs=brief, args=config,
            train_dataset=Dataset.from_dict({"prompt": PROMPTS * 4}),
        )  # fmt: skip
        trainer.train()
        return trainer.state.log_history


if __name__ == "__main__":
    main(*sys.argv[1:])
