"""The store: a key finds its own result or nothing, whatever happened to the disk or the writer."""

from __future__ import annotations

import json
import os
import pickle
import platform
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from disks import small_disk
from paramspec.errors import InputError
from paramspec.execution import provenance
from paramspec.execution.provenance import NUMBER_LIBRARIES, read_computed
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
    """All files and directories below the store, but for those that results are sorted into."""
    names = (path.relative_to(store.root).as_posix() for path in store.root.rglob("*"))
    return sorted(name for name in names if name.count("/") > 1)


def test_what_was_put_is_found_and_nothing_else(store):
    assert store.get(KEY) is None
    path = store.put(KEY, write)
    assert store.get(dict(reversed(KEY.items()))) == path
    assert Store(store.root).get(json.loads(json.dumps(KEY))) == path
    assert (path / "numbers.bin").read_bytes() == CONTENT


def test_any_change_of_a_key_is_another_result(store):
    store.put(KEY, write)
    choices = [{"ratios": [0.05, 0.01], "seed": 0}, {"ratios": [0.01, 0.05], "seed": "0"}]
    for change in ({"model": "ac" * 32}, {"more": None}, *({"choices": one} for one in choices)):
        assert store.get(KEY | change) is None


def test_a_version_is_in_the_key_exactly_if_it_can_change_a_number(store, pretend_versions):
    """A key has the device; 2.13.0+cpu and 2.13.0+cu130 are one release."""
    for name in NUMBER_LIBRARIES:
        pretend_versions(**{name: "999.1+cu130"})
        path = Store(store.root).put(KEY, write)
        assert read_computed(path)["versions"][name] == "999.1+cu130"
        pretend_versions(**{name: "999.1"}, pandas="999", paramspec="999", pyarrow="999")
        assert Store(store.root).get(KEY) == path
        pretend_versions(**{name: "999.2"})
        assert Store(store.root).get(KEY) is None


def test_a_record_is_that_of_the_process_that_computed(store, monkeypatch):
    path = store.put(KEY | {"unit": "some"}, write, {"engine": "packed"})
    monkeypatch.setattr(provenance, "hardware", lambda: {"cpu": "another"})
    record = read_computed(path)
    assert (record["unit"], record["engine"]) == ("some", "packed")
    assert record["hardware"]["threads"] == torch.get_num_threads()
    assert record["versions"]["python"] == platform.python_version()
    assert read_computed(path / "nothing") == {}


def test_a_worker_with_other_versions_puts_nothing(store, pretend_versions):
    """The key says what the run began with: a result of other versions would not be its own."""
    handed = pickle.dumps(store)
    pretend_versions(transformers="4.57.1")
    began = store.versions["transformers"]
    with pytest.raises(InputError, match=f"^transformers 4.57.1: the run began with {began};"):
        pickle.loads(handed).put(KEY, write)
    assert everything(store) == []


@pytest.mark.parametrize(
    ("failure", "told"),
    [(KeyError("half way"), KeyError), (OSError(28, "No space left on device"), InputError)],
)
def test_a_writer_that_fails_leaves_nothing(store, failure, told):
    earlier = store.put(KEY, write)
    before = everything(store)

    def crash(directory):
        write(directory)
        raise failure

    with pytest.raises(told, match=re.escape(failure.args[-1])):
        store.put(KEY | {"dtype": "bfloat16"}, crash)
    assert everything(store) == before
    assert store.get(KEY) == earlier


def test_of_two_writers_the_first_wins_and_the_second_is_served(store):
    """Nothing is visible before all of it is written."""

    def slow(directory):
        (directory / "numbers.bin").write_bytes(b"second")
        assert store.get(KEY) is None
        Store(store.root).put(KEY, write)  # another worker, while this one still writes

    path = store.put(KEY, slow)
    assert (path / "numbers.bin").read_bytes() == CONTENT
    assert store.get(KEY) == path
    assert not list(store.root.rglob(".partial*"))


