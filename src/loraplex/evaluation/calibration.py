"""Fits temperature and bias, so that a classifier's scores are probabilities that can be trusted."""

import math
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any

import numpy

# A pull towards the temperature and the bias that are known before, worth as many conversations. It decides where a
# slice is too small, or has one label only, to say anything.
PRIOR_WEIGHT = 4.0
MAX_LOG_TEMPERATURE, MAX_BIAS = 3.0, 20.0
LEAST = 1e-300
DIGITS = 4  # of temperature and bias in a contract


def fitted(
    labels: Seq[str],
    log_probs: Seq[Seq[float]],
    shares: Seq[Mapping[int, float]],
    known_bias: Seq[float],
    known_temperature: float = 1.0,
) -> dict[str, Any]:
    """Return the keys of a contract's calibration.

    labels:  the contract's. shares: [n] label's index -> its share. See `fit` for the others.
    """
    truth = [[one.get(label, 0.0) for label in range(len(labels))] for one in shares]
    temperature, bias = fit(log_probs, truth, known_bias, known_temperature)
    by = {label: round(one, DIGITS) for label, one in zip(labels, bias, strict=True) if round(one, DIGITS)}
    return {"temperature": round(temperature, DIGITS)} | ({"bias": by} if by else {})


def fit(
    log_probs: Seq[Seq[float]], shares: Seq[Seq[float]], known_bias: Seq[float], known_temperature: float = 1.0
) -> tuple[float, list[float]]:
    """Return the temperature and each label's bias that make softmax((log p + bias) / temperature) likeliest.

    log_probs:   [n, labels] log probabilities of the labels, as the base gives them.
    shares:      [n, labels] the truth: 1 for the right label, or shares of votes.
    known_bias:  [labels] the contract's; or what training's weights are known to have added, as a bias that takes it
                 off again.
    known_temperature: the contract's; 1 where there is none yet.
    The last label's bias stays as it is: only differences count.
    """
    from scipy.optimize import minimize

    given, truth = numpy.asarray(log_probs, dtype=float), numpy.asarray(shares, dtype=float)
    before = numpy.asarray(known_bias, dtype=float)
    if not len(given):
        return known_temperature, before.tolist()
    log_before = math.log(known_temperature)

    def loss(x: numpy.ndarray) -> float:
        warmer, moved = x[0], numpy.append(x[1:], 0.0)
        logits = (given + before + moved) / numpy.exp(log_before + warmer)
        highest = logits.max(1, keepdims=True)
        log_sum = highest[:, 0] + numpy.log(numpy.exp(logits - highest).sum(1))
        likelihood = (truth * (logits - log_sum[:, None])).sum()
        return float(-likelihood + PRIOR_WEIGHT * (warmer**2 + (moved**2).sum() / 8))

    num_free = given.shape[1] - 1
    lowest, highest = min(-MAX_LOG_TEMPERATURE, log_before), max(MAX_LOG_TEMPERATURE, log_before)
    bounds = [(lowest - log_before, highest - log_before), *[(-MAX_BIAS, MAX_BIAS)] * num_free]
    found = minimize(loss, numpy.zeros(1 + num_free), method="L-BFGS-B", bounds=bounds).x
    return float(numpy.exp(log_before + found[0])), (before + numpy.append(found[1:], 0.0)).tolist()


def raw_log_probs(scores: Seq[float], temperature: float, bias: Seq[float]) -> list[float]:
    """Return the label log probabilities that a contract made `scores` of, up to a number that is the same for all
    labels, which no calibration sees.

    scores:  [labels] probabilities; a score of 0 was rounded, and stands for the least that a float can be.
    """
    return [temperature * math.log(max(score, LEAST)) - by for score, by in zip(scores, bias, strict=True)]
