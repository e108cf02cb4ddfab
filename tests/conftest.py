"""What several test files share: the Hypothesis profile, small models that are loaded once, and a hub that is out of reach.

Fixtures of session scope are shared by all tests of a worker: read them, run them, never change them.
"""

import json
from pathlib import Path

import pytest
from hypothesis import settings

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"  # real files that are not part of the repository

# The same examples on every run, so that a red build is red again; no deadline, since a first call imports and compiles.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def compiled():
    """The bridge of `compiled-ioi`: four layers of eight heads, with a tokenizer and a known circuit."""
    from circuit_generalization.models import load_model

    return load_model("compiled-ioi")


@pytest.fixture(scope="session")
def compiled_numbers():
    """The parameters of `compiled-ioi` for `exact_scores.numpy_forward`."""
    from circuit_generalization.compiled import compile_ioi
    from circuit_generalization.exact_scores import numpy_weights

    return numpy_weights(compile_ioi())


@pytest.fixture(scope="session")
def micro():
    """One layer, one head, three tokens: every number can be computed by hand. No tokenizer."""
    from circuit_generalization.models import as_bridge, micro_gpt2

    return as_bridge(micro_gpt2())


@pytest.fixture(scope="session")
def random_model():
    """Two layers of four heads, 64 tokens, 32 positions, every parameter random. No tokenizer."""
    from circuit_generalization.models import as_bridge, random_gpt2

    return as_bridge(random_gpt2(seed=1, n_layers=2, n_heads=4, d_model=32))


@pytest.fixture
def no_hub(monkeypatch):
    """The model hub cannot be reached."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")


@pytest.fixture(scope="session")
def shared():
    """`shared(path)`: a real file that is not part of the repository, or a skip that says which is missing."""
    def find(path):
        if not (SHARED / path).is_file(): pytest.skip(f"shared/data/{path} is not part of this repository")
        return SHARED / path

    return find


@pytest.fixture(scope="session")
def gpt2(shared):
    """GPT-2's own tokenizer."""
    from transformers import GPT2TokenizerFast

    vocabulary, merges = (shared(f"gpt2-tokenizer/{name}").read_text(encoding="utf-8") for name in ("vocab.json", "merges.txt"))
    return GPT2TokenizerFast(vocab=json.loads(vocabulary), merges=[tuple(line.split()) for line in merges.splitlines()[1:] if line])
