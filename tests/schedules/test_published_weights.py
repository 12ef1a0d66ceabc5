"""Files of published weights load into networks built for their order, strictly."""

import pytest
import torch

from tests.generators.helpers import tiny_generator
from vgen.checkpoints import nar, par
from vgen.errors import UserError
from vgen.schedules.neighboring import neighboring
from vgen.schedules.parallel import parallel

FAMILIES = {
    "nar": (nar, nar.load_nar, neighboring(grid=(4, 4))),
    "par": (par, par.load_par, parallel(grid=(4, 4), regions=4)),
}


@pytest.fixture(params=sorted(FAMILIES))
def family(request):
    return FAMILIES[request.param]


@pytest.mark.parametrize("nesting", ["model", "module", None])
def test_a_file_loads_whatever_its_nesting(family, nesting, tmp_path):
    converter, load, plan = family
    trained, fresh = tiny_generator(plan, seed=1), tiny_generator(plan, seed=2)
    state = converter.to_published(trained.state_dict())
    torch.save(state if nesting is None else {nesting: state, "steps": 7}, tmp_path / "weights.pt")
    load(fresh, tmp_path / "weights.pt")
    ids, labels = torch.randint(23, (2, 16)), torch.tensor([0, 1])
    assert torch.equal(fresh.logits(ids, labels, plan), trained.logits(ids, labels, plan))


def test_published_names(family):
    converter, _, plan = family
    names = set(converter.to_published(tiny_generator(plan).state_dict()))
    heads = {"medusa_norm.weight", "medusa_output.weight"}
    expected = heads if converter is nar else {"spe_tok_embeddings.special_embeddings.weight"}
    expected |= {"cls_embedding.embedding_table.weight", "norm.weight", "output.weight", "tok_embeddings.weight"}
    assert {name for name in names if not name.startswith("layers.")} == expected


def test_caches_saved_after_sampling_are_ignored(tmp_path):
    plan = neighboring(grid=(4, 4))
    generator = tiny_generator(plan)
    state = nar.to_published(generator.state_dict())
    state["layers.0.attention.kv_cache.k_cache"] = torch.zeros(2, 2)
    torch.save(state, tmp_path / "weights.pt")
    nar.load_nar(generator, tmp_path / "weights.pt")


@pytest.mark.parametrize("missing", ["norm.weight", "layers.1.attention.wo.weight"])
def test_a_missing_tensor_is_named(family, missing, tmp_path):
    converter, load, plan = family
    generator = tiny_generator(plan)
    state = converter.to_published(generator.state_dict())
    del state[missing]
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(UserError, match=r"1 missing: (norms\.0\.weight|layers\.1\.attention\.wo\.weight)"):
        load(generator, tmp_path / "weights.pt")


def test_other_regions_are_refused(tmp_path):
    torch.save(par.to_published(tiny_generator(parallel(grid=(4, 4), regions=4)).state_dict()), tmp_path / "weights.pt")
    with pytest.raises(UserError, match=r"learned_embeddings\.weight \[3, 32\] instead of \[7, 32\]"):
        par.load_par(tiny_generator(parallel(grid=(4, 4), regions=[2, 4])), tmp_path / "weights.pt")
