"""What the annotations say of whether every object is annotated."""

from dataclasses import replace

from finestsam.data.labels import describe_labels


def test_images_without_annotations_and_crowd_regions_speak_for_partial_labels(records):
    assumed = "labels: complete is assumed, every object of an image is annotated; --dataset.labels partial changes it"
    assert describe_labels(records, "complete") == [assumed, "  signs of partial labels: none"]

    gaps = [replace(records[0], annotations=[], crowds=[b"x"]), *records[1:]]

    assert describe_labels(gaps, "complete")[1] == (
        f"  signs of partial labels: 1 of {len(records)} images have no annotation, "
        "objects in 1 crowd regions are not annotated one by one"
    )


def test_an_image_with_far_fewer_objects_than_the_others_speaks_for_partial_labels(records):
    found = records[0].annotations[0]
    many = [
        replace(record, annotations=[found] * count) for record, count in zip(records, [20, 20, 20, 4], strict=False)
    ]

    assert describe_labels(many, "complete")[1].endswith(
        "signs of partial labels: 1 images have fewer than a quarter of the median of 20 objects"
    )


def test_annotations_that_cover_the_images_speak_for_complete_labels(records):
    assert describe_labels(records, "partial")[1].startswith("  signs of complete labels: every image has annotations")
    assert describe_labels([replace(records[0], annotations=[])], "partial")[1].endswith("none")
