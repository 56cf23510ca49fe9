"""What can be learned, predicted and measured: one file a task."""

from finestsam.config import Config
from finestsam.model.load import LoadedModel
from finestsam.tasks.base import Task
from finestsam.tasks.classes import ClassesTask
from finestsam.tasks.masks import MasksTask
from finestsam.tasks.semantic import SemanticTask

TASKS: dict[str, type[Task]] = {task.name: task for task in (MasksTask, ClassesTask, SemanticTask)}


def choose_task(config: Config) -> type[Task]:
    """Return the task that the settings train."""
    return TASKS["masks" if config.task == "auto" else config.task]


def build_task_of_weights(config: Config, loaded: LoadedModel) -> Task:
    """Return the task that weights were trained for, or masks where the settings ask for them."""
    name = loaded.card.task if loaded.card and config.task != "masks" else "masks"
    return TASKS[name](config, loaded.model)
