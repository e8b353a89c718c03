"""A plain PyTorch loop: the criterion is the only line that changes, and deferred re-weighting is one more.

python examples/pytorch_loop.py --epochs 30 --size 120
"""

import argparse

import torch
from digits import long_tailed_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lmf_kernels import DeferredReweighting, LMFLoss, class_counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--size", type=int, default=120, help="images of the most frequent class, at most 134")
    options = parser.parse_args()

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, y, test_x, test_y = long_tailed_digits(options.size)
    loader = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    counts = class_counts(y, num_classes=10)
    criterion = LMFLoss(counts, s=10).to(device)  # was: nn.CrossEntropyLoss()
    reweight = DeferredReweighting(criterion, counts, epoch=options.epochs * 4 // 5)

    history = []
    for epoch in range(options.epochs):
        reweight(epoch)
        total = torch.zeros((), device=device)
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            optimizer.zero_grad()
            loss = criterion(model(images), labels)
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(labels)
        history.append(total.item() / len(y))

    with torch.no_grad():
        accuracy = (model(test_x.to(device)).argmax(1).cpu() == test_y).float().mean()
    print(f"loss {history[0]:.3f} -> {history[-1]:.3f}, balanced accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
