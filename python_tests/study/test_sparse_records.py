"""Records of other trainers that lack something, or that no law can be fitted to: a report that says so, never an error."""

import math
import re

import pyarrow as pa
import pytest
from law_tables import law_table
from typer.testing import CliRunner

from grpo_engine.cli import app
from grpo_engine.study.data import load_data
from grpo_engine.study.fits import fit_study, recommendations
from grpo_engine.study.importers import write_table
from grpo_engine.study.laws.results import read_fits
from grpo_engine.study.report import law_table as printed
from grpo_engine.study.report.fits import study_laws
from grpo_engine.study.report.page import render_page, sections_of
from grpo_engine.study.report.words import findings

SIZES = {"s": 6e5, "m": 2e6, "l": 6e6}
STEPS = (1, 2, 4, 8, 16, 32)
KNOWN = {
    "study": "theirs", "cell": "a", "params_nominal": 1e6, "seed": 0, "unique_prompts": 64, "compute_ledger": 1e9,
    "num_problems": 100, "num_samples": 4, "stderr": 0.01,
}  # fmt: skip
OPTIONAL = (
    *KNOWN, "group_size", "tau", "prompts_seen", "trained_tokens", "compute_6nt", "temperature", "params_non_embedding",
)  # fmt: skip


def rows_of(**options):
    return [r | KNOWN | {"unique_prompts": r["prompts_seen"], "compute_ledger": 2 * r["compute_6nt"],
                         "params_nominal": r["params_non_embedding"]}
            for r in law_table(sizes=SIZES, steps=STEPS, noise=0.002, **options).to_pylist()]  # fmt: skip


def report_of(folder, rows):
    """The fits and the text of the page of a study of these rows."""
    folder.mkdir(exist_ok=True)
    write_table(folder, pa.Table.from_pylist(rows, schema=law_table(sizes=SIZES).schema))
    fits = fit_study(folder, n_boot=20)
    assert read_fits(folder / "fits.json") == fits
    printed(fits)
    data = load_data(folder)
    laws = study_laws(data, fits)
    page = render_page(data, sections_of(data, laws), findings(data, laws))
    return fits, " ".join(re.sub(r"<[^>]+>", " ", re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)).split())


@pytest.mark.parametrize("absent", [*((name,) for name in OPTIONAL), ("prompts_seen", "unique_prompts"),
                                    ("trained_tokens", "compute_6nt", "compute_ledger"),
                                    tuple(n for n in OPTIONAL if n not in ("prompts_seen", "params_non_embedding")),
                                    tuple(n for n in OPTIONAL if n != "params_non_embedding")], ids="-".join)  # fmt: skip
def test_a_report_is_made_without(tmp_path, absent):
    fits, text = report_of(tmp_path / "s", [r | dict.fromkeys(absent) for r in rows_of()])
    assert "What these data cannot show" in text and " nan" not in text.lower() and "None" not in text
    axes = {a for a, column in (("compute", "compute_6nt"), ("data", "prompts_seen")) if column not in absent}
    assert {f.axis for f in fits.fits} - {"ledger"} == axes
    if axes:
        asked = {"compute": 1e12} if "compute" in axes else {"prompts": 1000.0}
        for found in recommendations(tmp_path / "s", **asked).values():
            assert found.render_text()
    else:
        assert "Neither compute nor prompts seen are known" in text
        with pytest.raises(ValueError, match="neither compute nor prompts seen are known"):
            recommendations(tmp_path / "s", compute=1e12)


def test_the_status_of_an_imported_folder_is_its_runs(tmp_path):
    report_of(tmp_path, rows_of())
    result = CliRunner().invoke(app, ["study", "status", str(tmp_path)])
    assert result.exit_code == 0, result.exception
    assert result.output.count("imported") == 4 and "s-base-0" in result.output and "3 imported" in result.output


# ------------------------------------------------------------------------------- data that carry no law


def changed(change, size="m", steps=(0, *STEPS)):
    return [r | change(r) if size in (None, r["size"]) and r["step"] in steps else r for r in rows_of()]


@pytest.mark.parametrize("column, axis", [("compute_6nt", "compute"), ("prompts_seen", "data")])
@pytest.mark.parametrize("size", ["m", None])
def test_x_that_does_not_vary_is_a_verdict(tmp_path, column, axis, size):
    fits, text = report_of(tmp_path, changed(lambda r: {column: 1000}, size, STEPS))
    fit = fits.get(axis, "base")
    assert not fit.verdict.ok
    assert f"m: {column} is 1000 at every point, so its slope is not identifiable" in "; ".join(fit.left_out)
    assert {s.size for s in fit.sizes} == ({"s", "l"} if size else set())
    assert f"{column} is 1000 at every point" in text or size


@pytest.mark.parametrize("rows, why", [
    pytest.param([r for r in rows_of() if r["step"] in (0, 32)], "1 points, fewer than 4", id="one point"),
    pytest.param([r for r in rows_of() if r["step"] == 0], "0 points, fewer than 4", id="step 0 alone"),
    pytest.param(changed(lambda r: {"loss": 0.4, "pass1": 0.6}, None), "does not fall", id="equal losses"),
    pytest.param(changed(lambda r: {"loss": 0.4, "pass1": 0.6}), "does not fall", id="equal losses of one size"),
    pytest.param(changed(lambda r: {"loss": math.nan, "pass1": math.nan}), "not finite", id="a size without loss"),
    pytest.param(changed(lambda r: {"loss": 0.0, "pass1": 1.0}), "needs one above 0", id="zero loss"),
    pytest.param(changed(lambda r: {"params_non_embedding": 600_000}), "2 sizes", id="two sizes of one N"),
    pytest.param(changed(lambda r: {"params_non_embedding": 600_000}, None), "1 size", id="all sizes of one N"),
])  # fmt: skip
def test_data_that_carry_no_law_are_a_verdict(tmp_path, rows, why):
    fits, text = report_of(tmp_path, rows)
    for fit in (f for f in fits.fits if f.axis == "data"):
        said = "; ".join([fit.verdict.why, *fit.verdict.cautions, *fit.left_out, *(s.verdict.why for s in fit.sizes)])
        assert why in said
    assert "What these data cannot show" in text
