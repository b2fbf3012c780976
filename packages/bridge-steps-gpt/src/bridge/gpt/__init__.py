"""GPT models.

recipes           configurations that train as they are
model_config      the model section of a run's configuration
model             the model; layer_specs its layers
families/         architectures in Hugging Face's format, a file for each
conversion/       import from Hugging Face's format, and export to it
data/             text to samples, for pretraining and fine-tuning
packed_documents  boundaries of documents in one sequence, for `bridge.training.gpt_step`
sampling          text from a trained model
run_summary       the last lines of a run of gpt-tiny; bigram_entropy its baseline
"""
