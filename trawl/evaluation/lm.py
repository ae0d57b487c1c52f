"""Any task of EleutherAI's lm-evaluation-harness, run on the model object."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trawl.errors import PlanError, suggestion
from trawl.evaluation.results import Figure, TaskResult
from trawl.evaluation.subject import Subject
from trawl.evaluation.tasks import HarnessTask, label
from trawl.observers import Observer

BATCH = 16
BOOTSTRAPS = 1000  # for metrics without a closed form; lm-eval's own 100,000 take minutes


def check_harness() -> None:
    """Raise where lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise PlanError("lm: tasks need lm-eval: pip install 'trawl-llm[eval]'")


def evaluate_harness(
    subject: Subject, task: HarnessTask, *, limit: int | None = None, observer: Observer
) -> TaskResult:
    """Return what lm-eval makes of a task.

    Args:
        subject: a causal language model with its tokenizer.
        observer: told of the beginning and the end; lm-eval shows its own progress.
        task: its name is one of lm-eval's, of a task or a group, or the path of a task's YAML file.
        limit: the most documents of each task.
    Returns: lm-eval's metrics with lm-eval's standard errors; a group's tasks are told apart by their names. Prompts
        beyond the context are cut on the left by lm-eval itself, which warns of it.
    Raises: PlanError: lm-eval is not installed, has no such task, or cannot get the task's data.
    """
    check_harness()
    import lm_eval  # noqa: PLC0415 (an extra; seconds)
    from lm_eval.models.huggingface import HFLM  # noqa: PLC0415 (likewise)

    observer(f"{label(task.spec)}: lm-eval", 0, 1)
    manager, name = _task_manager(task)
    model = HFLM(pretrained=subject.model, tokenizer=subject.tokenizer, max_length=subject.context, batch_size=BATCH)
    try:
        found = lm_eval.simple_evaluate(
            model=model,
            tasks=[name],
            num_fewshot=task.fewshot,
            limit=limit,
            task_manager=manager,
            bootstrap_iters=BOOTSTRAPS,
            log_samples=False,
        )
    except (OSError, ValueError, KeyError) as e:  # no network, no such data set, a broken task file
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise PlanError(f"task {task.spec}: lm-eval cannot run it: {reason}") from e
    observer(f"{label(task.spec)}: lm-eval", 1, 1)
    counts = [count["effective"] for count in found["n-samples"].values()]
    return TaskResult(
        task=task.spec,
        kind=task.kind,
        figures=tuple(_figures(found["results"], found.get("higher_is_better", {}))),
        scored=sum(counts),
        overlong=0,
        settings={"fewshot": task.fewshot, "lm_eval": lm_eval.__version__, "context": subject.context},
    )


def _task_manager(task: HarnessTask) -> tuple[Any, str]:
    """Return lm-eval's index of tasks and the task's name in it."""
    from lm_eval.tasks import TaskManager  # noqa: PLC0415 (an extra)

    path = Path(task.name)
    if path.suffix not in (".yaml", ".yml"):
        manager, name = TaskManager(), task.name
    else:
        manager = TaskManager(include_path=str(path.resolve().parent), include_defaults=False)
        files = {
            str(entry["yaml_path"] if isinstance(entry, dict) else entry.yaml_path): key
            for key, entry in manager.task_index.items()
        }
        name = files.get(str(path.resolve()), path.stem)
    if name not in manager.all_tasks:
        raise PlanError(f"task {task.spec}: lm-eval has no task {name!r}{suggestion(name, manager.all_tasks)}")
    return manager, name


def _figures(results: Mapping[str, Mapping[str, Any]], directions: Mapping[str, Mapping[str, bool]]) -> list[Figure]:
    """Return lm-eval's metrics: ``acc,none`` beside ``acc_stderr,none``, by task."""
    figures = []
    for task, metrics in results.items():
        for key, value in metrics.items():
            metric, comma, variant = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{metric}_stderr,{variant}")
            name = metric if variant == "none" else f"{metric}({variant})"
            figures.append(
                Figure(
                    name if len(results) == 1 else f"{task}/{name}",
                    float(value),
                    float(error) if isinstance(error, int | float) else None,
                    directions.get(task, {}).get(metric),
                )
            )
    return figures
