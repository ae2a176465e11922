"""Statements of the two pages that are not true, there or here, and what is."""

import torch

from moe_mt import M2M100Model, NllbMoeConfig, NllbMoeSparseMLP
from tests.pretrained.tiny_models import build


def test_without_a_decoder_mask_what_follows_padding_sees_it():
    """The pages say that padding is ignored by default."""
    model = build("dense", "Model")
    assert isinstance(model, M2M100Model)
    source = torch.tensor([[5, 6, 2]])
    padded = torch.tensor([[2, 1, 10, 11]])
    mask = torch.tensor([[1, 0, 1, 1]])
    with torch.no_grad():
        shown = model(source, decoder_input_ids=padded).last_hidden_state
        hidden = model(
            source, decoder_input_ids=padded, decoder_attention_mask=mask
        ).last_hidden_state
        without = model(source, decoder_input_ids=padded[:, mask[0] == 1]).last_hidden_state
    # Padding is not counted among positions, so that hiding it is as good as leaving it out.
    torch.testing.assert_close(hidden[:, 2:], without[:, 1:])
    assert (shown[:, 2:] - without[:, 1:]).abs().max() > 1e-3


def test_experts_that_no_token_chose_do_not_run():
    """The page says that the layer does as many operations as a dense one; 4.x ran all experts."""
    torch.manual_seed(1)
    config = NllbMoeConfig(
        d_model=16, encoder_attention_heads=2, decoder_attention_heads=2, num_experts=8
    )
    layer = NllbMoeSparseMLP(config, 24).eval()
    x = torch.randn(1, 3, 16)
    with torch.no_grad():
        expected, (gates, _) = layer(x)
        unused = (gates == 0).all(0)
        for index in unused.nonzero().flatten().tolist():
            for parameter in layer.experts[f"expert_{index}"].parameters():
                parameter.fill_(torch.nan)
        found, _ = layer(x)
    assert 2 <= unused.sum() <= 6
    assert torch.equal(found, expected)


def test_the_default_configuration_is_not_that_of_the_54b():
    config = NllbMoeConfig()
    assert (config.d_model, config.encoder_layers, config.encoder_ffn_dim) == (1024, 12, 4096)
    assert (config.vocab_size, config.encoder_layerdrop) == (128112, 0.05)
