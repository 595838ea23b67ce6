"""Networks that know so many positions and no more: longer texts are refused in a sentence."""

from dataclasses import replace

import pytest

from blockdiffusion.diffusion.config import DiffusionConfig
from blockdiffusion.errors import UserError
from blockdiffusion.models.causal_lm import adapted_model
from blockdiffusion.sampling import generate
from tests.models.hugging_face import make_causal_lm

LONGROPE = dict(
    rope_type="longrope", rope_theta=10000.0, short_factor=[1.0] * 2, long_factor=[1.0] * 2,
    original_max_position_embeddings=16,
)  # fmt: skip
SIXTEEN = {
    "gpt2": dict(n_positions=16),
    "opt": dict(max_position_embeddings=16),
    "phi3": dict(original_max_position_embeddings=16, rope_parameters=LONGROPE),
}


@pytest.mark.parametrize("family", SIXTEEN)
def test_texts_beyond_the_positions_are_refused(family):
    """Learned positions end (GPT-2, OPT); longrope has other frequencies for longer texts."""
    config = DiffusionConfig(vocab_size=13, seq_len=16, block_size=4, mask_id=12, bos=False)
    model = adapted_model(make_causal_lm(family, **SIXTEEN[family]).float(), config).eval()
    assert model.backbone.max_positions == 16
    assert len(generate(model, max_new_tokens=16).sequences[0]) <= 16
    with pytest.raises(UserError, match="knows 16 positions, and the text has"):
        generate(model, max_new_tokens=24)
    with pytest.raises(UserError, match="knows 16 positions, and the text has 32 tokens"):
        adapted_model(make_causal_lm(family, **SIXTEEN[family]), replace(config, seq_len=32))


def test_rotary_positions_do_not_end():
    config = DiffusionConfig(vocab_size=13, seq_len=16, block_size=4, mask_id=12, bos=False)
    model = adapted_model(make_causal_lm("llama").float(), config)
    assert model.backbone.max_positions is None
    assert len(generate(model.eval(), max_new_tokens=80).sequences[0]) <= 80
