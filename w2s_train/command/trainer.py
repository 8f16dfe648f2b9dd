"""Lightning's trainer, with the two commands that it does not have."""

import functools
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from lightning import LightningModule
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.trainer.states import TrainerFn

from w2s_train.autoencoder import Vectors
from w2s_train.datamodule import ReferenceImages, ShardDataModule
from w2s_train.errors import UserError, require
from w2s_train.evaluation.fid import FID
from w2s_train.evaluation.images import GridWriter, ImageWriter, NpzWriter, SampleWriter, TarWriter
from w2s_train.evaluation.reference import ReferenceWriter
from w2s_train.features import KEEP
from w2s_train.generation import parse_seeds
from w2s_train.models import offered
from w2s_train.module import DiffusionModule
from w2s_train.posthoc.snapshots import FOLDER
from w2s_train.running.run import Run
from w2s_train.secrets import redacted
from w2s_train.tune.curve import Curve, Widths
from w2s_train.tune.space import Space
from w2s_train.tune.tuning import Budget, Tuning

Format = Literal["png", "grid", "npz", "shards"]
SUFFIXES: dict[Format, str] = {"png": "", "grid": ".png", "npz": ".npz", "shards": ""}


class PassThrough(LightningModule):
    """Predicts what it is given."""

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        """The images themselves."""
        return batch["image"]


class NoSignals(_SignalConnector):
    """Leaves signals alone: Lightning's handlers talk to other processes, or save, inside."""

    def register_signal_handlers(self) -> None:
        """Nothing: the callback that stops a run has its own."""


