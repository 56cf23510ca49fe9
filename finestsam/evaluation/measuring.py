"""Measure one model on labelled images: its generator, and its masks for points, boxes and clicks."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from finestsam.config import CHUNK_OBJECTS, Config
from finestsam.data.semantic import ClassTable
from finestsam.evaluation.candidates import find_candidates
from finestsam.evaluation.generator_scores import choose_grids, find_all, list_fixed, open_for_tuning, tune
from finestsam.evaluation.measurement import Measurement
from finestsam.evaluation.prompt_scorer import PromptScorer, average_clicks
from finestsam.evaluation.subject import Subject, Thresholds
from finestsam.prediction.embedder import Embedder, open_store
from finestsam.records import Record
from finestsam.runtime.memory import reporting_out_of_memory


@dataclass(frozen=True)
class Outcome:
    """A model measured.

    Attributes:
        tuned: the tuned settings, as they are stored beside weights; None: nothing was tuned.
        tuned_on: number of images that they were tuned on.
    """

    measurement: Measurement
    tuned: dict[str, Any] | None = None
    tuned_on: int = 0


def measure_model(config: Config, subject: Subject, records: Sequence[Record], table: ClassTable | None) -> Outcome:
    """Measure a model on the images; those that broke since they were checked are left out.

    Args:
        table: of the classes of the model's masks; None: it has none.
    """
    with reporting_out_of_memory(subject.title, _advise(config)):
        embedder = _embed_by(config, subject)
        labelled = [record for record in records if record.annotations]
        scorer = PromptScorer(config, embedder, labelled, subject.title)
        prompted, clicks = scorer.score_prompts(), average_clicks(scorer.measure_clicks())
        if not config.evaluate.generator:
            measured = {score.image_id for scores in prompted.values() for score in scores}
            known = [record for record in records if record.image_id in measured or not record.annotations]
            outcome = Outcome(Measurement(known, None, setup=subject.describe(None)))
        elif subject.thresholds.goal:
            outcome = _tune_generator(config, embedder, records, subject)
        else:
            outcome = Outcome(_run_generator(config, embedder, records, subject, subject.thresholds))
        setup = outcome.measurement.setup
        settings = (setup.thresholds or subject.thresholds).settings
        background = scorer.measure_background(settings.pred_iou_thresh)
    measurement = replace(
        outcome.measurement, prompted=prompted, clicks=clicks, background=background, table=table, setup=setup
    )
    return replace(outcome, measurement=measurement)


def measure_generator(
    config: Config, subject: Subject, records: Sequence[Record], thresholds: Thresholds, table: ClassTable | None
) -> Measurement:
    """Measure the generator alone, with other thresholds."""
    subject = replace(subject, title=f"{subject.title} with thresholds {thresholds.origin}")
    with reporting_out_of_memory(subject.title, _advise(config)):
        measured = _run_generator(config, _embed_by(config, subject), records, subject, thresholds)
    return replace(measured, table=table)


def _advise(config: Config) -> str:
    points, objects = config.generator.points_per_batch, config.chunk_objects or CHUNK_OBJECTS
    return f"--generator.points_per_batch below {points}, --chunk_objects below {objects} or a smaller --model.type"


def _embed_by(config: Config, subject: Subject) -> Embedder:
    model = subject.loaded.model
    return Embedder(model, open_store(config.store, model), rounds=True)


def _run_generator(
    config: Config, embedder: Embedder, records: Sequence[Record], subject: Subject, thresholds: Thresholds
) -> Measurement:
    title = f"{subject.title}, generator"
    found = find_all(embedder, records, thresholds.settings, config.dataset.images, title)
    pairs = [(record, one) for record, one in zip(records, found, strict=True) if one is not None]
    setup = subject.describe(thresholds)
    return Measurement([record for record, _ in pairs], [one for _, one in pairs], setup=setup)


def _tune_generator(config: Config, embedder: Embedder, records: Sequence[Record], subject: Subject) -> Outcome:
    """Tune the generator's thresholds on these images, print them, and measure the generator with them."""
    goal, title = subject.thresholds.goal, f"{subject.title}, generator"
    fixed = list_fixed(config.generator)
    start = open_for_tuning(subject.thresholds.settings, fixed)
    found = find_candidates(embedder, records, start, choose_grids(start, fixed), config.dataset.images, title)
    pairs = [(record, one) for record, one in zip(records, found, strict=True) if one is not None]
    if not pairs:
        return Outcome(Measurement([], [], setup=subject.describe(subject.thresholds)))
    known, candidates = [record for record, _ in pairs], [one for _, one in pairs]
    tuned = tune(known, candidates, start, fixed, goal)
    flags = " ".join(f"--generator.{name} {value}" for name, value in tuned.chosen.items())
    print(f"{title}: best for {goal} on these images: {flags}")
    numbers = {name: value for name, value in tuned.chosen.items() if not isinstance(value, str)}
    extra = {f"generator/{name}": float(value) for name, value in numbers.items()}
    if tuned.calibration:
        extra["generator/calibration_error"] = tuned.calibration.error
    setup = subject.describe(replace(subject.thresholds, settings=tuned.result.settings))
    measured = Measurement(known, tuned.found, extra=extra, calibration=tuned.calibration, setup=setup)
    return Outcome(measured, tuned.describe(), len(known))
