"""The client against a real server, whose numbers are compared with float64 attention."""

import grpc
import numpy as np
import pytest

from kvservice import Action, Client, KvServiceError, Level, make_policy
from kvservice.tensors import from_bf16, to_bf16
from kvservice_demo.decoding import count_bound_violations
from kvservice_demo.gguf_model import LlamaConfig
from kvservice_demo.local_attention import LocalAttention
from kvservice_demo.server import OwnServer, describe_server
from kvservice_demo.session import register

CONFIG = LlamaConfig(
    layer_count=3,
    query_head_count=6,
    kv_head_count=2,
    head_dim=64,
    hidden_size=384,
    feed_forward_size=1,
    context_tokens_max=8192,
    rope_base=10000.0,
    norm_epsilon=1e-5,
)
MODEL = "tiny"
DENSE = make_policy("dense")


@pytest.fixture(scope="module")
def server():
    with OwnServer() as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with Client(server.endpoint) as connected:
        register(connected, MODEL, CONFIG)
        yield connected


@pytest.fixture
def sequence(client):
    with client.sequence(MODEL) as created:
        yield created


def random_tokens(count, seed=0):
    """K and V of all layers as bf16 bits, [layers, count, KV heads, head_dim]."""
    rng = np.random.default_rng(seed)
    shape = (CONFIG.layer_count, count, CONFIG.kv_head_count, CONFIG.head_dim)
    return to_bf16(rng.standard_normal(shape)), to_bf16(rng.standard_normal(shape))


def test_the_server_learns_from_query_samples(client):
    register(client, "learner", CONFIG)
    k, v = random_tokens(512)
    rng = np.random.default_rng(3)
    shape = (CONFIG.layer_count, 32, CONFIG.query_head_count, CONFIG.head_dim)
    with client.sequence("learner") as teacher:
        before = teacher.describe().sketch_table_digest
        assert len(before) == 32
        with pytest.raises(ValueError, match="layers"):
            teacher.append(0, k, v, query_sample=np.zeros((1, *shape[1:]), np.float32))
        teacher.append(0, k, v, query_sample=rng.standard_normal(shape))
        for _ in range(1000):
            with client.sequence("learner") as student:
                if student.describe().sketch_table_digest != before:
                    break
        else:
            pytest.fail("nothing was learnt")
        assert teacher.describe().sketch_table_digest == before


def test_sampled_queries_become_anchors(sequence):
    rng = np.random.default_rng(4)
    tokens, layers = 500, CONFIG.layer_count
    queries = rng.standard_normal((layers, 400, CONFIG.query_head_count, CONFIG.head_dim))
    positions = np.arange(100, 500)  # the last one where the steps below are
    k, v = random_tokens(tokens)

    def refused(bad, sample=queries):
        with pytest.raises(ValueError, match="query_sample_positions"):
            sequence.append(0, k, v, query_sample=sample, query_sample_positions=bad)

    refused(positions[:-1])
    refused(positions, None)
    refused(positions + 101)
    refused(positions[::-1])
    reply = sequence.append(0, k, v, query_sample=queries, query_sample_positions=positions)
    assert reply.message_count == 2 * layers  # no more than 256 queries in one
    assert reply.sequence.length_tokens == tokens
    policy = make_policy(
        "cis", min_cosine=0.99, max_sharing_estimate=0.0, top_k_tokens=24, layers=[],
        dense_below_tokens=0,
    )
    # Steps at one place: the first few use the samples up, none of them changes the sequence.
    for _ in range(7):
        sequence.attend(1, random_query(), position=tokens - 1, policy=policy)
    totals = sequence.describe().totals
    assert totals.anchor_seed_scans == 400 * CONFIG.kv_head_count
    last = queries[1, 399].astype(np.float32)
    groups = sequence.attend(1, last, position=tokens - 1, policy=policy).groups
    assert (groups.action == Action.REUSED).all()
    assert (groups.key_norm_max > 1).all() and (groups.query_distance >= 0).all()
    assert ((0 <= groups.assumed_cis_excess_mass) & (groups.assumed_cis_excess_mass <= 1)).all()
    assert (groups.assumed_psaw_dropped_mass == -1).all()
    assert totals.rows == 7 and totals.groups == 7 * CONFIG.kv_head_count


