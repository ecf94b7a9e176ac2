import io
import itertools
import json

import pytest
from rich.console import Console
from typer.testing import CliRunner

from grpo_engine.cli import app
from grpo_engine.config import RunConfig, load_run_config
from grpo_engine.study import forecast, plan_view
from grpo_engine.study.design import AxesConfig, SizeConfig, StudyConfig, load_study, plan, save_study

RUN = {"steps": 10, "batch": {"prompts": 8, "group_size": 4}, "loss": {"kl_coef": 0.0}}


def study(**change):
    return StudyConfig(
        **(
            {
                "name": "demo",
                "run": RUN,
                "sizes": {"xs": SizeConfig(run={"optimizer.lr": 2e-4}), "s": SizeConfig(run={"optimizer.lr": 1e-4})},
                "axes": (AxesConfig(name="main", kinds=("base", "instruct"), seeds=(0, 1), control=("base",)),),
            }
            | change
        )
    )


def test_the_cells_are_the_full_product_and_the_controls():
    cells = plan(study()).cells
    grpo = [(c.size, c.kind, c.seed) for c in cells if c.method == "grpo"]
    assert grpo == list(itertools.product(("xs", "s"), ("base", "instruct"), (0, 1)))
    assert [(c.size, c.kind, c.seed) for c in cells if c.method == "pretrain"] == [
        ("xs", "base", 0), ("xs", "base", 1), ("s", "base", 0), ("s", "base", 1),
    ]  # fmt: skip
    assert len({c.id for c in cells}) == len({c.name for c in cells}) == 12


def test_a_cell_holds_its_resolved_configuration():
    cell = next(c for c in plan(study()).cells if c.name == "s-instruct-seed1")
    assert cell.config.model.size == "s" and cell.config.model.kind == "instruct"
    assert (cell.config.seed, cell.config.optimizer.lr, cell.config.batch.group_size) == (1, 1e-4, 4)
    assert cell.folder == f"cells/s-instruct-seed1.{cell.id[:8]}"


def test_the_overrides_make_the_configuration():
    for cell in plan(study()).cells:
        assert load_run_config(None, cell.overrides) == cell.config
    assert load_run_config(None, []) == RunConfig()


def test_prompts_of_a_kind_are_for_the_cells_of_that_kind():
    prompts = {
        "system_prompt": "Think.",
        "prompt_template": "Q: {prompt}",
        "chat_template_kwargs": {"enable_thinking": False},
    }
    sizes = {"7B": SizeConfig(base="Qwen2.5-7B", instruct="Qwen2.5-7B-Instruct")}
    cells = plan(
        study(run=RUN | {"model": prompts}, sizes=sizes, axes=(AxesConfig(name="main", kinds=("base", "instruct")),))
    ).cells
    for cell in cells:
        m = cell.config.model
        assert m.system_prompt == "Think."
        assert (m.prompt_template, m.chat_template_kwargs) == (
            ("Q: {prompt}", {}) if m.kind == "base" else (None, {"enable_thinking": False})
        )
        assert load_run_config(None, cell.overrides) == cell.config
    assert {cell.kind for cell in cells} == {"base", "instruct"}


def test_ids_depend_on_what_is_computed_and_not_on_names():
    before = {c.name: c.id for c in plan(study()).cells}
    again = {c.name: c.id for c in plan(study(name="another")).cells}
    longer = {c.name: c.id for c in plan(study(run=RUN | {"steps": 11})).cells}
    assert before == again
    assert not set(before.values()) & set(longer.values())


def test_reuse_limits_the_number_of_different_problems():
    axes = (AxesConfig(name="reuse", sizes=("s",), tau=(1, 2, 5, 100)),)
    cells = plan(study(axes=axes)).cells
    assert [c.config.task.train_problems for c in cells] == [None, 40, 16, 1]
    assert [c.name for c in cells] == ["s-base-seed0", "s-base-tau2-seed0", "s-base-tau5-seed0", "s-base-tau100-seed0"]


def test_blocks_that_meet_share_the_cell():
    axes = (
        AxesConfig(name="main", kinds=("base",)),
        AxesConfig(name="group", sizes=("s",), group_size=(2, 4)),
        AxesConfig(name="reuse", sizes=("s",), tau=(1, 2)),
    )
    cells = plan(study(axes=axes)).cells
    assert {c.name: c.axes for c in cells} == {
        "xs-base-seed0": ("main",),
        "s-base-seed0": ("main", "group", "reuse"),
        "s-base-G2-seed0": ("group",),
        "s-base-tau2-seed0": ("reuse",),
    }


