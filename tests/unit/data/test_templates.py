"""Trained tokens are exactly the answers and their end tokens, by construction and for every template."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from mindspeed_llm.data import corpus
from mindspeed_llm.data.conversation import Conversation, Message
from mindspeed_llm.data.templates import load_template, read_templates
from mindspeed_llm.data.tokenizer import FastTokenizer, load_tokenizer
from mindspeed_llm.errors import UserError

# Templates whose tokens the test tokenizer has.
NAMED = ("empty", "default", "alpaca", "llama2", "llama3", "chatml", "qwen", "mistral", "deepseek2")
END = {"empty": "", "llama3": "<|eot_id|>", "chatml": "<|im_end|>", "qwen": "<|im_end|>", "hf": "<|im_end|>"}

TWO_TURNS = Conversation(
    (
        Message("user", "How many legs has a cat?"),
        Message("assistant", " Four legs.\n "),  # white space of an answer is part of it
        Message("user", "And a </s> bird?"),
        Message("assistant", "Two.\n\nSometimes </s> one."),
    ),
    system="You know animals.",
)
ONE_TURN = Conversation((Message("user", "Hello"), Message("assistant", "Hi!")))

# What LLaMA-Factory 0.8.2 renders for these templates, eos spelled out.
GOLDENS = {
    "empty": "HelloHi!",
    "default": "Human: Hello\nAssistant:Hi!</s>",
    "alpaca": "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\nHello\n\n### Response:\nHi!</s>",
    "llama2": "<s>[INST] Hello [/INST]Hi!</s>",
    "llama3": "<s><|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHi!<|eot_id|>",
    "chatml": "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi!<|im_end|>",
    "qwen": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi!<|im_end|>",
    "hf": "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi!<|im_end|>\n",
}
TWO_TURN_GOLDENS = {
    "default": "S\nHuman: a\nAssistant:b</s>\nHuman: c\nAssistant:d</s>",
    "alpaca": "S### Instruction:\na\n\n### Response:\nb</s>\n\n### Instruction:\nc\n\n### Response:\nd</s>",
    "llama2": "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\na [/INST]b</s><s>[INST] c [/INST]d</s>",
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\nd<|im_end|>",
}


def trained_runs(encoded, tokenizer):
    changes = np.flatnonzero(np.diff(encoded.trained.astype(int))) + 1
    runs = np.split(np.arange(len(encoded.ids)), changes)
    return [tokenizer.decode(encoded.ids[run]) for run in runs if encoded.trained[run[0]]]


@pytest.mark.parametrize("name", GOLDENS)
def test_one_turn_golden(name, tokenizer):
    encoded = load_template(name, tokenizer).encode([ONE_TURN])[0]
    assert tokenizer.decode(encoded.ids) == GOLDENS[name]


@pytest.mark.parametrize("name", TWO_TURN_GOLDENS)
def test_two_turns_with_system_golden(name, tokenizer):
    turns = tuple(Message(role, text) for role, text in zip(["user", "assistant"] * 2, "abcd"))
    encoded = load_template(name, tokenizer).encode([Conversation(turns, "S")])[0]
    assert tokenizer.decode(encoded.ids) == TWO_TURN_GOLDENS[name]


@pytest.mark.parametrize("name", [*NAMED, "hf"])
@pytest.mark.parametrize("fixture", ["tokenizer", "padded_tokenizer"])
def test_trained_tokens_are_the_answers_and_their_end(name, fixture, request):
    tokenizer = request.getfixturevalue(fixture)
    encoded = load_template(name, tokenizer).encode([TWO_TURNS])[0]
    end = END.get(name, "</s>")
    answers = [message.content + end for message in TWO_TURNS.messages if message.role == "assistant"]
    assert trained_runs(encoded, tokenizer) == answers


@pytest.mark.parametrize("name", [*NAMED, "hf"])
def test_prompt_is_a_strict_prefix_up_to_the_first_answer_token(name, tokenizer):
    template = load_template(name, tokenizer)
    for count in (2, 4):
        conversation = dataclasses.replace(TWO_TURNS, messages=TWO_TURNS.messages[:count])
        prompt = template.render_prompt(dataclasses.replace(TWO_TURNS, messages=TWO_TURNS.messages[: count - 1]))
        encoded = template.encode([conversation])[0]
        assert len(prompt) < len(encoded.ids)
        assert encoded.ids[: len(prompt)].tolist() == prompt
        assert encoded.trained[len(prompt)] and not encoded.trained[len(prompt) - 1]


def test_masking_by_token_id_would_lose_the_end(tokenizer):
    """Negative control: with pad == eos, the usual `labels[ids == pad] = -100` drops the trained end token."""
    encoded = load_template("default", tokenizer).encode([ONE_TURN])[0]
    by_id = encoded.trained & (encoded.ids != tokenizer.pad_token_id)
    assert encoded.trained[-1] and not by_id[-1]


def test_chatml_equals_the_tokenizers_own_template(tokenizer):
    ours = load_template("chatml", tokenizer).encode([TWO_TURNS])[0]
    theirs = load_template("hf", tokenizer).encode([TWO_TURNS])[0]
    newline = len(theirs.ids) - len(ours.ids)  # the template ends with a line feed that nobody generates
    assert theirs.ids[:-newline].tolist() == ours.ids.tolist()
    assert theirs.trained[:-newline].tolist() == ours.trained.tolist()
    assert not theirs.trained[-1]


def test_an_answer_that_would_merge_with_the_prompt_is_tokenized_apart(tmp_path):
    texts = ["\n\n  indented", "\n\n  lines"] * 50
    tokenizer = load_tokenizer(corpus.train_tokenizer(tmp_path, 300, texts))
    conversation = Conversation((Message("user", "q"), Message("assistant", "\n  indented")))
    template = load_template("hf", tokenizer)
    prompt = template.render_prompt(dataclasses.replace(conversation, messages=conversation.messages[:1]))
    whole = tokenizer.encode(template.trained_ranges(conversation)[0])
    assert whole[: len(prompt)] != prompt  # the case is real: a token lies across the bound
    encoded = template.encode([conversation])[0]
    assert encoded.ids[: len(prompt)].tolist() == prompt
    assert tokenizer.decode(encoded.ids[encoded.trained]) == "\n  indented<|im_end|>"
    assert not encoded.trained[: len(prompt)].any()


def test_every_slot_token_is_one_token(sentencepiece_model):
    template = load_template("llama2", load_tokenizer(sentencepiece_model))
    encoded = template.encode([TWO_TURNS])[0]
    assert encoded.ids[0] == 1 and np.count_nonzero(encoded.ids == 1) == 2
    assert encoded.ids[-1] == 2 and encoded.trained[-1]


def test_stop_tokens_start_with_the_trained_end(tokenizer):
    ids = tokenizer.convert_tokens_to_ids
    assert load_template("llama2", tokenizer).stop_token_ids() == [ids("</s>")]
    assert load_template("qwen", tokenizer).stop_token_ids() == [ids("<|im_end|>"), ids("</s>")]
    assert load_template("hf", tokenizer).stop_token_ids() == [ids("<|im_end|>"), ids("</s>")]


def test_an_inconsistent_chat_template_is_refused(tokenizer):
    # Drops earlier answers' text once a later turn follows, as templates that strip thoughts do.
    jinja = (
        "{% for m in messages %}<{{ m['role'] }}>"
        "{{ m['content'] if loop.last or m['role'] == 'user' else 'gone' }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    changed = FastTokenizer(tokenizer.backend, "changed", tokenizer.special_tokens, jinja)
    one, two = load_template("hf", changed).encode([ONE_TURN, TWO_TURNS])
    assert tokenizer.decode(one.ids[one.trained]) == "Hi!"
    assert isinstance(two, UserError) and "changes turn 2" in str(two)


def test_thoughts(tokenizer):
    thought = "<think>\nhm\n</think>\n\nYes."
    with_thought = Conversation((Message("user", "q"), Message("assistant", thought)))
    without = Conversation((Message("user", "q"), Message("assistant", "Yes.")))
    empty = "<think>\n\n</think>\n\n"

    def runs(mode, conversation):
        template = load_template("qwen3", tokenizer, enable_thinking=mode)
        encoded = template.encode([conversation])[0]
        return trained_runs(encoded, tokenizer), tokenizer.decode(encoded.ids).count(empty)

    assert runs("true", without) == ([empty + "Yes.<|im_end|>"], 1)
    assert runs("true", with_thought) == ([thought + "<|im_end|>"], 0)
    assert runs("false", with_thought) == (["Yes.<|im_end|>"], 1)
    assert runs("none", with_thought) == ([thought + "<|im_end|>"], 0)
    assert runs("none", without) == (["Yes.<|im_end|>"], 1)
    prompt = load_template("qwen3", tokenizer, enable_thinking="false").render_prompt(
        dataclasses.replace(without, messages=without.messages[:1])
    )
    assert tokenizer.decode(prompt).endswith(empty)


def test_efficient_eos_ends_the_conversation_once(tokenizer, tmp_path):
    file = tmp_path / "t.yaml"
    file.write_text('short: {user: ["Q{{content}}A"], efficient_eos: true}\n')
    encoded = load_template("short", tokenizer, file).encode([TWO_TURNS])[0]
    assert trained_runs(encoded, tokenizer) == [" Four legs.\n ", "Two.\n\nSometimes </s> one.</s>"]


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("t: {usr: []}", "unknown fields"),
        ("t: {user: [{special: cls_token}]}", "slot .* is unknown"),
        ("t: {replace_eos: true}", "no stop_words"),
    ],
)
def test_a_wrong_template_file_is_refused(tokenizer, tmp_path, yaml, message):
    file = tmp_path / "t.yaml"
    file.write_text(yaml)
    with pytest.raises(UserError, match=message):
        load_template("t", tokenizer, file)


def test_refusals_name_the_nearest(tokenizer, sentencepiece_model):
    with pytest.raises(UserError, match="try: llama3"):
        load_template("lama3", tokenizer)
    with pytest.raises(UserError, match="enable-thinking: 'true' has no meaning for template 'llama2'"):
        load_template("llama2", tokenizer, enable_thinking="true")
    with pytest.raises(UserError, match="needs the token '<\\|im_end\\|>'"):
        load_template("chatml", load_tokenizer(sentencepiece_model))
    with pytest.raises(UserError, match="hf needs a tokenizer.json"):
        load_template("hf", load_tokenizer(sentencepiece_model))
    with pytest.raises(UserError, match="nothing to answer"):
        load_template("llama2", tokenizer).render_prompt(ONE_TURN)


def test_all_shipped_templates_can_be_read():
    assert {"empty", "default", "alpaca", "llama2", "llama3", "chatml", "qwen"} <= set(read_templates())


@pytest.mark.parametrize("text", ['[{"name": "mine", "format_user": {}}]', "mine: chat", "", "a: [", "\x00"])
def test_a_file_that_holds_no_templates_is_refused_in_a_line(tmp_path, text):
    """A list is how MindSpeed-LLM's own file begins."""
    path = tmp_path / "templates.json"
    path.write_text(text)
    with pytest.raises(UserError, match="prompt-type-path: .*legal: a YAML file") as refused:
        read_templates(path)
    assert "\n" not in str(refused.value)
