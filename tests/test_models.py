"""Every model, as a flat vector."""

from __future__ import annotations

import copy
import subprocess
import sys
import urllib.request
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT

from raypipe.errors import ConfigError
from raypipe.models import DETECTORS, models
from raypipe.models.flat import FlatModel, flatten, initial, layout_of, state_dict_from, vector_from
from raypipe.models.on_cpu import fastest_on_cpu
from raypipe.run import check, load_run
from raypipe.tasks import losses, tasks
from raypipe.types import Role

torch.set_num_threads(1)
OF_TABLES = ("mlp", "two_towers")
OF_IMAGES = [name for name in models.names() if name not in (*OF_TABLES, *DETECTORS)]  # those: test_detection.py
SMALL = [name for name in OF_IMAGES if name != "vit_b_16"]
BATCH_NORM = {"name": "mobilenet_v3_small", "norm": "batch"}


def flat(spec: dict[str, object], size: int = 32) -> FlatModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = models.build(spec, 4, 1, size)
    return FlatModel(module, layout_of(module))


@pytest.mark.parametrize("name", OF_IMAGES)
def test_every_model_takes_a_step_on_its_vector(name: str) -> None:
    model = flat({"name": name, **({"norm": "batch"} if name.startswith("mobilenet") else {})})
    model.train()
    outputs = model.module(torch.rand(2, 1, 32, 32))
    assert outputs.shape == (2, 4)
    before = model.vector.clone()
    torch.nn.functional.cross_entropy(outputs, torch.tensor([0, 1])).backward()
    torch.optim.SGD(model.trained, lr=0.01).step()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.trained)
    assert not torch.equal(before, model.vector)
    parameters = dict(model.module.named_parameters())
    for entry in model.layout.entries:
        if entry.role is Role.SHARED:
            assert torch.equal(parameters[entry.name].detach().view(-1), model.vector[entry.slice])


@pytest.mark.parametrize("name", SMALL)
def test_a_vector_and_its_tensors_are_the_same(name: str) -> None:
    layout, vector = initial({"name": name}, 4, 3, 32, seed=1)
    tensors = state_dict_from(layout, vector)
    assert np.array_equal(vector_from(layout, tensors), vector)
    module = models.build({"name": name}, 4, 3, 32)
    module.load_state_dict({key: torch.from_numpy(np.array(value)) for key, value in tensors.items()}, strict=True)
    assert np.array_equal(flatten(module, layout), vector)


def test_equal_seeds_give_equal_weights_and_others_do_not() -> None:
    one, again, other = (initial({"name": "small_cnn"}, 4, 1, 28, seed)[1] for seed in (1, 1, 2))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


def test_batch_norm_statistics_are_statistics_and_counters_are_fixed() -> None:
    layout = flat(BATCH_NORM).layout
    roles = {e.name.rpartition(".")[2]: e.role for e in layout.entries}
    assert roles["running_mean"] is roles["running_var"] is Role.STATISTIC
    assert roles["num_batches_tracked"] is Role.FIXED
    assert all(e.dtype == "float32" for e in layout.entries if e.offset < layout.update_size)


def test_a_frozen_norm_does_not_move() -> None:
    model = flat({**BATCH_NORM, "norm": "frozen_batch"})
    assert not model.has_batch_norm
    assert not any(e.role is Role.STATISTIC for e in model.layout.entries)
    model.train()
    before = model.vector.clone()
    model.module(torch.rand(4, 1, 32, 32))
    assert torch.equal(before, model.vector)


def test_names_can_be_frozen_by_pattern() -> None:
    module = models.build({"name": "small_cnn"}, 4, 1, 28)
    layout = layout_of(module, frozen=["0.*"])
    assert {e.name for e in layout.entries if e.role is Role.FROZEN} == {"0.weight", "0.bias"}
    model = FlatModel(module, layout)
    model.module(torch.rand(1, 1, 28, 28)).sum().backward()
    assert model.module.get_parameter("0.weight").grad is None
    assert len(model.trained) == sum(e.role is Role.SHARED for e in layout.entries)


def test_loading_a_base_overwrites_counters_too() -> None:
    model = flat(BATCH_NORM)
    base = flatten(model.module, model.layout)
    base.flags.writeable = False  # as in shared memory
    model.train()
    model.module(torch.rand(4, 1, 32, 32))
    assert not np.array_equal(flatten(model.module, model.layout), base)
    model.load(base)
    assert np.array_equal(flatten(model.module, model.layout), base)