def test_sampled_queries_may_be_bf16(sequence, monkeypatch):
    parts = []
    monkeypatch.setattr(Client, "_append", lambda client, handle, taken: parts.extend(taken))
    k, v = random_tokens(4)
    queries = np.random.default_rng(3).standard_normal(
        (CONFIG.layer_count, 2, CONFIG.query_head_count, CONFIG.head_dim)
    )
    sequence.append(0, k, v, query_sample=to_bf16(queries))
    for (_, tensors), expected in zip(parts, queries, strict=True):
        assert tensors["query_sample"].dtype == np.float32
        np.testing.assert_array_equal(tensors["query_sample"], from_bf16(to_bf16(expected)))


def test_replies_name_their_random_numbers_and_bring_deferred_masses(sequence):
    sequence.append(0, *random_tokens(8))
    policy = make_policy("dense", deferred_exact_steps=2)
    first = sequence.attend(0, random_query(), position=6, policy=policy)
    second = sequence.attend(0, random_query(), position=7, policy=policy)
    epoch, secret, call, row = second.replay_name.split(":")
    assert len(epoch) == 32 and int(secret, 16) > 0 and row == "0"
    assert int(call) > int(first.replay_name.split(":")[2])
    assert first.deferred == ()
    assert [masses.position for masses in second.deferred] == [6, 7]
    for masses in second.deferred:
        assert masses.dropped_mass_upper.shape == (1, CONFIG.query_head_count)
        assert not masses.dropped_mass_upper.any()


def random_query(seed=1):
    rng = np.random.default_rng(seed)
    return 2 * rng.standard_normal((CONFIG.query_head_count, CONFIG.head_dim)).astype(np.float32)


def fill(sequence, count):
    """Appends `count` random tokens; returns an oracle that holds the same."""
    k, v = random_tokens(count)
    sequence.append(0, k, v)
    oracle = LocalAttention(CONFIG, count + 4)
    oracle.append_chunk(0, k, v)
    return oracle


def attend_both(sequence, oracle, layer, policy, position):
    """Appends one token on both sides and returns the reply and the exact attention."""
    k, v = random_tokens(1, seed=position)
    q = random_query(position)
    result = sequence.attend(
        layer, q, k[layer, 0], v[layer, 0], position=position, policy=policy, return_selected=True
    )
    return result, oracle.attend(layer, q, k[layer, 0], v[layer, 0])


def test_server_describes_itself(server):
    assert describe_server(server.admin_endpoint).startswith("kvservice ")


def test_register_is_idempotent_and_refuses_another_shape(client):
    register(client, MODEL, CONFIG)
    model = client.get_model(MODEL)
    assert (model.layer_count, model.head_dim) == (CONFIG.layer_count, CONFIG.head_dim)
    model.scale = 0.5
    with pytest.raises(KvServiceError) as refused:
        client.register_model(model)
    assert refused.value.code is grpc.StatusCode.ALREADY_EXISTS


def test_dense_attention_is_exact(sequence):
    oracle = fill(sequence, 130)
    for layer in range(CONFIG.layer_count):
        result, exact = attend_both(sequence, oracle, layer, DENSE, 130)
        assert result.attended_tokens == 131
        np.testing.assert_allclose(result.out[0], exact.output, atol=1e-5)
        np.testing.assert_allclose(result.lse[0], exact.lse, atol=1e-4)
        assert np.all(result.certificates.level == Level.EXACT)
        assert np.all(result.certificates.action == Action.DENSE)
        assert np.all(result.certificates.dropped_mass_upper == 0)
        assert all(len(head) == 131 for head in result.selected)


@pytest.mark.parametrize("limit", [0.3, 0.05])
def test_certified_bounds_hold(sequence, limit):
    oracle = fill(sequence, 3000)
    policy = make_policy("certified", max_dropped_mass=limit)
    result, exact = attend_both(sequence, oracle, 2, policy, 3000)
    dropped = exact.dropped_mass(result.selected)
    kept = exact.kept_mass(result.selected)
    assert count_bound_violations(result, exact.lse, kept, dropped) == 0
    assert np.all(result.certificates.dropped_mass_upper.astype(np.float64) <= limit)
    np.testing.assert_allclose(result.lse[0], exact.lse + np.log(kept), atol=1e-4)


def test_given_positions_are_attended(sequence):
    fill(sequence, 3000)
    given = [np.array([700, 1500]), np.array([9, 1000, 2000])]
    result = sequence.attend(
        2, random_query(), position=2999, policy=make_policy("given"), given=given,
        return_selected=True,
    )
    for kv_head, positions in enumerate(given):
        assert set(positions.tolist()) <= set(result.selected[kv_head].tolist())
    assert all(len(head) < 3000 for head in result.selected)