class DiffusionTrainer(Trainer):
    """Fits, validates, tests, predicts, samples, and makes references."""

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        """Do what the command says."""
        self._signal_connector = NoSignals(self)
        return super()._run(*args, **kwargs)

    tuning: Callable[[], None] | None = None  # what `tune` and `ema` do instead of validating

    def _run_stage(self) -> Any:
        """The same; but a fit first finishes an evaluation that was under way.

        After the last step Lightning would train no more, and call nobody.
        """
        if self.tuning is not None:
            return self.tuning()
        for callback in self.checkpoint_callbacks:
            if isinstance(callback, Run) and self.state.fn == TrainerFn.FITTING:
                callback.finish_evaluation(self, self.lightning_module)
        return super()._run_stage()

    def reference(
        self,
        model: DiffusionModule,
        datamodule: ShardDataModule,
        urls: str | None = None,
        dataset: str | None = None,
        split: str | None = None,
        output: str | None = None,
        keep_features: int = KEEP,
        statistics: str | None = None,
        images: int | None = None,
    ) -> None:
        """Write the statistics of a data set that the FID callbacks of the config compare with.

        Args:
            model: Not used: references are made of stored images.
            datamodule: Names the data set.
            urls: Shards of images; those of training if not given.
            dataset: Name of the data set; if not given, the run's, or the folder of ``urls``.
            split: Name of this part of it; if not given, the first word of the shards' names, or
                "published".
            output: File to write; what the callback reads if not given.
            keep_features: Images whose features are kept one by one, for KID, precision and recall.
            statistics: Take published statistics instead, an ``.npz`` with mu and sigma made by the
                extractor of the callback, as clean-fid's or ADM's.
            images: Number of images that these were made of, if it is known.
        """
        callbacks: list[Any] = self.callbacks  # type: ignore[attr-defined]
        scorers = [callback for callback in callbacks if isinstance(callback, FID)]
        if not scorers or (output and len(scorers) > 1):
            rule = (
                "exactly one FID, for the output" if scorers else "a FID, which needs a reference"
            )
            raise UserError(f"trainer.callbacks: must hold {rule}; these are {len(scorers)}")
        require("keep_features", keep_features, "[0, inf)")
        check_statistics(statistics, urls, images, keep_features)
        source = redacted(urls or datamodule.train_urls)
        name = Path(source).resolve().parent.name if urls else datamodule.dataset
        part = "published" if statistics else Path(source.partition("?")[0]).name.partition("-")[0]
        writers = [
            ReferenceWriter(
                scorer,
                Path(output) if output else scorer.reference_path,
                dataset=dataset or name,
                split=split or part,
                keep=keep_features,
            )
            for scorer in scorers
        ]
        for each in writers:
            each.check()
        if statistics is not None:
            for each in writers if self.is_global_zero else ():
                each.take_over(Path(statistics), images)
            return
        callbacks += writers
        stored = ReferenceImages(urls or datamodule.train_urls, datamodule)
        self.predict(PassThrough(), datamodule=stored, return_predictions=False)

    def sample(
        self,
        model: DiffusionModule,
        datamodule: ShardDataModule,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
        output: str | None = None,
        format: Format = "png",
        seeds: str = "0:64",
        classes: int | list[int] | None = None,
        columns: int = 8,
        scale: int = 1,
    ) -> None:
        """Write images of a checkpoint.

        Args:
            model: The module.
            datamodule: The data module.
            ckpt_path: The checkpoint, or last.
            weights_only: Set by the command.
            output: Folder (png, shards) or file (grid, npz) to write; "samples", with the suffix of
                the format, if not given.
            format: A folder of PNGs, one PNG with a grid, ADM's .npz, or webdataset shards.
            seeds: FIRST:LAST, the last one not included. An image depends on seed and class alone.
            classes: One, or several in turn, such as [3,7]; if not given, all, in turn or as
                ``data.labels_as_in_training`` says.
            columns: Of a grid.
            scale: Of a grid: each pixel becomes a square of this side. NAME=W or NAME=W:LOW-HIGH,
                any number of times, is guidance: scale W, at t in [LOW, HIGH), of a source whose
                scale is an input of the network.
        """
        known = offered(model.network, "sample", "num_classes")
        classes = [classes] if isinstance(classes, int) else classes
        for label in classes or []:
            if not 0 <= label < known:
                raise UserError(f"classes={classes}: must be in [0, {known - 1}]")
        chosen = parse_seeds(seeds)
        datamodule.seeds, datamodule.classes = chosen, classes
        if isinstance(model.autoencoder, Vectors):
            raise UserError("autoencoder=Vectors: must make images; these are points")
        path = Path(output or f"samples{SUFFIXES[format]}")
        writer: SampleWriter
        if format == "grid":
            writer = GridWriter(path, columns, scale)
        else:
            writer = {"png": ImageWriter, "npz": NpzWriter, "shards": TarWriter}[format](path)
        writer.check()
        writer.about = {"seeds": [chosen.start, chosen.stop - 1], "classes": classes}
        self.callbacks.append(writer)  # type: ignore[attr-defined]
        self.predict(
            model,
            datamodule=datamodule,
            ckpt_path=ckpt_path,
            weights_only=weights_only,
            return_predictions=False,
        )
        if self.is_global_zero:
            print(f"written: {len(chosen):,} images to {path}")

    def tune(
        self,
        model: DiffusionModule,
        datamodule: ShardDataModule,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
        guidance: str = "cfg",
        search: list[str] | None = None,
        images: int | None = None,
        minutes: float | None = None,
        sets: int = 3,
        set_images: int | None = None,
        name: str | None = None,
    ) -> None:
        """Find the guidance at sampling that scores best.

        Args:
            model: The module.
            datamodule: The data module.
            ckpt_path: The checkpoint, or last.
            weights_only: Set by the command.
            guidance: An overlay of configs/guidance or configs/inbuilt by its name, a YAML file
                with a model.guidance, or a class path.
            search: NAME=LOW:HIGH or NAME=VALUE,VALUE,... for each argument; if not given, what goes
                with the guidance.
            images: To generate for all candidates together; 40,000 if neither they nor minutes are
                given.
            minutes: For all candidates together, instead of images.
            sets: Of tuning seeds, and of fresh ones, at least 3.
            set_images: Images of a set of tuning seeds; a fortieth of the images, within bounds, if
                not given.
            name: Of the folder in tune/ of the run folder; that of the guidance if not given.
        """
        budget = Budget(images, minutes, sets, set_images)
        averages = any((Path(self.default_root_dir) / FOLDER).glob("*.safetensors"))
        space = Space.of(guidance, search or [], model.objective, averages=averages)
        name = name or Path(guidance).stem.rpartition(".")[2]
        tuning = Tuning(name, space, budget, *self._scoring(datamodule))
        self._instead(tuning, model, datamodule, ckpt_path, weights_only)

    def ema(
        self,
        model: DiffusionModule,
        datamodule: ShardDataModule,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
        std: str = "0.03:0.25",
        points: int = 8,
        images: int | None = None,
        name: str | None = None,
    ) -> None:
        """Score averages of any width, made after training, and keep the best.

        Args:
            model: The module.
            datamodule: The data module.
            ckpt_path: The checkpoint, or last.
            weights_only: Set by the command.
            std: LOW:HIGH of the averages, as parts of the run, or one.
            points: Of the curve, both ends included.
            images: Of a score; as many as the run scores if not given.
            name: Of the folder in ema/ of the run folder; that of the checkpoint if not given.
        """
        curve = Curve(Widths(std, points), images, name, *self._scoring(datamodule))
        self._instead(curve, model, datamodule, ckpt_path, weights_only)

    def _instead(
        self,
        course: Callable[[Trainer, DiffusionModule], None],
        model: DiffusionModule,
        data: ShardDataModule,
        ckpt_path: str | None,
        weights_only: bool | None,
    ) -> None:
        """Validate a checkpoint by a course of its own."""
        self.tuning = functools.partial(course, self, model)
        given: Any = dict(ckpt_path=ckpt_path, weights_only=weights_only, verbose=False)
        self.validate(model, datamodule=data, **given)

    def _scoring(
        self, data: ShardDataModule
    ) -> tuple[FID, ShardDataModule, Callable[[bool], None]]:
        """The callback whose distance is the score, data, and what follows a batch."""
        callbacks: list[Any] = self.callbacks  # type: ignore[attr-defined]
        scorer = next((each for each in callbacks if isinstance(each, FID)), None)
        if scorer is None:
            raise UserError("trainer.callbacks: must hold a FID, whose distance is the score")
        run = next(each for each in callbacks if isinstance(each, Run))
        return scorer, data, functools.partial(run.after_tuned_batch, self)