def test_images_lie_with_channels_last_but_where_weights_outweigh_them() -> None:
    small, big = (
        FlatModel(m, layout_of(m))
        for m in (models.build({"name": name}, 10, 3, 32) for name in ("small_cnn", "resnet18"))
    )
    few, many = torch.randn(32, 3, 32, 32), torch.randn(256, 3, 32, 32)
    assert small.laid_out(few).is_contiguous(memory_format=torch.channels_last)
    assert big.laid_out(few) is few
    assert big.laid_out(many).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(big.laid_out(many), many)
    assert small.laid_out(table := torch.randn(5, 7)) is table


def test_gradients_of_the_step_before_are_forgotten() -> None:
    model = flat({"name": "small_cnn"}, 28)
    model.module(torch.rand(1, 1, 28, 28)).sum().backward()
    assert all(p.grad is not None for p in model.trained)
    model.clear()
    assert all(p.grad is None for p in model.trained)


def test_missing_and_wrong_shaped_tensors_are_named_together() -> None:
    layout, vector = initial({"name": "small_cnn"}, 4, 1, 28, seed=0)
    tensors = state_dict_from(layout, vector)
    del tensors["0.bias"]
    tensors["0.weight"] = tensors["0.weight"][:1]
    with pytest.raises(ConfigError) as caught:
        vector_from(layout, tensors)
    assert caught.value.problems == [
        "tensor '0.bias' is missing",
        "tensor '0.weight' has shape (1, 1, 3, 3), the model needs (16, 1, 3, 3)",
    ]


def test_small_cnn_has_the_size_of_its_benchmark() -> None:
    for channels, size, num in ((1, 28, 105_962), (3, 32, 136_970)):
        module = models.build({"name": "small_cnn"}, 10, channels, size)
        assert sum(p.numel() for p in module.parameters()) == num


def test_lenet_has_the_size_of_niid_benchs() -> None:
    module = models.build({"name": "lenet"}, 10, 1, 28)
    assert sum(p.numel() for p in module.parameters()) == 44_426
    assert module(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    with pytest.raises(ConfigError, match="lenet needs image_size >= 16, found 12"):
        models.build({"name": "lenet"}, 10, 1, 12)


def test_statistics_are_fixed_only_where_there_are_some() -> None:
    fixed = ["train.fix_statistics_from=0.5", "model.norm=group"]
    with pytest.raises(ConfigError, match="fix_statistics_from: small_cnn has no BatchNorm statistics that move"):
        check(load_run(ROOT / "configs/sync.yaml", fixed))
    assert check(load_run(ROOT / "configs/sync.yaml", [fixed[0], "model.name=resnet18", "model.norm=batch"]))


def test_a_size_that_does_not_fit_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^vit_b_16 needs an image_size that is a multiple of 16, found 28$"):
        models.build({"name": "vit_b_16"}, 4, 1, 28)


def test_pretrained_weights_without_internet_are_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(urllib.request, "_opener", None)  # urllib keeps the first opener, and with it these proxies
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"^resnet18: pretrained weights could not be fetched .*pretrained: false.*$"):
        models.build({"name": "resnet18", "norm": "batch", "pretrained": True}, 4, 3, 224)
    with pytest.raises(ConfigError, match="norm: frozen_batch"):
        models.build({"name": "resnet18", "pretrained": True}, 4, 3, 224)


def test_settings_are_checked_without_torch() -> None:
    code = (
        "import sys; from raypipe.models import models; from raypipe.tasks import tasks, losses;"
        "from raypipe.store.optimizers import optimizers; from raypipe.store.schedules import schedules;"
        "assert not models.problems({'name': 'resnet18', 'norm': 'batch'}, 'model');"
        "assert not tasks.problems({'name': 'classification', 'classes': 3}, 'task');"
        "assert 'cross_entropy' in tasks.problems({'name': 'classification', 'loss': 'cros_entropy'}, 'task')[0];"
        "assert not optimizers.problems({'name': 'adamw', 'betas': [0.9, 0.99]}, 'o');"
        "assert not schedules.problems({'name': 'cosine'}, 's'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", losses.names())
def test_every_loss_is_lower_for_the_right_answer(name: str) -> None:
    loss = losses.build({"name": name})
    labels = torch.tensor([0, 1])
    right, wrong = torch.tensor([[4.0, 0.0], [0.0, 4.0]]), torch.tensor([[0.0, 4.0], [4.0, 0.0]])
    assert loss(right, labels).shape == ()
    assert loss(right, labels) < loss(wrong, labels)


