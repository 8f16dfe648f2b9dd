"""What may differ from the start before, or from the checkpoint, where a fit goes on."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from w2s_train.errors import UserError
from w2s_train.loading import same_class

# Keys, or beginnings of keys; the longest that fits a key counts. Others apply, with a word.
REFUSED = """
    seed_everything data.seed data.num_classes data.shuffle
    model.network model.autoencoder model.objective.class_path
    model.objective.init_args.interpolant
    model.optimizer.class_path model.optimizer.init_args.amsgrad model.optimizer.init_args.centered
    model.optimizer.init_args.adamw
""".split()
FREE = """
    trainer.accelerator trainer.strategy trainer.devices trainer.num_nodes trainer.plugins
    trainer.logger trainer.callbacks trainer.max_time trainer.val_check_interval
    trainer.check_val_every_n_epoch trainer.limit_val_batches trainer.limit_test_batches
    trainer.limit_predict_batches trainer.num_sanity_val_steps trainer.log_every_n_steps
    trainer.enable_checkpointing trainer.enable_progress_bar trainer.enable_model_summary
    trainer.enable_autolog_hparams trainer.inference_mode trainer.use_distributed_sampler
    trainer.profiler trainer.detect_anomaly trainer.default_root_dir checkpoint watch
    data.train_urls data.dataset data.prepare data.images data.made_by data.num_workers
    data.in_memory data.cache data.cache_gigabytes data.allow_pipe data.num_generated
    data.generation_batch_size data.sampling_seeds data.first_seed
    data.labels_as_in_training data.batch_timeout_minutes data.held_out_urls
    model.network.init_args.gradient_checkpointing model.network.init_args.path
    model.autoencoder.init_args.path model.autoencoder.init_args.decode_batch model.sampler
    model.guidance model.scored_weights model.generation_block model.compile
    model.optimizer.init_args.fused model.optimizer.init_args.foreach
    ckpt_path start_from weights_only config
""".split()
# Where weights of the network, its averages and weak sources come from.
WEIGHTS = ("model.network", "model.objective", "model.ema_decay")
SEGMENTS = "model.objective.init_args.segments"
SHOWN = 80  # characters of a value


class Change(NamedTuple):
    """A key whose value is another; a part of a config where one side has none."""

    key: str
    before: Any
    now: Any

    def refusal(self, where: str) -> UserError:
        """That it must not be another one than in ``where``."""
        before, now = _short(self.before), _short(self.now)
        return UserError(f"{self.key}={now}: must be {before}, as in {where}")


def changes(before: Any, now: Any, key: str = "") -> Iterator[Change]:
    """Where two configs of plain values differ, each at the highest key that says it.

    A key that one of them lacks is of another version of this package, and says nothing.
    """
    if isinstance(before, dict) and isinstance(now, dict):
        names = [name for name in now if name in before and name != "class_path"]
        if not same_class(before.get("class_path"), now.get("class_path")):
            names = ["class_path"]  # arguments of another class say nothing
        for name in names:
            path = f"{key}.{name}" if key else name
            yield from changes(before.get(name), now.get(name), path)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for i, (theirs, ours) in enumerate(zip(before, now, strict=True)):
            yield from changes(theirs, ours, f"{key}[{i}]")
    elif before != now:
        yield Change(key, before, now)


def verdict(key: str) -> str:
    """What becomes of a key that differs: it is "refused", "free" or "applied"."""
    fits = [
        (len(known), word)
        for word, keys in (("refused", REFUSED), ("free", FREE))
        for known in keys
        if key == known or key.startswith((f"{known}.", f"{known}["))
    ]
    return max(fits, default=(0, "applied"))[1]


def check(before: Any, now: Any, where: str, *, own: bool) -> str:
    """Refuse what would be another run, or another network.

    Args:
        before: The config before, plain values; or the part of it that is known.
        now: The config, with the same parts.
        where: What ``before`` is of.
        own: The run goes on in its folder; else a checkpoint begins another, and only network and
            optimizer must fit.

    Returns:
        What else differs, to be said; empty if nothing does.

    Raises:
        UserError: A key that must not differ does.
    """
    applied = []
    for change in changes(before, now):
        word = verdict(change.key)
        if change.key == "model.ema_decay" and _number(change.before) != _number(change.now):
            raise change.refusal(where)  # there are no weights for another number of averages
        if word == "refused" and (own or change.key.startswith(("model.network", "model.opt"))):
            raise change.refusal(where)
        if word != "free":
            applied.append(f"{change.key} {_short(change.before)} -> {_short(change.now)}")
    return "; ".join(applied)


def misfit(before: Any, now: Any, where: str) -> UserError | None:
    """The first key that weights of ``where`` cannot be loaded for; None if no key differs."""
    for change in changes(before, now):
        if change.key.startswith(WEIGHTS) and verdict(change.key) != "free":
            return change.refusal(where)
    return None


def check_drawn(before: Any, now: Any, where: str) -> None:
    """Refuse other scales as inputs than the network was trained with, where guidance is chosen.

    Args:
        before: Settings of a module, as its checkpoint has them.
        now: Those of the config.
        where: The checkpoint.

    Raises:
        UserError: A segment draws by another law, or in another range.
    """
    theirs = drawn(before)
    for name, (place, found) in drawn(now).items():
        trained = theirs.get(name, (0, found))[1]
        for change in changes(trained, found, f"{SEGMENTS}[{place}].init_args"):
            raise change.refusal(where)


def drawn(model: Any) -> dict[str, tuple[int, dict[str, Any]]]:
    """Place, law and range of each segment that draws its scale, by its name."""
    found = {}
    segments = model.get("objective", {}).get("init_args", {}).get("segments") or []
    for place, segment in enumerate(segments):
        given = segment.get("init_args", {})
        if isinstance(given.get("scale"), dict):
            law = {key: given[key] for key in ("low", "high", "scale") if key in given}
            found[str(given.get("name") or place)] = (place, law)
    return found


def _number(decays: Any) -> int:
    return len(decays) if isinstance(decays, list) else 1


def _short(value: Any) -> str:
    if isinstance(value, dict) and "class_path" in value:
        classes = [value["class_path"]]  # and those of its parts, such as a segment's weak source
        parts = [each for each in (value.get("init_args") or {}).values() if isinstance(each, dict)]
        classes += [part["class_path"] for part in parts if "class_path" in part]
        names = [each.rpartition(".")[2] for each in classes]
        value = f"{names[0]}({', '.join(names[1:])})" if names[1:] else classes[0]
    elif isinstance(value, list):
        value = f"[{', '.join(_short(each) for each in value)}]"
    elif value is None:
        value = "null"
    text = " ".join(str(value).split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
