"""Lightning: the criterion is a submodule, so Lightning moves and saves it with the model (pip install lightning).

python examples/lightning_module.py --epochs 30 --size 120
"""

import argparse

import lightning
import torch
from digits import long_tailed_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lmf_kernels import DeferredReweighting, LDAMLoss, class_counts


class Classifier(lightning.LightningModule):
    def __init__(self, counts: Tensor, drw_epoch: int) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        self.criterion = LDAMLoss(counts, s=10)
        self.reweight = DeferredReweighting(self.criterion, counts, epoch=drw_epoch)
        self.history: list[float] = []

    def on_train_epoch_start(self) -> None:
        self.reweight(self.current_epoch)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        images, labels = batch
        loss = self.criterion(self.model(images), labels)
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def on_train_epoch_end(self) -> None:
        self.history.append(float(self.trainer.callback_metrics["loss"]))

    def test_step(self, batch: list[Tensor], index: int) -> None:
        images, labels = batch
        self.log("accuracy", (self.model(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.model.parameters(), lr=3e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--size", type=int, default=120, help="images of the most frequent class, at most 134")
    options = parser.parse_args()

    lightning.seed_everything(0)
    x, y, test_x, test_y = long_tailed_digits(options.size)
    classifier = Classifier(class_counts(y, num_classes=10), drw_epoch=options.epochs * 4 // 5)
    trainer = lightning.Trainer(
        max_epochs=options.epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(classifier, DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True))
    test = trainer.test(classifier, DataLoader(TensorDataset(test_x, test_y), batch_size=400), verbose=False)
    history = classifier.history
    print(f"loss {history[0]:.3f} -> {history[-1]:.3f}, balanced accuracy {test[0]['accuracy']:.3f}")


if __name__ == "__main__":
    main()
