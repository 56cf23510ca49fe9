import pytest

from finestsam.config import build_config
from finestsam.data.read import read_evaluation_set, read_training_set
from finestsam.data.split import split_records
from finestsam.errors import UserError
from finestsam.formats.layouts import find_layout
from finestsam.records import Annotation, Record


def write_part(folder):
    (folder / "images").mkdir(parents=True)
    (folder / "annotations.json").write_text("{}")


def test_each_layout_is_recognised_by_what_is_there(tmp_path):
    for name, parts in (("split", ["data"]), ("folders", ["train", "val"]), ("train_only", ["train"]), ("plain", [""])):
        for part in parts:
            write_part(tmp_path / name / part)

    assert list(find_layout(tmp_path / "split").parts) == ["all"]
    assert list(find_layout(tmp_path / "folders").parts) == ["train", "val"]
    assert list(find_layout(tmp_path / "train_only").parts) == ["train"]
    assert find_layout(tmp_path / "plain").is_plain


def test_two_layouts_at_once_need_a_word(tmp_path):
    for part in ("data", "train", "val"):
        write_part(tmp_path / part)

    with pytest.raises(UserError, match="has both data/ and train/"):
        find_layout(tmp_path)
    assert list(find_layout(tmp_path, auto_split=True).parts) == ["all"]
    assert list(find_layout(tmp_path, auto_split=False).parts) == ["train", "val"]


def test_a_folder_without_annotations_names_what_was_expected_and_what_was_found(tmp_path):
    (tmp_path / "labels.json").write_text("{}")

    with pytest.raises(
        UserError, match=r"data/annotations.json is missing; expected .*; json files found: labels.json"
    ):
        find_layout(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        find_layout(tmp_path / "nowhere")


def make_records(count: int) -> list[Record]:
    return [Record(number, f"{number}.png", None, (10, 10), []) for number in range(count)]


def test_the_split_is_the_same_for_the_same_seed_in_any_order():
    records = make_records(50)

    train, val = split_records(records, 0.2, seed=3)
    again = split_records(records[::-1], 0.2, seed=3)

    assert (train, val) == again
    assert len(val) == 10
    assert sorted(record.image_id for record in train + val) == list(range(50))
    assert split_records(records, 0.2, seed=4)[1] != val


@pytest.mark.parametrize(("count", "val_size", "val_count"), [(2, 0.1, 1), (2, 0.9, 1), (10, 0.1, 1), (10, 0.25, 2)])
def test_at_least_one_image_lies_on_each_side(count, val_size, val_count):
    train, val = split_records(make_records(count), val_size, seed=0)

    assert len(val) == val_count
    assert len(train) == count - val_count


@pytest.mark.parametrize("val_size", [0.1, 0.5, 0.9])
@pytest.mark.parametrize(("labelled", "empty"), [(2, 30), (5, 95), (30, 2), (3, 3)])
def test_images_with_objects_lie_on_both_sides(labelled, empty, val_size):
    records = make_records(labelled + empty)
    for record in records[:labelled]:
        record.annotations.append(Annotation(record.image_id, 1, b"", 1, [0, 0, 1, 1], 1))

    for seed in range(10):
        train, val = split_records(records, val_size, seed)

        assert sorted(record.image_id for record in train + val) == list(range(len(records)))
        assert any(record.annotations for record in train) and any(record.annotations for record in val)
        assert abs(len(val) - round(len(records) * val_size)) <= 1


def test_the_only_image_with_objects_is_for_training():
    records = make_records(6)
    records[3].annotations.append(Annotation(1, 1, b"", 1, [0, 0, 1, 1], 1))

    for seed in range(10):
        train, val = split_records(records, 0.9, seed)

        assert records[3] in train and len(val) == 5


def test_a_split_of_images_that_all_have_objects_stays_as_it_was():
    records = make_records(12)
    for record in records:
        record.annotations.append(Annotation(record.image_id, 1, b"", 1, [0, 0, 1, 1], 1))

    assert [record.image_id for record in split_records(records, 0.3, seed=5)[1]] == [5, 8, 9, 10]


def test_entries_of_one_file_stay_together():
    records = [Record(number, f"{number // 2}.png", None, (10, 10), []) for number in range(20)]

    train, val = split_records(records, 0.3, seed=0)

    assert not {record.file_name for record in train} & {record.file_name for record in val}


def test_one_image_cannot_be_split():
    with pytest.raises(UserError, match="need at least 2 images"):
        split_records(make_records(1), 0.1, seed=0)
    assert split_records(make_records(1), 0, seed=0)[1] == []


def test_a_plain_set_is_split_in_training_and_whole_in_evaluation(scenes):
    plain, split = build_config({"dataset.path": str(scenes / "data")}), build_config({"dataset.path": str(scenes)})

    assert (len(read_training_set(plain.dataset).train), len(read_training_set(plain.dataset).val)) == (5, 1)
    assert len(read_evaluation_set(plain.dataset).val) == 6
    assert len(read_evaluation_set(split.dataset).val) == 1


def test_objects_that_vanish_at_the_models_size_are_left_out_and_counted(scenes):
    config = build_config({"dataset.path": str(scenes)})

    data = read_training_set(config.dataset)
    data.drop_vanishing(8)

    assert "vanishes" in data.report.summarize()
    scales = {record.image_id: 8 / max(record.size) for record in data.train}
    areas = [a.area * scales[record.image_id] ** 2 for record in data.train for a in record.annotations]
    assert min(areas) >= 1
