"""A user's own model, loss and reader, as their package would bring them; see entry_points.txt beside."""

from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional

from raypipe.data.files import of_files


def linear(num_outputs: int, channels: int, image_size: int, *, dropout: float = 0.0) -> nn.Module:
    """Keyword-only arguments are what may be said in YAML: `model: {name: own_linear, dropout: 0.1}`."""
    inputs = channels * image_size * image_size
    return nn.Sequential(nn.Flatten(), nn.Dropout(dropout), nn.Linear(inputs, num_outputs))


def squared(*, scale: float = 1.0):  # `task: {name: classification, loss: {name: own_squared, scale: 2}}`
    """A loss is a function of (outputs, labels) to a scalar."""

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        return scale * functional.mse_loss(outputs, functional.one_hot(labels, outputs.shape[1]).float())

    return loss


def photos(folder: Path, name: str):  # in a store's policy.yaml: `products: {folder: photos, reader: own_photos}`
    """Of files named as train/Sneaker-0001.png."""
    splits = {at.name: sorted(at.glob("*.png")) for at in folder.iterdir()}
    return of_files(name, {s: [(f.read_bytes(), f.name.rpartition("-")[0]) for f in fs] for s, fs in splits.items()})
