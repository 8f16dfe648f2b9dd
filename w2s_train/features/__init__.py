"""Feature extractors for Fréchet distances; one protocol a file.

`InceptionFeatures` makes the distance the FID of clean-fid, `ADMFeatures` that of ADM's evaluator,
`DINOv2Features` the one of Stein et al.; `TimmFeatures` takes any network of timm. Where nothing
can be downloaded, a small classifier trained on the data set itself serves: its distances are *not*
FID and are named differently (`FeatureExtractor.metric`).
"""

from w2s_train.features.adm import ADMFeatures
from w2s_train.features.base import BLOCK, KEEP, FeatureExtractor, fingerprint, shape_name
from w2s_train.features.classifiers import (
    CIFAR10Classifier,
    Classifier,
    ClassifierFeatures,
    ConvClassifier,
    mnist_classifier,
)
from w2s_train.features.dinov2 import DINOv2Features
from w2s_train.features.inception import InceptionFeatures
from w2s_train.features.of_timm import TimmFeatures, imagenet_ids
from w2s_train.features.training import Regularization, train_classifier

__all__ = [
    "BLOCK",
    "KEEP",
    "ADMFeatures",
    "CIFAR10Classifier",
    "Classifier",
    "ClassifierFeatures",
    "ConvClassifier",
    "DINOv2Features",
    "FeatureExtractor",
    "fingerprint",
    "shape_name",
    "InceptionFeatures",
    "Regularization",
    "TimmFeatures",
    "imagenet_ids",
    "mnist_classifier",
    "train_classifier",
]
