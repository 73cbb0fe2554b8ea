"""Saved results of `memoized` are those that the code computes."""

import pytest
from hydra.errors import ConfigCompositionException

from memoized import composed, memoized_flops
from relay_diffusion.config import compose
from relay_diffusion.networks.flops import forward_flops
from support import TINY, tiny_stage


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("train", [*TINY, "stage=relay", "augment=edm", "run_dir=${oc.env:HOME}/a b", "~callbacks.ema"]),
        ("train", ["+trainer.max_epochs=3", "experiment=emoji_64", "stage.optimizer.lr=1", "~augment", "trusted=[a]"]),
        ("sample", ["relay=two_stages", "relay.stages.base.path=a", "seeds=0-1", "++relay.stages.relay.path=b"]),
    ],
)  # fmt: skip
def test_configs(name, overrides):
    overrides = [*overrides, "run_id=fixed"]
    expected = compose(name, overrides)
    for _ in range(2):
        cfg = composed(name, *overrides)
        assert cfg == expected
        assert cfg._metadata.flags == expected._metadata.flags
        cfg.run_dir = "changed"
    with pytest.raises(ConfigCompositionException, match="Could not override"):
        composed(name, *overrides, "trainer.nonsense=1")
    with pytest.raises(ConfigCompositionException, match="nowhere"):
        composed(name, "hydra/launcher=nowhere")


def test_flops():
    flops = memoized_flops(forward_flops)
    for network in (tiny_stage(size).denoiser.network for size in (8, 16, 8)):
        assert flops(network, tokens=0) == forward_flops(network)
