"""Log-probs of the distribution that was sampled: support, temperature, sampling, and the real engine against the learner."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from collm.algorithms.logprobs import likeliest, sample, support, token_logprobs
from collm.engines.local import LocalEngine
from collm.learning.batch import Batch
from collm.learning.pack import micro_batches, pack_answers
from collm.models.policy import Policy
from collm.models.team import Team
from collm.types import Message, Request, Sampling

PLAIN = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
LARGEST_BELOW_ONE = np.nextafter(np.float32(1), np.float32(0)).item()


def logits(*probabilities):
    return torch.tensor(probabilities, dtype=torch.float64).log()


def inside(rows, *, top_p, top_k, temperature=1.0):
    """The support as a mask over the vocabulary."""
    ids, kept = support(rows / temperature, top_p=top_p, top_k=top_k)
    mask = torch.zeros_like(rows, dtype=torch.bool)
    mask[kept.nonzero()[:, 0], ids[kept]] = True
    assert mask.sum() == kept.sum()  # no token twice
    return mask


def kept(row, **options):
    return inside(row[None], **{"top_p": 1.0, "top_k": 0, **options})[0].nonzero()[:, 0].tolist()


def by_sorting_all(rows, *, top_p, top_k):
    """The support by its definition, from the whole vocabulary in falling order."""
    values, order = torch.sort(rows, dim=-1, descending=True, stable=True)
    limit = top_k or rows.shape[-1]
    probs = torch.softmax(values[:, :limit], dim=-1)
    chosen = (probs.cumsum(-1) - probs < top_p) | (top_p == 1)
    chosen[:, 0] = True
    return torch.zeros_like(rows, dtype=torch.bool).scatter(-1, order[:, :limit], chosen)


# --- support -------------------------------------------------------------------------------------------------------------

UNSORTED = logits(0.1, 0.4, 0.2, 0.3)  # in falling order: 1, 3, 2, 0; sums 0.4, 0.7, 0.9, 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0, 1, 2, 3]),
        ({"top_k": 1}, [1]),
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 99}, [0, 1, 2, 3]),
        ({"top_p": 1e-9}, [1]),
        ({"top_p": 0.39}, [1]),
        ({"top_p": 0.41}, [1, 3]),
        ({"top_p": 0.69}, [1, 3]),
        ({"top_p": 0.71}, [1, 2, 3]),
        ({"top_p": 0.91}, [0, 1, 2, 3]),
        # After top-k = 3 the rest weighs 4/9, 3/9, 2/9: two of them reach 0.72 (7/9), while unrenormalized 0.7 would not.
        ({"top_p": 0.72, "top_k": 3}, [1, 3]),
        ({"top_p": 0.78, "top_k": 3}, [1, 2, 3]),
        ({"top_p": 0.5, "top_k": 1}, [1]),
    ],
)
def test_support_by_hand(options, expected):
    assert kept(UNSORTED, **options) == expected


def test_ties_go_to_the_lower_id():
    assert kept(torch.zeros(6), top_k=2) == [0, 1]
    assert kept(torch.tensor([0.0, 2, 1, 2, 2]), top_k=2) == [1, 3]
    assert kept(torch.zeros(4), top_p=0.5) == [0, 1]  # quarters are exact: two of them reach one half
    assert kept(torch.zeros(4), top_p=0.6) == [0, 1, 2]
    assert kept(torch.zeros(50_000), top_k=3) == [0, 1, 2]


def many_rows():
    """Peaked and flat rows, rows of few distinct values, and equal logits; one likely token among equal ones."""
    torch.manual_seed(3)
    rows = torch.randn(12, 3000, dtype=torch.float64)
    rows[0:3] *= 6
    rows[3:6] *= 3
    rows[6:8] = (4 * rows[6:8]).round() / 2
    rows[8] = 0
    rows[9] = rows[9].round()
    rows[10] = 0
    rows[10, 1234] = 9
    rows[11] *= 0.1
    return rows


@pytest.mark.parametrize("top_k", [0, 1, 20, 2000])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.6, 0.95, 0.9999, 1.0])
def test_candidates_have_the_support_of_the_whole_vocabulary(top_p, top_k):
    rows = many_rows()
    expected = by_sorting_all(rows, top_p=top_p, top_k=top_k)
    assert torch.equal(inside(rows, top_p=top_p, top_k=top_k), expected)
    for row, alone in zip(rows, expected, strict=True):  # without the flat rows there are few candidates
        assert torch.equal(inside(row[None], top_p=top_p, top_k=top_k)[0], alone)


def test_peaked_rows_have_few_candidates():
    rows = many_rows()[[0, 1, 2, 10]]
    assert support(rows, top_p=0.6, top_k=0)[0].shape[-1] < 40
    assert support(rows[:3], top_p=1.0, top_k=20)[0].shape[-1] == 20


def test_rows_have_supports_of_their_own():
    rows = torch.stack([UNSORTED, UNSORTED.flip(0)])
    both = inside(rows, top_p=0.69, top_k=0)
    assert both[0].tolist() == [False, True, False, True]
    assert both[1].tolist() == [True, False, True, False]


# --- log-probs of given tokens -------------------------------------------------------------------------------------------

GRID = [
    {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    for temperature in (0.3, 0.6, 1.0, 1.7)
    for top_p in (0.2, 0.6, 0.95, 1.0)
    for top_k in (0, 1, 5, 1000)
]


def test_probabilities_sum_to_one_over_the_support():
    torch.manual_seed(0)
    row = 3 * torch.randn(40).double()
    for options in GRID:
        tokens = inside(row[None], **options)[0].nonzero()[:, 0]
        logp = token_logprobs(row.expand(len(tokens), 40), tokens, **options)
        assert logp.exp().sum().item() == pytest.approx(1.0, abs=1e-12), options
        assert (logp <= 1e-12).all()


def test_temperature_by_hand_and_leaving_it_out_is_another_number():
    # z = (0, ln 4). T = 0.5: odds 1:16. T = 2: odds 1:2. T = 1, the wrong variant for both: 1:4.
    row, tokens = torch.tensor([[0.0, math.log(4)]] * 2, dtype=torch.float64), torch.tensor([0, 1])
    for temperature, odds in ((0.5, 16), (2.0, 2), (1.0, 4)):
        got = token_logprobs(row, tokens, temperature=temperature, top_p=1.0, top_k=0)
        assert got.exp().tolist() == pytest.approx([1 / (1 + odds), odds / (1 + odds)])


def test_the_temperature_comes_before_the_support():
    # p = (0.6, 0.4). At T = 0.25 the odds are 0.6^4 : 0.4^4 = 81:16, so 0.7 is reached by one token; at T = 1 by two.
    row = logits(0.6, 0.4)[None]
    assert token_logprobs(row, torch.tensor([0]), temperature=0.25, top_p=0.7, top_k=0).item() == 0.0
    assert token_logprobs(row, torch.tensor([0]), temperature=1.0, top_p=0.7, top_k=0).item() == pytest.approx(math.log(0.6))


def test_a_sampled_token_is_always_kept():
    # top_k = 1 keeps token 1 (0.4); token 2 (0.2) was sampled, so its support is {1, 2}: 0.2 / 0.6.
    got = token_logprobs(UNSORTED[None], torch.tensor([2]), temperature=1.0, top_p=1.0, top_k=1)
    assert got.exp().item() == pytest.approx(1 / 3)
    for options in GRID:
        for token in range(4):
            assert torch.isfinite(token_logprobs(UNSORTED[None], torch.tensor([token]), **options)).all()


def test_greedy_answers_have_logprobs_at_temperature_one():
    got = token_logprobs(UNSORTED[None], torch.tensor([1]), temperature=0.0, top_p=0.5, top_k=1)
    assert got.exp().item() == pytest.approx(0.4)


def test_gradient_stays_inside_the_support():
    row = UNSORTED[None].clone().requires_grad_()
    token_logprobs(row, torch.tensor([3]), temperature=0.5, top_p=1.0, top_k=2).sum().backward()
    # Support {1, 3} with odds 0.16 : 0.09. d/dz = (e_3 - p) / T: p = (0.64, 0.36), so -0.64/0.5 and 0.64/0.5.
    assert row.grad[0].tolist() == pytest.approx([0.0, -1.28, 0.0, 1.28])


def test_low_precision_logits_are_scored_in_float32():
    row = (5 * torch.randn(3, 1000)).bfloat16()
    tokens = torch.tensor([1, 500, 999])
    got = token_logprobs(row, tokens, **PLAIN)
    assert got.dtype == torch.float32
    assert torch.equal(got, token_logprobs(row.float(), tokens, **PLAIN))


# --- sampling ------------------------------------------------------------------------------------------------------------


def test_sampling_inverts_the_distribution_function():
    rows = logits(0.25, 0.5, 0.25).expand(6, 3)
    tokens, logp = sample(rows, torch.tensor([0.0, 0.2, 0.3, 0.7, 0.8, 0.999]), **PLAIN)
    assert tokens.tolist() == [0, 0, 1, 1, 2, 2]
    assert logp.exp().tolist() == pytest.approx([0.25, 0.25, 0.5, 0.5, 0.25, 0.25])


@pytest.mark.parametrize(
    "options", [PLAIN, {"temperature": 0.6, "top_p": 0.9, "top_k": 0}, {"temperature": 1.5, "top_p": 0.8, "top_k": 6}]
)
def test_sampled_frequencies_are_the_probabilities(options):
    torch.manual_seed(1)
    V, count = 12, 40_000
    row = torch.randn(V)
    possible = inside(row[None], **options)[0]
    expected = torch.softmax((row / options["temperature"]).masked_fill(~possible, float("-inf")), -1).double()
    uniforms = torch.from_numpy(np.random.default_rng(5).random(count, dtype=np.float32))
    tokens, _ = sample(row.expand(count, V), uniforms, **options)
    counts = torch.bincount(tokens, minlength=V).double()
    assert counts[~possible].sum() == 0
    statistic = ((counts - count * expected)[possible] ** 2 / (count * expected)[possible]).sum().item()
    degrees = int(possible.sum()) - 1
    assert statistic < degrees + 4 * math.sqrt(2 * degrees), statistic  # mean and four deviations of a chi-square
    even, _ = sample(
        row.expand(count, V), (torch.arange(count) + 0.5) / count, **options
    )  # evenly spread: exact to a draw or two
    assert (torch.bincount(even, minlength=V).double() - count * expected).abs().max() <= 2


def test_temperature_left_out_fails_the_frequency_test():
    row, count = torch.tensor([0.0, 1.0, 2.0]), 10_000
    tokens, _ = sample(row.expand(count, 3), (torch.arange(count) + 0.5) / count, temperature=0.5, top_p=1.0, top_k=0)
    frequency = torch.bincount(tokens, minlength=3) / count
    assert (frequency - torch.softmax(row, -1)).abs().max() > 0.1


@pytest.mark.parametrize("V", [3, 1000, 151_936])
def test_impossible_tokens_are_never_drawn(V):
    """At both ends of the uniform numbers, with impossible tokens first, in the middle and last."""
    torch.manual_seed(V)
    row = torch.randn(V)
    row[0] = row[-1] = float("-inf")
    if V > 3:
        row[V // 2 : V // 2 + 200] = -1e5  # their probability is 0 in float32
    uniforms = torch.tensor([0.0, 1e-30, 0.5, LARGEST_BELOW_ONE, 1.0 - 1e-9], dtype=torch.float64)
    for given in (uniforms, uniforms.float().clamp_max(LARGEST_BELOW_ONE)):
        for options in (PLAIN, {"temperature": 0.7, "top_p": 0.9, "top_k": 0}, {"temperature": 1.0, "top_p": 1.0, "top_k": 40}):
            tokens, logp = sample(row.expand(len(given), V), given, **options)
            allowed = inside(row[None], **options)[0] & (torch.softmax(row / options["temperature"], -1) > 0)
            assert allowed[tokens].all()
            assert torch.isfinite(logp).all()


def test_a_sampled_logprob_is_that_of_scoring_the_token():
    torch.manual_seed(2)
    rows, uniforms = 2 * torch.randn(200, 50), torch.rand(200)
    for options in GRID:
        tokens, logp = sample(rows, uniforms, **options)
        assert torch.allclose(logp, token_logprobs(rows, tokens, **options), atol=1e-5)


def test_a_row_does_not_depend_on_its_batch():
    torch.manual_seed(3)
    rows, uniforms = torch.randn(16, 500), torch.rand(16)
    for options in (PLAIN, {"temperature": 0.6, "top_p": 0.6, "top_k": 20}):
        tokens, logp = sample(rows, uniforms, **options)
        for b in range(16):
            token, alone = sample(rows[b : b + 1], uniforms[b : b + 1], **options)
            assert token.item() == tokens[b].item()
            assert alone.item() == pytest.approx(logp[b].item(), abs=1e-6)


def test_temperature_zero_takes_the_likeliest_whatever_the_number():
    rows = UNSORTED.expand(3, 4)
    tokens, logp = sample(rows, torch.tensor([0.0, 0.5, LARGEST_BELOW_ONE]), temperature=0.0, top_p=0.3, top_k=1)
    assert tokens.tolist() == [1, 1, 1]
    assert logp.exp().tolist() == pytest.approx([0.4] * 3)


# --- the engine and the learner ------------------------------------------------------------------------------------------

REPEATED = [
    Sampling(temperature=1.0, max_tokens=48),
    Sampling(temperature=0.6, top_p=0.6, max_tokens=48),
    Sampling(temperature=0.6, top_p=0.6, top_k=20, max_tokens=48),
]


def recomputed(policy, groups, sampling, *, max_tokens=4000):
    """(recorded, recomputed) log-probs of all answers of both builders, from packed sequences."""
    batch = Batch.of(groups, ("builder_0", "builder_1"))
    recorded, again = [], []
    with torch.no_grad():
        for agent in batch.agents:
            for micro in micro_batches(pack_answers(batch, agent, policy), max_tokens, policy.device):
                hidden = policy.hidden(micro.ids_BL)[micro.row_K, micro.column_K]
                again.append(policy.score(hidden, micro.token_K, sampling))
                recorded.append(micro.old_logp_K)
    return torch.cat(recorded), torch.cat(again)


@pytest.mark.parametrize("sampling", REPEATED, ids=["T1", "T0.6-p0.6", "T0.6-p0.6-k20"])
@pytest.mark.parametrize("history", ["full", "last"])
def test_a_fresh_sample_is_scored_as_it_was_recorded(tiny, sampled, sampling, history):
    recorded, again = recomputed(tiny, sampled(sampling, history), sampling)
    assert len(recorded) > 300
    assert (recorded < 0).sum() > 20  # not all certain
    assert (recorded - again).abs().max() < 1e-4


def test_scoring_with_another_distribution_fails(tiny, sampled):
    made = REPEATED[2]
    for wrong in (
        Sampling(temperature=1.0, top_p=0.6, top_k=20),
        Sampling(temperature=0.6),
        Sampling(temperature=0.6, top_p=0.9, top_k=20),
    ):
        recorded, again = recomputed(tiny, sampled(made), wrong)
        assert (recorded - again).abs().max() > 0.1


def test_scoring_in_chunks_changes_neither_logprobs_nor_gradient(tiny, monkeypatch):
    torch.manual_seed(6)
    vocabulary = len(tiny.head.weight)
    hidden, tokens = torch.randn(20, 128), torch.randint(vocabulary, (20,))
    results = []
    for limit in (1 << 25, vocabulary * 7, 1):
        monkeypatch.setattr("collm.models.policy.LOGITS_AT_ONCE", limit)
        given = hidden.clone().requires_grad_()
        logp = tiny.score(given, tokens, Sampling(temperature=0.6, top_p=0.9))
        logp.square().sum().backward()
        results.append((logp.detach(), given.grad))
    tiny.model.zero_grad(set_to_none=True)
    for logp, gradient in results[1:]:
        assert torch.allclose(logp, results[0][0], atol=1e-5)
        assert torch.allclose(gradient, results[0][1], atol=1e-3)


PROMPTS = ("Name one colour.", "x", "You are builder_0. Build IT.\nBox: x 0..11 right, y 0..4 up, z 0.", "again " * 40, "?\n")


def absolute_positions(tiny):
    """A small untrained GPT-2: unlike rotary ones, its positions are absolute, so left padding must not shift them."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 1536, "n_positions": 256, "n_embd": 32, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=3, initializer_range=0.3))
    return Policy(model, tiny.tokenizer)


