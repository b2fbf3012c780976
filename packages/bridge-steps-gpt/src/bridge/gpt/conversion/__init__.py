"""Import and export of models in Hugging Face's format: config.json and safetensors files.

The submodules are imported by name: `command` is loaded whenever the `bridge` command starts, so
this package imports nothing by itself.
"""