def check_statistics(
    statistics: str | None, urls: str | None, images: int | None, keep_features: int
) -> None:
    """Refuse options of `DiffusionTrainer.reference` that go with another source of statistics.

    Raises:
        UserError: There is one.
    """
    if statistics is None and images is not None:
        raise UserError(f"images={images}: must come with statistics; images of shards are counted")
    if images is not None:
        require("images", images, "[2, inf)")
    if statistics is not None and urls is not None:
        raise UserError(f"urls={urls}: must be left out where statistics={statistics} are given")
    if statistics is not None and keep_features != KEEP:
        raise UserError(
            f"keep_features={keep_features}: must be left out where statistics={statistics} are "
            "given, which hold no features of single images"
        )


def quiet_lightning() -> None:
    """Drop advertisements and warnings that say nothing about this project."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "💡 Tip" not in record.getMessage()  # of litlogger, and of litmodels
    )
    # Averages are in eval mode while the network trains; the next two are Lightning's own affair.
    # Who started this process is checked by ours; callbacks may differ where a run goes on. The
    # parser gets this process's arguments, less a switch that it does not know.
    for message in (
        "The `srun` command is available",
        ".*Please add the following callbacks",
        ".*in eval mode at the start of training",
        ".*LeafSpec",
        ".*val_dataloader.*",
        "LightningCLI's args parameter",
        "This DataLoader will create .* worker processes",  # `check_room` counts them
    ):
        warnings.filterwarnings("ignore", message)
    warnings.formatwarning = lambda message, category, *_, **__: f"{category.__name__}: {message}\n"
