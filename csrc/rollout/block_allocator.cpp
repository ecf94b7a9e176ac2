namespace grpo_engine {}
