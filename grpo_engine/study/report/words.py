"""What the data say in sentences: findings, why a law is not identifiable, how it was measured, what cannot be seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from grpo_engine.study.data import Point, StudyData, params_of
from grpo_engine.study.fits import NO_AXIS, axes_of
from grpo_engine.study.importers import TABLE_FILE
from grpo_engine.study.laws.results import AxisFit, Estimate, Fits
from grpo_engine.study.plan_view import human
from grpo_engine.study.report.fits import AXIS_NAMES, Laws

NOISE = 2.0  # standard errors; a smaller difference is called no difference


def findings(data: StudyData, laws: Laws) -> list[str]:
    """What the data say, in sentences; a difference under two standard errors is called none."""
    fits, out, ordered = laws.fits, [], {}
    for kind in data.kinds:
        curves = {s: c for s in data.sizes if len(c := data.curve(data.main(s, kind))) > 1}
        if not curves:
            continue
        ends = {s: (c[0], c[-1]) for s, c in curves.items()}
        changes = {s: difference(before, after) for s, (before, after) in ends.items()}
        what = in_words(changes, "falls during RL", "rises", "does not change beyond the noise")
        numbers = "; ".join(f"{s} {loss_text(a)} to {loss_text(b)}" for s, (a, b) in ends.items())
        out.append(f"{kind.capitalize()} models: test loss on unseen {data.headline} problems {what} ({numbers}).")
        finals = [b for _, b in ends.values()]
        if len(finals) > 1:
            ordered[kind] = [difference(a, b) < 0 for a, b in zip(finals, finals[1:], strict=False)]
    for kind, lower in ordered.items():
        if all(lower):
            out.append(f"Every larger {kind} model ends lower than the one before it.")
        else:
            out.append(
                f"Of {len(lower)} steps up the ladder of {kind} models, {sum(lower)} end lower by more than two "
                "standard errors."
            )
    greedy = []
    for kind in data.kinds:
        curves = {s: c for s in data.sizes if len(c := data.curve(data.main(s, kind), mode="greedy")) > 1}
        changes = {s: difference(c[0], c[-1]) for s, c in curves.items()}
        if changes:
            numbers = "; ".join(f"{s} {loss_text(c[0])} to {loss_text(c[-1])}" for s, c in curves.items())
            words = in_words(changes, "falls", "rises", "does not change beyond the noise")
            greedy.append(f"for {kind} models it {words} ({numbers})")
    if greedy:
        out.append(f"The loss of greedy answers is another matter: {'; '.join(greedy)}.")
    against, losses = {}, []
    for size in data.sizes:
        rl, control = data.curve(data.main(size, "base")), data.curve(data.control(size, "base"))
        if len(rl) > 1 and len(control) > 1:
            against[size] = difference(control[-1], rl[-1])
            losses.append(f"{size} {loss_text(rl[-1])}, control {loss_text(control[-1])}")
    if against:
        words = in_words(against, "RL ends lower", "the control ends lower", "there is no difference beyond the noise")
        out.append(f"Base models against plain pretraining of the same length: {words} ({'; '.join(losses)}).")
    for axis in axes_of(fits):
        found = [f for f in fits.fits if f.axis == axis and f.kind in data.kinds]
        parts = []
        for f in found:
            if f.verdict.ok and f.joint:
                p = f.joint.parameters
                parts.append(
                    f"for {f.kind} models K_max = {interval_text(p['K_max'], '{:.3f}'.format)}, "
                    f"N0 = {interval_text(p['N0'], human)} parameters"
                )
            else:
                parts.append(f"for {f.kind} models the data do not identify it ({f.verdict.why.split('; ')[0]})")
        out.append(f"One law for all sizes, loss against {axis} (95 % intervals): {'; '.join(parts)}.")
    largest = {kind: (budget, r) for kind, budget, r in laws.picks if r.budget == "compute"}
    for kind, (budget, r) in largest.items():
        sure = "decided" if r.decided else "not decided, see below"
        if r.pick == max(r.candidates, key=lambda c: c.params).label:
            sure += "; it is the largest size here"
        out.append(f"Which {kind} model to train for {budget}: {r.pick} ({sure}).")
    if fits.claims:
        answers = {v: [c.name for c in fits.claims if c.verdict == v] for v in ("supported", "not supported", "undecided")}
        said = "; ".join(f"{v}: {listed(names)}" for v, names in answers.items() if names)
        out.append(f"Of the claims that can be tested here, {said}.")
    return [*out, *misses(data, fits)]


def difference(before: Point, after: Point) -> float:
    """after - before in loss, or 0.0 when it is within the noise."""
    change = after.loss - before.loss
    return change if abs(change) > NOISE * math.hypot(before.error, after.error) else 0.0


def in_words(changes: dict[str, float], fell: str, rose: str, flat: str) -> str:
    groups = {
        fell: [s for s, d in changes.items() if d < 0],
        rose: [s for s, d in changes.items() if d > 0],
        flat: [s for s, d in changes.items() if d == 0],
    }
    said = [(what, sizes) for what, sizes in groups.items() if sizes]
    if len(said) == 1 and len(changes) > 1:
        return f"{said[0][0]} at every size"
    return "; ".join(f"{what} at {listed(sizes)}" for what, sizes in said)


def listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def loss_text(point: Point) -> str:
    return f"{point.loss:.3f}{_error(point.error, '.3f')}"


def rate_text(p: Point) -> str:
    return f"{100 * p.pass1:.1f}{_error(100 * p.error, '.1f')}"


def _error(error: float, form: str) -> str:
    """± a standard error; nothing where another trainer's log gives none."""
    return f"\u00a0±\u00a0{error:{form}}" if error else ""


