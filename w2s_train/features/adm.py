"""FID as the evaluator of ADM computes it (Dhariwal & Nichol, 2021)."""

import functools
import importlib.util
import pickle
from pathlib import Path

import torch
from torch import Tensor
from torch.hub import download_url_to_file
from torch.nn import functional as F

from w2s_train.errors import UserError
from w2s_train.features.base import FeatureExtractor, digest, fetched
from w2s_train.files import expanded


class ADMFeatures(FeatureExtractor):
    """The Inception-v3 of TensorFlow, ported by torch-fidelity, with TensorFlow 1's resize inside.

    The evaluator feeds uint8 images of their own size to the 2015-12-05 graph, which resizes them
    to 299x299 bilinearly without anti-aliasing and with TensorFlow 1's pixel centers. Papers on
    ImageNet report FID-50k of this protocol; it is not clean-fid's, hence the other name. Needs
    ``pip install -e ".[adm]"``.

    Args:
        folder: Where the weights are kept (96 MB); downloaded there on first use.
        weights: Those weights as a state dict, wherever the file lies; nothing is downloaded then.
    """

    metric = "fid_adm"
    protocol_images = 50_000
    has_probabilities = True

    def __init__(self, folder: str = "~/.cache/w2s_train", weights: str | None = None) -> None:
        super().__init__(weights)
        self.folder = expanded("folder", folder)

    def check_files(self) -> None:
        if importlib.util.find_spec("torch_fidelity") is None:
            raise UserError("features=ADMFeatures: needs `pip install -e '.[adm]'`")
        super().check_files()

    def load(self) -> None:
        self.check_files()
        from torch_fidelity import feature_extractor_inceptionv3 as ported

        url = ported.URL_INCEPTION_V3
        name = url.rsplit("/", 1)[1]
        # The name ends with the first digits of the file's sha256.
        checked = functools.partial(
            download_url_to_file, url, hash_prefix=Path(name).stem.rsplit("-", 1)[1], progress=False
        )
        path = self.weights or fetched(
            self.folder / name, lambda folder: checked(dst=str(folder / name))
        )
        try:
            # torch-fidelity would unpickle whatever the file holds: refuse all but tensors first.
            torch.load(path, map_location="cpu", weights_only=True)
            self.network = ported.FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)
            )
        except (RuntimeError, TypeError, pickle.UnpicklingError) as error:
            raise UserError(f"weights={path}: must be the state dict of {name}") from error
        self.digest = digest(path)
        self.num_features = 2048

    def describe(self) -> str:
        return f"ADM evaluator by torch-fidelity, sha256:{self.digest}, resize TF1 bilinear 299"

    def features(self, images: Tensor) -> Tensor:
        return self.network(images.expand(-1, 3, -1, -1).contiguous())[0]

    def probabilities(self, features: Tensor) -> Tensor:
        """Softmax of the logits without bias, (B, 2048) to (B, 1008).

        ADM's evaluator multiplies pooled features by the matrix of the graph's
        ``softmax/logits/MatMul`` and adds nothing; torch-fidelity names it "logits_unbiased".
        """
        return F.linear(features, self.network.fc.weight).softmax(1)