def test_appending_again_is_harmless(sequence):
    k, v = random_tokens(70)
    assert sequence.append(0, k, v).message_count == CONFIG.layer_count
    assert sequence.append(0, k, v).duplicate_count == CONFIG.layer_count
    assert sequence.describe().length_tokens == 70


def test_other_bytes_at_a_stored_position_are_a_conflict(sequence):
    k, v = random_tokens(3)
    sequence.append(0, k, v)
    k[0, 1, 0, 0] ^= 1
    with pytest.raises(KvServiceError) as refused:
        sequence.append(0, k, v)
    assert refused.value.code is grpc.StatusCode.FAILED_PRECONDITION
    assert refused.value.reason == "APPEND_CONFLICT"


def test_a_gap_names_the_current_length(sequence):
    fill(sequence, 5)
    k, v = random_tokens(1)
    with pytest.raises(KvServiceError) as refused:
        sequence.append(7, k[0], v[0], layer=0)
    assert refused.value.code is grpc.StatusCode.OUT_OF_RANGE
    assert refused.value.reason == "POSITION_GAP"
    assert refused.value.metadata["current_length"] == "5"


def test_a_row_error_is_raised_by_attend(sequence):
    fill(sequence, 5)
    k, v = random_tokens(1)
    with pytest.raises(KvServiceError) as refused:
        sequence.attend(0, random_query(), k[0, 0], v[0, 0], position=9, policy=DENSE)
    assert refused.value.reason == "POSITION_GAP"


def test_a_long_append_is_cut_into_messages(sequence):
    k, v = random_tokens(2500)
    assert sequence.append(0, k, v).message_count > CONFIG.layer_count
    assert sequence.describe().length_tokens == 2500


def test_forks_grow_apart(sequence):
    oracle = fill(sequence, 100)
    with sequence.fork() as child, sequence.fork(64) as shorter:
        assert child.id != sequence.id
        assert shorter.describe().length_tokens == 64
        attend_both(child, oracle, 0, DENSE, 100)
        assert child.describe().length_max_tokens == 101
        assert sequence.describe().length_max_tokens == 100


def test_token_ids_bring_what_is_there_already(client, sequence):
    ids = np.arange(1000, 1200, dtype=np.uint32)
    k, v = random_tokens(200, seed=11)
    with client.sequence(MODEL, token_ids=ids) as first:
        assert first.matched_tokens == 0
        first.append(0, k, v)
        assert first.describe().matchable_tokens == 192
        with client.sequence(MODEL, token_ids=ids.tolist() + [7]) as second:
            assert second.matched_tokens == second.describe().length_tokens == 192
            second.append(192, k[:, 192:], v[:, 192:])
            q = random_query()
            ours = second.attend(1, q, position=199, policy=DENSE)
            theirs = first.attend(1, q, position=199, policy=DENSE)
            np.testing.assert_array_equal(ours.out, theirs.out)
    assert sequence.matched_tokens == 0


def test_truncate_moves_to_a_new_generation(sequence):
    fill(sequence, 100)
    before = sequence.generation
    assert sequence.truncate(40).length_tokens == 40
    assert sequence.generation > before
    sequence._handle.generation = before
    with pytest.raises(KvServiceError) as refused:
        sequence.truncate(30)
    assert refused.value.reason == "GENERATION_MISMATCH"


def test_leaving_the_block_drops_the_sequence(client):
    with client.sequence(MODEL) as dropped:
        pass
    with pytest.raises(KvServiceError) as refused:
        dropped.describe()
    assert refused.value.code is grpc.StatusCode.NOT_FOUND
    assert refused.value.reason == "SEQUENCE_NOT_FOUND"


def test_a_wrong_shape_names_the_field(sequence):
    fill(sequence, 5)
    with pytest.raises(KvServiceError) as refused:
        sequence.attend(0, random_query()[:, :32], position=4, policy=DENSE)
    assert refused.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.value.field.startswith("q")


def test_an_unknown_model(client):
    with pytest.raises(KvServiceError) as refused:
        client.sequence("no such model")
    assert refused.value.code is grpc.StatusCode.NOT_FOUND


def test_nobody_listens(tmp_path):
    with Client(f"unix:{tmp_path}/nobody.sock") as nobody:
        with pytest.raises(KvServiceError) as refused:
            nobody.sequence(MODEL)
        assert refused.value.code is grpc.StatusCode.UNAVAILABLE
        with pytest.raises(TimeoutError):
            nobody.wait_until_ready(0.05)
