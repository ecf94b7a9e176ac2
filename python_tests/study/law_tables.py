"""Tables of evaluations that follow a planted law, for testing fits."""

import numpy as np
import pyarrow as pa

from grpo_engine.records import table

SIZES = {"xs": 2e5, "s": 6e5, "m": 2e6, "l": 6e6, "xl": 2e7}
K_MAX, N0 = 0.15, 1e6
TOKENS = 100  # a prompt
BATCH = 64  # prompts a step
STEPS = sorted({round(100 ** (i / 16)) for i in range(17)})


def k_saturating(n):
    return K_MAX * n / (n + N0)


def law_table(*, sizes=SIZES, steps=STEPS, runs=1, noise=0.0, drift=0.0, seed=0, kinds=("base",), k=k_saturating,
              start=0.9, **columns):  # fmt: skip
    """One row a size, kind, run and step. The loss at the first prompt is `start`, less 0.1 a size, less 0.05 for
    instruct; `drift` is the standard deviation over runs of a deviation that grows like log step to the last one."""
    rng = np.random.default_rng(seed)
    rows = []
    for kind in kinds:
        for i, (size, n) in enumerate(sizes.items()):
            for run in range(runs):
                slow = rng.normal(0, drift) if drift else 0.0
                for step in (0, *steps):
                    seen = BATCH * step
                    initial = start - 0.1 * i - (0.05 if kind == "instruct" else 0.0)
                    loss = initial * float(max(step, 1)) ** -k(n)
                    loss += slow * np.log(max(step, 1)) / np.log(steps[-1]) + (rng.normal(0, noise) if noise else 0.0)
                    row = dict.fromkeys(table.TABLE_COLUMNS) | {
                        "run_id": f"{size}-{kind}-{run}", "method": "grpo", "kind": kind, "size": size, "tau": 1.0,
                        "params_non_embedding": int(n), "group_size": 8, "step": step, "prompts_seen": seen,
                        "trained_tokens": TOKENS * seen, "compute_6nt": 6.0 * n * TOKENS * seen, "eval_set": "chain",
                        "in_domain": True, "mode": "sample", "temperature": 0.7, "pass1": 1 - loss, "loss": loss,
                    }  # fmt: skip
                    rows.append(row | columns)
    return pa.Table.from_pylist(rows, schema=table.table_schema())