def requests(sampling, prompts=PROMPTS):
    return [Request("a", (Message("user", text),), sampling, seed=100 + i) for i, text in enumerate(prompts)]


@pytest.mark.parametrize("kind", ["tiny", "absolute positions"])
def test_greedy_answers_are_those_of_transformers(tiny, kind):
    policy = tiny if kind == "tiny" else absolute_positions(tiny)
    answers = LocalEngine(Team({"a": policy})).generate(requests(Sampling(temperature=0.0, max_tokens=40)))
    lengths = set()
    for answer in answers:
        prompt = torch.tensor(answer.prompt_ids[None].astype(np.int64))
        with torch.no_grad():
            theirs = policy.model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=40)
        theirs = theirs[0, prompt.shape[1] :].tolist()
        assert answer.token_ids.tolist() == theirs
        assert answer.finish_reason == ("stop" if theirs[-1] == 3 else "length")
        lengths.add(len(answer.prompt_ids))
    assert len(lengths) >= 4  # prompts of different lengths shared one batch
    assert kind != "tiny" or len({len(answer.token_ids) for answer in answers}) > 1  # some rows left the batch before others


@pytest.mark.parametrize("sampling", REPEATED, ids=["T1", "T0.6-p0.6", "T0.6-p0.6-k20"])
def test_an_answer_does_not_depend_on_the_batch(tiny, sampling):
    together = LocalEngine(Team({"a": tiny})).generate(requests(sampling))
    small = LocalEngine(Team({"a": tiny}), batch_tokens=200).generate(requests(sampling))
    backwards = LocalEngine(Team({"a": tiny})).generate(requests(sampling)[::-1])[::-1]
    for i, request in enumerate(requests(sampling)):
        (alone,) = LocalEngine(Team({"a": tiny})).generate([request])
        for other in (together[i], small[i], backwards[i]):
            assert other.token_ids.tolist() == alone.token_ids.tolist()
            assert np.allclose(other.logprobs, alone.logprobs, atol=1e-4)
            assert other.text == alone.text


