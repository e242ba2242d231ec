"""Which parameters decay and how fast they learn, and every optimizer of the configs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from repnet import create_model
from repnet.errors import InputError
from repnet.spec import build, choices, load_choice
from repnet.training import (
    all_decay,
    layerwise_parameter_groups,
    no_norm_or_bias_decay,
    parameter_table,
    repvgg_parameter_groups,
    scale_learning_rates,
    warmup_cosine,
)


def named(model: nn.Module, group: dict[str, Any]) -> set[str]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)] for p in group["params"]}


@pytest.mark.parametrize("name", choices("parameter_groups"))
def test_every_rule_takes_each_trained_parameter_once(name: str) -> None:
    make = build({**load_choice("parameter_groups", name), "_partial_": True},
                 allowed=("repnet.training.parameter_groups",))  # fmt: skip
    model = create_model("repvgg_tiny", num_classes=5)
    model.stem.requires_grad_(False)
    groups = list(make(model))
    taken = [n for group in groups for n in named(model, group)]
    assert sorted(taken) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    names = [group["name"] for group in groups]
    assert len(set(names)) == len(names)
    assert all(group.get("weight_decay", 0.0) == 0.0 for group in groups)
    scale_learning_rates(torch.optim.SGD(groups, lr=0.1, weight_decay=1e-4))


def test_rules_differ_in_identity_gammas_and_biases() -> None:
    model = create_model("repvgg_tiny", num_classes=5)
    gamma, bias = "stages.0.1.conv.2.weight", "head.bias"
    decaying = {rule: named(model, rule(model)[0]) for rule in
                (repvgg_parameter_groups, no_norm_or_bias_decay, all_decay)}  # fmt: skip
    weights = {n for n, p in model.named_parameters() if p.ndim > 1}
    assert decaying[no_norm_or_bias_decay] == weights
    assert decaying[repvgg_parameter_groups] > weights
    assert gamma in decaying[repvgg_parameter_groups]
    assert bias not in decaying[repvgg_parameter_groups]
    assert {gamma, bias} <= decaying[all_decay] == {n for n, _ in model.named_parameters()}


def test_layers_learn_the_slower_the_deeper_they_lie() -> None:
    model = create_model("repvgg_tiny", num_classes=5)
    model.stages[0][0].requires_grad_(False)  # frozen layers count
    groups = layerwise_parameter_groups(model, 0.5)
    optimizer = scale_learning_rates(torch.optim.SGD(groups, lr=0.2, weight_decay=1e-4))
    rates, decays = {}, {}
    for group in optimizer.param_groups:
        assert "lr_scale" not in group
        for name in named(model, group):
            rates[name], decays[name] = group["lr"], group["weight_decay"]
    blocks = [f"stages.{i}.{j}" for i, stage in enumerate(model.stages) for j in range(len(stage))]
    layers = ["stem", *blocks, "head"]
    for name, p in model.named_parameters():
        depth = next(i for i, layer in enumerate(layers) if name.startswith(f"{layer}."))
        if p.requires_grad:
            assert rates[name] == pytest.approx(0.2 * 0.5 ** (len(layers) - 1 - depth)), name
            assert decays[name] == (1e-4 if p.ndim > 1 else 0), name
    assert rates["head.bias"] == 0.2
    assert not any(name.startswith("stages.0.0.") for name in rates)
    before = [group["lr"] for group in optimizer.param_groups]
    scale_learning_rates(optimizer)  # once only
    assert [group["lr"] for group in optimizer.param_groups] == before


def test_norms_belong_to_the_layer_before_and_shared_weights_to_the_first() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
                          nn.Sequential(shared), shared, nn.Linear(4, 2))  # fmt: skip
    scales = {n: g["lr_scale"] for g in layerwise_parameter_groups(model, 0.5)
              for n in named(model, g)}  # fmt: skip
    assert scales["0.weight"] == scales["1.weight"] == scales["1.bias"]
    assert scales["3.0.weight"] == 2 * scales["0.weight"]
    assert scales["5.weight"] == 1
    for wrong in (0, 1.5):
        with pytest.raises(InputError, match=r"must be in \(0, 1\]"):
            layerwise_parameter_groups(model, wrong)


def test_the_table_counts_everything() -> None:
    model = create_model("repvgg_tiny", num_classes=5)
    model.stem.requires_grad_(False)
    optimizer = torch.optim.SGD(repvgg_parameter_groups(model), lr=0.1, weight_decay=1e-4)
    warmup_cosine(optimizer, total_steps=100, steps_per_epoch=10, warmup_epochs=5)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 50)
    decay, rest, left = parameter_table(optimizer, model)
    assert (decay.group, decay.learning_rate, decay.weight_decay) == (
        "weights and identity norms", 0.1, 1e-4,
    )  # fmt: skip
    assert (rest.learning_rate, rest.weight_decay) == (0.1, 0.0)
    assert left == ("not trained", *[f(model.stem) for f in (tensors, values)], None, None)
    assert sum(row.values for row in (decay, rest, left)) == values(model)
    assert sum(row.parameters for row in (decay, rest, left)) == tensors(model)
    plain = torch.optim.Adam(model.parameters())
    assert [row.group for row in parameter_table(plain, model)] == ["group 0"]


def tensors(module: nn.Module) -> int:
    return len(list(module.parameters()))


def values(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", choices("optimizer"))
def test_every_optimizer_of_the_configs_learns(name: str) -> None:
    """With both loops over parameters where it has them, to the same weights."""
    spec = load_choice("optimizer", name)
    ends = []
    for foreach in (None, False, True):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3)
        )
        model.double()
        x, y = torch.randn(12, 2, 6, 6, dtype=torch.float64), torch.arange(12) % 3
        make = build({**spec, "foreach": foreach, "_partial_": True}, allowed=("torch.optim",))
        optimizer = make(no_norm_or_bias_decay(model))
        losses = []
        for _ in range(40):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.95 * losses[0]
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(ends[1:], [ends[0]] * 2, rtol=1e-6, atol=1e-6)


def test_an_unknown_argument_of_an_optimizer_is_named() -> None:
    spec = {**load_choice("optimizer", "sgd"), "nesterow": True, "_partial_": True}
    with pytest.raises(InputError, match=r"torch.optim.SGD: .*'nesterow'"):
        build(spec)
