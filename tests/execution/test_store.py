"""The store: a key finds its own result or nothing, whatever happened to the disk or the writer."""

from __future__ import annotations

import importlib.metadata
import json
import os
import pickle
import platform
import signal
import subprocess
import sys
import time
import warnings
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from disks import read_only, small_disk
from paramspec.errors import InputError
from paramspec.execution import provenance
from paramspec.execution import store as store_module
from paramspec.execution.files import require_writable, writing_to
from paramspec.execution.provenance import NUMBER_LIBRARIES, number_versions
from paramspec.execution.store import Store

KEY = {"model": "ab" * 32, "dtype": "float32", "choices": {"ratios": [0.01, 0.05], "seed": 0}}
CONTENT = bytes(range(40))


def write(directory: Path) -> None:
    (directory / "numbers.bin").write_bytes(CONTENT)
    (directory / "note.txt").write_text("ärger")


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def everything(store):
    """All files and directories below the store."""
    return sorted(path.relative_to(store.root).as_posix() for path in store.root.rglob("*"))


def fill_disk(directory: Path) -> None:
    raise OSError(28, "No space left on device", str(directory / "numbers.bin"))


# Keys


def test_what_was_put_is_found_and_nothing_else(store):
    assert store.get(KEY) is None
    path = store.put(KEY, write)
    assert store.get(KEY) == path
    assert (path / "numbers.bin").read_bytes() == CONTENT
    assert json.loads((path / "key.json").read_text()) == {**KEY, "versions": number_versions()}


@pytest.mark.parametrize("name", NUMBER_LIBRARIES)
def test_another_version_of_what_computes_is_another_key(
    store, monkeypatch, name, pretend_versions
):
    path = store.put(KEY, write)
    pretend_versions(**{name: "999.1"})
    other = Store(store.root)
    assert other.get(KEY) is None
    assert other.put(KEY, write) != path
    assert other.record(KEY)["versions"][name] == "999.1"
    monkeypatch.undo()
    again = Store(store.root)
    assert again.get(KEY) == path
    assert again.record(KEY)["versions"][name] == importlib.metadata.version(name)


def test_what_a_build_is_for_is_in_the_record_and_not_in_the_key(store, pretend_versions):
    """A key has the device; 2.13.0+cpu and 2.13.0+cu130 are one release."""
    pretend_versions(torch="2.13.0+cu130")
    path = Store(store.root).put(KEY, write)
    pretend_versions(torch="2.13.0")
    assert Store(store.root).get(KEY) == path
    assert Store(store.root).record(KEY)["versions"]["torch"] == "2.13.0+cu130"


def test_versions_that_change_no_number_do_not_matter(store, pretend_versions):
    path = store.put(KEY, write)
    pretend_versions(pandas="999", paramspec="999", pyarrow="999")
    assert Store(store.root).get(KEY) == path


def test_a_record_is_that_of_the_process_that_computed(store, monkeypatch):
    store.put(KEY, write, {"engine": "packed"})
    monkeypatch.setattr(store_module, "computed", lambda **_: pytest.fail("recorded anew"))
    monkeypatch.setattr(provenance, "hardware", lambda: {"cpu": "another"})
    record = Store(store.root).record(KEY)
    assert record["engine"] == "packed"
    assert record["hardware"]["threads"] == torch.get_num_threads()
    assert record["hardware"]["cpu"] != "another"
    assert record["versions"]["python"] == platform.python_version()
    assert abs(datetime.now(UTC) - datetime.fromisoformat(record["date"])).days == 0
    assert store.record({"another": "key"}) == {}


def test_a_worker_with_other_versions_puts_nothing(store, pretend_versions):
    """The key says what the run began with: a result of other versions would not be its own."""
    handed = pickle.dumps(store)
    pretend_versions(transformers="4.57.1")
    began = store.versions["transformers"]
    with pytest.raises(InputError, match=f"^transformers 4.57.1: the run began with .* {began};"):
        pickle.loads(handed).put(KEY, write)
    assert everything(store) == []


