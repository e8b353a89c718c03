"""The training benchmark's parts: splits, batches, losses, the loop, metrics, tables and files."""

import json
import pickle
import re
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from training.data.batches import MemoryBatches, Order
from training.data.readers import read
from training.data.samples import Samples
from training.data.split import split_samples, thin
from training.loop import History, Outcome, Trainer
from training.losses import LABELS, LMFOptions, LossOptions, build_loss
from training.metrics import Metrics, measure
from training.models import Protocol, build_model
from training.networks import SmallCNN
from training.output import write_atomically, write_json
from training.record import Record
from training.report.run import Run
from training.report.times import time_table

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Two threads that wait for each other on busy cores take many times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def blobs(counts: tuple[int, ...], seed: int = 0) -> Samples:
    """4x4 images whose mean brightness tells the class."""
    labels = np.repeat(np.arange(len(counts)), counts)
    noise = np.random.default_rng(seed).normal(0, 0.05, (len(labels), 1, 4, 4))
    images = torch.tensor(noise + labels[:, None, None, None] / len(counts), dtype=torch.float32)
    return Samples("blobs", tuple("abcdefg"[: len(counts)]), labels, images)


def batches(samples: Samples, batch_size: int = 8, seed: int | None = None) -> MemoryBatches:
    return MemoryBatches(
        samples.images, torch.from_numpy(samples.labels), Order(len(samples.labels), batch_size, seed), (1, 4, 4)
    )


@pytest.mark.parametrize("counts", [(100, 20, 3), (3, 3), (720, 181, 182)])
def test_splits_are_stratified_disjoint_and_complete(counts):
    samples = blobs(counts)
    split = split_samples(samples, seed=1, grouped=False)
    parts = [split.train, split.val, split.test]
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(sum(counts)))
    for label, count in enumerate(counts):
        sizes = [np.count_nonzero(samples.labels[part] == label) for part in parts]
        assert min(sizes) >= 1
        assert sizes[1] == sizes[2] == max(1, round(0.15 * count))


def test_splits_depend_on_the_seed_alone():
    samples = blobs((40, 20))
    assert np.array_equal(
        split_samples(samples, 3, grouped=False).train, split_samples(samples, 3, grouped=False).train
    )
    assert not np.array_equal(
        split_samples(samples, 3, grouped=False).train, split_samples(samples, 4, grouped=False).train
    )


def test_thinning_gives_the_proportions_and_keeps_the_largest_class():
    labels = np.repeat([0, 1, 2], [100, 100, 100])
    kept = thin(np.arange(300), labels, (50, 10, 0.1), np.random.default_rng(0))
    assert np.bincount(labels[kept]).tolist() == [100, 20, 1]
    assert len(set(kept)) == len(kept)


def test_digits_are_thinned_in_the_training_part_alone():
    samples = read("digits")
    split = split_samples(samples, 0, grouped=False)
    counts = [np.bincount(samples.labels[part]).tolist() for part in (split.train, split.val, split.test)]
    assert counts[0] == [504, 84, 83, 39, 25, 11, 9]
    assert counts[1] == counts[2] and min(counts[1]) >= 26
    assert samples.images.shape == (1797, 1, 8, 8) and 0 <= samples.images.min() < samples.images.max() <= 1


def test_order_is_fixed_by_seed_and_epoch():
    order = Order(100, 16, seed=5)
    first = list(order)
    assert sorted(chain.from_iterable(first)) == list(range(100)) and list(order) == first
    order.epoch = 1
    assert list(order) != first and list(Order(100, 16, seed=6)) != first
    assert list(chain.from_iterable(Order(100, 16, seed=None))) == list(range(100))


def test_order_trains_on_no_batch_of_one():
    assert [len(batch) for batch in Order(33, 16, seed=0)] == [16, 16]
    assert [len(batch) for batch in Order(33, 16, seed=None)] == [16, 16, 1]
    assert [len(batch) for batch in Order(1, 16, seed=0)] == [1]