def test_two_cells_of_one_name_are_refused():
    axes = (AxesConfig(name="a"), AxesConfig(name="b", run={"optimizer.lr": 1.0}))
    with pytest.raises(ValueError, match="two different cells would be called 'xs-base-seed0'"):
        plan(study(axes=axes))


def test_replaced_groups_are_refused_since_runs_would_not_meet_at_equal_prompts():
    with pytest.raises(ValueError, match="xs-base-seed0: batch.sampling_rounds must be 1 in a study, got 3"):
        plan(study(axes=(AxesConfig(name="a", run={"batch.sampling_rounds": 3}),)))


def test_models_come_base_first_and_only_where_the_ladder_makes_them(tmp_path):
    models = [n.name for n, _ in plan(study()).models]
    assert models == [f"{size}-{kind}-{seed}" for size in ("xs", "s") for seed in (0, 1) for kind in ("base", "instruct")]
    axes = (AxesConfig(kinds=("instruct",), seeds=(0, 1)),)
    assert [n.name for n, _ in plan(study(axes=axes)).models] == models  # an instruct model is made from its base


def test_each_seed_has_a_model_of_its_own_unless_the_block_names_one():
    axes = (
        AxesConfig(name="main", sizes=("s",), seeds=(0, 1), control=("base",)),
        AxesConfig(name="group", sizes=("s",), seeds=(0, 3), run={"model.seed": 0}, group_size=(4, 8)),
    )
    the_plan = plan(study(axes=axes))
    found = {c.name: (c.config.seed, c.config.model.seed, c.needs.name) for c in the_plan.cells}
    assert found == {
        "s-base-seed0": (0, 0, "s-base-0"), "s-base-seed1": (1, 1, "s-base-1"),
        "s-base-control-seed0": (0, 0, "s-base-0"), "s-base-control-seed1": (1, 1, "s-base-1"),
        "s-base-seed3": (3, 0, "s-base-0"), "s-base-G8-seed0": (0, 0, "s-base-0"), "s-base-G8-seed3": (3, 0, "s-base-0"),
    }  # fmt: skip
    assert [n.name for n, _ in the_plan.models] == ["s-base-0", "s-base-1"]


def test_a_folder_of_weights_needs_no_preparation(tmp_path):
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 64, "hidden_size": 32,
        "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "max_position_embeddings": 64,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    sizes = {"tiny": SizeConfig(base=str(tmp_path), params_nominal=1e4)}
    the_plan = plan(study(sizes=sizes, axes=(AxesConfig(),)))
    (cell,) = the_plan.cells
    assert the_plan.models == () and cell.needs is None
    assert cell.config.model.path == str(tmp_path) and cell.config.model.params_nominal == 1e4
    per_layer = (32 * 32 + 32) + 2 * (32 * 16 + 16) + 32 * 32 + 3 * 32 * 48 + 2 * 32
    assert forecast.num_params(cell.config.model) == 2 * per_layer + 32
    with pytest.raises(ValueError, match="size tiny has no folder for its instruct model"):
        study(sizes=sizes, axes=(AxesConfig(kinds=("instruct",)),))
    with pytest.raises(ValueError, match="size tiny is a folder of weights"):
        study(sizes=sizes, axes=(AxesConfig(control=("base",)),))


def test_costs_rise_with_size_and_count_the_phases_that_there_are():
    cells = {c.name: c for c in plan(study(run=RUN | {"evaluation": {"count": 0}})).cells}
    xs, s = cells["xs-base-seed0"].cost, cells["s-base-seed0"].cost
    assert s.flops > xs.flops and s.seconds > xs.seconds and s.trained_tokens == xs.trained_tokens
    control = cells["s-base-control-seed0"].cost
    assert set(k for k, v in s.phases.items() if v) == {"prefill", "decode", "forward", "backward"}
    assert set(k for k, v in control.phases.items() if v) == {"forward", "backward"}
    assert s.flops == sum(s.phases.values()) and "reference" not in s.memory


def test_a_study_survives_its_file(tmp_path):
    save_study(study(), tmp_path / "study.yaml")
    again = load_study(tmp_path / "study.yaml")
    assert again == study() and plan(again) == plan(study())


