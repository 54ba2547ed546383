"""A rehearsal: stand-ins are found as downloaded models are, and every page says what they are."""

from __future__ import annotations

import nbformat
import pytest
from huggingface_hub import constants

from checkout import HEADER, REPOSITORY, make_checkout
from paramspec.method.hooks import value_vector_view
from paramspec.models.checkpoints import digest_of, find_checkpoint
from paramspec.models.load import load_model
from paramspec.models.registry import load_registry
from paramspec.studies.hallucination import entailment_judge
from paramspec_book import book
from paramspec_book.parameters import chapter_values, chapters, load_profile
from paramspec_book.sphinx_site import REHEARSAL
from paramspec_book.stand_ins import SHAPE, WIDTH, stand_ins

HUB = {spec.id: spec for spec in load_registry().values() if spec.source.kind == "hub"}
# One of each class
CLASSES = {spec.model_type: name for name, spec in HUB.items()}
JUDGE = "someone/some-judge"
PROFILE = f"stand_ins: true\n9-hallucination: {{judge: {JUDGE}}}\n"
CHAPTER = f"""{HEADER}
# Who is there?

```{{code-cell}} ipython3
:tags: [parameters]

judge: str = ""
```

```{{code-cell}} ipython3
from paramspec.models.checkpoints import find_checkpoint
print(find_checkpoint("olmo-2-7b-10k").commit)
```
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A checkout whose default profile runs on stand-ins."""
    root = tmp_path_factory.mktemp("rehearsal") / "checkout"
    make_checkout(root, **{"9_hallucination": CHAPTER})
    (root / "book" / "profiles" / "default.yaml").write_text(PROFILE)
    return root


@pytest.fixture
def found(root, monkeypatch):
    """The hub cannot be reached, and its cache is of stand-ins."""
    variables = stand_ins("default", root)
    assert variables["HF_HUB_OFFLINE"] == "1"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", variables["HF_HUB_CACHE"])


def test_every_model_of_the_hub_has_a_stand_in_of_its_own(found):
    places = {name: find_checkpoint(name) for name in HUB}
    assert len({digest_of(place.path) for place in places.values()}) == len(HUB)
    for name, spec in HUB.items():
        assert spec.source.commit in (None, places[name].commit)


@pytest.mark.parametrize("model_type", CLASSES)
def test_a_stand_in_is_of_its_model_s_class_at_toy_width(found, model_type):
    spec = HUB[CLASSES[model_type]]
    loaded = load_model(spec.id, dtype="float32", device="cpu")
    view = value_vector_view(loaded.model)
    assert loaded.model.config.model_type == model_type
    assert (view.layers, view.width) == (SHAPE["num_hidden_layers"], WIDTH)
    assert loaded.model.config.tie_word_embeddings == spec.config["tie_word_embeddings"]
    assert view.readable


def test_the_judge_has_a_stand_in(found):
    judged = entailment_judge(JUDGE)("Who?", [("she", "he"), ("a", "the")])
    assert [type(one) for one in judged] == [bool, bool]


def test_the_rehearsal_is_the_paper_profile_but_for_the_speed_page():
    assert load_profile("rehearsal", REPOSITORY).stand_ins
    assert not load_profile("paper", REPOSITORY).stand_ins
    for chapter in chapters(REPOSITORY):
        paper, rehearsal = (
            chapter_values(chapter, profile, {}, REPOSITORY) for profile in ("paper", "rehearsal")
        )
        assert (paper == rehearsal) == (chapter.stem != "speed")


@pytest.mark.slow
def test_every_page_says_in_red_that_nothing_is_a_result(root, tmp_path, monkeypatch):
    html = book.build(root=root)
    copy = nbformat.read(root / "book" / "_executed" / "9-hallucination.ipynb", 4)
    (told,) = [one.text for one in copy.cells[-1].outputs if one.name == "stdout"]
    assert told.strip() == HUB["olmo-2-7b-10k"].source.commit
    pages = list((html / "book").glob("*.html"))
    assert len(pages) >= 3
    for path in pages:
        text = path.read_text()
        assert REHEARSAL in text[text.index("bd-header-announcement") :][:500]
    # On the models themselves, which are not here, it is another run.
    (root / "book" / "profiles" / "default.yaml").write_text("{}\n")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(book.ChapterFailed, match="allenai/OLMo-2-1124-7B"):
        book.run_chapter("9-hallucination", root=root)
