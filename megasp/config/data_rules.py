"""The rules of what a run trains on."""

from pathlib import PurePath

from megasp.config.schema import Config, DataConfig
from megasp.errors import ConfigError


def check_data(config: Config) -> None:
    """Refuse sources that contradict each other, and options of data that would do nothing."""
    data = config.data
    sources = {"--data-path": data.data_path, "--train-data-path": data.train_data_path, "--mock-data": data.mock_data}
    given = [name for name, value in sources.items() if value]
    if not given:
        raise ConfigError("no --data-path", "a run needs a corpus", "give --data-path PREFIX, or --mock-data")
    if len(given) > 1:
        raise ConfigError(" and ".join(given), "they name the same thing, what to train on", f"keep {given[0]}")
    if (data.valid_data_path or data.test_data_path) and not data.train_data_path:
        rule = "with --data-path, validation and test sets are shares of it (--split)"
        raise ConfigError("--valid-data-path or --test-data-path", rule, "name the corpus by --train-data-path instead")
    if data.train_data_path and config.training.eval_iters and not data.valid_data_path:
        rule = "evaluation needs a validation set"
        raise ConfigError("--train-data-path", rule, "add --valid-data-path, or --eval-iters 0")
    if data.train_data_path and data.split != DataConfig().split:
        rule = "it divides --data-path; --train-data-path is all for training"
        raise ConfigError(f"--split {data.split} with --train-data-path", rule, "leave --split out")
    if data.multiple_validation_sets:
        names = [PurePath(prefix).name for prefix in data.valid_data_path]
        if not names or len({*names, "test"}) <= len(names):
            rule = "each prefix of --valid-data-path is a set, and its file name the set's"
            raise ConfigError(f"--multiple-validation-sets with {names}", rule, "give prefixes of different names")
    if data.data_order == "megatron" and data.mock_data:
        raise ConfigError("--data-order megatron with --mock-data", "it orders corpora", "leave one out")
    if data.document_packing != "stream" and (data.data_order == "megatron" or data.mock_data):
        other = "--mock-data" if data.mock_data else "--data-order megatron"
        rule = "it packs the documents of a corpus in the keyed order"
        raise ConfigError(f"--document-packing {data.document_packing} with {other}", rule, "leave one out")
    if data.eod_starts_document and not (data.reset_position_ids or data.reset_attention_mask):
        raise ConfigError("--eod-starts-document", "nothing depends on documents", "add --reset-position-ids")