def change_text(a: Point, b: Point) -> str:
    change = round(100 * (b.pass1 - a.pass1), 1) + 0.0  # + 0.0: no negative zero
    return f"{change:+.1f}{_error(100 * math.hypot(a.error, b.error), '.1f')}".replace("-", "\u2212")


def interval_text(e: Estimate | None, show: Callable[[float], str]) -> str:
    if e is None:
        return ""
    if e.at_bound:
        return f"{show(e.value)} (at a bound)"
    if e.low is None or e.high is None:
        return show(e.value)
    return f"{show(e.value)} [{show(e.low)}, {show(e.high)}]"


def verdicts(fits: Fits) -> list[str]:
    """Why the laws that are not identifiable are not."""
    if not fits.fits:
        return [f"{NO_AXIS[0].upper()}{NO_AXIS[1:]}."]
    return _by_reason((f, [f"not identifiable: {f.verdict.why}"]) for f in fits.fits if not f.verdict.ok)


def cautions(fits: Fits) -> list[str]:
    return _by_reason((f, f.verdict.cautions) for f in fits.fits)


def _by_reason(found: Iterable[tuple[AxisFit, Sequence[str]]]) -> list[str]:
    """A line for each reason, with the kinds and the axes that it holds for; "all" only where no kind has it."""
    kinds: dict[str, dict[str, list[str]]] = {}
    for fit, reasons in found:
        for reason in reasons:
            kinds.setdefault(reason, {}).setdefault(fit.kind, []).append(AXIS_NAMES[fit.axis])
    out = []
    for reason, by_kind in kinds.items():
        if len(by_kind) > 1:
            by_kind.pop("all", None)
        axes = list(dict.fromkeys(axis for axes in by_kind.values() for axis in axes))
        out.append(f"{listed(list(by_kind))} (X: {listed(axes)}): {reason}.")
    return out


def misses(data: StudyData, fits: Fits) -> list[str]:
    """Sizes whose last points the fitted law misses by more than the noise: the curve bends, the law does not."""
    out = []
    for kind in data.kinds if "data" in axes_of(fits) else ():
        fit = fits.get("data", kind)
        if not fit.joint or not fit.verdict.ok:
            continue
        for s in fit.sizes:
            last = data.curve(data.main(s.size, kind))[-1]
            law = float(fit.joint.loss(s.size, last.prompts))
            if last.error and abs(last.loss - law) > NOISE * last.error:
                side = "below" if last.loss < law else "above"
                out.append(f"{s.size} {kind} ends {side} it, at {loss_text(last)} where the law has {law:.3f}")
    if not out:
        return []
    return [
        f"The law is a straight line in these axes and not every curve is: {'; '.join(out)}. Its interval covers where "
        "the line is, not that bend, so do not continue it beyond the last point."
    ]