MANY = """
import sys, time, warnings
from paramspec.execution.store import Store
warnings.simplefilter("error")
store, begin = Store(sys.argv[1]), float(sys.argv[2])
time.sleep(max(0, begin - time.time()))
for number in range(60):
    path = store.put({"number": number}, lambda d: (d / "n.bin").write_bytes(bytes([number]) * 999))
    assert store.get({"number": number}) == path
    assert (path / "n.bin").read_bytes() == bytes([number]) * 999
"""


def test_many_processes_may_put_the_same_keys_at_once(store):
    words = [sys.executable, "-c", MANY, str(store.root), str(time.time() + 2)]
    processes = [subprocess.Popen(words, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    assert [process.communicate()[1] for process in processes] == [""] * 4
    assert len(list(store.root.glob("v*/*/*"))) == 60  # and nothing unfinished


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
    for number in (1, 2):
        with store.turn({"number": number}, wait=False) as mine:
            assert mine == (number == 2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with store.turn({"number": 1}) as mine:
        assert mine
    with pytest.raises(OSError, match="no space"), store.turn(KEY):
        raise OSError("no space")  # which is not taken for one of the lock's
    assert not list(store.root.rglob("*.lock"))


def test_what_killed_processes_left_is_removed_once_it_is_old(store):
    path = store.put(KEY, write)
    old, new, lock = (path.with_name(name) for name in (".partial-old", ".partial-new", "a.lock"))
    for folder in (old, new):
        folder.mkdir()
        (folder / "numbers.bin").write_bytes(b"half")
    lock.write_text("")
    long_ago = time.time() - 2 * 24 * 3600
    for left in (old, lock, path):  # a result is kept, however old
        os.utime(left, (long_ago, long_ago))
    store.remove_leftovers()
    assert (old.exists(), lock.exists(), new.exists()) == (False, False, True)
    assert store.get(KEY) == path


def damaged(store):
    """`get` on a damaged result: None, and a warning that says what and where it is kept."""
    with pytest.warns(UserWarning, match=r"set aside as .*damaged.* and computed again") as caught:
        assert store.get(KEY) is None
    assert len(caught) == 1
    return str(caught[0].message)


ONE_BIT = CONTENT[:-1] + b"\x26"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("numbers.bin", content) for content in (None, CONTENT[:-1], ONE_BIT)),
        ("key.json", None),
        *(("checksums.json", content) for content in (None, b"", b"{}", b"null", b"\xff\xfe{}")),
    ],
)
def test_a_damaged_result_is_noticed_set_aside_and_made_again(store, name, content):
    for count in (1, 2):  # the same result may be damaged twice
        path = store.put(KEY, write)
        if content is None:
            (path / name).unlink()
        else:
            (path / name).write_bytes(content)
        assert str(path) in damaged(store)
        assert len(list(path.parent.glob(f"{path.name}.damaged-*"))) == count
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert store.get(KEY) is None  # noticed once
            assert (store.put(KEY, write) / "numbers.bin").read_bytes() == CONTENT


def test_a_store_that_cannot_be_written_is_still_read(store, monkeypatch):
    path = store.put(KEY, write)
    (path / "numbers.bin").write_bytes(b"")
    monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(PermissionError(13, "no")))
    damaged(store)


def test_a_disk_that_is_really_full(tmp_path):
    """Files of every kind that results are made of, each larger than the disk."""
    numbers = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    table = pd.DataFrame({"numbers": numbers.numpy()})
    with small_disk(tmp_path / "disk") as disk:
        store = Store(disk / "store")
        store.put(KEY, write)
        for writer in (
            lambda folder: save_file({"sums": numbers}, folder / "coefficients.safetensors"),
            lambda folder: table.to_parquet(folder / "pss.parquet"),
            lambda folder: (folder / "note.txt").write_text("x" * 10**6),
        ):
            place = re.escape(str(store.root))
            with pytest.raises(InputError, match=rf"{place}.*No space left on device"):
                store.put(KEY | {"seed": 1}, writer)
            assert store.get(KEY | {"seed": 1}) is None
            assert not list(store.root.rglob(".partial*"))
        # Space was given back: what fits is stored.
        assert store.put(KEY | {"seed": 2}, write) == store.get(KEY | {"seed": 2})
