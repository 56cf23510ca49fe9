import hashlib
import json
import os
import pickle
import sys
import threading
import zipfile
from collections import OrderedDict
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import pytest
import torch
from segment_anything.modeling.image_encoder import get_rel_pos

from finestsam.config import IMAGE_SIZES
from finestsam.errors import UserError
from finestsam.model.architectures import ARCHITECTURES, build_sam
from finestsam.model.weights import (
    PUBLISHED_WEIGHTS,
    PublishedFile,
    check_matches,
    find_published_weights,
    identify,
    image_size_of,
    load_state_dict,
    resize_positions,
)
from finestsam.runtime.folders import cache_folder

VIT_B = PUBLISHED_WEIGHTS["vit_b"]


@pytest.fixture(scope="module")
def tiny_weights():
    return build_sam("vit_tiny_test").state_dict()


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """An empty cache folder and an empty current folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("FINESTSAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tmp_path


def shapes_of(model_type, image_size=None):
    """Return a state dict of this type without any memory behind it."""
    if model_type == "vit_t":
        pytest.importorskip("timm")
    with torch.device("meta"):
        return build_sam(model_type, image_size).state_dict()


def save(content, path):
    torch.save(content, path)
    return path


def assert_same_weights(actual, expected):
    assert list(actual) == list(expected)
    torch.testing.assert_close(actual, dict(expected), rtol=0, atol=0)


# Files that changed on the way


@pytest.fixture
def whole_file(tiny_weights, tmp_path):
    return save(tiny_weights, tmp_path / "best.pth")


@pytest.mark.parametrize("member", ["data.pkl", "data/0", "data/7", "version"])
def test_a_file_with_a_flipped_bit_is_damaged(whole_file, member):
    with zipfile.ZipFile(whole_file) as archive:
        content = archive.read(f"best/{member}")
    data = bytearray(whole_file.read_bytes())
    data[data.index(content) + len(content) // 2] ^= 0x40
    whole_file.write_bytes(data)

    with pytest.raises(UserError, match="best.pth: is damaged, its checksums are wrong; download or copy it again"):
        load_state_dict(whole_file)


def test_a_file_whose_members_are_packed_is_not_read_as_it_lies_there(whole_file):
    packed = whole_file.with_name("packed.pth")
    with zipfile.ZipFile(whole_file) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))

    with pytest.raises(UserError, match="packed.pth: its tensors are packed, which torch.save does not do"):
        load_state_dict(packed)


def test_a_file_that_torch_wrote_without_checksums_is_read(tiny_weights, tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        path = save(tiny_weights, tmp_path / "best.pth")
    finally:
        torch.serialization.set_crc32_options(True)

    assert_same_weights(load_state_dict(path), tiny_weights)


# Where Meta's files are


def test_the_weights_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("FINESTSAM_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == Path.home() / ".cache" / "finestsam"

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "finestsam"

    monkeypatch.setenv("FINESTSAM_CACHE", "~/weights")
    assert cache_folder() == Path.home() / "weights"


def test_the_hashes_are_whole_and_the_files_are_those_of_the_readmes():
    assert {model_type: published.file_name for model_type, published in PUBLISHED_WEIGHTS.items()} == {
        "vit_b": "sam_vit_b_01ec64.pth",
        "vit_l": "sam_vit_l_0b3195.pth",
        "vit_h": "sam_vit_h_4b8939.pth",
        "vit_t": "mobile_sam.pt",
    }
    assert all(len(bytes.fromhex(published.sha256)) == 32 for published in PUBLISHED_WEIGHTS.values())


@pytest.mark.parametrize("folder", ["cache", "here", "here/sav"])
def test_a_file_of_meta_that_is_there_is_found(folders, folder):
    path = folders / folder / VIT_B.file_name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"weights")

    assert find_published_weights("vit_b", download=False).resolve() == path


def test_a_missing_file_of_meta_is_downloaded_into_the_weights_folder(folders, monkeypatch):
    content = b"weights" * 1000
    (folders / "site").mkdir()
    (folders / "site" / VIT_B.file_name).write_bytes(content)
    handler = partial(SimpleHTTPRequestHandler, directory=str(folders / "site"))
    server = HTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.handle_request, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/{VIT_B.file_name}"
    published = PublishedFile(url, hashlib.sha256(content).hexdigest(), len(content))
    monkeypatch.setitem(PUBLISHED_WEIGHTS, "vit_b", published)

    path = find_published_weights("vit_b")

    server.server_close()
    assert path == folders / "cache" / VIT_B.file_name
    assert path.read_bytes() == content


def test_offline_shows_the_address_the_place_the_hash_and_what_works_without(folders, monkeypatch):
    server = HTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler)
    server.server_close()  # its port is free now, and nobody listens
    url = f"http://127.0.0.1:{server.server_port}/{VIT_B.file_name}"
    monkeypatch.setitem(PUBLISHED_WEIGHTS, "vit_b", PublishedFile(url, VIT_B.sha256, VIT_B.size_bytes))

    with pytest.raises(UserError) as caught:
        find_published_weights("vit_b")

    place = folders / "cache" / VIT_B.file_name
    for part in (f"cannot download {url}", str(place), VIT_B.sha256, "--model.type vit_tiny takes the small weights"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_that_may_not_be_downloaded_is_reported_the_same_way(folders):
    with pytest.raises(UserError, match=f"{VIT_B.file_name} is not in .*cache, ., sav; to fetch it by hand") as caught:
        find_published_weights("vit_b", download=False)

    for part in (VIT_B.url, VIT_B.sha256, "--model.type vit_tiny takes the small weights"):
        assert part in str(caught.value)


def test_meta_has_no_weights_of_our_own_types():
    with pytest.raises(UserError, match="nobody has published weights for vit_tiny; --model.checkpoint none"):
        find_published_weights("vit_tiny")


# From a file to a state dict


@pytest.mark.parametrize(
    "wrap",
    [
        dict,
        OrderedDict,
        lambda weights: {"model": weights, "optimizer": {"state": {}}, "epoch": 3},
        lambda weights: {"state_dict": {f"model.{name}": tensor for name, tensor in weights.items()}, "epoch": 3},
        lambda weights: {"model": {f"module.sam.{name}": tensor for name, tensor in weights.items()}},
        lambda weights: {f"sam.{name}": torch.nn.Parameter(tensor) for name, tensor in weights.items()},
    ],
    ids=["plain", "ordered", "last.ckpt", "lightning", "distributed", "parameters"],
)
def test_weights_are_found_in_every_usual_wrapper(tiny_weights, tmp_path, wrap):
    loaded = load_state_dict(save(wrap(tiny_weights), tmp_path / "weights.pth"))

    assert_same_weights(loaded, tiny_weights)
    assert not any(tensor.requires_grad for tensor in loaded.values())


def test_the_old_file_format_of_torch_is_read(tiny_weights, tmp_path):
    torch.save(tiny_weights, tmp_path / "old.pth", _use_new_zipfile_serialization=False)

    assert_same_weights(load_state_dict(tmp_path / "old.pth"), tiny_weights)


def test_changing_loaded_weights_leaves_the_file_alone(tiny_weights, tmp_path):
    path = save(tiny_weights, tmp_path / "weights.pth")

    for tensor in load_state_dict(path).values():
        tensor.zero_()

    assert_same_weights(load_state_dict(path), tiny_weights)


def test_safetensors_are_read(tiny_weights, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({f"sam.{name}": tensor for name, tensor in tiny_weights.items()}, tmp_path / "w.safetensors")

    torch.testing.assert_close(load_state_dict(tmp_path / "w.safetensors"), dict(tiny_weights), rtol=0, atol=0)


def test_truncated_safetensors_are_reported(tiny_weights, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(dict(tiny_weights), tmp_path / "w.safetensors")
    cut_in_half(tmp_path / "w.safetensors")

    with pytest.raises(UserError, match="w.safetensors: is truncated or not a safetensors file"):
        load_state_dict(tmp_path / "w.safetensors")


def test_safetensors_without_their_package_tell_how_to_get_it(tmp_path, monkeypatch):
    (tmp_path / "w.safetensors").write_bytes(b"something")
    monkeypatch.setitem(sys.modules, "safetensors", None)

    with pytest.raises(UserError, match="w.safetensors: to read this kind of file, first run: pip install safetensors"):
        load_state_dict(tmp_path / "w.safetensors")


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"echo executed > {self.marker}",)


@pytest.mark.parametrize("kind", ["zip", "old torch file", "bare pickle"])
def test_code_in_a_checkpoint_is_refused_and_never_run(tmp_path, kind, recwarn):
    path, content = tmp_path / "weights.pth", {"model": Malicious(tmp_path / "marker")}
    if kind == "bare pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")

    with pytest.raises(UserError, match="weights.pth: file contains code, refused") as caught:
        load_state_dict(path)

    assert not (tmp_path / "marker").exists()
    assert "weights_only" not in str(caught.value) and "\n" not in str(caught.value)
    assert len(recwarn) == 0


def test_a_pickled_model_is_refused_by_the_name_of_its_class(tmp_path):
    path = save(torch.nn.Linear(2, 2), tmp_path / "model.pth")

    with pytest.raises(
        UserError, match=r"refused \(it calls torch.nn.modules.linear.Linear\); save model.state_dict\(\)"
    ):
        load_state_dict(path)


def cut_in_half(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_truncated_file_is_reported_with_its_size(tiny_weights, tmp_path, is_zip):
    torch.save(tiny_weights, tmp_path / "cut.pth", _use_new_zipfile_serialization=is_zip)
    cut_in_half(tmp_path / "cut.pth")
    size = (tmp_path / "cut.pth").stat().st_size

    with pytest.raises(UserError, match=f"cut.pth: is truncated at {size:,} bytes; download or copy it again"):
        load_state_dict(tmp_path / "cut.pth")


def test_a_truncated_file_of_meta_is_reported_with_the_expected_size_too(tiny_weights, tmp_path):
    path = save(tiny_weights, tmp_path / VIT_B.file_name)
    cut_in_half(path)

    with pytest.raises(
        UserError, match=r"is truncated at [\d,]+ bytes, expected 375,042,383; download or copy it again"
    ):
        load_state_dict(path)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is empty, 0 bytes; download it again"),
        (b"\n<!DOCTYPE html>\n<html><body>Not found</body></html>", "is a web page, not a checkpoint"),
        (b"\xef\xbb\xbf<HTML><body>Sign in</body></HTML>", "is a web page, not a checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a Git LFS pointer, .* git lfs pull"),
        (b"PK\x03", "is truncated at 3 bytes"),
        (b"\0" * 1000, "is not a checkpoint that torch can read: damaged, or another kind of file"),
        (b'{"model": 1}', "is not a checkpoint that torch can read: damaged, or another kind of file"),
        (bytes(range(1, 256)) * 40, "is not a checkpoint that torch can read: damaged, or another kind of file"),
    ],
    ids=["empty", "page", "page with mark", "lfs", "three bytes", "zeros", "json", "noise"],
)
def test_a_file_that_is_no_checkpoint_is_reported_in_one_line(tmp_path, content, message):
    (tmp_path / "weights.pth").write_bytes(content)

    with pytest.raises(UserError, match=f"weights.pth: {message}") as caught:
        load_state_dict(tmp_path / "weights.pth")

    assert "weights_only" not in str(caught.value) and "\n" not in str(caught.value)


def test_damage_anywhere_in_a_file_is_never_a_traceback(tmp_path):
    content = bytearray(save({"weight": torch.zeros(4)}, tmp_path / "good.pth").read_bytes())
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 0xFF
        (tmp_path / "damaged.pth").write_bytes(damaged)
        try:
            load_state_dict(tmp_path / "damaged.pth")
        except UserError as error:
            assert "weights_only" not in str(error) and "\n" not in str(error)


def test_a_file_that_unpacks_to_far_more_than_it_is_is_refused(tiny_weights, tmp_path):
    path = save(tiny_weights, tmp_path / "a.pth")
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content + bytes(20_000_000) if name.endswith("data.pkl") else content)

    with pytest.raises(UserError, match=r"its [\d,]+ bytes unpack to [\d,]+; save it again with torch.save"):
        load_state_dict(path)


@pytest.mark.parametrize("shape", [[1, 0, 10**18, 32], [2**40, 2**40], [10**30], [-1, 4], "x"])
def test_safetensors_of_absurd_shapes_are_reported(tmp_path, shape):
    pytest.importorskip("safetensors")
    header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)

    with pytest.raises(UserError, match="a.safetensors: is truncated or not a safetensors file"):
        load_state_dict(path)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.pth")

    with pytest.raises(UserError, match="a.pth: not a regular file"):
        load_state_dict(tmp_path / "a.pth")


def test_a_missing_file_and_a_folder_are_reported(tmp_path):
    with pytest.raises(UserError, match="nowhere.pth: no such file; give one, auto for Meta's weights, or none"):
        load_state_dict(tmp_path / "nowhere.pth")
    with pytest.raises(UserError, match="is a folder, expected a checkpoint file such as .*best.pth"):
        load_state_dict(tmp_path)


def test_a_file_below_a_file_cannot_be_read(tmp_path):
    (tmp_path / "file").write_text("x")

    with pytest.raises(UserError, match="weights.pth: cannot be read: "):
        load_state_dict(tmp_path / "file" / "weights.pth")


@pytest.mark.parametrize(
    "content, message",
    [
        (torch.zeros(3), r"is not a state dict but a Tensor; save model.state_dict\(\)"),
        ({}, "is a state dict without any weights"),
        ({"epoch": 3}, "is not a state dict: 'epoch' is a int, expected a tensor"),
        ({"state_dict": {7: torch.zeros(3)}}, "is not a state dict: 7 is a Tensor, expected a tensor"),
    ],
)
def test_a_checkpoint_without_weights_is_reported(tmp_path, content, message):
    with pytest.raises(UserError, match=f"other.pth: {message}"):
        load_state_dict(save(content, tmp_path / "other.pth"))


# Which SAM it is


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_type_is_reported_by_its_shapes(model_type):
    weights = shapes_of(model_type)

    assert identify(weights) == model_type
    assert image_size_of(weights) == IMAGE_SIZES[model_type]
    check_matches(weights, model_type, Path("sam.pth"))


def test_the_image_size_is_that_of_the_weights():
    weights = shapes_of("vit_b", image_size=256)

    assert image_size_of(weights) == 256
    assert identify(weights) == "vit_b"


def test_a_checkpoint_of_another_type_is_reported_in_one_line():
    with pytest.raises(UserError, match="sam_x.pth is vit_h, the settings say vit_b; use --model.type vit_h") as caught:
        check_matches(shapes_of("vit_h"), "vit_b", Path("sam_x.pth"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "key, family",
    [
        ("mask_decoder.hf_token.weight", "HQ-SAM"),
        ("mask_decoder.hf_mlp.layers.0.weight", "HQ-SAM"),
        ("image_encoder.trunk.blocks.0.norm1.weight", "SAM 2"),
        ("sam_mask_decoder.iou_token.weight", "SAM 2"),
        ("vision_encoder.layers.0.attn.qkv.weight", "a Hugging Face SamModel"),
    ],
)
def test_relatives_of_sam_are_called_by_their_names(key, family):
    weights = shapes_of("vit_b") | {key: torch.zeros(1)}

    with pytest.raises(UserError, match=f"model.pth is a checkpoint of {family}, expected one in the layout of Meta's"):
        check_matches(weights, "vit_b", Path("model.pth"))


def test_weights_of_something_else_are_reported_with_their_first_keys():
    weights = {f"layer{index}.weight": torch.zeros(1) for index in range(9)}
    message = r"is not a SAM checkpoint \(first keys: layer0.weight, layer1.weight, layer2.weight\)"

    with pytest.raises(UserError, match=f"the file {message}"):
        identify(weights)
    with pytest.raises(UserError, match=f"resnet.pth {message}"):
        check_matches(weights, "vit_b", Path("resnet.pth"))


def test_a_flat_position_embedding_is_not_a_sam():
    with pytest.raises(UserError, match="is not a SAM checkpoint"):
        identify(shapes_of("vit_b") | {"image_encoder.pos_embed": torch.zeros(1, 197, 192)})


def test_a_sam_of_unknown_size_is_reported_with_the_known_ones():
    weights = shapes_of("vit_b") | {"image_encoder.pos_embed": torch.zeros(1, 64, 64, 384)}

    with pytest.raises(
        UserError, match="is a SAM of unknown size: width 384 and 12 blocks, known are vit_b 768 and 12"
    ):
        identify(weights)


@pytest.mark.parametrize("size", [32, 96, 128])
def test_weights_serve_another_size_of_image(size):
    torch.manual_seed(0)
    sam = build_sam("vit_tiny_test")
    for name, weight in sam.named_parameters():
        if "rel_pos" in name:
            torch.nn.init.normal_(weight)

    resized = resize_positions(sam.state_dict(), size)

    other = build_sam("vit_tiny_test", size)
    other.load_state_dict(resized)
    assert image_size_of(resized) == size
    unchanged = [name for name, value in sam.state_dict().items() if value.shape == resized[name].shape]
    assert all(torch.equal(resized[name], sam.state_dict()[name]) for name in unchanged)
    # The positions of the corners stay those of the corners, and relative positions grow with the image.
    table, larger = (weights["image_encoder.blocks.1.attn.rel_pos_h"] for weights in (sam.state_dict(), resized))
    assert len(larger) == 2 * size // 16 - 1
    middle, larger_middle = len(table) // 2, len(larger) // 2
    torch.testing.assert_close(larger[larger_middle], table[middle])  # a token's own place


def test_relative_positions_are_those_that_segment_anything_would_interpolate():
    """Its get_rel_pos does so while the model runs, and any table can be used for any image."""
    torch.manual_seed(0)
    sam = build_sam("vit_tiny_test")
    name = "image_encoder.blocks.1.attn.rel_pos_h"
    torch.nn.init.normal_(sam.image_encoder.blocks[1].attn.rel_pos_h)
    resized = resize_positions(sam.state_dict(), 128)

    expected = get_rel_pos(8, 8, sam.state_dict()[name])

    torch.testing.assert_close(get_rel_pos(8, 8, resized[name]), expected)


def test_the_same_size_changes_nothing():
    weights = build_sam("vit_tiny_test").state_dict()
    resized = resize_positions(weights, 64)

    assert all(torch.allclose(resized[name], value, atol=1e-6) for name, value in weights.items())
