"""Megatron-LM's checkpoints, read without running anything that is in them."""
