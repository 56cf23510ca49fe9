"""What holds for drawn scenes of every kind, those of the package and those of the recipe."""

from collections.abc import Callable

import numpy as np

from finestsam.data.synthetic import Scene

Render = Callable[[int, int, tuple[int, int]], Scene]  # of seed, index and (height, width)


def check_seed_and_index_decide(render: Render) -> None:
    first, again = render(3, 7, (96, 128)), render(3, 7, (96, 128))

    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.masks, again.masks)
    for other in (render(3, 8, (96, 128)), render(4, 7, (96, 128))):
        assert (first.image != other.image).any()
        assert len(first.masks) != len(other.masks) or (np.stack(first.masks) != other.masks).any()


def check_masks(render: Render, size: tuple[int, int], most_levels: int) -> None:
    """Check that masks are bool, large enough to see, and that at most so many of them share a pixel."""
    for index in range(6):
        scene = render(0, index, size)

        assert scene.image.shape == (*size, 3) and scene.image.dtype == np.uint8
        assert all(mask.shape == size and mask.dtype == bool for mask in scene.masks)
        assert min(mask.mean() for mask in scene.masks) >= 0.002
        assert np.sum(scene.masks, axis=0).max() <= most_levels


def check_sizes_differ(render: Render) -> None:
    scenes = [render(1, index, (128, 128)) for index in range(20)]

    assert all(5 <= len(scene.masks) <= 60 for scene in scenes)
    fractions = [mask.mean() for scene in scenes for mask in scene.masks]
    assert max(fractions) < 0.25
    assert max(fractions) > 20 * min(fractions)