@pytest.mark.parametrize(
    "override, message",
    [
        ("nmae=x", r"nmae: unknown key; known keys here: axes, estimate, name, run, sizes"),
        ("run.optimizer.eps=-1", r"cell xs-base.*\n.*optimizer.eps: .*greater than 0, got -1"),
        ("run.stesp=5", r"stesp: unknown key"),
        ("sizes.xs.run={optimizer.rl: 1}", r"cell xs-base.*\n.*optimizer.rl: unknown key"),
        ("axes=[{sizes: [huge]}]", r"sizes huge unknown; this study has xs, s"),
        ("axes=[{kinds: [chat]}]", r"axes.0.kinds.0: .*'base' or 'instruct', got 'chat'"),
        ("axes=[{seeds: [1, 1]}]", r"seeds holds a value twice: \[1, 1\]"),
        ("axes=[{tau: [0.5]}]", r"axes.0.tau.0: .*greater than or equal to 1, got 0.5"),
        ("axes=[{seeds: []}]", r"seeds must not be empty"),
        ("axes=[{control: [chat]}]", r"axes.0.control.0: .*got 'chat'"),
        ("axes=[]", r"axes must hold at least one block"),
    ],
)
def test_a_wrong_study_is_named(tmp_path, override, message):
    save_study(study(), tmp_path / "study.yaml")
    with pytest.raises(ValueError, match=message):
        load_study(tmp_path / "study.yaml", [override])


def test_an_unknown_preset_is_named():
    with pytest.raises(ValueError, match="no preset 'smok'"):
        load_study("smok")


@pytest.mark.parametrize("preset", ["smoke", "micro"])
def test_the_embedded_presets_resolve(preset):
    the_plan = plan(load_study(preset))
    assert {c.kind for c in the_plan.cells} == {"base", "instruct"}
    assert any(c.method == "pretrain" for c in the_plan.cells)
    assert len(the_plan.study.sizes) >= 3


def test_the_paper_preset_is_the_54_runs():
    the_plan = plan(load_study("paper"))
    assert len(the_plan.cells) == 54 and the_plan.models == ()
    assert all(c.config.optimizer.lr == 1e-6 and c.config.batch.prompts == 512 for c in the_plan.cells)
    assert all(c.config.steps * 512 <= 53904 for c in the_plan.cells)
    assert [sum(c.axes == (name,) for c in the_plan.cells) for name in ("main", "reuse", "group")] == [30, 16, 8]
    assert {c.config.task.train_problems for c in the_plan.cells if c.tau > 1} == {
        25600, 12800, 10240, 5120, 2560, 2048, 1024, 512
    }  # fmt: skip


# final compute of a run, read off the paper's figures; 6 N T with the nominal N
PAPER_COMPUTE = {
    "base": {"0.5B": 1.2e18, "1.5B": 4.4e18, "3B": 8.3e18, "7B": 2.0e19, "14B": 4.0e19, "32B": 8.3e19, "72B": 2.2e20},
    "instruct": {"0.5B": 1.15e18, "1.5B": 3.9e18, "3B": 9e18, "7B": 2.2e19, "14B": 4.5e19, "32B": 8.8e19, "72B": 2.5e20},
}  # fmt: skip


def test_the_papers_runs_are_predicted_to_take_what_the_paper_shows():
    rows = {r["name"]: r for r in plan_view.plan_json(plan(load_study("paper-v3")))["cells"]}
    assert len(rows) == 66
    for kind, figures in PAPER_COMPUTE.items():
        for size, compute in figures.items():
            assert rows[f"{size}-{kind}-seed0"]["compute_6nt_nominal"] == pytest.approx(compute, rel=0.1), (size, kind)


def test_the_micro_preset_has_the_papers_runs_and_a_control_for_every_base():
    the_plan = plan(load_study("micro"))
    grpo = [c for c in the_plan.cells if c.method == "grpo"]
    runs = {axis: [c for c in grpo if c.axes == (axis,)] for axis in ("main", "reuse", "group")}
    assert {axis: len(r) for axis, r in runs.items()} == {"main": 30, "reuse": 18, "group": 8} and len(grpo) == 56
    bases = list(itertools.product(("xxs", "xs", "s", "m", "l"), (0, 1, 2)))
    for kind in ("base", "instruct"):
        assert [(c.size, c.config.model.seed) for c in runs["main"] if c.kind == kind] == bases
    controls = [c for c in the_plan.cells if c.method == "pretrain"]
    assert [(c.size, c.config.model.seed) for c in controls] == bases
    for c in controls:
        (run,) = (r for r in runs["main"] if (r.size, r.kind, r.seed) == (c.size, "base", c.seed))
        assert c.config == run.config.model_copy(update={"method": "pretrain", "name": c.name})
    for axis in ("reuse", "group"):  # one base each, which no main run has
        assert len({(c.size, c.config.model.seed) for c in runs[axis]} - set(bases)) == 1
    seen = {c.config.steps * c.config.batch.prompts for c in runs["reuse"]}
    assert seen == {50_000}
    assert {c.config.task.train_problems or 50_000 for c in runs["reuse"]} == {
        50_000, 25_000, 12_500, 10_000, 5_000, 2_500, 2_000, 1_000, 500
    }  # fmt: skip


