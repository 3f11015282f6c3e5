"""Text in, text out: pieces, stop strings, the Python API, chat and the door."""

import json
import subprocess
import sys

import pytest

import mindspeed_llm
from mindspeed_llm.checkpoint.toy import train_toy_tokenizer
from mindspeed_llm.cli.inference import main
from mindspeed_llm.data.tokenizer import load_tokenizer
from mindspeed_llm.errors import UserError
from mindspeed_llm.inference.chat import History, chat
from mindspeed_llm.inference.detokenize import Detokenizer, StopStrings
from mindspeed_llm.inference.prompts import read_prompts
from mindspeed_llm.inference.settings import GenerationSettings

TEXT = "naïve 汉字 🤖 and\n  plain words"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    train_toy_tokenizer().save_pretrained(path)
    return load_tokenizer(path)


def test_pieces_join_to_the_text_and_split_no_character(tokenizer):
    ids = tokenizer.encode(TEXT)
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.add(token) for token in ids]
    assert "".join(pieces) == TEXT
    assert "" in pieces, "a character of several bytes waits for its last one"
    assert not any("\ufffd" in piece for piece in pieces)
    assert "\ufffd" in "".join(tokenizer.decode([token]) for token in ids), "decoding one by one would split"


def test_bytes_that_never_become_a_character_are_shown_at_the_end(tokenizer):
    detokenizer = Detokenizer(tokenizer)
    token = tokenizer.encode("汉")[0]
    assert detokenizer.add(token) == ""
    assert "\ufffd" in detokenizer.finish()


def test_stop_strings_over_several_pieces_are_cut_off():
    stops = StopStrings(["END", "stop here"])
    shown = [stops.pass_on(piece) for piece in ("a E", "N", "x st", "op", " her", "e and more")]
    assert "".join(shown) == "a ENx " and stops.found
    other = StopStrings(["END"])
    assert other.pass_on("the EN") == "the " and other.rest() == "EN" and not other.found


def test_generate_streams_what_it_returns(load):
    model = load("llama")
    pieces = {0: "", 1: ""}

    def streamer(number, piece):
        assert piece
        pieces[number] += piece

    answers = mindspeed_llm.generate(model, ["The quick", "import sys"], streamer=streamer, max_new_tokens=12)
    assert answers == [pieces[0], pieces[1]]
    assert mindspeed_llm.generate(model, "import sys", max_new_tokens=12) == answers[1:]
    assert "".join(mindspeed_llm.stream(model, "import sys", max_new_tokens=12)) == answers[1]
    with pytest.raises(UserError, match="max_tokens is unknown; legal: max_new_tokens"):
        mindspeed_llm.generate(model, "a", max_tokens=3)
    with pytest.raises(UserError, match=r"model is a str, .* try: generate\(load_model"):
        mindspeed_llm.generate("path/of/a/model", "a")


@pytest.mark.parametrize("beams", [1, 2])
def test_a_stop_string_ends_the_answer(load, beams):
    model = load("llama")
    [answer] = mindspeed_llm.generate(model, "The quick brown", max_new_tokens=20, num_beams=beams)
    middle = answer[len(answer) // 2 :][:3]
    [cut] = mindspeed_llm.generate(model, "The quick brown", max_new_tokens=20, num_beams=beams, stop_strings=(middle,))
    assert middle not in cut
    if beams == 1:
        assert cut == answer[: answer.index(middle)]


def test_adapters_answer_alike_merged_and_not_and_as_in_peft(toys, load, reference, tmp_path):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    settings = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"])
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(toys["llama"], dtype=torch.float32), settings)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in sorted(adapted.named_parameters()):
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    adapted.save_pretrained(tmp_path)
    loaded = mindspeed_llm.load_model(toys["llama"], lora=tmp_path)
    merged = mindspeed_llm.load_model(toys["llama"], lora=tmp_path, merge=True)
    ids = torch.tensor([loaded.encode("The quick brown")])
    out = adapted.generate(input_ids=ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :].tolist()
    expected = loaded.tokenizer.decode([t for t in out if t not in loaded.stop_token_ids])
    answers = [mindspeed_llm.generate(m, "The quick brown", max_new_tokens=16)[0] for m in (loaded, merged)]
    assert answers == [expected, expected]
    assert mindspeed_llm.generate(load("llama"), "The quick brown", max_new_tokens=16) != [expected]


def test_an_unknown_type_or_a_system_text_for_raw_prompts_is_refused(toys, load):
    with pytest.raises(UserError, match="dtype: int8"):
        mindspeed_llm.load_model(toys["llama"], dtype="int8")
    with pytest.raises(UserError, match="system"):
        mindspeed_llm.generate(load("llama"), "a", system="be brief")


def test_importing_the_package_loads_no_torch():
    code = "import sys, mindspeed_llm; print('torch' in sys.modules, hasattr(mindspeed_llm, 'nothing'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def talk(model, lines, turns=2, **settings):
    """What a chat shows, and the prompts the model was asked."""
    shown, asked = [], []
    encode = model.encode
    script = iter(lines)
    object.__setattr__(model, "encode", lambda prompt, system=None: asked.append(prompt) or encode(prompt, system))
    try:
        chat(
            model,
            GenerationSettings(max_new_tokens=4, **settings),
            History(turns),
            lambda prompt: shown.append(prompt) or next(script, None),
            shown.append,
        )
    finally:
        del model.encode
    return "".join(shown), asked


