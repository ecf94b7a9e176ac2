import io
import itertools
import json

import pytest
from rich.console import Console

from grpo_engine.config import RunConfig, load_run_config
from grpo_engine.study import design
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


def test_models_come_base_first_and_only_where_the_ladder_makes_them(tmp_path):
    models = [n.name for n, _ in plan(study()).models]
    assert models == ["xs-base", "xs-instruct", "s-base", "s-instruct"]
    axes = (AxesConfig(kinds=("instruct",)),)
    assert [n.name for n, _ in plan(study(axes=axes)).models] == models  # an instruct model is made from its base


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
    assert design.num_params(cell.config.model) == 2 * per_layer + 32
    with pytest.raises(ValueError, match="size tiny has no folder for its instruct model"):
        study(sizes=sizes, axes=(AxesConfig(kinds=("instruct",)),))
    with pytest.raises(ValueError, match="size tiny is a folder of weights"):
        study(sizes=sizes, axes=(AxesConfig(control=("base",)),))


def test_costs_rise_with_size_and_count_the_phases_that_there_are():
    cells = {c.name: c for c in plan(study(run=RUN | {"evaluation": {"count": 0}})).cells}
    xs, s = cells["xs-base-seed0"].cost, cells["s-base-seed0"].cost
    assert s.flops > xs.flops and s.seconds > xs.seconds and s.trained_tokens == xs.trained_tokens
    answers, estimate = 10 * 8 * 4, design.EstimateConfig()
    sampled = 10 * 8 * estimate.prompt_tokens + answers * estimate.answer_tokens
    trained = answers * (estimate.prompt_tokens + estimate.answer_tokens)
    params = design.num_params(cells["s-base-seed0"].config.model)
    assert s.trained_tokens == trained
    assert s.flops == pytest.approx(params * (6 * trained + 2 * sampled))
    assert cells["s-base-control-seed0"].cost.flops == pytest.approx(params * 6 * trained)


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


def test_the_paper_preset_can_be_planned_without_its_weights():
    the_plan = plan(load_study("paper"))
    assert len(the_plan.cells) == 54 and the_plan.models == ()
    assert all(c.config.optimizer.lr == 1e-6 and c.config.batch.prompts == 512 for c in the_plan.cells)
    assert all(c.config.steps * 512 <= 53904 for c in the_plan.cells)
    costs = {c.size: c.cost.flops for c in the_plan.cells if c.name.endswith("base-seed0")}
    assert costs["14B"] == pytest.approx(2 * costs["7B"])


def test_the_plan_can_be_read():
    the_plan = plan(study())
    rows = design.plan_rows(the_plan, {"s-base-seed0": "done"})
    assert [r["state"] for r in rows if r["name"] == "s-base-seed0"] == ["done"]
    total = design.plan_json(the_plan)["total"]
    assert total["flops"] == pytest.approx(sum(r["flops"] for r in rows))
    json.dumps(design.plan_json(the_plan), allow_nan=False)
    console = Console(file=io.StringIO(), width=200)
    console.print(design.plan_table(the_plan, {"s-base-seed0": "done"}, jobs=2))
    text = console.file.getvalue()
    assert "s-base-control-seed1" in text and "12 cells and 4 models to prepare" in text and "with 2 at once" in text
    (line,) = [x for x in text.splitlines() if " s-base-seed0 " in x]
    assert "done" in line and "~" in line


@pytest.mark.parametrize(
    "seconds, text",
    [(0, "0.0s"), (9.94, "9.9s"), (9.96, "10s"), (59.4, "59s"), (59.6, "1m00s"), (75, "1m15s"), (3599.6, "1h00m"),
     (7321, "2h02m"), (4 * 86400, "4.0d")],
)  # fmt: skip
def test_durations(seconds, text):
    assert design.duration(seconds) == text


@pytest.mark.parametrize("number, text", [(0, "0"), (999, "999"), (1234567, "1.23M"), (2e9, "2G"), (5e13, "50T")])
def test_numbers_for_people(number, text):
    assert design.human(number) == text
