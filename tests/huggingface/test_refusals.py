"""Everything that the adapter does not support raises, and says why."""

import pytest
import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

import kvservice
from kvservice import Client, KvServiceError, make_policy
from kvservice.huggingface import UnsupportedError
from kvservice.huggingface.cache import ServiceCache
from kvservice.huggingface.checks import _REFUSED_ARGUMENTS, ROWS_MAX, check_attention
from kvservice.huggingface.report import GenerationReport
from models import tiny

ARGUMENTS = {
    "num_beams": 2,
    "num_beam_groups": 2,
    "assistant_model": object(),
    "prompt_lookup_num_tokens": 3,
    "assistant_early_exit": 1,
    "penalty_alpha": 0.6,
    "dola_layers": "low",
    "guidance_scale": 1.5,
    "custom_generate": "somebody/something",
    "cache_implementation": "static",
    "past_key_values": object(),
    "cache": object(),
    "use_cache": False,
    "prefill_chunk_size": 8,
    "output_attentions": True,
}
PROMPT = torch.arange(1, 21)[None]


@pytest.fixture
def model(server):
    attached = kvservice.attach(tiny(), server.endpoint, "dense")
    yield attached
    if hasattr(attached, "kvservice"):
        kvservice.detach(attached)


@pytest.fixture
def cache(model):
    made = new_cache(model)
    yield made
    made.close()


def new_cache(model, copies=1):
    attachment = model.kvservice
    return ServiceCache(
        attachment.client,
        attachment._description.name,
        layer_count=2,
        scale=attachment._description.scale,
        dtype=torch.float32,
        policy=attachment.policy,
        copies=copies,
        report=GenerationReport("tiny", "dense", None, 1, 2),
    )


def forward(model, cache, ids, **arguments):
    return model(input_ids=ids, **{model.kvservice._cache_argument: cache}, **arguments)


def test_every_refused_argument_is_tried():
    assert set(ARGUMENTS) == set(_REFUSED_ARGUMENTS)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_of_generate(model, name):
    with pytest.raises(UnsupportedError, match=f"{name}=.* is not supported: "):
        model.generate(PROMPT, max_new_tokens=2, **{name: ARGUMENTS[name]})
    assert model.kvservice.report is None


def test_the_generation_config_is_looked_at_too(model):
    model.generation_config.num_beams = 3
    with pytest.raises(UnsupportedError, match="num_beams=3"):
        model.generate(PROMPT, max_new_tokens=2)
    # What a config leaves open is the model's.
    with pytest.raises(UnsupportedError, match="num_beams=3"):
        model.generate(PROMPT, GenerationConfig(max_new_tokens=2))
    with pytest.raises(UnsupportedError, match="input_ids"):
        model.generate(num_beams=1)


