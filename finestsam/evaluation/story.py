"""What an evaluation tells: two models on the same pictures, and on which of these ours does well."""

from dataclasses import dataclass
from functools import cached_property

from finestsam.evaluation.history import History
from finestsam.evaluation.measurement import Difference, Measurement
from finestsam.evaluation.mistakes import Mistakes, count_mistakes, sum_mistakes


@dataclass(frozen=True)
class Rating:
    """How well the generator does on one picture, a mask counting as an object from an IoU of 0.5 on."""

    f1: float
    recall: float


@dataclass(frozen=True)
class Story:
    """What report and comparison tell.

    Attributes:
        name, rival_name: of the two models, for the reader.
        theirs: None: there is nothing to compare with; its pictures are in the order of ours.
        history: of the run that our weights come from; None: it is not known.
    """

    name: str
    ours: Measurement
    rival_name: str = ""
    theirs: Measurement | None = None
    differences: dict[str, Difference] | None = None
    history: History | None = None

    @cached_property
    def mistakes(self) -> list[dict[str, Mistakes]]:
        """Of each picture; empty where the generator did not run."""
        return [] if self.ours.found is None else count_mistakes(self.ours.records, self.ours.found)

    @cached_property
    def ratings(self) -> dict[int, Rating]:
        """By the place of a picture with objects, the worst first."""
        places = [place for place, record in enumerate(self.ours.records) if record.annotations and self.mistakes]
        rated = {place: _rate(self.mistakes[place], len(self.ours.found[place].rles)) for place in places}
        return dict(sorted(rated.items(), key=lambda item: (item[1].f1, item[1].recall)))


def _rate(mistakes: dict[str, Mistakes], masks: int) -> Rating:
    whole = sum_mistakes([mistakes])["all"]
    return Rating(2 * whole.found / max(masks + whole.objects, 1), whole.found / max(whole.objects, 1))
