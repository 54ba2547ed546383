"""Text to tokens: what a tokenizer adds, and texts that hold what is special to it."""

from __future__ import annotations

import json

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from paramspec.errors import InputError
from paramspec.models.tokens import added_tokens, token_ids, tokenizer_facts
from toy_study import toy_tokenizer

TEMPLATES = {"nothing": "$A", "BOS": "<s> $A", "EOS": "$A </s>", "both": "<s> $A </s>"}
TEXTS = ["song of alpha", "the king of beta", "old"]


def special(text):
    return AddedToken(text, special=True, normalized=False)


def byte_level(template="$A"):
    """Every byte a token, and no merges: as GPT-2's, SmolLM2's and Llama 3's."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: place for place, word in enumerate(["<s>", "</s>", *characters])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    added = [(token, vocabulary[token]) for token in set(template.split()) - {"$A"}]
    if added:
        backend.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=added
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=special("<s>"), eos_token=special("</s>")
    )


def unigram():
    """A vocabulary that holds its special tokens among the words, as T5's and XLNet's."""
    words = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -2.0)]
    words += [(letter, -3.0) for letter in "0123456789abcdefghijklmnopqrstuvwxyzT<>/"]
    backend = Tokenizer(models.Unigram(words, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.parametrize("build", [toy_tokenizer, byte_level])
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_what_is_added_in_front_stands_there_once_and_nothing_behind(build, template):
    tokenizer, bare = build(template), build()
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in ("<s>", "</s>")}
    before = [ids["<s>"]] if template.startswith("<s>") else []
    after = [ids["</s>"]] if template.endswith("</s>") else []
    assert added_tokens(tokenizer) == (before, after)
    assert tokenizer("old")["input_ids"] == [*before, *bare("old")["input_ids"], *after]
    assert token_ids(tokenizer, TEXTS) == [[*before, *row] for row in bare(TEXTS)["input_ids"]]
    facts = json.loads(json.dumps(tokenizer_facts(tokenizer)))
    named = [{"id": number, "token": "<s>"} for number in before]
    assert facts["added_before"] == facts["kept"] == named
    assert facts["added_after"] == [{"id": number, "token": "</s>"} for number in after]
    assert facts["bos"] == {"id": ids["<s>"], "token": "<s>"}
    assert facts["eos"] == {"id": ids["</s>"], "token": "</s>"}
    assert facts["unk"] is None
    assert facts["size"] == len(tokenizer)


def test_a_bos_that_is_added_twice_is_kept_once():
    tokenizer = byte_level("<s> <s> $A")
    assert [len(row) for row in token_ids(tokenizer, ["old"])] == [4]
    facts = tokenizer_facts(tokenizer)
    assert [token["token"] for token in facts["added_before"]] == ["<s>", "<s>"]
    assert [token["token"] for token in facts["kept"]] == ["<s>"]


def test_a_tokenizer_written_in_python_is_read_in_the_same_way():
    tokenizer = ByT5Tokenizer()  # ends a text with </s>
    assert added_tokens(tokenizer) == ([], [1])
    assert token_ids(tokenizer, ["a</s>", "a"]) == [[3 + byte for byte in b"a</s>"], [3 + 97]]


@pytest.mark.parametrize("text", ["</s>", "<s>", "old </s> king", "<s>old", "a</s></s>b<s>"])
def test_special_tokens_in_a_text_are_its_characters(text):
    tokenizer = byte_level("<s> $A </s>")
    ((bos, *row),) = token_ids(tokenizer, [text])
    assert bos == tokenizer.bos_token_id
    assert not {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(row)
    shown = "".join(tokenizer.convert_ids_to_tokens(row)).replace("Ġ", " ")
    assert shown == text


@pytest.mark.parametrize("tokenizer", [toy_tokenizer(), unigram()], ids=["words", "unigram"])
def test_special_tokens_that_are_words_of_the_vocabulary_are_refused(tokenizer):
    for text in ("old </s> king", "</s>"):
        with pytest.raises(InputError, match=r"text '.*holds the special token '</s>'"):
            token_ids(tokenizer, ["old", text])
    long = "old " * 100 + "</s>"
    with pytest.raises(InputError) as error:
        token_ids(tokenizer, [long])
    assert len(str(error.value)) < 250


def test_a_text_of_which_nothing_is_read_is_refused():
    backend = Tokenizer(models.BPE(vocab={"a": 0, "e": 1, " ": 2, "T": 3}, merges=[]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert token_ids(tokenizer, ["a e"]) == [[0, 2, 1]]
    with pytest.raises(InputError, match="text 'Łódź': the tokenizer reads nothing of it"):
        token_ids(tokenizer, ["a", "Łódź"])
    assert token_ids(tokenizer, []) == []
