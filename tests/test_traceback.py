"""A failure is one line, and `--traceback` shows where it came from."""

from __future__ import annotations

import pytest

from checkout import HEADER, make_checkout
from paramspec import cli
from paramspec.models import registry

FAILING = f"{HEADER}\n# Failing\n\n```{{code-cell}} ipython3\n{{}}['a fact']\n```\n"
BAD = {
    "run": ["run", "3-masking", "-p", "sede", "1"],
    "build": ["build", "--profile", "none"],
    "models": ["models", "--set", "none"],
    "questions": ["questions", "--show", "none/none"],
    "pss": ["pss", "smollm2-135m", "--ratios", "a"],
    "report": ["report", "none"],
    "compare": ["compare", "none", "none"],
    "finetune": ["finetune", "smollm2-135m", "--method", "FT-PV"],  # words are missing
    "plan": ["plan", "none"],
    "verdicts": ["verdicts", "none"],
}


@pytest.mark.parametrize("name", BAD)
def test_every_command_shows_a_traceback_if_asked(name, monkeypatch, command, refused):
    assert set(BAD) == {command.callback.__name__ for command in cli.app.registered_commands}
    line = refused(*BAD[name])
    monkeypatch.setenv("PARAMSPEC_TRACEBACK", "0")
    assert refused(*BAD[name]) == line
    asked = [command(*BAD[name], "--traceback"), command("--traceback", *BAD[name])]
    monkeypatch.setenv("PARAMSPEC_TRACEBACK", "1")
    for status, _, told in (*asked, command(*BAD[name])):
        assert status == 2
        assert told.startswith("Traceback (most recent call last):\n")
        assert told.endswith(f"\n{line}\n")
    assert "--traceback" in command(name, "--help")[1]


def test_a_traceback_holds_the_cause(command):
    _, _, told = command("plan", "--profile", "none.yaml", "--traceback")
    assert "FileNotFoundError: [Errno 2] No such file or directory: 'none.yaml'\n" in told
    assert "The above exception was the direct cause of the following exception:" in told


def test_a_traceback_of_a_book_holds_its_chapters(tmp_path, monkeypatch, command):
    monkeypatch.chdir(make_checkout(tmp_path / "checkout", failing=FAILING))
    status, _, told = command("build", "--traceback")
    assert status == 3
    assert "KeyError: 'a fact'" in told.partition("Traceback (most recent call last):")[2]
    assert told.endswith("\nparamspec: error: the site was not built: failing failed, see above\n")


def test_a_bug_is_no_bad_input(monkeypatch, command):
    """Its traceback is shown unasked, for whoever reports it."""
    monkeypatch.setattr(registry, "models_in", lambda chosen: {}["a key that must be there"])
    status, _, told = command("models")
    assert status == 1
    assert told.startswith("Traceback (most recent call last):\n")
    assert "KeyError: 'a key that must be there'" in told
    assert told.splitlines()[-1].startswith("paramspec: internal error (KeyError): please report")
