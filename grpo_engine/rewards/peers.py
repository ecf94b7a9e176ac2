"""Other people's scorers of mathematics, called as they are called at home, to be compared with ours.

    math_verify    parse and verify with their defaults, the truth in a box; installed with grpo_engine
    verl_prime     verl's reward_score.prime_math
    verl_math      verl's reward_score.math_reward (math in older versions): the last box, as text
    lm_eval        lm-evaluation-harness's hendrycks_math: the last box, as text

They run in a worker of `RewardPool`, which has a time limit. math-verify's own is switched off.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
from types import ModuleType, SimpleNamespace
from typing import Any

from grpo_engine.rewards import Question, import_scorer
from grpo_engine.rewards.extract import last_boxed
from grpo_engine.rewards.math import gold_text

PEERS: dict[str, tuple[str, str]] = {  # name to the package that must be installed, and the scorer
    "math_verify": ("math_verify", "grpo_engine.rewards.peers:math_verify"),
    "verl_prime": ("verl", "grpo_engine.rewards.peers:verl_prime"),
    "verl_math": ("verl", "grpo_engine.rewards.peers:verl_math"),
    "lm_eval": ("lm_eval", "grpo_engine.rewards.peers:lm_eval"),
}


_MODULES = {
    "math_verify": "math_verify",
    "verl_prime": "verl.utils.reward_score.prime_math",
    "verl_math": "verl.utils.reward_score.math_reward",
    "lm_eval": "lm_eval.tasks.hendrycks_math.utils",
}


def installed() -> list[str]:
    """The peers that can be called here."""
    return [name for name, (package, _) in PEERS.items() if importlib.util.find_spec(package) is not None]


def warm_up() -> None:
    """Calls what is installed once, so that no response's time pays for it; what fails here fails again, and is counted."""
    for name in installed():
        with contextlib.suppress(Exception):
            import_scorer(PEERS[name][1])(r"so \boxed{\frac{1}{2}}", SimpleNamespace(answer="0.5", info={}))


def _load(name: str) -> ModuleType:
    if name == "verl_math" and importlib.util.find_spec("verl.utils.reward_score.math_reward") is None:
        return importlib.import_module("verl.utils.reward_score.math")
    return importlib.import_module(_MODULES[name])


def math_verify(response: str, problem: Question) -> float:
    """1.0 when math-verify finds the truth in the response.

    Args:
        response: decoded answer.
        problem: its answer is LaTeX or plain text.
    """
    peer = _load("math_verify")
    for name in ("math_verify", "latex2sympy2_extended"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    gold, found = (peer.parse(text, parsing_timeout=None) for text in (_boxed(problem), response))
    return float(bool(peer.verify(gold, found, timeout_seconds=None)))


def verl_prime(response: str, problem: Question) -> float:
    """What verl's prime_math gives.

    Args, returns: as `math_verify`.
    """
    return _first(_load("verl_prime").compute_score(response, gold_text(problem.answer)))


def verl_math(response: str, problem: Question) -> float:
    """What verl's scorer of MATH gives.

    Args, returns: as `math_verify`.
    """
    return _first(_load("verl_math").compute_score(response, gold_text(problem.answer)))


def lm_eval(response: str, problem: Question) -> float:
    """What lm-evaluation-harness's hendrycks_math takes for the same text.

    Args, returns: as `math_verify`.
    """
    found = last_boxed(response)
    return float(found is not None and _load("lm_eval").is_equiv(found, gold_text(problem.answer)))


def _boxed(problem: Question) -> str:
    return f"\\boxed{{{gold_text(problem.answer)}}}"


def _first(value: Any) -> float:
    """verl's scorers give a number, a truth value, a tuple that begins with one, or named values with a score."""
    if isinstance(value, dict):
        value = value["score"]
    return max(0.0, float(value[0] if isinstance(value, (tuple, list)) else value))
