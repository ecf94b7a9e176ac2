"""Planted faults: small changes to the sources, each of which breaks one promise, and the test that must notice it.

`check_claims.py` applies them one at a time and runs the tests; `python_tests/test_claims_apply.py` checks, without
applying any, that each still fits the tree. A fault changes what the program computes and not whether it runs: one that
breaks the build, or an import, proves nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# what is made anew: nothing; the objects of the files; everything, with other options
Build = Literal["python", "native", "cmake"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Edit:
    """Some text of a file, which must be there exactly once, and what takes its place."""

    file: str
    old: str
    new: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One broken promise."""

    name: str
    claim: str  # a key of ROWS or of ELSEWHERE
    says: str  # what is broken
    edits: tuple[Edit, ...] = ()
    tests: tuple[str, ...]  # pytest's names; the fault is caught when one of them fails
    build: Build = "python"
    options: tuple[str, ...] = ()  # of CMake, for "cmake"


# ------------------------------------------------------------------------------------------ claims

# The table of claims, wherever it stands, is known by its heads. A key stands for the row that holds its words.
TABLE_HEADS = ("claim", "state")
ROWS = {
    "ops": "every op against float64",
    "sampler = trainer": "rollout log-probs equal the trainer's bit for bit",
    "threads of a run": "a run gives the same records and weights on",
    "killed run": "a run killed by SIGKILL",
    "killed study": "a study killed by SIGKILL",
    "the paper's law": "the paper's law refitted",
    "TRL": "`GRPOTrainer` with our log-probs and loss",
    "lm-evaluation-harness": "lm-evaluation-harness with our rollout",
    "real problems": "answers to the real problems are scored",
    "sandbox": "a model's programs cannot reach the machine",
    "families": "parameter counts of twelve published sizes",
    "memory": "memory predicted before anything is allocated",
    "own advantage or loss": "an advantage estimator or a loss of your own",
    "one curve": "laws, figures and claims take the same points",
    "kept bits": "have the bits that were kept",
}

# Promises that the table has no row for: where they are made, and some words of them (white space does not count).
ELSEWHERE = {
    "GRPO step": ("grpo_engine/train/step.py", "moves the policy towards the better ones"),
    "where answers stop": ("docs/study.md", "a response stops at the tokenizer's end"),
    "chat prompts": ("grpo_engine/model/tokenizer.py", "followed by the head of the assistant's turn"),
    "order of problems": ("docs/study.md", "is a curriculum: easy to hard by pass rate"),
    "fewer problems": ("grpo_engine/tasks/subset.py", "with the mix of difficulty of all of them"),
    "other trainers' logs": ("docs/study.md", "`study import` reads verl's metrics"),
    "intervals": ("docs/laws.md", "## Intervals"),
    "held-out tests": ("docs/laws.md", "## Held-out tests"),
}


def table_rows(root: Path) -> dict[str, str]:
    """The rows of the table of claims: claim -> state.

    Args:
        root: of the tree; README.md and docs/*.md are looked through.

    Raises:
        ValueError: no table with these heads, or several.
    """
    head = re.compile(r"^\|\s*" + r"\s*\|\s*".join(TABLE_HEADS) + r"\s*\|$")
    found = []
    for page in [root / "README.md", *sorted((root / "docs").glob("*.md"))]:
        lines = page.read_text(encoding="utf-8").splitlines()
        found += [(page, lines[i + 2 :]) for i, line in enumerate(lines) if head.match(line)]
    if len(found) != 1:
        pages = ", ".join(str(page.relative_to(root)) for page, _ in found) or "none"
        raise ValueError(f"README.md and docs must have one table with the heads {TABLE_HEADS}, got {pages}")
    rows = {}
    for line in found[0][1]:
        if not line.startswith("|"):
            break
        claim, state = (cell.strip() for cell in line.strip().strip("|").split(" | "))
        rows[claim] = state
    return rows


def tested_rows(root: Path) -> list[str]:
    """The claims whose state begins with "tested"."""
    return [claim for claim, state in table_rows(root).items() if state.startswith("tested")]


def one_place(root: Path, edit: Edit) -> str | None:
    """None where an edit's old text is in its file exactly once; else what is wrong."""
    path = root / edit.file
    if not path.is_file():
        return f"{edit.file}: no such file"
    count = path.read_text(encoding="utf-8").count(edit.old)
    return None if count == 1 else f"{edit.file}: must have the text to change once, got it {count} times: {edit.old[:60]!r}"


