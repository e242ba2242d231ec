"""Class names and probabilities of images, by a deploy model in any of its formats."""

from repnet.predict.predictor import Prediction, Predictor, Score, Source

__all__ = ["Prediction", "Predictor", "Score", "Source"]
