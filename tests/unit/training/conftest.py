"""Small text data and a door that returns what happened."""

import pytest

from mindspeed_llm.config.parser import parse


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Topics of Python's documentation as a jsonl file."""
    import json
    import pydoc_data.topics

    path = tmp_path_factory.mktemp("corpus") / "topics.jsonl"
    texts = [pydoc_data.topics.topics[key][:1500] for key in sorted(pydoc_data.topics.topics)[:60]]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="session")
def instructions(tmp_path_factory):
    """Question and answer rows of uneven length."""
    import json
    import pydoc_data.topics

    path = tmp_path_factory.mktemp("rows") / "rows.json"
    topics = pydoc_data.topics.topics
    rows = [
        {"instruction": f"What is {key}?", "input": "", "output": " ".join(topics[key].split()[: 5 + 7 * (i % 9)])}
        for i, key in enumerate(sorted(topics)[:48])
    ]
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture
def door():
    """run("pretrain", "--flag value ...", ...) -> RunResult; problems raise UserError as they would be printed."""
    from mindspeed_llm.cli.training import run_door

    def run(name, *words):
        flat = [piece for word in words for piece in str(word).split()]
        return run_door(parse(name, [*flat, "--progress", "lines"]))

    return run


def losses(result):
    """The training losses of a run."""
    return [loss for _, loss in result.history.train]
