"""generate() of attached models against the same models with transformers' own attention."""

import copy
import json
import runpy
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import image
from transformers import PreTrainedTokenizerFast

import kvservice
from kvservice import Client, KvServiceError
from kvservice.huggingface.checks import MODEL_TYPES
from models import smollm2, tiny

# A model in a small type has rounding errors; through the service, which attends in float32, they
# may be as large again and no larger.
ERROR_RATIO_MAX = 2
CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
LIMIT = 0.2
PARAGRAPH = "The quick brown fox jumps over the lazy dog near the river bank. "


class CountingClient(Client):
    """Knows what was created through it."""

    def __init__(self, endpoint):
        super().__init__(endpoint)
        self.created = []

    def sequence(self, *arguments, **options):
        self.created.append(super().sequence(*arguments, **options))
        return self.created[-1]


@pytest.fixture
def attach(server):
    """Attaches models until the test ends; makes the client's counts available."""
    attached = []

    def make(model, *arguments, **options):
        options.setdefault("client", CountingClient(server.endpoint))
        attached.append(kvservice.attach(model, server.endpoint, *arguments, **options))
        return model

    yield make
    for model in attached:
        if hasattr(model, "kvservice"):
            kvservice.detach(model)


def chat(*prompts):
    """Left-padded token ids and mask of some prompts for SmolLM2."""
    _, tokenizer = smollm2()
    rows = [tokenizer.encode_chat(prompt) for prompt in prompts]
    length = max(map(len, rows))
    ids = [[tokenizer.end_of_turn_id] * (length - len(row)) + row for row in rows]
    mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def generate_both(attach, model, policy, inputs, **arguments):
    """Plain and attached, from the same random numbers; the model stays attached."""
    outputs = []
    for attached in (False, True):
        if attached:
            attach(model, policy)
        torch.manual_seed(7)
        outputs.append(model.generate(**inputs, **arguments))
    return outputs


def assert_dropped(client):
    """Nothing is left on the server of what was created."""
    assert client.created
    for sequence in client.created:
        with pytest.raises(KvServiceError, match="SEQUENCE_NOT_FOUND"):
            sequence.describe()


def test_greedy_text_is_that_of_transformers(attach):
    model, tokenizer = smollm2()
    inputs = chat("What is the capital of France? Answer with one word.")
    plain, served = generate_both(
        attach, model, "dense", inputs, max_new_tokens=10, do_sample=False
    )
    assert torch.equal(plain, served)
    assert "Paris" in tokenizer.decode(served[0].tolist())
    report = model.kvservice.report
    assert report.steps == served.shape[1] - inputs["input_ids"].shape[1] - 1
    assert report.tokens_read_share == 1 and report.dropped_mass_upper_max == 0
    assert set(report.transports) == {"lane"}
    assert_dropped(model.kvservice.client)


def test_batches_with_left_padding(attach):
    model, _ = smollm2()
    inputs = chat("Name three colours.", "Hi!", "Count from one to ten, please, in English words.")
    assert (inputs["attention_mask"] == 0).any()
    plain, served = generate_both(
        attach, model, "dense", inputs, max_new_tokens=8, do_sample=False
    )
    assert torch.equal(plain, served)
    report = model.kvservice.report
    # One call per layer and step for the whole batch.
    assert sum(report.transports.values()) == report.steps * model.config.num_hidden_layers
    assert len(model.kvservice.client.created) == 3


def test_several_answers_of_a_prompt_share_it(attach):
    model = tiny()
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[1, :12] = 0
    inputs = {"input_ids": torch.randint(1, 128, (2, 30)), "attention_mask": mask}
    plain, served = generate_both(
        attach, model, "dense", inputs, max_new_tokens=12, do_sample=True, num_return_sequences=3
    )
    assert torch.equal(plain, served)
    assert len({tuple(row.tolist()) for row in served}) == 6
    # Prompts are stored once; their copies are forks.
    assert len(model.kvservice.client.created) == 2
    assert model.kvservice.report.sequences == 6
    assert_dropped(model.kvservice.client)


