"""python -m grpo_engine: the same as the command grpo-engine."""

from grpo_engine.cli import main

if __name__ == "__main__":
    main()
