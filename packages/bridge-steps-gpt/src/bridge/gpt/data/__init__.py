"""Text to tokens to training samples, over megatron-core's datasets and tokenizers.

The submodules are imported by name (`bridge.gpt.data.dataset_config`): `command` is loaded whenever
the `bridge` command starts, so this package imports nothing by itself.
"""
