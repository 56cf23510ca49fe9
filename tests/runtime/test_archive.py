import copy
import random
import stat
import zipfile
from types import SimpleNamespace

import pytest

from finestsam.errors import UserError
from finestsam.runtime import archive as archive_module
from finestsam.runtime.archive import unpack

NOISE = random.Random(0).randbytes(50_000)  # does not pack
FILES = {"a.txt": b"first", "inner/b.bin": NOISE, "inner/deep/c.txt": b"third" * 100}


def write_zip(path, files=FILES, edit=lambda members: None):
    """Write a zip file; `edit` changes what its directory says about the members."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inner/", "")
        for name, content in files.items():
            archive.writestr(name, content)
        edit(archive.filelist)
    return path


def read_tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def archive(tmp_path):
    return tmp_path / "in.zip"


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "target" / "out"


@pytest.fixture
def refuse(tmp_path, archive, folder):
    """Return a function that unpacks and expects a refusal which leaves nothing behind."""

    def check(message, **settings):
        before = read_tree(tmp_path)
        with pytest.raises(UserError, match=message) as caught:
            unpack(archive, folder, **settings)
        assert str(archive) in str(caught.value) and "\n" not in str(caught.value)
        assert read_tree(tmp_path) == before and not folder.exists()
        assert not folder.parent.exists() or list(folder.parent.iterdir()) == []

    return check


def test_a_zip_file_is_unpacked_whole(archive, folder, capfd):
    assert unpack(write_zip(archive), folder) == folder

    assert read_tree(folder) == FILES
    assert [path.name for path in folder.parent.iterdir()] == ["out"]
    assert capfd.readouterr().err == ""  # not a terminal: no progress bar


def test_a_folder_that_is_there_is_left_as_it_is(archive, folder):
    folder.mkdir(parents=True)
    (folder / "mine.txt").write_text("mine")

    unpack(archive, folder)  # which need not even be there

    assert read_tree(folder) == {"mine.txt": b"mine"}


def test_only_wanted_files_are_unpacked(archive, folder, refuse):
    write_zip(archive)

    refuse("contains none of the expected files", is_wanted=lambda name: name == "other")
    unpack(archive, folder, lambda name: name == "inner/b.bin")

    assert read_tree(folder) == {"inner/b.bin": NOISE}


def test_what_an_interrupted_run_left_is_written_anew(archive, folder):
    write_zip(archive)
    half_done = folder.with_name(".out.unpacking")
    half_done.mkdir(parents=True)
    (half_done / "a.txt").write_text("half of it")
    (half_done / "stale.txt").write_text("stale")

    unpack(archive, folder)

    assert read_tree(folder) == FILES and not half_done.exists()


def test_an_interruption_leaves_no_folder(archive, folder, monkeypatch):
    write_zip(archive)

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(archive_module.shutil, "copyfileobj", interrupt)
    with pytest.raises(KeyboardInterrupt):
        unpack(archive, folder)
    assert list(folder.parent.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    ["../evil.txt", "inner/../../evil.txt", "/tmp/evil.txt", "//host/evil.txt", "C:/evil.txt", "C:evil.txt",
     "..\\evil.txt", "inner\\..\\..\\evil.txt", "./..", "."],
)  # fmt: skip
def test_a_member_that_leads_outside_is_refused(archive, refuse, name):
    write_zip(archive, FILES | {name: b"evil"})

    refuse("leads outside the folder, expected a relative path with / between its parts; not unpacked")


def test_a_name_with_a_nul_is_refused(archive, refuse):
    write_zip(archive, FILES | {"good.txt#.exe": b"evil"})
    archive.write_bytes(archive.read_bytes().replace(b"good.txt#.exe", b"good.txt\0.exe"))

    refuse(r"'good.txt\\\\x00.exe' leads outside the folder")


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFSOCK])
def test_links_and_devices_are_refused(archive, refuse, kind):
    member = zipfile.ZipInfo("link")
    member.external_attr = (kind | 0o777) << 16
    write_zip(archive, FILES)
    with zipfile.ZipFile(archive, "a") as source:
        source.writestr(member, "/etc")

    refuse("'link' is a link or a device, expected files and folders only; not unpacked")


def test_an_encrypted_member_is_refused(archive, refuse):
    def encrypt(members):
        members[-1].flag_bits |= 1

    write_zip(archive, edit=encrypt)

    refuse("'inner/deep/c.txt' is encrypted; not unpacked")


def test_an_uncommon_method_is_refused(archive, refuse):
    write_zip(archive)
    with zipfile.ZipFile(archive, "a", zipfile.ZIP_LZMA) as source:
        source.writestr("d.txt", b"fourth")

    refuse(r"'d.txt' is packed by method 14, expected 0 \(stored\) or 8 \(deflated\)")


def test_a_bomb_is_refused(archive, refuse):
    write_zip(archive, {"zeros.bin": bytes(20_000_000)})

    refuse(r"'zeros.bin' grows from 19,4\d\d to 20,000,000 bytes, expected at most 100 times; not unpacked")


def test_a_bomb_of_many_small_members_is_refused(archive, refuse):
    write_zip(archive, {f"{number}.bin": bytes(1_000_000) for number in range(30)})

    refuse(r"grows to 30,000,000 bytes, expected at most [34],\d\d\d,\d\d\d; not unpacked")


def test_a_small_blank_file_is_no_bomb(archive, folder):
    unpack(write_zip(archive, FILES | {"mask.pgm": bytes(500_000)}), folder)

    assert (folder / "mask.pgm").read_bytes() == bytes(500_000)


def test_members_that_share_their_bytes_are_refused(archive, refuse):
    def repeat(members):
        for number in range(3):
            twin = copy.copy(members[2])
            twin.filename = f"twin{number}.bin"
            members.append(twin)

    write_zip(archive, edit=repeat)

    refuse(r"200,\d\d\d packed bytes in a file of 5\d,\d\d\d: its members overlap; not unpacked")


def test_more_than_the_limit_is_refused(archive, refuse):
    write_zip(archive)

    refuse("grows to 50,505 bytes, expected at most 50,000; not unpacked", limit_bytes=50_000)


def test_a_full_disk_is_reported_before_anything_is_written(archive, refuse, monkeypatch):
    write_zip(archive)
    monkeypatch.setattr(archive_module.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10))

    refuse("unpacks to 50,505 bytes, but .*target has room for 10; make room there")


def test_a_disk_that_fills_up_meanwhile_is_reported(archive, refuse, monkeypatch):
    write_zip(archive)

    def fill_up(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(archive_module.shutil, "copyfileobj", fill_up)
    refuse("cannot unpack .*in.zip into .*out: No space left on device")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("twin", ["a.txt", "./a.txt", "a.txt/"])
def test_a_name_that_is_there_twice_is_refused(archive, refuse, twin):
    write_zip(archive)
    with zipfile.ZipFile(archive, "a") as source:
        source.writestr(twin, b"")

    refuse(f"'{twin}' is in it twice; not unpacked")


def test_a_file_in_the_place_of_a_folder_is_reported(archive, refuse):
    write_zip(archive, FILES | {"a.txt/under": b"evil"})

    refuse("cannot unpack .*in.zip into .*out: ")


def test_wrong_bytes_are_reported(archive, refuse):
    write_zip(archive)
    content = bytearray(archive.read_bytes())
    content[content.index(NOISE[:20]) + 1000] ^= 1  # noise is stored as it is
    archive.write_bytes(content)

    refuse("damaged, or not a zip file: .*; remove it and fetch it again")


def test_a_size_that_is_not_true_is_reported(archive, refuse):
    def boast(members):
        members[-1].file_size += 100

    write_zip(archive, edit=boast)

    refuse("damaged, or not a zip file: inner/deep/c.txt ends after 500 of 600 bytes; remove it and fetch it again")


@pytest.mark.parametrize("content", [b"", b"<html>no zip</html>", b"PK\5\6" + bytes(3)])
def test_what_is_no_zip_file_is_reported(archive, refuse, content):
    archive.write_bytes(content)

    refuse("damaged, or not a zip file: File is not a zip file; remove it and fetch it again")


def test_half_a_zip_file_is_reported(archive, refuse):
    content = write_zip(archive).read_bytes()
    archive.write_bytes(content[: len(content) // 2])

    refuse("damaged, or not a zip file: File is not a zip file; remove it and fetch it again")


def test_any_damage_is_reported_in_one_line_or_harmless(tmp_path, archive):
    content = write_zip(archive).read_bytes()
    generator = random.Random(1)
    for number in range(300):
        damaged = bytearray(content)
        for _ in range(3):  # where the names, sizes and offsets are
            damaged[generator.choice([generator.randrange(100), -generator.randrange(1, 300)])] = generator.randrange(
                256
            )
        archive.write_bytes(damaged)
        folder = tmp_path / str(number)
        try:
            unpack(archive, folder)
        except UserError as error:
            assert not folder.exists() and "\n" not in str(error)

    assert {path.name for path in tmp_path.iterdir()} <= {"in.zip", *map(str, range(300))}