def test_a_certified_run_reports_what_it_dropped(attach, tmp_path):
    model, tokenizer = smollm2()
    attach(model, "certified", max_dropped_mass=LIMIT, dense_below_tokens=0)
    inputs = chat(PARAGRAPH * 60 + "What does the fox do?")
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert output.shape[1] > inputs["input_ids"].shape[1]
    report = model.kvservice.report
    assert report.unmet == 0
    assert 0 < report.dropped_mass_upper_mean <= report.dropped_mass_upper_max <= LIMIT
    assert report.tokens_read_share < 0.9

    numbers = json.loads(json.dumps(report.to_dict()))
    heads = report.steps * model.config.num_hidden_layers * model.config.num_attention_heads
    for name in ("heads_by_level", "heads_by_action", "heads_by_dropped_mass_upper"):
        assert sum(numbers[name].values()) == heads, name
    assert sum(layer["heads"] for layer in numbers["layers"]) == heads
    assert sum(numbers["steps_tokens_read"]) < sum(numbers["steps_tokens_visible"])
    seconds = numbers["seconds"]
    parts = ("prompt_attention", "append", "attend", "rest_of_the_model")
    assert sum(seconds[part] for part in parts) == pytest.approx(seconds["total"])
    assert 0 < seconds["attend_in_service"] < seconds["attend"]

    text = str(report)
    assert text.startswith(f"certified {LIMIT} · 1 sequence · ")
    assert "dropped mass at most" in text and "rest of the model" in text
    assert all(len(line) <= 170 for line in text.splitlines())

    path = tmp_path / "report.png"
    report.figure().savefig(path)
    assert image.imread(path).std() > 0.05


def scores_of(model, inputs):
    """Tokens [rows, 4] and scores [step, rows, vocabulary] of four greedy steps."""
    output = model.generate(
        **inputs, max_new_tokens=4, do_sample=False, output_scores=True,
        return_dict_in_generate=True,
    )
    return output.sequences[:, -4:], torch.stack(output.scores).double()


def score_errors(exact, *runs):
    """Normalised squared error of each run, over the steps about the same text in all of them."""
    same = torch.stack([tokens == exact[0] for tokens, _ in runs]).all(dim=0)
    steps = torch.nn.functional.pad(same, (1, -1), value=True).cumprod(dim=1).bool().T
    assert steps[1].any()
    # The first scores come of the prompt, which transformers attends itself.
    steps[0] = False
    truth = exact[1][steps]
    return [float(((scores[steps] - truth) ** 2).sum() / (truth**2).sum()) for _, scores in runs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_scores_of_every_supported_model(attach, kind, dtype):
    window = {"sliding_window": None} if kind == "mistral" else {}
    model = tiny(CLASSES[kind], **window).to(dtype)
    inputs = {"input_ids": torch.randint(1, 128, (3, 70))}
    inputs["attention_mask"] = torch.ones(3, 70, dtype=torch.long)
    inputs["attention_mask"][1, :30] = 0
    exact = scores_of(copy.deepcopy(model).double(), inputs)
    plain = scores_of(model, inputs)
    served = scores_of(attach(model, "dense"), inputs)
    plain_error, served_error = score_errors(exact, plain, served)
    assert 0 < served_error <= ERROR_RATIO_MAX * plain_error


def test_a_cache_of_another_type_than_the_model(attach):
    model = tiny()
    inputs = {"input_ids": torch.randint(1, 128, (2, 40))}
    exact = scores_of(model, inputs)
    half = scores_of(copy.deepcopy(model).bfloat16(), inputs)
    served = scores_of(attach(model, "dense", cache_dtype=torch.bfloat16), inputs)
    half_error, served_error = score_errors(exact, half, served)
    # Keys and values are rounded and nothing else.
    assert 1e-9 < served_error < half_error


def test_a_prompt_of_one_token_and_embeddings_as_inputs(attach):
    model = tiny()
    one = {"input_ids": torch.tensor([[5], [6]])}
    plain, served = generate_both(attach, model, "dense", one, max_new_tokens=5, do_sample=False)
    assert torch.equal(plain, served)
    kvservice.detach(model)
    embeddings = {"inputs_embeds": torch.randn(2, 9, model.config.hidden_size)}
    plain, served = generate_both(
        attach, model, "dense", embeddings, max_new_tokens=5, do_sample=False
    )
    assert torch.equal(plain, served)


class WaitingStreamer:
    """Holds a generation up until new sequences have other sketch tables than those before."""

    def __init__(self, client, model_name):
        self._client, self._name = client, model_name
        self._before = self._digest()
        self.has_learnt = False

    def _digest(self):
        with Client.sequence(self._client, self._name) as sequence:
            return sequence.describe().sketch_table_digest

    def put(self, value):
        end = time.monotonic() + 60
        while value.ndim == 1 and not self.has_learnt and time.monotonic() < end:
            self.has_learnt = self._digest() != self._before

    def end(self):
        """Nothing to do."""


def test_the_server_learns_from_prompts(attach):
    model = attach(tiny(), "dense")
    client = model.kvservice.client
    model.generate(torch.ones(1, 2, dtype=torch.long), max_new_tokens=2, do_sample=False)
    streamer = WaitingStreamer(client, model.kvservice.report.model)
    # Queries come with the prompt, and its keys stay as long as the generation lasts.
    model.generate(
        torch.randint(1, 128, (1, 2100)), max_new_tokens=3, do_sample=False, streamer=streamer
    )
    assert streamer.has_learnt


def test_detach_makes_the_model_what_it_was(attach):
    model = tiny()
    plain_attention = model.config._attn_implementation
    inputs = torch.randint(1, 128, (1, 20))
    expected = model.generate(inputs, max_new_tokens=4, do_sample=False)
    attach(model, "certified", max_dropped_mass=0.1)
    assert kvservice.detach(model) is model
    assert model.config._attn_implementation == plain_attention
    assert not hasattr(model, "kvservice")
    assert torch.equal(model.generate(inputs, max_new_tokens=4, do_sample=False), expected)


class DroppingStreamer:
    """Somebody else who drops the sequences in the middle of a generation."""

    def __init__(self, client):
        self._client = client

    def put(self, value):
        if value.ndim == 1:
            for sequence in self._client.created:
                sequence.drop()

    def end(self):
        """Nothing to do."""


def test_an_error_of_the_service_is_raised(attach):
    model = tiny()
    attach(model, "dense")
    client = model.kvservice.client
    with pytest.raises(KvServiceError) as lost:
        model.generate(
            torch.randint(1, 128, (1, 20)), max_new_tokens=4, do_sample=False,
            streamer=DroppingStreamer(client),
        )
    assert lost.value.reason == "SEQUENCE_NOT_FOUND"
    # The next one begins anew.
    assert model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=3).shape == (1, 6)


