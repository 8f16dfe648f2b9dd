"""Noise of generated images, and compiled sampling."""

import json

import pytest
import torch

from w2s_train.generation import standard_normal

CFG = {
    "class_path": "w2s_train.guidance.ClassifierFree",
    "init_args": {"scale": 1.5, "low": 0.4},  # below, one pass of the class alone
}
GUIDANCES = [{"class_path": "w2s_train.guidance.Unguided"}, CFG]


@pytest.mark.parametrize("shape", [(2, 1, 1), (1, 4, 4), (3, 5, 7), (4, 32, 32)])
def test_noise_is_that_of_each_seed(shape: tuple[int, ...]):
    """Step after step, whatever stands beside it in the batch."""
    seeds = [3, 8, 3]
    generators, alone = ([torch.Generator().manual_seed(s) for s in seeds] for _ in range(2))
    for _ in range(3):
        noise = standard_normal(generators, torch.Size(shape), torch.device("cpu"))
        assert torch.equal(noise, torch.stack([torch.randn(shape, generator=g) for g in alone]))
        assert torch.equal(noise[0], noise[2]) and not torch.equal(noise[0], noise[1])


@pytest.mark.slow
@pytest.mark.long
def test_compiled_sampling_compiles_once(digits: None):
    """A second call compiles nothing and breaks no graph, and has the images of eager networks."""
    from torch._dynamo.utils import counters

    from w2s_train.command.run import compose

    torch._dynamo.reset()
    counters.clear()
    files = ["-c", "configs/digits_w2s.yaml", "-c", "tests/tiny.yaml"]
    options = [f"--model.guidance={json.dumps(GUIDANCES)}", "--model.sampler.init_args.steps=4"]
    eager, compiled = (
        compose(["fit", *files, *options, f"--model.compile={switch}"], run=False).model.eval()
        for switch in ("false", "true")
    )
    for parameter in eager.parameters():  # an untouched adaLN-Zero network predicts 0
        parameter.data += 0.1 * torch.randn_like(parameter)
    compiled.load_state_dict(eager.state_dict())
    compiled.setup("validate")
    graphs = []
    for first in (0, 100):
        seeds, labels = list(range(first, first + 20)), [seed % 10 for seed in range(20)]
        for setting in range(len(GUIDANCES)):
            ours, theirs = (m.generate(seeds, labels, setting).int() for m in (compiled, eager))
            assert (ours - theirs).abs().max() <= 1  # of 255: rounded elsewhere
            assert ours.float().std() > 10
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] > 0
    assert not counters["graph_break"]
