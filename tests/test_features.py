"""Feature extractors against the libraries whose protocols they follow, offline."""

import itertools
import math
import tarfile
import urllib.error
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from cleanfid.fid import get_folder_features
from cleanfid.inception_torchscript import InceptionV3W
from cleanfid.resize import build_resizer
from conftest import images, loaded, shared
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision.models import inception_v3

import w2s_train.features.base
import w2s_train.features.dinov2
import w2s_train.features.inception
import w2s_train.features.of_timm
from w2s_train.features import (
    ADMFeatures,
    CIFAR10Classifier,
    ClassifierFeatures,
    ConvClassifier,
    DINOv2Features,
    FeatureExtractor,
    InceptionFeatures,
    TimmFeatures,
)
from w2s_train.features.base import fetched
from w2s_train.files import sha256_of
from w2s_train.metrics import ImageNetAgreement
from w2s_train.shards.decode import decode_image

SMALL_VIT = "vit_tiny_patch16_224"  # 224 pixels, like the protocol: no positions to resample


def calibrated(network: nn.Module, size: int = 299) -> nn.Module:
    """Batch norms that know their input, so that random layers pass on more than a constant."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    x = nn.functional.interpolate(torch.randn(4, 3, 40, 40), (size, size), mode="bicubic")
    with torch.no_grad():
        network.train()(x)
    return network.eval()


class Inception(nn.Module):
    """As NVIDIA's file is used: ``layers`` up to the last pooling, and the linear ``output``."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers
        self.output = nn.Linear(2048, 1008)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(self.layers(x))


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Torchvision's Inception-v3 with random weights, as TorchScript."""
    torch.manual_seed(0)
    options = dict(aux_logits=False, transform_input=False, init_weights=False)
    network = inception_v3(weights=None, **options)
    network.fc = nn.Identity()
    layers = torch.jit.trace(calibrated(network), torch.randn(1, 3, 299, 299))
    path = tmp_path_factory.mktemp("inception") / "inception-2015-12-05.pt"
    torch.jit.script(Inception(layers)).save(path)
    return path


