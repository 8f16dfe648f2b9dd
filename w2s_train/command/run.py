"""What the ``lightning`` command does once it knows that it has work to do."""

import argparse
import shlex
import sys
from collections.abc import Iterable
from inspect import isfunction
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import set_loader
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from w2s_train import callbacks
from w2s_train.autoencoder import PixelSpace, latents_beside
from w2s_train.checkpoint_file import read_file
from w2s_train.command import changes, list_keys
from w2s_train.command.config import (
    SCORING,
    check_numbers,
    check_pipe,
    explain,
    innermost,
    locate,
    read_strictly,
)
from w2s_train.command.flags import check_callbacks, check_flags, check_precision, seed_of
from w2s_train.command.latents import fill_in
from w2s_train.command.processes import check_processes, cluster_environments
from w2s_train.command.trainer import DiffusionTrainer, quiet_lightning
from w2s_train.datamodule import ShardDataModule, classes_of
from w2s_train.errors import INTERRUPTED, PEER_LOST, Stopped, UserError, one_line
from w2s_train.evaluation.fid import FID
from w2s_train.evaluation.images import ImageWriter
from w2s_train.evaluation.scorer import ResumableEvaluation, Scorer, looks_at_images
from w2s_train.files import OF_THE_DISK
from w2s_train.imports import found
from w2s_train.loading import check_functions, restrict_imports
from w2s_train.models import offered
from w2s_train.models.warm_start import warm_start
from w2s_train.module import DiffusionModule
from w2s_train.running.checkpoint_io import CheckpointFiles
from w2s_train.running.checkpoints import Checkpoints
from w2s_train.running.guard import Guard
from w2s_train.running.loggers import Events, MetricsCSV, placed, unbroken
from w2s_train.running.profile import Profile
from w2s_train.running.progress import Progress
from w2s_train.running.record import PER_STEP, PRECISION, Record, find_checkpoint, run_folder
from w2s_train.running.run import Run
from w2s_train.running.settings import check_averages, check_schedule, check_switches
from w2s_train.running.stop import Stop
from w2s_train.running.watch import Watch
from w2s_train.running.watched_ddp import watched_strategies
from w2s_train.secrets import redacted, show_no_secrets
from w2s_train.shards.workers import lost_worker

PROFILE = "--profile"  # a switch and no key: it belongs to no experiment, and into no config
CHECKED = ("fit", "validate", "test", "tune", "ema")  # by scorers
WITHOUT_LOGGERS = ("predict", "sample", "reference", "tune", "ema")
QUIET = {"exit_on_error": False, "allow_abbrev": False, "parser_mode": "strict"}
CLASSES = {
    "trainer": DiffusionTrainer,
    "model": DiffusionModule,
    "data": ShardDataModule,
    "checkpoint": Checkpoints,
    "guard": Guard,
    "watch": Watch,
}


