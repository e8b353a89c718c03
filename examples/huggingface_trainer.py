"""Hugging Face's Trainer: `compute_loss_func`, right under gradient accumulation (pip install transformers accelerate).

The Trainer hands over the number of labels in all micro-batches and ranks of an optimiser step. Without class weights
that is the denominator of both terms, so the accumulated gradient is the one of the joint batch.

python examples/huggingface_trainer.py --epochs 20 --size 120
"""

import argparse
import tempfile

import torch
from digits import long_tailed_digits
from torch import Tensor
from transformers import EvalPrediction, Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

from lmf_kernels import LMFLoss, class_counts


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


def as_dataset(images: Tensor, labels: Tensor) -> list[dict[str, Tensor]]:
    return [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--size", type=int, default=120, help="images of the most frequent class, at most 134")
    options = parser.parse_args()

    set_seed(0)
    x, y, test_x, test_y = long_tailed_digits(options.size)
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, num_labels=10,
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    criterion = LMFLoss(class_counts(y, num_classes=10), s=5).to(device)

    def compute_loss(outputs, labels, num_items_in_batch=None):
        return criterion(outputs.logits, labels, normalizer=num_items_in_batch)

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, num_train_epochs=options.epochs, learning_rate=3e-3, logging_strategy="epoch",
            per_device_train_batch_size=16, gradient_accumulation_steps=2, per_device_eval_batch_size=100,
            save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=device == "cpu",
        )  # fmt: skip
        trainer = Trainer(
            ViTForImageClassification(config), arguments, train_dataset=as_dataset(x, y),
            eval_dataset=as_dataset(test_x, test_y), compute_loss_func=compute_loss, compute_metrics=accuracy,
        )  # fmt: skip
        trainer.train()
        result = trainer.evaluate()
    history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {history[0]:.3f} -> {history[-1]:.3f}, balanced accuracy {result['eval_accuracy']:.3f}")


if __name__ == "__main__":
    main()
