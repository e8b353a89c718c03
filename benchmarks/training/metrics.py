"""The paper's metrics, from scikit-learn."""

from dataclasses import dataclass

import numpy as np
from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support

METRICS = {"accuracy": "Accuracy", "precision": "Precision", "recall": "Recall", "macro_f1": "Macro F1"}  # Table 1


@dataclass(frozen=True)
class Metrics:
    """Accuracy, and the unweighted means over classes of precision, recall and F1."""

    accuracy: float
    precision: float
    recall: float
    macro_f1: float
    per_class_f1: list[float]
    confusion: list[list[int]]  # rows: true class, columns: predicted class


def measure(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> Metrics:
    """The metrics of predictions (n,); a class that is never predicted has precision and F1 of 0."""
    classes = np.arange(num_classes)
    precision, recall, f1, _ = precision_recall_fscore_support(
        labels, predictions, labels=classes, average=None, zero_division=0
    )
    return Metrics(
        accuracy=float(accuracy_score(labels, predictions)),
        precision=float(precision.mean()),
        recall=float(recall.mean()),
        macro_f1=float(f1.mean()),
        per_class_f1=f1.tolist(),
        confusion=confusion_matrix(labels, predictions, labels=classes).tolist(),
    )
