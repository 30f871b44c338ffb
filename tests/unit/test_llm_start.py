"""What a start does side by side."""

import pytest

import lockstep.llm
from lockstep.llm import LLM


class _Asked(Exception):
    pass


@pytest.mark.parametrize(
    "settings,after",
    [
        ({}, "torch"),  # the model's weights are packed in this process, which imports torch: the tokenizer waits for that
        ({"distributed_executor_backend": "external_launcher"}, "torch"),
        ({"tensor_parallel_size": 2}, ""),
        ({"distributed_executor_backend": "mp"}, ""),
        ({"data_parallel_size": 2}, ""),
    ],
)
def test_the_tokenizer_waits_for_torch_where_this_process_is_a_rank(settings, after, monkeypatch):
    def asked(load, after=""):
        raise _Asked(after)

    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)  # for the external launcher
    monkeypatch.setattr(lockstep.llm, "load_in_background", asked)
    with pytest.raises(_Asked) as found:
        LLM("", **settings)
    assert found.value.args == (after,)
