"""The options of the commands: what a value may be, and what `--help` says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from typer import Option
from typer.models import OptionInfo

from paramspec.plain import integer, number


def whole(text: str) -> OptionInfo:
    """An option that takes a whole number, in decimal digits."""
    return Option(parser=integer, help=text)


def real(text: str) -> OptionInfo:
    """An option that takes a number."""
    return Option(parser=number, help=text)


def shares(text: str) -> tuple[float, ...]:
    """`shares("0.01,0.05")`: (0.01, 0.05)."""
    return tuple(number(part.strip()) for part in text.split(","))


def ranges(text: str) -> tuple[int, ...]:
    """`ranges("0,4-6")`: (0, 4, 5, 6)."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        numbers = range(integer(first), integer(last or first) + 1)
        if not numbers:
            raise ValueError(f"expected numbers from 0 and ranges, as 0,4-6, not {text!r}")
        found += numbers
    return tuple(found)


MODEL = "A registry id (see `paramspec models`), a hub id, a local directory, or a GGUF file."
Profile = Annotated[str, Option(help="A profile of book/profiles, or a YAML file.")]
Force = Annotated[bool, Option("--force", help="Run even if nothing changed.")]
AsJson = Annotated[bool, Option("--json", help="Print JSON, every field.")]
Questions = Annotated[
    str | None,
    Option(metavar="FILE|ORG/NAME:SPLIT", help="Questions of your own; SpecWiki if not given."),
]
Columns = Annotated[
    str, Option(help="Fields under other names: concept=subject,options=A+B+C; or mmlu, or popqa.")
]
SkipInvalid = Annotated[
    bool, Option("--skip-invalid", help="Leave out questions that break a rule.")
]
Concepts = Annotated[int | None, whole("Their number, evenly over tiers; all if not given.")]
Ratios = Annotated[str, Option(parser=shares, help="Shares of value vectors to mask.")]
Protocol = Annotated[
    Literal["paper", "holdout"], Option(help="holdout: choose on fold 0, score on fold 1.")
]
Method = Annotated[
    Literal["FT-FV", "FT-PV", "FT-CV", "FT-RV"],
    Option(help="FV: all value vectors; PV: chosen ones; CV: all others; RV: as many at random."),
]
Rule = Annotated[
    Literal["coefficient", "score", "gradient", "magnitude", "other"],
    Option(help="How FT-PV chooses value vectors; the paper's rule is coefficient."),
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16"], Option(help="auto: bfloat16 on a GPU that has it.")
]
Device = Annotated[str, Option(help="auto, cpu, cuda, or cuda:1.")]
DownProjection = Annotated[
    str | None, Option(help="Where a layer has its down projection, if not found: mlp.down.")
]
PushToHub = Annotated[
    str | None, Option(metavar="ORG/NAME", help="Also publish it, as a data set of the hub.")
]
Parameters = Annotated[
    list[str] | None,
    Option("-p", "--parameter", metavar="NAME VALUE", help="Of a chapter, as YAML; repeatable."),
]
Gpu = Annotated[str, Option(help="A100 80GB, H100, H200, L40S, L4, RTX 4090, RTX 3090, or cpu.")]
Prompt = Annotated[
    str, Option(help="cloze, question, or a file, a template with {question} in it.")
]
Shots = Annotated[int, whole("Examples in front of each question, on other concepts.")]
ChatTemplate = Annotated[
    bool, Option("--chat-template", help="Put each prompt into the model's chat template.")
]
Position = Annotated[Literal["mean", "last"], Option(help="Prompt tokens that count.")]
Scope = Annotated[Literal["layer", "model"], Option(help="Rank per layer or model.")]
Spared = Annotated[
    float, real("Share of a layer, the most active vectors everywhere, that no mask holds.")
]
Ablation = Annotated[Literal["zero", "mean"], Option(help="What a masked coefficient becomes.")]
Controls = Annotated[int, whole("Draws of each control mask: random, magnitude, other.")]
General = Annotated[
    int | None, whole("Unrelated questions for each concept's masks; 10, or all there are.")
]
Seed = Annotated[int, whole("Seed of all that is drawn.")]
Jobs = Annotated[int, whole("Worker processes; 0: one per GPU, or else per core.")]
Scheduler = Annotated[str | None, Option(help="A Dask scheduler: tcp://host:8786.")]
Results = Annotated[Path, Option(help="A directory for the five files.")]
Finished = Annotated[Path, Option(help="Finished work, for reruns.")]
OnlyPlan = Annotated[
    bool, Option("--plan", help="Estimate the cost on this machine, and measure nothing.")
]

TrainedConcepts = Annotated[
    list[str] | None, Option(help="A concept to train on; repeatable. Needed without --texts.")
]
Tuned = Annotated[Path, Option(help="The tuned model's directory: new, or of the same run.")]
Texts = Annotated[
    Path | None, Option(help="A folder of texts, CONCEPT.txt, to train on, not on statements.")
]
Window = Annotated[int | None, whole("Tokens of a part of a text; the context, or 1024.")]
TrainedShare = Annotated[float, real("Share of a layer's value vectors that FT-PV trains.")]
Layers = Annotated[str | None, Option(parser=ranges, help="Only these layers: 0,4-6.")]
Statements = Annotated[int, whole("The first statements of each fact to train on.")]
Epochs = Annotated[int, whole("Passes over the statements.")]
Batch = Annotated[int | None, whole("Statements per step; 16, or 2 parts of texts.")]
Rate = Annotated[float, real("Learning rate of AdamW, after a warm-up.")]
SaveEvery = Annotated[int, whole("Steps between states from which a rerun continues.")]
