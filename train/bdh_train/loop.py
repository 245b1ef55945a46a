"""The loop: the same steps on every port, and after every stop."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import bdh_spec
from bdh_spec import Backend, BDHConfig, BDHError, Model, Optimizer, Params, Spread, Team, fingerprint
from bdh_spec.params import count
from bdh_train import memory
from bdh_train.batches import batches, held_out
from bdh_train.card import Findings, card
from bdh_train.checkpoint import Checkpoint, Progress
from bdh_train.config import TrainConfig, TrainError, as_toml, differing, read_initial, resolve
from bdh_train.data import Text, open_data
from bdh_train.measure import BITS, by_position, mean_loss
from bdh_train.run_folder import RunFolder
from bdh_train.schedule import rate
from bdh_train.show import Board, Talk, draw
from bdh_train.together import folder_for, in_turn, spread_of

SAMPLE = 300  # bytes
REDRAWN = 20  # seconds between pictures of a curve
BEYOND = 4  # times block_size that positions are measured up to, or as far as windows went


@dataclass(frozen=True)
class Result:
    """What became of a run."""

    step: int
    is_done: bool  # and not stopped on the way
    val_loss: float | None  # the best
    val_bits_per_byte: float | None
    checkpoint: Path  # the model if it is done, else where to go on from
    rank: int = 0  # of the process that tells it: the first has written everything


@dataclass
class Run:
    """A run under way."""

    config: TrainConfig
    folder: RunFolder
    training: Text
    held_out: Text
    model: Model
    optimizer: Optimizer
    progress: Progress
    talk: Talk
    team: Team
    spread: Spread | None

    @property
    def is_done(self) -> bool:
        return self.progress.has_given_up or self.progress.step >= self.config.max_steps

    def params(self) -> Params:
        """The weights as they are, before any rounding."""
        return self.model.export_optimizer(self.optimizer).masters or self.model.params()

    def save(self) -> Path:
        state = self.model.export_optimizer(self.optimizer)
        params = state.masters or self.model.params()
        found = Checkpoint(params, dataclasses.replace(state, masters=None), self.progress)
        return self.folder.save(found, self.model.config, self.config.keep)

    def sample(self) -> bytes:
        text: bytes = self.model.generate(self.config.prompt, SAMPLE, 0.8, 50, self.config.seed)
        return text


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    given: Collection[str] | None = None,
    stop: Callable[[], bool] = lambda: False,
    talk: Talk | None = None,
) -> Result:
    """Train as the configuration says, in its folder; ``stop`` is asked after each step whether to save and leave.

    ``given`` names the settings that are to hold for a run that goes on; otherwise those do that are not the default.
    """
    backend = bdh_spec.choose(port_asked(config, resume, given))
    team = backend.team()
    talk = talk if talk and team.is_first else Talk(quiet=True)
    with folder_for(Path(config.out), resume, team) as folder:
        with in_turn(team):
            config = taken_up(config, folder, given, talk) if resume else resolve(config)
            found = gathered(config, folder, resume, talk)
        run = begin(config, folder, found, backend, team, talk)
        announce(run)
        if not run.is_done:
            steps(run, stop)
        if not run.is_done:
            path = run.save()
            talk.say(f"stopped after step {run.progress.step}, which is saved: go on with --resume --out {config.out}")
            return result(run, path)
        if team.is_first:
            finish(run)
        return result(run, folder.model)


def port_asked(config: TrainConfig, resume: bool, given: Collection[str] | None) -> str:
    """The port to train on, which a run that goes on has chosen unless another is asked for."""
    folder, is_asked = RunFolder(Path(config.out)), "backend" in (changed(config) if given is None else given)
    return folder.read_config().backend if resume and not is_asked and folder.config.is_file() else config.backend


def taken_up(config: TrainConfig, folder: RunFolder, given: Collection[str] | None, talk: Talk) -> TrainConfig:
    """The configuration of the run in a folder, with what may be another from here on."""
    begun = folder.read_config()
    asked = dataclasses.replace(
        begun, **{name: getattr(config, name) for name in (changed(config) if given is None else given)}
    )
    if names := differing(asked, begun):
        was = ", ".join(f"{name} {getattr(begun, name)!r}" for name in names)
        raise TrainError(f"{folder.path} holds a run with {was}: leave {', '.join(names)} out, or begin another with --out")
    if asked.max_steps != begun.max_steps:
        talk.say(f"the schedule from here on is that of {asked.max_steps} steps, and no more that of {begun.max_steps}")
    if as_toml(asked) != as_toml(begun):
        folder.write(folder.config, as_toml(asked))
    return asked


def changed(config: TrainConfig) -> list[str]:
    """What a configuration says that is not the default."""
    return [f.name for f in dataclasses.fields(config) if getattr(config, f.name) != f.default]


@dataclass(frozen=True)
class Found:
    """What a run reads before it loads a model: on several processes one after the other, which loading takes all at once."""

    training: Text
    held_out: Text
    data: str  # the fingerprint of the text to train on
    is_new: bool
    saved: tuple[Checkpoint, BDHConfig] | None  # where it goes on from


def gathered(config: TrainConfig, folder: RunFolder, resume: bool, talk: Talk) -> Found:
    """The text, and what the folder has of a run that goes on."""
    if not resume:
        folder.clear()
    training, measured = open_data(config, folder.path)
    found = Found(training, measured, training.fingerprint(), not resume, folder.last(talk.say) if resume else None)
    if found.saved is None:
        if resume:
            why = "no checkpoint is whole: the run begins again" if folder.saved() else "nothing was saved yet: the run begins"
            talk.say(f"{why} at its first step")
    elif (progress := found.saved[0].progress).data != found.data:
        raise TrainError(f"the data is not what step {progress.step} had read: bring back {', '.join(config.data)}")
    return found


def begin(config: TrainConfig, folder: RunFolder, found: Found, backend: Backend, team: Team, talk: Talk) -> Run:
    """Everything in place for the next step."""
    spread = spread_of(config, team)
    if found.saved is None:
        model, progress = load(backend, *initial(config), config, spread), Progress(data=found.data)
        optimizer = model.optimizer(config.adamw())
        if found.is_new:
            folder.begin(config)
    else:
        saved, sizes = found.saved
        model, progress = load(backend, saved.params, sizes, config, spread), saved.progress
        optimizer = model.import_optimizer(saved.optimizer)
    folder.rewind(progress.step)
    run = Run(config, folder, found.training, found.held_out, model, optimizer, progress, talk, team, spread)
    if found.saved is not None:
        if progress.port != port_of(run):
            talk.say(f"{progress.port} made the steps so far, {port_of(run)} goes on: bits may differ from here")
        talk.say(f"{progress.step} steps are done already")
    return run


def initial(config: TrainConfig) -> tuple[Params, BDHConfig]:
    """The model to start from: that of a checkpoint, or fresh weights of the seed, the same for every port."""
    if config.init_from:
        params, theirs = read_initial(config)
        sizes = dataclasses.replace(config.model, freqs=theirs.freqs)
        return Params(*(np.asarray(weight, np.float32) for weight in params)), sizes
    return bdh_spec.init(config.model, np.random.default_rng(config.seed)), config.model


def load(backend: Backend, params: Params, sizes: BDHConfig, config: TrainConfig, spread: Spread | None = None) -> Model:
    return backend.load(params, sizes, device=config.device, dtype=config.dtype, spread=spread)


def port_of(run: Run) -> str:
    """A port, its device and dtype, and what shares its work, in words."""
    model, spread = run.model, run.spread
    return f"{model.backend} on {model.device}, {model.dtype}" + (f", shared {shared(spread)}" if spread else "")


def shared(spread: Spread) -> str:
    """A spread in words."""
    return f"{spread.data} x {spread.neurons}" + (" with weights" if spread.shares_weights else "")


def announce(run: Run) -> None:
    """What is about to be trained, before the first step."""
    config, model = run.config, run.model
    has = bdh_spec.get_backend(model.backend).memory(model.device)
    here = dataclasses.replace(config, batch_size=config.batch_size // (run.spread.data if run.spread else 1))
    run.talk.page(as_toml(config).strip())
    long = f" ({config.tokens_of(config.max_steps):,} in the last {config.long_steps})" if config.long_block_size else ""
    run.talk.say(
        f"{port_of(run)}: {count(config.model):,} parameters, {config.tokens_per_step:,} tokens a step{long},"
        f" {len(run.training):,} bytes to train on and {len(run.held_out):,} held out,"
        f" {memory.says(here, model.backend, model.device, has)}"
    )


def steps(run: Run, stop: Callable[[], bool]) -> None:
    """Step after step, to the last one or to a wish to stop."""
    config, progress = run.config, run.progress
    progress.port, drawn = port_of(run), time.monotonic()
    board = Board(run.folder.path / "tensorboard" if run.team.is_first else None)
    with board, run.talk.steps(progress.step, config.max_steps):
        while not run.is_done:
            line = step(run)
            run.folder.note(line)
            board.add(line)
            run.talk.step(line, config.max_steps, config.tokens_of(progress.step), config.tokens_after(progress.step))
            if run.team.is_first and "val_loss" in line and time.monotonic() - drawn > REDRAWN:
                draw(run.folder.path / "curve.png", run.folder.lines())
                drawn = time.monotonic()
            if config.sample_every and progress.step % config.sample_every == 0:
                run.talk.sample(run.sample())
            if run.is_done or progress.step % config.checkpoint_every == 0:
                run.save()
            if run.team.any(stop()):
                break


def step(run: Run) -> dict[str, Any]:
    """One step, and the measure after it if one is due: its line."""
    config, progress = run.config, run.progress
    number = progress.step + 1
    at = rate(config, number)
    loss = run.model.train_on(run.optimizer, batches(config, run.training, number), rate=at)
    if not math.isfinite(loss):
        raise TrainError(
            f"the loss of step {number} is {loss}: go back with --resume after lowering --learning-rate in a run of its own,"
            " or train in float32"
        )
    progress.step = number
    line: dict[str, Any] = {"step": number, "loss": loss, "rate": at}
    if number % config.eval_every == 0 or number == config.max_steps:
        value = mean_loss(run.model, held_out(config, run.held_out))
        line |= {"val_loss": value, "val_bits_per_byte": value * BITS}
        judge(run, value)
    return line


def judge(run: Run, value: float) -> None:
    """Keep the best weights; end a run that no more gets better."""
    progress = run.progress
    if progress.best_loss is None or value < progress.best_loss:
        params, sizes = run.params(), run.model.config
        progress.best_loss, progress.best_step, progress.misses = value, progress.step, 0
        progress.best_print = fingerprint(params, sizes.freqs)
        run.folder.keep_best(progress.step, params, sizes)
        return
    progress.misses += 1
    if run.config.patience and progress.misses >= run.config.patience:
        progress.has_given_up = True
        run.talk.say(f"no better than at step {progress.best_step} for {progress.misses} measures: the run ends here")


def finish(run: Run) -> None:
    """The best weights as the model, its card, and the curve."""
    step, params, sizes = best(run)
    model = load(bdh_spec.get_backend(run.model.backend), params, sizes, run.config)
    bdh_spec.save(run.folder.model, params, sizes)
    value = mean_loss(model, held_out(run.config, run.held_out))
    text: bytes = model.generate(run.config.prompt, SAMPLE, 0.8, 50, run.config.seed)
    found = Findings(
        step=step,
        training_bytes=len(run.training),
        held_out_bytes=len(run.held_out),
        data=run.progress.data,
        bits=value * BITS,
        positions=by_position(model, run.held_out, max(BEYOND * run.config.block_size, run.config.longest)),
        sample=text,
        port=run.progress.port,
    )
    run.folder.write(run.folder.path / "README.md", card(run.config, params, sizes, found))
    if not draw(run.folder.path / "curve.png", run.folder.lines()):
        run.talk.say("no curve.png, which matplotlib draws: pip install 'bdh-spec[train]'")
    run.talk.say(f"{found.bits:.3f} bits per byte on held-out text: {run.folder.model}, and its card beside it")


def best(run: Run) -> tuple[int, Params, BDHConfig]:
    """The step, weights and sizes that were best on held-out text, or those saved last where the best were damaged."""
    progress, path = run.progress, run.folder.best(run.progress.best_step)
    try:
        params, sizes = bdh_spec.read(path)
        if fingerprint(params, sizes.freqs) == progress.best_print:
            return progress.best_step, params, sizes
        why = "it does not hold what was written"
    except BDHError as error:
        if isinstance(error.__context__, OSError):  # a disk that fails may give it another time
            raise
        why = str(error)
    last = run.folder.last(run.talk.say)
    if last is None:
        raise TrainError(
            f"{path.name} is damaged ({why}), and so is every checkpoint beside it: begin again, with another --out"
        )
    saved, sizes = last
    run.talk.say(f"{path.name} is damaged ({why}): the model is that of step {saved.progress.step}, which was saved last")
    return saved.progress.step, saved.params, sizes


def result(run: Run, path: Path) -> Result:
    best = run.progress.best_loss
    return Result(run.progress.step, run.is_done, best, None if best is None else best * BITS, path, run.team.rank)
