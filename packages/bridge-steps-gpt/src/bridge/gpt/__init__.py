"""GPT models: their configuration, their data, recipes that train them."""
