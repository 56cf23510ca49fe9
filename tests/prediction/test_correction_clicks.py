import numpy as np

from finestsam.prediction.clicks import find_click


def test_the_first_click_is_in_the_middle_of_the_object():
    truth = np.zeros((20, 30), dtype=bool)
    truth[4:13, 10:21] = True

    (x, y), label = find_click(truth, np.zeros_like(truth))

    assert (y, label) == (8, 1) and 13 <= x <= 17


def test_the_next_click_is_in_the_middle_of_the_largest_error():
    truth = np.zeros((20, 30), dtype=bool)
    truth[4:13, 10:21] = True
    overstepped = truth.copy()
    overstepped[4:13, 21:28] = True
    overstepped[4, 10:13] = False  # a smaller error

    (x, y), label = find_click(truth, overstepped)

    assert not truth[y, x] and overstepped[y, x] and label == 0
    assert x in (23, 24) and y in (7, 8, 9)


def test_where_all_is_right_nobody_clicks():
    truth = np.eye(8, dtype=bool)

    assert find_click(truth, truth)[1] == -1