def test_chat_remembers_turns_forgets_on_clear_and_leaves(load):
    model = load("qwen3", prompt_type="hf")
    shown, asked = talk(model, ["one", "", "two", "three", "four", "clear", "five", "quit", "never"])
    assert [len(conversation.messages) for conversation in asked] == [1, 3, 5, 5, 1]
    assert asked[1].messages[0].content == "one" and asked[3].messages[0].content == "two"
    assert asked[1].messages[1].content in shown
    assert shown.count("You >> ") == 8 and shown.count("MindSpeed-LLM:") == 5
    assert talk(model, ["one", "two"])[0].endswith("\n"), "the end of input ends the chat"
    assert [len(c.messages) for c in talk(model, ["one", "two", "q"], turns=0)[1]] == [1, 1]


def test_a_history_too_long_for_the_context_loses_its_oldest_turns(load):
    model = load("qwen3", prompt_type="hf")
    long = "word " * round(120 * 40 / len(model.tokenizer.encode("word " * 40)))  # 120 of 256 tokens
    _, asked = talk(model, [long, long, "short"], turns=5)
    # The second question does not fit beside the first; the third fits beside the second.
    assert [len(conversation.messages) for conversation in asked] == [1, 3, 1, 3]


def test_the_door_writes_answers_that_do_not_depend_on_the_batch(toys, load, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "The quick"}\n{"instruction": "import", "input": "sys"}\n"text"\n')
    outputs = []
    for batch in ("1", "3"):
        out = tmp_path / f"{batch}.jsonl"
        words = [
            "--load",
            str(toys["llama"]),
            "--task",
            "do_sample",
            "--prompt-file",
            str(prompts),
            "--num-threads",
            "1",
        ]
        assert main([*words, "--output-file", str(out), "--max-new-tokens", "8", "--micro-batch-size", batch]) == 0
        outputs.append([json.loads(line) for line in out.read_text().splitlines()])
    assert outputs[0] == outputs[1]
    assert [row["prompt"] for row in outputs[0]] == ["The quick", "import\nsys", "text"]
    assert all(row["answer"] for row in outputs[0])


def test_the_door_demonstrates_and_then_chats(toys, capsys, monkeypatch):
    script = iter(["hello", "exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: print(prompt, end="") or next(script))
    words = ["--load", str(toys["qwen3"]), "--prompt-type", "hf", "--max-new-tokens", "5", "--num-threads", "1"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    titles = ["Greedy Search", "Sampling", "Beam Search", "Beam Search With Sampling"]
    assert [shown.count(f"= {title} =") for title in titles] == [1, 1, 1, 1]
    assert shown.count("You:\nhow are you?\n\nMindSpeed-LLM:\n") == 4 and shown.count("Elapsed: ") == 4
    assert shown.count("You >> ") == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pipeline-model-parallel-size", "2"], "pipeline"),
        (["--system", "x"], "--system has no meaning without --prompt-type"),
        (["--lora-r", "4"], "--lora-r have no meaning without --lora-load"),
        (["--output-file", "x.jsonl"], "--output-file takes the answers of one way"),
        (["--task", "beam_search", "--num-beams", "1"], "--num-beams: 1 is wrong"),
        (["--task", "greedy", "--temperature", "0.5"], "--temperature has no meaning without a task that draws"),
        (["--task", "greedy", "do_sample", "--num-beams", "4"], "--num-beams has no meaning without beam search"),
        (["--task", "chat", "--prompt", "hello"], "--prompt has no meaning without a task other than chat"),
        (["--task", "do_sample", "--history-turns", "2"], "--history-turns has no meaning without chat"),
        (["--bf16", "--fp32"], "exclude each other"),
        (["--task", "greedy", "--prompt-file", "nothing.txt"], "nothing.txt does not exist"),
        (["--task", "greedy", "--add-eos-token", "<nope>"], "'<nope>' is wrong"),
    ],
)
def test_the_door_refuses_in_a_line(toys, capsys, words, message):
    assert main(["--load", str(toys["llama"]), "--num-threads", "1", *words]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert any(message in line for line in lines), lines


def test_lengths_beyond_the_context_are_told(toys, capsys):
    words = ["--load", str(toys["llama"]), "--task", "greedy", "--prompt", "a", "--dry-run"]
    assert main([*words, "--max-new-tokens", "256"]) == 0
    assert "--max-new-tokens: the model has" not in capsys.readouterr().out
    assert main([*words, "--max-new-tokens", "257"]) == 0
    assert "--max-new-tokens: the model has 256 positions, prompt included" in capsys.readouterr().out


def test_the_dry_run_shows_the_checkpoints_precision(toys, capsys):
    assert main(["--load", str(toys["llama"]), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "fp32" in shown and "nothing was started" in shown


def test_prompt_files(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "b.json").write_text('["one", {"prompt": "two"}]')
    assert read_prompts(tmp_path / "a.txt") == read_prompts(tmp_path / "b.json") == ["one", "two"]
    (tmp_path / "c.jsonl").write_text('{"prompt": "one"}\n{"answer": "two"}\n')
    with pytest.raises(UserError, match="entry 2"):
        read_prompts(tmp_path / "c.jsonl")
