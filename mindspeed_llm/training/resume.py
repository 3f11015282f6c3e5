"""Going on from a checkpoint: at the start of a run, and back to an earlier iteration in its middle."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from mindspeed_llm.errors import UserError
from mindspeed_llm.plan.plan import Plan
from mindspeed_llm.training.data import TrainingData
from mindspeed_llm.training.guards.rewinding import plan_of_rewind
from mindspeed_llm.training.loop import Progress
from mindspeed_llm.training.saving import Saver, layout_record
from mindspeed_llm.training.setup import TrainingModel, is_leader


def resume(plan: Plan, model: TrainingModel, optimizer: Any, scheduler: Any, data: TrainingData) -> Progress:
    """Load optimizer, schedule, random states and progress of `plan.resume`; the weights too when they are in it.

    Raises:
        UserError: the data changed, or the checkpoint does not fit.
    """
    from mindspeed_llm.checkpoint.optimizer_state import load_grad_scaler_state, set_optimizer_step
    from mindspeed_llm.checkpoint.train_save import load_training
    from mindspeed_llm.checkpoint.training_state import restore_rng_states, rng_key, rng_states, training_state

    source, c = plan.resume, plan.config.checkpoint
    data.check_unchanged(source.record)
    check_precision(plan)
    if (note := moments_note(plan)) and is_leader():
        print(note, flush=True)
    only = model.trained if plan.adapters is not None else None
    same_layout = source.record["layout"].items() <= layout_record(plan).items()
    known = source.record.get("random_states", True)  # unless a rank died that had not told them
    with_rng = same_layout and known and not c.no_load_rng
    state = training_state(
        model.chunks,
        None if c.no_load_optim else optimizer,
        scheduler,
        only,
        rng=rng_states() if with_rng else None,
    )
    loaded = load_training(source.directory, state, trusted=c.trust_checkpoint)
    if not c.no_load_optim:
        set_optimizer_step(optimizer, loaded["optimizer_step"])
        load_grad_scaler_state(optimizer, loaded["grad_scaler"])
    else:
        state.take_rounded()
        optimizer.reload_model_params()
    scheduler.load_state_dict(loaded["opt_param_scheduler"])
    if with_rng:
        restore_rng_states(loaded[rng_key()])
    elif not (same_layout and known) and draws_masks(plan) and is_leader():
        where = "after the loss of a rank's random states" if same_layout else "at another layout"
        print(f" resume: {where} dropout starts from the seed again; its masks are others than without a stop")
    return Progress(**source.record["progress"])


def go_back(
    plan: Plan,
    model: TrainingModel,
    optimizer: Any,
    scheduler: Any,
    data: TrainingData,
    saver: Saver,
    changing: Callable[[], AbstractContextManager],
) -> Progress:
    """Load the newest healthy checkpoint of this run.

    Args:
        changing: the context in which weights and optimizer state are of no iteration.

    Raises:
        UserError: there is none.
    """
    saver.finish()
    with changing():
        scheduler.num_steps = 0  # its load_state_dict adds to what it has counted
        return resume(plan_of_rewind(plan), model, optimizer, scheduler, data)


def draws_masks(plan: Plan) -> bool:
    """Whether training drops anything out."""
    rates = [plan.config.model.hidden_dropout, plan.config.model.attention_dropout, plan.shape.attention_dropout]
    return any(rates) or (plan.adapters is not None and plan.adapters.dropout > 0)


def moments_note(plan: Plan) -> str | None:
    """What becomes of moments that were saved in another type; None where nothing does."""
    before = plan.resume.record["continuity"].get("o2_optimizer", False)
    now = plan.config.optimizer.o2_optimizer
    if before == now or plan.config.checkpoint.no_load_optim:
        return None
    kept = "fp32 and are rounded to bf16 (--o2-optimizer)" if now else "bf16 and are fp32 from here on"
    return f" resume: both moments of AdamW were {kept}; the run goes on differently than it would have"


def check_precision(plan: Plan) -> None:
    """Refuse to go on in another type: the fp32 weights and moments of mixed precision have no counterpart in fp32.

    Raises:
        UserError: the types differ and the optimizer's state was to be loaded.
    """
    before, now = plan.resume.record["dtype"], plan.dtype_name
    if before != now and not plan.config.checkpoint.no_load_optim:
        flag = "without --bf16 and --fp16" if before == "fp32" else f"with --{before}"
        raise UserError(
            f"resume: {now} is wrong, because the optimizer of {plan.resume.directory} was trained in {before}; legal: "
            f"{flag}; try: --no-load-optim to keep the weights alone"
        )
