"""Results and questions in a repository of a hub, which stands in for the real one."""

from __future__ import annotations

import base64
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import huggingface_hub.constants
import pandas as pd
import pytest
import yaml

from paramspec import Choices, Store, measure_pss
from paramspec.errors import InputError
from paramspec.publish import publish_questions, publish_run
from paramspec.specwiki import QUESTIONS, load_questions
from paramspec.studies.sweep import write_study
from toy_study import save_toy, toy_questions


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as a commit of small files takes; refuses `not-mine/...`."""

    def answer(self, status: int, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        sent = self.rfile.read(int(self.headers["Content-Length"] or 0))
        here = f"http://127.0.0.1:{self.server.server_port}"
        if self.path == "/api/repos/create":
            asked = json.loads(sent)
            if asked.get("organization") == "not-mine":
                return self.answer(403, {"error": "You don't have the rights"})
            self.server.created.append(asked)
            self.answer(200, {"url": f"{here}/datasets/me/{asked['name']}"})
        elif self.path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                for one in json.loads(sent)["files"]
            ]
            self.answer(200, {"files": files})
        else:
            assert "/commit/" in self.path
            for line in sent.decode().splitlines():
                one = json.loads(line)
                if one["key"] == "file":
                    data = base64.b64decode(one["value"]["content"])
                    self.server.files[one["value"]["path"]] = data
            told = {"commitUrl": f"{here}/datasets/me/x/commit/{'a' * 40}", "commitOid": "a" * 40}
            self.answer(200, told | {"pullRequestUrl": None})

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def hub(monkeypatch):
    """The stand-in; `files` are those of the last commits."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.files, server.created = {}, []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        monkeypatch.setenv("HF_TOKEN", "hf_made_up")
        yield server
        server.shutdown()


def written(hub, folder: Path) -> Path:
    for name, data in hub.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def header(folder: Path) -> dict:
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


def test_a_run_is_a_data_set_that_its_card_says_how_to_load(hub, tmp_path, capsys):
    toy, store = save_toy(tmp_path / "toy"), Store(tmp_path / "store")
    choices = Choices(ratios=(0.2,), general=3, nulls=("random",))
    study = measure_pss([str(toy)], toy_questions(2), choices, store=store)
    write_study(study, tmp_path / "run")
    assert publish_run(tmp_path / "run", "me/results").endswith("/datasets/me/results")
    assert hub.created == [{"name": "results", "organization": "me", "type": "dataset"}] or (
        hub.created[0]["name"] == "results"
    )
    place = written(hub, tmp_path / "published")
    assert {one["config_name"] for one in header(place)["configs"]} == {
        "pss",
        "details",
        "questions",
    }
    for name in ("pss", "details"):
        loaded = datasets.load_dataset(str(place), name, cache_dir=str(tmp_path / "cache"))["train"]
        table = pd.read_parquet(tmp_path / "run" / f"{name}.parquet")
        assert loaded.num_rows == len(table)
        assert set(loaded.column_names) == set(table)
    assert (place / "masks.safetensors").read_bytes() == (
        tmp_path / "run" / "masks.safetensors"
    ).read_bytes()
    assert 'load_dataset("me/results", "details")' in (place / "README.md").read_text()


def test_specwiki_goes_with_its_own_card_and_others_with_one_that_loads(hub, tmp_path):
    publish_questions(load_questions(), "me/specwiki")
    assert hub.files["questions.jsonl"] == QUESTIONS.read_bytes()
    assert hub.files["README.md"] == QUESTIONS.with_name("README.md").read_bytes()
    publish_questions(toy_questions(2), "me/toys")
    place = written(hub, tmp_path / "toys")
    found = datasets.load_dataset(str(place), split="test", cache_dir=str(tmp_path / "cache"))
    assert found["id"][:] == [question.id for question in toy_questions(2)]
    assert load_questions(f"{place}") == toy_questions(2)


def test_what_the_hub_refuses_is_one_line(hub, refused, monkeypatch, closed_port):
    with pytest.raises(InputError, match=r"not-mine/x: not published .*hf auth login") as error:
        publish_questions(toy_questions(2), "not-mine/x")
    assert "\n" not in str(error.value)
    told = refused("questions", "--push-to-hub", "no name")
    assert re.search("no name: not published", told)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{closed_port}")
    assert "me/x: not published" in refused("questions", "--push-to-hub", "me/x")
