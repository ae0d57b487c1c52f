"""What a model can do: perplexity, answers, choices, sentence pairs, and any task of lm-eval."""

from trawl.evaluation.results import Figure, TaskResult
from trawl.evaluation.runner import evaluate
from trawl.evaluation.tasks import (
    ChoiceTask,
    HarnessTask,
    PairsTask,
    PerplexityTask,
    QATask,
    Task,
    parse_task,
)

__all__ = [
    "ChoiceTask",
    "Figure",
    "HarnessTask",
    "PairsTask",
    "PerplexityTask",
    "QATask",
    "Task",
    "TaskResult",
    "evaluate",
    "parse_task",
]