def test_the_command_prints_a_plan_as_json():
    result = CliRunner().invoke(app, ["study", "plan", "paper", "--gpu", "h200", "--usd-per-hour", "3", "--json"])
    assert result.exit_code == 0, result.exception
    found = json.loads(result.output)
    assert len(found["cells"]) == 54 and found["device"] == "h200"
    assert found["total"]["usd"] == pytest.approx(sum(c["usd"] for c in found["cells"]))
    result = CliRunner().invoke(app, ["study", "plan", "paper", "--gpu", "tpu"])
    assert "estimate.gpu" in str(result.exception) and "got 'tpu'" in str(result.exception)


def test_an_extended_study_says_only_what_is_different(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "extends: smoke\nname: mine\nrun: {steps: 7, batch: {prompts: 32}}\nsizes: {xs: {run: {optimizer.lr: 1e-3}}}\n"
    )
    ours, smoke = load_study(tmp_path / "mine.yaml"), load_study("smoke")
    assert (ours.name, ours.run["steps"], ours.run["batch"]) == ("mine", 7, smoke.run["batch"] | {"prompts": 32})
    assert ours.sizes["xs"].run == {"optimizer.lr": 1e-3} and ours.sizes["m"] == smoke.sizes["m"]
    assert ours.axes == smoke.axes
    (tmp_path / "loop.yaml").write_text(f"extends: {tmp_path / 'loop.yaml'}\n")
    with pytest.raises(ValueError, match="extends itself"):
        load_study(tmp_path / "loop.yaml")


def test_order_unique_prompts_and_switches_are_axes():
    axes = (
        AxesConfig(name="order", sizes=("s",), order=("shuffled", "curriculum")),
        AxesConfig(name="unique", sizes=("s",), unique=(80, 20)),
        AxesConfig(name="loss", sizes=("s",), variants={"grpo": {}, "dr": {"advantage.std": "none"}}),
    )
    cells = {c.name: c for c in plan(study(axes=axes)).cells}
    assert {n: c.variant for n, c in cells.items()} == {
        "s-base-seed0": "", "s-base-curriculum-seed0": "curriculum", "s-base-U20-seed0": "", "s-base-dr-seed0": "dr",
    }  # fmt: skip
    assert cells["s-base-seed0"].axes == ("order", "unique", "loss")
    assert not cells["s-base-curriculum-seed0"].config.task.shuffle
    assert (cells["s-base-U20-seed0"].tau, cells["s-base-U20-seed0"].config.task.train_problems) == (4, 20)
    assert cells["s-base-dr-seed0"].config.advantage.std == "none"
    with pytest.raises(ValueError, match="unique=90 is more than the 80 prompts that a run sees"):
        plan(study(axes=(AxesConfig(unique=(90,)),)))
    with pytest.raises(ValueError, match="give tau or unique, and not both"):
        AxesConfig(unique=(9,), tau=(2,))


def test_the_plan_can_be_read():
    the_plan = plan(study())
    rows = plan_view.plan_rows(the_plan)
    total = plan_view.plan_json(the_plan)["total"]
    assert total["flops"] == pytest.approx(sum(r["flops"] for r in rows))
    json.dumps(plan_view.plan_json(the_plan), allow_nan=False)
    text = shown(plan_view.plan_view(the_plan, jobs=2))
    assert "s-base-control-seed1" in text and "12 cells and 8 models to prepare" in text and "with 2 at once" in text
    (line,) = [x for x in text.splitlines() if x.startswith("s-base-seed0 ")]
    assert "~" in line
    priced = study(estimate={"gpu": "h200", "usd_per_hour": 2.0})
    text = shown(plan_view.plan_view(plan(priced)))
    total = plan_view.plan_json(plan(priced))["total"]
    assert f"{total['usd']:,.0f} USD" in text and "h200 hours" in text
    assert total["usd"] == pytest.approx(2 * total["seconds"] / 3600)


def shown(view):
    console = Console(file=io.StringIO(), width=200)
    console.print(view)
    return console.file.getvalue()


@pytest.mark.parametrize(
    "seconds, text",
    [(0, "0.0s"), (9.94, "9.9s"), (9.96, "10s"), (59.4, "59s"), (59.6, "1m00s"), (75, "1m15s"), (3599.6, "1h00m"),
     (7321, "2h02m"), (4 * 86400, "4.0d")],
)  # fmt: skip
def test_durations(seconds, text):
    assert plan_view.duration(seconds) == text


@pytest.mark.parametrize(
    "number, text", [(0, "0"), (999, "999"), (1234567, "1.23M"), (2e9, "2G"), (5e13, "50T"), (2e15, "2P")]
)
def test_numbers_for_people(number, text):
    assert plan_view.human(number) == text
