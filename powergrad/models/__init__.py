"""The networks that can be trained, by name."""

from powergrad.models.catalogue import NORMED, ModelDescription, describe_models, model_names
from powergrad.models.classifier import classifier_of, classifiers_of
from powergrad.models.network import build_model
from powergrad.models.norms import NORMS, Norm
from powergrad.models.weights import Loaded, Preprocessing, PretrainedMissing, load_weights, preprocessing

__all__ = [
    "NORMED",
    "NORMS",
    "Loaded",
    "ModelDescription",
    "Norm",
    "Preprocessing",
    "PretrainedMissing",
    "build_model",
    "classifier_of",
    "classifiers_of",
    "describe_models",
    "load_weights",
    "model_names",
    "preprocessing",
]