class Command(LightningCLI):
    """All that a trainer does, with a run folder derived from the names of the configs.

    Args:
        args: Of the command line; the command first.
        options: Those of Lightning's class.
    """

    def __init__(self, args: list[str], **options: Any) -> None:
        self.given = args
        super().__init__(DiffusionModule, ShardDataModule, args=args, **options)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Methods of the trainer, and which of their arguments are no options."""
        ours = {name: {"model", "datamodule"} for name in ("sample", "reference", "tune", "ema")}
        return {**LightningCLI.subcommands(), **ours}

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        """Of the command that was given; the others need a name only."""
        if subcommand == self.given[0]:
            return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        return self.init_parser(**kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Parts that every run has, and one seed for everything."""
        parser.add_class_arguments(Checkpoints, "checkpoint")
        parser.add_class_arguments(Guard, "guard")
        parser.add_class_arguments(Watch, "watch")
        about = "A checkpoint of another run: a fit that begins takes over what fits of it."
        parser.add_argument("--start_from", type=str | None, default=None, help=about)
        parser.link_arguments("seed_everything", "data.seed", compute_fn=seed_of)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse them, and check what parsers do not see."""
        self._parse(parser, [arg for arg in args if arg != PROFILE])
        subcommand = self.config.subcommand
        self.profile = PROFILE in args
        if self.profile and subcommand != "fit":
            raise UserError(f"{PROFILE}: must stand with fit; {subcommand} takes no training step")
        check_numbers(self.config[subcommand])
        check_functions(self.config)

    def _parse(self, parser: LightningArgumentParser, args: list[str]) -> None:
        """Parse them, with keys inside lists."""
        args, inside = list_keys.split(args)
        if not inside:
            return super().parse_arguments(parser, args)

        def changed(number: int) -> list[str]:
            """All arguments, with that many of the keys."""
            others = [arg for arg in args if not arg.startswith("--print_config")]
            config = parser.parse_args(others, _skip_validation=True)
            part = self._parser(config.subcommand)
            text = part.dump(config[config.subcommand], skip_none=False, skip_validation=True)
            return args + list_keys.options(yaml.safe_load(text), inside[:number], read_strictly)

        try:
            super().parse_arguments(parser, changed(len(inside)))
        except argparse.ArgumentError as error:
            changed(0)  # what is wrong without them is no fault of theirs
            for number, each in enumerate(inside, 1):
                try:
                    parser.parse_args(changed(number), _skip_validation=True)
                except argparse.ArgumentError as reason:
                    raise UserError(
                        f"{each}: {innermost(explain(str(reason), CLASSES))}"
                    ) from error
            if empty := list_keys.emptied(inside, str(error)):
                raise UserError(f"{empty}: must have a value; there is no default") from error
            raise

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning would let the checkpoint's settings override the command line's."""

    def before_instantiate_classes(self) -> None:
        """Derive the run folder, find the checkpoint, and check what constructors do not see."""
        subcommand = str(self.subcommand)
        config = self.config[subcommand]
        check_pipe(config.data.allow_pipe, self.given)
        check_flags(config.trainer)
        folder = run_folder(config)
        config.trainer.default_root_dir = str(folder)
        if config.data.num_classes is None:
            data = config.data
            data.num_classes = classes_of(data.train_urls, data.images, data.made_by)
            config.model.network.init_args.num_classes = data.num_classes
        fill_in(config.model, config.data)
        self.goes_on = False
        if subcommand != "reference":
            self.goes_on = config.ckpt_path == "last"
            # A function that makes a network has read its weights from a file.
            published = isfunction(found(config.model.network.class_path))
            config.ckpt_path = find_checkpoint(
                config.ckpt_path, folder, subcommand, published=published
            )
            config.weights_only = True  # of a checkpoint only tensors and plain values are read
        # A checkpoint of another folder starts a new run in this one; "last" never does, so that a
        # job that was stopped before its first checkpoint keeps its folder.
        start = getattr(config, "ckpt_path", None)
        inside = start is not None and Path(start).resolve().parent.parent == folder.resolve()
        resumed = start is not None and (self.goes_on or inside)
        self.record = Record(folder, self._whole_config(), resumed, keeps=self.goes_on)
        if subcommand in WITHOUT_LOGGERS:
            config.trainer.logger = False
        if (logger := config.trainer.logger) not in (None, True, False):
            config.trainer.logger = placed(logger, folder, self.record.run_ids())

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer, with loggers and callbacks that every run has."""
        config = self.config_init[self.subcommand]
        folder = config.trainer.default_root_dir
        if self.subcommand not in WITHOUT_LOGGERS:
            given = config.trainer.logger
            if given in (None, True):
                given = Events(folder, name="", version="")
            given = list(given) if isinstance(given, Iterable) else [given] if given else []
            kwargs["logger"] = [*map(unbroken, given), MetricsCSV(folder)]
        # Lightning's own limit does not leave time to save.
        self.stop, kwargs["max_time"] = Stop(config.trainer.max_time), None
        kwargs["plugins"] = _plugins(config.trainer.plugins)
        kwargs["use_distributed_sampler"] = False  # our samplers know of all processes,
        kwargs["overfit_batches"] = 0  # and of this: `instantiate_classes`
        watched_strategies(config.watch)
        kwargs["callbacks"] = self._all_callbacks(Path(folder))
        kwargs |= self._limits()
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (ValueError, RuntimeError, TypeError, ImportError) as error:
            raise UserError(f"trainer: {' '.join(str(error).split())}") from error
        check_precision(trainer.precision)  # of a plugin
        check_processes(trainer)
        return trainer

    def _all_callbacks(self, folder: Path) -> list[Any]:
        """Those of the config, and those that every run has."""
        config = self.config_init[self.subcommand]
        given = self._callbacks()
        check_callbacks(given)
        bar = config.trainer.enable_progress_bar is not False
        bar = bar and not any(isinstance(each, ProgressBar) for each in given)
        ours: list[Any] = [Progress()] * bar + [Profile()] * self.profile
        if self.subcommand == "predict":
            ours.append(ImageWriter(folder / "samples"))
        resumable = [each for each in given if isinstance(each, ResumableEvaluation)]
        if len(resumable) > 1:
            times = len(resumable)
            raise UserError(
                f"trainer.callbacks: must list ResumableEvaluation once, not {times} times"
            )
        run = Run(
            guard=config.guard,
            checkpoints=config.checkpoint,
            watch=config.watch,
            stop=self.stop,
            record=self.record,
            evaluation=resumable[0] if resumable else ResumableEvaluation(),
            scorers=[each for each in given if isinstance(each, Scorer)],
            seed=seed_of(config.seed_everything),
        )
        return [*(each for each in given if each not in resumable), *ours, run]

    def _limits(self) -> dict[str, Any]:
        """Generate no image that no callback of the config takes in."""
        given = [each for each in self._callbacks() if looks_at_images(each)]
        if self.subcommand in ("fit", "validate", "test") and not given:
            if self.subcommand == "fit":
                return {"limit_val_batches": 0}
            rule = "must hold who takes in images, such as w2s_train.callbacks.SampleGrid"
            raise UserError(f"trainer.callbacks: {rule}, for {self.subcommand}")
        seeds = [each.seeds if isinstance(each, Scorer) else None for each in given]
        if given and None not in seeds:
            self.datamodule.only_first(max(filter(None, seeds)))
        return {}

    def _whole_config(self) -> Any:
        """The config of a fit with all defaults, as plain values."""
        if self.subcommand != "fit":
            return None
        text = self._parser("fit").dump(self.config["fit"], skip_none=False)
        return yaml.safe_load(text)

    def instantiate_classes(self) -> None:
        """Instantiate, compare data and network, and let checkpoints carry the model's config."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            raise UserError(locate(str(error), self.config[str(self.subcommand)])) from error
        data, network = self.datamodule, self.model.network
        if data.images is not None:
            if not isinstance(self.model.autoencoder, PixelSpace):
                raise UserError(f"data.images={data.images}: must come without an autoencoder")
            if self.subcommand in ("fit", "reference"):
                data.fit_to(offered(network, "data.images", "shape"))
        known = getattr(network, "num_classes", data.num_classes)
        if data.num_classes != known:
            raise UserError(
                f"data.num_classes={data.num_classes}: must equal the network's, {known}"
            )
        if self.subcommand == "fit":
            data.repeat(self.config["fit"].trainer.overfit_batches)
        self._dump_config()
        self._settings = redacted(self.config_dump["model"])
        self.model.save_hyperparameters(self._settings, logger=False)

    def _callbacks(self) -> list[Any]:
        """Those of the config: none, one or a list."""
        given = self.config_init[str(self.subcommand)].trainer.callbacks or []
        return given if isinstance(given, list) else [given]

    def _run_subcommand(self, subcommand: str) -> None:
        """Run it; a checkpoint of another network is a user's error."""
        for callback in self._callbacks() if subcommand in CHECKED else ():
            if isinstance(callback, Scorer):
                made_later = self.datamodule.makes_shards
                if isinstance(callback, FID) and not made_later:
                    self._check_reference(callback)
                callback.check(self.model, self.datamodule, made_later=made_later)
        self._check_autoencoder(subcommand)
        path = self.config[subcommand].get("ckpt_path")
        if subcommand in SCORING and path and changes.drawn(self._settings):
            before = read_file(path, mmap=True).get("hyper_parameters") or {}
            changes.check_drawn(before, self._settings, path)
        try:
            super()._run_subcommand(subcommand)
        except RuntimeError as error:
            if lost := lost_worker(error, self.datamodule.num_workers):
                raise lost from error
            reason = " ".join(str(error).split())[:300]
            if "loading state_dict" not in reason:
                raise
            where = f"{path}, or without --ckpt_path" if subcommand == "fit" else path
            before = read_file(path, mmap=True).get("hyper_parameters") or {}
            named = changes.misfit({"model": before}, {"model": self._settings}, where)
            raise named or UserError(f"ckpt_path={path}: must fit the config; {reason}") from error

    def _check_reference(self, fid: FID) -> None:
        """Name the command that makes a reference, as far as the words at hand tell."""
        if fid.reference_path.is_file():
            return
        words = iter([word for word in self.given[1:] if word != PROFILE])
        kept = ["lightning", "reference"]
        for word in words:
            if word.partition("=")[0] not in ("--ckpt_path", "--weights_only", "--verbose"):
                kept.append(word)
            elif "=" not in word:
                next(words, None)
        if not isinstance(self.model.autoencoder, PixelSpace):
            kept += ["--urls", "SHARDS_OF_IMAGES"]
        path = fid.reference_path
        raise UserError(f"reference={path}: must be an existing file; made by: {shlex.join(kept)}")

    def _make_references(self) -> None:
        """Of the images of a folder, where they are missing; by the first process, on one device.

        Before that, their shards. What features need is looked at before any image is.
        """
        if self.datamodule.images is None:
            return
        scorers = [each for each in self._callbacks() if isinstance(each, FID)]
        missing = [each for each in scorers if not each.reference_path.is_file()]
        for each in missing:
            each.extractor.load()
        if self.trainer.is_global_zero:
            self.datamodule.prepare_data()
        if self.trainer.is_global_zero and missing:
            alone = DiffusionTrainer(
                accelerator=self.config["fit"].trainer.accelerator,
                devices=1,
                logger=False,
                callbacks=list[Any](missing),
                plugins=[LightningEnvironment()],
            )
            alone.reference(self.model, self.datamodule)

    def _check_autoencoder(self, subcommand: str) -> None:
        """What decodes must be there before the first step, and must be what made the latents."""
        if subcommand == "reference":
            return
        autoencoder, data = self.model.autoencoder, self.datamodule
        if subcommand != "fit" or any(isinstance(each, Scorer) for each in self._callbacks()):
            autoencoder.load()
        urls = data.expand(data.train_urls) if not data.makes_shards else []
        for where, made in latents_beside(urls, data.storage).items():
            autoencoder.check(made, where)
            if subcommand == "fit":
                self.model.objective.align.check(made, where)
            if subcommand == "fit" and (advice := autoencoder.advice(made, where)):
                rank_zero_warn(advice)

    def before_fit(self) -> None:
        """Check steps and batch, and own the run folder before a logger writes into it."""
        if self.profile:
            Profile.check(self.trainer.max_steps)
        steps = self.trainer.max_steps
        try:
            self.model.plan(steps)
            check_switches(self.model, self.trainer.strategy.root_device)
            check_schedule(self.model, steps)
            if self.model.how_compiled == "blocks":
                offered(self.model.network, "compile=blocks", "blocks")
            self.datamodule.check_global_batch(self.trainer)
            self.datamodule.check_unlabelled(self.model)
        except UserError as error:
            raise UserError(locate(str(error), self.config["fit"])) from error
        check_averages(self.model, steps)
        self._warm_start()
        self._compare_with_checkpoint()
        self.record.check_progress(self.config["fit"].ckpt_path)
        self._make_references()
        if self.trainer.is_global_zero:
            self.record.claim()

    def _warm_start(self) -> None:
        """Begin with the weights of another run; one that goes on has its own."""
        config = self.config["fit"]
        if config.start_from is not None and config.ckpt_path is None:
            rank_zero_info(warm_start(self.model, config.start_from))

    def _compare_with_checkpoint(self) -> None:
        """Refuse what would make a run that goes on another one; say what else has changed."""
        path = self.config["fit"].ckpt_path
        if path is None:
            return
        content = read_file(path, mmap=True)
        if "optimizer_states" not in content:
            raise UserError(f"ckpt_path={path}: must be of training; use --start_from={path}")
        settings, reached = content.get("hyper_parameters"), content.get("global_step", 0)
        before = self.record.last_config() if self.record.resumed else {}
        if settings is not None:
            before["model"] = settings  # of the very state that it goes on from
        now = redacted(self.record.config) | {
            PER_STEP: self.datamodule.images_per_step(self.trainer),
            PRECISION: str(self.trainer.precision),
        }
        now = {name: part for name, part in now.items() if name in before}
        if "model" in now:
            now["model"] = self._settings
        own = self.record.resumed
        where = f"{path}, or have another trainer.default_root_dir" if own else path
        if different := changes.check(before, now, where, own=own):
            self.record.different = f"unlike {path}: {different}"
        last = self.trainer.max_steps
        if 0 < last <= reached:
            rank_zero_info(f"trainer.max_steps={last}: is reached by {path}; no step is left")


