"""FID as clean-fid defines it (Parmar et al., 2022)."""

import numpy as np
import torch
from cleanfid.downloads_helper import check_download_inception
from cleanfid.resize import build_resizer
from torch import Tensor
from torch.nn import functional as F

from w2s_train.errors import UserError
from w2s_train.features.base import FeatureExtractor, digest, fetched
from w2s_train.files import expanded, sha256_of

SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"


class InceptionFeatures(FeatureExtractor):
    """clean-fid's Inception-v3 (the weights of the original FID) after its anti-aliased resize.

    Images are resized to 299x299 by PIL's bicubic filter, one float channel at a time, without
    rounding, and normalized to (x - 128) / 128; features are the 2,048 means of the last pooling.

    Args:
        folder: Where the weights are kept (``inception-2015-12-05.pt``, 91 MB); clean-fid
            downloads them there on first use.
        weights: That file, wherever it lies; nothing is downloaded then.
    """

    metric = "fid"
    protocol_images = 50_000
    has_probabilities = True

    def __init__(self, folder: str = "~/.cache/w2s_train", weights: str | None = None) -> None:
        super().__init__(weights)
        self.folder = expanded("folder", folder)

    def load(self) -> None:
        self.check_files()
        path = self.weights or fetched(
            self.folder / "inception-2015-12-05.pt",
            lambda folder: check_download_inception(str(folder)),
        )
        if sha256_of(path) != SHA256:  # TorchScript is code, and can write files
            raise UserError(f"weights={path}: must be the published file, sha256 {SHA256[:12]}...")
        self.network = torch.jit.load(path, map_location="cpu").eval()
        self.requires_grad_(False)  # of the parameters: TorchScript lacks the method itself
        self.digest = digest(path)
        self.resize = build_resizer("clean")
        self.num_features = 2048

    def describe(self) -> str:
        return f"clean-fid 0.1.35 inception-2015-12-05 sha256:{self.digest}, resize clean 299"

    def features(self, images: Tensor) -> Tensor:
        rgb = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()
        resized = torch.from_numpy(np.stack([self.resize(image) for image in rgb]))
        x = resized.permute(0, 3, 1, 2).to(images.device)
        return self.network.layers((x - 128) / 128).flatten(1)

    def probabilities(self, features: Tensor) -> Tensor:
        """Softmax of W f, (B, 2048) to (B, 1008), with W the weights of the network's output layer.

        Its bias is left out, as in the original score (Salimans et al., 2016, whose code multiplies
        by the matrix alone) and in NVIDIA's metrics for the same file (``no_output_bias=True``).
        """
        return F.linear(features, self.network.output.weight).softmax(1)
