"""`organism-b` and `organism-c` are what their cards say: other algorithms, and another architecture, for the same task."""

import pytest
import torch

from circuit_generalization.attention import attention_to
from circuit_generalization.circuit import load_circuit
from circuit_generalization.models import final_logits, load_model, model_hash
from circuit_generalization.organisms import ORGANISMS
from circuit_generalization.tasks import make_prompts, reference_pool

LOOKS = {"END to S2": ("END", "S2"), "END to IO+1": ("END", "IO+1"), "S2 to S1": ("S2", "S1"), "S2 to S1+1": ("S2", "S1+1")}


@pytest.fixture(scope="module", params=["organism-b", "organism-c"])
def name(request): return request.param


@pytest.fixture(scope="module")
def attention():
    "By organism: mean attention by head, on prompts that repeat a name and on others; a cache."
    known = {}

    def of(name):
        if name not in known:
            model = load_model(name)
            prompts = make_prompts("ioi", n=72, seed=0, tokenizer=model.tokenizer)
            sets = dict(repeated=prompts, nothing=reference_pool(prompts, model.tokenizer, n=4))
            known[name] = {(kind, look): attention_to(model, p.tokens, p.positions[a], p.positions[b]).mean(0)
                           for kind, p in sets.items() for look, (a, b) in LOOKS.items()}
        return known[name]
    return of


def heads_of(circuit, role): return [n.component for n in circuit.nodes if n.role == role]


def test_the_circuit_is_small_has_stages_and_is_of_these_weights(name):
    circuit = load_circuit(f"{name}-ioi")
    assert len(circuit) <= 12 and len({n.component.layer for n in circuit.nodes}) >= 3
    duplicate, suppressors = heads_of(circuit, "duplicate token"), heads_of(circuit, "S suppressor")
    assert duplicate and suppressors and heads_of(circuit, "previous token")
    assert max(c.layer for c in duplicate) < min(c.layer for c in suppressors)
    assert circuit.provenance["model_hash"] == model_hash(name)
    assert min(circuit.provenance["sufficiency"], circuit.provenance["necessity"]) > 0.9


@pytest.mark.parametrize("layer, head", [(1, 4), (1, 7)])
def test_suppressors_of_b_find_the_subject_only_where_it_is_repeated(attention, layer, head):
    found = attention("organism-b")
    assert found["repeated", "END to S2"][layer, head] > 0.4 and found["nothing", "END to S2"][layer, head] < 0.05
    assert 0.2 < found["repeated", "END to IO+1"][layer, head] < 0.5


def test_b_sees_the_duplicate_at_its_second_place(attention): assert attention("organism-b")["repeated", "S2 to S1"][0, 0] > 0.5


def test_c_has_an_induction_head_that_needs_the_repeated_name(attention):
    found = attention("organism-c")
    assert found["repeated", "S2 to S1+1"][1, 1] > 0.9 and found["nothing", "S2 to S1+1"][1, 1] < 0.1


@pytest.mark.parametrize("head, least, most", [(0, 1.7, 2.5), (6, 1.7, 2.5), (7, 1.7, 2.5), (3, 1.0, 1.2)])
def test_suppressors_of_c_read_the_subject_twice_as_much_when_repeated_but_one(attention, head, least, most):
    found = attention("organism-c")
    assert least < found["repeated", "END to S2"][2, head] / found["nothing", "END to S2"][2, head] < most


def test_c_prefers_the_other_name_also_where_none_is_repeated():
    "As its card says: the logit difference is 12.5, and 17.2 when another name stands in the place of the first S."
    model = load_model("organism-c")
    prompts, others = (make_prompts("ioi", n=72, seed=0, tokenizer=model.tokenizer, split=split) for split in ("scored", "discovery"))
    tokens, rows = prompts.tokens.clone(), torch.arange(72)
    tokens[rows, prompts.positions["S1"]] = others.answers[:, 0]
    found = []
    for given in (prompts.tokens, tokens):
        logits = final_logits(model, given, prompts.lengths)
        found.append((logits.gather(1, prompts.answers) - logits.gather(1, prompts.distractors)).mean().item())
    assert found == pytest.approx([12.5, 17.2], abs=0.05)


def test_c_is_of_another_family():
    assert load_model("organism-c").cfg.positional_embedding_type == "rotary" and ORGANISMS["organism-c"].family == "llama"
    assert load_model("organism-c").cfg.normalization_type.startswith("RMS")
