"""Numbers as a reader wants them: percent and points, nats, intervals."""

from __future__ import annotations

from dataclasses import dataclass

from trawl.report.reading import Measure, Trial

NONE = "–"
NORMAL_95 = 1.96  # half the 95% interval of a normal estimate, in standard errors
METHODS = {"cp": "CP", "svd": "SVD", "tucker": "Tucker", "narrow": "Narrow"}


@dataclass(frozen=True)
class Unit:
    """How an objective is written.

    Attributes:
        name: the objective in words.
        factor: from stored to written numbers.
        digits: decimals of a value.
        sign: behind a value.
        gain: what gains are counted in.
    """

    name: str
    factor: float
    digits: int
    sign: str
    gain: str

    def value(self, measure: Measure) -> str:
        """Write a value with its standard error."""
        if measure.value is None:
            return NONE
        error = "" if measure.stderr is None else f" ± {measure.stderr * self.factor:.{self.digits}f}"
        return f"{minus(f'{measure.value * self.factor:.{self.digits}f}')}{error}{self.sign}"

    def gained(self, measure: Measure) -> str:
        """Write a gain with its 95% interval."""
        if measure.gain is None:
            return NONE
        text = self.signed(measure.gain)
        if measure.gain_stderr is None:
            return text
        low, high = interval(measure)
        return f"{text} [{self.signed(low)}, {self.signed(high)}]"

    def signed(self, gain: float) -> str:
        """Write a difference with its sign."""
        return minus(f"{gain * self.factor:+.{self.digits}f}")

    def short(self, gain: float) -> str:
        """Write a difference in at most four characters or so, for a small cell."""
        number = gain * self.factor
        digits = 0 if abs(number) >= 9.95 else 1 if self.factor != 1 or abs(number) >= 0.995 else 2
        return minus(f"{number:+.{digits}f}").replace("0.", ".", 1) if digits == 2 else minus(f"{number:+.{digits}f}")


def unit_of(objective: str) -> Unit:
    """Return how an objective is written."""
    if objective == "accuracy":
        return Unit("accuracy", 100.0, 1, "%", "points")
    if objective == "log_loss":
        return Unit("log-loss", 1.0, 3, "", "nats")
    return Unit(objective.replace("_", " "), 1.0, 4, "", objective.replace("_", " "))


def interval(measure: Measure) -> tuple[float, float]:
    """Return the 95% interval of a gain, which must be known with its standard error."""
    assert measure.gain is not None
    assert measure.gain_stderr is not None
    half = NORMAL_95 * measure.gain_stderr
    return measure.gain - half, measure.gain + half


def half_interval(measure: Measure) -> float:
    """Return half of the 95% interval of a gain; 0 where it is not known."""
    return NORMAL_95 * (measure.gain_stderr or 0.0)


def minus(text: str) -> str:
    """Write the sign of a negative number as a minus, not as a hyphen."""
    return text.replace("-", "−")


def method_name(method: str) -> str:
    """Write a method as its name is spelt."""
    return METHODS.get(method, method)


def stacked(group_layers: str) -> str:
    """Say how many layers a stack takes."""
    if group_layers == "all":
        return "one stack"
    return "layer by layer" if group_layers == "1" else f"by {group_layers} layers"


def layers_in_words(layers: str) -> str:
    """Write ``layer 28``, ``layers 20-29`` or ``all layers``."""
    if layers == "all":
        return "all layers"
    return f"layer {layers}" if layers.isdigit() else f"layers {layers}"


def describe(trial: Trial) -> str:
    """Write an intervention as words: ``CP rank 8 of fc in layer 28``."""
    grouped = f", {stacked(trial.group_layers)}" if trial.one_layer is None else ""
    where = layers_in_words(trial.layers)
    return f"{method_name(trial.method)} rank {trial.rank_text} of {trial.roles} in {where}{grouped}"
