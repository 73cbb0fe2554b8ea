"""State that the callbacks of one fit share."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class FitState:
    """State that the callbacks of one fit share, as `stage.fit_state`.

    stop_signal: the signal that stops all ranks; 0 without one. stop_reason: the option that ended training early.
    kept_checkpoint: the checkpoint that stays if the present state is not saved. metrics: the latest row of the
    training log. excluded_seconds: time spent on other work than training.
    """

    stop_signal: int = 0
    stop_reason: str = ""
    kept_checkpoint: str = "this run writes no checkpoints"
    metrics: dict[str, float] = field(default_factory=dict)
    excluded_seconds: float = 0.0
