"""Adapters: one base in memory whatever the number of agents, what learns, files that PEFT reads, exact resume."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import model, tokenizer
from learners import critic_parts, optimizers, policy_parts
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from test_families import PLAIN, close, critic_pass, episodes, policy_pass, precision, resumes_exactly
from test_learning import make_trainer, solves
from test_pack import apart
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from collm.algorithms import losses
from collm.engines.local import LocalEngine
from collm.errors import ConfigError, RunError
from collm.learning.learner import Learner
from collm.learning.pack import micro_batches, pack_answers, pack_readings
from collm.models.adapters import Base
from collm.models.critic import Critic
from collm.models.policy import Policy
from collm.models.recompute import recompute_layers
from collm.models.sources import resolve
from collm.models.team import Team
from collm.runs.directory import read_config
from collm.runs.weights import load_team
from collm.settings.load import parse_config
from collm.settings.rooms import LoraSettings
from collm.training.assemble import make_learner, make_team
from collm.types import Message, Request, Sampling

IDS = torch.tensor([[1, 40, 50, 60, 3, 2]])
EMBEDDING = (1536, 128)  # of the tiny model, which has two such matrices: it is untied


def lora(**settings: Any) -> dict[str, Any]:
    return {"lora": {"rank": 4, **settings}}


def learner_of(agents: int = 2, algorithm: dict[str, Any] | None = None, **rooms: dict[str, Any]) -> Learner:
    config = parse_config(
        {
            "env": {"name": "agree", "wording": "terse", "agents": agents},
            "algorithm": algorithm or {"name": "collm-cc"},
            "run": {"device": "cpu"},
            **{"team": lora(), "critic": {"body": "auto"}, **rooms},
        }
    )
    team = make_team(config, tuple(f"agent_{n}" for n in range(agents)))
    return make_learner(team, config, Sampling(max_tokens=4))


def stirred(policy: Policy, seed: int) -> Policy:
    """An adapter that does something: B is zero before training."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in policy.adapter.tensors().items():
        if "lora_B" in name:
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.05)
    return policy


def pair(family: str = "llama3", **settings: Any) -> tuple[Policy, Policy]:
    """Two adapters that differ, on one small base."""
    base = Base(model(family), tokenizer(family))
    made = [base.add(LoraSettings(rank=4, **settings), seed) for seed in (1, 2)]
    one, two = (Policy(base.model, base.tokenizer, adapter=adapter) for adapter in made)
    return stirred(one, 1), stirred(two, 2)


def logits(policy: Policy, ids: Tensor = IDS) -> Tensor:
    return policy.logits(policy.hidden(ids)[0]).detach()


# --- one base ------------------------------------------------------------------------------------------------------------


def storages() -> dict[int, int]:
    """Bytes of every distinct storage of a tensor that is alive."""
    gc.collect()
    alive = (thing for thing in gc.get_objects() if issubclass(type(thing), Tensor))
    found = [tensor.untyped_storage() for tensor in alive if tensor.device.type == "cpu"]
    return {storage.data_ptr(): storage.nbytes() for storage in found}