def test_torch_tensors_come_and_go_without_copies(server):
    config = {"layer_count": 1, "query_head_count": 2, "kv_head_count": 1, "head_dim": 64}
    from kvservice.tensors import as_array
    from kvservice.v1 import model_pb2, types_pb2

    types = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: np.uint16}
    for dtype, numpy_type in types.items():
        tensor = torch.randn(3, 4).to(dtype).requires_grad_()
        array = as_array(tensor)
        assert array.__array_interface__["data"][0] == tensor.data_ptr()
        assert array.dtype == numpy_type
    with pytest.raises(TypeError, match="on meta, not in this machine's memory"):
        as_array(torch.empty(3, device="meta"))
    with Client(server.endpoint) as client:
        client.register_model(model_pb2.Model(
            name="torch", scale=1.0, cache_dtype=types_pb2.DATA_TYPE_BFLOAT16, **config))
        policy = kvservice.make_policy("dense")
        with client.sequence("torch", policy=policy) as sequence:
            k, v = (torch.randn(1, 5, 1, 64).bfloat16() for _ in range(2))
            sequence.append(0, k, v)
            q = torch.randn(2, 64)
            for way in ("lane", "unary"):
                with Client(server.endpoint, transport=way) as other:
                    row = kvservice.Row(sequence, 4)
                    reply = other.attend_rows(0, [row], q[None])
                    assert reply.transport == way and isinstance(reply.out, torch.Tensor)
                    weights = torch.softmax(q @ k[0, :, 0].float().T, dim=-1)
                    torch.testing.assert_close(
                        reply.out[0], weights @ v[0, :, 0].float(), rtol=1e-5, atol=1e-5
                    )
                    asked = {"output_dtype": types_pb2.DATA_TYPE_BFLOAT16}
                    small = other.attend_rows(0, [row], q[None], **asked)
                    assert small.out.dtype == torch.bfloat16
                    assert torch.equal(small.out, reply.out.bfloat16())


def test_the_example_program(server, monkeypatch, capsys, tmp_path):
    _, tokenizer = smollm2()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer)
    fast.save_pretrained(tmp_path)
    shape = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    tiny(vocab_size=len(fast), **shape).save_pretrained(tmp_path)
    program = Path(__file__).resolve().parents[2] / "client" / "python" / "example_huggingface.py"
    monkeypatch.setattr("sys.argv", [str(program), str(tmp_path), server.endpoint, "Hello"])
    runpy.run_path(str(program), run_name="__main__")
    text = capsys.readouterr().out
    assert text.startswith("Hello")
    assert "certified 0.05 · 1 sequence · 99 steps · calls: 198 by lane" in text
