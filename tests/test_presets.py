"""What a run takes by its data."""

import pytest

from qdeploy.training.config import Config, resolve
from qdeploy.training.image_sets import SETS
from qdeploy.training.presets import DOMAIN_NET, NAMED


def settings(data, **given):
    found = resolve(Config(data=str(data), test_domain="x", **given))
    return found.model.name, found.lr, found.batch_size, found.updates, found.quantize_at, found.eval_every


@pytest.mark.parametrize("domains", [DOMAIN_NET, ("art", "cartoon", "photo", "sketch"), DOMAIN_NET[:5]])
def test_a_tree_with_the_six_domains_is_domain_net(tmp_path, domains):
    for name in domains:
        (tmp_path / name).mkdir()
    schedule = (15001, 8000, 1000) if domains == DOMAIN_NET else (5001, 2000, 300)
    assert settings(tmp_path) == ("resnet50", 5e-5, 32, *schedule)
    assert settings(tmp_path, quantize_at=7, batch_size=8) == ("resnet50", 5e-5, 8, schedule[0], 7, schedule[2])


def test_small_images_are_trained_from_scratch():
    assert settings("digits-dg") == ("nin", 1e-3, 32, 2001, 800, 100)
    for data in ("rotated-mnist", "colored-mnist", "fashion-mnist", "cifar10"):
        assert settings(data) == ("nin", 1e-3, 64, 5001, 2000, 300)


def test_every_set_has_a_preset():
    assert {*NAMED} == {*SETS, "debug"}
