"""The compiled IOI transformer: its own forward pass, behaviour, exact cases, and the files that are shipped."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from circuit_generalization import compiled, exact_scores
from circuit_generalization.circuit import Circuit, circuit_from_dict, load_circuit
from circuit_generalization.errors import InputError

SHIPPED = compiled.DATA / "models" / "compiled-ioi"


@pytest.fixture(scope="module")
def model():
    return compiled.compile_ioi()


@pytest.fixture(scope="module")
def cases(compiled_numbers):
    return exact_scores.compiled_cases(compiled_numbers, exact_scores.compiled_prompts(16))


def hugging_face_logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


def test_numpy_forward_is_hugging_face_forward(model, compiled_numbers):
    worst = max(
        np.abs(exact_scores.numpy_forward(compiled_numbers, text)[0] - hugging_face_logits(model, text)).max()
        for p in exact_scores.compiled_prompts(20, seed=2) for text in (p.clean, p.counterfactual, p.donor)
    )
    assert worst < 5e-5


def test_numpy_forward_on_a_random_model_with_every_parameter_used():
    from circuit_generalization.models import random_gpt2

    random, tokens = random_gpt2(seed=3, n_heads=4), [5, 9, 9, 63, 0, 17]
    ours, _ = exact_scores.numpy_forward(exact_scores.numpy_weights(random), tokens, n_heads=4)
    assert np.abs(ours - hugging_face_logits(random, tokens)).max() < 1e-4


def test_edit_replaces_what_a_hook_on_the_output_matrix_replaces(model, compiled_numbers):
    prompt = exact_scores.compiled_prompts(1)[0]
    layer, head, position = 2, 4, prompt.positions["END"]
    z = np.linspace(-1, 1, compiled.D_HEAD)
    edited, _ = exact_scores.numpy_forward(compiled_numbers, prompt.clean, {(layer, head): ([position], z[None])})

    def replace(module, args):
        x = args[0].clone()
        x[0, position, head * compiled.D_HEAD : (head + 1) * compiled.D_HEAD] = torch.tensor(z)
        return (x,)

    handle = model.transformer.h[layer].attn.c_proj.register_forward_pre_hook(replace)
    try:
        expected = hugging_face_logits(model, prompt.clean)
    finally:
        handle.remove()
    assert np.abs(edited - expected).max() < 5e-5
    assert np.abs(edited - hugging_face_logits(model, prompt.clean)).max() > 0.1  # the edit does something


@pytest.mark.parametrize("template", exact_scores.TEMPLATES[:2])
@pytest.mark.parametrize("order", ["ABBA", "BABA"])
def test_it_is_always_right_by_a_healthy_margin(compiled_numbers, template, order):
    tokenizer, rng = compiled.compiled_tokenizer(), np.random.default_rng(7)
    names, lds = compiled.compiled_words()["names"], []
    for _ in range(60):
        p = exact_scores.exact_prompt(tokenizer, template, order, rng.choice(names, 6, replace=False).tolist())
        last = exact_scores.numpy_forward(compiled_numbers, p.clean)[0][-1]
        assert last.argmax() == p.answer
        lds.append(last[p.answer] - last[p.distractor])
    assert min(lds) > 1.5 and 3 < np.mean(lds) < 8


def test_every_name_can_be_the_answer_and_the_subject(compiled_numbers):
    tokenizer, names = compiled.compiled_tokenizer(), compiled.compiled_words()["names"]
    assert len(set(names)) == 120
    for i in range(120):
        six = [names[(i + k) % 120] for k in range(6)]
        p = exact_scores.exact_prompt(tokenizer, exact_scores.TEMPLATES[i % 2], ("ABBA", "BABA")[i // 2 % 2], six)
        assert exact_scores.numpy_forward(compiled_numbers, p.clean)[0][-1].argmax() == p.answer


@pytest.mark.parametrize("case", list(exact_scores.case_circuits()))
def test_each_case_gets_its_verdict(cases, case):
    scores = cases[case]["scores"]
    assert (scores.verdict == cases[case]["verdict"]).all(), scores.verdict.value_counts().to_dict()
    assert np.isfinite(scores.drop(columns="verdict").to_numpy()).all()
    assert circuit_from_dict(json.loads(json.dumps(cases[case]["circuit"]))).components


def test_cases_show_five_verdicts(cases):
    assert {c["verdict"] for c in cases.values()} == {"active", "shortfall", "overshoot", "redundant", "rerouted"}


def test_verdicts_hold_under_the_resample_donor_for_nearly_all_prompts(compiled_numbers):
    for name, case in exact_scores.compiled_cases(compiled_numbers, exact_scores.compiled_prompts(40, seed=9), "donor").items():
        assert (case["scores"].verdict == case["verdict"]).mean() >= 0.9, name


def test_every_role_is_needed(cases):
    model = cases["true"]["scores"].ld_model
    for role in ("duplicate token", "S-inhibition", "name mover"):
        assert (cases[f"without {role}"]["scores"].ld_circuit < 0.3 * model).all()
    assert (cases["without negative mover"]["scores"].ld_circuit > 1.2 * model).all()


def test_full_circuit_is_the_model_and_empty_circuit_is_everything_ablated(compiled_numbers):
    prompt = exact_scores.compiled_prompts(1)[0]
    donor_z = exact_scores.numpy_forward(compiled_numbers, prompt.counterfactual)[1]
    empty = Circuit((), universe="heads")
    assert exact_scores.edits_for("complement", empty, prompt, donor_z) == {}
    lds = exact_scores.expected_lds(compiled_numbers, empty, prompt)
    assert lds["ld_circuit"] == lds["ld_ablated"] and lds["ld_complement"] == lds["ld_restored"] == lds["ld_model"]


HEADS = st.dictionaries(st.sampled_from([f"a{layer}.h{h}" for layer in range(4) for h in range(8)]),
                        st.lists(st.sampled_from(["IO", "IO2", "S1", "S2", "END"]), min_size=1, unique=True), max_size=9)
TWICE = exact_scores.compiled_prompts(1, seed=8, more=["IO"])[0]


@given(HEADS)
def test_circuit_and_complement_share_out_what_is_ablated(at):
    """So a necessity is 1 less the sufficiency of the rest; and restoring gives back the tokens that no node lists, and no others."""
    circuit, donor_z = Circuit.from_components(list(at), positions=at, universe="heads"), np.zeros((4, 8, len(TWICE.clean), 16))
    pairs = {run: {(head, i) for head, (places, _) in exact_scores.edits_for(run, circuit, TWICE, donor_z).items() for i in places}
             for run in ("model", "ablated", "circuit", "complement", "restored")}
    listed = {TWICE.positions[role] for roles in at.values() for role in roles}
    assert pairs["model"] == set() and len(pairs["ablated"]) == 32 * len(TWICE.clean)
    assert pairs["circuit"] | pairs["complement"] == pairs["ablated"] and not pairs["circuit"] & pairs["complement"]
    assert pairs["restored"] == {(head, i) for head, i in pairs["circuit"] if i in listed}


@pytest.mark.parametrize("more, roles", [((), []), (("IO",), ["IO2"]), (("S",), []), (("IO", "IO"), ["IO2", "IO3"]), (("S", "IO"), ["IO2"])])
def test_prompts_name_who_they_should_as_often_as_they_should(more, roles):
    vocabulary = compiled.compiled_vocabulary()
    known = {vocabulary["Ġ" + name] for name in compiled.compiled_words()["names"]}
    for i, p in enumerate(exact_scores.compiled_prompts(4, seed=2, more=more)):
        at = [i for i, token in enumerate(p.clean) if token in known]
        assert len(at) == 3 + len(more)
        assert [p.clean.count(p.answer), p.clean.count(p.distractor)] == [1 + more.count("IO"), 2 + more.count("S")]
        assert list(p.positions) == ["IO", "S1", "S1+1", "S2", "END", *roles]
        assert p.positions["S2"] == at[-1] and p.positions["END"] == len(p.clean) - 1
        assert all(p.clean[p.positions[role]] == p.answer for role in ("IO", *roles))
        assert {p.clean[p.positions[role]] for role in ("S1", "S2")} == {p.distractor} and p.positions["S1+1"] == p.positions["S1"] + 1
        new = [i for i in range(len(p.clean)) if p.clean[i] != p.counterfactual[i]]
        assert new == at[2:] and len(set(p.counterfactual[i] for i in at)) == len(at)
        assert [i for i in range(len(p.clean)) if p.clean[i] != p.donor[i]] == at
        assert len({p.donor[i] for i in at} | {p.counterfactual[i] for i in at}) == 2 * len(at)
        assert p.label == f"{2 * len(more) + i % 2}-{('ABBA', 'BABA')[i // 2]}" and (at[0] == p.positions["IO"]) == (i < 2)


@pytest.mark.parametrize("donor", ["counterfactual", "donor"])
def test_prompt_set_is_the_same_prompts(donor):
    prompts = exact_scores.compiled_prompts(4, more=["IO"])
    made = exact_scores.as_prompt_set(prompts, donor)
    for i, p in enumerate(prompts):
        n = len(p.clean)
        assert made.lengths[i] == n and made.tokens[i, :n].tolist() == p.clean and made.counterfactual[i, :n].tolist() == getattr(p, donor)
        assert [made.answers[i].tolist(), made.distractors[i].tolist()] == [[p.answer], [p.distractor]]
        assert {role: int(at[i]) for role, at in made.positions.items()} == p.positions and made.labels.template[i] == p.label


@pytest.mark.parametrize("row, verdict", [
    ((0.0, 3.0, 1.0, 1.0), "model_fails"), ((3.0, 0.9, 1.0, 1.0), "undecided"), ((3.0, 4.0, 1.31, 1.0), "overshoot"),
    ((3.0, 4.0, 1.29, 0.5), "active"), ((3.0, 4.0, 0.71, 0.49), "redundant"), ((3.0, 4.0, 0.69, 0.5), "shortfall"),
    ((3.0, 4.0, 0.69, 0.49), "rerouted"),
])
def test_verdict_takes_the_first_line_that_fits(row, verdict):
    assert exact_scores.expected_verdict(*row, scale=4.0) == verdict


def test_other_heads_change_their_own_weights_and_no_others():
    plain, other = compiled.compiled_weights(), compiled.compiled_weights(compiled.compiled_heads() | {"a2.h4": compiled.duplicate_token()})
    changed = {name for name in plain if not np.array_equal(plain[name], other[name])}
    assert changed == {f"transformer.h.2.attn.{name}" for name in ("c_attn.weight", "c_attn.bias", "c_proj.weight")}
    rows = (plain["transformer.h.2.attn.c_proj.weight"] != other["transformer.h.2.attn.c_proj.weight"]).any(1).reshape(8, 16).any(1)
    assert rows.nonzero()[0].tolist() == [4]


def test_circuit_of_other_heads_lists_those_that_are_no_decoys():
    heads = compiled.compiled_heads() | {"a3.h0": compiled.name_mover(2.0), "a2.h0": compiled.decoy("names", 0.3)}
    circuit = compiled.compiled_circuit(heads=heads)
    assert circuit.components == ("a0.h1", "a0.h6", "a1.h2", "a1.h5", "a2.h4", "a3.h0", "a3.h3")
    assert {"a1.h2->a3.h0<q>", "a3.h0->logits"} < set(circuit.edges) and "a2.h0->logits" not in circuit.edges
    assert compiled.compiled_circuit(["name mover"], heads).components == ("a2.h4", "a3.h0")


def test_decoys_write_into_the_answer(compiled_numbers):
    """Zeroing any one of the decoys that act at END changes the logit difference."""
    prompt = exact_scores.compiled_prompts(1, seed=4)[0]
    logits, z = exact_scores.numpy_forward(compiled_numbers, prompt.clean)
    decoys = [tuple(map(int, (n[1], n[-1]))) for n, h in compiled.compiled_heads().items() if h.position is None]
    loud = 0
    for key in decoys:
        last = exact_scores.numpy_forward(compiled_numbers, prompt.clean, {key: (range(len(prompt.clean)), 0 * z[key])})[0][-1]
        loud += abs((last - logits[-1])[prompt.answer] - (last - logits[-1])[prompt.distractor]) > 1e-3
    assert len(decoys) == 25 and loud >= 20


def test_circuit_heads_read_what_the_circuit_says(model):
    prompt = exact_scores.compiled_prompts(1, seed=6)[0]
    with torch.no_grad():
        attentions = model(torch.tensor([prompt.clean]), output_attentions=True).attentions
    for node in compiled.compiled_circuit().nodes:
        at, to = (prompt.positions[name] for name in (*node.positions, *node.attends_to))
        assert attentions[node.component.layer][0, node.component.head, at, to] > 0.95, node.name


def test_shipped_model_is_what_the_code_makes(model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shipped = AutoModelForCausalLM.from_pretrained(SHIPPED, attn_implementation="eager", dtype=torch.float32)
    made = model.state_dict()
    assert shipped.state_dict().keys() == made.keys()
    for name, parameter in shipped.state_dict().items():
        torch.testing.assert_close(parameter, made[name], rtol=0, atol=1e-5)
    text = "When Mary and John got to the park, John decided to give a drink to"
    assert AutoTokenizer.from_pretrained(SHIPPED).tokenize(text) == compiled.compiled_tokenizer().tokenize(text)
    assert (SHIPPED / "README.md").read_text(encoding="utf-8") == compiled.compiled_card()
    assert sum(p.stat().st_size for p in SHIPPED.iterdir()) < 2_000_000


def test_shipped_circuit_is_the_compiled_circuit():
    shipped = load_circuit("compiled-ioi-ioi")
    assert shipped == compiled.compiled_circuit() and shipped.provenance["kind"] == "compiled"
    data = json.loads((compiled.DATA / "circuits" / "compiled-ioi-ioi.json").read_text(encoding="utf-8"))
    assert data["cfg"] == {"n_layers": 4, "n_heads": 8, "d_model": 128, "parallel_attn_mlp": False}


def test_saving_twice_gives_the_same_bytes_and_leaves_the_random_state_alone(tmp_path):
    before = torch.get_rng_state()
    one, two = (compiled.save_compiled(tmp_path / name) for name in ("one", "two"))
    assert torch.equal(before, torch.get_rng_state())
    assert {p.name for p in one.iterdir()} == {p.name for p in two.iterdir()}
    assert all(p.read_bytes() == (two / p.name).read_bytes() for p in one.iterdir())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]


def test_saving_refuses_to_replace_a_folder_that_holds_no_model(tmp_path):
    (tmp_path / "diary").mkdir()
    (tmp_path / "diary" / "monday.txt").write_text("rain")
    with pytest.raises(InputError, match="diary"):
        compiled.save_compiled(tmp_path / "diary")
    assert (tmp_path / "diary" / "monday.txt").read_text() == "rain"


def test_tokenizer_reads_any_text_and_takes_its_words_whole():
    tokenizer, words = compiled.compiled_tokenizer(), compiled.compiled_words()
    for text in ("Then, Mary and John went to the store.", "naïve “Zoë”\n\t42 $", ""):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    pieces = [" " + name for name in words["names"]] + words["words"]
    assert all(len(tokenizer(p)["input_ids"]) == 1 for p in pieces)
