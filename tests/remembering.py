"""A logger of one's own, as services have them: it keeps what it is given."""

from typing import Any, ClassVar

from lightning.pytorch.loggers.logger import Logger


class Remembering(Logger):
    made: ClassVar[list["Remembering"]] = []

    def __init__(
        self,
        save_dir: str = ".",
        id: str | None = None,
        api_key: str = "",
        resume: str | None = None,
    ) -> None:
        super().__init__()
        self.folder, self.given, self.id, self.resume = save_dir, id, id, resume
        self.configs: list[dict[str, Any]] = []
        self.metrics: list[tuple[int, dict[str, float]]] = []
        self.images: list[tuple[int, str, tuple[int, int]]] = []
        self.made.append(self)

    @property
    def experiment(self) -> str:
        """The run, which begins when it is asked for, as W&B's."""
        self.id = self.id or f"run{len(self.made)}"
        return self.id

    @property
    def name(self) -> str:
        return "remembering"

    @property
    def version(self) -> str | None:
        return self.id

    def log_hyperparams(self, params: dict[str, Any]) -> None:
        self.configs.append(params)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics.append((step, metrics))

    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        (image,) = images
        self.images.append((step, key, image.size))


class Refusing(Remembering):
    """Its service is not there, and takes no config."""

    @property
    def experiment(self) -> str:
        raise ConnectionError("no way to example.org?token=abc")

    def log_hyperparams(self, params: dict[str, Any]) -> None:
        raise KeyError("max_steps")


class Failing(Remembering):
    """Its service is lost after the start."""

    made: ClassVar[list[Remembering]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        raise ConnectionError(f"no way at {step}")

    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        raise ConnectionError("no image")