@pytest.mark.parametrize("agents", [2, 8])
def test_a_team_and_its_critic_hold_one_copy_of_the_base(agents: int) -> None:
    """Counted twice: storages of the parameters that anybody holds, and storages that came to be in the whole process."""
    learner_of(2)  # what is made once in a process, such as caches of the tokenizer, is there now
    before = storages()
    learner = learner_of(agents, {"name": "collm-cc", "kl_coef": 0.1})
    new = {place: size for place, size in storages().items() if place not in before}
    policies, critic = [part.policy for part in policy_parts(learner).values()], critic_parts(learner)[0].critic
    assert len(policies) == agents
    assert len({id(policy.model) for policy in policies}) == 1

    held = [p for policy in policies for m in (policy.model, policy.trained) for p in m.parameters()]
    held += [p for p in critic.parameters()]
    references = [part.reference for part in policy_parts(learner).values()]
    held += [p for reference in references for m in (reference.model, reference.body) for p in m.parameters()]
    distinct = {p.data_ptr(): p.numel() for p in held}
    adapter = sum(p.numel() for p in policies[0].trained.parameters())
    base = sum(p.numel() for p in Policy.from_pretrained("tiny").model.parameters())
    head = sum(p.numel() for p in critic.value.parameters())
    assert sum(distinct.values()) == base + (agents + 1) * adapter + head
    assert len([p for p in {p.data_ptr(): p for p in held}.values() if tuple(p.shape) == EMBEDDING]) == 2

    states = [tensor for module in learner.regressions.modules().values() for tensor in module.state_dict().values()]
    buffers = 4096 * 32 * 4 + sum(tensor.nbytes for tensor in states)  # tables of positions and the like; the regressions
    assert 4 * sum(distinct.values()) <= sum(new.values()) <= 4 * sum(distinct.values()) + buffers
    assert sum(size == 4 * EMBEDDING[0] * EMBEDDING[1] for size in new.values()) == 2


def test_whole_models_would_be_counted_as_several() -> None:
    """The wrong variant: the count above can fail."""
    learner = learner_of(2, team={"lora": "none"})
    held = [p for part in policy_parts(learner).values() for p in part.policy.model.parameters()]
    assert len({p.data_ptr() for p in held if tuple(p.shape) == EMBEDDING}) == 4


def test_a_mixture_holds_each_whole_model_and_one_base() -> None:
    learner = learner_of(4, team=lora(agents=["agent_1", "agent_3"]))
    kinds = [part.policy.adapter is not None for part in policy_parts(learner).values()]
    assert kinds == [False, True, False, True]
    held = [p for part in policy_parts(learner).values() for p in part.policy.model.parameters()]
    held += list(critic_parts(learner)[0].critic.parameters())
    assert len({p.data_ptr() for p in held if tuple(p.shape) == EMBEDDING}) == 2 * 3
    assert critic_parts(learner)[0].critic.body.base is policy_parts(learner)["agent_1"].policy.adapter.base


def test_a_critic_may_be_a_whole_model() -> None:
    learner = learner_of(2, critic={"body": "model"})
    critic = critic_parts(learner)[0].critic
    assert sum(p.numel() for p in critic.parameters()) > 500_000
    assert all(p.requires_grad for p in critic.parameters())


def test_shared_agents_share_an_adapter() -> None:
    learner = learner_of(3, team={**lora(), "shared": True})
    assert list(policy_parts(learner)) == ["agent_0"]


# --- what an adapter does ------------------------------------------------------------------------------------------------


def test_a_new_adapter_changes_nothing_and_seeds_decide_its_start(tiny: Policy) -> None:
    one = Policy.from_pretrained("tiny", lora=LoraSettings(rank=4), seed=1)
    assert torch.equal(logits(one), logits(tiny))
    again, other = (Policy.from_pretrained("tiny", lora=LoraSettings(rank=4), seed=seed) for seed in (1, 2))
    a, b, c = (policy.adapter.tensors() for policy in (one, again, other))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not any(torch.equal(a[name], c[name]) for name in a if "lora_A" in name)
    assert all((a[name] == 0).all() for name in a if "lora_B" in name)


def test_an_adapter_is_w_plus_alpha_over_rank_b_a() -> None:
    one, _ = pair(alpha=12.0)
    merged = model("llama3")
    modules = dict(merged.named_modules())
    with torch.no_grad():
        for path, part in one.adapter.pairs.items():
            modules[path].weight += 12.0 / 4 * part["B"].weight @ part["A"].weight
    assert torch.allclose(logits(one), merged(input_ids=IDS).logits[0], atol=1e-5)
    assert not torch.allclose(logits(one), model("llama3")(input_ids=IDS).logits[0], atol=1e-2)


