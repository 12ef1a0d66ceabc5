import torch
from torch import nn

from vgen.layers.vit import SelfAttention, ViTBlock, init_vit, run_blocks


def test_attention_is_torchs_with_its_names():
    torch.manual_seed(0)
    reference = nn.MultiheadAttention(12, 3, batch_first=True)
    nn.init.normal_(reference.in_proj_bias)
    ours = SelfAttention(dim=12, heads=3)
    ours.load_state_dict(reference.state_dict())
    x = torch.randn(2, 7, 12)
    expected, _ = reference(x, x, x, need_weights=False)
    torch.testing.assert_close(ours(x), expected)


def test_every_slot_sees_every_other():
    torch.manual_seed(0)
    block = ViTBlock(dim=8, heads=2)
    x = torch.randn(1, 5, 8, requires_grad=True)
    for slot in range(5):
        (gradient,) = torch.autograd.grad(block(x)[0, slot].square().sum(), x)
        assert (gradient.abs().sum(-1) > 0).all()


def test_initial_weights():
    torch.manual_seed(0)
    block = ViTBlock(dim=64, heads=2)
    fused = block.attn.in_proj_weight.detach().clone()
    block.apply(lambda module: init_vit(module, std=0.1))
    assert 0.09 < block.mlp.c_fc.weight.std() < 0.11
    assert not block.mlp.c_fc.bias.any()
    assert torch.equal(block.attn.in_proj_weight, fused)


def test_checkpointing_changes_no_gradient():
    torch.manual_seed(0)
    blocks = nn.ModuleList(ViTBlock(dim=8, heads=2) for _ in range(2))
    x = torch.randn(1, 5, 8)
    grads = []
    for flag in (False, True):
        blocks.zero_grad()
        run_blocks(blocks, x, gradient_checkpointing=flag).square().sum().backward()
        grads.append([p.grad.clone() for p in blocks.parameters()])
    assert all(torch.allclose(a, b) for a, b in zip(*grads, strict=True))