def test_too_many_sequences(model):
    with pytest.raises(UnsupportedError, match=f"{ROWS_MAX + 2} sequences"):
        model.generate(PROMPT.repeat(ROWS_MAX // 2 + 1, 1), num_return_sequences=2, do_sample=True)


def refused_to_attach(server, model, match):
    with pytest.raises(UnsupportedError, match=match):
        kvservice.attach(model, server.endpoint, "dense")
    assert not hasattr(model, "kvservice")
    assert model.config._attn_implementation != "kvservice"


def test_models_of_other_kinds(server):
    config = GPT2Config(n_layer=1, n_head=1, n_embd=64, vocab_size=16)
    refused_to_attach(server, GPT2LMHeadModel(config), "'gpt2'")
    refused_to_attach(server, tiny("Mistral", sliding_window=64), "sliding")
    windows = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    refused_to_attach(server, tiny("Qwen2", **windows), "sliding")
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    refused_to_attach(server, tiny(rope_parameters=dynamic), "'dynamic'")
    model = tiny()
    model.config.is_encoder_decoder = True
    refused_to_attach(server, model, "encoders")


def test_a_shape_that_the_service_does_not_know(server):
    model = tiny(head_dim=32)
    with pytest.raises(KvServiceError) as refused:
        kvservice.attach(model, server.endpoint, "dense")
    assert "head_dim" in refused.value.field
    assert not hasattr(model, "kvservice")


def test_bad_arguments_of_attach(server, model):
    with pytest.raises(ValueError, match="attached already"):
        kvservice.attach(model, server.endpoint)
    other = tiny()
    with pytest.raises(ValueError, match="max_dropped_mass"):
        kvservice.attach(other, server.endpoint, make_policy("dense"), max_dropped_mass=0.1)
    with pytest.raises(ValueError):
        kvservice.attach(other, server.endpoint, "no such policy")
    with pytest.raises(UnsupportedError, match="float64"):
        kvservice.attach(other, server.endpoint, cache_dtype=torch.float64)
    with pytest.raises(KvServiceError, match="UNAVAILABLE"):
        kvservice.attach(other, "unix:/nowhere/at/all", client=Client("unix:/nowhere/at/all"))
    assert not hasattr(other, "kvservice")


def test_training(model):
    model.train()
    with pytest.raises(UnsupportedError, match="training"):
        model.generate(PROMPT, max_new_tokens=2)


@pytest.mark.parametrize("name", ["sliding_window", "softcap", "position_bias", "s_aux"])
def test_other_attention(model, name):
    module = model.model.layers[0].self_attn
    plain = {"scaling": 0.125}
    check_attention(module, plain, 0.125)
    with pytest.raises(UnsupportedError, match=name):
        check_attention(module, plain | {name: 5}, 0.125)
    for changed in ({"dropout": 0.1}, {"output_attentions": True}, {"scaling": 0.25}):
        with pytest.raises(UnsupportedError):
            check_attention(module, plain | changed, 0.125)
    with pytest.raises(UnsupportedError, match="scales by None"):
        check_attention(module, {}, 0.125)


def test_a_forward_pass_outside_of_generate(model):
    for arguments in ({}, {"use_cache": False}):
        with pytest.raises(UnsupportedError, match="call generate"):
            model(input_ids=PROMPT, **arguments)


class ImpatientStreamer:
    """Wants another text before it has taken the first."""

    def __init__(self, model):
        self._model = model

    def put(self, value):
        with pytest.raises(UnsupportedError, match="at a time"):
            self._model.generate(PROMPT, max_new_tokens=1)

    def end(self):
        """Nothing to do."""


def test_one_generation_at_a_time(model):
    output = model.generate(PROMPT, max_new_tokens=1, streamer=ImpatientStreamer(model))
    assert output.shape == (1, 21)
    # The only token came of the prompt.
    report = model.kvservice.report
    assert report.steps == 0 and report.tokens_read_share == 1
    assert str(report) == "dense · 1 sequence · 0 steps · calls: none"
    assert report.to_dict()["dropped_mass_upper_max"] == 0
    report.figure()


def test_the_config_as_second_argument(model):
    config = GenerationConfig(num_beams=2, max_new_tokens=2)
    with pytest.raises(UnsupportedError, match="num_beams=2"):
        model.generate(PROMPT, config)
    config.num_beams = 1
    assert model.generate(PROMPT, config).shape == (1, 22)


def test_masks_that_are_not_left_padding(model):
    for pattern in ([1] * 19 + [0], [1, 0] + [1] * 18, [0] * 20):
        with pytest.raises(UnsupportedError):
            model.generate(PROMPT, attention_mask=torch.tensor([pattern]), max_new_tokens=2)
    with pytest.raises(UnsupportedError, match="2D"):
        forward(model, new_cache(model), PROMPT, attention_mask=torch.ones(1, 1, 20, 20).bool())


def test_a_mask_of_a_later_token(model, cache):
    with torch.no_grad():
        forward(model, cache, PROMPT)
        hidden = torch.ones(1, 1, 1, 21).bool()
        hidden[..., 5] = False
        with pytest.raises(UnsupportedError, match="2D"):
            forward(model, cache, PROMPT[:, :1], attention_mask=hidden)


def test_a_cache_whose_generation_has_ended(model, cache):
    with torch.no_grad():
        forward(model, cache, PROMPT)
        cache.close()
        with pytest.raises(UnsupportedError, match="has ended"):
            forward(model, cache, PROMPT[:, :1])


def test_padding_that_changes(model, cache):
    mask = torch.ones(2, 21, dtype=torch.long)
    ids = PROMPT.repeat(2, 1)
    with torch.no_grad():
        forward(model, cache, ids, attention_mask=mask[:, :20])
        mask[1, :3] = 0
        with pytest.raises(UnsupportedError, match="padding"):
            forward(model, cache, ids[:, :1], attention_mask=mask)
        with pytest.raises(UnsupportedError, match="padding"):
            forward(model, cache, PROMPT[:, :1])


def test_several_tokens_after_the_prompt(model, cache):
    with torch.no_grad():
        forward(model, cache, PROMPT)
        with pytest.raises(UnsupportedError, match="one at a time"):
            forward(model, cache, PROMPT[:, :2])


def test_copies_that_are_none(model):
    with torch.no_grad():
        with pytest.raises(UnsupportedError, match="3 rows are not 2"):
            forward(model, new_cache(model, copies=2), PROMPT.repeat(3, 1))
        mask = torch.ones(2, 20, dtype=torch.long)
        mask[1, 0] = 0
        with pytest.raises(UnsupportedError, match="padded alike"):
            forward(model, new_cache(model, copies=2), PROMPT.repeat(2, 1), attention_mask=mask)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("reorder_cache", [torch.tensor([0])]),
        ("crop", [-1]),
        ("batch_repeat_interleave", [2]),
        ("batch_select_indices", [torch.tensor([0])]),
        ("reset", []),
    ],
)
def test_what_caches_are_asked_for(cache, name, arguments):
    assert not cache.is_croppable and not cache.is_compileable
    with pytest.raises(UnsupportedError, match="reordered, cropped or moved"):
        getattr(cache, name)(*arguments)