def test_adapters_of_one_base_do_not_see_each_other() -> None:
    one, two = pair()
    first, second = logits(one), logits(two)
    assert not torch.allclose(first, second, atol=1e-2)
    assert torch.equal(logits(one), first)  # after the other one was active
    hidden = one.hidden(IDS)
    logits(two)
    hidden.square().sum().backward()  # while the other one is active
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in one.trained.parameters())
    assert all(p.grad is None for p in two.trained.parameters())
    assert all(p.grad is None for p in one.adapter.base.model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("double", [True, False], ids=["float64", "float32"])
def test_one_pass_and_one_pass_per_turn_are_the_same(double: bool) -> None:
    policy, other = pair()
    critic = Critic(other.adapter, other.tokenizer)
    torch.nn.init.normal_(critic.value.weight, std=0.02)
    if double:
        policy.model.double()
        critic.value.double()
    batch = episodes(policy, PLAIN)
    readings, _ = pack_readings(batch, critic, ("a", "b"), state=False, kind="V")
    with precision(double) as tolerance:
        for run, of, packed in (
            (policy_pass, policy, pack_answers(batch, "a", policy)),
            (critic_pass, critic, readings),
        ):
            for together, alone in zip(run(of, packed), run(of, apart(packed)), strict=True):
                close(together, alone, tolerance)


def test_answers_of_two_adapters_come_from_each_one_s_own_weights() -> None:
    one, two = pair()
    sampling = Sampling(max_tokens=8)
    requests = [
        Request(agent, (Message("user", text),), sampling, seed=n) for n, text in enumerate("xyz") for agent in ("one", "two")
    ]
    together = LocalEngine(Team({"one": one, "two": two})).generate(requests)
    for completion in together:
        policy = one if completion.agent == "one" else two
        ids = torch.tensor([[*completion.prompt_ids.tolist(), *completion.token_ids.tolist()]])
        start = len(completion.prompt_ids)
        expected = logits(policy, ids).log_softmax(-1)[start - 1 : -1].gather(1, ids[0, start:, None])[:, 0]
        assert torch.allclose(torch.from_numpy(completion.logprobs), expected, atol=1e-4)


# --- what learns ---------------------------------------------------------------------------------------------------------


def test_only_adapters_learn_and_stay_float32_on_a_bfloat16_base(tmp_path: Path) -> None:
    team = {**lora(), "compute": "bfloat16"}
    trainer = make_trainer(tmp_path, "collm-cc", 2, 0, team=team, learner={"lr": 5e-6}, run={"iterations": 3})
    base = trainer.team.policies["agent_0"].adapter.base
    frozen = {name: p.clone() for name, p in base.model.named_parameters() if "lora_" not in name}
    assert {p.dtype for p in frozen.values()} == {torch.bfloat16}
    trained = {agent: dict(policy.trained.named_parameters()) for agent, policy in trainer.team.policies.items()}
    before = {agent: {name: p.detach().clone() for name, p in own.items()} for agent, own in trained.items()}
    trainer.run()
    for name, p in base.model.named_parameters():
        if name in frozen:
            assert torch.equal(p, frozen[name]), name
    for agent, own in trained.items():
        assert {p.dtype for p in own.values()} == {torch.float32}
        moved = [(p != before[agent][name]).float().mean().item() for name, p in own.items()]
        assert min(moved) > 0.9
        listed = [p for group in optimizers(trainer.learner)[agent].param_groups for p in group["params"]]
        assert {id(p) for p in listed} == {id(p) for p in own.values()}
    for optimizer in optimizers(trainer.learner).values():
        assert all(entry["exp_avg"].dtype == torch.float32 for entry in optimizer.state.values())


def test_on_a_bfloat16_base_no_input_is_copied_to_float32_and_the_numbers_are_peft_s() -> None:
    """Adapters are float32; PEFT casts every layer's input to float32, which autocast then casts back."""
    policy = stirred(Policy.from_pretrained("tiny", compute="bfloat16", lora=LoraSettings(rank=4), seed=0), 0)
    layers = list(policy.adapter.base.layers.values())
    seen: list[torch.dtype] = []
    for layer in layers:
        layer.lora_A[policy.adapter.name].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))

    def hidden_and_gradients() -> list[Tensor]:
        hidden_BLD = policy.hidden(IDS)
        weights = list(policy.adapter.parameters())
        return [hidden_BLD, *torch.autograd.grad(hidden_BLD.float().square().sum(), weights)]

    ours = hidden_and_gradients()
    assert set(seen) == {torch.bfloat16}
    assert len(seen) == len(layers)
    for layer in layers:
        layer.cast_input_dtype_enabled = True
    assert all(torch.equal(a, b) for a, b in zip(ours, hidden_and_gradients(), strict=True))
    assert torch.equal(policy.adapter(input_ids=IDS, use_cache=False).last_hidden_state, ours[0]), "also outside autocast"