def method_points(data: StudyData) -> list[str]:
    run = next(iter(data.runs.values()))
    head = next(e for e in run.evals if e.eval_set == data.headline and e.mode == "sample")
    if data.plan is None:
        nominal = params_of(data.table) == "nominal"
        return [
            "The runs are of another trainer: their evaluations come from its logs, and nothing is known of them but "
            f"what {TABLE_FILE} holds.",
            f"Test loss L = 1 - pass@1 on {data.headline}. Data D: prompts seen. Compute: 6 N T, T the tokens that the "
            f"log counts, N {'what the model is called' if nominal else 'without the embedding and the output head'}.",
            "Standard errors are of the spread between runs, and of the test problems where their number is known and each "
            "has one answer. Where there is neither, no error is shown, and every difference counts.",
            "Rewards, entropy, lengths of answers, cost by phase and results of single problems are not in such a table, "
            "and so not in this report.",
        ]
    config = data.plan.cells[0].config
    samples = f"{head.num_samples} answers to each" if head.num_samples > 1 else "one answer to each"
    return [
        f"Test loss L = 1 - pass@1 over the {head.num_problems} held-out problems of {data.headline}, {samples}, "
        f"sampled at temperature {head.temperature:g}.",
        "N: parameters without the embedding and the output head.",
        "Data D: prompts seen, that is steps times prompts a step; an answer is no datum of its own.",
        "Compute: 6 N T, T the prompt and response tokens of all answers that were trained on. Sampling, the "
        "reference pass and evaluation are not in it; the section on cost has them, and runs.parquet has both counts.",
        f"One step: {config.batch.prompts} prompts times {data.group_size} answers, {config.batch.minibatches} "
        f"optimizer steps, clip {config.loss.clip_low:g}/{config.loss.clip_high:g}, KL "
        f"({config.loss.kl}) coefficient {config.loss.kl_coef:g}, advantages divided by the {config.advantage.std} "
        "standard deviation of the group.",
        "Standard errors: over problems, and over runs where there are several, added in quadrature; a difference is "
        "treated as if its two sides were independent, which is cautious, as both answered the same problems. "
        "A difference under two standard errors is called none.",
    ]


def limits(data: StudyData) -> list[str]:
    """What the data cannot show, found by looking at what there is."""
    out = []
    counts = [len(data.main(s, k)) for s in data.sizes for k in data.kinds]
    if min(counts) < 2:
        out.append(
            "With one run at some or all sizes, the spread between runs is not known; the errors hold that of the test "
            "problems alone."
        )
    if len(data.sizes) < 4:
        out.append(
            f"{len(data.sizes)} sizes identify a law of k(N) with two parameters only barely; whether it saturates, and "
            "where, needs more sizes and larger ones."
        )
    cells = data.plan.cells if data.plan else ()
    rates = {c.size: c.config.optimizer.lr for c in cells if c.method == "grpo" and c.name in data.runs}
    if len(set(rates.values())) > 1:
        listed = ", ".join(f"{s} {rates[s]:g}" for s in data.sizes if s in rates)
        out.append(f"The learning rate differs by size ({listed}), so size and learning rate cannot be told apart.")
    if not any(c.method == "pretrain" for n, c in data.cells.items() if n in data.runs):
        out.append("There is no control, so what RL adds beyond plain training of the same length is not known.")
    if cells and all(c.config.model.path is None for c in cells):
        out.append(
            "These are models of thousands of parameters on generated problems. The numbers test the method; they "
            "say nothing of the size of the effects in language models."
        )
    out.append(
        "Test points of one run are correlated: they are the same weights a few steps on, asked the same problems. "
        "R² is flattered by it. The intervals of the laws come from the lasting scatter of points about each curve, and "
        "from whole runs where a size has several; test problems are not drawn anew in them, so they are about these "
        "problems. Those of the claims draw problems anew, too, where the records tell each problem's answers."
    )
    return out