def test_the_order_of_a_key_does_not_matter(store):
    path = store.put(KEY, write)
    assert store.get(dict(reversed(KEY.items()))) == path
    assert Store(store.root).get(json.loads(json.dumps(KEY))) == path


@pytest.mark.parametrize(
    "change",
    [
        {"model": "ab" * 31 + "ac"},
        {"dtype": "bfloat16"},
        {"choices": {"ratios": [0.05, 0.01], "seed": 0}},
        {"choices": {"ratios": [0.01, 0.05], "seed": "0"}},
        {"choices": {"ratios": [0.01, 0.05]}},
        {"more": None},
    ],
)
def test_any_change_of_a_key_is_another_result(store, change):
    store.put(KEY, write)
    assert store.get(KEY | change) is None


# Writes


def test_a_writer_that_fails_leaves_nothing(store):
    earlier = store.put(KEY, write)
    before = everything(store)

    def crash(directory):
        write(directory)
        raise KeyError("half way")

    for key in (KEY | {"dtype": "bfloat16"}, KEY):
        with pytest.raises(KeyError):
            store.put(key, crash)
    # The directories that results are sorted into may be new; of the result there is nothing.
    assert [name for name in everything(store) if name.count("/") > 1] == [
        name for name in before if name.count("/") > 1
    ]
    assert not list(store.root.rglob(".partial*"))
    assert store.get(KEY) == earlier
    assert store.get(KEY | {"dtype": "bfloat16"}) is None


def test_nothing_is_visible_before_all_of_it_is_written(store):
    seen = []

    def watch(directory):
        write(directory)
        seen.append(Store(store.root).get(KEY))

    store.put(KEY, watch)
    assert seen == [None]
    assert store.get(KEY) is not None


def test_a_writer_that_is_killed_leaves_nothing_visible(store):
    program = """
import sys, time
from paramspec.execution.store import Store
def write(directory):
    (directory / "numbers.bin").write_bytes(b"half")
    print("writing", flush=True)
    time.sleep(600)
Store(sys.argv[1]).put({"model": "killed"}, write)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(store.root)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.get({"model": "killed"}) is None
    path = store.put({"model": "killed"}, write)
    assert (store.get({"model": "killed"}) / "numbers.bin").read_bytes() == CONTENT
    assert path == store.get({"model": "killed"})


def test_of_two_writers_the_first_wins_and_the_second_is_served(store):
    def slow(directory):
        (directory / "numbers.bin").write_bytes(b"second")
        Store(store.root).put(KEY, write)  # another worker, while this one still writes

    path = store.put(KEY, slow)
    assert (path / "numbers.bin").read_bytes() == CONTENT
    assert store.get(KEY) == path
    assert not list(store.root.rglob(".partial*"))


def test_many_processes_may_put_the_same_keys_at_once(store):
    program = """
import sys, time, warnings
from paramspec.execution.store import Store
warnings.simplefilter("error")
store, begin = Store(sys.argv[1]), float(sys.argv[2])
time.sleep(max(0, begin - time.time()))
for number in range(60):
    path = store.put({"number": number}, lambda d: (d / "n.bin").write_bytes(bytes([number]) * 999))
    found = store.get({"number": number})
    assert found == path, found
    assert (found / "n.bin").read_bytes() == bytes([number]) * 999
"""
    arguments = [sys.executable, "-c", program, str(store.root), str(time.time() + 2)]
    processes = [subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    for process in processes:
        assert process.communicate()[1] == ""
        assert process.returncode == 0
    for number in range(60):
        path = store.get({"number": number})
        assert (path / "n.bin").read_bytes() == bytes([number]) * 999
    assert not list(store.root.rglob(".partial*"))


# Turns, leftovers, versions

HOLDER = """
import sys, time
from paramspec.execution.store import Store
with Store(sys.argv[1]).turn({"number": 1}) as mine:
    print(mine, flush=True)
    time.sleep(600)