def _plugins(given: Any) -> list[Any]:
    """Those of the config, our checkpoint files, and who has started this process."""
    ours: list[Any] = [CheckpointFiles(), *cluster_environments()]
    return [*(given if isinstance(given, list) else [given] if given else []), *ours]


class Composition(Command):
    """Everything up to the trainer's start."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing."""


def compose(args: list[str] | None, run: bool = True) -> Command:
    """Parse, check and instantiate; with ``run``, do what the command says.

    Args:
        args: Command and options; None for those of this process.
        run: False stops before the trainer starts.
    """
    args = restrict_imports(sys.argv[1:] if args is None else args)
    set_loader("strict", read_strictly, exceptions=(yaml.YAMLError,))
    for name in callbacks.__all__:  # configs name them so, whichever file defines them
        getattr(callbacks, name).__module__ = callbacks.__name__
    return (Command if run else Composition)(
        args,
        trainer_class=DiffusionTrainer,
        auto_configure_optimizers=False,
        save_config_callback=None,
        parser_kwargs={name: dict(QUIET) for name in Command.subcommands()} | QUIET,
        trainer_defaults={
            "num_sanity_val_steps": 0,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
        },
    )


def run(args: list[str] | None) -> None:
    """Run one command; a user's error ends it with one line and status 1."""
    quiet_lightning()
    sys.excepthook = show_no_secrets
    try:
        command = compose(args)
    except argparse.ArgumentError as error:
        sys.exit(f"error: {redacted(explain(str(error), CLASSES))}")
    except (UserError, MisconfigurationException, ProcessRaisedException) as error:
        # From another process the message is a traceback with the reason last.
        reason, ours = str(error).strip().splitlines()[-1], "w2s_train.errors.UserError: "
        if isinstance(error, ProcessRaisedException) and not reason.startswith(ours):
            raise
        sys.exit(f"error: {redacted(reason.removeprefix(ours))}")
    except ProcessExitedException as error:  # a forked one
        rank, status = error.error_index, error.exit_code
        print(
            f"stopped: rank {rank} (pid {error.error_pid}) ended with status {status}",
            file=sys.stderr,
        )
        sys.exit(status if status > 0 else PEER_LOST)
    except OSError as error:
        if error.errno not in OF_THE_DISK:
            raise
        sys.exit(f"error: {one_line(error)}")
    except Stopped as stop:
        print(f"stopped: {stop}", file=sys.stderr)
        sys.exit(stop.status)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except SystemExit as end:  # the trainer makes 1 of a second Ctrl-C
        sys.exit(INTERRUPTED if isinstance(end.__context__, KeyboardInterrupt) else end.code)
    if command.stop.status:
        sys.exit(command.stop.status)
