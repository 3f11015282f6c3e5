"""One interface over tokenizer.json, sentencepiece and HF directories, equal to what transformers does."""

from __future__ import annotations

import json
import pickle
import shutil

import pytest

from mindspeed_llm.data import tokenizer as tokenizer_module
from mindspeed_llm.data.tokenizer import load_tokenizer
from mindspeed_llm.errors import UserError

TEXT = "def f(x):\n    return x  # naïve ☃ café\n\n<|im_start|>user"


def test_equal_to_transformers(tokenizer_dir, tokenizer):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tokenizer_dir)
    assert tokenizer.encode(TEXT) == theirs.encode(TEXT, add_special_tokens=False)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert tokenizer.pad_token_id == theirs.pad_token_id == tokenizer.eos_token_id
    assert tokenizer.vocab_size == len(theirs)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for generation in (False, True):
        ours = tokenizer.apply_chat_template(messages, add_generation_prompt=generation)
        assert ours == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)


def test_a_tokenizer_json_file_works(tokenizer_dir, tokenizer):
    assert load_tokenizer(tokenizer_dir / "tokenizer.json").encode(TEXT) == tokenizer.encode(TEXT)


def test_sentencepiece_equals_the_library(sentencepiece_model):
    import sentencepiece

    theirs = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    for source, kind in ((sentencepiece_model, "PretrainedFromHF"), (sentencepiece_model.parent, "Llama2Tokenizer")):
        ours = load_tokenizer(source, kind)
        assert ours.encode(TEXT) == theirs.encode(TEXT)
        assert (ours.bos_token_id, ours.eos_token_id, ours.vocab_size) == (1, 2, 500)
        assert ours.decode([1, *ours.encode("plain text"), 2]) == "<s>plain text</s>"
        assert ours.decode([1, *ours.encode("plain text"), 2], skip_special_tokens=True) == "plain text"
        assert ours.convert_tokens_to_ids("no such piece") is None


def test_slow_means_the_sentencepiece_file(sentencepiece_model, tokenizer_dir):
    assert load_tokenizer(sentencepiece_model.parent, use_fast=False).backend is None
    with pytest.raises(UserError, match="has no tokenizer.model"):
        load_tokenizer(tokenizer_dir, use_fast=False)


def test_survives_pickling(tokenizer, sentencepiece_model):
    for original in (tokenizer, load_tokenizer(sentencepiece_model)):
        copy = pickle.loads(pickle.dumps(original))
        assert copy.encode(TEXT) == original.encode(TEXT)
        assert copy.fingerprint() == original.fingerprint()


def test_fingerprint_tells_tokenizers_apart(tokenizer, padded_tokenizer, sentencepiece_model):
    prints = {t.fingerprint() for t in (tokenizer, padded_tokenizer, load_tokenizer(sentencepiece_model))}
    assert len(prints) == 3


def test_fingerprint_survives_saving_by_transformers(tokenizer_dir, tokenizer, tmp_path):
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").fingerprint() == tokenizer.fingerprint()


def test_added_tokens_only_in_the_config_are_honoured(tokenizer_dir, tokenizer, tmp_path):
    shutil.copytree(tokenizer_dir, tmp_path / "t")
    file = tmp_path / "t" / "tokenizer_config.json"
    config = json.loads(file.read_text())
    token = dict(content="<tool>", lstrip=False, rstrip=False, normalized=False, single_word=False, special=True)
    file.write_text(json.dumps({**config, "added_tokens_decoder": {str(tokenizer.vocab_size): token}}))
    assert load_tokenizer(tmp_path / "t").encode("a<tool>")[-1] == tokenizer.vocab_size
    file.write_text(json.dumps({**config, "added_tokens_decoder": {"3": token}}))
    with pytest.raises(UserError, match="'<tool>' the id 3"):
        load_tokenizer(tmp_path / "t")


@pytest.mark.parametrize("name", ["/no/such/dir", "no-such-org/no-such-model"])
def test_absent_tokenizers_are_named(name, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=name):
        load_tokenizer(name)


def test_a_hub_that_does_not_answer_is_not_asked(monkeypatch):
    """transformers would ask it for a minute; what it has in its cache it still gives."""
    import transformers

    asked = []

    def from_pretrained(name, local_files_only, **_):
        asked.append(local_files_only)
        raise OSError("not there")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_pretrained)
    for answers in (True, False):
        monkeypatch.setattr(tokenizer_module, "hub_answers", lambda answers=answers: answers)
        with pytest.raises(UserError, match="'owner/name' could not be loaded, because not there"):
            load_tokenizer("owner/name")
    assert asked == [False, True]


def test_a_path_is_never_asked_of_the_hub(monkeypatch):
    asked = []
    monkeypatch.setattr(tokenizer_module, "_load_with_transformers", lambda name, trust: asked.append(name))
    for path in ("./model_from_hf/llama", "model_from_hf/llama/", "../llama", "a/b/c", "/no/such"):
        with pytest.raises(UserError, match=f"'{path}' does not exist"):
            load_tokenizer(path)
    for name in ("owner/name", "gpt2"):
        load_tokenizer(name)
    assert asked == ["owner/name", "gpt2"]


def test_unknown_type_and_empty_directory(tmp_path):
    with pytest.raises(UserError, match="legal: PretrainedFromHF, Llama2Tokenizer"):
        load_tokenizer(tmp_path, "BertWordPiece")
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
