"""The networks that can be trained, by name."""

from powergrad.models.resnet import NORMS, ModelDescription, Norm, build_model, describe_models, model_names

__all__ = ["NORMS", "ModelDescription", "Norm", "build_model", "describe_models", "model_names"]
