"""Text to tokens: what a tokenizer adds, and texts that hold what is special to it."""

from __future__ import annotations

import json

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from paramspec.errors import InputError
from paramspec.method.scoring import encode
from paramspec.models.tokens import TODAY, added_tokens, prompt_ids, token_ids, tokenizer_facts
from toy_study import toy_questions, toy_tokenizer

TEMPLATES = ("$A", "<s> $A", "$A </s>", "<s> $A </s>", "<s> <s> $A")
TEXTS = ["song of alpha", "the king of beta", "old"]


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
    ends = [AddedToken(text, special=True, normalized=False) for text in ("<s>", "</s>")]
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=ends[0], eos_token=ends[1])


@pytest.mark.parametrize("build", [toy_tokenizer, byte_level])
@pytest.mark.parametrize("template", TEMPLATES)
def test_what_is_added_in_front_stands_there_once_and_nothing_behind(build, template):
    tokenizer, bare = build(template), build()
    begin, end = ({"id": bare.convert_tokens_to_ids(one), "token": one} for one in ("<s>", "</s>"))
    before, after = [begin] * template.count("<s>"), [end] * template.count("</s>")
    numbers = [[token["id"] for token in tokens] for tokens in (before, after)]
    assert added_tokens(tokenizer) == tuple(numbers)
    assert tokenizer("old")["input_ids"] == [*numbers[0], *bare("old")["input_ids"], *numbers[1]]
    rows = bare(TEXTS)["input_ids"]
    assert token_ids(tokenizer, TEXTS) == [[*numbers[0][:1], *row] for row in rows]
    facts = json.loads(json.dumps(tokenizer_facts(tokenizer)))
    assert (facts["added_before"], facts["added_after"]) == (before, after)
    assert facts["kept"] == before[:1]
    assert (facts["bos"], facts["eos"], facts["unk"]) == (begin, end, None)
    assert facts["size"] == len(tokenizer)


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


def test_special_tokens_that_are_words_of_the_vocabulary_are_refused():
    for text in ("old </s> king", "</s>"):
        with pytest.raises(InputError, match=r"text '.*holds the special token '</s>'"):
            token_ids(toy_tokenizer(), ["old", text])


def test_a_text_of_which_nothing_is_read_is_refused():
    backend = Tokenizer(models.BPE(vocab={"a": 0, "e": 1, " ": 2, "T": 3}, merges=[]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert token_ids(tokenizer, ["a e"]) == [[0, 2, 1]]
    with pytest.raises(InputError, match="text 'Łódź': the tokenizer reads nothing of it"):
        token_ids(tokenizer, ["a", "Łódź"])
    assert token_ids(tokenizer, []) == []


def test_in_a_chat_template_the_prompt_is_a_users_turn_and_the_option_the_answer():
    tokenizer = toy_tokenizer("<s> $A")
    (question, *_) = toy_questions(1)
    item = encode(tokenizer, question, chat=True)
    words = ["<s>", "old", *question.cloze.split(), "</s>", "new"]  # the toy's template
    assert list(item.context) == tokenizer.convert_tokens_to_ids(words)
    for option, tokens in zip(question.options, item.options, strict=True):
        assert list(tokens) == tokenizer.convert_tokens_to_ids(option.split())


def test_a_chat_template_gives_the_same_on_any_day_or_is_refused():
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d') }} {{ date_string }} {{ messages[0].content }}"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    (row,) = prompt_ids(tokenizer, ["old"], chat=True)
    (plain,) = prompt_ids(tokenizer, ["old"])
    assert row[-1:] == plain
    assert tokenizer.decode(row[:-1]).count("<pad>") == 2 * len(TODAY.split())
    for template, message in ((None, "has no chat template"), ("new", "does not hold the user's")):
        tokenizer.chat_template = template
        with pytest.raises(InputError, match=message):
            prompt_ids(tokenizer, ["old"], chat=True)
