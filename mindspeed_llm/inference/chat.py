"""A conversation on the terminal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from mindspeed_llm.data.conversation import Conversation, Message
from mindspeed_llm.errors import UserError
from mindspeed_llm.inference.engine import context_length
from mindspeed_llm.inference.loaded import LoadedModel
from mindspeed_llm.inference.settings import GenerationSettings

# As upstream prints them.
PROMPT = "\n\nYou >> "
LABEL = "\nMindSpeed-LLM:\n"
LEAVE = ("q", "quit", "exit")
FORGET = ("clear", "new")
# "/adapter a" answers with that set of adapters alone, "/adapter a=0.7 b=0.3" with a combination, "/adapter" with none.
SWITCH = "/adapter"


@dataclass
class History:
    """The question/answer pairs that the next question is asked after.

    Args:
        turns: how many are remembered.
    """

    turns: int
    system: str | None = None
    pairs: list[tuple[str, str]] = field(default_factory=list)

    def tokens(self, model: LoadedModel, question: str, room: int) -> list[int]:
        """The prompt that asks `question` after the pairs; the oldest pairs are forgotten until `room` tokens do.

        Without a template, earlier questions and answers stand in front of the question as plain lines.
        """
        while True:
            ids = model.encode(self._prompt(model, question), self.system if model.template is None else None)
            if len(ids) <= room or not self.pairs:
                return ids
            self.pairs.pop(0)

    def _prompt(self, model: LoadedModel, question: str) -> str | Conversation:
        if model.template is None:
            return "\n".join([*(text for pair in self.pairs for text in pair), question])
        turns = [Message(role, text) for pair in self.pairs for role, text in zip(("user", "assistant"), pair)]
        return Conversation((*turns, Message("user", question)), self.system)

    def add(self, question: str, answer: str) -> None:
        """Remember a pair, and no more than `turns`."""
        self.pairs = [*self.pairs, (question, answer)][-self.turns :] if self.turns else []


def switch_adapters(model: LoadedModel, words: list[str]) -> str:
    """Use the sets of adapters that are named, with weights after "=" (1 without); says what is in use."""
    if model.adapters is None:
        return f"{SWITCH}: there is one set of adapters or none; --lora-load A B loads several"
    weights: dict[str, float] = {}
    try:
        for word in words:
            name, _, weight = word.partition("=")
            weights[name] = float(weight or 1.0)
        model.adapters.use(weights)
    except UserError as wrong:
        return str(wrong)
    except ValueError:
        return f"{SWITCH}: {word} is wrong, because its weight is no number; legal: NAME or NAME=WEIGHT"
    used = ", ".join(f"{name}={weight:g}" for name, weight in model.adapters.weights.items())
    return f"adapters: {used or 'none'} (loaded: {', '.join(model.adapters.names)})"


def chat(
    model: LoadedModel,
    settings: GenerationSettings,
    history: History,
    read: Callable[[str], str | None],
    write: Callable[[str], None],
    streamed: bool = True,
) -> None:
    """Ask and answer until the user leaves.

    Args:
        read: shows the prompt it is given and returns a line, the same on all ranks, or None at the end of input.
        write: shows text at once (nothing, on ranks that do not speak).
        streamed: show answers while they are made.
    """
    shape = model.model.config.shape
    longest = min(settings.max_length or context_length(shape), context_length(shape))
    room = longest - min(settings.max_new_tokens, longest // 2)
    while True:
        line = read(PROMPT)
        question = None if line is None else line.strip()
        if question is None or question in LEAVE:
            write("\n")
            return
        if question in FORGET:
            history.pairs.clear()
            continue
        if not question:
            continue
        if question.split()[0] == SWITCH:
            write(switch_adapters(model, question.split()[1:]) + "\n")
            continue
        ids = history.tokens(model, question, room)
        write(LABEL)
        [answer] = model.answer([ids], settings, 1, (lambda _, piece: write(piece)) if streamed else None)
        if not streamed:
            write(answer)
        history.add(question, answer)
