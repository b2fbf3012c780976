"""Models in Hugging Face's format, in and out: a folder of safetensors files and a config.json.

The submodules are imported by name: `command` is loaded whenever the `bridge` command starts, so
this package imports nothing by itself.
"""