def test_the_reference_of_kl_penalties_is_the_base_without_adapter() -> None:
    learner = learner_of(2, {"name": "magrpo", "kl_coef": 0.1})
    part = policy_parts(learner)["agent_0"]
    reference, policy = part.reference, part.policy
    assert reference.model is policy.model
    before = logits(reference)
    assert torch.equal(logits(stirred(policy, 3)), logits(policy))
    assert not torch.allclose(logits(policy), before, atol=1e-3)
    assert torch.equal(logits(reference), before)


def test_the_reference_of_an_adapter_that_was_trained_before_is_that_adapter() -> None:
    one, _ = pair()
    reference, before = one.frozen_copy(), logits(one)
    assert reference.model is one.model
    assert not any(p.requires_grad for p in reference.trained.parameters())
    stirred(one, 9)
    assert torch.equal(logits(reference), before)
    assert not torch.allclose(logits(one), before, atol=1e-2)


def loss_and_gradient(policy: Policy) -> tuple[Tensor, Tensor]:
    policy.trained.zero_grad()
    batch = episodes(policy, PLAIN)
    total = torch.zeros(())
    for micro in micro_batches(pack_answers(batch, "a", policy), 200, policy.device):
        logp = policy.score(policy.hidden(micro.ids_BL)[micro.row_K, micro.column_K], micro.token_K, Sampling())
        loss, _ = losses.reinforce(logp, micro.answer_K, torch.linspace(-1, 1, len(micro.slot_S)), num_answers=6)
        loss.backward()
        total += loss.detach()
    return total, torch.cat([p.grad.flatten() for p in policy.trained.parameters() if p.grad is not None])


@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "whole"])
@pytest.mark.parametrize("family", ["qwen3", "llama3", "gemma3"])
def test_gradient_checkpointing_changes_no_number(family: str, adapter: bool) -> None:
    policy = pair(family)[0] if adapter else Policy(model(family), tokenizer(family))
    loss, gradient = loss_and_gradient(policy)
    recompute_layers(policy.body)
    passes = count_passes(policy)
    again, other = loss_and_gradient(policy)
    assert torch.equal(loss, again)
    assert torch.equal(gradient, other)
    assert passes == [2 * passes[1], passes[1]]  # every layer ran twice: a pass, and its repetition in the backward pass
    assert policy.model.training is False


def count_passes(policy: Policy) -> list[int]:
    """[passes through the first layer's feed-forward part, passes through the embedding], counted from now on."""
    counts = [0, 0]

    def counting(place: int) -> Any:
        def count(*_: Any) -> None:
            counts[place] += 1

        return count

    body = policy.model.base_model
    body.layers[0].mlp.register_forward_pre_hook(counting(0))
    body.get_input_embeddings().register_forward_pre_hook(counting(1))
    return counts


