"""Train a BDH on a text with the Trainer of transformers, measure it, let it write, and save it for from_pretrained.

python examples/train_transformers.py --out FOLDER        about two minutes on two cores; Ctrl-C keeps what was learned
"""

from __future__ import annotations

import math
import pydoc_data.topics
import signal
import sys
from pathlib import Path
from typing import Any

import click
import torch
from huggingface_hub.errors import StrictDataclassError
from torch.utils.data import TensorDataset
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from bdh_transformers import BDHConfig, BDHForCausalLM, BDHTokenizer

PROMPT, SEED = "The ", 7
HOW = {"lr_scheduler_type": "cosine", "warmup_steps": 0.1, "adam_beta2": 0.95}


@click.command()
@click.option("--file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Text to learn, else Python's help.")
@click.option("--out", default="bdh-trained", show_default=True, type=click.Path(file_okay=False, path_type=Path))
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in OUT.")
@click.option("--steps", default=400, show_default=True)
@click.option("--window", default=128, show_default=True, help="Bytes of a training text.")
@click.option("--layers", default=3, show_default=True)
@click.option("--width", default=64, show_default=True)
@click.option("--heads", default=4, show_default=True)
@click.option("--multiplier", default=16, show_default=True, help="Neurons of all heads, in widths.")
@click.option("--batch-size", "--batch_size", default=16, show_default=True, help="Windows of a step.")
@click.option("--learning-rate", "--learning_rate", default=4e-3, show_default=True)
@click.option("--weight-decay", "--weight_decay", default=0.1, show_default=True)
@click.option("--validation", default=0.1, show_default=True, help="Share of the text that is held out.")
@click.option("--best-model", "--best_model", is_flag=True, help="Keep the weights that were best on held-out text.")
@click.option("--attn", default="bdh_recurrent", show_default=True, type=click.Choice(["bdh_recurrent", "bdh_parallel"]))
def command(
    file: Path | None,
    out: Path,
    resume: bool,
    steps: int,
    window: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    validation: float,
    best_model: bool,
    attn: str,
    **sizes: int,
) -> None:
    """Train, measure on the end of the text, write a sample, save model and tokenizer to OUT."""
    set_seed(SEED)
    learned, held_out = windows(file.read_bytes() if file else help_topics(), window, validation)
    checkpoint, listener = last_checkpoint(out, resume), Listener()
    model = BDHForCausalLM.from_pretrained(checkpoint) if checkpoint else BDHForCausalLM(config(**sizes))
    model.set_attn_implementation(attn)
    trainer = Trainer(
        model,
        arguments(
            out, steps, batch_size, learning_rate=learning_rate, weight_decay=weight_decay, load_best_model_at_end=best_model
        ),
        train_dataset=learned,
        eval_dataset=held_out,
        data_collator=batch,
        processing_class=BDHTokenizer(),
        callbacks=[listener],
    )
    trainer.remove_callback(PrinterCallback)  # Listener says it, on stderr
    signal.signal(signal.SIGINT, listener.interrupt)
    trainer.train(resume_from_checkpoint=checkpoint)
    if listener.interrupted:
        raise click.Abort(f"stopped after step {trainer.state.global_step}, which is saved: go on with --resume --out {out}")
    trainer.save_model()  # the tokenizer too
    show(trainer.evaluate()["eval_loss"], model, trainer.processing_class)


def help_topics() -> bytes:
    """English that every Python carries. Its topics quote one another, so what is held out of them is not all unseen."""
    return "\n".join(text for _, text in sorted(pydoc_data.topics.topics.items())).encode()


def windows(text: bytes, length: int, share: float) -> tuple[TensorDataset, TensorDataset]:
    """The text cut into windows, of which the last ``share`` is held out. The id of a byte is its value."""
    rows = torch.frombuffer(bytearray(text), dtype=torch.uint8)[: len(text) // length * length].view(-1, length)
    if len(rows) < 20:
        raise click.UsageError(f"the text has {len(text)} bytes: give at least {20 * length}, or a smaller --window")
    border = len(rows) - round(len(rows) * share)
    if not 0 < border < len(rows):
        raise click.UsageError(
            f"--validation {share} leaves nothing to learn or nothing to measure on: give a share such as 0.1"
        )
    return TensorDataset(rows[:border]), TensorDataset(rows[border:])


def batch(rows: list[tuple[torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Windows together; the model compares each token with the next by itself."""
    ids = torch.stack([row for (row,) in rows]).long()
    return {"input_ids": ids, "labels": ids}


def last_checkpoint(out: Path, resume: bool) -> str | None:
    """The checkpoint to go on from, if any; nothing that exists is overwritten."""
    found = get_last_checkpoint(str(out)) if out.is_dir() else None
    if resume and not found:
        raise click.UsageError(f"{out} has no checkpoint to go on from: leave --resume out")
    if not resume and out.is_dir() and any(out.iterdir()):
        raise click.UsageError(f"{out} is not empty: give another --out, or --resume to go on from its last checkpoint")
    return found


def config(layers: int, width: int, heads: int, multiplier: int) -> BDHConfig:
    return BDHConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        mlp_internal_dim_multiplier=multiplier,
    )


def arguments(out: Path, steps: int, batch_size: int, **recipe: Any) -> TrainingArguments:
    """Evaluate and save four times on the way."""
    usual = dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), batch_size)
    often = dict.fromkeys(("eval_steps", "save_steps", "logging_steps"), max(1, steps // 4))
    when = {
        "eval_strategy": "steps",
        "save_total_limit": 2,  # the best and the last
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "report_to": [],
        "disable_tqdm": True,
    }
    when["dataloader_pin_memory"] = torch.accelerator.is_available()
    return TrainingArguments(str(out), max_steps=steps, seed=SEED, **HOW, **recipe, **usual, **often, **when)


def show(loss: float, model: BDHForCausalLM, tokenizer: BDHTokenizer) -> None:
    """The measure and a sample, on stdout."""
    print(f"held out: perplexity {math.exp(loss):.2f} per byte, {loss / math.log(2):.3f} bits per byte")
    prompt = tokenizer(PROMPT, return_tensors="pt").to(model.device)
    print(tokenizer.decode(model.generate(**prompt, max_new_tokens=300, do_sample=True, temperature=0.7, top_k=50)[0]))


class Listener(TrainerCallback):
    """Says how far training is, and ends it with a checkpoint at the first Ctrl-C; a second one ends it at once."""

    interrupted = False

    def interrupt(self, *_: Any) -> None:
        self.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        for name, meaning in {"loss": "training", "eval_loss": "held out"}.items():
            if name in logs:
                bits = float(logs[name]) / math.log(2)
                print(f"step {state.global_step} of {state.max_steps}: {meaning} {bits:.3f} bits per byte", file=sys.stderr)


def main() -> None:
    """Run the command: bad input is one sentence on stderr and exit status 2."""
    try:
        command.main(standalone_mode=False)
    except (click.ClickException, StrictDataclassError, ValueError, OSError) as error:
        sentence, status = error.format_message() if isinstance(error, click.ClickException) else error.__cause__ or error, 2
    except (KeyboardInterrupt, click.Abort) as stopped:
        sentence, status = str(stopped) or "interrupted", 130
    else:
        return
    print(f"train_transformers: {sentence}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