def test_pixels_are_normalised_for_each_channel() -> None:
    task = tasks.build({"name": "classification", "channels": 3, "mean": [0.0, 0.5, 1.0], "std": 0.5})
    images = torch.full((1, 3, 28, 28), 255, dtype=torch.uint8)
    assert task.prepare(images)[0, :, 0, 0].tolist() == pytest.approx([2.0, 1.0, 0.0])
    assert (images == 255).all()


CONVOLUTIONS: list[tuple[dict[str, Any], tuple[int, int]]] = [
    ({"kernel_size": 3, "padding": 1}, (1, 1)),
    ({"kernel_size": 3, "padding": 1, "stride": 2}, (2, 2)),
    ({"kernel_size": 3, "padding": 1, "stride": 2, "bias": False}, (2, 1)),
    ({"kernel_size": 1, "stride": 2}, (2, 2)),
    ({"kernel_size": (3, 5), "padding": (0, 2), "stride": 4}, (4, 3)),
    ({"kernel_size": 7, "padding": 3, "stride": 2}, (2, 2)),
    ({"kernel_size": 4}, (4, 4)),
    ({"kernel_size": 1, "padding": 2, "stride": 7}, (2, 2)),  # nothing but padding is met: left alone, as all below
    ({"kernel_size": 3, "padding": 1}, (2, 1)),  # two pixels
    ({"kernel_size": 3, "padding": 2, "dilation": 2}, (1, 1)),
    ({"kernel_size": 3, "padding": "same"}, (1, 1)),
    ({"kernel_size": 3, "padding": 1, "groups": 2}, (1, 1)),
    ({"kernel_size": 3, "padding": 1, "padding_mode": "replicate"}, (1, 1)),
]


@pytest.mark.parametrize(("settings", "size"), CONVOLUTIONS)
def test_a_convolution_that_yields_one_pixel_is_a_product_with_the_same_gradients(
    settings: dict[str, Any], size: tuple[int, int]
) -> None:
    plain = torch.nn.Sequential(torch.nn.Conv2d(4, 6, **settings))
    faster = copy.deepcopy(plain)
    fastest_on_cpu(faster)
    images = torch.randn(5, 4, *size)
    found = []
    for module in (plain, faster):
        seen = images.clone().requires_grad_()
        outputs = module(seen)
        (outputs * torch.arange(outputs.numel()).view_as(outputs)).sum().backward()
        found.append([outputs, seen.grad, *(parameter.grad for parameter in module.parameters())])
    for ours, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert ours.shape == theirs.shape
    product = "Convolution" not in type(found[1][0].grad_fn).__name__
    assert product == (CONVOLUTIONS.index((settings, size)) < 7)


def test_what_comes_of_one_pixel_may_be_changed_in_place_and_differentiated_twice() -> None:
    """As EfficientNet does after its squeeze, and a gradient penalty."""
    plain = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3, padding=1), torch.nn.SiLU(inplace=True))
    faster = copy.deepcopy(plain)
    fastest_on_cpu(faster)
    images, found = torch.randn(5, 4, 1, 1), []
    for module in (plain, faster):
        seen = images.clone().requires_grad_()
        (slope,) = torch.autograd.grad(module(seen).sum(), seen, create_graph=True)
        slope.square().sum().backward()
        found.append([seen.grad, *(parameter.grad for parameter in module.parameters())])
    for ours, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_max_pooling_gives_the_same_bits_in_the_layout_that_came(layout: torch.memory_format) -> None:
    plain = torch.nn.Sequential(torch.nn.MaxPool2d(3, 2, 1))
    faster = copy.deepcopy(plain)
    fastest_on_cpu(faster)
    images = torch.randn(2, 8, 9, 9).relu().contiguous(memory_format=layout)  # ties among the zeros
    found = []
    for module in (plain, faster):
        seen = images.clone(memory_format=torch.preserve_format).requires_grad_()
        outputs = module(seen)
        outputs.square().sum().backward()
        found.append((outputs, seen.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert found[1][0].is_contiguous(memory_format=layout)
    assert torch.isnan(faster(torch.full((1, 2, 4, 4), torch.nan))).all()


def test_a_flat_model_computes_so_and_learns_as_the_plain_module_does() -> None:
    """ResNet-18 at 32 pixels: four of its convolutions yield a pixel."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = models.build({"name": "resnet18", "small_images": False}, 10, 3, 32)
    model = FlatModel(copy.deepcopy(plain), layout_of(plain))
    kinds = [type(part).__name__ for part in model.module.modules()]
    assert (kinds.count("OnePixelConv2d"), kinds.count("MaxPool2d")) == (20, 1)
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    for module in (plain, model.module):
        torch.nn.functional.cross_entropy(module(images), labels).backward()
    for ours, theirs in zip(model.module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)