def test_a_repeated_pass_uses_the_adapter_of_the_first() -> None:
    one, two = pair()
    recompute_layers(one.body)
    recompute_layers(two.body)
    one.hidden(IDS).square().sum().backward()
    expected = [p.grad.clone() for p in one.trained.parameters()]
    one.trained.zero_grad()
    hidden = one.hidden(IDS)
    logits(two)
    hidden.square().sum().backward()
    assert all(torch.equal(p.grad, known) for p, known in zip(one.trained.parameters(), expected, strict=True))
    assert all(p.grad is None for p in two.trained.parameters())


# --- learning, resuming, files -------------------------------------------------------------------------------------------

TEAMS = {"adapters": lora(rank=8), "mixture": lora(rank=8, agents=["agent_1"])}
RATES = {"adapters": 1e-3, "mixture": 5e-4}  # a whole model breaks at rates that an adapter needs


@pytest.mark.slow
@pytest.mark.parametrize("name", list(TEAMS))
def test_adapters_learn_to_agree(tmp_path: Path, name: str) -> None:
    """A rate that falls to nothing: at a constant one a team may leave what it has learnt (docs/log.md)."""
    lr = RATES[name]
    rates: dict[str, Any] = {"learner": {"lr": lr, "schedule": "linear"}, "critic": {"lr": lr}}
    solves(make_trainer(tmp_path, "collm-cc", 2, 0, team=TEAMS[name], run={"iterations": 50}, **rates))


@pytest.mark.parametrize("name", list(TEAMS))
def test_what_a_run_leaves_is_read_by_plain_peft_and_by_evaluation(tmp_path: Path, name: str) -> None:
    run, learner = {"iterations": 3}, {"lr": 5e-3}
    trainer = make_trainer(tmp_path, "collm-cc", 2, 0, team=TEAMS[name], run=run, learner=learner, rollout={"tasks": 8})
    untrained = {agent: logits(policy) for agent, policy in trainer.team.policies.items()}
    trainer.run()
    base = resolve("tiny")
    for agent, policy in trainer.team.policies.items():
        assert not torch.allclose(logits(policy), untrained[agent], atol=1e-2)
        folder = trainer.folder / "final" / agent
        if policy.adapter is None:
            plain: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        else:
            assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == base
            assert not (folder / "model.safetensors").exists()
            plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder).eval()
        with torch.no_grad():
            assert torch.allclose(plain(input_ids=IDS).logits[0], logits(policy), atol=1e-4)
        assert AutoTokenizer.from_pretrained(folder).chat_template == policy.tokenizer.chat_template
    for weights in (trainer.folder / "final", trainer.folder / "checkpoints" / f"{trainer.iteration:06d}"):
        loaded = load_team(read_config(trainer.folder), weights)
        for agent, policy in trainer.team.policies.items():
            assert torch.equal(logits(loaded.policies[agent]), logits(policy)), weights


@pytest.mark.parametrize("name", list(TEAMS))
@pytest.mark.parametrize("algorithm", ["collm-cc", "collm-dc"])
def test_teams_with_adapters_resume_exactly(tmp_path: Path, name: str, algorithm: str) -> None:
    run = {"iterations": 4, "checkpoint_every": 2}
    team = TEAMS[name]
    trainer = make_trainer(tmp_path, algorithm, 2, 0, team=team, run=run, rollout={"tasks": 8}, learner={"lr": 1e-3})
    resumes_exactly(trainer)
    newest = trainer.folder / "checkpoints" / "000004"
    assert (newest / "policy-agent_1.safetensors").stat().st_size < 1_000_000  # no base in it


def test_an_adapter_s_folder_is_where_agents_can_start(tmp_path: Path) -> None:
    one = stirred(Policy.from_pretrained("tiny", lora=LoraSettings(rank=4, targets=["q_proj", "down_proj"])), 1)
    one.save(tmp_path / "one")
    team = Team.from_pretrained({"a": str(tmp_path / "one"), "b": "tiny"}, lora=LoraSettings(rank=8, agents=["b"]))
    a, b = team.policies.values()
    assert a.model is b.model
    assert torch.equal(logits(a), logits(one))
    assert not torch.equal(logits(b), logits(one))
    own = load_file(tmp_path / "one" / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in own} == {"q_proj", "down_proj"}


