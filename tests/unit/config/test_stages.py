"""How layers are split into pipeline stages, and what is said of a split that cannot be."""

import dataclasses

import pytest

from megasp.config.load import from_values
from megasp.config.schema import Config
from megasp.config.stages import split, table
from megasp.config.validate import validate
from megasp.errors import ConfigError

MODEL = {
    "num_layers": 30, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 1, "make_vocab_size_divisible_by": 1,
    "seq_length": 32, "train_iters": 1, "lr": 1e-3, "mock_data": True, "global_batch_size": 8, "attention_dropout": 0.0,
}  # fmt: skip


def config(**values: object) -> Config:
    return from_values(MODEL | {"pipeline_model_parallel_size": 4} | values)


def counts(**values: object) -> list[int]:
    stages = split(config(**values))
    assert [stage.layers.start for stage in stages[1:]] == [stage.layers.stop for stage in stages[:-1]]
    assert stages[0].first and stages[-1].last and sum(stage.cost for stage in stages) == pytest.approx(1)
    return [len(stage.layers) for stage in stages]


def test_no_layer_is_dropped() -> None:
    """Megatron-LM once built 28 of 30 layers over 4 stages (its issue 1304)."""
    assert counts() == [7, 8, 8, 7]
    for ranks in range(1, 31):
        split_counts = counts(pipeline_model_parallel_size=ranks)
        assert sum(split_counts) == 30 and max(split_counts) - min(split_counts) <= 1


def test_head_counts() -> None:
    """A head worth several layers makes the last stage shorter."""
    shorter = counts(vocab_size=4096)
    assert shorter[-1] < shorter[0] and sum(shorter) == 30


def test_ends_by_flags() -> None:
    assert counts(decoder_first_pipeline_num_layers=3, decoder_last_pipeline_num_layers=5) == [3, 11, 11, 5]
    assert counts(decoder_last_pipeline_num_layers=3) == [9, 9, 9, 3]


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("Et*3|(tt|)*12t*3|L", [3, *[2] * 12, 3, 0]),
        ("E|t*15|t*14|t,L", [0, 15, 14, 1]),
        ("E(t|)*29,t|L", [1] * 30 + [0]),
    ],
)
def test_layout_string(layout: str, expected: list[int]) -> None:
    assert counts(pipeline_model_parallel_layout=layout, pipeline_model_parallel_size=len(expected)) == expected


def test_layout_string_names_the_chunks() -> None:
    made = config(pipeline_model_parallel_layout="Et*4|(t*4|)*6t*2L")
    assert made.pipeline == dataclasses.replace(made.pipeline, schedule="interleaved", ranks=4, chunks=2)


def test_virtual_stages() -> None:
    for flags in (
        {"num_virtual_stages_per_pipeline_rank": 2},
        {"num_layers_per_virtual_pipeline_stage": 5},
        {"pipeline_schedule": "zbv"},
    ):
        assert counts(pipeline_model_parallel_size=3, **flags) == [5] * 6


def test_table() -> None:
    lines = table(split(config()), [0, 1, 2, 3])
    assert lines[0] == "  stage 0   on pipeline rank 0    23.3% of the work: embedding, layers 0-6"
    assert lines[-1].endswith("layers 23-29, head")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"pipeline_model_parallel_size": 31}, "30 layers over 31 pipeline stages.*use at most 30 stages"),
        ({"decoder_first_pipeline_num_layers": 29}, "29 in stage 0"),
        ({"pipeline_model_parallel_size": 2, "decoder_first_pipeline_num_layers": 3,
          "decoder_last_pipeline_num_layers": 3}, "3 in stage 0 and 3 in stage 1"),
        ({"decoder_first_pipeline_num_layers": 3, "pipeline_schedule": "zbv"}, "with 2 virtual stages"),
        ({"pipeline_model_parallel_layout": "Et*10|t*10|x|L"}, r"Et\*10\|t\*10\|>x<\|L, character 12"),
        ({"pipeline_model_parallel_layout": "Et*10||t*10|tL"}, r">\|<t\*10\|tL.*a stage holds something"),
        ({"pipeline_model_parallel_layout": "t*10|t*10|t*9|tL"}, r">t<\*10.*begin with E"),
        ({"pipeline_model_parallel_layout": "Et*10|t*10|t*9|t"}, r">t<.*end with L"),
        ({"pipeline_model_parallel_layout": "Et*10|t*10|t*9|ttL"}, r"t>t<L.*layer 31 of a model of 30"),
        ({"pipeline_model_parallel_layout": "Et*10|t*10|t*8|tL"}, "29 layers of 30"),
        ({"pipeline_model_parallel_layout": "Et*10|(tt|t*9|tL"}, r"Et\*10\|>\(<.*never closed"),
        ({"pipeline_model_parallel_layout": "Et*10|tt)|t*9|tL"}, r"tt>\)<.*no \( was opened"),
        ({"pipeline_model_parallel_layout": "Et*|t*10|t*9|tL"}, r"t>\*<.*a number follows"),
        ({"pipeline_model_parallel_layout": "Et*10|t*10|t*10|mL"}, ">m<.*multi-token"),
        ({"pipeline_model_parallel_layout": ""}, "is empty"),
        ({"pipeline_model_parallel_layout": "Et*15|t*15L"}, r"0.5 stages a rank"),
        ({"pipeline_model_parallel_layout": "Et*10|t*10|t*10|L", "decoder_first_pipeline_num_layers": 10}, "leave one"),
        ({"num_layers_per_virtual_pipeline_stage": 4}, r"1.875 stages a rank"),
        ({"num_layers_per_virtual_pipeline_stage": 0}, "stages a rank"),
        ({"num_virtual_stages_per_pipeline_rank": 2, "micro_batch_size": 4}, "2 microbatches.*use 4"),
        ({"num_virtual_stages_per_pipeline_rank": 2, "pipeline_schedule": "zb-h1"}, "it has one"),
        ({"pipeline_model_parallel_size": 1, "pipeline_schedule": "zbv"}, "nothing to schedule"),
    ],
)  # fmt: skip
def test_refusals(flags: dict[str, object], said: str) -> None:
    made = config(**flags)
    with pytest.raises(ConfigError, match=said):
        validate(made, made.parallel.pipeline_model_parallel_size)