@pytest.fixture(scope="session")
def adm_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """torch-fidelity's Inception-v3 with random weights, as a state dict."""
    reason = "torch-fidelity is not installed: pip install -e '.[adm]'"
    ported = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", reason=reason)
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:  # its constructor always loads weights
        patch.setattr(ported, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(nn.Module, "load_state_dict", lambda *_, **__: None)
        network = ported.FeatureExtractorInceptionV3("random", ["2048"])
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    network.train()(images(4, size=40))
    path = tmp_path_factory.mktemp("adm") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def vit_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vit") / "vit.safetensors"
    save_file(timm.create_model(SMALL_VIT, num_classes=0).state_dict(), path)
    return path


def random_weights(model: str, folder: Path) -> str:
    """A file of random weights of a model of timm that see the image."""
    torch.manual_seed(0)
    network = calibrated(timm.create_model(model), 160)
    save_file(network.state_dict(), folder / f"{model}.safetensors")
    return str(folder / f"{model}.safetensors")


def publish(path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let a file pass for the published Inception."""
    monkeypatch.setattr(w2s_train.features.inception, "SHA256", sha256_of(path))
    return str(path)


@pytest.fixture
def extractor(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> FeatureExtractor:
    """One extractor by name, with weights; it takes RGB images."""
    if request.param == "inception":
        path = publish(request.getfixturevalue("inception_file"), monkeypatch)
        return loaded(InceptionFeatures(weights=path))
    if request.param == "adm":
        return loaded(ADMFeatures(weights=str(request.getfixturevalue("adm_file"))))
    if request.param == "dinov2":
        weights = str(request.getfixturevalue("vit_file"))
        return loaded(DINOv2Features(model=SMALL_VIT, weights=weights))
    if request.param in TIMM:
        return loaded(TimmFeatures(request.param, random_weights(request.param, tmp_path), 64))
    network = {"conv": ConvClassifier([3, 8], [1], 4), "cifar10": CIFAR10Classifier()}[
        request.param
    ]
    network.write(tmp_path / "c.safetensors")
    return loaded(ClassifierFeatures(str(tmp_path / "c.safetensors"), network, "toys"))


TIMM = ["test_efficientnet", "test_vit", "test_convnext2"]
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("inception", "adm")]


@pytest.mark.parametrize("extractor", ["conv", "cifar10", "dinov2", *TIMM, *SLOW], indirect=True)
def test_features_depend_on_the_image_alone(extractor, monkeypatch):
    """Bitwise, whatever the batch, and wherever in it; some processors round gates by row."""
    gates = any(type(module).__name__ == "SqueezeExcite" for module in extractor.modules())
    bounds = {"rtol": 1e-6, "atol": 1e-6} if gates else {"rtol": 0, "atol": 0}
    monkeypatch.setattr(w2s_train.features.base, "BLOCK", 2)
    x = images(3)
    whole = extractor(x)
    assert whole.shape == (3, extractor.num_features)
    assert whole.dtype == torch.float32
    assert whole.std(0).max() > 1e-3  # these weights see the images
    torch.testing.assert_close(torch.cat([extractor(part) for part in x.split(1)]), whole, **bounds)
    torch.testing.assert_close(extractor(x[[2, 0, 1]]), whole[[2, 0, 1]], **bounds)


@pytest.mark.parametrize(
    "extractor", ["conv", "cifar10", "dinov2", "test_efficientnet"], indirect=True
)
def test_tokens_are_of_the_parts_of_an_image(extractor):
    """Of a square grid, row by row, as wide as the features."""
    x = images(2)
    tokens = extractor.tokens(x)
    n = round(tokens.shape[1] ** 0.5)
    assert tokens.shape == (2, n * n, extractor.num_features) and n > 1
    corner = x.clone()
    side = x.shape[-1] // n or 1
    corner[..., -side:, :side] = 255 - corner[..., -side:, :side]  # the lower left one
    moved = (extractor.tokens(corner) - tokens).square().sum(-1).mean(0).view(n, n)
    assert moved[-1, 0] > 2 * moved[0, -1]
    if isinstance(extractor, DINOv2Features):
        pixels = extractor._pixels(x)
        timms = extractor.network.forward_features(pixels)
        torch.testing.assert_close(tokens, timms[:, extractor.network.num_prefix_tokens :])
        torch.testing.assert_close(extractor.features(x), timms[:, 0])
    else:
        torch.testing.assert_close(extractor.features(x), tokens.mean(1))


@pytest.mark.parametrize("extractor", ["conv", "dinov2", *TIMM, *SLOW], indirect=True)
def test_class_probabilities(extractor, monkeypatch):
    monkeypatch.setattr(w2s_train.features.base, "BLOCK", 2)
    features = extractor(images(2, size=40))
    if not extractor.has_probabilities:
        with pytest.raises(ValueError, match="inception_score: .* DINOv2Features has none"):
            extractor.probabilities(features)
        return
    p = extractor.probabilities(features)
    torch.testing.assert_close(p.sum(1), torch.ones(2))
    assert (p > 0).all()
    assert not p.requires_grad


@pytest.mark.slow
def test_inception_is_clean_fids(inception_file: Path, tmp_path: Path, monkeypatch):
    """The same PNG files through clean-fid's own pipeline."""
    monkeypatch.setattr(w2s_train.features.base, "BLOCK", 3)
    x = images(3, size=40)
    for i, image in enumerate(x):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    model = InceptionV3W(str(inception_file.parent), download=False)
    device = torch.device("cpu")
    theirs = get_folder_features(str(tmp_path), model, num_workers=0, device=device, verbose=False)
    extractor = loaded(InceptionFeatures(weights=publish(inception_file, monkeypatch)))
    ours = extractor(x)
    assert np.linalg.norm(ours.numpy() - theirs) <= 1e-5 * np.linalg.norm(theirs)
    # One row of the softmax by hand: weights of the output layer, no bias.
    logits = theirs[0].astype(np.float64) @ model.base.output.weight.detach().double().numpy().T
    expected = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(extractor.probabilities(ours)[0], expected, rtol=1e-3)
    grey = extractor(x[:, :1])
    assert torch.equal(grey, extractor(x[:, :1].expand(-1, 3, -1, -1)))
    assert (extractor.metric, extractor.num_features) == ("fid", 2048)


class Layers(nn.Module):
    """As much of the TorchScript Inception as clean-fid calls: means of 2,048 places."""

    def forward(self, x):
        return x.flatten(1)[:, :2048]


class FakeInception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = Layers()

    def forward(self, x):
        return self.layers(x)


@pytest.mark.slow
def test_inception_sees_what_clean_fid_shows_it(tmp_path: Path, monkeypatch):
    """The real loading and resizing code around a stand-in for the 91 MB network."""
    torch.jit.script(FakeInception()).save(str(tmp_path / "inception-2015-12-05.pt"))
    publish(tmp_path / "inception-2015-12-05.pt", monkeypatch)
    extractor = InceptionFeatures(folder=str(tmp_path))
    extractor.load()
    x = images(3)
    ours = extractor(x)
    for image, feature in zip(x, ours, strict=True):
        resized = build_resizer("clean")(image.permute(1, 2, 0).numpy())
        expected = (torch.from_numpy(resized).permute(2, 0, 1).flatten()[:2048] - 128) / 128
        torch.testing.assert_close(feature, expected)
    grey = extractor(x[:, :1])
    torch.testing.assert_close(grey, extractor(x[:, :1].expand(-1, 3, -1, -1)))
    assert extractor.metric == "fid"


@pytest.mark.slow
def test_adm_is_torch_fidelitys(adm_file: Path, monkeypatch):
    ported = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    monkeypatch.setattr(w2s_train.features.base, "BLOCK", 2)
    x = images(2, size=40)
    layers = ["2048", "logits_unbiased"]
    network = ported.FeatureExtractorInceptionV3("theirs", layers, str(adm_file))
    theirs, logits = network(x)
    extractor = loaded(ADMFeatures(weights=str(adm_file)))
    torch.testing.assert_close(extractor(x), theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(extractor.probabilities(theirs), logits.softmax(1))
    assert torch.equal(extractor(x[:, :1]), extractor(x[:, :1].expand(-1, 3, -1, -1)))
    assert (extractor.metric, extractor.num_features) == ("fid_adm", 2048)


def test_adm_needs_its_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs `pip install -e '.\[adm\]'`"):
        ADMFeatures().check_files()


def test_adm_unpickles_tensors_only(tmp_path: Path):
    pytest.importorskip("torch_fidelity", reason="torch-fidelity is not installed")
    torch.save({"fc.weight": SimpleNamespace()}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="must be the state dict of weights-inception"):
        ADMFeatures(weights=str(tmp_path / "w.pth")).load()


def test_dinov2_is_timms(vit_file: Path, monkeypatch):
    """At the network's size, where nothing is resized, against timm and its own normalization."""
    monkeypatch.setattr(w2s_train.features.base, "BLOCK", 2)
    network = timm.create_model(SMALL_VIT, num_classes=0, checkpoint_path=str(vit_file)).eval()
    x = images(2, size=224)
    normalized_x = (x / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(3, 1, 1)
    extractor = loaded(DINOv2Features(SMALL_VIT, str(vit_file)))
    with torch.no_grad():
        class_token = network.forward_features(normalized_x)[:, 0]
    torch.testing.assert_close(extractor(x), class_token, rtol=1e-4, atol=1e-5)
    assert extractor.metric == "fd_dinov2"
    assert SMALL_VIT in extractor.describe()


@pytest.mark.parametrize("model", TIMM)
def test_timm_features_are_timms(model: str, tmp_path: Path):
    """Its own transform on PIL's images of its size, its own pooled features and logits."""
    weights = random_weights(model, tmp_path)
    network = timm.create_model(model, checkpoint_path=weights).eval()
    extractor = loaded(TimmFeatures(model, weights))
    x = images(2, size=160)
    known = timm.data.resolve_data_config({}, model=network) | {"crop_pct": 1.0}
    transform = timm.data.create_transform(**known)
    theirs = torch.stack(
        [transform(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in x]
    )
    with torch.no_grad():
        pooled = network.forward_head(network.forward_features(theirs), pre_logits=True)
        logits = network(theirs)
    ours = extractor(x)
    torch.testing.assert_close(ours, pooled, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(extractor.probabilities(pooled), logits.softmax(1))
    assert extractor.num_features == pooled.shape[1]
    assert extractor.metric == f"fd_{model}_160"
    about = extractor.describe()
    assert model in about and "bicubic 160" in about and str(known["mean"]) in about
    grey = x[:, :1]
    assert torch.equal(extractor(grey), extractor(grey.expand(-1, 3, -1, -1)))


def test_timm_features_know_size_and_normalization(tmp_path: Path):
    """Both change features, name and fingerprint; wrong ones are refused."""
    weights = random_weights("test_efficientnet", tmp_path)
    plain = loaded(TimmFeatures("test_efficientnet", weights, 64))
    other = loaded(TimmFeatures("test_efficientnet", weights, 96))
    brighter = loaded(TimmFeatures("test_efficientnet", weights, 64, "own", [0.2] * 3, [0.5] * 3))
    assert [e.metric for e in (plain, other, brighter)] == [
        "fd_test_efficientnet_64",
        "fd_test_efficientnet_96",
        "fd_own",
    ]
    assert len({e.describe() for e in (plain, other, brighter)}) == 3
    x = images(1)
    assert not torch.allclose(plain(x), brighter(x), rtol=1e-2)
    with pytest.raises(ValueError, match="must be three numbers each"):
        TimmFeatures("test_vit", mean=[0.5])
    with pytest.raises(ValueError, match="must be three numbers each"):
        TimmFeatures("test_vit", std=[0.0, 0.1, 0.1])
    for wrong in ({"mean": [123.7, 116.3, 103.5]}, {"std": [math.inf] * 3}):
        with pytest.raises(ValueError, match="must be three numbers each, of values in"):
            TimmFeatures("test_vit", **wrong)
    for wrong in ("fid", "", "a b", "a/b"):
        with pytest.raises(ValueError, match=f"name={wrong}: must be of a-z, 0-9 and _"):
            TimmFeatures("test_vit", name=wrong)
    with pytest.raises(ValueError, match="size=0"):
        TimmFeatures("test_vit", size=0)
    with pytest.raises(ValueError, match="model=none: must be a model of timm"):
        TimmFeatures("none")
    for wrong in ([], [1.0, 1.0]):
        with pytest.raises(ValueError, match="must be three numbers each"):
            TimmFeatures("test_vit", std=wrong)
    with pytest.raises(ValueError, match="model=test_vit.nosuch: must be a model of timm"):
        TimmFeatures("test_vit.nosuch")
    with pytest.raises(ValueError, match="must be weights of test_vit"):
        TimmFeatures("test_vit", weights).load()


def test_a_classifier_of_other_classes(tmp_path: Path):
    """By the number that its last layer has; damaged weights are no classifier."""
    torch.manual_seed(0)
    network = timm.create_model("test_efficientnet", num_classes=7)
    weights = str(tmp_path / "seven.safetensors")
    save_file(network.state_dict(), weights)
    seven = loaded(TimmFeatures("test_efficientnet", weights, num_classes=7))
    x = images(2)
    with torch.no_grad():
        theirs = network.eval()(seven._pixels(x)).softmax(1)
    torch.testing.assert_close(seven.probabilities(seven(x)), theirs)
    with pytest.raises(ValueError, match="must be weights of test_efficientnet"):
        TimmFeatures("test_efficientnet", weights).load()
    with pytest.raises(ValueError, match="num_classes=0"):
        TimmFeatures("test_efficientnet", weights, num_classes=0)
    with pytest.raises(ValueError, match="num_classes=7: must be null unless weights are given"):
        TimmFeatures("test_efficientnet", num_classes=7)
    network.conv_stem.weight.data.fill_(math.nan)
    save_file(network.state_dict(), weights)
    with pytest.raises(ValueError, match="must give finite features"):
        TimmFeatures("test_efficientnet", weights, num_classes=7).load()


@pytest.mark.parametrize(
    "model, size, message",
    [
        ("resmlp_12_224", 64, "model=resmlp_12_224, size=64: must be a network of timm that takes"),
        ("vit_tiny_patch16_224", 8, "size=8: must be a network of timm that takes"),
    ],
)
def test_sizes_that_a_network_cannot_see(model: str, size: int, message: str, tmp_path: Path):
    weights = str(tmp_path / "w.safetensors")
    save_file(timm.create_model(model).state_dict(), weights)
    with pytest.raises(ValueError, match=message):
        TimmFeatures(model, weights, size).load()


def test_a_network_without_a_linear_last_layer_has_no_classes(tmp_path: Path):
    """A convolution as the last layer; not after a second load either."""
    weights = str(tmp_path / "w.safetensors")
    save_file(timm.create_model("dla46_c").state_dict(), weights)
    extractor = TimmFeatures("dla46_c", weights, 32)
    for _ in range(2):
        extractor.load()
        assert not extractor.has_probabilities
    with pytest.raises(ValueError, match="inception_score: needs an extractor with class prob"):
        extractor.probabilities(torch.zeros(1, extractor.num_features))


def test_a_network_that_adds_to_its_last_layer_has_no_classes(tmp_path: Path, monkeypatch):
    """As VOLO does, which looks at its tokens once more: that layer alone gives other classes."""
    from timm.models.vision_transformer import VisionTransformer

    weights, real = random_weights("test_vit", tmp_path), VisionTransformer.forward
    assert loaded(TimmFeatures("test_vit", weights)).has_probabilities
    monkeypatch.setattr(VisionTransformer, "forward", lambda self, x: real(self, x) + x.std())
    assert not loaded(TimmFeatures("test_vit", weights)).has_probabilities


@pytest.mark.slow
def test_the_published_judge_of_imagenet():
    """The file that data/README.md names, on known images: accuracy of chance would be 0.005."""
    weights = shared("features/imagenet_efficientnet_lite0.safetensors")
    classes = shared("data/tiny_imagenet/classes.txt")
    with tarfile.open(shared("data/tiny_imagenet/val-000000.tar.gz")) as tar:
        files = {m.name: tar.extractfile(m).read() for m in itertools.islice(tar, 400)}
    names = sorted(name for name in files if name.endswith(".jpg"))[:150]
    x = torch.stack([decode_image(files[name]) for name in names])
    asked = torch.tensor([int(files[name.replace(".jpg", ".cls")]) for name in names])
    judge = loaded(TimmFeatures("tf_efficientnet_lite0", str(weights), 128))
    metric = ImageNetAgreement(str(classes))
    metric.check_classes(200, judge)
    assert 0.2 < metric.compute(judge(x), torch.zeros(0), judge, asked)["agreement"] < 0.45


@pytest.mark.parametrize("size", [32, 256, 300])
def test_resize_is_pils(size: int):
    """Rounded values differ by one level at most, and rarely."""
    x = images(1, size=size)
    pil = Image.fromarray(x[0].permute(1, 2, 0).numpy()).resize((224, 224), Image.BICUBIC)
    ours = w2s_train.features.of_timm.resize_bicubic(x, 224)[0].permute(1, 2, 0).numpy()
    difference = np.abs(ours - np.asarray(pil, dtype=np.float32))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


def test_positions_are_resampled_as_by_dinov2():
    """From 37x37 to 16x16 by two matrices of Keys' cubic kernel, a = -0.75, at scale 16.1 / 37."""

    def kernel(s: np.ndarray) -> np.ndarray:
        s = np.abs(s)
        near = 1.25 * s**3 - 2.25 * s**2 + 1
        far = -0.75 * (s**3 - 5 * s**2 + 8 * s - 4)
        return np.where(s <= 1, near, np.where(s < 2, far, 0))

    matrix = np.zeros((16, 37))
    for j in range(16):
        source = (j + 0.5) * 37 / 16.1 - 0.5
        for i in range(int(np.floor(source)) - 1, int(np.floor(source)) + 3):
            matrix[j, np.clip(i, 0, 36)] += kernel(np.array(source - i))
    grid = torch.randn(1, 37 * 37, 5)
    ours = w2s_train.features.dinov2.resample_positions(grid, 16)
    square = grid[0].double().numpy().reshape(37, 37, 5)
    expected = np.einsum("ai,bj,ijd->abd", matrix, matrix, square).reshape(256, 5)
    np.testing.assert_allclose(ours[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_dinov2_resamples_its_positions(tmp_path: Path):
    """A network of 518 pixels serves images of 224."""
    model = "vit_small_patch14_dinov2.lvd142m"
    network = timm.create_model(model, num_classes=0)
    save_file(network.state_dict(), tmp_path / "vit.safetensors")
    extractor = loaded(DINOv2Features(model, str(tmp_path / "vit.safetensors")))
    assert extractor.network.pos_embed.shape == (1, 1 + 16**2, 384)
    assert torch.equal(extractor.network.pos_embed[:, :1], network.pos_embed[:, :1])
    assert extractor.features(images(1)).shape == (1, 384)


def test_files_of_another_form(tmp_path: Path, monkeypatch):
    path = tmp_path / "weights.pth"
    path.write_bytes(b"no weights")
    with pytest.raises(ValueError, match="must be a safetensors file"):
        ClassifierFeatures(str(path)).load()
    with pytest.raises(ValueError, match="must be the published file, sha256 f58cb9b6ec32"):
        InceptionFeatures(weights=str(path)).load()
    for build in (InceptionFeatures, ADMFeatures, DINOv2Features):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
        with pytest.raises(ValueError, match="weights=.*: must be an existing file"):
            build(weights=str(tmp_path / "none")).check_files()
    with pytest.raises(ValueError, match="must be a .safetensors file"):
        DINOv2Features(SMALL_VIT, str(path)).load()
    path.rename(path.with_suffix(".safetensors"))
    with pytest.raises(ValueError, match=f"must be weights of {SMALL_VIT}"):
        DINOv2Features(SMALL_VIT, str(path.with_suffix(".safetensors"))).load()
    with pytest.raises(ValueError, match="model=resnet18: must be a vision transformer"):
        save_file(
            timm.create_model("resnet18", num_classes=0).state_dict(), tmp_path / "r.safetensors"
        )
        DINOv2Features("resnet18", str(tmp_path / "r.safetensors")).load()
    with pytest.raises(ValueError, match="model=none: must be a model of timm"):
        DINOv2Features("none")


def test_a_download_is_whole_or_not_there(tmp_path: Path, monkeypatch):
    target = tmp_path / "cache" / "weights"

    def broken(folder: Path) -> None:
        (folder / "weights").write_text("half")
        raise urllib.error.URLError("no network")

    with pytest.raises(ValueError, match="weights=None: must be a local weights .*no network"):
        fetched(target, broken)
    assert not target.exists()
    assert fetched(target, lambda folder: (folder / "weights").write_text("all")) == target
    assert fetched(target, broken).read_text() == "all"
    module = w2s_train.features.inception
    monkeypatch.setattr(module, "check_download_inception", lambda folder: broken(Path(folder)))
    with pytest.raises(ValueError, match="must be a local inception-2015-12-05.pt"):
        InceptionFeatures(str(tmp_path)).load()