def test_an_adapter_that_names_its_layers_by_a_pattern_keeps_it(tmp_path: Path) -> None:
    pattern = r".*layers\.[01]\.self_attn\.(q_proj|v_proj)"
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=pattern)
    get_peft_model(AutoModelForCausalLM.from_pretrained(resolve("tiny")), config).save_pretrained(tmp_path / "one")
    policy = Policy.from_pretrained(str(tmp_path / "one"))
    assert len(policy.adapter.pairs) == 4
    policy.save(tmp_path / "two")
    assert json.loads((tmp_path / "two" / "adapter_config.json").read_text())["target_modules"] == pattern
    like = policy.adapter.base.add_like(policy.adapter, 1)
    assert {path.rpartition(".")[2] for path in like.pairs} == {"q_proj", "v_proj"}


# --- refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("team", "message"),
    [
        ({"lora": {"rank": 0}}, "team.lora.rank"),
        ({"lora": {"targets": []}}, r"team\.lora\.targets=\[\]: name at least one"),
        ({"lora": {"agents": ["agent_0", "agent_0"]}}, "each once"),
        ({"lora": {"rnk": 4}}, r"rnk"),
        ({"lora": 8}, r"\[team\.lora\]"),
        ({"lora": {"targets": ["nothing"]}}, r"team\.lora\.targets=\['nothing'\] does not fit .*linear layers are down_proj"),
        ({"lora": {"targets": ["embed_tokens"]}}, "names embeddings or the vocabulary head"),
    ],
)
def test_settings_that_cannot_be_are_one_message(team: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        learner_of(2, team=team)


def test_agents_that_the_task_has_not_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"team\.lora\.agents names nobody, but the task's agents are agent_0, agent_1"):
        make_trainer(tmp_path, "collm-cc", 2, 0, team=lora(agents=["nobody"]))


def test_damaged_and_foreign_adapters_are_one_message(tmp_path: Path) -> None:
    good = tmp_path / "good"
    Policy.from_pretrained("tiny", lora=LoraSettings(rank=4)).save(good)

    def changed(name: str, **values: Any) -> str:
        folder = tmp_path / name
        shutil.copytree(good, folder)
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
        return str(folder)

    cut = Path(changed("cut"))
    (cut / "adapter_model.safetensors").write_bytes(b"x" * 50)
    for folder, message in (
        (str(cut), "cannot be loaded"),
        (changed("rank", r=8), "it holds other tensors than a plain LoRA"),
        (changed("kind", peft_type="LOHA"), "cannot be loaded"),
        (changed("homeless", base_model_name_or_path=None), "does not name its base"),
        (changed("moved", base_model_name_or_path="/nowhere/at/all"), "model '/nowhere/at/all' cannot be loaded"),
    ):
        with pytest.raises(ConfigError, match=message):
            Team.from_pretrained({"a": folder})


def test_a_run_of_adapters_with_a_damaged_file_is_one_message(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, "collm-cc", 2, 0, team=lora(), run={"iterations": 1}, rollout={"tasks": 4})
    trainer.run()
    (trainer.folder / "final" / "agent_1" / "adapter_model.safetensors").unlink()
    with pytest.raises(RunError, match=r"final' cannot be read: it lacks adapter_model\.safetensors"):
        load_team(read_config(trainer.folder), trainer.folder / "final")


def test_peft_is_imported_when_an_adapter_is_made_and_not_before() -> None:
    code = (
        "import sys; from collm.models.policy import Policy; import collm.training.trainer; Policy.from_pretrained('tiny'); "
        "print('peft' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"