"""


def test_a_turn_is_one_process_at_a_time_and_ends_with_the_process(store):
    command = [sys.executable, "-c", HOLDER, str(store.root)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "True\n"
    with store.turn({"number": 1}, wait=False) as mine:
        assert not mine
    with store.turn({"number": 2}, wait=False) as mine:
        assert mine
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with store.turn({"number": 1}) as mine, Store(store.root).turn({"number": 1}) as again:
        assert mine
        assert again  # the same thread's
    assert not list(store.root.rglob("*.lock"))


def test_an_error_within_a_turn_is_not_swallowed(store):
    with pytest.raises(OSError, match="no space"), store.turn(KEY):
        raise OSError("no space")
    with store.turn(KEY, wait=False) as mine:
        assert mine


def test_what_killed_processes_left_is_removed_once_it_is_old(store):
    path = store.put(KEY, write)
    old, new = path.with_name(".partial-old"), path.with_name(".partial-new")
    lock = path.with_name("dead.lock")
    for folder in (old, new):
        folder.mkdir()
        (folder / "numbers.bin").write_bytes(b"half")
    lock.write_text("")
    long_ago = time.time() - 2 * 24 * 3600
    for left in (old, lock, path):  # a result is kept, however old
        os.utime(left, (long_ago, long_ago))
    store.remove_leftovers()
    assert not old.exists()
    assert not lock.exists()
    assert new.exists()
    assert store.get(KEY) == path


def test_a_store_of_a_newer_version_is_refused_and_left_alone(store):
    store.put(KEY, write)
    (store.root / "v2").mkdir()
    before = everything(store)
    message = (
        f"^{store.root}: a store of version 2, and this paramspec writes version 1; upgrade "
        "paramspec, or choose another directory$"
    )
    with pytest.raises(InputError, match=message):
        Store(store.root)
    assert everything(store) == before
    (store.root / "v2").rename(store.root / "v0")  # an older one is nobody's business
    assert Store(store.root).get(KEY)


# Damage


def damaged(store, key=KEY):
    """`get` on a damaged result: None, and a warning that says what and where it is kept."""
    with pytest.warns(UserWarning, match=r"set aside as .*damaged.* and computed again") as caught:
        assert store.get(key) is None
    assert len(caught) == 1
    return str(caught[0].message)


@pytest.mark.parametrize(
    "break_it",
    [
        lambda path: (path / "numbers.bin").write_bytes(CONTENT[:-1]),
        lambda path: (path / "numbers.bin").write_bytes(CONTENT + b"\0"),
        lambda path: (path / "numbers.bin").write_bytes(b""),
        lambda path: (path / "numbers.bin").unlink(),
        lambda path: (path / "key.json").unlink(),
        lambda path: (path / "key.json").write_text("{}"),
        lambda path: (path / "checksums.json").unlink(),
        lambda path: (path / "checksums.json").write_text(""),
        lambda path: (path / "checksums.json").write_text("{}"),
        lambda path: (path / "checksums.json").write_text("[]"),
        lambda path: (path / "checksums.json").write_text("null"),
        lambda path: (path / "checksums.json").write_bytes(b"\xff\xfe{}"),
    ],
)
def test_a_damaged_result_is_noticed_set_aside_and_made_again(store, break_it):
    path = store.put(KEY, write)
    break_it(path)
    message = damaged(store)
    assert str(path) in message
    assert not path.exists()
    assert len(list(path.parent.glob(f"{path.name}.damaged-*"))) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.get(KEY) is None  # noticed once
        assert (store.put(KEY, write) / "numbers.bin").read_bytes() == CONTENT
        assert store.get(KEY) == path


@pytest.mark.parametrize("name", ["numbers.bin", "note.txt", "key.json"])
def test_every_flipped_bit_is_noticed(store, name):
    path = store.put(KEY, write)
    content = (path / name).read_bytes()
    for bit in range(0, 8 * len(content), 1 if len(content) < 50 else 7):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        (path / name).write_bytes(flipped)
        assert f"{name} is damaged" in damaged(store)
        path = store.put(KEY, write)


def test_a_bit_flipped_in_the_checksums_never_hides_damage(store):
    """It is noticed, or it is in white space and the content is whole."""
    path = store.put(KEY, write)
    content = (path / "checksums.json").read_bytes()
    noticed = 0
    for bit in range(0, 8 * len(content), 5):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        (path / "checksums.json").write_bytes(flipped)
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            found = store.get(KEY)
        noticed += found is None
        assert found is None or (found / "numbers.bin").read_bytes() == CONTENT
        (path / "checksums.json").write_bytes(content) if found else store.put(KEY, write)
    assert noticed > 0.9 * len(range(0, 8 * len(content), 5))


def test_the_same_result_may_be_damaged_twice(store):
    for _ in range(3):
        path = store.put(KEY, write)
        (path / "numbers.bin").write_bytes(b"")
        damaged(store)
        assert (store.put(KEY, write) / "numbers.bin").read_bytes() == CONTENT
        assert store.get(KEY) == path


# Disks


def refusal(store, key, writer=write):
    with pytest.raises(InputError) as caught:
        store.put(key, writer)
    message = str(caught.value)
    assert "\n" not in message
    assert str(store.root) in message
    assert message.endswith("free some space, or choose a directory that you may write to")
    return message


def test_a_full_disk_is_told_in_one_line(store):
    store.put(KEY, write)
    before = everything(store)
    assert "No space left on device" in refusal(store, KEY | {"seed": 1}, fill_disk)
    assert [name for name in everything(store) if name in before] == before
    assert not list(store.root.rglob(".partial*"))
    assert (store.get(KEY) / "numbers.bin").read_bytes() == CONTENT


def test_a_disk_that_is_really_full(tmp_path):
    """Files of every kind that results are made of, each larger than the disk."""
    import pandas as pd

    def tensors(directory):
        save_file({"sums": torch.zeros(200_000)}, directory / "coefficients.safetensors")

    def table(directory):
        numbers = torch.randn(200_000, generator=torch.Generator().manual_seed(0)).numpy()
        pd.DataFrame({"numbers": numbers}).to_parquet(directory / "pss.parquet")

    def text(directory):
        (directory / "note.txt").write_text("x" * 10**6)

    with small_disk(tmp_path / "disk") as disk:
        store = Store(disk / "store")
        store.put(KEY, write)
        for writer in (tensors, table, text):
            assert "No space left on device" in refusal(store, KEY | {"seed": 1}, writer)
            assert store.get(KEY | {"seed": 1}) is None
            assert not list(store.root.rglob(".partial*"))
        assert (store.get(KEY) / "numbers.bin").read_bytes() == CONTENT
        # Space was given back: what fits is stored.
        assert store.put(KEY | {"seed": 2}, write) == store.get(KEY | {"seed": 2})


def test_a_read_only_disk(tmp_path):
    with read_only(tmp_path / "disk") as disk:
        assert "Read-only file system" in refusal(Store(disk), KEY)
        with pytest.raises(InputError, match="Read-only file system"):
            require_writable(disk / "out")


def test_a_store_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    assert "Not a directory" in refusal(Store(tmp_path / "file" / "store"), KEY)
    for place in (tmp_path / "file" / "out", tmp_path / "file"):
        with pytest.raises(InputError, match=f"{place}: cannot write"):
            require_writable(place)


def test_a_writable_directory_is_made_and_left_empty(tmp_path):
    require_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_store_that_cannot_be_written_is_still_read(store, monkeypatch):
    path = store.put(KEY, write)
    (path / "numbers.bin").write_bytes(b"")
    monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(PermissionError(13, "no")))
    damaged(store)


def test_only_failed_writes_are_translated(tmp_path):
    with pytest.raises(InputError, match=f"^{tmp_path}: cannot write"), writing_to(tmp_path):
        raise OSError("no name, no number")
    full = SafetensorError("Error while serializing: No space left on device (os error 28)")
    with pytest.raises(InputError, match="No space left on device"), writing_to(tmp_path):
        raise full
    with pytest.raises(KeyError), writing_to(tmp_path):
        raise KeyError
    with writing_to(tmp_path):
        os.stat(tmp_path)
