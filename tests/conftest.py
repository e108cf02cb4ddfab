"""What several test files share: the Hypothesis profile, small models that are loaded once, and a hub that is out of reach.

Fixtures of session scope are shared by all tests of a worker: read them, run them, never change them.
"""

import pytest
from hypothesis import settings

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