def test_memory_batches_scale_resize_and_colour():
    images = torch.full((3, 1, 4, 4), 255, dtype=torch.uint8)
    prepared, labels = next(iter(MemoryBatches(images, torch.arange(3), Order(3, 8, None), (3, 6, 6))))
    assert prepared.shape == (3, 3, 6, 6) and torch.allclose(prepared, torch.ones(3, 3, 6, 6))
    assert labels.tolist() == [0, 1, 2]


def textbook(name: str, logits: torch.Tensor, target: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Each loss from its published formula, in float64, with the paper's hyper-parameters."""
    logits, counts = logits.double(), counts.double()
    rows = torch.arange(len(target))
    margins = 0.5 * counts**-0.25 / (counts**-0.25).max()
    shifted = logits.clone()
    shifted[rows, target] -= margins[target]
    ldam = F.cross_entropy(30 * shifted, target)
    p = logits.softmax(1)[rows, target]
    focal = ((1 - p) ** 1.5 * -p.log()).mean()
    weight = (1 - counts / counts.sum()) / (len(counts) - 1)
    return {
        "ce": F.cross_entropy(logits, target),
        "wce": F.cross_entropy(logits, target, weight=weight),
        "focal": focal,
        "ldam": ldam,
        "lmf": ldam + focal,
        "lmf-eager": ldam + focal,
    }[name]


@pytest.mark.parametrize("name", LABELS)
def test_losses_are_the_published_ones(name):
    generator = torch.Generator().manual_seed(0)
    logits, target = torch.randn(16, 4, generator=generator), torch.arange(16) % 4
    counts = [500, 60, 7, 9]
    loss = build_loss(name, counts, LossOptions())(logits, target)
    assert torch.allclose(loss.double(), textbook(name, logits, target, torch.tensor(counts)), rtol=1e-5)


def test_loss_options_reach_the_loss():
    options = LossOptions(lmf=LMFOptions(alpha=1.5, beta=0.0, s=2.0, class_weights="margins"))
    counts = [81, 16]
    loss = build_loss("lmf", counts, options)(torch.zeros(2, 2), torch.tensor([0, 1]))
    margins = 0.5 * torch.tensor([2 / 3, 1.0])  # (16/81)^(1/4) = 2/3
    expected = 1.5 * (margins * F.softplus(2 * margins)).sum() / margins.sum()
    assert torch.allclose(loss, expected)


def test_loss_options_travel_to_other_processes():
    options = LossOptions(lmf=LMFOptions(s=2.0))
    assert pickle.loads(pickle.dumps(options)) == options != LossOptions()


def test_step_follows_the_gradient_of_the_loss():
    torch.manual_seed(0)
    model, twin = SmallCNN(1, 3), SmallCNN(1, 3)
    twin.load_state_dict(model.state_dict())
    protocol = Protocol(1, 8, lr=0.1, weight_decay=0.01, lr_step=9, lr_gamma=0.1, image_size=None)
    trainer = Trainer(model, torch.nn.CrossEntropyLoss(), protocol, CPU, 3)
    images, labels = torch.randn(8, 1, 4, 4), torch.arange(8) % 3
    trainer._step(images, labels)

    optimizer = torch.optim.Adam(twin.parameters(), lr=0.1, weight_decay=0.01)
    F.cross_entropy(twin(images), labels).backward()
    optimizer.step()
    for name, value in twin.state_dict().items():
        assert torch.allclose(model.state_dict()[name], value, atol=1e-6), name


def test_trainer_learns_and_tests_the_best_epoch_of_validation():
    torch.manual_seed(0)
    protocol = Protocol(30, 8, lr=0.02, weight_decay=0.0, lr_step=20, lr_gamma=0.1, image_size=None)
    trainer = Trainer(SmallCNN(1, 3), build_loss("lmf", [40, 20, 10], LossOptions()), protocol, CPU, 3)
    train, val, test = batches(blobs((40, 20, 10)), seed=0), batches(blobs((9, 9, 9), 1)), batches(blobs((9, 9, 9), 2))
    epochs = []
    outcome = trainer.run(train, val, test, lambda trainer: epochs.append(len(trainer.history.train_loss)))
    f1 = outcome.history.val_macro_f1
    assert epochs == list(range(1, 31)) and len(f1) == 30
    assert outcome.history.train_loss[-1] < outcome.history.train_loss[0] / 2
    assert outcome.best_val_macro_f1 == max(f1) == f1[outcome.best_epoch - 1] > 0.9
    assert trainer.evaluate(val)[0].macro_f1 == outcome.best_val_macro_f1  # the best weights are back
    assert trainer.evaluate(test)[0] == outcome.test and outcome.test.macro_f1 > 0.9
    assert 0 < outcome.loss_share < 1


def test_metrics_by_hand():
    metrics = measure(np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 0, 0]), 3)
    assert metrics.accuracy == 0.5
    assert np.allclose(metrics.per_class_f1, [4 / 7, 0.5, 0])  # class 2 is never predicted
    assert np.isclose(metrics.precision, (0.5 + 0.5 + 0) / 3)
    assert np.isclose(metrics.recall, (2 / 3 + 0.5 + 0) / 3)
    assert np.isclose(metrics.macro_f1, (4 / 7 + 0.5) / 3)
    assert metrics.confusion == [[2, 1, 0], [1, 1, 0], [1, 0, 0]]


