import sys
import types

import jax
import numpy as np
import pytest

from data.tokenizers import Bytes
from deltanet.evaluators.harness import harness_model
from training.errors import UserError


class Request:
    def __init__(self, *args):
        self.args = args


@pytest.fixture
def harness(monkeypatch):
    """Stands for the package: its base class, which has no methods of its own here."""
    module = types.ModuleType("lm_eval.api.model")
    module.LM = type("LM", (), {})
    for name in ("lm_eval", "lm_eval.api"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", module)
    return module


def test_the_three_methods(model, logits, harness):
    adapted = harness_model(model, Bytes(), longest=32, batch=2)
    assert isinstance(adapted, harness.LM)
    row = np.concatenate([[256], Bytes().encode("ab cd")])
    logs = jax.nn.log_softmax(logits(row[:-1]))
    each = np.asarray(logs)[np.arange(5), row[1:]]
    [(found, greedy), (alone, _)] = adapted.loglikelihood([Request("ab", " cd"), Request("", "ab cd")])
    np.testing.assert_allclose(found, each[2:].sum(), rtol=1e-5)
    np.testing.assert_allclose(alone, each.sum(), rtol=1e-5)
    assert greedy is False
    rolling = adapted.loglikelihood_rolling([Request("ab cd"), Request("x" * 40)])
    np.testing.assert_allclose(rolling[0], each.sum(), rtol=1e-5)
    assert rolling[1] < 5 * rolling[0]
    whole = adapted.generate_until([Request("ab", {"max_gen_toks": 6})])[0]
    until = adapted.generate_until([Request("ab", {"max_gen_toks": 6, "until": [whole[2]]})])[0]
    assert until == whole.partition(whole[2])[0]


def test_without_the_package(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match="pip install lm_eval"):
        harness_model(model, Bytes(), 32)