def test_the_seed_alone_decides_an_answer(tiny):
    engine, sampling = LocalEngine(Team({"a": tiny, "b": tiny})), Sampling(max_tokens=24)
    chat = (Message("user", "Build IT together."),)
    one, same, other, mate = engine.generate(
        [
            Request("a", chat, sampling, 5),
            Request("a", chat, sampling, 5),
            Request("a", chat, sampling, 6),
            Request("b", chat, sampling, 5),
        ]
    )
    assert one.token_ids.tolist() == same.token_ids.tolist() == mate.token_ids.tolist()
    assert one.token_ids.tolist() != other.token_ids.tolist()


def test_generation_records_no_gradient_and_leaves_dropout_out(tiny):
    seen = []
    hook = tiny.body.register_forward_hook(lambda module, *_: seen.append((torch.is_grad_enabled(), module.training)))
    assert torch.is_grad_enabled()
    LocalEngine(Team({"a": tiny})).generate([Request("a", (Message("user", "Hello"),), Sampling(max_tokens=2), seed=0)])
    hook.remove()
    assert seen
    assert set(seen) == {(False, False)}


def test_requests_with_different_sampling_share_a_call(tiny):
    """Each answer obeys its own limit and temperature, and answers come back in the order of the requests."""
    engine = LocalEngine(Team({"a": tiny}))
    chat = (Message("user", "again " * 30),)
    settings = [Sampling(max_tokens=n, temperature=t) for n, t in ((3, 1.0), (9, 0.0), (1, 1.0), (3, 0.5), (9, 0.0))]
    answers = engine.generate([Request("a", chat, s, seed=i) for i, s in enumerate(settings)])
    for answer, sampling, seed in zip(answers, settings, range(5), strict=True):
        (alone,) = engine.generate([Request("a", chat, sampling, seed=seed)])
        assert answer.token_ids.tolist() == alone.token_ids.tolist()
        assert 1 <= len(answer.token_ids) <= sampling.max_tokens
    assert engine.generate([]) == []


# --- the likeliest tokens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {1: 0.4, 3: 0.3}),
        ({"top_k": 1}, {1: 1.0}),
        ({"top_p": 0.7}, {1: 4 / 7, 3: 3 / 7}),
        ({"temperature": 0.5}, {1: 0.16 / 0.30, 3: 0.09 / 0.30}),
        ({"temperature": 0}, {1: 0.4, 3: 0.3}),  # greedy answers: those at temperature 1
    ],
)
def test_the_likeliest_tokens_have_the_log_probs_of_the_sampling_distribution(options, expected):
    found = likeliest(UNSORTED, 2, **{**PLAIN, **options})
    assert [i for i, _ in found] == list(expected)
    assert [math.exp(value) for _, value in found] == pytest.approx(list(expected.values()))
    assert len(likeliest(UNSORTED, 9, **{**PLAIN, **options})) == {1: 1, 0.7: 2}.get(next(iter(options.values()), 0), 4)
