"""A failure is one line, and `--traceback` shows where it came from."""

from __future__ import annotations

import sys

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
    "finetune": ["finetune", "smollm2-135m", "--method", "FT-PV"],  # a word is missing
    "plan": ["plan", "none"],
}


def failure(monkeypatch, capsys, *words) -> tuple[int, str]:
    """The exit status of the command line, and what it says on standard error."""
    monkeypatch.setattr(sys, "argv", ["paramspec", *words])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    return exit.value.code, capsys.readouterr().err


def test_every_command_is_tried_here():
    assert set(BAD) == {command.callback.__name__ for command in cli.app.registered_commands}


@pytest.mark.parametrize("command", BAD)
def test_every_command_shows_a_traceback_if_asked(command, monkeypatch, capsys):
    status, line = failure(monkeypatch, capsys, *BAD[command])
    assert status == 2
    assert line.startswith("paramspec: error: ")
    assert line.count("\n") == 1
    monkeypatch.setenv("PARAMSPEC_TRACEBACK", "0")
    assert failure(monkeypatch, capsys, *BAD[command]) == (status, line)
    asked = [
        failure(monkeypatch, capsys, *BAD[command], "--traceback"),
        failure(monkeypatch, capsys, "--traceback", *BAD[command]),
    ]
    monkeypatch.setenv("PARAMSPEC_TRACEBACK", "1")
    asked.append(failure(monkeypatch, capsys, *BAD[command]))
    for same, told in asked:
        assert same == status
        assert told.startswith("Traceback (most recent call last):\n")
        assert told.endswith(f"\n{line}")


def test_a_traceback_holds_the_cause(monkeypatch, capsys):
    words = ["plan", "--profile", "none.yaml"]
    _, told = failure(monkeypatch, capsys, *words, "--traceback")
    assert "FileNotFoundError: [Errno 2] No such file or directory: 'none.yaml'\n" in told
    assert "The above exception was the direct cause of the following exception:" in told


def test_a_traceback_of_a_book_holds_its_chapters(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(make_checkout(tmp_path / "checkout", failing=FAILING))
    status, told = failure(monkeypatch, capsys, "build", "--traceback")
    assert status == 3
    assert "KeyError: 'a fact'" in told.partition("Traceback (most recent call last):")[2]
    assert told.endswith("\nparamspec: error: the site was not built: failing failed, see above\n")


def test_a_bug_is_no_bad_input(monkeypatch, capsys):
    """Its traceback is shown unasked, for whoever reports it."""

    def broken(chosen):
        raise KeyError("a key that must be there")

    monkeypatch.setattr(registry, "models_in", broken)
    status, told = failure(monkeypatch, capsys, "models")
    assert status == 1
    assert told.startswith("Traceback (most recent call last):\n")
    assert "KeyError: 'a key that must be there'" in told
    assert told.splitlines()[-1].startswith("paramspec: internal error (KeyError): please report")


@pytest.mark.parametrize("command", BAD)
def test_help_names_the_option(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["paramspec", command, "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "--traceback" in capsys.readouterr().out
