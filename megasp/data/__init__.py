"""Data: from text to the batches of a rank. Numbers in, numbers out; no torch.

text files ──train_tokenizer──> tokenizer.json
text files ──preprocess───────> PREFIX.bin, PREFIX.idx      (inspect, verify look at them)
IndexedDataset ──GPTDataset───> sample k ──Loader───> batches     (explain shows which)

indexed_dataset, indexed_dataset_builder    Megatron-LM's .bin/.idx files, read and written
tokenizer, vocabulary_tokenizers, fast_bpe  text to ids and back; tokenizer_options chooses
text_files                                  documents in text and JSON lines
sample_order                                the keyed order of samples, computed and never stored
token_stream, packing, gpt_dataset          which tokens sample k reads
blend                                       which dataset sample k comes from
phases                                      changes of length, batch, blend or corpus in the middle of a run
loader                                      batches of one rank, read ahead
document_lengths                            statistics of a corpus, and whether it looks sorted
atomic_files                                output that appears whole or not at all
train_tokenizer, preprocess, inspect, verify, explain      the commands: `Options` and `run`
"""

from megasp.data.blend import BlendedDataset, BlendOrder
from megasp.data.gpt_dataset import Dataset, GPTDataset, MockDataset, Position, Sample, split_ranges
from megasp.data.indexed_dataset import IndexedDataset, best_dtype
from megasp.data.indexed_dataset_builder import IndexedDatasetBuilder
from megasp.data.loader import Batch, DocumentRules, Loader
from megasp.data.sample_order import SampleOrder
from megasp.data.token_stream import TokenStream
from megasp.data.tokenizer import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    NullTokenizer,
    Tokenizer,
)
from megasp.data.tokenizer_options import TokenizerOptions, build_tokenizer
from megasp.data.vocabulary_tokenizers import GPT2BPETokenizer, SentencePieceTokenizer, TikTokenizer

__all__ = [
    "Batch",
    "BlendOrder",
    "BlendedDataset",
    "ByteTokenizer",
    "Dataset",
    "DocumentRules",
    "GPT2BPETokenizer",
    "GPTDataset",
    "HuggingFaceTokenizer",
    "IndexedDataset",
    "IndexedDatasetBuilder",
    "Loader",
    "MockDataset",
    "NullTokenizer",
    "Position",
    "Sample",
    "SampleOrder",
    "SentencePieceTokenizer",
    "TikTokenizer",
    "TokenStream",
    "Tokenizer",
    "TokenizerOptions",
    "best_dtype",
    "build_tokenizer",
    "split_ranges",
]