def record(loss: str, seed: int, f1: float, loss_ms: float = 1.0) -> Record:
    metrics = Metrics(0.5, 0.25, 0.75, f1, [f1, 1 - f1], [[1, 0], [0, 1]])
    return Record(loss, seed, Outcome(metrics, 1, f1, 100.0 / loss_ms, loss_ms, 0.1, History([1.0], [1.0], [f1], [f1])))


def run_of(*records: Record) -> Run:
    return Run("digits", "small_cnn", "as made", ["x", "y"], [9, 3], records)


def test_tables_hold_mean_and_deviation():
    run = run_of(record("ldam", 0, 0.4), record("ldam", 1, 0.7), record("ce", 0, 0.5), record("ce", 1, 0.5))
    title, head, ruler, cross_entropy, ldam = run.table_1().text().splitlines()
    assert "over 2 seeds" in title and set(ruler) == {"-"}
    assert head.split() == ["Loss", "Accuracy", "Precision", "Recall", "Macro", "F1"]
    assert cross_entropy.split()[-3:] == ["0.500", "±", "0.000"]
    assert ldam.split()[-3:] == ["0.550", "±", "0.212*"]  # the sample deviation of 0.4 and 0.7; the best
    assert len(head) <= len(ruler) and cross_entropy.rindex("±") == ldam.rindex("±")
    assert re.split(r"  +", run.table_2().text().splitlines()[1].strip()) == ["Loss", "x (9)", "y (3)"]


def test_tables_as_markdown_and_csv():
    table = run_of(record("ldam", 0, 0.4), record("ce", 0, 0.7)).table_2()
    assert table.markdown().splitlines()[2:] == [
        "| Loss | x (9) | y (3) |",
        "| :-- | --: | --: |",
        "| Cross-entropy | **0.700** | 0.300 |",
        "| LDAM | 0.400 | **0.600** |",
    ]
    head, cross_entropy, ldam = table.csv().splitlines()
    assert head == "Loss,x (9) mean,x (9) deviation,y (3) mean,y (3) deviation"
    assert cross_entropy.startswith("Cross-entropy,0.7,,0.3") and ldam == "LDAM,0.4,,0.6,"


def test_report_compares_fused_with_eager():
    text = time_table(run_of(record("lmf", 0, 0.5, 0.5), record("lmf-eager", 0, 0.5, 2.0)))
    assert "loss 0.500 against 2.000 ms a step (4.0x)" in text
    assert "200 against 50 images/s (4.00x)" in text


def test_files_appear_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "results.json"
    write_json(path, {"loss": [float("nan"), 1.5], "path": Path("x")})
    assert json.loads(path.read_text()) == {"loss": [None, 1.5], "path": "x"}

    def fail(file: Path) -> None:
        file.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert json.loads(path.read_text())["path"] == "x"
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


@pytest.mark.parametrize("name", ["small_cnn", "resnet50", "efficientnet_v2_s", "densenet121"])
def test_models_have_one_logit_a_class(name):
    model = build_model(name, (3, 32, 32), 5).eval()
    with torch.no_grad():
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 5)