# ------------------------------------------------------------------------------------------ faults

FAULTS = (
    # ---- ops: kernels -------------------------------------------------------------------------
    Fault(
        name="order-by-batch",
        claim="ops",
        says="rms_norm adds a row in another order when the batch has more than one row",
        edits=(
            Edit(
                file="csrc/ops/rms_norm_cpu.cpp",
                old="  const A mean = sum(squares) / static_cast<A>(a.D);\n",
                new="  A lanes[kLanes], in_order = 0;\n  store(squares, lanes, kLanes);\n"
                "  for (int i = 0; i < kLanes; ++i) in_order += lanes[i];\n"
                "  const A mean = (a.T > 1 ? in_order : sum(squares)) / static_cast<A>(a.D);\n",
            ),
        ),
        tests=("python_tests/ops/test_rms_norm.py::test_a_row_has_the_same_bits_alone_and_in_a_batch",),
        build="native",
    ),
    Fault(
        name="order-by-thread",
        claim="ops",
        says="rms_norm adds the first row of a thread's part from its end",
        edits=(
            Edit(
                file="csrc/ops/rms_norm_cpu.cpp",
                old="    a.residual ? forward_row<S, true>(a, t) : forward_row<S, false>(a, t);\n",
                new="    a.residual ? forward_row<S, true>(a, t) : forward_row<S, false>(a, t);\n"
                "    if (t == begin && begin > 0) {\n"
                "      using A = Arith<S>;\n"
                "      const S* x = static_cast<const S*>(a.residual ? a.sum : a.x) + t * a.D;\n"
                "      A squares = 0;\n"
                "      for (int64_t d = a.D; d-- > 0;) squares += to_arith(x[d]) * to_arith(x[d]);\n"
                "      const A mean = squares / static_cast<A>(a.D);\n"
                "      const A rstd = A(1) / static_cast<A>(::sqrt(static_cast<double>(mean) + a.eps));\n"
                "      for (int64_t d = 0; d < a.D; ++d) {\n"
                "        const A weight = to_arith(static_cast<const S*>(a.weight)[d]);\n"
                "        from_arith(to_arith(x[d]) * rstd * weight, static_cast<S*>(a.y) + t * a.D + d);\n"
                "      }\n"
                "    }\n",
            ),
        ),
        tests=("python_tests/ops/test_rms_norm.py::test_a_row_has_the_same_bits_alone_and_in_a_batch",),
        build="native",
    ),
    Fault(
        name="k3-sign",
        claim="ops",
        says="the k3 estimate of the KL divergence has the sign of k1 in its log-ratio",
        edits=(
            Edit(
                file="csrc/ops/policy_loss.cuh",
                old="return {exp_e - e.value - c.one, (c.one - exp_e) * e.inside};",
                new="return {exp_e + e.value - c.one, (c.one - exp_e) * e.inside};",
            ),
        ),
        tests=("python_tests/ops/test_policy_loss.py::test_loss_gradient_and_stats_match_the_reference",),
        build="native",
    ),
    Fault(
        name="masked-token-counts",
        claim="ops",
        says="a masked token counts in the length of its sequence",
        edits=(
            Edit(
                file="csrc/ops/policy_loss_cpu.cpp",
                old="count += mask[t];",
                new="count += mask[t] || !mask[t];",
            ),
        ),
        tests=(
            "python_tests/ops/test_policy_loss.py::test_masked_garbage_never_leaks",
            "python_tests/ops/test_policy_loss.py::test_loss_gradient_and_stats_match_the_reference",
        ),
        build="native",
    ),
    Fault(
        name="entropy-gradient-sign",
        claim="ops",
        says="the gradient of an entropy has the wrong sign",
        edits=(
            Edit(
                file="csrc/ops/gather_logprob_cpu.cpp",
                old="ge = V::set1(-g_entropy * scale);",
                new="ge = V::set1(g_entropy * scale);",
            ),
        ),
        tests=("python_tests/ops/test_gather_logprob.py::test_gradcheck",),
        build="native",
    ),
    Fault(
        name="uniform-of-the-next-position",
        claim="ops",
        says="a token is drawn with the uniform number of the next position",
        edits=(
            Edit(
                file="csrc/ops/sample_token_cpu.cpp",
                old="philox_uniform(a.seed[b], a.position[b])",
                new="philox_uniform(a.seed[b], a.position[b] + 1)",
            ),
        ),
        tests=("python_tests/ops/test_sample_token.py::test_the_uniform_is_that_of_seed_and_position",),
        build="native",
    ),
    Fault(
        name="norm-of-order-one",
        claim="ops",
        says="gradients are clipped by the sum of their magnitudes and not by the root of the sum of squares",
        edits=(
            Edit(file="csrc/ops/adamw_cpu.cpp", old="sums = fma(g, g, sums);", new="sums = sums + vmax(g, V::zero() - g);"),
            Edit(file="csrc/ops/adamw.cpp", old="total = std::sqrt(squares);", new="total = squares;"),
        ),
        tests=("python_tests/ops/test_adamw.py::test_a_step_is_as_good_as_torchs",),
        build="native",
    ),
    Fault(
        name="no-dual-clip",
        claim="ops",
        says="the dual clip is read and never applied",
        edits=(
            Edit(
                file="csrc/ops/policy_loss.cpp",
                old="c.args.dual_clip = dual_clip.value_or(std::numeric_limits<double>::infinity());",
                new="c.args.dual_clip = std::numeric_limits<double>::infinity();",
            ),
        ),
        tests=("python_tests/ops/test_policy_loss.py::test_dual_clip_bounds_the_loss_of_a_bad_token",),
        build="native",
    ),
    Fault(
        name="population-std",
        claim="ops",
        says="advantages are divided by the population's standard deviation although the unbiased one was asked for",
        edits=(
            Edit(
                file="csrc/ops/group_advantages.cuh",
                old="std_mode == AdvantageStd::unbiased ? G - 1 : G",
                new="std_mode == AdvantageStd::none ? G - 1 : G",
            ),
        ),
        tests=("python_tests/ops/test_group_advantages.py::test_matches_float64_reference",),
        build="native",
    ),
    Fault(
        name="another-instruction-set",
        claim="ops",
        says="GRPO_ENGINE_ISA is not read: the op tests of every instruction set run the best one",
        edits=(
            Edit(
                file="csrc/core/cpu_dispatch.cpp",
                old='const char* wanted = std::getenv("GRPO_ENGINE_ISA");',
                new="const char* wanted = nullptr;",
            ),
        ),
        tests=("python_tests/test_house_rules.py::test_a_wrong_instruction_set_is_an_error",),
        build="native",
    ),
    # ---- rollout ------------------------------------------------------------------------------
    Fault(
        name="seed-moves-with-preemption",
        claim="sampler = trainer",
        says="an answer's seed changes with every preemption",
        edits=(
            Edit(
                file="csrc/rollout/scheduler.cpp",
                old="plan.sample_seed.push_back(sequence.request().seeds[sequence.index() + g]);",
                new="plan.sample_seed.push_back(sequence.request().seeds[sequence.index() + g] + totals_.preemptions);",
            ),
        ),
        tests=("python_tests/rollout/test_rollout.py::test_scarce_pages_and_threads_change_no_bit",),
        build="native",
    ),
    Fault(
        name="two-write-one-page",
        claim="sampler = trainer",
        says="the last two answers that hold a page both write to it",
        edits=(
            Edit(
                file="csrc/rollout/scheduler.cpp",
                old="allocator_.refs(sequence.pages()[index]) > 1;",
                new="allocator_.refs(sequence.pages()[index]) > 2;",
            ),
        ),
        tests=("python_tests/rollout/test_rollout.py::test_logprobs_equal_the_trainers_bit_for_bit",),
        build="native",
    ),
    Fault(
        name="page-shared-too-far",
        claim="sampler = trainer",
        says="an answer takes over a page whose last token is of its sibling's answer",
        edits=(
            Edit(
                file="csrc/rollout/scheduler.cpp",
                old="const int64_t there = std::min(e->leader->computed(), request.prompt_length());",
                new="const int64_t there = std::min(e->leader->computed(), request.prompt_length() + 1);",
            ),
            Edit(
                file="csrc/rollout/sequence.cpp",
                old="num_tokens <= request_->prompt_length(),",
                new="num_tokens <= request_->prompt_length() + 1,",
            ),
        ),
        tests=("python_tests/rollout/test_rollout.py::test_scarce_pages_and_threads_change_no_bit",),
        build="native",
    ),
    Fault(
        name="rope-base-in-pages",
        claim="sampler = trainer",
        says="queries and keys in pages are turned with another base than in training",
        edits=(
            Edit(
                file="grpo_engine/rollout/model_runner.py",
                old="s.page_table, s.cu_query, s.kv_len, theta=layer.theta, eps=layer.eps,",
                new="s.page_table, s.cu_query, s.kv_len, theta=layer.theta / 2, eps=layer.eps,",
            ),
        ),
        tests=("python_tests/rollout/test_rollout.py::test_logprobs_equal_the_trainers_bit_for_bit",),
    ),
    Fault(
        name="nobody-compares",
        claim="sampler = trainer",
        says="a step does not compare the sampler's bits with the trainer's",
        edits=(
            Edit(
                file="grpo_engine/train/step.py",
                old="if on_policy and not _same_bits(recomputed):",
                new="if on_policy is None and not _same_bits(recomputed):",
            ),
        ),
        tests=("python_tests/run/test_train.py::test_a_sampler_and_a_trainer_that_disagree_end_the_run_and_name_the_token",),
    ),
    # ---- the step -----------------------------------------------------------------------------
    Fault(
        name="denominator-by-micro-batch",
        claim="GRPO step",
        says="a micro-batch is divided by its own tokens and not by the minibatch's",
        edits=(
            Edit(
                file="grpo_engine/train/loss.py",
                old="num_tokens=minibatch.num_tokens,",
                new="num_tokens=micro.num_response_tokens,",
            ),
        ),
        tests=("python_tests/train/test_batch.py::test_many_micro_batches_give_the_gradient_of_one",),
    ),
    Fault(
        name="masked-denominator",
        claim="GRPO step",
        says="a response that is masked still counts in the denominator of a mean over sequences",
        edits=(
            Edit(
                file="grpo_engine/train/batch.py",
                old="num_sequences=sum(m.num_sequences for m in micro),",
                new="num_sequences=size * G,",
            ),
        ),
        tests=("python_tests/train/test_loss.py::test_masked_responses_are_in_no_sum_and_in_no_denominator",),
    ),
    Fault(
        name="seeds-again",
        claim="GRPO step",
        says="a further round of sampling has the random numbers of the first",
        edits=(
            Edit(
                file="grpo_engine/train/step.py",
                old="sample(missing, round_)",
                new="sample(missing)",
            ),
        ),
        tests=("python_tests/train/test_grpo_step.py::test_further_rounds_replace_groups_of_equal_reward",),
    ),
    Fault(
        name="own-reference",
        claim="GRPO step",
        says="the reference of the KL term is the policy itself",
        edits=(
            Edit(
                file="grpo_engine/train/step.py",
                old="ref_logprob=logprobs_of(reference, micro)",
                new="ref_logprob=logprobs_of(policy, micro)",
            ),
        ),
        tests=("python_tests/train/test_grpo_step.py::test_a_step_repeats_itself_with_less_memory_too",),
    ),
    Fault(
        name="late-warm-up",
        claim="GRPO step",
        says="the warm-up of the learning rate begins one step late, with a rate of 0",
        edits=(
            Edit(
                file="grpo_engine/train/step.py",
                old="config.lr * min(1.0, step / config.warmup_steps)",
                new="config.lr * min(1.0, (step - 1) / config.warmup_steps)",
            ),
        ),
        tests=("python_tests/train/test_step.py::test_the_learning_rate_rises_from_the_first_step_and_then_stays",),
    ),
    Fault(
        name="rloo-with-itself",
        claim="own advantage or loss",
        says="RLOO's baseline holds the response itself",
        edits=(Edit(file="grpo_engine/train/advantages.py", old=" * (G / (G - 1))", new=""),),
        tests=("python_tests/train/test_advantages.py::test_an_estimator_is_its_formula",),
    ),
    Fault(
        name="own-loss-without-penalty",
        claim="own advantage or loss",
        says="an objective of one's own is trained without the KL penalty",
        edits=(
            Edit(
                file="grpo_engine/train/loss.py",
                old="    if config.kl_coef > 0:  #",
                new="    if config.kl_coef > 99:  #",
            ),
        ),
        tests=("python_tests/train/test_loss.py::test_an_objective_in_torch_gives_the_loss_and_gradient_of_the_op",),
    ),
    Fault(
        name="curve-of-whole-steps",
        claim="one curve",
        says="a figure leaves out the points that not every run has",
        edits=(
            Edit(
                file="grpo_engine/study/data.py",
                old="for at in points.values()]",
                new="for at in points.values() if len(at) == len(runs)]",
            ),
        ),
        tests=("python_tests/study/test_report.py::test_laws_figures_and_claims_take_the_same_points",),
    ),
    Fault(
        name="another-epsilon",
        claim="kept bits",
        says="the epsilon of the advantages is ten times as large",
        edits=(
            Edit(
                file="grpo_engine/train/advantages.py",
                old="std=config.std, eps=config.eps)",
                new="std=config.std, eps=10 * config.eps)",
            ),
        ),
        tests=("python_tests/test_bit_replay.py::test_a_run_has_the_bits_that_were_kept",),
    ),
    # ---- a run --------------------------------------------------------------------------------
    Fault(
        name="serial-build",
        claim="threads of a run",
        says="the extension is built without OpenMP: all that runs on several threads runs on one",
        options=("-DGRPO_ENGINE_OPENMP=OFF",),
        tests=(
            "python_tests/system/test_doctor.py::test_all_threads_of_torch_are_counted_in_a_kernel",
            "python_tests/run/test_train.py::test_one_two_and_three_threads_give_the_same_records_and_weights",
        ),
        build="cmake",
    ),
    Fault(
        name="rate-by-threads",
        claim="threads of a run",
        says="the last bits of the learning rate depend on the number of threads",
        edits=(
            Edit(
                file="grpo_engine/train/optimizer.py",
                old='        lr=lr,\n        betas=group["betas"],',
                new='        lr=lr * (1 + 1e-6 * torch.get_num_threads()),\n        betas=group["betas"],',
            ),
        ),
        tests=("python_tests/run/test_train.py::test_one_two_and_three_threads_give_the_same_records_and_weights",),
    ),
    # ---- a run that was killed ----------------------------------------------------------------
    Fault(
        name="no-moments",
        claim="killed run",
        says="a checkpoint holds no moments: they are zero after it is loaded",
        edits=(
            Edit(
                file="grpo_engine/train/checkpoint.py",
                old='yield f"{names[p]}:{kind}", torch.as_tensor(value).detach().contiguous()',
                new='value = 0 * value if "exp" in kind else value\n'
                '            yield f"{names[p]}:{kind}", torch.as_tensor(value).detach().contiguous()',
            ),
        ),
        tests=("python_tests/train/test_checkpoint.py::test_resumed_steps_are_bit_identical",),
    ),
    Fault(
        name="records-cut-late",
        claim="killed run",
        says="a resumed run keeps one record that was written after its checkpoint",
        edits=(
            Edit(
                file="grpo_engine/records/jsonl.py",
                old="            self._file.truncate(truncate_to)\n",
                new='            with open(self.path, "rb") as read:\n                read.seek(truncate_to)\n'
                "                truncate_to += len(read.readline())\n            self._file.truncate(truncate_to)\n",
            ),
        ),
        tests=(
            "python_tests/run/test_train.py::test_killed_three_times_and_resumed_gives_identical_records_and_weights",
            "python_tests/records/test_records.py::test_truncating_puts_the_file_back_byte_for_byte",
        ),
    ),
    Fault(
        name="batch-repeated",
        claim="killed run",
        says="a resumed run trains once more on the prompts of the step before it",
        edits=(
            Edit(
                file="grpo_engine/run/run.py",
                old='    counters = Counters(**state.meta["counters"]) if state is not None else Counters()\n',
                new='    counters = Counters(**state.meta["counters"]) if state is not None else Counters()\n'
                "    counters.prompts_seen = max(0, counters.prompts_seen - c.batch.prompts)\n",
            ),
        ),
        tests=(
            "python_tests/run/test_train.py::"
            "test_a_bfloat16_run_repeats_itself_resumed_and_with_checkpointed_activations[cpu]",
        ),
    ),
    # ---- a study that was killed --------------------------------------------------------------
    Fault(
        name="finished-cell-again",
        claim="killed study",
        says="a study runs its finished cells again",
        edits=(
            Edit(
                file="grpo_engine/study/jobs.py",
                old="wanted = [c for c in the_plan.cells if c.name not in skipped]",
                new="wanted = list(the_plan.cells)",
            ),
        ),
        tests=("python_tests/study/test_run.py::test_a_second_run_does_nothing",),
    ),
    Fault(
        name="missing-cell-done",
        claim="killed study",
        says="a cell that wrote no summary counts as done",
        edits=(
            Edit(
                file="grpo_engine/study/run.py",
                old="ended = code == 0 and (t.job.cell is None or records.is_complete(folder / t.job.cell.folder))",
                new="ended = code == 0",
            ),
        ),
        tests=("python_tests/study/test_run.py::test_a_cell_that_ends_without_a_summary_has_failed",),
    ),
    Fault(
        name="begun-cell-done",
        claim="killed study",
        says="a cell that was begun counts as finished when the study is started again",
        edits=(
            Edit(
                file="grpo_engine/records/records.py",
                old="return (Path(run_dir) / SUMMARY_FILE).is_file() and (Path(run_dir) / RUN_FILE).is_file()",
                new="return (Path(run_dir) / RUN_FILE).is_file()",
            ),
        ),
        tests=("python_tests/study/test_run.py::test_a_study_killed_twice_and_started_again_has_the_same_records",),
    ),
    # ---- laws ---------------------------------------------------------------------------------
    Fault(
        name="natural-logs",
        claim="the paper's law",
        says="the intercept of the law that is shown with decimal logs is that with natural ones",
        edits=(Edit(file="grpo_engine/study/laws/forms.py", old="return e / LN10", new="return e"),),
        tests=("python_tests/study/test_fit.py::test_published_fit_of_base_models",),
    ),
    Fault(
        name="steps-for-prompts",
        claim="the paper's law",
        says="the reader of digitised figures takes the number of steps for the number of prompts",
        edits=(
            Edit(
                file="grpo_engine/study/importers/digitized.py",
                old="""seen = whole(cells["D"], f"{where} 'D'")""",
                new="""seen = whole(cells["step"], f"{where} 'D'")""",
            ),
        ),
        tests=("python_tests/study/test_fit.py::test_published_fit_of_base_models",),
    ),
    Fault(
        name="narrow-intervals",
        claim="intervals",
        says="the intervals of the bootstrap are a fifth too narrow",
        edits=(
            Edit(
                file="grpo_engine/evaluate/intervals.py",
                old="    return low, high\n",
                new="    return low + 0.1 * (high - low), high - 0.1 * (high - low)\n",
            ),
        ),
        tests=("python_tests/study/test_bootstrap.py",),
    ),
    Fault(
        name="narrow-profiles",
        claim="intervals",
        says="the profile intervals of a curve's law are a fifth too narrow",
        edits=(
            Edit(
                file="grpo_engine/study/laws/bootstrap.py",
                old="return factor * float(stdtrit(freedom, (1 + confidence) / 2))",
                new="return 0.8 * factor * float(stdtrit(freedom, (1 + confidence) / 2))",
            ),
        ),
        tests=("python_tests/study/test_bootstrap.py",),
    ),
    Fault(
        name="target-in-the-fit",
        claim="held-out tests",
        says="the largest size, which is to be predicted, is among the sizes that the law is fitted to",
        edits=(
            Edit(
                file="grpo_engine/study/laws/holdout.py",
                old="below = keep(curves, [c.kind == target.kind and c.params < top for c in curves])",
                new="below = keep(curves, [c.kind == target.kind and c.params <= top for c in curves])",
            ),
        ),
        tests=("python_tests/study/test_holdout.py::test_the_target_is_not_looked_at",),
    ),
    Fault(
        name="late-points-in-the-fit",
        claim="held-out tests",
        says="the late steps of a curve, which are to be predicted, are among the points that its law is fitted to",
        edits=(
            Edit(
                file="grpo_engine/study/laws/holdout.py",
                old="head, tail = round(first * n), max(1, round(last * n))",
                new="head, tail = n, max(1, round(last * n))",
            ),
        ),
        tests=("python_tests/study/test_holdout.py::test_the_target_is_not_looked_at",),
    ),
    Fault(
        name="log-line-dropped",
        claim="other trainers' logs",
        says="the last row of a CSV file is not read",
        edits=(
            Edit(
                file="grpo_engine/study/importers/csv_file.py",
                old="    return header, rows\n",
                new="    return header, rows[:-1]\n",
            ),
        ),
        tests=("python_tests/study/test_importers.py::test_csv_fills_in_what_follows",),
    ),
    Fault(
        name="killed-steps-counted",
        claim="other trainers' logs",
        says="steps of a verl run that a kill threw away stay, where its log does not come to them again",
        edits=(
            Edit(
                file="grpo_engine/study/importers/verl.py",
                old="                del steps[later]\n",
                new="                pass\n",
            ),
        ),
        tests=("python_tests/study/test_importers.py::test_verl_run_that_was_resumed",),
    ),
    # ---- integrations -------------------------------------------------------------------------
    Fault(
        name="another-normalisation",
        claim="TRL",
        says="TRL's bnpo is a mean over sequences and not over tokens",
        edits=(
            Edit(
                file="grpo_engine/integrations/trl.py",
                old='"bnpo": {"aggregation": "token_mean"}',
                new='"bnpo": {"aggregation": "sequence_mean"}',
            ),
        ),
        tests=("python_tests/integrations/test_integrations_trl.py::test_ten_steps_are_trls[bnpo-token-0.0]",),
    ),
    Fault(
        name="micro-batches-of-a-step",
        claim="TRL",
        says="TRL's dapo divides by the tokens of a micro-batch times the micro-batches, whatever the rollout held",
        edits=(
            Edit(
                file="grpo_engine/integrations/trl.py",
                old="return loss / (tokens * micro_batches / a.steps_per_generation if self.model.training else tokens)",
                new="return loss / (tokens * micro_batches if self.model.training else tokens)",
            ),
        ),
        tests=("python_tests/integrations/test_integrations_trl.py::test_ten_steps_are_trls[dapo-token-0.0]",),
    ),
    Fault(
        name="mean-log-likelihood",
        claim="lm-evaluation-harness",
        says="the log-likelihood of a continuation is the mean over its tokens and not their sum",
        edits=(
            Edit(
                file="grpo_engine/integrations/lm_eval.py",
                old="float(score.double().sum())",
                new="float(score.double().mean())",
            ),
        ),
        tests=("python_tests/integrations/test_integrations_lm_eval.py::test_log_likelihoods_are_those_of_hflm",),
    ),
    # ---- real problems ------------------------------------------------------------------------
    Fault(
        name="several-answers",
        claim="real problems",
        says="several answers of which one is right are worth as much as the right one",
        edits=(
            Edit(
                file="grpo_engine/rewards/answers.py",
                old="return False  # several answers answer no one question",
                new="return any(_same(gold, item) for item in several.items)",
            ),
        ),
        tests=("python_tests/rewards/test_math.py",),
    ),
    Fault(
        name="suite-forgets",
        claim="real problems",
        says="a suite that was killed takes a problem with some of its answers for a finished one",
        edits=(
            Edit(
                file="grpo_engine/evaluate/suite.py",
                old="for position, of in by_problem.items() if len(of) == samples for s, a in of.items()}",
                new="for position, of in by_problem.items() if len(of) <= samples for s, a in of.items()}",
            ),
        ),
        tests=("python_tests/evaluate/test_suite.py::test_a_problem_with_some_of_its_answers_gets_all_of_them",),
    ),
    Fault(
        name="suite-draws-anew",
        claim="real problems",
        says="a suite that was killed answers what is left with the seeds of the first problems",
        edits=(
            Edit(
                file="grpo_engine/evaluate/suite.py",
                old="seeds=seeds[chosen].flatten()",
                new="seeds=(seeds[: len(chosen)] if done else seeds[chosen]).flatten()",
            ),
        ),
        tests=("python_tests/evaluate/test_suite.py::test_a_suite_that_was_killed_goes_on_and_gives_the_same_table",),
    ),
    Fault(
        name="network-in-the-sandbox",
        claim="sandbox",
        says="a model's program has the machine's network",
        edits=(
            Edit(
                file="grpo_engine/rewards/sandbox.py",
                old="_libc.unshare(CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWIPC)",
                new="_libc.unshare(CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWIPC)",
            ),
            Edit(file="grpo_engine/rewards/sandbox.py", old="    if abi >= 4:\n", new="    if abi >= 99:\n"),
            Edit(file="grpo_engine/rewards/sandbox.py", old="    if abi >= 6:\n", new="    if abi >= 99:\n"),
        ),
        tests=("python_tests/rewards/test_code.py::test_what_the_kernel_grants_is_in_force",),
    ),
    Fault(
        name="objects-in-the-judge",
        claim="sandbox",
        says="the program's names hide those of Python in its tests",
        edits=(
            Edit(
                file="grpo_engine/rewards/sandbox.py",
                old='if not hasattr(builtins, name) and name[:2] != "__"}',
                new='if name[:2] != "__"}',
            ),
        ),
        tests=(
            "python_tests/rewards/test_humaneval.py::"
            "test_a_hostile_program_is_worth_nothing_and_leaves_no_trace[names of builtins]",
        ),
    ),
    # ---- models -------------------------------------------------------------------------------
    Fault(
        name="gate-and-up-swapped",
        claim="families",
        says="gate and up of a checkpoint are read in each other's place",
        edits=(Edit(file="grpo_engine/model/weights.py", old='for x in ("gate", "up")', new='for x in ("up", "gate")'),),
        tests=("python_tests/model/test_families.py::test_logits_equal_transformers",),
    ),
    Fault(
        name="no-head-norm",
        claim="families",
        says="Qwen3's norm of queries and keys is left out",
        edits=(
            Edit(
                file="grpo_engine/model/decoder.py",
                old="        if norm is not None:\n",
                new="        if norm is not None and norm.dim() > 1:\n",
            ),
        ),
        tests=("python_tests/model/test_families.py::test_logits_equal_transformers",),
    ),
    Fault(
        name="tied-head-counted-twice",
        claim="families",
        says="a tied head is counted once more",
        edits=(
            Edit(
                file="grpo_engine/train/footprint.py",
                old="(1 if model.tie_word_embeddings else 2)",
                new="2",
            ),
        ),
        tests=("python_tests/model/test_families.py::test_parameters_of_published_models_are_those_of_transformers",),
    ),
    Fault(
        name="no-optimizer-in-memory",
        claim="memory",
        says="the prediction of memory forgets the optimizer's moments",
        edits=(
            Edit(
                file="grpo_engine/train/footprint.py",
                old='"optimizer": 2 * wide + master}',
                new='"optimizer": master}',
            ),
        ),
        tests=("python_tests/study/test_forecast.py::test_memory_at_the_7b_shape_is_what_the_documents_count",),
    ),
    Fault(
        name="activations-of-half-the-layer",
        claim="memory",
        says="the prediction of memory counts gate or up, but not both",
        edits=(
            Edit(
                file="grpo_engine/train/footprint.py",
                old="(2 * D + (2 * H + 2 * K) * E + 2 * F)",
                new="(2 * D + (2 * H + 2 * K) * E + F)",
            ),
        ),
        tests=("python_tests/train/test_footprint.py::test_activations_are_what_autograd_keeps",),
    ),
    # ---- prompts and problems -----------------------------------------------------------------
    Fault(
        name="stop-token-left-out",
        claim="where answers stop",
        says="of several tokens to stop at only the first is taken",
        edits=(
            Edit(
                file="grpo_engine/model/tokenizer.py",
                old="for i in ids if isinstance(ids, list) else [ids]:",
                new="for i in ids[:1] if isinstance(ids, list) else [ids]:",
            ),
        ),
        tests=("python_tests/model/test_tokenizer.py::test_stops",),
    ),
    Fault(
        name="no-generation-prompt",
        claim="chat prompts",
        says="a chat prompt ends with the user's turn",
        edits=(
            Edit(
                file="grpo_engine/model/tokenizer.py",
                old="add_generation_prompt=not goes_on",
                new="add_generation_prompt=False",
            ),
        ),
        tests=("python_tests/model/test_tokenizer.py::test_prompts",),
    ),
    Fault(
        name="curriculum-in-file-order",
        claim="order of problems",
        says="a curriculum takes its problems in the order of their file",
        edits=(
            Edit(
                file="grpo_engine/load.py",
                old="train=train if config.shuffle else sorted(train, key=difficulty)",
                new="train=train if config.shuffle else sorted(train, key=lambda p: 0.0)",
            ),
        ),
        tests=("python_tests/tasks/test_files.py::test_a_curriculum_and_its_subsets_in_every_format",),
    ),
    Fault(
        name="subset-without-strata",
        claim="fewer problems",
        says="a subset is drawn without regard to difficulty",
        edits=(
            Edit(
                file="grpo_engine/tasks/subset.py",
                old="key=lambda i: (difficulty(problems[i]), ties[i])",
                new="key=lambda i: (0.0, ties[i])",
            ),
        ),
        tests=("python_tests/tasks/test_subset.py::test_a_draw_has_the_mix_of_the_whole_and_its_order",),
    ),
)
