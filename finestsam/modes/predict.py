"""`--mode predict`: predict images with the task that the weights were trained for."""

from pathlib import Path

from finestsam.config import Config
from finestsam.errors import printable
from finestsam.model.load import load_model
from finestsam.prediction.embedder import open_embedder
from finestsam.prediction.files import find_images
from finestsam.runtime.cpu import set_processor
from finestsam.runtime.folders import claim_output_folder
from finestsam.tasks import build_task_of_weights


def predict(config: Config) -> int:
    """Run the mode and return the exit code: 2 where `strict` is set and an image cannot be predicted, else 0.

    Raises:
        UserError: there is nothing to predict, or nowhere to write it.
    """
    set_processor()
    paths = find_images(config.input, Path(config.out_dir))
    out_dir = claim_output_folder(Path(config.out_dir), config.dataset.path)
    loaded = load_model(config, prefer_runs=True)
    print(f"model: {loaded.model_type}, {printable(loaded.source)}")
    embedder = open_embedder(config.store, loaded.model)
    return build_task_of_weights(config, loaded).predict(loaded, paths, out_dir, embedder)
